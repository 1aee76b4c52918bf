"""Checkpoints: a folder is either complete and verified by its manifest, or it does not exist.

    <root>/step-<n>.tmp-<attempt>/   being written; never read
    <root>/step-<n>/MANIFEST.json    complete: the manifest is the last file written before the rename
    <root>/latest                    name of the newest step folder
    <root>/step-<n>.tmp-removed/     on its way out; never read

Threads and processes write side by side; each says what it wrote once that is on disk, and only then one process publishes
all of it. Whoever dies before leaves a folder that nobody reads.

Training state lies in trainer/rank-<i>.safetensors beside the files of the model folder. Weights are safetensors and
everything else is JSON or text: reading a checkpoint never unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from services.errors import CheckpointInvalid
from services.rundir import CheckpointRecord, write_atomically

MANIFEST = "MANIFEST.json"
POINTER = "latest"
FORMAT = 1
"""Version of the manifest's layout."""

_STEP_FOLDER = re.compile(r"step-(\d+)")
_TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "chat_template", "added_tokens")
_STATE_FOLDER = "trainer/"
_REMOVED = ".tmp-removed"
_FORBIDDEN = (".bin", ".pt", ".pth", ".pkl", ".pickle")


@dataclass(frozen=True)
class FileRecord:
    """One file as its writer saw it: path relative to the checkpoint, size in bytes and content hash."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about the training it comes from.

    `tau` and `calibration` belong to SED stages, `weight_version` to stages that sync weights to samplers.
    """

    stage: str
    step: int
    spec_sha256: str
    consumed_samples: int
    tau: float | None = None
    calibration: dict[str, Any] | None = None
    weight_version: int | None = None
    tau_state: dict[str, Any] | None = None
    """State of `sedsft.tau.TauController` behind `step`."""
    identity: dict[str, Any] | None = None
    """What a run must share with this one to resume from it, as plain JSON: see `check_identity`."""
    skips: dict[str, Any] | None = None
    """`services.loops.skips.Skips` behind `step`."""
    warnings: dict[str, Any] | None = None
    """State of `sedsft.early_warnings.EarlyWarnings` behind `step`."""


@dataclass(frozen=True)
class Manifest:
    """Content of MANIFEST.json."""

    info: CheckpointInfo
    files: tuple[FileRecord, ...]
    tokenizer_sha256: str
    """Hash over names and hashes of the tokenizer's files."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def begin(root: Path, step: int, attempt: int) -> Path:
    """A fresh folder for the files of step `step`; what this attempt left half-written there before is removed."""
    folder = root / f"step-{step}.tmp-{attempt}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def describe(folder: Path, name: str) -> FileRecord:
    """Size and hash of a file, to be taken by the process that wrote it."""
    path = folder / name
    return FileRecord(name=name, size_bytes=path.stat().st_size, sha256=_sha256(path))


def on_disk(folder: Path, name: str) -> FileRecord:
    """`describe` a file once its content has reached the disk."""
    _fsync(folder / name)
    return describe(folder, name)


def publish(folder: Path, files: Sequence[FileRecord], info: CheckpointInfo) -> CheckpointRecord:
    """Make the files written below `folder` (from `begin`) a visible checkpoint. Blocks until it is on disk.

    Order: files, manifest, folder entries, rename, pointer; a crash before the rename leaves nothing visible.

    Raises:
        CheckpointInvalid: the folder does not hold exactly `files` with their sizes, or the step is published already.
    """
    target = folder.parent / f"step-{info.step}"
    if not folder.name.startswith(f"{target.name}.tmp-"):
        raise CheckpointInvalid(f"expected a folder that begin() made for step {info.step}, got {folder}")
    if target.exists():
        raise CheckpointInvalid(f"expected {target} not to exist, since a published checkpoint never changes; remove it first")
    _compare(folder, files, hashes=False)
    for file in files:
        _fsync(folder / file.name)
    manifest = Manifest(
        info=info,
        files=tuple(sorted(files, key=lambda file: file.name)),
        tokenizer_sha256=_tokenizer_hash(files),
        versions=installed_versions(),
    )
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True))
    for inner in {folder, *(parent for file in files for parent in (folder / file.name).parents if folder in parent.parents)}:
        _fsync(inner)
    folder.rename(target)
    _fsync(target.parent)
    write_atomically(target.parent / POINTER, target.name)
    _fsync(target.parent)
    return record_of(target, info)


def record_of(path: Path, info: CheckpointInfo) -> CheckpointRecord:
    """The published checkpoint at `path` as the API lists it."""
    return CheckpointRecord(stage=info.stage, step=info.step, path=str(path), manifest_sha256=_sha256(path / MANIFEST))


def installed_versions() -> dict[str, str]:
    """Versions of what the weights depend on."""
    return {name: version(name) for name in ("torch", "transformers", "deepspeed")}


def steps_below(root: Path) -> dict[int, Path]:
    """Folders of the steps published below `root`, by step, good or not."""
    return {int(match[1]): path for path in root.glob("step-*") if (match := _STEP_FOLDER.fullmatch(path.name))}


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint whose files all match it.

    Raises:
        CheckpointInvalid: names the file and what differs.
    """
    manifest = _read_manifest(path)
    _compare(path, manifest.files, hashes=True)
    return manifest


