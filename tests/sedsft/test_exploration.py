"""tau on numbers worked out by hand, its ties and its errors; sketches against exact quantiles; tau over a run."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.config import SEDObjective
from sedsft.exploration import EDGES_E, MassSketch, calibrate_sketch, calibrate_tau
from sedsft.records import Example
from sedsft.tau import TauController, calibration_rows, calibration_top_k

MASSES = st.lists(
    st.one_of(
        st.floats(0, 1, width=32),
        st.floats(0, 24).map(lambda halvings: float(np.float32(1 - 2.0**-halvings))),
        st.sampled_from([0.0, 1.0, 0.5, 2.0**-24, 1 - 2.0**-24]),
    ),
    min_size=1,
    max_size=60,
)


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


# ------------------------------------------------------------------------------------------------ sketches


def width_at(mass: float) -> float:
    bin_e = int(np.searchsorted(EDGES_E, mass, side="right")) - 1
    return 0.0 if mass == 1 else float(EDGES_E[bin_e + 1] - EDGES_E[bin_e])


def test_bins_are_as_narrow_as_promised() -> None:
    assert (EDGES_E[0], EDGES_E[-1]) == (0.0, 1.0)
    assert np.array_equal(EDGES_E.astype(np.float32), EDGES_E)
    low, high = EDGES_E[:-1], EDGES_E[1:]
    assert ((high - low) <= 1 / 1024).all()
    assert ((high - low) <= 0.022 * np.minimum(low, 1 - high) + 2.0**-23).all()
    # Next to 1, each fp32 number has a bin of its own.
    assert np.isin(1 - np.arange(1, 17) * 2.0**-24, EDGES_E).all()


def test_sketch_of_masses_on_edges_is_exact() -> None:
    masses = np.array([8, 2, 6, 4, 10, 16]) / 16
    sketch = MassSketch.of(masses)
    assert sketch.num_tokens == 6
    assert [sketch.quantile(q) for q in (0, 0.5, 1)] == [0.125, 0.5, 1.0]
    assert sketch.threshold(0.5) == calibrate_tau(masses, 0.5, top_k=2).tau == 0.5
    assert sketch.share_from(0.5) == 4 / 6 - 1 / 6
    assert (sketch.share_from(0.0), sketch.share_from(1.0)) == (1.0, 1 / 6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(MASSES, st.floats(0.01, 0.99))
def test_threshold_lies_less_than_a_bin_below_the_exact_tau_and_its_share_is_exact(masses: list[float], ratio: float) -> None:
    exact = calibrate_tau(masses, ratio, top_k=2)
    sketched = calibrate_sketch(MassSketch.of(masses), ratio, top_k=2)
    assert 0 <= exact.tau - sketched.tau <= width_at(exact.tau)
    for dtype in (np.float32, np.float64):
        assert sketched.realised_mask_share == (np.array(masses, dtype) >= dtype(sketched.tau)).mean()
    assert sketched.realised_mask_share >= exact.realised_mask_share
    assert sketched.num_tokens == len(masses)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(MASSES, st.integers(0, 100))
def test_quantiles_lie_less_than_a_bin_below_the_exact_ones(masses: list[float], percent: int) -> None:
    exact = float(np.quantile(masses, percent / 100, method="higher"))
    found = MassSketch.of(masses).quantile(percent / 100)
    below = float(np.quantile(masses, percent / 100, method="lower"))
    assert below - width_at(below) <= found <= exact


@settings(max_examples=100, deadline=None, derandomize=True)
@given(MASSES, st.lists(st.integers(0, 60), max_size=4))
def test_any_split_adds_up_to_the_whole(masses: list[float], cuts: list[int]) -> None:
    parts = [MassSketch.of(part) for part in np.split(np.array(masses), sorted(cuts))]
    whole = MassSketch.of(masses)
    for order in (parts, parts[::-1]):
        assert (sum(order, MassSketch.empty()).counts_E == whole.counts_E).all()
    restored = MassSketch.from_json(json.loads(json.dumps(whole.scaled(0.9).to_json())))
    assert restored.counts_E.tobytes() == whole.scaled(0.9).counts_E.tobytes()
    assert whole.scaled(0.5).threshold(0.5) <= whole.threshold(0.5)


def test_sketch_errors() -> None:
    with pytest.raises(ValueError, match="such as nan"):
        MassSketch.of([0.5, float("nan")])
    with pytest.raises(ValueError, match="shape"):
        MassSketch.of([[0.5]])
    with pytest.raises(ValueError, match="empty sketch"):
        MassSketch.of([]).threshold(0.5)
    with pytest.raises(ValueError, match="bin edge"):
        MassSketch.of([0.5]).share_from(0.50001)
    with pytest.raises(ValueError, match="bin edge"):
        MassSketch.of([0.5]).share_from(1.5)
    with pytest.raises(ValueError, match="mask_ratio"):
        MassSketch.of([0.5]).threshold(1.0)
    with pytest.raises(ValueError, match="quantile"):
        MassSketch.of([0.5]).quantile(1.1)
    with pytest.raises(ValueError, match="factor"):
        MassSketch.of([0.5]).scaled(0.0)
    with pytest.raises(ValueError, match="bins, got 7"):
        MassSketch.from_json({"edges": 7, "bins": [], "counts": []})


# ----------------------------------------------------------------------------------------- tau over a run


def masses_at(step: int, tokens: int = 20_000) -> np.ndarray:
    """Top-k masses of a model that sharpens: the mean of -log(1 - mass) is 1.5 at first and 3.9 after 400 steps."""
    sharpness_N = np.random.default_rng(step).gamma(2.0, 0.75, size=tokens) * (1 + 0.004 * step)
    return (1 - np.exp(-sharpness_N)).astype(np.float32)


def shares_over_a_run(controller: TauController) -> list[float]:
    """Realised masked share of 400 steps, each with the tau that was known before it."""
    shares = []
    for step in range(1, 401):
        masses = masses_at(step)
        shares.append(float((masses >= np.float32(controller.tau)).mean()))
        controller.observe(MassSketch.of(masses))
    return shares


def test_running_tau_keeps_the_share_while_initial_drifts() -> None:
    calibration = MassSketch.of(masses_at(0))
    running = TauController(SEDObjective(tau_mode="running"), calibration)
    initial = TauController(SEDObjective(), calibration)
    assert running.tau == initial.tau == calibration.threshold(0.7)
    kept, drifted = shares_over_a_run(running), shares_over_a_run(initial)
    assert max(abs(share - 0.7) for share in kept) <= 0.03
    assert drifted[-1] > 0.9
    assert initial.drift == 0.0
    assert running.drift > 0.1


def test_running_by_hand() -> None:
    objective = SEDObjective(tau_mode="running", mask_ratio=0.5, tau_smoothing=0.5, tau_interval=2)
    controller = TauController(objective, MassSketch.of([0.25, 0.5, 0.5, 0.75]))
    assert controller.tau == 0.5
    controller.observe(MassSketch.of([0.875, 0.875]))  # half a token at 0.25 and 0.75, one at 0.5, two at 0.875
    assert controller.tau == 0.5
    controller.observe(MassSketch.empty())  # half of the 4 tokens have 0.875
    assert (controller.tau, controller.drift) == (0.875, 0.375)


def test_default_smoothing_follows_a_jump_at_once_and_more_of_it_does_not() -> None:
    before, after = MassSketch.of([0.25] * 10), MassSketch.of([0.75] * 10)
    quick = TauController(SEDObjective(tau_mode="running"), before)
    slow = TauController(SEDObjective(tau_mode="running", tau_smoothing=0.9), before)
    for controller in (quick, slow):
        controller.observe(after)
    # 10 of 10 + 3 tokens have 0.75, more than the share 0.7; with 0.9 it is 10 of 10 + 9.
    assert quick.tau == 0.75
    assert slow.tau == 0.25


def test_lag_of_a_model_that_sharpens_steadily() -> None:
    # All masses rise by one edge a step, so the last n steps weigh 1 - smoothing^n: the share 0.7 from n = 1, 2, 5, 12 on.
    edges = EDGES_E[100:200]
    for smoothing, lag in ((0.0, 1), (0.5, 2), (0.75, 5), (0.9, 12)):
        objective = SEDObjective(tau_mode="running", tau_smoothing=smoothing)
        controller = TauController(objective, MassSketch.of([edges[0]]))
        for step in range(1, 90):
            if step > 50:
                assert controller.tau == edges[step - lag]
            controller.observe(MassSketch.of([edges[step]]))


def test_without_smoothing_only_the_last_step_counts() -> None:
    controller = TauController(SEDObjective(tau_mode="running", tau_smoothing=0.0), MassSketch.of([0.5]))
    controller.observe(MassSketch.of([0.25]))
    assert controller.tau == 0.25


@pytest.mark.parametrize(
    ("objective", "calibration", "mode", "tau"),
    [
        (SEDObjective(tau=0.8), None, "fixed", 0.8),
        (SEDObjective(), MassSketch.of([0.5]), "initial", 0.5),
        (SEDObjective(tau_mode="released"), MassSketch.of([0.5]), "released", 0.5),
    ],
)
def test_other_modes_never_move(objective: SEDObjective, calibration: MassSketch | None, mode: str, tau: float) -> None:
    controller = TauController(objective, calibration)
    controller.observe(MassSketch.of([0.25]))
    assert (controller.mode, controller.tau, controller.drift) == (mode, tau, 0.0)
    restored = TauController.from_state(objective, json.loads(json.dumps(controller.state())))
    assert restored.state() == controller.state()


def test_resumed_controller_goes_on_bit_for_bit() -> None:
    objective = SEDObjective(tau_mode="running", tau_interval=3)
    whole = TauController(objective, MassSketch.of(masses_at(0)))
    part = TauController(objective, MassSketch.of(masses_at(0)))
    for step in range(1, 30):
        whole.observe(MassSketch.of(masses_at(step, 50)))
        part.observe(MassSketch.of(masses_at(step, 50)))
        part = TauController.from_state(objective, json.loads(json.dumps(part.state())))
        assert (part.tau, part.drift) == (whole.tau, whole.drift)
    assert json.dumps(part.state()) == json.dumps(whole.state())


def test_controller_errors() -> None:
    sketch = MassSketch.of([0.5])
    with pytest.raises(ValueError, match="mask=False"):
        TauController(SEDObjective(mask=False), None)
    with pytest.raises(ValueError, match="got none"):
        TauController(SEDObjective(), None)
    with pytest.raises(ValueError, match="beside the fixed"):
        TauController(SEDObjective(tau=0.5), sketch)
    state = TauController(SEDObjective(), sketch).state()
    with pytest.raises(ValueError, match="'running', got 'initial'"):
        TauController.from_state(SEDObjective(tau_mode="running"), state)


def test_released_measures_all_tokens_of_100_rows_with_k_10() -> None:
    rows = [Example(np.arange(4, dtype=np.int32), np.array([False, False, True, True]), line) for line in range(1, 121)]
    released = SEDObjective(tau_mode="released")
    assert calibration_top_k(released) == 10
    chosen = calibration_rows(released, rows)
    assert [row.line for row in chosen] == list(range(1, 101))
    assert all(row.trained_T.all() for row in chosen)
    assert not any(row.trained_T.all() for row in rows)
    assert calibration_top_k(SEDObjective(top_k=3)) == 3
    assert calibration_rows(SEDObjective(), rows) == rows
