"""A scoring process whose scorer does what the response says."""

from __future__ import annotations

import os
import signal
import sys
import time

from sedsft.records import ScoringItem
from sedsft.rewards import child
from sedsft.rewards.verdict import Reward


def fault(item: ScoringItem) -> Reward:
    """Scores 1 for gold == response; every other response names a fault."""
    response = item.response
    if response == "raise":
        raise ZeroDivisionError("planted")
    if response == "nan":
        return Reward(float("nan"))
    if response == "none":
        return Reward(None)  # type: ignore[arg-type]
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
    if response in ("garbage", "twice", "list"):
        body = {"garbage": b"\x00\x00\x00\x02{]", "twice": child.encode({"error": "more"}) * 100, "list": child.encode([1])}
        OUT.write(body[response])
    if response == "environment":
        return Reward(1.0, ",".join(sorted(os.environ)))
    return Reward(float(item.gold == response), response, item.gold == response, {"answer": 1.0})


if __name__ == "__main__":
    limits = child.ChildLimits.of(sys.argv[1:])
    child.limit_process(limits)
    OUT = child.take_stdout()
    child.serve(fault, limits.cpu_s, OUT)
