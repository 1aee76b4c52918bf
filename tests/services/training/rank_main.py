"""One trainer rank as a process of its own: runs the cases of a plan and writes what it saw.

    python rank_main.py <folder with plan.json> <rank>

The plan: {"port", "world_size", "cases": [a `Case` as a dictionary, ...]}. Each case leaves <name>.rank<r>.json; rank 0 adds
<name>.safetensors (reduced gradients of the first step) and the exported model folder <name>/.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from sedsft.config import AdamWConfig, DataConfig, GRPOConfig, LoRAConfig, SEDObjective, SFTConfig
from sedsft.data.batching import MicroBatch
from sedsft.data.order import RowOrder
from sedsft.grpo import loss_denominator
from sedsft.head import linear_objective_loss
from sedsft.records import Example, PolicyRow
from services.checkpoints import FileRecord
from services.errors import TrainingDiverged
from services.training.messages import PolicySetup, SFTSetup
from services.training.policy_worker import PolicyWorker
from services.training.ranks import RankSetup
from services.training.sft_worker import SFTWorker

TAU = 0.7
OPTIMIZER = AdamWConfig(learning_rate=1e-3, weight_decay=0.1, warmup_steps=1, grad_clip=0.5)
TEMPERATURE = 0.8
EXPORT_BUCKET_BYTES = 40_000


@dataclass(frozen=True)
class Case:
    """What to run."""

    name: str
    model: str
    kind: str = "sft"
    zero_stage: int = 0
    precision: str = "fp32"
    micro_batch_size: int = 8
    pack_tokens: int | None = None
    steps: int = 3
    rows: int = 7
    gradient_checkpointing: bool = False
    lora: dict[str, Any] | None = None
    grpo: dict[str, Any] = field(default_factory=dict)
    """Settings of the policy loss."""
    filled: bool = True
    """Policy rows carry the log-probabilities of p_old and, with a divergence, of the reference."""


def examples(count: int) -> list[Example]:
    """Rows of 3 to 12 random tokens whose second half carries a loss."""
    rng = np.random.default_rng(count)
    lengths = rng.integers(3, 13, count)
    return [
        Example(rng.integers(1, 72, n, dtype=np.int32), np.arange(n) >= n // 2, line)
        for line, n in enumerate(map(int, lengths))
    ]


def policy_rows(count: int) -> list[PolicyRow]:
    """The same tokens as prompts and responses, with made-up sampler log-probabilities and advantages of both signs."""
    rng = np.random.default_rng(1)
    rows = []
    for example in examples(count):
        response = example.input_ids_T[example.trained_T]
        log_probs = rng.uniform(-6, -0.5, len(response)).astype(np.float32)
        rows.append(PolicyRow(example.input_ids_T[~example.trained_T], response, log_probs, float(rng.normal())))
    return rows


def start_sft(case: Case, ranks: RankSetup) -> SFTWorker:
    config = SFTConfig(
        objective=SEDObjective(tau=TAU),
        data=DataConfig(path="unused.jsonl"),
        optimizer=OPTIMIZER,
        steps=case.steps,
        micro_batch_size=case.micro_batch_size,
        pack_tokens=case.pack_tokens,
        max_length=12,
        precision=case.precision,
        gradient_checkpointing=case.gradient_checkpointing,
        lora=None if case.lora is None else LoRAConfig(**case.lora),
    )
    worker = SFTWorker(ranks.rank)
    worker.setup(SFTSetup(ranks, case.model, config, case.zero_stage, case.steps))
    return worker


def save(worker: SFTWorker, folder: Path) -> list[FileRecord]:
    worker.begin_save(folder)
    files = worker.saved(wait=True)
    assert files is not None
    return files


def run_sft(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    worker = start_sft(case, ranks)
    rows = examples(case.rows)
    denominator = int(sum(e.trained_T.sum() for e in rows))
    shard = rows[ranks.rank :: ranks.world_size]
    record: dict[str, Any] = {"masses": worker.mass_sketch(shard, 2).to_json(), "steps": []}
    for step in range(1, case.steps + 1):
        record["steps"].append(worker.train_step(shard, denominator, TAU, step)[0])
    inspected = worker.inspect(shard, TAU, 2)
    record["inspected"] = [(row.probability, row.active) for row in inspected]
    record["files"] = [file.name for file in save(worker, folder / case.name)]
    return record


def save_gradients(worker: SFTWorker | PolicyWorker, ranks: RankSetup, path: Path) -> None:
    # Reading a gradient is a collective under ZeRO, so every rank reads all of them.
    trained = {name: p for name, p in worker._engine._model.named_parameters() if p.requires_grad}
    gradients = {name: safe_get_full_grad(p).float().clone() for name, p in trained.items()}
    if ranks.rank == 0:
        save_file(gradients, path)


def run_gradients(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    """Reduced gradients of one pass, before any clipping."""
    worker = start_sft(case, ranks)
    rows = examples(case.rows)
    denominator = int(sum(e.trained_T.sum() for e in rows))

    def loss(hidden_NH: Any, head: Any, batch: MicroBatch) -> Any:
        output = linear_objective_loss(
            hidden_NH, head.weight_VH, batch.labels_N, SEDObjective(tau=TAU), denominator=denominator, **head.options
        )
        return output.loss, {"loss": output.loss_N.sum()}

    batches = worker._batches(rows[ranks.rank :: ranks.world_size])
    record = worker._engine.backward(batches, MicroBatch.empty(), loss)
    save_gradients(worker, ranks, folder / f"{case.name}.safetensors")
    return {**record, "micro_batches": len(batches)}


def run_resume(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    """Train through, saving behind every step; then go on from each of them with an engine of its own, to the same end.

    Every fourth is gone on from for all the steps left, the others for one: the state behind it is where the next one began.
    """
    order = RowOrder(case.rows, 2, seed=1, epochs=3)
    rows = examples(case.rows)
    case = replace(case, steps=order.num_steps)

    def train(worker: SFTWorker, done: int, end: int) -> None:
        for step in range(done + 1, end + 1):
            batch = [rows[index] for index in order.batch(step - 1)]
            denominator = int(sum(example.trained_T[1:].sum() for example in batch))
            worker.train_step(batch[ranks.rank :: ranks.world_size], denominator, TAU, step)
            if done == 0:
                save(worker, folder / case.name / str(step))

    train(start_sft(case, ranks), 0, case.steps)
    compared = []
    for done in range(1, case.steps + 1):
        worker = start_sft(case, ranks)
        random.seed(done)
        np.random.seed(done)
        worker.resume(folder / case.name / str(done))
        save(worker, folder / case.name / f"loaded-{done}")
        end = case.steps if done % 4 == 1 else min(done + 1, case.steps)
        train(worker, done, end)
        save(worker, folder / case.name / f"from-{done}")
        compared += [(f"loaded-{done}", str(done)), (f"from-{done}", str(end))]
    return {"compared": compared}


@contextmanager
def poisoned(worker: SFTWorker, what: str, here: bool) -> Iterator[None]:
    """On the one rank where it is `here`, the loss of the second micro-batch is NaN, or a gradient is infinite."""
    hooks: list[Any] = []
    passes = iter(range(99))
    if here and what == "loss":
        norm = worker._engine._model.model.norm
        hooks.append(norm.register_forward_hook(lambda *args: args[-1] * (math.nan if next(passes) == 1 else 1.0)))
    elif here:
        hooks.append(worker._engine._parameters[-1].register_hook(lambda gradient: gradient * math.inf))
    yield
    for hook in hooks:
        hook.remove()


def run_skip(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    """Steps 1 to 4, of which 2 and 3 are poisoned; then, from its step 1 and from the start, what 1 and 4 alone give."""
    worker, rows = start_sft(case, ranks), examples(case.rows)
    denominator = int(sum(e.trained_T.sum() for e in rows))
    shard = rows[ranks.rank :: ranks.world_size]

    def train(*steps: int) -> float:
        return [worker.train_step(shard, denominator, TAU, step)[0]["grad_norm"] for step in steps][-1]

    record: dict[str, Any] = {"norms": [train(1)]}
    save(worker, folder / case.name / "one")
    for step, what, rank in ((2, "loss", 1), (3, "gradient", 0)):
        with poisoned(worker, what, ranks.rank == rank):
            record["norms"].append(train(step))
        save(worker, folder / case.name / what)
    record["norms"].append(train(4))
    save(worker, folder / case.name / "skipped")
    worker.resume(folder / case.name / "one")
    train(4)
    save(worker, folder / case.name / "resumed")
    with poisoned(worker, "loss", ranks.rank == 0):
        train(4)
    worker.restart()
    train(1, 4)
    save(worker, folder / case.name / "restarted")
    worker = start_sft(case, ranks)
    train(1, 4)
    save(worker, folder / case.name / "clean")
    return record


def start_policy(case: Case, ranks: RankSetup) -> PolicyWorker:
    config = GRPOConfig(
        data=DataConfig(path="unused.jsonl"),
        iterations=1,
        temperature=TEMPERATURE,
        optimizer=OPTIMIZER,
        micro_batch_size=case.micro_batch_size,
        pack_tokens=case.pack_tokens,
        max_prompt_tokens=6,
        max_tokens=6,
        precision=case.precision,
        **case.grpo,
    )
    worker = PolicyWorker(ranks.rank)
    worker.setup(PolicySetup(ranks, case.model, config, case.zero_stage, case.steps))
    return worker


def filled_rows(case: Case) -> list[PolicyRow]:
    """`policy_rows` with made-up log-probabilities of what the case's loss needs."""
    rng = np.random.default_rng(2)
    rows = []
    for row in policy_rows(case.rows):
        old, reference = rng.uniform(-6, -3, (2, len(row.response_ids_R))).astype(np.float32)
        given = {"reference_log_probs_R": reference} if case.grpo.get("kl_weight") else {}
        rows.append(replace(row, **given, **({"old_log_probs_R": old} if case.filled else {})))
    return rows


