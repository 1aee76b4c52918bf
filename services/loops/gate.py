"""The readiness gate: every candidate answers the same prompts, the best that reaches all thresholds goes on to later stages.

stages/<stage>/gate.json      what was probed under which settings, figures and verdict of each candidate, the winner
stages/<stage>/table.json     the figures for the API
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.evaluation.gate import FIGURES, Candidate, best, judged, thresholds
from sedsft.evaluation.metrics import readiness
from sedsft.gate_config import GateConfig
from sedsft.records import Prompt, Row
from services.actor_group import ActorSpec
from services.checkpoints import tokenizer_sha256, weights_sha256
from services.errors import DataError, GateFailed
from services.jobspec import REFERENCE_CPUS, GateStage
from services.loops.engines import EngineRequest, Engines
from services.loops.evaluate import PROBE_PROMPTS, load_model
from services.placement import actor_groups
from services.reward_check import read_matchable_prompts
from services.run import Run, write_json
from services.rundir import attempts_of, write_atomically
from services.training.reference_worker import ReferenceWorker

GATE = "gate.json"


def run_gate(run: Run, stage: GateStage, folder: Path, engines: Engines) -> None:
    """Probe the candidates of `stage`, write what came out and promote the winner.

    What an earlier attempt of the job has decided about the same weights is taken over.

    Raises:
        GateFailed: no candidate reaches all thresholds; says for each what is missing and what to do.
        JobError: bad rows or model, a dead worker, too many unscored samples, an engine that is not the model in the files.
    """
    paths = {ref.label: run.model_path(ref) for ref in stage.candidates}
    probed = {name: {"weights": weights_sha256(path), "tokenizer": tokenizer_sha256(path)} for name, path in paths.items()}
    identity = {"gate": stage.gate.model_dump(mode="json"), "sha256": probed}
    winner = _taken_over(run, stage.name, folder, identity)
    if winner is None:
        candidates = _probe(run, stage, folder, engines, paths)
        chosen = best(candidates, stage.gate.rank_by)
        _write(folder, stage.gate, identity, candidates, chosen)
        if chosen is None:
            missed = "; ".join(f"{candidate.name}: {candidate.missed}" for candidate in candidates)
            raise GateFailed(f"expected a candidate that RL can start from, none reaches the thresholds. {missed}")
        winner = chosen.name
    run.promoted(stage.name, winner, paths[winner])


def _probe(run: Run, stage: GateStage, folder: Path, engines: Engines, paths: Mapping[str, Path]) -> list[Candidate]:
    """All candidates, one after the other, on the same rows."""
    config = stage.gate
    run.phase("data")
    rows = _drawn(read_matchable_prompts(run.data(config.data), config.reward).rows, config)
    run.phase("loading", 0, len(paths))
    # Before the reference is reserved, so that engines of another shape make room first.
    engines.start(_request(stage, next(iter(paths.values()))))
    candidates = []
    with actor_groups([ActorSpec("reference", ReferenceWorker, 1, REFERENCE_CPUS)], run.job_id) as [reference]:
        for step, (name, path) in enumerate(paths.items(), start=1):
            run.phase("loading", step - 1, len(paths))
            prompts = _encoded(run, rows, path, config)
            engines.start(_request(stage, path))
            load_model(run, config, folder, engines, reference, path, prompts[:PROBE_PROMPTS])
            run.phase("probe", step, len(paths))
            groups = engines.sample(prompts, config.group_size, config.sampling, config.seed)
            figures = readiness(engines.score(groups, config.reward.max_error_share))
            candidates.append(judged(name, figures, config))
            _tell(run, step, candidates[-1])
    return candidates


def _request(stage: GateStage, path: Path) -> EngineRequest:
    return EngineRequest(path, stage.gate.precision, stage.rollout, stage.scorer, stage.gate.reward)


def _tell(run: Run, step: int, candidate: Candidate) -> None:
    figures = candidate.figures
    run.metrics(step, {figure: float(value) for figure, value in figures.items() if isinstance(value, int | float)})
    if candidate.misses:
        run.event("candidate_dropped", f"{candidate.name}: {candidate.missed}", candidate=candidate.name, **figures)
    else:
        shown = ", ".join(f"{label} {figures[label]:.3g}" for label, _ in FIGURES.values() if figures[label] is not None)
        run.event("candidate_ready", f"{candidate.name} misses no threshold: {shown}", candidate=candidate.name, **figures)


def _drawn(rows: Sequence[Row], config: GateConfig) -> list[Row]:
    """As many rows as the probe takes, in the order of the data; not the first ones, since files may be sorted."""
    chosen = random.Random(config.seed).sample(range(len(rows)), min(config.prompts, len(rows)))
    return [rows[index] for index in sorted(chosen)]


def _encoded(run: Run, rows: Sequence[Row], path: Path, config: GateConfig) -> Sequence[Prompt]:
    encoded = encode_prompts(rows, load_tokenizer(path), config.max_prompt_tokens)
    if encoded.dropped:
        run.event("rows_dropped", f"{len(encoded.dropped)} prompts are too long", lines=list(encoded.dropped))
    if not encoded.prompts:
        raise DataError(
            f"expected prompts of at most {config.max_prompt_tokens} tokens, all {len(rows)} of the probe are longer; raise "
            "gate.max_prompt_tokens or choose other data"
        )
    return encoded.prompts


def _write(
    folder: Path, config: GateConfig, identity: dict[str, Any], candidates: Sequence[Candidate], winner: Candidate | None
) -> None:
    rows = [
        {"candidate": candidate.name, "passed": not candidate.misses, "promoted": candidate is winner, **candidate.figures}
        for candidate in candidates
    ]
    write_json(folder / "table.json", {"columns": list(rows[0]), "rows": rows})
    verdict = {
        "identity": identity,
        "thresholds": {FIGURES[figure][0]: threshold for figure, threshold in thresholds(config).items()},
        "rank_by": config.rank_by,
        "candidates": [asdict(candidate) for candidate in candidates],
        "winner": winner and winner.name,
    }
    # Complete or not there at all: a later attempt takes it over.
    write_atomically(folder / GATE, json.dumps(verdict, indent=1, allow_nan=False))


def _taken_over(run: Run, stage: str, folder: Path, identity: dict[str, Any]) -> str | None:
    """The winner by the newest attempt that has decided about the same weights under the same settings."""
    for attempt in reversed(attempts_of(run.folder)):
        left = attempt / "stages" / stage
        if not (left / GATE).exists():
            continue
        decided = json.loads((left / GATE).read_text(encoding="utf-8"))
        if decided["winner"] is None or decided["identity"] != identity:
            continue
        if left != folder:
            for name in ("table.json", GATE):
                shutil.copyfile(left / name, folder / name)
        run.event("gate_taken_over", f"decision of {left} taken over", path=str(left))
        winner: str = decided["winner"]
        return winner
    return None
