"""Deployments of checkpoints: endpoints -> service -> store."""
