"""Checkpoints behind an OpenAI-compatible endpoint on Ray Serve."""
