from __future__ import annotations

import json

import pytest

from sedsft.early_warnings import EarlyWarning, EarlyWarnings


def observe(warnings: EarlyWarnings, steps: int = 1, **figures: float) -> list[EarlyWarning]:
    calm = {"loss": 1.0, "entropy": 2.0, "masked_share": 0.7}
    return [warning for _ in range(steps) for warning in warnings.observe(calm | figures)]


def test_a_calm_run_gives_no_warning() -> None:
    warnings = EarlyWarnings(0.7)
    for step in range(200):
        # The loss falls from 2 to 1, the entropy to a third of where it was.
        share = step / 200
        assert (
            observe(warnings, loss=2.0 - share + 0.02 * (step % 3), entropy=1.5 - share, masked_share=0.7 + 0.1 * share) == []
        )


def test_a_spike_is_measured_against_the_steps_before() -> None:
    below, above = EarlyWarnings(None), EarlyWarnings(None)
    # Median 1.05; the distances from it are all 0.05, so the MAD is 0.05 and the threshold 1.05 + 8 * 0.05.
    for step in range(20):
        assert observe(below, loss=1.0 + 0.1 * (step % 2)) == observe(above, loss=1.0 + 0.1 * (step % 2)) == []
    assert observe(below, loss=1.449) == []
    [warning] = observe(above, loss=1.451)
    assert warning.kind == "loss_spike"
    assert warning.figures == pytest.approx({"loss": 1.451, "median": 1.05, "threshold": 1.45})
    assert "learning rate" in warning.advice


def test_a_spike_has_a_floor_and_a_warm_up() -> None:
    warnings = EarlyWarnings(None)
    assert observe(warnings, steps=9) == []
    assert observe(warnings, loss=50.0) == []
    # Ten steps, of which one was 50: median 1, MAD 0, floor 0.02, threshold 1 + 8 * 0.02.
    assert observe(warnings, loss=1.15) == []
    [warning] = observe(warnings, loss=1.17)
    assert warning.figures == pytest.approx({"loss": 1.17, "median": 1.0, "threshold": 1.16})


def test_an_episode_warns_once_until_it_is_over() -> None:
    warnings = EarlyWarnings(None)
    observe(warnings, steps=30)
    assert len(observe(warnings, loss=1.2)) == 1
    # Still more than half of the way to the threshold of 1.16: the episode goes on.
    assert observe(warnings, loss=1.1) == []
    assert observe(warnings, loss=1.2) == []
    assert observe(warnings) == []
    assert len(observe(warnings, loss=1.2)) == 1


def test_entropy_collapse_is_measured_against_the_start() -> None:
    warnings = EarlyWarnings(None)
    observe(warnings, steps=10)
    # Mean of the last ten: (10 - n) * 0.2 after n steps at 0, below 0.2 * 2 = 0.4 once n = 9.
    assert observe(warnings, steps=8, entropy=0.0) == []
    [warning] = observe(warnings, entropy=0.0)
    assert warning.kind == "entropy_collapse"
    assert warning.figures == pytest.approx({"entropy": 0.2, "starting_entropy": 2.0, "threshold": 0.4})
    # Above 0.3 * 2 = 0.6 the episode is over: ten steps at 0.7.
    assert observe(warnings, steps=10, entropy=0.7) == []
    assert len(observe(warnings, steps=10, entropy=0.3)) == 1


def test_mask_drift_needs_a_ratio() -> None:
    warnings, without = EarlyWarnings(0.7), EarlyWarnings(None)
    # Ten steps at 0.86: 0.16 from 0.7.
    assert observe(warnings, steps=9, masked_share=0.86) == []
    [warning] = observe(warnings, masked_share=0.86)
    assert warning.kind == "mask_drift"
    assert warning.figures == pytest.approx({"masked_share": 0.86, "mask_ratio": 0.7, "threshold": 0.15})
    # 0.08 away is not yet less than half of 0.15.
    assert observe(warnings, steps=10, masked_share=0.78) == []
    assert observe(warnings, steps=10, masked_share=0.9) == []
    assert observe(warnings, steps=10) == []
    assert len(observe(warnings, steps=10, masked_share=0.5)) == 1
    assert without.observe({"loss": 1.0, "entropy": 2.0}) == []


@pytest.mark.parametrize("cut", [0, 5, 31, 33])
def test_the_state_goes_on_where_it_was(cut: int) -> None:
    losses = [1.0] * 30 + [1.3, 1.3, 1.0, 1.3]
    whole, first = EarlyWarnings(0.7), EarlyWarnings(0.7)
    expected = [observe(whole, loss=loss, masked_share=0.9) for loss in losses]
    found = [observe(first, loss=loss, masked_share=0.9) for loss in losses[:cut]]
    second = EarlyWarnings.from_state(0.7, json.loads(json.dumps(first.state())))
    found += [observe(second, loss=loss, masked_share=0.9) for loss in losses[cut:]]
    assert found == expected
    assert second.state() == whole.state()
    assert [[w.kind for w in step] for step in expected if step] == [["mask_drift"], ["loss_spike"], ["loss_spike"]]
