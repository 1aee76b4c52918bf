"""Checks of a job that need no torch and no cluster: paths, model folders, data rows, and what the job will occupy.

Everything wrong is collected and raised at once, each with a JSON pointer into the spec.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sedsft.config import Benchmark, DataConfig, RewardConfig
from sedsft.data import DataFileError
from sedsft.data.files import find_files, split_pattern
from sedsft.data.hub import FOLDER, fetch, parse_hub_name
from sedsft.data.sources import check_sft_rows
from services.checkpoints import MANIFEST
from services.jobspec import (
    REFERENCE_CPUS,
    STAGE_DATA,
    EvalStage,
    FilterStage,
    JobSpec,
    ModelRef,
    PipelineJob,
    RLStage,
    SFTStage,
    Stage,
    stages_of,
)
from services.reward_check import check_benchmark, check_prompts, remote_problems

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class SpecProblem:
    """One wrong field: JSON pointer, and what was expected, what came, what to do."""

    pointer: str
    message: str


class SpecError(Exception):
    """A spec that cannot run, with all its problems."""

    def __init__(self, problems: Sequence[SpecProblem]) -> None:
        super().__init__("; ".join(f"{problem.pointer}: {problem.message}" for problem in problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class _Refused(Exception):
    """Why one field is refused."""


# ------------------------------------------------------------------------------------------------ resources


@dataclass(frozen=True)
class RolePlan:
    """What the actors of one role reserve: `cpus` and `gpus` per worker."""

    role: str
    workers: int
    cpus: float
    gpus: int


@dataclass(frozen=True)
class StagePlan:
    """Roles of a stage, which run at the same time."""

    stage: str
    roles: tuple[RolePlan, ...]

    @property
    def cpus(self) -> float:
        """CPU cores of the whole stage."""
        return sum(role.workers * role.cpus for role in self.roles)

    @property
    def gpus(self) -> int:
        """GPUs of the whole stage."""
        return sum(role.workers * role.gpus for role in self.roles)


@dataclass(frozen=True)
class ResourcePlan:
    """What a job occupies, stage by stage. Stages run one after the other, so the job needs the largest of each."""

    stages: tuple[StagePlan, ...]

    @property
    def peak_cpus(self) -> float:
        """CPU cores of the stage that needs most."""
        return max(stage.cpus for stage in self.stages)

    @property
    def peak_gpus(self) -> int:
        """GPUs of the stage that needs most."""
        return max(stage.gpus for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """For the API: every role, the total of each stage and the peak."""
        stages = [
            {"stage": s.stage, "roles": [asdict(r) for r in s.roles], "cpus": s.cpus, "gpus": s.gpus} for s in self.stages
        ]
        return {"stages": stages, "peak": {"cpus": self.peak_cpus, "gpus": self.peak_gpus}}


def plan(spec: JobSpec) -> ResourcePlan:
    """What a job will reserve."""
    return ResourcePlan(tuple(StagePlan(stage.name, _roles(stage)) for stage in stages_of(spec)))


def _roles(stage: Stage) -> tuple[RolePlan, ...]:
    roles = []
    if isinstance(stage, SFTStage | RLStage):
        trainer = stage.trainer
        roles.append(RolePlan("trainer", trainer.workers, trainer.cpus_per_worker, trainer.gpus_per_worker))
    if isinstance(stage, RLStage | EvalStage | FilterStage):
        rollout, scorer = stage.rollout, stage.scorer
        roles.append(RolePlan("rollout", rollout.workers, rollout.cpus_per_worker, rollout.gpus_per_worker))
        roles.append(RolePlan("reward", scorer.workers, scorer.cpus_per_worker, 0))
    if isinstance(stage, EvalStage | FilterStage):
        roles.append(RolePlan("reference", 1, REFERENCE_CPUS, 0))
    return tuple(roles)


def check_capacity(spec: JobSpec, resources: ResourcePlan, cluster: Mapping[str, float]) -> None:
    """Refuse what the cluster can never give. `cluster` holds Ray's totals under "CPU" and "GPU".

    Raises:
        SpecError: names each stage that asks for more than there is, with the numbers.
    """
    problems = []
    for pointer, stage in zip(_stage_pointers(spec), resources.stages, strict=True):
        for kind, asked in (("CPU", stage.cpus), ("GPU", float(stage.gpus))):
            total = cluster.get(kind, 0.0)
            if asked > total + 1e-6:
                roles = ", ".join(
                    f"{role.workers} {role.role} x {role.cpus if kind == 'CPU' else role.gpus:g}" for role in stage.roles
                )
                problems.append(
                    SpecProblem(
                        pointer,
                        f"expected at most the cluster's {total:g} {kind} in stage {stage.stage!r}, got {asked:g} ({roles}); "
                        f"lower workers or {kind.lower()}s_per_worker, or add nodes",
                    )
                )
    if problems:
        raise SpecError(problems)


def _stage_pointers(spec: JobSpec) -> list[str]:
    return [f"/stages/{index}" for index in range(len(spec.stages))] if isinstance(spec, PipelineJob) else [""]


# ------------------------------------------------------------------------------------------- paths and content


def resolve(spec: JobSpec, roots: Sequence[Path], hub_home: Path | None = None, reward_hosts: Sequence[str] = ()) -> JobSpec:
    """The same job with absolute real paths, after everything it names was opened and checked.

    Args:
        roots: folders below which every path must lie, symbolic links followed; relative paths start at the first.
        hub_home: folder below which data sets named `hf://owner/name` are downloaded; None: such names are refused.
        reward_hosts: hosts that remote rewards may ask.

    Raises:
        SpecError: all the problems found.
    """
    resolver = _Resolver(tuple(Path(os.path.realpath(root)) for root in roots), hub_home and Path(os.path.realpath(hub_home)))
    resolver.problems += [
        SpecProblem(pointer + where, said)
        for stage, pointer in zip(stages_of(spec), _stage_pointers(spec), strict=True)
        for where, said in remote_problems(stage, reward_hosts)
    ]
    stages = [resolver.stage(stage, pointer) for stage, pointer in zip(stages_of(spec), _stage_pointers(spec), strict=True)]
    if resolver.problems:
        raise SpecError(resolver.problems)
    if isinstance(spec, PipelineJob):
        return spec.model_copy(update={"stages": tuple(stages)})
    return stages[0]  # type: ignore[return-value]  # a job of one stage is that stage, and copies keep their type


P = TypeVar("P", DataConfig, Benchmark)


class _Resolver:
    """Walks stages, resolves their paths and collects what is wrong. A file that several stages use is read once."""

    def __init__(self, roots: tuple[Path, ...], hub_home: Path | None) -> None:
        self.roots = roots if hub_home is None else (*roots, hub_home / FOLDER)
        self._hub_home = hub_home
        self._fetched: dict[str, Path] = {}
        self.problems: list[SpecProblem] = []
        self._verdicts: dict[tuple[Any, ...], str | None] = {}
        self._start_models: dict[str, str] = {}
        self._filters: list[str] = []

    def stage(self, stage: Stage, pointer: str) -> Stage:
        if isinstance(stage, SFTStage):
            sft = stage.sft
            update: dict[str, Any] = {"data": self._data(sft.data, _read_sft, None, f"{pointer}/sft/data/path")}
            if sft.held_out is not None:
                update["held_out"] = self._data(sft.held_out, _read_sft, None, f"{pointer}/sft/held_out/path")
            if sft.resume_from is not None:
                pointer_to = f"{pointer}/sft/resume_from"
                update["resume_from"] = self._checked(sft.resume_from, pointer_to, ("checkpoint",), _check_checkpoint)
            changes: dict[str, Any] = {"sft": sft.model_copy(update=update)}
        elif isinstance(stage, RLStage):
            data = self._data(stage.grpo.data, check_prompts, stage.grpo.reward, f"{pointer}/grpo/data/path")
            changes = {"grpo": stage.grpo.model_copy(update={"data": data})}
        elif isinstance(stage, FilterStage):
            data = self._data(stage.filter.data, check_prompts, stage.filter.reward, f"{pointer}/filter/data/path")
            changes = {"filter": stage.filter.model_copy(update={"data": data})}
            self._filters.append(stage.name)
        else:
            benchmarks = tuple(
                self._data(benchmark, check_benchmark, stage.eval.reward, f"{pointer}/eval/benchmarks/{index}/path")
                for index, benchmark in enumerate(stage.eval.benchmarks)
            )
            changes = {"eval": stage.eval.model_copy(update={"benchmarks": benchmarks})}
            changes["models"] = {name: self._model(ref, f"{pointer}/models/{name}/path") for name, ref in stage.models.items()}
        if not isinstance(stage, EvalStage):
            changes["model"] = self._model(stage.model, f"{pointer}/model/path")
            self._start_models[stage.name] = self._start_model(changes["model"])
        resolved = stage.model_copy(update=changes)
        self._check_lengths(resolved, pointer)
        return resolved

    def _start_model(self, ref: ModelRef) -> str:
        """Folder of the model that a stage's checkpoint descends from: it has the same architecture."""
        return ref.path if ref.path is not None else self._start_models[str(ref.stage)]

    def _check_lengths(self, stage: Stage, pointer: str) -> None:
        """Responses as long as all the positions of the model would leave none for a prompt."""
        if isinstance(stage, SFTStage):
            return
        if isinstance(stage, RLStage):
            field, max_tokens, refs = "grpo/max_tokens", stage.grpo.max_tokens, [stage.model]
        elif isinstance(stage, FilterStage):
            field, max_tokens, refs = "filter/sampling/max_tokens", stage.filter.sampling.max_tokens, [stage.model]
        else:
            field, max_tokens, refs = "eval/sampling/max_tokens", stage.eval.sampling.max_tokens, list(stage.models.values())
        for ref in refs:
            try:
                positions = _json_object(Path(self._start_model(ref)) / "config.json").get("max_position_embeddings")
            except _Refused:
                continue  # already among the problems
            if isinstance(positions, int) and max_tokens >= positions:
                said = f"expected fewer than the model's {positions} positions, got {max_tokens}; lower max_tokens"
                self.problems.append(SpecProblem(f"{pointer}/{field}", said))
                return

    def _model(self, ref: ModelRef, pointer: str) -> ModelRef:
        if ref.path is None:
            return ref
        path = self._checked(ref.path, pointer, ("model",), check_model_folder)
        return ref.model_copy(update={"path": path})

    def _data(self, source: P, read: Callable[[P, RewardConfig | None], None], reward: RewardConfig | None, pointer: str) -> P:
        """`reward` is what will read the golds, if the rows have any."""
        if reward is not None and isinstance(source, DataConfig) and source.path.startswith(STAGE_DATA):
            if source.path.removeprefix(STAGE_DATA) not in self._filters:
                earlier = ", ".join(self._filters) or "there is none yet"
                said = f"expected {STAGE_DATA}NAME of an earlier filter stage ({earlier}), got {source.path!r}"
                self.problems.append(SpecProblem(pointer, said))
            return source

        def check(path: Path) -> None:
            try:
                read(source.model_copy(update={"path": str(path)}), reward)
            except DataFileError as error:
                raise _Refused(str(error)) from error

        settings = source.model_dump_json(exclude={"path", "name"})
        scorer = "" if reward is None else reward.model_dump_json()
        path = self._checked(source.path, pointer, (read.__name__, scorer, settings), check, self._locate_data)
        return source.model_copy(update={"path": path})

    def _locate_data(self, text: str, roots: Sequence[Path]) -> Path:
        """Real path of a data source, which is downloaded first where it is named by its place on the hub."""
        try:
            name = parse_hub_name(text)
            if name is None:
                return real_data_path(text, roots)
            if self._hub_home is None:
                raise _Refused(
                    f"expected a path below {' or '.join(map(str, roots))}, got {text!r}, which this service may not download; "
                    "copy the files there, or start the service with SEDSFT_ALLOW_HUB=true"
                )
            if text not in self._fetched:
                self._fetched[text] = fetch(name, self._hub_home)
        except DataFileError as error:
            raise _Refused(str(error)) from error
        return real_data_path(str(self._fetched[text]), roots)

    def _checked(
        self,
        text: str,
        pointer: str,
        kind: tuple[str, ...],
        check: Callable[[Path], None],
        locate: Callable[[str, Sequence[Path]], Path] | None = None,
    ) -> str:
        """The real path, or what `locate` makes of it, as text; what is wrong with it or its content becomes a problem."""
        try:
            path = (locate or real_path)(text, self.roots)
        except _Refused as error:
            self.problems.append(SpecProblem(pointer, str(error)))
            return text
        key = (path, *kind)
        if key not in self._verdicts:
            try:
                check(path)
                self._verdicts[key] = None
            except _Refused as error:
                self._verdicts[key] = str(error)
        if (verdict := self._verdicts[key]) is not None:
            self.problems.append(SpecProblem(pointer, verdict))
        return str(path)


