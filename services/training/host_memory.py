"""Memory that the C library keeps."""

from __future__ import annotations

import ctypes
import sys


def release_free_memory() -> None:
    """Give freed memory back to the system; glibc keeps that of tensors below 32 MB, between others that live on.

    Does nothing with another C library.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
