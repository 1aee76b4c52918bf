"""Checks of a job that need no torch and no cluster: paths, model folders, data rows, and what the job will occupy.

Everything wrong is collected and raised at once, each with a JSON pointer into the spec.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sedsft.config import Benchmark, CodeReward, DataConfig, RewardConfig
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
    GateStage,
    JobSpec,
    ModelRef,
    PipelineJob,
    RLStage,
    SFTStage,
    Stage,
    model_refs,
    stages_of,
)
from services.model_folder import Refused, check_model_folder, json_object
from services.reward_check import check_benchmark, check_prompts, code_problem, remote_problems, reward_of


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
    if not isinstance(stage, SFTStage):
        rollout, scorer = stage.rollout, stage.scorer
        roles.append(RolePlan("rollout", rollout.workers, rollout.cpus_per_worker, rollout.gpus_per_worker))
        roles.append(RolePlan("reward", scorer.workers, scorer.cpus_per_worker, 0))
    if isinstance(stage, EvalStage | FilterStage | GateStage):
        roles.append(RolePlan("reference", 1, REFERENCE_CPUS, 0))
    return tuple(roles)


def with_rollout_workers(spec: JobSpec, stage: str, workers: int) -> JobSpec:
    """The job with so many engines in one of its stages."""

    def changed(one: Any) -> Any:
        return one.model_copy(update={"rollout": one.rollout.model_copy(update={"workers": workers})})

    if not isinstance(spec, PipelineJob):
        return cast(JobSpec, changed(spec))
    return spec.model_copy(update={"stages": tuple(changed(one) if one.name == stage else one for one in spec.stages)})


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


@dataclass(frozen=True)
class RewardRights:
    """What the operator allows rewards to use."""

    hosts: tuple[str, ...] = ()
    """Whom remote rewards may ask."""
    code: bool = False
    """Whether rewards may be code of the user's own."""


NO_RIGHTS = RewardRights()


