"""tau on numbers worked out by hand, its ties and its errors."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.exploration import calibrate_tau


def test_tau_is_the_mass_from_which_the_share_r_is_masked() -> None:
    masses = [0.5, 0.9, 0.1, 0.7, 0.3, 1.0, 0.8, 0.2, 0.6, 0.4]
    # The 7 largest are 1.0 0.9 0.8 0.7 0.6 0.5 0.4.
    calibration = calibrate_tau(masses, 0.7, top_k=2)
    assert calibration.tau == 0.4
    assert calibration.realised_mask_share == 0.7
    assert (calibration.mask_ratio, calibration.top_k, calibration.num_tokens) == (0.7, 2, 10)
    assert len(calibration.quantiles) == 11
    assert calibration.quantiles[0] == 0.1
    assert calibration.quantiles[5] == pytest.approx(0.55)  # between 0.5 and 0.6
    assert calibration.quantiles[10] == 1.0


@pytest.mark.parametrize(
    ("ratio", "tau"),
    [(0.25, 0.4), (0.26, 0.3), (0.5, 0.3), (0.51, 0.2), (0.75, 0.2), (0.76, 0.1), (0.99, 0.1), (0.01, 0.4)],
)
def test_share_is_rounded_up_to_whole_tokens(ratio: float, tau: float) -> None:
    assert calibrate_tau([0.4, 0.1, 0.3, 0.2], ratio, top_k=2).tau == tau


def test_rounding_of_the_product_does_not_add_a_token() -> None:
    masses = np.arange(1, 101) / 100
    assert 0.07 * 100 > 7
    assert calibrate_tau(masses, 0.07, top_k=2).realised_mask_share == 0.07


def test_ties_at_tau_are_masked_together() -> None:
    calibration = calibrate_tau([0.2, 1.0, 1.0, 1.0, 0.5], 0.2, top_k=2)
    assert (calibration.tau, calibration.realised_mask_share) == (1.0, 0.6)
    equal = calibrate_tau([0.25] * 4, 0.5, top_k=2)
    assert (equal.tau, equal.realised_mask_share) == (0.25, 1.0)


def test_one_token() -> None:
    calibration = calibrate_tau([0.3], 0.7, top_k=2)
    assert (calibration.tau, calibration.realised_mask_share) == (0.3, 1.0)


def test_tau_of_fp32_masses_compares_exactly_in_fp32() -> None:
    masses = np.random.default_rng(0).random(1000, dtype=np.float32)
    calibration = calibrate_tau(masses, 0.7, top_k=2)
    assert (masses >= np.float32(calibration.tau)).sum() == 700


def test_calibration_is_plain_json() -> None:
    calibration = calibrate_tau(np.float32([0.1, 0.5, 0.9]), 0.5, top_k=3)
    assert json.loads(json.dumps(dataclasses.asdict(calibration)))["tau"] == calibration.tau


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_share_is_at_least_r_and_only_ties_exceed_it(masses: list[float], ratio: float) -> None:
    calibration = calibrate_tau(masses, ratio, top_k=2)
    above = sum(mass > calibration.tau for mass in masses) / len(masses)
    assert above < ratio <= calibration.realised_mask_share + 1e-6
    assert calibration.tau in masses


@pytest.mark.parametrize(
    ("masses", "ratio", "message"),
    [
        ([], 0.7, "at least one token"),
        ([[0.1]], 0.7, "shape"),
        ([0.1, float("nan")], 0.7, "1 of 2 outside, such as nan"),
        ([0.1, 1.5], 0.7, "1.5"),
        ([0.1], 0.0, "mask_ratio"),
        ([0.1], 1.0, "mask_ratio"),
    ],
)
def test_errors(masses: list[float], ratio: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_tau(masses, ratio, top_k=2)
