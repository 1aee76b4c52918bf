"""Settings of rewards. Imports nothing heavier than pydantic; other modules take `RewardConfig` from `sedsft.config`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sedsft.config_base import Config

ScorerName = Literal["math", "math_strict", "math_qwen", "gsm8k", "countdown"]


class AnswerReward(Config):
    """1 for a right answer."""

    type: Literal["answer"] = "answer"
    weight: float = 1.0
    """Factor in the sum of components."""
    scorer: ScorerName = "math"
    """How answers are compared: `RewardConfig.name` says what each does."""
    by_data_source: bool = False
    """Choose the scorer by the row's `data_source`, as verl files have it. Unknown sources take `scorer` and are counted."""
    data_sources: Annotated[dict[str, ScorerName], Field(max_length=64)] = Field(default_factory=dict)
    """Scorers of data sources beside or instead of those known; a name that ends in `*` stands for all that begin so."""
    wrong: Annotated[float, Field(ge=-1, lt=1)] = 0.0
    """Reward of a wrong or missing answer; -1 is what the authors of SED-SFT use."""

    @model_validator(mode="after")
    def _sources_in_use(self) -> AnswerReward:
        if self.data_sources and not self.by_data_source:
            raise ValueError("expected no data_sources without by_data_source=true, since they would do nothing")
        return self


class FormatReward(Config):
    """1 for a response of the right form, whatever its answer."""

    type: Literal["format"] = "format"
    weight: float = 0.1
    """Factor in the sum of components."""
    form: Literal["box", "think_box"] = "box"
    """`box`: exactly one closed box. `think_box`: one `<think>...</think>` at the start, one closed box behind it."""


class LengthReward(Config):
    """Favours short responses: 1 up to `full_tokens`, then linearly down to 0 at `zero_tokens`."""

    type: Literal["length"] = "length"
    weight: float = 0.1
    """Factor in the sum of components."""
    full_tokens: Annotated[int, Field(ge=0)]
    """Longest response that gets 1."""
    zero_tokens: PositiveInt
    """Length from which on a response gets 0."""

    @model_validator(mode="after")
    def _falls(self) -> LengthReward:
        if self.full_tokens >= self.zero_tokens:
            raise ValueError(f"expected full_tokens below zero_tokens={self.zero_tokens}, got {self.full_tokens}")
        return self


class OverlongPenalty(Config):
    """DAPO's soft penalty of overlong responses (arXiv 2503.14476): 0, then linearly down to -1 over the last tokens."""

    type: Literal["overlong"] = "overlong"
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Factor in the sum of components."""
    max_tokens: PositiveInt
    """Length at which the penalty reaches -1."""
    buffer_tokens: PositiveInt
    """Tokens before `max_tokens` over which it falls."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> OverlongPenalty:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(f"expected buffer_tokens of at most max_tokens={self.max_tokens}, got {self.buffer_tokens}")
        return self


class RemoteReward(Config):
    """The number that an HTTP service answers with, where the operator allows its address.

    It gets a POST of `{"gold", "response", "response_tokens", "data_source"}` for each response and answers with status 200
    and `{"reward": <finite number>}`. Redirects are not followed. An attempt that fails (no connection, time-out, status 429
    or 5xx) is repeated; other answers are errors of the sample.
    """

    type: Literal["remote"] = "remote"
    weight: float = 1.0
    """Factor in the sum of components."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+(/[^\s#@]*)?$", max_length=2048)]
    """Where to ask, without user name or password."""
    timeout_s: Annotated[float, Field(gt=0, le=30)] = 2.0
    """Longest wait for one attempt."""
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    """Attempts after the first, each after a pause that doubles from `retry_pause_s`."""
    retry_pause_s: Annotated[float, Field(ge=0, le=10)] = 0.1
    """Pause before the first repeated attempt."""
    breaker_failures: PositiveInt = 5
    """Responses in a row that could not be scored after which a scoring process asks no more, until `breaker_pause_s` is over;
    then one response decides whether it asks again."""
    breaker_pause_s: Annotated[float, Field(gt=0)] = 30.0
    """How long it does not ask."""

    @property
    def longest_s(self) -> float:
        """Seconds that all attempts at one response can take."""
        pauses: float = self.retry_pause_s * (2**self.retries - 1)
        return self.timeout_s * (1 + self.retries) + pauses


class CodeReward(Config):
    """The number that a Python function of the user's own returns, where the operator allows it (`SEDSFT_ALLOW_REWARD_CODE`).

    It is called as `function(response, gold, data_source, response_tokens)` in a process of its own, without network, files to
    write, other processes or environment; docs/rewards.md says what it can use. What it raises is an error of the sample.
    """

    type: Literal["code"] = "code"
    weight: float = 1.0
    """Factor in the sum of components."""
    path: Annotated[str, Field(pattern=r"\.py$", max_length=4096)]
    """A Python file below one of the service's allowed roots; it may import what is installed, not its neighbours."""
    function: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)] = "score"
    """Name of the function in it."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Hash of the file, noted when the job is submitted; other content is refused from then on."""


RewardComponent = Annotated[
    AnswerReward | FormatReward | LengthReward | OverlongPenalty | RemoteReward | CodeReward, Field(discriminator="type")
]


class RewardConfig(Config):
    """How a response is scored, in child processes that can be killed: by one scorer, or by a weighted sum of components."""

    name: ScorerName = "math"
    """Short for one component `answer` with this scorer. `math` compares the last boxed answer with the gold; `math_strict`
    wants the same characters, as the authors' RL runs do; `math_qwen` follows the conventions of Qwen2.5-Math's evaluation;
    `gsm8k` reads the number behind the last `####`; `countdown` checks every step of a derivation."""
    components: tuple[RewardComponent, ...] = ()
    """Instead of `name`: what is summed, each type at most once. An error in one leaves the sample without a reward."""
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0
    """Wall time after which one scoring is killed; the sample gets the status `timeout` and leaves the loss."""
    memory_mb: Annotated[int, Field(ge=256)] = 2048
    """Address-space limit of a scoring process in MiB."""
    max_error_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The job stops when more than this share of an iteration's samples has a status other than scored."""

    @property
    def summed(self) -> tuple[RewardComponent, ...]:
        """The components, also where the short form names one."""
        return self.components or (AnswerReward(scorer=self.name),)

    @property
    def answer(self) -> AnswerReward | None:
        """The component that reads answers, if any."""
        return next((component for component in self.summed if isinstance(component, AnswerReward)), None)

    @model_validator(mode="after")
    def _components_fit(self) -> RewardConfig:
        if self.components and self.name != RewardConfig.model_fields["name"].default:
            raise ValueError("expected either name or components, got both; put the scorer's name into the component `answer`")
        types = [component.type for component in self.components]
        if len(set(types)) != len(types):
            raise ValueError(f"expected each type of component at most once, got {', '.join(types)}")
        for component in self.components:
            if isinstance(component, RemoteReward) and component.longest_s >= self.timeout_s:
                raise ValueError(
                    f"expected timeout_s above the {component.longest_s:g} s that all attempts of the remote component may "
                    f"take, got {self.timeout_s:g}; raise it, or lower its timeout_s or retries"
                )
        return self
