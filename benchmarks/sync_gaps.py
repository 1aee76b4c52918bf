"""Gap between sampler and trainer after each weight sync, while training moves the weights in between.

    python benchmarks/sync_gaps.py [--syncs 50 --transport files]

For fp32 and bf16, with tied and untied embeddings: a random Llama of 0.2M parameters, one DeepSpeed rank (ZeRO 2) that takes an
optimizer step on random responses before every sync, and one vLLM engine. The gap is |log p(sampler) - log p(trainer)| over
the probe of 8 prompts x 16 tokens that ends every sync; beside it stands how far the step moved the log-probabilities of fixed
tokens, which is the gap that an engine would show whose weights had stayed.

Prints a table; writes sync_gaps.json beside this file and docs/sync_gaps.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from jinja2 import Environment, FileSystemLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sedsft.config import AdamWConfig, DataConfig, GRPOConfig, Precision
from sedsft.records import PolicyRow, Prompt
from sedsft.tasks.tiny_model import countdown_tokenizer
from services import charts
from services.actor_group import ActorGroup
from services.checkpoints import installed_versions
from services.jobspec import ModelRef, RLStage, RolloutResources, SyncSettings, TrainerResources
from services.loops.policy_update import trainer_log_probs
from services.loops.ranks import start_ranks, trainer_actors
from services.loops.syncing import policy_sync
from services.placement import actor_groups
from services.rollout.fleet import RolloutFleet, rollout_spec
from services.training.messages import PolicySetup
from services.training.policy_worker import PolicyWorker

ROOT = Path(__file__).resolve().parents[1]
BOUND: float = GRPOConfig.model_fields["max_logprob_gap"].default
CASES: tuple[tuple[Precision, bool], ...] = (("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False))
TIMEOUT_S = 300.0
LEGEND_HEIGHT = 18
RESPONSES, TOKENS = 16, 16


@dataclass
class Sync:
    """One sync: gaps in nats, seconds of export, load and probe together."""

    mean: float
    largest: float
    moved: float
    """Mean |log p - log p before the step| of the trainer, over fixed tokens."""
    seconds: float


def save_model(folder: Path, precision: Precision, *, tied: bool) -> Path:
    """A random model whose next-token distributions differ, with the demo's tokenizer."""
    torch.manual_seed(0)
    tokenizer = countdown_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stage_of(model: Path, precision: Precision, options: argparse.Namespace) -> RLStage:
    """A stage whose trainers and engines these are."""
    grpo = GRPOConfig(
        data=DataConfig(path="unused.jsonl"),
        iterations=1,
        optimizer=AdamWConfig(learning_rate=options.learning_rate, schedule="constant"),
        max_tokens=TOKENS,
        precision=precision,
    )
    sync = SyncSettings(transport=options.transport)
    engines = RolloutResources(workers=1, max_model_len=256, max_num_seqs=64, sync=sync)
    return RLStage(model=ModelRef(path=str(model)), grpo=grpo, trainer=TrainerResources(), rollout=engines)


def train(trainers: ActorGroup, rng: np.random.Generator, vocabulary: int) -> None:
    """An optimizer step on random responses with random advantages."""
    rows = [
        PolicyRow(
            rng.integers(4, vocabulary, 8, dtype=np.int32),
            rng.integers(4, vocabulary, TOKENS, dtype=np.int32),
            np.full(TOKENS, -4, np.float32),
            float(rng.normal()),
        )
        for _ in range(RESPONSES)
    ]
    trainers.scatter("update", [(rows, RESPONSES * TOKENS, 1)], timeout_s=TIMEOUT_S)


def run_case(folder: Path, precision: Precision, tied: bool, options: argparse.Namespace) -> list[Sync]:
    """All syncs of one model."""
    stage = stage_of(save_model(folder / "model", precision, tied=tied), precision, options)
    rng = np.random.default_rng(0)
    vocabulary = len(countdown_tokenizer())
    prompts = [Prompt(tuple(map(int, rng.integers(4, vocabulary, 8))), "", "", line) for line in range(8)]
    fixed = [(prompt.prompt_ids, tuple(map(int, rng.integers(4, vocabulary, TOKENS)))) for prompt in prompts]
    specs = [trainer_actors(stage.trainer, PolicyWorker), rollout_spec(stage.rollout)]
    with actor_groups(specs, f"gaps-{precision}-{tied}") as [trainers, engines]:
        fleet = RolloutFleet(engines, stage.rollout)
        fleet.start(str(stage.model.path), precision)
        start_ranks(
            trainers,
            stage.trainer,
            lambda ranks: PolicySetup(ranks, str(stage.model.path), stage.grpo, stage.trainer.zero_stage, options.syncs),
        )
        fleet.ready(timeout_s=TIMEOUT_S)
        sync = policy_sync(stage, folder, fleet, trainers, prompts)
        before = np.concatenate(trainer_log_probs(trainers, fixed))
        found = []
        for number in range(1, options.syncs + 1):
            train(trainers, rng, vocabulary)
            began = time.monotonic()
            report = sync.push(number)
            seconds = time.monotonic() - began
            now = np.concatenate(trainer_log_probs(trainers, fixed))
            found.append(Sync(report.mean_gap, report.max_gap, float(np.abs(now - before).mean()), seconds))
            before = now
        fleet.close()
    return found


