"""Settings of the algorithms: frozen pydantic models, validated once and never changed afterwards.

Imports nothing heavier than pydantic, so that the API and the command line can check a job without torch. How rewards are
set is in `sedsft.reward_config`, how sampling and training overlap in `sedsft.overlap_config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sedsft.config_base import Config as Config
from sedsft.overlap_config import AsyncOverlap as AsyncOverlap
from sedsft.overlap_config import OneStepOffOverlap as OneStepOffOverlap
from sedsft.overlap_config import Overlap as Overlap
from sedsft.overlap_config import SyncOverlap as SyncOverlap
from sedsft.reward_config import AnswerReward as AnswerReward
from sedsft.reward_config import CodeReward as CodeReward
from sedsft.reward_config import FormatReward as FormatReward
from sedsft.reward_config import LengthReward as LengthReward
from sedsft.reward_config import OverlongPenalty as OverlongPenalty
from sedsft.reward_config import RemoteReward as RemoteReward
from sedsft.reward_config import RewardConfig as RewardConfig

# --------------------------------------------------------------------------------------------- objectives


class CEObjective(Config):
    """Cross-entropy: -log p."""

    type: Literal["ce"] = "ce"


class SEDObjective(Config):
    """SED-SFT (arXiv 2602.07464): -log p + weight * M * (p - 1/2)^2 with M = 1 where the top-k mass is below tau."""

    type: Literal["sed"] = "sed"
    weight: Annotated[float, Field(ge=0, le=8)] = 1.0
    """Lambda, the weight of the diversity term. Above 1 the optimum of an active token moves below p = 1."""
    top_k: Annotated[int, Field(ge=1, le=8)] = 2
    """How many of the largest next-token probabilities are summed to measure the exploration space."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """r, the share of calibration tokens, those with the largest top-k mass, that get no diversity term."""
    tau: Annotated[float | None, Field(gt=0, le=1)] = None
    """Fixed threshold on the top-k mass. When set, nothing is calibrated and what steers calibration must be left out."""
    tau_mode: Literal["initial", "running", "released"] = "initial"
    """Where tau comes from unless it is fixed. `initial`: once, from the response tokens of held-out rows under the starting
    model, as the paper says. `running`: starts so and then follows the tokens trained on, so that the masked share stays at
    `mask_ratio` while the model sharpens. `released`: as the authors' code does it, once, from all tokens of the first 100
    held-out rows, the prompts' included, with k = 10 whatever `top_k` is."""
    tau_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """With `running`: weight of the past when a step's masses are added to the distribution that tau is read from. More
    suits batches of a few hundred tokens and models that move slowly; docs/objectives.md has figures."""
    tau_interval: PositiveInt = 1
    """With `running`: optimizer steps between two updates of tau."""
    mask: bool = True
    """False gives the ablation "SED-SFT w/o mask": the term applies to every token (M = 1)."""

    @model_validator(mode="after")
    def _one_source_of_tau(self) -> SEDObjective:
        # Compared with the defaults rather than looked up in what was given, so that a dumped spec reads back.
        def given(*names: str) -> list[str]:
            return [name for name in names if getattr(self, name) != SEDObjective.model_fields[name].default]

        if not self.mask and (idle := given("tau", "mask_ratio", "tau_mode", "tau_smoothing", "tau_interval")):
            raise ValueError(f"expected no {', '.join(idle)} with mask=false, since they would do nothing; remove them")
        if self.tau is not None and (idle := given("mask_ratio", "tau_mode", "tau_smoothing", "tau_interval")):
            raise ValueError(f"expected no {', '.join(idle)} beside a fixed tau, since they would do nothing; remove one side")
        if self.tau_mode != "running" and (idle := given("tau_smoothing", "tau_interval")):
            raise ValueError(f"expected no {', '.join(idle)} with tau_mode={self.tau_mode!r}; remove them or choose 'running'")
        return self


class DFTObjective(Config):
    """Dynamic fine-tuning (arXiv 2508.05629): -sg(p) log p."""

    type: Literal["dft"] = "dft"


