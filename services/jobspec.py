"""The job spec: what a user posts, what the API validates and what the driver runs. Pydantic only, no torch.

A job is one stage (`sft`, `gate`, `rl`, `eval`, `filter`) or a `pipeline` of stages in order. A stage starts from a model
folder or from the checkpoint that an earlier stage left.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, TypeAdapter, model_validator

from sedsft.config import Config, EvalConfig, FilterConfig, GRPOConfig, SFTConfig
from sedsft.gate_config import GateConfig

Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]


class ModelRef(Config):
    """Where a stage's weights and tokenizer come from: exactly one of `path` and `stage`."""

    path: str | None = None
    """A Hugging Face model folder with safetensors below one of the service's allowed roots."""
    stage: Name | None = None
    """Name of an earlier stage of the same pipeline: of an `sft` or `rl` stage, whose last checkpoint is used, or of a `gate`,
    whose winner is."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelRef:
        if (self.path is None) == (self.stage is None):
            raise ValueError('expected exactly one of {"path": ...} and {"stage": ...}')
        return self

    @property
    def label(self) -> str:
        """The stage's name or the path, for people."""
        return self.stage if self.stage is not None else str(self.path)


# ---------------------------------------------------------------------------------------------- resources


class TrainerResources(Config):
    """Data-parallel DeepSpeed ranks, one actor each."""

    workers: PositiveInt = 1
    """Number of ranks."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores reserved per rank; its PyTorch threads are this number, rounded down, at least 1."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """1 trains on a GPU with NCCL, 0 on CPU with gloo."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too."""


Backend = Literal["gloo", "nccl"]
"""Where vLLM's weight-transfer engines of that name get their tensors from."""


class SyncSettings(Config):
    """How weights get from trainers into engines, and how long each phase of it may take. docs/rl.md tells the transports."""

    transport: Literal["auto", "files", "gloo", "nccl"] = "auto"
    """`files`: safetensors in the run's folder, which trainers write and engines read. `gloo`: from memory to memory over TCP,
    between CPUs. `nccl`: between GPUs. `auto`: `nccl` where trainers and engines have GPUs, else `files`. What holds still,
    the models of `eval`, `filter` and `gate` stages, always comes from its own files."""
    bucket_mb: PositiveInt = 256
    """MiB of parameters that are gathered from the ranks, written or sent at a time; a larger tensor goes alone."""
    export_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds until the trainers have written their weights, or are ready to send them."""
    load_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds until engines have loaded the weights; gathering and sending them included."""
    probe_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds until engines have sampled the probe, and as many until trainers have scored it."""


class RolloutResources(Config):
    """vLLM engines, one actor each."""

    workers: PositiveInt = 1
    """Number of engines."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores reserved per engine; its threads are this number, rounded down, at least 1."""
    gpus_per_worker: Annotated[int, Field(ge=0)] = 0
    """GPUs per engine, 0 or equal to `tensor_parallel`."""
    tensor_parallel: PositiveInt = 1
    """GPUs that one engine's layers are split over."""
    max_model_len: Annotated[int, Field(ge=16)] = 4096
    """Longest prompt plus response, in tokens; the model's own limit applies where it is shorter."""
    max_num_seqs: PositiveInt = 256
    """Sequences that one engine decodes at the same time."""
    cpu_kv_cache_gb: PositiveInt = 1
    """Memory for keys and values of an engine on CPU, in GiB. On GPU vLLM sizes it from `gpu_memory_utilization`."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=0.98)] = 0.85
    """Share of each GPU's memory an engine may take."""
    sample_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds after which a sample ends as it is, marked as timed out and truncated; counted from the call to the engine."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """An engine that owes a heartbeat for this long is ended and restarted; after a quarter of it, it gets no new prompts.
    Above four times the engine's longest forward pass."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often an engine that died is started again within an hour."""
    sync: SyncSettings = SyncSettings()
    """How new weights come into the engines."""

    @property
    def transfer_backend(self) -> Backend | None:
        """What engines are built to receive weights with, beside files."""
        if self.sync.transport == "auto":
            return "nccl" if self.gpus_per_worker else None
        return None if self.sync.transport == "files" else self.sync.transport

    @model_validator(mode="after")
    def _transport_fits(self) -> RolloutResources:
        _check_transport(self.sync.transport, "rollout.gpus_per_worker", self.gpus_per_worker)
        return self

    @model_validator(mode="after")
    def _parallel_fits(self) -> RolloutResources:
        if self.gpus_per_worker not in (0, self.tensor_parallel):
            raise ValueError(
                f"expected gpus_per_worker to be 0 or tensor_parallel={self.tensor_parallel}, got {self.gpus_per_worker}"
            )
        if self.tensor_parallel > 1 and self.gpus_per_worker == 0:
            raise ValueError(f"expected tensor_parallel=1 on CPU, got {self.tensor_parallel}; set gpus_per_worker as well")
        return self


