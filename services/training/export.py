"""The trained weights as the tensors of a plain model folder: gathered bucket by bucket, adapters merged on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from services.buckets import TensorSpec, fill_buckets
from services.training.adapters import merged, plain_parts

DEFAULT_BUCKET_BYTES = 256 << 20

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Within it, the parameters are whole on every rank."""


class WeightExport:
    """A `services.buckets.WeightStream` over a model whose parameters may be split over ranks.

    Buckets count what gathering takes, so with adapters the base weight and both factors. A weight that modules share comes
    once, under the first of its names; buffers that files keep come last.
    """

    def __init__(self, model: PreTrainedModel, gather: Gather, bucket_bytes: int) -> None:
        self._model = model
        self._gather = gather
        self._parameters = dict(model.named_parameters())
        saved = model.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
        names = [*self._parameters, *self._buffers]
        self._parts = plain_parts(model, [name for name in names if name not in (model._keys_to_ignore_on_save or ())])
        gathered = [sum(self._spec(part, part).num_bytes for part in parts) for parts in self._parts.values()]
        self._buckets = fill_buckets(gathered, bucket_bytes)

    def specs(self) -> list[TensorSpec]:
        """What `stream` will yield, in its order. Not collective."""
        return [self._spec(name, parts[0]) for name, parts in self._parts.items()]

    def _spec(self, name: str, part: str) -> TensorSpec:
        tensor = self._parameters.get(part)
        held: torch.Tensor = self._buffers[part] if tensor is None else tensor
        # Under ZeRO-3 a parameter is empty between gathers and says its shape here.
        shape = tuple(getattr(held, "ds_shape", held.shape))
        return TensorSpec(name, str(held.dtype).removeprefix("torch."), shape, held.dtype.itemsize)

    def buckets(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The tensors of one bucket after another. One that is kept takes its memory with it. Collective."""
        names = list(self._parts)
        for bucket in self._buckets:
            parts = {names[index]: self._parts[names[index]] for index in bucket}
            with self._gather([self._parameters[p] for held in parts.values() for p in held if p in self._parameters]):
                yield [(name, merged(self._model, name, [self._held(p) for p in held])) for name, held in parts.items()]

    def _held(self, part: str) -> torch.Tensor:
        held: torch.Tensor = self._parameters[part] if part in self._parameters else self._buffers[part]
        return held.detach()

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor whole, one after the other, good until the next optimizer step. Collective."""
        for bucket in self.buckets():
            yield from bucket

    def as_in_files(self) -> bool:
        """Whether files keep every tensor under the name and in the shape that it has here; experts, say, they may split."""
        tensors = {spec.name: torch.empty(spec.shape, device="meta") for spec in self.specs()}
        kept = revert_weight_conversion(self._model, dict(tensors))
        return {name: tensor.shape for name, tensor in kept.items()} == {name: tensor.shape for name, tensor in tensors.items()}

    def write(self, folder: Path, *, here: bool) -> None:
        """Write weights and config, one file a bucket, where it is `here`. Collective; never more than a bucket is copied."""
        files = [_file_name(index, len(self._buckets)) for index in range(len(self._buckets))]
        for file, bucket in zip(files, self.buckets(), strict=True):
            if here:
                tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in bucket}
                folder.mkdir(parents=True, exist_ok=True)
                save_file(tensors, folder / file, metadata={"format": "pt"})
        if here:
            self._model.config.save_pretrained(folder)
            self._write_index(folder, files)

    def _write_index(self, folder: Path, files: Sequence[str]) -> None:
        if len(files) == 1:
            return
        names = list(self._parts)
        places = {names[index]: file for file, bucket in zip(files, self._buckets, strict=True) for index in bucket}
        size = sum(spec.num_bytes for spec in self.specs())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
