"""A scoring process whose one scorer, `fault`, does what the response says."""

from __future__ import annotations

import os
import signal
import sys
import time

from sedsft.rewards import registry
from sedsft.rewards.verdict import Verdict
from services.scoring import child


def fault(gold: str, response: str) -> Verdict:
    """Scores 1 for gold == response; every other response names a fault."""
    if response == "raise":
        raise ZeroDivisionError("planted")
    if response == "nan":
        return Verdict(float("nan"), None)
    if response == "none":
        return Verdict(None, None)  # type: ignore[arg-type]
    if response == "loop":
        while True:
            pass
    if response == "sleep":
        time.sleep(1_000)
    if response == "exit":
        os._exit(3)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "memory":
        bytearray(8 << 30)
    if response == "print":
        print("noise between the messages", flush=True)
    return Verdict(float(gold == response), response)


registry.SCORERS["fault"] = fault
registry._WARM_UP["fault"] = ("x", "x")

if __name__ == "__main__":
    child.main(sys.argv[1:])
