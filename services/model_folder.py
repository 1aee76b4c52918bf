"""What a model folder must hold before a job may name it, seen without torch: whole safetensors, chat template, pad token."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_MAX_HEADER_BYTES = 100 << 20


class Refused(Exception):
    """Why one field of a spec is refused."""


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a Hugging Face model with whole safetensors, chat template and pad token, or brings code."""
    if not folder.is_dir():
        raise Refused(f"expected a model folder, got the file {folder}")
    config = json_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise Refused(f"expected model_type in {folder / 'config.json'}, got none; save the model with save_pretrained")
    tokenizer = json_object(folder / "tokenizer_config.json")
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if "auto_map" in content:
            raise Refused(
                f"expected a model that transformers knows by itself, got auto_map in {folder / name}, which runs code of "
                "the model folder; convert the model to a built-in architecture"
            )
    _check_weights(folder)
    _check_tokenizer(folder, tokenizer)


def _check_weights(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        got = f"only {', '.join(pickles[:3])}, which can run code when opened" if pickles else "no weights"
        raise Refused(f"expected *.safetensors in {folder}, got {got}; save it with save_pretrained(safe_serialization=True)")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = json_object(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        missing = sorted(str(name) for name in names - {path.name for path in files})
        if missing:
            raise Refused(
                f"expected all {len(names)} files that {index} names, got no {', '.join(missing[:3])}; copy the whole folder"
            )
    for file in files:
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """The header must be JSON and the file as long as the header says: 8 bytes of length, header, tensors."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {header_bytes} bytes in a file of {size}")
            header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + header_bytes + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Refused(f"expected a safetensors file, got {file} ({error}); download or save it again") from error
    if size != expected:
        raise Refused(f"expected {file} to have {expected} bytes, got {size}; it was cut off, copy it again")


def _check_tokenizer(folder: Path, tokenizer: Mapping[str, Any]) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise Refused(f"expected a tokenizer in {folder}, got no tokenizer.json; save it there with save_pretrained")
    if (folder / "tokenizer.json").exists() and "model" not in json_object(folder / "tokenizer.json"):
        raise Refused(
            f"expected a tokenizer in {folder / 'tokenizer.json'}, got JSON without `model`; save it with save_pretrained"
        )
    if not tokenizer.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        raise Refused(
            f"expected a chat template, got none in {folder / 'tokenizer_config.json'} and no chat_template.jinja beside it; "
            "set tokenizer.chat_template and save the tokenizer there"
        )
    pad = tokenizer.get("pad_token")
    if pad is None and (folder / "special_tokens_map.json").exists():
        pad = json_object(folder / "special_tokens_map.json").get("pad_token")
    if not pad:
        raise Refused(
            f"expected a pad token, got none in {folder / 'tokenizer_config.json'}; set tokenizer.pad_token to an unused token "
            "and save the tokenizer there"
        )


def json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"expected {path}, it is missing; point to a folder made by save_pretrained") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"expected JSON in {path}, got: {error}") from error
    if not isinstance(content, dict):
        raise Refused(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content
