"""Calibration of tau, the top-k mass from which on a token has too little to explore for SED's diversity term.

Numpy only: masses come from many ranks and the result travels in reports and manifests.

Legend: N calibration tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
    """Top-k mass at 0%, 10%, ... 100% of the tokens (linear interpolation)."""
    realised_mask_share: float
    """Share of the tokens with mass >= tau; above r by less than 1/N, or by the ties at tau."""


def calibrate_tau(topk_mass_N: npt.ArrayLike, mask_ratio: float, *, top_k: int) -> Calibration:
    """The (1 - r) quantile of the top-k mass: tau = the ceil(r N)-th largest of the N masses.

    Tokens with mass >= tau lose the diversity term (M = 0), so at least the share r does. Tokens that tie with tau are
    masked with it: when more than the share r has mass 1, tau is 1 and all of those are masked, and when all masses are
    equal every token is. tau is one of the masses, not an interpolation, so it compares exactly with masses of that dtype.

    Errors: ValueError for no token, a mask_ratio outside (0, 1), or a mass that is not a number in [0, 1].
    Source: arXiv 2602.07464; its code takes the floor(r N)-th largest, which masks every token when r N < 1.
    """
    masses_N = np.asarray(topk_mass_N, dtype=np.float64)
    if masses_N.ndim != 1 or not masses_N.size:
        raise ValueError(f"expected the top-k mass of at least one token, shape [N], got shape {masses_N.shape}")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"expected 0 < mask_ratio < 1, got {mask_ratio}")
    wrong_N = ~((masses_N >= 0) & (masses_N <= 1))
    if wrong_N.any():
        raise ValueError(
            f"expected top-k masses in [0, 1], got {wrong_N.sum()} of {masses_N.size} outside, such as {masses_N[wrong_N][0]}; "
            "check the starting model's logits for NaN"
        )
    # 0.07 * 100 is 7.000000000000001 in floating point: without the rounding its ceiling would be 8.
    num_masked = max(1, math.ceil(round(mask_ratio * masses_N.size, 6)))
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
