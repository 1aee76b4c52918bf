"""The tokenizer word by word, the loss against full logits, and a short pre-training that is kept and reused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sedsft.data.chat import load_tokenizer
from sedsft.tasks.tiny_model import VOCABULARY, Recipe, completion_loss, countdown_model, countdown_tokenizer, pretrain_base


def test_tokenizer_words() -> None:
    tokenizer = countdown_tokenizer()
    assert len(tokenizer) == len(VOCABULARY) == 72
    assert tokenizer.convert_ids_to_tokens(tokenizer("<bos>3 7 2 5>24:")["input_ids"]) == [
        "<bos>",
        "3",
        "7",
        "2",
        "5",
        ">",
        "24",
        ":",
    ]
    ids = tokenizer("7*2=14,14-60=1")["input_ids"]
    assert tokenizer.decode(ids) == "7 * 2 = 14 , 14 - 60 = 1"
    assert tokenizer("61 a")["input_ids"] == [tokenizer.unk_token_id] * 2


def test_model_size_and_seed() -> None:
    model = countdown_model(0, 0.06)
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == 72 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64) + 64
    )
    assert (model.config.head_dim, model.config.num_attention_heads) == (32, 2)
    state = torch.get_rng_state()
    assert torch.equal(countdown_model(0, 0.06).lm_head.weight, model.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_completion_loss_is_the_loss_of_completion_tokens_alone() -> None:
    tokenizer = countdown_tokenizer()
    model = countdown_model(1, 0.06)
    texts = ["<bos>3 7 2>8:7+3=10,10-2=8<eos>", "<bos>3 7 2 5>24:7*3=21,5-2=3,21+3=24<eos>"]
    ids_BT = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    loss = completion_loss(model, ids_BT, torch.tensor([7, 8]))
    log_probs_BTV = model(ids_BT).logits.log_softmax(-1)
    expected = [-log_probs_BTV[0, t - 1, ids_BT[0, t]] for t in range(7, 19)]
    expected += [-log_probs_BTV[1, t - 1, ids_BT[1, t]] for t in range(8, 26)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_a_recipe_is_trained_once_and_opens_as_a_hugging_face_folder(tmp_path: Path) -> None:
    recipe = Recipe(seed=5, steps=24, batch_size=16, warmup_steps=4)
    seen: list[tuple[int, int]] = []
    folder = pretrain_base(tmp_path, recipe, on_progress=lambda step, steps, loss: seen.append((step, steps)))
    assert seen == [(20, 24)]
    assert pretrain_base(tmp_path, recipe, on_progress=lambda *_: pytest.fail("trained again")) == folder
    assert [path.name for path in tmp_path.iterdir()] == [recipe.key]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert load_tokenizer(folder).chat_template == countdown_tokenizer().chat_template
    again = AutoModelForCausalLM.from_pretrained(pretrain_base(tmp_path / "again", recipe))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_keys_tell_recipes_apart() -> None:
    assert len({Recipe().key, Recipe(seed=1).key, Recipe(steps=800).key, Recipe(init_std=0.02).key}) == 4
