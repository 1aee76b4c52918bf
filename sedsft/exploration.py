"""Calibration of tau, the top-k mass from which on a token has too little to explore for SED's diversity term.

Numpy only: masses come from many ranks and the result travels in reports and manifests.

Legend: N calibration tokens, E bins of a sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

UNIFORM_BINS = 1024
"""Steps of the uniform bin edges over [0, 1]."""
BINS_PER_HALVING = 32
"""Edges for each halving of the mass, and of 1 - mass."""
HALVINGS = 24
"""Masses are fp32: below 1 they lie 2**-24 apart."""


def _bin_edges() -> npt.NDArray[np.float64]:
    uniform = np.arange(UNIFORM_BINS + 1) / UNIFORM_BINS
    logarithmic = 2.0 ** -(np.arange(HALVINGS * BINS_PER_HALVING + 1) / BINS_PER_HALVING)
    # Rounded to fp32, so that an edge compares with fp32 masses as it does with their exact values.
    edges = np.unique(np.concatenate([uniform, logarithmic, 1 - logarithmic]).astype(np.float32))
    return edges.astype(np.float64)


EDGES_E = _bin_edges()
"""Lower ends of the bins, ascending from 0 to 1: bin e holds masses in [EDGES_E[e], EDGES_E[e + 1]), the last one just 1."""
_NUM_DECIMALS = 6
# 0.07 * 100 is 7.000000000000001 in floating point: without this slack its ceiling would be 8.
_SLACK_TOKENS = 0.5 * 10**-_NUM_DECIMALS


@dataclass(frozen=True, slots=True, eq=False)
class MassSketch:
    """A histogram of top-k masses that adds up over ranks, micro-batches and steps.

    The edges are the same for all sketches: 1024 uniform ones, and 32 for each halving of m and of 1 - m, all fp32 numbers.
    A bin at mass m is therefore narrower than 1/1024 and than 0.022 min(m, 1 - m) (but for fp32 rounding, 2**-23).

    Error bound: with N tokens in whole counts, `threshold(r)` and `quantile(q)` are the lower end of the bin that holds the
    exact one (the ceil(r N)-th largest mass), so they lie below it by less than that bin's width. What is read is always an
    edge, so `share_from` tells exactly which share of the tokens has at least that mass.
    """

    counts_E: npt.NDArray[np.float64]
    """Tokens in each bin; whole numbers until the sketch is scaled."""

    @classmethod
    def empty(cls) -> Self:
        """The sketch of no token."""
        return cls(np.zeros(len(EDGES_E)))

    @classmethod
    def of(cls, topk_mass_N: npt.ArrayLike) -> Self:
        """The sketch of these masses, of none too. Errors: ValueError for a shape other than [N] or a mass not in [0, 1]."""
        bins_N = np.searchsorted(EDGES_E, _checked(topk_mass_N), side="right") - 1
        return cls(np.bincount(bins_N, minlength=len(EDGES_E)).astype(np.float64))

    def __add__(self, other: MassSketch) -> MassSketch:
        return MassSketch(self.counts_E + other.counts_E)

    def scaled(self, factor: float) -> MassSketch:
        """Every token counted `factor` times. Errors: ValueError for a factor that is not positive and finite."""
        if not 0 < factor < math.inf:
            raise ValueError(f"expected a positive, finite factor, got {factor}; an emptied sketch has no quantiles")
        return MassSketch(self.counts_E * factor)

    @property
    def num_tokens(self) -> float:
        """Tokens counted."""
        return float(self._from_edge_E[0])

    @property
    def _from_edge_E(self) -> npt.NDArray[np.float64]:
        """Tokens with at least the mass of each edge. Summed from the top in one order, so that equal counts read alike."""
        return self.counts_E[::-1].cumsum()[::-1]

    def threshold(self, mask_ratio: float) -> float:
        """The largest edge from which on at least the share `mask_ratio` of the tokens lies: tau of `calibrate_tau`, rounded
        down to an edge. Errors: ValueError for an empty sketch or a mask_ratio outside (0, 1)."""
        _check_ratio(mask_ratio)
        return self._edge_below(mask_ratio)

    def quantile(self, q: float) -> float:
        """The largest edge that at least the share 1 - q of the tokens reaches; q = 1 is the largest mass, rounded down.
        Errors: ValueError for an empty sketch or q outside [0, 1]."""
        if not 0 <= q <= 1:
            raise ValueError(f"expected a quantile in [0, 1], got {q}")
        return self._edge_below(1 - q)

    def share_from(self, edge: float) -> float:
        """Share of the tokens with mass >= `edge`. Errors: ValueError for an empty sketch or what is no bin edge."""
        index = int(np.searchsorted(EDGES_E, edge))
        if index == len(EDGES_E) or EDGES_E[index] != edge:
            raise ValueError(f"expected a bin edge, such as threshold() gives, got {edge}; other shares are not known exactly")
        from_edge_E = self._filled()
        return float(from_edge_E[index] / from_edge_E[0])

    def to_json(self) -> dict[str, Any]:
        """Plain numbers that `from_json` restores bit for bit; empty bins are left out."""
        [filled] = np.nonzero(self.counts_E)
        return {"edges": len(EDGES_E), "bins": filled.tolist(), "counts": self.counts_E[filled].tolist()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """What `to_json` gave. Errors: ValueError for a record of other bins."""
        if record.get("edges") != len(EDGES_E):
            raise ValueError(f"expected a sketch of {len(EDGES_E)} bins, got {record.get('edges')}; calibrate tau again")
        counts_E = np.zeros(len(EDGES_E))
        counts_E[np.array(record["bins"], dtype=np.int64)] = record["counts"]
        return cls(counts_E)

    def _filled(self) -> npt.NDArray[np.float64]:
        from_edge_E = self._from_edge_E
        if not from_edge_E[0] > 0:
            raise ValueError("expected the top-k mass of at least one token, got an empty sketch")
        return from_edge_E

    def _edge_below(self, share: float) -> float:
        from_edge_E = self._filled()
        wanted = share * from_edge_E[0] - _SLACK_TOKENS
        return float(EDGES_E[np.flatnonzero((from_edge_E >= wanted) & (from_edge_E > 0))[-1]])


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold and the tokens it came from. All fields are plain numbers, ready for JSON."""

    tau: float
    mask_ratio: float
    """r, the share that was asked for."""
    top_k: int
    """k of the masses; a tau is meaningless with another."""
    num_tokens: int
    quantiles: tuple[float, ...]
    """Top-k mass at 0%, 10%, ... 100% of the tokens (linear interpolation; lower bin edges where a sketch is the source)."""
    realised_mask_share: float
    """Share of the tokens with mass >= tau; above r by less than 1/N, or by the ties at tau (a sketch: in the bin of tau)."""


