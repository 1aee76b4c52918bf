"""A random tiny Llama with a word-level tokenizer: 0.19M parameters, 72 tokens, tied embeddings, 2 heads of 32."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", *(f"w{i}" for i in range(67))]
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ ' <user> ' if m.role == 'user' else ' <assistant> ' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def save_tokenizer(folder: Path) -> None:
    """Word-level tokenizer with chat template, pad, bos and eos."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)


def random_llama(seed: int, *, tied: bool = True) -> LlamaForCausalLM:
    """Weights with a standard deviation of 0.15: next-token distributions differ, and bf16 rounding stays small."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def save_tiny_llama(folder: Path, seed: int = 0, *, tied: bool = True) -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    random_llama(seed, tied=tied).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