def named(precision: str, tied: bool) -> str:
    """What a case is called."""
    return f"{precision}, {'tied' if tied else 'untied'}"


def table(syncs: dict[str, list[Sync]]) -> str:
    """One row a case: the worst of its syncs."""
    head = (
        "| weights | worst mean gap | median | largest of a token | moved by a step, least / median | s a sync |\n"
        "|---|---|---|---|---|---|\n"
    )
    rows = []
    for name, found in syncs.items():
        mean, moved = [sync.mean for sync in found], [sync.moved for sync in found]
        rows.append(
            f"| {name} | {max(mean):.2g} | {np.median(mean):.2g} | {max(sync.largest for sync in found):.2g} | "
            f"{min(moved):.2g} / {np.median(moved):.2g} | {np.median([sync.seconds for sync in found]):.2f} |"
        )
    return head + "\n".join(rows) + "\n"


def drawn(syncs: dict[str, list[Sync]]) -> str:
    """A picture that stands alone, drawn as the report draws its charts; powers of ten, since rounding differs by so many."""
    steps = range(1, len(next(iter(syncs.values()))) + 1)
    levels = {name: [float(np.log10(max(sync.mean, 1e-9))) for sync in found] for name, found in syncs.items()}
    levels[f"bound {BOUND}"] = [float(np.log10(BOUND))] * len(steps)
    series = {name: list(zip(steps, values, strict=True)) for name, values in levels.items()}
    chart = charts.line_chart("Mean gap after each sync", "", series, x_label="sync")
    assert chart is not None
    environment = Environment(loader=FileSystemLoader(Path(charts.__file__).parent), autoescape=True)
    figure = str(environment.get_template("chart.html.jinja").module.chart(chart))  # type: ignore[attr-defined]
    [body] = re.findall(r"<svg[^>]*>(.*)</svg>", figure, flags=re.DOTALL)
    top, height = -LEGEND_HEIGHT, charts.HEIGHT + LEGEND_HEIGHT
    legend = "".join(
        f'<text x="{charts.LEFT + 62 * index}" y="{top + 12}" style="fill:{line.colour}">{line.name}</text>'
        for index, line in enumerate(chart.lines)
    )
    axis = f'<text x="2" y="{charts.TOP}" style="font-size: 8px">log10 nats</text>'
    style = "<style>text { font: 10px sans-serif; fill: #57606a; }</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {charts.WIDTH} {height}" role="img" '
        f'aria-label="Mean gap of log-probabilities after each weight sync">{style}'
        f'<rect y="{top}" width="{charts.WIDTH}" height="{height}" fill="#fff"/>{legend}{axis}{body}</svg>\n'
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=50)
    parser.add_argument("--transport", choices=("files", "gloo"), default="files")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    # Actors import the package from where this file lies.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    syncs: dict[str, list[Sync]] = {}
    with tempfile.TemporaryDirectory(prefix="sg-") as folder:
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        for precision, tied in CASES:
            name = named(precision, tied)
            syncs[name] = run_case(Path(folder) / f"{precision}-{tied}", precision, tied, options)
            worst = max(syncs[name], key=lambda sync: sync.mean)
            print(f"{name:13} worst of {len(syncs[name])} syncs: {asdict(worst)}", file=sys.stderr)
        ray.shutdown()
    print(table(syncs))
    report: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": installed_versions(),
        "transport": options.transport,
        "learning_rate": options.learning_rate,
        "bound": BOUND,
        "cases": {name: [asdict(sync) for sync in found] for name, found in syncs.items()},
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.out == Path(__file__).with_suffix(".json"):
        (ROOT / "docs" / "sync_gaps.svg").write_text(drawn(syncs), encoding="utf-8")


if __name__ == "__main__":
    main()
