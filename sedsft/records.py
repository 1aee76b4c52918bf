"""Plain records that travel between processes: picklable, without tensors, safe to build anywhere.

Legend of shape suffixes used across the library: B rows, T positions of a row, N response tokens of a batch (flat),
V vocabulary, H hidden width, P prompts, G samples per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation of a data file, before tokenization.

    `messages` are chat turns with the keys `role` and `content`; for RL rows the last turn is the user's and `answer` is
    the gold; for SFT rows at least one turn is the assistant's. `line` is the 1-based line (JSONL) or row number.
    """

    messages: tuple[dict[str, str], ...]
    answer: str | None
    line: int
    file: str = ""
    """Name of the row's file where there are several."""
    data_source: str = ""
    """What a verl file says the row is from; chooses the scorer where the reward asks for that."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A tokenized conversation. `trained_T[t]` tells whether token t is the assistant's and so carries a loss."""

    input_ids_T: npt.NDArray[np.int32]
    trained_T: npt.NDArray[np.bool_]
    line: int
    file: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyRow:
    """One scored response as the policy trainer reads it: R response tokens with one advantage for all of them."""

    prompt_ids_T: npt.NDArray[np.int32]
    response_ids_R: npt.NDArray[np.int32]
    sampler_log_probs_R: npt.NDArray[np.float32]
    advantage: float
    old_log_probs_R: npt.NDArray[np.float32] | None = None
    """Under the trainer's weights at the start of the iteration; None where they are the current ones, or not asked for."""
    reference_log_probs_R: npt.NDArray[np.float32] | None = None
    """Under the starting model of the stage; None without a divergence from it in the loss."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt with the gold answer that its responses are scored against."""

    prompt_ids: tuple[int, ...]
    text: str
    answer: str
    line: int
    data_source: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response drawn by a rollout worker. Token ids are the truth; `text` is their decoding."""

    response_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """Log-probability of each response token under the sampler, at the sampling temperature."""
    text: str
    truncated: bool
    """True when the token limit, not an end token, ended the response."""
    weight_version: int
    """Version of the weights that drew it."""
    timed_out: bool = False
    """True when the wall time, not the sampler, ended the response; it then counts as truncated too."""


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """What a scorer is told of one response."""

    gold: str
    response: str
    response_tokens: int = 0
    data_source: str = ""


ScoreStatus = Literal["scored", "timeout", "crashed", "invalid"]


@dataclass(frozen=True, slots=True)
class Score:
    """Verdict on one sample. `reward` means something only when `status` is "scored"; an error is never a 0.

    `timeout`: killed after its wall time. `crashed`: the process died (memory limit included). `invalid`: the scorer
    raised or returned something that is not a finite number.
    """

    reward: float
    status: ScoreStatus
    extracted: str | None = None
    """The answer read from the response, in a form that equal answers share; None when there is none."""
    detail: str = ""
    correct: bool | None = None
    """Whether the answer is right; None where the reward alone tells."""
    parts: dict[str, float] = field(default_factory=dict)
    """Reward of each component by its type, before its weight."""
    seconds: float = 0.0
    """Time that the scoring took."""

    @property
    def right(self) -> bool:
        """Whether the answer counts as right in accuracies: a bonus for its form does not make a wrong answer right."""
        return self.reward > 0 if self.correct is None else self.correct


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All samples of one prompt with their scores, in the same order."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    scores: tuple[Score, ...] = field(default=())
    seed: int = 0
    """Seed that the first sample was drawn with; sample g was drawn with this plus g."""