def _check_checkpoint(folder: Path) -> None:
    """Refuse what is neither a checkpoint nor a folder of checkpoints; hashes are compared when the stage starts."""
    if not (folder / MANIFEST).is_file() and not any(folder.glob(f"step-*/{MANIFEST}")):
        raise _Refused(
            f"expected a checkpoint or a folder of checkpoints, got {folder} without {MANIFEST}; give .../checkpoints/step-<n>"
        )


def _read_sft(data: DataConfig, reward: RewardConfig | None) -> None:
    check_sft_rows(data)


def real_path(text: str, roots: Sequence[Path]) -> Path:
    """Absolute path without symbolic links, below one of `roots` (real paths themselves) and existing."""
    if "\0" in text:
        raise _Refused("expected a path, got one with a null character")
    path = Path(os.path.realpath(roots[0] / text))
    allowed = " or ".join(map(str, roots))
    if not any(path.is_relative_to(root) for root in roots):
        leads = f", which leads to {path}" if str(path) != text else ""
        raise _Refused(
            f"expected a path below {allowed}, got {text!r}{leads}; copy it there, or start the service with another "
            "SEDSFT_ALLOWED_ROOTS"
        )
    try:
        exists = path.exists()
    except OSError as error:
        raise _Refused(f"expected a path that can be read, got {text!r}: {error.strerror}") from error
    if not exists:
        raise _Refused(f"expected {path} to exist, it does not; check the spelling, relative paths start at {roots[0]}")
    return path