def policy_denominator(case: Case) -> int:
    lengths = [len(row.response_ids_R) for row in policy_rows(case.rows)]
    return loss_denominator(case.grpo.get("advantage", "grpo"), lengths, max_tokens=6)


def run_policy_gradients(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    """Reduced gradients of one policy loss, before any clipping."""
    worker = start_policy(case, ranks)
    record = worker._backward(filled_rows(case)[ranks.rank :: ranks.world_size], policy_denominator(case))
    save_gradients(worker, ranks, folder / f"{case.name}.safetensors")
    return record


def run_reference(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    """Log-probabilities under the starting weights behind some updates, and what asking for them leaves."""
    worker = start_policy(case, ranks)
    rows = filled_rows(case)[ranks.rank :: ranks.world_size]
    pairs = [(row.prompt_ids_T, row.response_ids_R) for row in rows]

    def log_probs(reference: bool = False) -> list[list[float]]:
        return [values.tolist() for values in worker.log_probs(pairs, reference)]

    record: dict[str, Any] = {"start": log_probs()}
    for step in (1, 2):
        worker.update(rows, policy_denominator(case), step)
    record["trained"], before = log_probs(), worker._engine.state_tensors()
    record["reference"], after = log_probs(reference=True), worker._engine.state_tensors()
    record["again"] = log_probs()
    record["differing"] = [name for name in before if not torch.equal(before[name], after[name])]
    worker.update(rows, policy_denominator(case), 3)
    record["reference again"] = log_probs(reference=True)
    return record


def run_policy(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    worker = start_policy(case, ranks)
    rows = policy_rows(case.rows)
    denominator = sum(len(row.response_ids_R) for row in rows)
    shard = rows[ranks.rank :: ranks.world_size]
    pairs = [(row.prompt_ids_T, row.response_ids_R) for row in shard]
    record: dict[str, Any] = {"log_probs": [values.tolist() for values in worker.log_probs(pairs)]}
    record["steps"] = [worker.update(shard, denominator, step) for step in range(1, case.steps + 1)]
    broken = [replace(row, advantage=math.nan) for row in shard] if ranks.rank == 1 else shard
    try:
        worker.update(broken, denominator, case.steps)
    except TrainingDiverged as error:
        record["diverged"] = error.message
    worker.export_weights(folder / case.name)
    record["log_probs_after"] = [values.tolist() for values in worker.log_probs(pairs)]
    return record


def run_export(case: Case, ranks: RankSetup, folder: Path) -> dict[str, Any]:
    """The weights behind an update: streamed, exported in small buckets, and as a checkpoint keeps them."""
    worker = start_policy(case, ranks)
    shard = filled_rows(case)[ranks.rank :: ranks.world_size]
    for step in (1, 2):
        worker.update(shard, policy_denominator(case), step)
    export = worker._engine.weight_export(EXPORT_BUCKET_BYTES)
    gathered: list[int] = []

    def counted(parameters: Sequence[torch.nn.Parameter]) -> Any:
        sizes = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters]
        gathered.append(sum(sizes) if len(sizes) > 1 else 0)
        return whole(parameters)

    whole, export._gather = export._gather, counted
    specs = {spec.name: [spec.dtype, list(spec.shape)] for spec in export.specs()}
    streamed = {name: tensor.clone().contiguous() for name, tensor in export.stream()}
    # What a bucket gave stays as it was while the next ones are gathered: senders pack across them.
    assert all(torch.equal(tensor, streamed[name]) for name, tensor in list(export.stream()))
    # Every rank has them all; only the first keeps them.
    assert specs == {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in streamed.items()}
    if ranks.rank == 0:
        save_file(streamed, folder / f"{case.name}.safetensors")
    worker.export_weights(folder / case.name, EXPORT_BUCKET_BYTES)
    worker.begin_save(folder / f"{case.name}-saved")
    assert worker.saved(wait=True)
    # The parameters are split again.
    held = sum(p.numel() for p in worker._engine._model.parameters())
    return {"gathered": gathered, "held": held, "names": list(specs), "as_in_files": export.as_in_files()}


def main(folder: Path, rank: int) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    ranks = RankSetup(rank, plan["world_size"], "127.0.0.1", plan["port"])
    run = {
        "sft": run_sft,
        "gradients": run_gradients,
        "resume": run_resume,
        "skip": run_skip,
        "policy": run_policy,
        "policy_gradients": run_policy_gradients,
        "reference": run_reference,
        "export": run_export,
    }
    for case in (Case(**values) for values in plan["cases"]):
        torch.manual_seed(0)
        record = run[case.kind](case, ranks, folder)
        (folder / f"{case.name}.rank{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
