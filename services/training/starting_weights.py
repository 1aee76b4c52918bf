"""The starting weights of a model that has been trained since: a reference policy without a second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from services.training.state import masters_of, refresh_weights


class StartingWeights:
    """A copy in host memory of what AdamW updates on this rank, in fp32; under ZeRO 1 to 3 ranks share it out."""

    def __init__(self, wrapper: Any) -> None:
        """`wrapper` is DeepSpeed's optimizer, before its first step."""
        self._wrapper = wrapper
        self._aside = [master.detach().to("cpu", copy=True) for master in masters_of(wrapper)]

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The model has its starting weights in here, and bit for bit its current ones again afterwards. Collective."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for index, master in enumerate(masters_of(self._wrapper)):
            current = master.detach().to("cpu", copy=True)
            master.copy_(self._aside[index])
            self._aside[index] = current
        refresh_weights(self._wrapper)
