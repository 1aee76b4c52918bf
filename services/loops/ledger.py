"""The exploration ledger: fixed prompts with fixed seeds, sampled between the iterations of an RL stage, never trained on.

stages/<stage>/ledger.jsonl   a line per probe: iteration, versions of the weights that answered, and the figures
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sedsft.config import GRPOConfig, LedgerConfig, SamplingConfig
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.evaluation.ledger import exploration_spent
from sedsft.evaluation.metrics import summarise
from sedsft.records import Prompt
from services.errors import DataError
from services.loops.engines import Engines
from services.reward_check import read_matchable_prompts
from services.run import Run
from services.rundir import attempts_of, read_lines, write_atomically

LEDGER = "ledger.jsonl"
SPENT = "exploration_spent"


class Ledger:
    """Probes of one RL stage. What was probed before, by an earlier attempt too, is kept and not probed again."""

    def __init__(self, run: Run, config: GRPOConfig, folder: Path, engines: Engines, prompts: Sequence[Prompt]) -> None:
        """`prompts` are those of `config.ledger`, see `ledger_prompts`; `folder` is the stage's."""
        self._run, self._config, self._engines, self._prompts = run, config, engines, prompts
        self._path = folder / LEDGER
        self._entries: dict[int, dict[str, Any]] = {}
        for attempt in attempts_of(run.folder):
            for entry, _ in read_lines(attempt / "stages" / folder.name / LEDGER):
                self._entries[entry["iteration"]] = entry
        if self._entries:
            self._write()

    def due(self, iteration: int) -> bool:
        """Whether the weights behind `iteration`, 0 for those before the first, are still to be probed."""
        config = self._config.ledger
        if config is None or iteration in self._entries:
            return False
        return iteration % config.every_iterations == 0 or iteration == self._config.iterations

    def probe(self, iteration: int) -> None:
        """Sample and note it if `iteration` is due; the engines hold the weights behind it.

        Raises:
            RewardFailure: too many samples could not be scored.
        """
        config = self._config.ledger
        if config is None or not self.due(iteration):
            return
        self._run.phase("ledger", iteration, self._config.iterations)
        sampling = SamplingConfig(temperature=self._config.temperature, max_tokens=self._config.max_tokens)
        drawn = self._engines.sample(self._prompts, config.samples, sampling, ledger_seed(self._config.seed))
        groups = self._engines.score(drawn, self._config.reward.max_error_share)
        figures = summarise(groups, (1, config.pass_k))
        shown = ("pass@1", f"pass@{config.pass_k}", "token_entropy", "distinct_answers")
        versions = sorted({sample.weight_version for group in groups for sample in group.samples})
        kept = {name: figures[name] for name in ("prompts", "samples", "scored", *shown)}
        self._entries[iteration] = {"iteration": iteration, "weight_versions": versions} | kept
        self._write()
        numbers = {f"ledger_{name}": value for name in shown if isinstance(value := figures[name], int | float)}
        self._run.metrics(iteration, numbers)
        self._warn(config, iteration)

    def _write(self) -> None:
        lines = [json.dumps(self._entries[iteration], allow_nan=False) + "\n" for iteration in sorted(self._entries)]
        write_atomically(self._path, "".join(lines))

    def _warn(self, config: LedgerConfig, iteration: int) -> None:
        """Tell when exploration is spent by this probe and was not by the one before."""
        known = [self._entries[number] for number in sorted(self._entries) if number <= iteration]
        if not _spent(known, config) or _spent(known[:-1], config):
            return
        first, last = known[0], known[-1]
        self._run.event(
            SPENT,
            f"iteration {iteration}: entropy per token fell from {first['token_entropy']:.3g} to {last['token_entropy']:.3g} "
            f"and pass@1 did not rise (first {first['pass@1']:.3g}, now {last['pass@1']:.3g}); lower the learning rate, raise "
            "clip_high, add kl_weight, take other prompts, or start from a more diverse checkpoint",
            iteration=iteration,
            entropies=[entry["token_entropy"] for entry in known],
            pass_1=[entry["pass@1"] for entry in known],
        )


def _spent(entries: Sequence[Mapping[str, Any]], config: LedgerConfig) -> bool:
    # A probe of empty responses has no entropy.
    measured = [entry for entry in entries if entry["token_entropy"] is not None]
    entropies, pass_1s = [entry["token_entropy"] for entry in measured], [entry["pass@1"] for entry in measured]
    return exploration_spent(entropies, pass_1s, config.entropy_share, config.smoothing_probes)


def ledger_seed(seed: int) -> int:
    """Seed of all probes of a stage: equal weights give equal samples, and none are those of an iteration."""
    return int.from_bytes(hashlib.blake2b(f"ledger:{seed}".encode(), digest_size=8).digest(), "big")


def ledger_prompts(run: Run, config: GRPOConfig, model_path: Path, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Prompts of the probes: the first of their own data, or of `prompts`, the stage's.

    Raises:
        DataError: no prompt is short enough.
    """
    ledger = config.ledger
    if ledger is None or ledger.data is None:
        return prompts[: ledger.prompts] if ledger is not None else ()
    rows = read_matchable_prompts(run.data(ledger.data), config.reward).rows[: ledger.prompts]
    encoded = encode_prompts(rows, load_tokenizer(model_path), config.max_prompt_tokens)
    if encoded.dropped:
        run.event("rows_dropped", f"{len(encoded.dropped)} prompts of the ledger are too long", lines=list(encoded.dropped))
    if not encoded.prompts:
        raise DataError(
            f"expected prompts of at most {config.max_prompt_tokens} tokens in {ledger.data.path}, all are longer; raise "
            "max_prompt_tokens or give other data for the ledger"
        )
    return encoded.prompts