class GEMObjective(Config):
    """GEM (arXiv 2408.16673): -sum_j q_j w_j (log p_y - log p_j) with q = sg(softmax(z / beta))."""

    type: Literal["gem"] = "gem"
    beta: Annotated[float, Field(gt=0, le=10)] = 0.7
    """Temperature of q; 1 weights alternatives as the model does, smaller values sharpen."""
    h: Literal["linear", "logsigmoid"] = "linear"
    """Shape of the pairwise loss: w = 1, or w = sigmoid(0.01 (z_j - z_y))."""


Objective = Annotated[CEObjective | SEDObjective | DFTObjective | GEMObjective, Field(discriminator="type")]

# --------------------------------------------------------------------------------------------------- data


Layout = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "verl", "tokens"]


class DataConfig(Config):
    """Rows of one or more files and how to read them."""

    path: Annotated[str, Field(min_length=1)]
    """A file, a glob pattern or a folder below one of the service's allowed roots: .jsonl, .json or .parquet, the first two
    also compressed (.gz, .zst). Several files are read in the order of their paths. They may be
    larger than memory, except lists in .json, which may have 512 MiB of text. Where the operator allows it
    (`SEDSFT_ALLOW_HUB`), also `hf://owner/name[@revision][/file, folder or pattern]`: data files of that data set of the
    Hugging Face hub, downloaded when the job is submitted and pinned to a commit. In an `rl`, `filter` or
    `gate` stage also `stage:NAME`: the rows that the filter stage of that name, earlier in the pipeline, has kept."""
    format: Literal["auto"] | Layout = "auto"
    """Layout of the rows of all files. `auto` looks at the columns of the first row and refuses what fits more than one."""
    columns: Annotated[dict[str, str], Field(max_length=16)] = Field(default_factory=dict)
    """Names of columns where they differ from the layout's: `{"question": "query", "response": "output"}`. A dotted name
    leads into an object: `extra_info.question`."""
    system_prompt: str | None = None
    """System turn put before every conversation that has none; not for the layout `tokens`."""
    max_rows: PositiveInt | None = None
    """Read only the first rows of all files together."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens when rows cannot be used: refuse the job and list them by line, or skip, count and list them."""


# ---------------------------------------------------------------------------------------------------- SFT


class AdamWConfig(Config):
    """AdamW with warm-up, then cosine decay or a constant rate, and clipping by global norm."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """End of the cosine as a share of the peak rate; has no effect on, and must be left out of, a constant schedule."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""

    @model_validator(mode="after")
    def _ratio_needs_cosine(self) -> AdamWConfig:
        if self.schedule == "constant" and self.min_ratio != 0.0:
            raise ValueError("expected no min_ratio with schedule='constant', since it would do nothing; remove it")
        return self


def _check_warmup(optimizer: AdamWConfig, steps: int) -> None:
    if optimizer.warmup_steps >= steps:
        raise ValueError(
            f"expected optimizer.warmup_steps below the {steps} optimizer steps, got {optimizer.warmup_steps}; "
            "the peak rate would never be reached"
        )


Precision = Literal["bf16", "fp32"]


class CheckpointConfig(Config):
    """When training state is saved. The end of a stage is always saved."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints, in SFT of the optimizer, in RL iterations; none: only at the end."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints that stay; older ones are removed once newer ones are complete."""


class LoRAConfig(Config):
    """Low-rank adapters (arXiv 2106.09685): a layer W x becomes W x + alpha / rank * B A x, of which only A and B are trained.

    They want a higher learning rate than all weights do, ten times as high as a first guess.
    """

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rows of A and columns of B."""
    alpha: PositiveInt = 32
    """Scale of the adapters, divided by the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are set to zero in training."""
    target_modules: Literal["all-linear"] | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Layers that get adapters: every linear layer, or those with these names, `q_proj` in all blocks, `layers.0.mlp.up_proj`
    in one. Never the output head, nor experts that the model keeps as one tensor."""

    @model_validator(mode="after")
    def _each_module_once(self) -> LoRAConfig:
        if len(set(self.target_modules)) != len(self.target_modules) and not isinstance(self.target_modules, str):
            raise ValueError(f"expected each of target_modules once, got {', '.join(self.target_modules)}; remove the repeated")
        return self