def resolve(spec: JobSpec, roots: Sequence[Path], hub_home: Path | None = None, rights: RewardRights = NO_RIGHTS) -> JobSpec:
    """The same job with absolute real paths, after everything it names was opened and checked.

    Args:
        roots: folders below which every path must lie, symbolic links followed; relative paths start at the first.
        hub_home: folder below which data sets named `hf://owner/name` are downloaded; None: such names are refused.
        rights: what rewards may use.

    Raises:
        SpecError: all the problems found.
    """
    real_roots = tuple(Path(os.path.realpath(root)) for root in roots)
    resolver = _Resolver(real_roots, hub_home and Path(os.path.realpath(hub_home)), rights.code)
    resolver.problems += [
        SpecProblem(pointer + where, said)
        for stage, pointer in zip(stages_of(spec), _stage_pointers(spec), strict=True)
        for where, said in remote_problems(stage, rights.hosts)
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

    def __init__(self, roots: tuple[Path, ...], hub_home: Path | None, reward_code: bool) -> None:
        self.roots = roots if hub_home is None else (*roots, hub_home / FOLDER)
        self._reward_code = reward_code
        self._hub_home = hub_home
        self._fetched: dict[str, Path] = {}
        self.problems: list[SpecProblem] = []
        self._verdicts: dict[tuple[Any, ...], str | None] = {}
        self._start_models: dict[str, tuple[str, ...]] = {}
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
            reward, ledger = stage.grpo.reward, stage.grpo.ledger
            update = {"data": self._data(stage.grpo.data, check_prompts, reward, f"{pointer}/grpo/data/path")}
            if ledger is not None and ledger.data is not None:
                data = self._data(ledger.data, check_prompts, reward, f"{pointer}/grpo/ledger/data/path")
                update["ledger"] = ledger.model_copy(update={"data": data})
            changes = {"grpo": stage.grpo.model_copy(update=update)}
        elif isinstance(stage, FilterStage):
            data = self._data(stage.filter.data, check_prompts, stage.filter.reward, f"{pointer}/filter/data/path")
            changes = {"filter": stage.filter.model_copy(update={"data": data})}
            self._filters.append(stage.name)
        elif isinstance(stage, GateStage):
            data = self._data(stage.gate.data, check_prompts, stage.gate.reward, f"{pointer}/gate/data/path")
            refs = [self._model(ref, f"{pointer}/candidates/{index}") for index, ref in enumerate(stage.candidates)]
            changes = {"gate": stage.gate.model_copy(update={"data": data}), "candidates": tuple(refs)}
        else:
            benchmarks = tuple(
                self._data(benchmark, check_benchmark, stage.eval.reward, f"{pointer}/eval/benchmarks/{index}/path")
                for index, benchmark in enumerate(stage.eval.benchmarks)
            )
            changes = {"eval": stage.eval.model_copy(update={"benchmarks": benchmarks})}
            changes["models"] = {name: self._model(ref, f"{pointer}/models/{name}") for name, ref in stage.models.items()}
        if not isinstance(stage, EvalStage | GateStage):
            changes["model"] = self._model(stage.model, f"{pointer}/model")
        resolved = self._with_reward_code(stage.model_copy(update=changes), pointer)
        self._start_models[stage.name] = self._start_models_of(resolved)
        self._check_lengths(resolved, pointer)
        return resolved

    def _with_reward_code(self, stage: Stage, pointer: str) -> Stage:
        """The stage with path and hash of the code in its reward, which is loaded once."""
        field, reward = reward_of(stage)
        if not any(isinstance(component, CodeReward) for component in reward.components):
            return stage
        where = f"{pointer}/{field}/reward/components"
        components = tuple(
            self._code(component, f"{where}/{index}/path") if isinstance(component, CodeReward) else component
            for index, component in enumerate(reward.components)
        )
        settings = getattr(stage, field).model_copy(update={"reward": reward.model_copy(update={"components": components})})
        return stage.model_copy(update={field: settings})

    def _code(self, component: CodeReward, pointer: str) -> CodeReward:
        if not self._reward_code:
            said = "expected no reward of type code, since this service runs none; start it with SEDSFT_ALLOW_REWARD_CODE=true"
            self.problems.append(SpecProblem(pointer, said))
            return component

        def check(path: Path) -> None:
            if (problem := code_problem(component.model_copy(update={"path": str(path)}))) is not None:
                raise Refused(problem)

        before = len(self.problems)
        path = self._checked(component.path, pointer, ("code", component.model_dump_json()), check)
        if len(self.problems) > before:
            return component
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return component.model_copy(update={"path": path, "sha256": digest})

    def _start_models_of(self, stage: Stage) -> tuple[str, ...]:
        """Folders of the models that those of a stage descend from: they have the same architectures."""
        chains = [
            (ref.path,) if ref.path is not None else self._start_models.get(str(ref.stage), ()) for ref in model_refs(stage)
        ]
        return tuple(dict.fromkeys(path for chain in chains for path in chain))

    def _check_lengths(self, stage: Stage, pointer: str) -> None:
        """Responses as long as all the positions of the model would leave none for a prompt."""
        if isinstance(stage, SFTStage):
            return
        if isinstance(stage, RLStage):
            field, max_tokens = "grpo/max_tokens", stage.grpo.max_tokens
        elif isinstance(stage, FilterStage):
            field, max_tokens = "filter/sampling/max_tokens", stage.filter.sampling.max_tokens
        elif isinstance(stage, GateStage):
            field, max_tokens = "gate/sampling/max_tokens", stage.gate.sampling.max_tokens
        else:
            field, max_tokens = "eval/sampling/max_tokens", stage.eval.sampling.max_tokens
        for model in self._start_models[stage.name]:
            try:
                positions = json_object(Path(model) / "config.json").get("max_position_embeddings")
            except Refused:
                continue  # already among the problems
            if isinstance(positions, int) and max_tokens >= positions:
                said = f"expected fewer than the model's {positions} positions, got {max_tokens}; lower max_tokens"
                self.problems.append(SpecProblem(f"{pointer}/{field}", said))
                return

    def _model(self, ref: ModelRef, pointer: str) -> ModelRef:
        if ref.path is not None:
            return ref.model_copy(update={"path": self._checked(ref.path, f"{pointer}/path", ("model",), check_model_folder)})
        if ref.stage not in self._start_models:
            said = (
                f"expected a model folder, since a job of one stage has no earlier ones, got stage {ref.stage!r}; give a path"
            )
            self.problems.append(SpecProblem(f"{pointer}/stage", said))
        return ref

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
                raise Refused(str(error)) from error

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
                raise Refused(
                    f"expected a path below {' or '.join(map(str, roots))}, got {text!r}, which this service may not download; "
                    "copy the files there, or start the service with SEDSFT_ALLOW_HUB=true"
                )
            if text not in self._fetched:
                self._fetched[text] = fetch(name, self._hub_home)
        except DataFileError as error:
            raise Refused(str(error)) from error
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
        except Refused as error:
            self.problems.append(SpecProblem(pointer, str(error)))
            return text
        key = (path, *kind)
        if key not in self._verdicts:
            try:
                check(path)
                self._verdicts[key] = None
            except Refused as error:
                self._verdicts[key] = str(error)
        if (verdict := self._verdicts[key]) is not None:
            self.problems.append(SpecProblem(pointer, verdict))
        return str(path)


def _check_checkpoint(folder: Path) -> None:
    """Refuse what is neither a checkpoint nor a folder of checkpoints; hashes are compared when the stage starts."""
    if not (folder / MANIFEST).is_file() and not any(folder.glob(f"step-*/{MANIFEST}")):
        raise Refused(
            f"expected a checkpoint or a folder of checkpoints, got {folder} without {MANIFEST}; give .../checkpoints/step-<n>"
        )


def _read_sft(data: DataConfig, reward: RewardConfig | None) -> None:
    check_sft_rows(data)


def real_path(text: str, roots: Sequence[Path]) -> Path:
    """Absolute path without symbolic links, below one of `roots` (real paths themselves) and existing."""
    if "\0" in text:
        raise Refused("expected a path, got one with a null character")
    path = Path(os.path.realpath(roots[0] / text))
    allowed = " or ".join(map(str, roots))
    if not any(path.is_relative_to(root) for root in roots):
        leads = f", which leads to {path}" if str(path) != text else ""
        raise Refused(
            f"expected a path below {allowed}, got {text!r}{leads}; copy it there, or start the service with another "
            "SEDSFT_ALLOWED_ROOTS"
        )
    try:
        exists = path.exists()
    except OSError as error:
        raise Refused(f"expected a path that can be read, got {text!r}: {error.strerror}") from error
    if not exists:
        raise Refused(f"expected {path} to exist, it does not; check the spelling, relative paths start at {roots[0]}")
    return path


def real_data_path(text: str, roots: Sequence[Path]) -> Path:
    """Absolute path of a file or folder, or pattern below an absolute folder, all of whose files lie below one of `roots`."""
    if "\0" in text:
        raise Refused("expected a path, got one with a null character")
    base, pattern = split_pattern(str(roots[0] / text))
    resolved = str(real_path(base if pattern else text, roots))
    if pattern:
        resolved = os.path.join(glob.escape(resolved), pattern)
    try:
        files = find_files(resolved)
    except DataFileError as error:
        raise Refused(str(error)) from error
    for file in files:
        real = Path(os.path.realpath(file))
        if not any(real.is_relative_to(root) for root in roots):
            allowed = " or ".join(map(str, roots))
            raise Refused(
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
    except Refused as error:
        raise SpecError([SpecProblem("", str(error))]) from error
    return path