def _check_transport(transport: str, field: str, gpus: int) -> None:
    """Both ends of a transport must have what it runs on."""
    if transport == "nccl" and not gpus:
        raise ValueError(f"expected {field} of at least 1 with sync.transport='nccl', got 0; choose 'auto', 'files' or 'gloo'")
    if transport == "gloo" and gpus:
        raise ValueError(f"expected {field}=0 with sync.transport='gloo', got {gpus}; choose 'auto', 'files' or 'nccl'")


class ScorerResources(Config):
    """Reward workers, one actor each, every one with its own killable scoring processes."""

    workers: PositiveInt = 1
    """Number of actors."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """CPU cores reserved per actor."""
    processes: PositiveInt = 2
    """Scoring processes of one actor."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often actors that died are started again within an hour, all of them together."""


REFERENCE_CPUS = 0.1
"""CPU cores of the actor that an evaluation checks its engines against: it only opens the model and scores a few tokens."""


# ------------------------------------------------------------------------------------------------- stages


class SFTStage(Config):
    """Supervised fine-tuning: calibrate tau on the starting model, train, save a checkpoint."""

    type: Literal["sft"] = "sft"
    name: Name = "sft"
    """Name of the stage; later stages refer to it."""
    model: ModelRef
    """Starting model."""
    sft: SFTConfig
    """Objective, data and optimizer."""
    trainer: TrainerResources = TrainerResources()
    """Ranks of the trainer."""


class RLStage(Config):
    """GRPO: readiness figures, then rounds of sample, score, update, verified weight sync."""

    type: Literal["rl"] = "rl"
    name: Name = "rl"
    """Name of the stage; later stages refer to it."""
    model: ModelRef
    """Starting model."""
    grpo: GRPOConfig
    """Data, reward, sampling and optimizer."""
    trainer: TrainerResources = TrainerResources()
    """Ranks of the trainer."""
    rollout: RolloutResources = RolloutResources()
    """Engines that sample."""
    scorer: ScorerResources = ScorerResources()
    """Reward workers."""

    @property
    def transfer_backend(self) -> Backend | None:
        """What the trainers send their weights with; None: through files."""
        backend = self.rollout.transfer_backend
        return None if backend == "nccl" and not self.trainer.gpus_per_worker else backend

    @model_validator(mode="after")
    def _responses_fit(self) -> RLStage:
        _check_room("grpo.max_tokens", self.grpo.max_tokens, self.rollout)
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> RLStage:
        _check_transport(self.rollout.sync.transport, "trainer.gpus_per_worker", self.trainer.gpus_per_worker)
        return self


class EvalStage(Config):
    """Accuracy and diversity of one or more models on the same benchmarks with the same seeds."""

    type: Literal["eval"] = "eval"
    name: Name = "eval"
    """Name of the stage."""
    models: Annotated[dict[Name, ModelRef], Field(min_length=1)]
    """Models by the name they carry in the tables."""
    eval: EvalConfig
    """Benchmarks, sampling and metrics."""
    rollout: RolloutResources = RolloutResources()
    """Engines that sample."""
    scorer: ScorerResources = ScorerResources()
    """Reward workers."""

    @model_validator(mode="after")
    def _responses_fit(self) -> EvalStage:
        _check_room("eval.sampling.max_tokens", self.eval.sampling.max_tokens, self.rollout)
        return self


class FilterStage(Config):
    """Difficulty filter: sample each prompt several times and keep those answered right neither too often nor too rarely."""

    type: Literal["filter"] = "filter"
    name: Name = "filter"
    """Name of the stage; a later `rl` stage reads the rows it kept with the data path `stage:NAME`."""
    model: ModelRef
    """Model that answers."""
    filter: FilterConfig
    """Data, reward, sampling and the band."""
    rollout: RolloutResources = RolloutResources()
    """Engines that sample."""
    scorer: ScorerResources = ScorerResources()
    """Reward workers."""

    @model_validator(mode="after")
    def _responses_fit(self) -> FilterStage:
        _check_room("filter.sampling.max_tokens", self.filter.sampling.max_tokens, self.rollout)
        return self


class GateStage(Config):
    """Readiness gate: a short probe of one or more models; the best that reaches every threshold goes on to RL."""

    type: Literal["gate"] = "gate"
    name: Name = "gate"
    """Name of the stage; later stages refer to the winner by it."""
    candidates: Annotated[tuple[ModelRef, ...], Field(min_length=1, max_length=32)]
    """Models to choose from, as a rule SFT stages with different objectives. Their architectures may differ."""
    gate: GateConfig
    """Probe, thresholds and rank."""
    rollout: RolloutResources = RolloutResources()
    """Engines that sample."""
    scorer: ScorerResources = ScorerResources()
    """Reward workers."""

    @model_validator(mode="after")
    def _candidates_differ(self) -> GateStage:
        for index, candidate in enumerate(self.candidates):
            if candidate in self.candidates[:index]:
                raise ValueError(
                    f"candidates[{index}]: expected candidates to differ, got {candidate.label!r} twice; remove one"
                )
        _check_room("gate.sampling.max_tokens", self.gate.sampling.max_tokens, self.rollout)
        return self


