"""Scorers: from an item to a reward. They run inside child processes that can be killed."""

from sedsft.rewards.verdict import Verdict as Verdict
from sedsft.rewards.verifier import verify as verify
