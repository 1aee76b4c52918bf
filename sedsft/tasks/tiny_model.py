"""The embedded base model: a Llama of 0.19M parameters over a vocabulary of 72 words, pre-trained on countdown.

It is trained on a broad mixture (random problem, random derivation, random operand order), so that a narrow fine-tuning has
diversity to lose. The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sedsft.tasks.countdown import LARGEST_VALUE, Problem, all_problems, derivation_text

VOCABULARY = ("<pad>", "<bos>", "<eos>", "<unk>", *"+-*=,:>", *map(str, range(LARGEST_VALUE + 1)))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ bos_token + message['content'] + ':' }}"
    "{%- elif message['role'] == 'assistant' -%}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ raise_exception('expected user and assistant turns only, got a ' + message['role'] + ' turn; remove it') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

_MAX_POSITIONS = 256
_MAX_STEPS_LENGTH = 26


@dataclass(frozen=True)
class Recipe:
    """How the base model is made; every field is part of the key under which the result is kept."""

    seed: int = 0
    """Seed of initial weights and training sequences."""
    steps: int = 1600
    """Optimizer steps; a quarter of them at each rate of `learning_rates`."""
    batch_size: int = 128
    """Sequences per step."""
    four_number_share: float = 0.7
    """Share of sequences whose problem has four numbers."""
    learning_rates: tuple[float, ...] = (4e-3, 2.4e-3, 1.44e-3, 8.6e-4)
    """AdamW rates, one after the other."""
    init_std: float = 0.06
    """Standard deviation of initial weights. The usual 0.02 suits wide models; at width 64 it needs twice the steps."""
    warmup_steps: int = 20
    """Steps over which the first rate rises linearly from 0."""
    revision: int = 1
    """Raised when a change of the code changes what these figures produce."""

    @property
    def key(self) -> str:
        """Name of the result in a cache folder."""
        parts = (asdict(self), VOCABULARY, CHAT_TEMPLATE)
        return "countdown-base-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


DEFAULT_RECIPE = Recipe()
"""The base model that the measured figures of the demo belong to."""


def countdown_tokenizer() -> PreTrainedTokenizerFast:
    """72 words: four special tokens, seven signs, the numbers 0..60. `<bos>3 7 2 5>24:` is 8 tokens."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"\d+|[^\d]"), behavior="isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=_MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def countdown_model(seed: int, init_std: float) -> LlamaForCausalLM:
    """Untrained model: hidden 64, 4 layers, 2 heads of 32 (vLLM on CPU refuses heads of 16), tied embeddings, fp32."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=_MAX_POSITIONS,
        rms_norm_eps=1e-6,
        initializer_range=init_std,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=VOCABULARY.index("<bos>"),
        eos_token_id=VOCABULARY.index("<eos>"),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain_base(
    cache: Path, recipe: Recipe = DEFAULT_RECIPE, threads: int = 1, on_progress: Callable[[int, int, float], None] | None = None
) -> Path:
    """Folder of the base model of `recipe` below `cache`; trains it (about 80 s on two idle cores) if it is not there yet.

    The folder appears complete or not at all. `on_progress(step, steps, loss)` is called every 20 steps; `threads` are
    PyTorch's while training. The last bits of the weights depend on `threads` and on the PyTorch version.
    """
    folder = cache / recipe.key
    if folder.is_dir():
        return folder
    temporary = cache / f"{recipe.key}.tmp-{os.getpid()}"
    model, loss = _train(recipe, threads, on_progress)
    model.save_pretrained(temporary)
    countdown_tokenizer().save_pretrained(temporary)
    (temporary / "recipe.json").write_text(json.dumps({"recipe": asdict(recipe), "loss": loss}, indent=1), encoding="utf-8")
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)  # another process finished the same recipe first
    return folder


def _train(
    recipe: Recipe, threads: int, on_progress: Callable[[int, int, float], None] | None
) -> tuple[LlamaForCausalLM, float]:
    """The trained model and its mean loss per completion token over the last 20 steps, in nats."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = countdown_model(recipe.seed, recipe.init_std)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
        batches = _batches(recipe)
        losses = []
        for step in range(recipe.steps):
            rate = recipe.learning_rates[step * len(recipe.learning_rates) // recipe.steps]
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / recipe.warmup_steps)
            ids_BT, starts_B = next(batches)
            loss = completion_loss(model, ids_BT, starts_B)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if on_progress and (step + 1) % 20 == 0:
                on_progress(step + 1, recipe.steps, losses[-1])
        return model.eval(), sum(losses[-20:]) / len(losses[-20:])
    finally:
        torch.set_num_threads(threads_before)


def completion_loss(model: LlamaForCausalLM, ids_BT: torch.Tensor, starts_B: torch.Tensor) -> torch.Tensor:
    """Mean -log p over the tokens from `starts_B[b]` to the end token of each row, in nats.

    Rows are padded on the right; causal attention keeps the padding out of every position that carries a loss.
    """
    targets_BS = ids_BT[:, 1:]
    positions_S = torch.arange(1, ids_BT.shape[1])
    trained_BS = (positions_S >= starts_B[:, None]) & (targets_BS != VOCABULARY.index("<pad>"))
    hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH[:, :-1][trained_BS])
    return F.cross_entropy(logits_NV, targets_BS[trained_BS])


def _batches(recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless training batches: token ids, and per row the index of the first completion token."""
    rng = random.Random(recipe.seed)
    problems: dict[int, list[Problem]] = {3: [], 4: []}
    for problem in all_problems():
        if not problem.held_out:
            problems[len(problem.numbers)].append(problem)
    word_ids = {word: i for i, word in enumerate(VOCABULARY)}
    while True:
        ids_BT = torch.full((recipe.batch_size, _MAX_STEPS_LENGTH), word_ids["<pad>"])
        starts = []
        for row_T in ids_BT:
            problem = rng.choice(problems[4 if rng.random() < recipe.four_number_share else 3])
            prompt = ["<bos>", *_words(problem.sample_text(rng)), ":"]
            words = [*prompt, *_words(derivation_text(problem.sample_derivation(rng))), "<eos>"]
            row_T[: len(words)] = torch.tensor([word_ids[word] for word in words])
            starts.append(len(prompt))
        yield ids_BT, torch.tensor(starts)


def _words(text: str) -> list[str]:
    return re.findall(r"\d+|\S", text)
