"""Rewards of a response's form and length, as numbers in [-1, 1] before their weight."""

from __future__ import annotations

import re

from sedsft.reward_config import FormatReward, LengthReward, OverlongPenalty
from sedsft.rewards.answer_text import boxes

_THINK = re.compile(r"</?think>")


def format_reward(config: FormatReward, response: str) -> float:
    """1 for the form that `config` asks for, else 0. What the answer is does not matter."""
    answer = response
    if config.form == "think_box":
        if _THINK.findall(response) != ["<think>", "</think>"] or not response.lstrip().startswith("<think>"):
            return 0.0
        answer = response.partition("</think>")[2]
    return float(len(boxes(answer)) == 1)


def length_reward(config: LengthReward, tokens: int) -> float:
    """1 up to `full_tokens`, (zero_tokens - tokens) / (zero_tokens - full_tokens) behind it, 0 from `zero_tokens` on."""
    return min(1.0, max(0.0, (config.zero_tokens - tokens) / (config.zero_tokens - config.full_tokens)))


def overlong_penalty(config: OverlongPenalty, tokens: int) -> float:
    """0 up to max - buffer tokens, then (max - buffer - tokens) / buffer, -1 from max on (DAPO, equation 13)."""
    return min(0.0, max(-1.0, (config.max_tokens - config.buffer_tokens - tokens) / config.buffer_tokens))
