"""Figures over sampled and scored responses: accuracy, pass@k, diversity, readiness for RL."""