def calibrate_tau(topk_mass_N: npt.ArrayLike, mask_ratio: float, *, top_k: int) -> Calibration:
    """The (1 - r) quantile of the top-k mass: tau = the ceil(r N)-th largest of the N masses.

    Tokens with mass >= tau lose the diversity term (M = 0), so at least the share r does. Tokens that tie with tau are
    masked with it: when more than the share r has mass 1, tau is 1 and all of those are masked, and when all masses are
    equal every token is. tau is one of the masses, not an interpolation, so it compares exactly with masses of that dtype.

    Errors: ValueError for no token, a mask_ratio outside (0, 1), or a mass that is not a number in [0, 1].
    Source: arXiv 2602.07464; its code takes the floor(r N)-th largest, which masks every token when r N < 1.
    """
    masses_N = _checked(topk_mass_N)
    if not masses_N.size:
        raise ValueError("expected the top-k mass of at least one token, got none")
    _check_ratio(mask_ratio)
    num_masked = max(1, math.ceil(round(mask_ratio * masses_N.size, _NUM_DECIMALS)))
    ascending_N = np.sort(masses_N)
    tau = float(ascending_N[-num_masked])
    return Calibration(
        tau=tau,
        mask_ratio=mask_ratio,
        top_k=top_k,
        num_tokens=masses_N.size,
        quantiles=tuple(float(mass) for mass in np.quantile(ascending_N, np.linspace(0, 1, 11))),
        realised_mask_share=float((masses_N >= tau).mean()),
    )


def calibrate_sketch(sketch: MassSketch, mask_ratio: float, *, top_k: int) -> Calibration:
    """`calibrate_tau` for masses that were added up over ranks: its tau rounded down to a bin edge.

    The tokens between that edge and the exact tau are masked too and are counted in `realised_mask_share`.
    Errors: ValueError for an empty sketch or a mask_ratio outside (0, 1).
    """
    tau = sketch.threshold(mask_ratio)
    return Calibration(
        tau=tau,
        mask_ratio=mask_ratio,
        top_k=top_k,
        num_tokens=round(sketch.num_tokens),
        quantiles=tuple(sketch.quantile(tenth / 10) for tenth in range(11)),
        realised_mask_share=sketch.share_from(tau),
    )


def _checked(topk_mass_N: npt.ArrayLike) -> npt.NDArray[np.float64]:
    masses_N = np.asarray(topk_mass_N, dtype=np.float64)
    if masses_N.ndim != 1:
        raise ValueError(f"expected top-k masses of shape [N], got shape {masses_N.shape}; flatten them")
    wrong_N = ~((masses_N >= 0) & (masses_N <= 1))
    if wrong_N.any():
        raise ValueError(
            f"expected top-k masses in [0, 1], got {wrong_N.sum()} of {masses_N.size} outside, such as {masses_N[wrong_N][0]}; "
            "check the model's logits for NaN"
        )
    return masses_N


def _check_ratio(mask_ratio: float) -> None:
    if not 0 < mask_ratio < 1:
        raise ValueError(f"expected 0 < mask_ratio < 1, got {mask_ratio}")