def real_data_path(text: str, roots: Sequence[Path]) -> Path:
    """Absolute path of a file or folder, or pattern below an absolute folder, all of whose files lie below one of `roots`."""
    if "\0" in text:
        raise _Refused("expected a path, got one with a null character")
    base, pattern = split_pattern(str(roots[0] / text))
    resolved = str(real_path(base if pattern else text, roots))
    if pattern:
        resolved = os.path.join(glob.escape(resolved), pattern)
    try:
        files = find_files(resolved)
    except DataFileError as error:
        raise _Refused(str(error)) from error
    for file in files:
        real = Path(os.path.realpath(file))
        if not any(real.is_relative_to(root) for root in roots):
            allowed = " or ".join(map(str, roots))
            raise _Refused(
                f"expected a path whose files lie below {allowed}, got {text!r} with {file}, which leads to "
                f"{real}; copy it there"
            )
    return Path(resolved)


# ------------------------------------------------------------------------------------------------------ models


def resolve_model(text: str, roots: Sequence[Path]) -> Path:
    """Real path of a model folder that passes `check_model_folder`.

    Raises:
        SpecError: with an empty pointer.
    """
    try:
        path = real_path(text, [Path(os.path.realpath(root)) for root in roots])
        check_model_folder(path)
    except _Refused as error:
        raise SpecError([SpecProblem("", str(error))]) from error
    return path


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a Hugging Face model with whole safetensors, chat template and pad token, or brings code."""
    if not folder.is_dir():
        raise _Refused(f"expected a model folder, got the file {folder}")
    config = _json_object(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise _Refused(f"expected model_type in {folder / 'config.json'}, got none; save the model with save_pretrained")
    tokenizer = _json_object(folder / "tokenizer_config.json")
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if "auto_map" in content:
            raise _Refused(
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
        raise _Refused(f"expected *.safetensors in {folder}, got {got}; save it with save_pretrained(safe_serialization=True)")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _json_object(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else set()
        missing = sorted(str(name) for name in names - {path.name for path in files})
        if missing:
            raise _Refused(
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
        raise _Refused(f"expected a safetensors file, got {file} ({error}); download or save it again") from error
    if size != expected:
        raise _Refused(f"expected {file} to have {expected} bytes, got {size}; it was cut off, copy it again")


def _check_tokenizer(folder: Path, tokenizer: Mapping[str, Any]) -> None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise _Refused(f"expected a tokenizer in {folder}, got no tokenizer.json; save it there with save_pretrained")
    if (folder / "tokenizer.json").exists() and "model" not in _json_object(folder / "tokenizer.json"):
        raise _Refused(
            f"expected a tokenizer in {folder / 'tokenizer.json'}, got JSON without `model`; save it with save_pretrained"
        )
    if not tokenizer.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        raise _Refused(
            f"expected a chat template, got none in {folder / 'tokenizer_config.json'} and no chat_template.jinja beside it; "
            "set tokenizer.chat_template and save the tokenizer there"
        )
    pad = tokenizer.get("pad_token")
    if pad is None and (folder / "special_tokens_map.json").exists():
        pad = _json_object(folder / "special_tokens_map.json").get("pad_token")
    if not pad:
        raise _Refused(
            f"expected a pad token, got none in {folder / 'tokenizer_config.json'}; set tokenizer.pad_token to an unused token "
            "and save the tokenizer there"
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _Refused(f"expected {path}, it is missing; point to a folder made by save_pretrained") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _Refused(f"expected JSON in {path}, got: {error}") from error
    if not isinstance(content, dict):
        raise _Refused(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content
