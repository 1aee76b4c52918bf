"""Embedded tasks: a reasoning task that needs no download, and the small base model that starts on it."""
