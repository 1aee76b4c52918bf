"""Early warnings of an SFT run: what its figures tell before it has failed. Pure Python; never stops anything.

    loss_spike         loss > median + SPIKE_SCALE * max(MAD, SPIKE_FLOOR * median)     over the WINDOW steps before
    entropy_collapse   mean entropy of the last SMOOTHED steps < COLLAPSE_SHARE * that of the first SMOOTHED steps
    mask_drift         |mean masked share of the last SMOOTHED steps - mask_ratio| > DRIFT

MAD is the median distance from the median. A warning comes once per episode: it can come again after the figure has been back
at less than half of the way to its threshold (`loss_spike`, `mask_drift`) or above RECOVERED_SHARE (`entropy_collapse`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Self

WINDOW = 50
"""Steps whose losses a spike is measured against."""
WARM_UP = 10
"""Steps before the first that can be a spike: a median of fewer says little."""
SPIKE_SCALE = 8.0
"""About 5 standard deviations of a normal distribution, whose MAD is 0.67 of one."""
SPIKE_FLOOR = 0.02
"""Least MAD as a share of the median, so that a loss that hardly moves does not warn of nothing."""
SMOOTHED = 10
"""Steps that entropy and masked share are averaged over."""
COLLAPSE_SHARE = 0.2
RECOVERED_SHARE = 0.3
DRIFT = 0.15
"""Largest distance of the masked share from `mask_ratio`."""

_ADVICE = {
    "loss_spike": "look at the rows of this step; if spikes repeat, lower the learning rate or lengthen the warm-up",
    "entropy_collapse": (
        "the model leaves little to explore for RL: train fewer epochs, lower the learning rate, or use SED with a smaller "
        "mask_ratio or a larger weight"
    ),
    "mask_drift": "the diversity term no longer applies to the share that was asked for: use tau_mode 'running'",
}


@dataclass(frozen=True)
class EarlyWarning:
    """One warning: `figures` are what was seen and what it was compared with."""

    kind: str
    message: str
    figures: dict[str, float]
    advice: str


class EarlyWarnings:
    """Watches the figures of every step; whoever observes the same ones warns at the same steps."""

    def __init__(self, mask_ratio: float | None) -> None:
        """`mask_ratio`: share of tokens that shall get no diversity term; None where the objective asks for none."""
        self._mask_ratio = mask_ratio
        self._losses: list[float] = []
        self._entropies: list[float] = []
        self._masked: list[float] = []
        self._starting: list[float] = []
        self._open: list[str] = []

    def observe(self, figures: Mapping[str, float]) -> list[EarlyWarning]:
        """Take note of a finished step's `loss`, `entropy` and, with a mask ratio, `masked_share`; the warnings it gives."""
        found = [self._spike(figures["loss"]), self._collapse(figures["entropy"])]
        if self._mask_ratio is not None:
            found.append(self._drift(figures["masked_share"], self._mask_ratio))
        return [warning for warning in found if warning is not None]

    def _spike(self, loss: float) -> EarlyWarning | None:
        before, self._losses = self._losses, [*self._losses, loss][-WINDOW:]
        if len(before) < WARM_UP:
            return None
        middle = median(before)
        scale = SPIKE_SCALE * max(median(abs(value - middle) for value in before), SPIKE_FLOOR * abs(middle))
        figures = {"loss": loss, "median": middle, "threshold": middle + scale}
        message = f"loss {loss:.4g} after a median of {middle:.4g} over {len(before)} steps"
        return self._episode("loss_spike", loss > middle + scale, loss < middle + scale / 2, message, figures)

    def _collapse(self, entropy: float) -> EarlyWarning | None:
        if len(self._starting) < SMOOTHED:
            self._starting = [*self._starting, entropy]
        self._entropies = [*self._entropies, entropy][-SMOOTHED:]
        start, now = fmean(self._starting), fmean(self._entropies)
        figures = {"entropy": now, "starting_entropy": start, "threshold": COLLAPSE_SHARE * start}
        message = f"token entropy {now:.4g} over the last {len(self._entropies)} steps, from {start:.4g} over the first"
        collapsed, recovered = now < COLLAPSE_SHARE * start, now > RECOVERED_SHARE * start
        return self._episode("entropy_collapse", collapsed, recovered, message, figures)

    def _drift(self, masked_share: float, mask_ratio: float) -> EarlyWarning | None:
        self._masked = [*self._masked, masked_share][-SMOOTHED:]
        if len(self._masked) < SMOOTHED:
            return None
        now = fmean(self._masked)
        distance = abs(now - mask_ratio)
        figures = {"masked_share": now, "mask_ratio": mask_ratio, "threshold": DRIFT}
        message = f"masked share {now:.3f} over the last {SMOOTHED} steps, expected mask_ratio = {mask_ratio:.3f}"
        return self._episode("mask_drift", distance > DRIFT, distance < DRIFT / 2, message, figures)

    def _episode(self, kind: str, begins: bool, ends: bool, message: str, figures: dict[str, float]) -> EarlyWarning | None:
        if kind in self._open:
            if ends:
                self._open = [other for other in self._open if other != kind]
            return None
        if not begins:
            return None
        self._open = [*self._open, kind]
        return EarlyWarning(kind, message, figures, _ADVICE[kind])

    def state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint."""
        return {
            "losses": self._losses,
            "entropies": self._entropies,
            "masked": self._masked,
            "starting": self._starting,
            "open": self._open,
        }

    @classmethod
    def from_state(cls, mask_ratio: float | None, state: Mapping[str, Sequence[Any]]) -> Self:
        """The warnings whose `state` this is."""
        warnings = cls(mask_ratio)
        warnings._losses, warnings._entropies = list(state["losses"]), list(state["entropies"])
        warnings._masked, warnings._starting = list(state["masked"]), list(state["starting"])
        warnings._open = list(state["open"])
        return warnings
