"""SED's threshold tau over a run: which tokens it is calibrated on, and how it moves. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from sedsft.config import SEDObjective
from sedsft.exploration import MassSketch
from sedsft.records import Example

RELEASED_TOP_K = 10
RELEASED_ROWS = 100


def calibration_top_k(objective: SEDObjective) -> int:
    """k of the masses that tau is calibrated on."""
    return RELEASED_TOP_K if objective.tau_mode == "released" else objective.top_k


def calibration_rows(objective: SEDObjective, held_out: Sequence[Example]) -> list[Example]:
    """Rows whose labelled tokens tau is calibrated on: the held-out ones as they are, or, with `released`, the first 100 of
    them with every token labelled, the prompts' included."""
    if objective.tau_mode != "released":
        return list(held_out)
    return [replace(row, trained_T=np.ones_like(row.trained_T)) for row in held_out[:RELEASED_ROWS]]


class TauController:
    """tau of the next optimizer step.

        fixed, initial, released   tau = tau_0
        running                    S_0 = C,  S_t = tau_smoothing * S_(t-1) + counts_t,  tau_t = threshold(S_t, mask_ratio)

    with C the sketch of the calibration masses, tau_0 = threshold(C, mask_ratio) or the objective's fixed tau, and counts_t
    the sketch of step t's trained tokens. With `running`, tau is read from S every `tau_interval` steps. A step's own masses
    are known only behind it, so its tau is 1 / (1 - tau_smoothing) steps behind the model on average: a model that sharpens
    is masked above mask_ratio by that many steps' drift. Beside this lag, the share realised in a step of n tokens scatters
    with a variance of about r (1 - r) / n * (1 + (1 - tau_smoothing) / (1 + tau_smoothing)), the first summand being the
    step's own tokens, which no tau can take away. Whoever observes the same sketches has the same tau, bit for bit.
    """

    def __init__(self, objective: SEDObjective, calibration: MassSketch | None) -> None:
        """`calibration`: masses for k = `calibration_top_k(objective)` of `calibration_rows`; None with a fixed tau.

        Errors: ValueError for an objective without mask, or a calibration that is missing, empty or not needed.
        """
        if not objective.mask:
            raise ValueError("expected an objective with its mask, got mask=False, which has no tau; build no controller")
        if objective.tau is not None and calibration is not None:
            raise ValueError(f"expected no calibration beside the fixed tau={objective.tau}, got one; leave it out")
        tau = calibration.threshold(objective.mask_ratio) if calibration is not None else objective.tau
        if tau is None:
            raise ValueError("expected a calibration where tau is not fixed, got none; sketch the masses of held-out rows")
        self._objective = objective
        self._running = calibration if self.mode == "running" else None
        self._starting_tau = self._tau = tau
        self._steps = 0

    @property
    def mode(self) -> str:
        """`fixed`, or the objective's `tau_mode`."""
        return "fixed" if self._objective.tau is not None else self._objective.tau_mode

    @property
    def tau(self) -> float:
        """The threshold of the next step."""
        return self._tau

    @property
    def drift(self) -> float:
        """tau - the tau that the run started with."""
        return self._tau - self._starting_tau

    def observe(self, masses: MassSketch) -> None:
        """Take note of a finished step: the masses, for k = top_k, of its trained tokens over all ranks."""
        self._steps += 1
        if self._running is None:
            return
        # A step without tokens says nothing about the model, so the past keeps its weight.
        if masses.num_tokens:
            smoothing = self._objective.tau_smoothing
            self._running = self._running.scaled(smoothing) + masses if smoothing else masses
        if self._steps % self._objective.tau_interval == 0:
            self._tau = self._running.threshold(self._objective.mask_ratio)

    def state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint."""
        return {
            "mode": self.mode,
            "tau": self._tau,
            "starting_tau": self._starting_tau,
            "steps": self._steps,
            "sketch": None if self._running is None else self._running.to_json(),
        }

    @classmethod
    def from_state(cls, objective: SEDObjective, state: Mapping[str, Any]) -> Self:
        """The controller whose `state` this is, bit for bit. Errors: ValueError for the state of another mode."""
        controller = cls.__new__(cls)
        controller._objective = objective
        if state["mode"] != controller.mode:
            raise ValueError(f"expected the state of tau mode {controller.mode!r}, got {state['mode']!r}; resume the same spec")
        controller._tau, controller._starting_tau = float(state["tau"]), float(state["starting_tau"])
        controller._steps = int(state["steps"])
        controller._running = None if state["sketch"] is None else MassSketch.from_json(state["sketch"])
        return controller
