"""Scorers: pure functions from (gold, response) to a verdict. They run inside child processes that can be killed."""