class SFTConfig(Config):
    """Supervised fine-tuning with one of the objectives."""

    objective: Objective
    """Loss per response token."""
    data: DataConfig
    """Training rows."""
    held_out: DataConfig | None = None
    """Rows that SED calibrates tau on and that every objective is evaluated on while it trains. Default: the last 10% of
    `data` (at most 100 rows), kept out of training under every objective, so that all train on the same rows."""
    evaluate_every: PositiveInt | None = None
    """Optimizer steps between evaluations on the held-out rows; none: only after the last step."""
    optimizer: AdamWConfig = AdamWConfig()
    """Optimizer and schedule."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Passes over the training rows. Exactly one of `epochs` and `steps` is given."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps. Rows are reshuffled each time they run out."""
    batch_size: PositiveInt = 128
    """Rows per optimizer step over all ranks and micro-batches."""
    micro_batch_size: PositiveInt = 8
    """Largest number of rows in one forward pass of one rank; does not change the result."""
    pack_tokens: PositiveInt | None = None
    """Lay rows end to end in forward passes of up to this many tokens, without padding and without one row seeing another.
    Replaces `micro_batch_size`; does not change the result."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest row in tokens, prompt included."""
    on_too_long: Literal["error", "drop", "cut"] = "error"
    """What happens to a row longer than `max_length`: refuse the job and list the rows, drop them, or cut their ends off."""
    encode_processes: PositiveInt = 1
    """Processes beside the driver that turn rows into token ids before training starts; 1: the driver does it itself. Does not
    change the result."""
    precision: Precision = "bf16"
    """Arithmetic of forward and backward; optimizer state and master weights are fp32 in both cases."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, about a third more time."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters on frozen weights; checkpoints hold the merged model, and the adapters in `adapter/`. None: train
    all weights."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When training state is saved."""
    resume_from: str | None = None
    """Checkpoint of another run of the same stage (a step folder or the folder of its steps) below one of the allowed roots;
    training goes on behind its step. Refused where spec, data, tokenizer or the number of ranks differ."""
    seed: int = 42
    """Seed of row order and dropout."""

    @model_validator(mode="after")
    def _one_size_of_a_pass(self) -> SFTConfig:
        if self.pack_tokens is None:
            return self
        if self.micro_batch_size != SFTConfig.model_fields["micro_batch_size"].default:
            raise ValueError("expected either pack_tokens or micro_batch_size, got both; remove one of them")
        if self.pack_tokens < self.max_length:
            raise ValueError(
                f"expected pack_tokens of at least max_length={self.max_length}, so that every row fits, got "
                f"{self.pack_tokens}; raise it or lower max_length"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> SFTConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("expected exactly one of epochs and steps; give one of them")
        if self.steps is not None:
            _check_warmup(self.optimizer, self.steps)
        return self


# ----------------------------------------------------------------------------------------------------- RL


class SamplingConfig(Config):
    """How responses are drawn."""

    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Softmax temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; 1 turns it off."""
    max_tokens: PositiveInt = 1024
    """Longest response in tokens."""


class LedgerConfig(Config):
    """Exploration ledger: fixed prompts, sampled with fixed seeds at set intervals during RL and never trained on."""

    data: DataConfig | None = None
    """Probe prompts with their gold answers; None: the first rows of the stage's data, which it trains on as well."""
    prompts: PositiveInt = 32
    """Prompts of a probe."""
    samples: Annotated[int, Field(ge=2, le=256)] = 8
    """Responses per prompt, drawn as the stage draws its own."""
    pass_k: PositiveInt = 8
    """k of the unbiased pass@k estimate, at most `samples`."""
    every_iterations: PositiveInt = 10
    """Iterations between probes; there is one before the first and one behind the last in any case."""
    entropy_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the first probe's entropy per token that may be spent without a rise of pass@1; beyond it the event
    `exploration_spent` tells."""
    smoothing_probes: PositiveInt = 3
    """Newest probes over which pass@1 is averaged before it is compared with the first."""

    @model_validator(mode="after")
    def _enough_samples(self) -> LedgerConfig:
        if self.pass_k > self.samples:
            raise ValueError(f"expected pass_k of at most samples={self.samples}, got {self.pass_k}; lower it or draw more")
        return self


AdvantageEstimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]


class GRPOConfig(Config):
    """Group-relative policy optimisation and its kin, with clip-higher and a token-level loss; docs/rl.md has the formulas."""

    data: DataConfig
    """Prompts with their gold answers."""
    reward: RewardConfig = RewardConfig()
    """Scorer of a response."""
    iterations: PositiveInt
    """Rounds of sample, score, update, sync."""
    overlap: Overlap = SyncOverlap()
    """Whether engines sample while trainers train; docs/rl.md tells what each mode costs and gains."""
    prompts_per_iteration: PositiveInt = 256
    """Prompts drawn in one iteration."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt; their rewards are normalised within the group."""
    mini_batch_prompts: PositiveInt = 32
    """Prompts whose groups make one optimizer step."""
    micro_batch_size: PositiveInt = 8
    """Largest number of responses in one forward pass of one rank; does not change the result."""
    pack_tokens: PositiveInt | None = None
    """Lay responses with their prompts end to end in forward passes of up to this many tokens, without padding. Replaces
    `micro_batch_size`; does not change the result."""
    advantage: AdvantageEstimator = "grpo"
    """How rewards become advantages. `grpo`: normalised by mean and standard deviation of the group. `dr_grpo`: less the
    group's mean only, and the loss is divided by responses times `max_tokens` and not by their tokens. `rloo`: less the mean
    of the group's others. `reinforce_pp`: normalised over all samples of the iteration. `reinforce_pp_baseline`: less the
    group's mean, in units of the standard deviation over the iteration."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Largest ratio with which a token of negative advantage still has a gradient (arXiv 1912.09729); None: no limit."""
    tis_cap: Annotated[float, Field(ge=1)] | None = 2.0
    """Truncated importance sampling: the clipped ratio is taken against the trainer's own log-probabilities at the start of
    the iteration, and each token is weighted by min(p(trainer) / p(sampler), tis_cap). Costs a forward pass over all but the
    first mini-batch of an iteration. None: the ratio is taken against the sampler's log-probabilities, without weights."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the k3 estimate of the divergence from the starting model, per token; above 0 it costs a forward pass over all
    responses and a copy of the starting weights in host memory."""
    max_refills: Annotated[int, Field(ge=0)] | None = None
    """Dynamic sampling: groups whose rewards do not differ are dropped and replaced by other prompts, in at most this many
    further rounds of sampling; the update is over what is there then. None: all groups are kept."""
    mask_truncated: bool = False
    """Responses cut at `max_tokens` leave the loss, its denominator and the statistics of their group, as if unscored."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature; log-probabilities of sampler and trainer are taken at this temperature."""
    max_tokens: PositiveInt = 1024
    """Longest response in tokens; a response cut here counts as truncated."""
    max_prompt_tokens: PositiveInt = 1024
    """Prompts longer than this are dropped and counted."""
    optimizer: AdamWConfig = AdamWConfig(learning_rate=1e-6, schedule="constant")
    """Optimizer and schedule, counted in optimizer steps."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters and leave the model's own weights as they are; engines and checkpoints get the two merged."""
    precision: Precision = "bf16"
    """Arithmetic of forward and backward in the trainer, and of the sampler."""
    max_logprob_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean |log p(sampler) - log p(trainer)| of the probe after a weight sync; beyond it the job stops."""
    probe_prompts: PositiveInt = 8
    """Prompts of the probe that checks every weight sync."""
    readiness_prompts: Annotated[int, Field(ge=0)] = 32
    """Prompts sampled before the first update for the readiness figures; 0 skips them."""
    ledger: LedgerConfig | None = None
    """Probes of what is left to explore while the stage trains; None: no probes."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    """When training state is saved."""
    seed: int = 42
    """Seed of prompt order and sampling."""

    @model_validator(mode="after")
    def _mini_batches_fit(self) -> GRPOConfig:
        if self.prompts_per_iteration % self.mini_batch_prompts:
            raise ValueError(
                f"expected prompts_per_iteration to be a multiple of mini_batch_prompts, got {self.prompts_per_iteration} "
                f"and {self.mini_batch_prompts}; change one of them"
            )
        _check_warmup(self.optimizer, self.iterations * (self.prompts_per_iteration // self.mini_batch_prompts))
        return self

    @model_validator(mode="after")
    def _variants_fit(self) -> GRPOConfig:
        if self.advantage == "reinforce_pp" and self.max_refills is not None:
            raise ValueError(
                "expected no max_refills with advantage='reinforce_pp', since groups that do not vary teach there as well; "
                "remove it or choose 'reinforce_pp_baseline'"
            )
        if self.overlap.mode == "async" and self.max_refills is not None:
            raise ValueError(
                "expected no max_refills with overlap mode 'async', since its iterations take what is there and have no rounds "
                "to refill; remove it or choose 'one_step_off'"
            )
        if self.pack_tokens is None:
            return self
        if self.micro_batch_size != GRPOConfig.model_fields["micro_batch_size"].default:
            raise ValueError("expected either pack_tokens or micro_batch_size, got both; remove one of them")
        if self.pack_tokens < (longest := self.max_prompt_tokens + self.max_tokens):
            raise ValueError(
                f"expected pack_tokens of at least max_prompt_tokens + max_tokens = {longest}, so that all responses fit, got "
                f"{self.pack_tokens}; raise it or lower the others"
            )
        return self


class FilterConfig(Config):
    """Difficulty filter: which prompts a model neither always nor never answers right."""

    data: DataConfig
    """Prompts with their gold answers."""
    reward: RewardConfig = RewardConfig()
    """Scorer of a response."""
    samples: Annotated[int, Field(ge=2, le=256)] = 8
    """Responses per prompt."""
    low: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Smallest share of right answers among the scored responses with which a prompt is kept; the default drops all-wrong."""
    high: Annotated[float, Field(ge=0, le=1)] = 0.999
    """Largest share with which a prompt is kept; the default drops all-right."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature, nucleus and length of the responses: those of the stage that trains on the rows."""
    max_prompt_tokens: PositiveInt = 1024
    """Prompts longer than this are dropped and counted."""
    precision: Precision = "bf16"
    """Arithmetic of the sampler."""
    max_logprob_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean |log p(sampler) - log p(transformers)| of the probe after the model is loaded; beyond it the job stops."""
    seed: int = 0
    """Seed of sampling."""

    @model_validator(mode="after")
    def _keeps_something(self) -> FilterConfig:
        if self.low > self.high or (self.low, self.high) == (0.0, 1.0):
            raise ValueError(
                f"expected low to be at most high and one of them to drop something, got [{self.low}, {self.high}]; narrow or "
                "widen the band"
            )
        return self


# --------------------------------------------------------------------------------------------- evaluation


class Benchmark(Config):
    """Rows of `problem` and `answer`."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    """Name in tables and figures."""
    path: Annotated[str, Field(min_length=1)]
    """Files as a training stage names them, with the columns `problem` and `answer`."""
    max_rows: PositiveInt | None = None
    """Use only the first rows."""


class EvalConfig(Config):
    """Accuracy and diversity over the same samples."""

    benchmarks: Annotated[tuple[Benchmark, ...], Field(min_length=1)]
    """Files to evaluate on."""
    samples: Annotated[int, Field(ge=1, le=256)] = 8
    """Responses per problem (n of Avg@n)."""
    pass_k: tuple[PositiveInt, ...] = (1, 8)
    """k of the unbiased pass@k estimates, each at most `samples`."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature, nucleus and length of the responses."""
    reward: RewardConfig = RewardConfig()
    """Scorer of a response."""
    system_prompt: str | None = None
    """System turn put before every problem."""
    precision: Precision = "bf16"
    """Arithmetic of the sampler."""
    max_logprob_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean |log p(sampler) - log p(transformers)| of the probe after a model is loaded; beyond it the job stops."""
    seed: int = 0
    """Seed of sampling."""

    @model_validator(mode="after")
    def _checks(self) -> EvalConfig:
        if self.pass_k and max(self.pass_k) > self.samples:
            raise ValueError(f"expected every pass_k to be at most samples={self.samples}, got {max(self.pass_k)}")
        names = [b.name for b in self.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError(f"expected benchmark names to differ, got {names}")
        return self