STAGE_DATA = "stage:"
"""What the path of data begins with that an earlier filter stage leaves."""


def _check_room(field: str, max_tokens: int, rollout: RolloutResources) -> None:
    if max_tokens >= rollout.max_model_len:
        raise ValueError(
            f"expected {field} below rollout.max_model_len={rollout.max_model_len}, which holds prompt and response, got "
            f"{max_tokens}; lower it or raise rollout.max_model_len"
        )


Stage = Annotated[SFTStage | RLStage | EvalStage | FilterStage | GateStage, Field(discriminator="type")]
_HAVE_MODEL = ("sft", "rl", "gate")

# --------------------------------------------------------------------------------------------------- jobs


class Recovery(Config):
    """When a job goes on by itself after a process it needs has died. Engines and reward workers have budgets of their own."""

    restarts: Annotated[int, Field(ge=0, le=1000)] = 3
    """How often the job goes on behind its newest checkpoint: with new ranks after one has died, with a new driver after the
    driver has. A phase that missed its deadline counts too, and is tried again once."""
    no_progress: PositiveInt = 3
    """The job fails when so many failures in a row leave it no further than before, whatever `restarts` allows."""


class JobFields(Config):
    """What every job has beside its stages."""

    name: Name = "job"
    """Name for people; need not be unique."""
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] = Field(default_factory=dict)
    """Up to 16 labels of the user's own."""
    deadline_s: Annotated[int, Field(ge=10)] = 7 * 24 * 3600
    """Seconds after its start at which a job that still runs is stopped and fails with `deadline`."""
    recovery: Recovery = Recovery()
    """When the job goes on after a death, and when it gives up."""


class SFTJob(SFTStage, JobFields):
    """A job of one SFT stage."""

    name: Name = "sft"
    """Name of the job and of its stage; need not be unique."""


class RLJob(RLStage, JobFields):
    """A job of one RL stage."""

    name: Name = "rl"
    """Name of the job and of its stage; need not be unique."""


class EvalJob(EvalStage, JobFields):
    """A job of one evaluation stage."""

    name: Name = "eval"
    """Name of the job and of its stage; need not be unique."""


class FilterJob(FilterStage, JobFields):
    """A job of one filter stage."""

    name: Name = "filter"
    """Name of the job and of its stage; need not be unique."""


class GateJob(GateStage, JobFields):
    """A job of one gate."""

    name: Name = "gate"
    """Name of the job and of its stage; need not be unique."""


class PipelineJob(JobFields):
    """Stages that run one after the other, each from a model folder or from an earlier stage's checkpoint."""

    type: Literal["pipeline"]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, max_length=64)]
    """The stages in order."""

    @model_validator(mode="after")
    def _references(self) -> PipelineJob:
        seen: dict[str, str] = {}
        for index, stage in enumerate(self.stages):
            if stage.name in seen:
                raise ValueError(f"stages[{index}]: expected stage names to differ, got {stage.name!r} twice")
            for ref in model_refs(stage):
                if ref.stage is not None and seen.get(ref.stage) not in _HAVE_MODEL:
                    trained = [name for name, kind in seen.items() if kind in _HAVE_MODEL]
                    raise ValueError(
                        f"stages[{index}] ({stage.name!r}): expected model.stage to name an earlier sft, rl or gate stage "
                        f"({', '.join(trained) or 'there is none yet'}), got {ref.stage!r}"
                    )
            seen[stage.name] = stage.type
        return self


JobSpec = Annotated[SFTJob | RLJob | EvalJob | FilterJob | GateJob | PipelineJob, Field(discriminator="type")]
JOB_SPEC: TypeAdapter[SFTJob | RLJob | EvalJob | FilterJob | GateJob | PipelineJob] = TypeAdapter(JobSpec)


def stages_of(spec: JobSpec) -> tuple[SFTStage | RLStage | EvalStage | FilterStage | GateStage, ...]:
    """The stages of a job in order; a job of one stage is that stage."""
    return spec.stages if isinstance(spec, PipelineJob) else (spec,)


def model_refs(stage: SFTStage | RLStage | EvalStage | FilterStage | GateStage) -> tuple[ModelRef, ...]:
    """The models a stage starts from."""
    if isinstance(stage, GateStage):
        return stage.candidates
    return tuple(stage.models.values()) if isinstance(stage, EvalStage) else (stage.model,)