def _read_manifest(path: Path) -> Manifest:
    manifest_path = path / MANIFEST
    try:
        record = json.loads(manifest_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointInvalid(
            f"expected {manifest_path}, it is missing; the checkpoint was not completed, use another"
        ) from error
    except ValueError as error:
        raise CheckpointInvalid(f"expected JSON in {manifest_path}, got: {error}; use another checkpoint") from error
    return _parse(record, manifest_path)


def latest(root: Path) -> Path | None:
    """Folder of the highest published step below `root`, None when nothing was ever published. Verify it before use.

    The pointer may lag behind by one step, when a crash came between rename and pointer, but never runs ahead.

    Raises:
        CheckpointInvalid: the pointer names a checkpoint that is gone, so that starting anew would hide a loss.
    """
    steps = steps_below(root)
    newest = steps[max(steps)] if steps else None
    pointer = root / POINTER
    if pointer.exists():
        named = pointer.read_text(encoding="utf-8").strip()
        if not (root / named / MANIFEST).exists():
            raise CheckpointInvalid(
                f"expected the checkpoint {root / named} that {pointer} names, it is missing; restore it, or remove {pointer} "
                "to go on from an older one"
            )
    return newest


def newest_good(roots: Sequence[Path], on_bad: Callable[[Path, CheckpointInvalid], None]) -> tuple[Path, Manifest] | None:
    """The verified checkpoint of the highest step below any of `roots`, of equal steps that of the later root.

    `on_bad` hears of every newer one that cannot be used. None when nothing was ever published below `roots`.

    Raises:
        CheckpointInvalid: there were checkpoints and none is good, so that starting anew would hide a loss.
    """
    found = [(step, place, path) for place, root in enumerate(roots) for step, path in steps_below(root).items()]
    found += [(int(path.name[5:]), place, path) for place, root in enumerate(roots) if (path := _lost(root)) is not None]
    problems = []
    for _, _, path in sorted(found, key=lambda entry: entry[:2], reverse=True):
        try:
            return path, verify(path)
        except CheckpointInvalid as error:
            on_bad(path, error)
            problems.append(error.message)
    if problems:
        raise CheckpointInvalid(
            f"expected one good checkpoint among {len(problems)}, all are broken: {' | '.join(problems)}; restore one of them, "
            "or submit the job anew to train from the start"
        )
    return None


def _lost(root: Path) -> Path | None:
    """The folder that the pointer of `root` names, if it is gone."""
    pointer = root / POINTER
    if not pointer.exists():
        return None
    named = root / pointer.read_text(encoding="utf-8").strip()
    return named if _STEP_FOLDER.fullmatch(named.name) and not named.exists() else None


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all checkpoints below `root` but the newest `keep` whose files are all there; the folders removed.

    Raises:
        ValueError: `keep` is below 2, which would leave nothing to fall back on.
    """
    if keep < 2:
        raise ValueError(f"expected to keep at least 2 checkpoints, got {keep}")
    for leftover in root.glob(f"step-*{_REMOVED}"):
        shutil.rmtree(leftover)
    steps = steps_below(root)
    kept, removed = 0, []
    for step in sorted(steps, reverse=True):
        if kept >= keep:
            remove(steps[step])
            removed.append(steps[step])
        elif _is_whole(steps[step]):
            kept += 1
    return removed


def remove(path: Path) -> None:
    """Remove a published checkpoint."""
    # Renamed first, so that a crash never leaves half a checkpoint under its name.
    hidden = path.with_name(f"{path.name}{_REMOVED}")
    path.rename(hidden)
    _fsync(path.parent)
    shutil.rmtree(hidden)


def export(path: Path, folder: Path) -> list[str]:
    """Copy the model folder of the checkpoint at `path`, without training state and manifest, to `folder`; the files' names.

    Every copy is compared with the manifest's hash, and `folder` appears when all of them are on disk.

    Raises:
        CheckpointInvalid: a file that does not match the manifest.
        FileExistsError: there is something at `folder`.
    """
    if folder.exists():
        raise FileExistsError(f"expected {folder} not to exist, since an export never replaces files; give another folder")
    manifest = _read_manifest(path)
    _compare(path, manifest.files, hashes=False)
    files = [file for file in manifest.files if not is_state_file(file.name)]
    writing = folder.with_name(f"{folder.name}.tmp-export-{os.getpid()}")
    try:
        for file in files:
            (writing / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / file.name, writing / file.name)
            _fsync(writing / file.name)
        _compare(writing, files, hashes=True)
        writing.rename(folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    _fsync(folder.parent)
    return [file.name for file in files]


def _is_whole(path: Path) -> bool:
    """True if manifest and sizes agree; hashes are left for `verify`."""
    try:
        _compare(path, _read_manifest(path).files, hashes=False)
    except CheckpointInvalid:
        return False
    return True


def check_identity(manifest: Manifest, identity: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on from the checkpoint at `path` with other settings than it was trained with.

    Raises:
        CheckpointInvalid: names each field that differs, with both values.
    """
    before = manifest.info.identity
    if before is None:
        raise CheckpointInvalid(f"expected training state in {path}, it was saved without; use a checkpoint of this version")
    if diff := identity_diff(before, identity):
        raise CheckpointInvalid(
            f"expected the settings of {path} to resume from it, these differ: {diff}. Use the same settings, or start "
            "from its weights with the checkpoint as the model"
        )


def identity_diff(before: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Fields in which two identities differ, with both values; empty where they agree."""
    old, new = _leaves(before), _leaves(json.loads(json.dumps(identity)))
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} here" for name in differing)


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Leaves of nested JSON as text, by their dotted path."""
    if isinstance(value, dict):
        return {name: leaf for key, part in value.items() for name, leaf in _leaves(part, f"{prefix}.{key}".strip(".")).items()}
    return {prefix: json.dumps(value, sort_keys=True)}


def state_file(rank: int) -> str:
    """Name of a rank's training state inside a checkpoint."""
    return f"{_STATE_FOLDER}rank-{rank}.safetensors"


def is_state_file(name: str) -> bool:
    """True for a file of training state, which no one needs who only uses the model."""
    return name.startswith(_STATE_FOLDER)


def tokenizer_sha256(folder: Path) -> str:
    """Hash over names and content of the tokenizer's files in a model folder."""
    return _tokenizer_hash([describe(folder, path.name) for path in folder.iterdir() if path.name.startswith(_TOKENIZER)])


def weights_sha256(folder: Path) -> str:
    """Hash over names and content of the weights in a model folder."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256("\n".join(f"{file.name} {_sha256(file)}" for file in files).encode()).hexdigest()


def _parse(record: Any, path: Path) -> Manifest:
    try:
        if record["format"] != FORMAT:
            raise CheckpointInvalid(
                f"expected format {FORMAT} in {path}, got {record['format']}; use the version that wrote it"
            )
        known = {key: record[key] for key in (f.name for f in fields(Manifest))}
        known["info"] = CheckpointInfo(**record["info"])
        known["files"] = tuple(FileRecord(**file) for file in record["files"])
        return Manifest(**known)
    except (KeyError, TypeError) as error:
        raise CheckpointInvalid(
            f"expected the fields of a manifest in {path}, got {error!r}; use another checkpoint"
        ) from error


def _compare(folder: Path, files: Sequence[FileRecord], *, hashes: bool) -> None:
    """Raise unless `folder` holds exactly `files`, with their sizes and, if asked, their hashes."""
    problems = []
    for file in files:
        path = folder / file.name
        if file.name.endswith(_FORBIDDEN) or not path.resolve().is_relative_to(folder.resolve()):
            problems.append(f"{file.name}: expected a safetensors, JSON or text file inside the checkpoint")
        elif not path.is_file():
            problems.append(f"{file.name}: missing")
        elif (size := path.stat().st_size) != file.size_bytes:
            problems.append(f"{file.name}: expected {file.size_bytes} bytes, got {size}")
        elif hashes and (digest := _sha256(path)) != file.sha256:
            problems.append(f"{file.name}: expected sha256 {file.sha256[:16]}..., got {digest[:16]}...")
    listed = {file.name for file in files} | {MANIFEST}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in listed:
            problems.append(f"{path.relative_to(folder)}: not in the list of files")
    if problems:
        raise CheckpointInvalid(
            f"expected the files of {folder} to match their records; {'; '.join(problems)}. Use another checkpoint"
        )


def _tokenizer_hash(files: Sequence[FileRecord]) -> str:
    parts = sorted(f"{file.name} {file.sha256}" for file in files if file.name.startswith(_TOKENIZER))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
