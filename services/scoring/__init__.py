"""Reward workers: Ray actors that score responses in child processes with hard limits of time and memory."""
