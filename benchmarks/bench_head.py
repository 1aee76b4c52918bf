"""Seconds and peak memory of the head behind every objective against its peers, forward and backward, side by side.

    python benchmarks/bench_head.py [--tokens 2048 --hidden 576 --vocabulary 49152 --rounds 3 --threads 2 --device cpu]
    python benchmarks/bench_head.py --table          # tokens 1k, 4k, 16k by vocabularies 32k, 128k, 152k, one round, bf16

`authors, SED` is the paper's computation in plain PyTorch: logits, softmax and top-k of all tokens at once, beside the
cross-entropy that the model computes of its own. `matmuls` are the three products that no way of training goes without, in
one piece and in the head's own chunks. `TRL, CE` is its chunked log-probability. On CUDA, Liger's fused linear
cross-entropy and Apple's cut-cross-entropy take part where they are installed.

Each measurement is a process of its own, so that its peak memory is the variant's; variants alternate within a round; the
best of the rounds is reported. Needs requirements/bench.txt. Writes bench_head.json, or bench_head_table.json, beside it;
the table goes on with the sizes that its file does not hold yet.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sedsft.config import CEObjective, SEDObjective
from sedsft.head import linear_objective_loss
from sedsft.vocabulary import chunk_rows

TAU = 0.9
DTYPES = ("float32", "bfloat16")
BASELINE = "authors, SED"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_ce(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy on all logits."""
    return functional.cross_entropy((hidden_NH @ weight_VH.T).float(), labels_N)


