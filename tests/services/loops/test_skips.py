from __future__ import annotations

from dataclasses import asdict

from services.loops.skips import Skips


def walk(skips: Skips, steps: str, first: int) -> tuple[Skips, str]:
    """Behind `steps`, "x" for a skipped one, and the verdict on the last."""
    for letter in steps:
        skips = skips.skipped() if letter == "x" else skips.trained()
    return skips, skips.verdict(first + len(steps) - 1)


def test_three_in_a_row_send_training_back() -> None:
    assert walk(Skips(), "xx", 1) == (Skips(total=2, in_a_row=2), "go on")
    assert walk(Skips(), "xx.xx", 1) == (Skips(total=4, in_a_row=2), "go on")
    assert walk(Skips(), ".xxx", 1) == (Skips(total=3, in_a_row=3), "go back")


def test_again_up_to_the_same_step_is_divergence() -> None:
    back = walk(Skips(), ".....xxx", 1)[0].gone_back(8)
    assert back == Skips(total=3, in_a_row=0, gone_back_from=8)
    assert walk(back, "xxx", 4) == (Skips(6, 3, 8), "diverged")
    assert walk(back, "xxx", 6)[1] == "diverged"
    # What comes later is another episode.
    assert walk(back, "....xxx", 4)[1] == "go back"
    assert Skips(**asdict(back)) == back
