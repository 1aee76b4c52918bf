"""Learning rate as a function of the optimizer step."""

from __future__ import annotations

import math

from sedsft.config import AdamWConfig


def learning_rate(config: AdamWConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 1) out of `total_steps`; W = `warmup_steps`, peak = `learning_rate`.

    step <= W: peak * step / (W + 1), which rises linearly from 0 and skips the useless rate 0 itself
    constant:  peak
    cosine:    peak * (m + (1 - m) * (1 + cos(pi * x)) / 2), m = `min_ratio`, x = (step - 1 - W) / (total_steps - W)
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    if config.schedule == "constant":
        return config.learning_rate
    share = min(1.0, (step - 1 - warmup) / max(1, total_steps - warmup))
    floor = config.min_ratio
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2)