def full_sed(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The paper's loss on all logits."""
    return _sed_of_logits((hidden_NH @ weight_VH.T).float(), labels_N)


def authors_sed(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The same beside the model's own cross-entropy on those logits, which goes unused."""
    logits_NV = (hidden_NH @ weight_VH.T).float()
    own_loss = functional.cross_entropy(logits_NV, labels_N)
    loss = _sed_of_logits(logits_NV, labels_N)
    # Kept until here, as the model's output object keeps it.
    del own_loss
    return loss


def _sed_of_logits(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    prob_NV = logits_NV.softmax(-1)
    active_N = prob_NV.detach().topk(2).values.sum(-1) < TAU
    p_N = prob_NV.gather(-1, labels_N[:, None])[:, 0]
    return (functional.cross_entropy(logits_NV, labels_N, reduction="none") + active_N * (p_N - 0.5) ** 2).mean()


def our_ce(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """This project's head, cross-entropy."""
    return linear_objective_loss(hidden_NH, weight_VH, labels_N, CEObjective(), denominator=len(labels_N)).loss


def our_sed(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """This project's head, SED."""
    return linear_objective_loss(hidden_NH, weight_VH, labels_N, SEDObjective(), tau=TAU, denominator=len(labels_N)).loss


def trl_ce(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """TRL's chunked log-probability with the chunk its trainers use."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    log_prob_N: Tensor = function.apply(hidden_NH, weight_VH, None, labels_N, 1.0, 32768, None, 1.0, ("log_probs",))[0]
    return -log_prob_N.mean()


def liger_ce(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy (CUDA)."""
    loss: Tensor = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()(
        weight_VH, hidden_NH, labels_N
    )
    return loss


def cut_ce(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """Apple's cut-cross-entropy (CUDA)."""
    loss: Tensor = importlib.import_module("cut_cross_entropy").linear_cross_entropy(hidden_NH, weight_VH, labels_N)
    return loss


class _Matmuls(torch.autograd.Function):
    """The three products alone, on parts of `size` tokens; what stands for the gradient of logits is the logits."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, size: int) -> Tensor:
        dhidden_NH, dweight_VH = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH)
        buffer_CV = hidden_NH.new_empty(size, len(weight_VH))
        for start in range(0, len(hidden_NH), size):
            part_CH = hidden_NH[start : start + size]
            logits_CV = torch.mm(part_CH, weight_VH.T, out=buffer_CV[: len(part_CH)])
            torch.mm(logits_CV, weight_VH, out=dhidden_NH[start : start + size])
            dweight_VH.addmm_(logits_CV.T, part_CH)
        ctx.save_for_backward(dhidden_NH, dweight_VH)
        return dhidden_NH[0, 0].detach()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return (*ctx.saved_tensors, None)


def matmuls(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The limit, all tokens at once."""
    loss: Tensor = _Matmuls.apply(hidden_NH, weight_VH, len(labels_N))  # type: ignore[no-untyped-call]
    return loss


def chunked_matmuls(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """The limit in the chunks that the head takes."""
    size = min(chunk_rows(hidden_NH, len(weight_VH)), len(labels_N))
    loss: Tensor = _Matmuls.apply(hidden_NH, weight_VH, size)  # type: ignore[no-untyped-call]
    return loss


CPU_VARIANTS: dict[str, Loss] = {
    BASELINE: authors_sed,
    "full logits, SED": full_sed,
    "full logits, CE": full_ce,
    "TRL, CE": trl_ce,
    "ours, CE": our_ce,
    "ours, SED": our_sed,
    "matmuls": matmuls,
    "matmuls, chunked": chunked_matmuls,
}
CUDA_VARIANTS: dict[str, tuple[str, Loss]] = {
    "Liger, CE": ("liger_kernel", liger_ce),
    "cut-cross-entropy": ("cut_cross_entropy", cut_ce),
}


def variants(device: str) -> dict[str, Loss]:
    """What can run here."""
    if device == "cpu":
        return CPU_VARIANTS
    installed = {name: loss for name, (module, loss) in CUDA_VARIANTS.items() if importlib.util.find_spec(module)}
    return CPU_VARIANTS | installed


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    dtype: str
    tokens: int
    hidden: int
    vocabulary: int
    threads: int
    device: str


@dataclass(frozen=True)
class Measured:
    """What its process reports."""

    seconds: float
    peak_mb: float
    loss: float


def measure(case: Case, results: multiprocessing.Queue[Measured | None]) -> None:
    """Forward and backward, warmed up once on few tokens; None where memory does not suffice."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    # An allocation that cannot be had then fails in place of taking the machine down.
    resource.setrlimit(resource.RLIMIT_DATA, (int(_memory_bytes() * 0.85), resource.RLIM_INFINITY))
    dtype, device = getattr(torch, case.dtype), torch.device(case.device)
    hidden_NH = torch.randn(case.tokens, case.hidden, dtype=dtype).to(device).requires_grad_()
    weight_VH = (torch.randn(case.vocabulary, case.hidden) / case.hidden**0.5).to(dtype).to(device).requires_grad_()
    labels_N = torch.randint(case.vocabulary, (case.tokens,)).to(device)
    loss_of = variants(case.device)[case.name]
    # More than one chunk's rows are not needed to compile what is compiled.
    loss_of(hidden_NH[:8], weight_VH, labels_N[:8]).backward()  # type: ignore[no-untyped-call]
    hidden_NH.grad = weight_VH.grad = None
    before_mb = _start_peak(device)
    try:
        started = time.perf_counter()
        loss = loss_of(hidden_NH, weight_VH, labels_N)
        loss.backward()  # type: ignore[no-untyped-call]
        _wait(device)
        results.put(Measured(time.perf_counter() - started, _peak_mb(device) - before_mb, float(loss.detach())))
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        results.put(None)


def _memory_bytes() -> int:
    line = Path("/proc/meminfo").read_text(encoding="utf-8").partition("MemAvailable:")[2]
    return int(line.split()[0]) * 1024


def _start_peak(device: torch.device) -> float:
    """Memory in use in MB, from which on the peak counts."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_mb("VmRSS")


def _peak_mb(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _status_mb("VmHWM")


def _status_mb(key: str) -> float:
    line = Path("/proc/self/status").read_text(encoding="ascii").partition(f"{key}:")[2]
    return int(line.split()[0]) / 2**10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(case: Case) -> Measured | None:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(case, results))
    process.start()
    while process.is_alive() and results.empty():
        process.join(0.1)
    if results.empty():
        raise RuntimeError(f"expected a measurement of {case}, its process ended with {process.exitcode}")
    measured: Measured | None = results.get()
    process.join()
    return measured


def table(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Best of `rounds` for each of `cases`, which differ in their variant alone, and ratios to the first of them."""
    taken: dict[Case, list[Measured | None]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            taken[case].append(run(case))
    rows: list[dict[str, Any]] = []
    best: dict[str, Measured] = {}
    for case, measured in taken.items():
        row: dict[str, Any] = {"variant": case.name, "dtype": case.dtype, "tokens": case.tokens, "vocabulary": case.vocabulary}
        fitting = [m for m in measured if m is not None]
        if fitting:
            best[case.name] = Measured(min(m.seconds for m in fitting), min(m.peak_mb for m in fitting), fitting[0].loss)
            row |= {"seconds": best[case.name].seconds, "peak_mb": best[case.name].peak_mb, "loss": best[case.name].loss}
            if BASELINE in best:
                row["of_authors_seconds"] = best[case.name].seconds / best[BASELINE].seconds
                row["of_authors_peak"] = best[case.name].peak_mb / best[BASELINE].peak_mb
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    head = f"{row['dtype']:9} N {row['tokens']:6} V {row['vocabulary']:7} {row['variant']:17}"
    if "seconds" not in row:
        return f"{head} out of memory"
    ratios = f"{row['of_authors_seconds']:5.2f}x {row['of_authors_peak']:5.2f}x" if "of_authors_seconds" in row else ""
    return f"{head} {row['seconds']:7.2f} s {row['peak_mb']:7.0f} MB over inputs  {ratios}"


def processor() -> str:
    """Model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print the table and write the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("tokens", 2048), ("hidden", 576), ("vocabulary", 49152), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    sizes = [(n, v, "bfloat16") for v in (32_000, 128_256, 151_936) for n in (1024, 4096, 16_384)]
    if not options.table:
        sizes = [(options.tokens, options.vocabulary, dtype) for dtype in DTYPES]
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    machine = {"processor": name, "threads": options.threads, "torch": torch.__version__, "hidden": options.hidden}
    file = Path(__file__).with_name("bench_head_table.json" if options.table else "bench_head.json")
    rows = _earlier(file, machine) if options.table else []
    for tokens, vocabulary, dtype in sizes:
        if any((row["tokens"], row["vocabulary"]) == (tokens, vocabulary) for row in rows if options.table):
            continue
        shape = (dtype, tokens, options.hidden, vocabulary, options.threads, options.device)
        cases = [Case(name, *shape) for name in variants(options.device)]
        rows += table(cases, 1 if options.table else options.rounds)
        file.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _earlier(file: Path, machine: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier run on the same machine has left."""
    if not file.exists():
        return []
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = report["rows"]
    return rows if report["machine"] == machine else []


if __name__ == "__main__":
    main()
