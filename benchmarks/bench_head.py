"""Seconds and peak memory of the chunked head against full logits, forward and backward, side by side in one run.

    python benchmarks/bench_head.py [--tokens 2048 --hidden 576 --vocabulary 49152 --rounds 3 --threads 1]

`authors, SED` is the paper's computation in plain PyTorch: logits, softmax and top-k of all tokens at once, beside the
cross-entropy that the model computes of its own. Variants alternate within each round; the best of the rounds is reported.
Writes benchmarks/bench_head.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sedsft.config import CEObjective, SEDObjective
from sedsft.head import linear_objective_loss

TAU = 0.9


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


def chunked_ce(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """This project's head, cross-entropy."""
    return linear_objective_loss(hidden_NH, weight_VH, labels_N, CEObjective(), denominator=len(labels_N)).loss


def chunked_sed(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor) -> Tensor:
    """This project's head, SED."""
    return linear_objective_loss(hidden_NH, weight_VH, labels_N, SEDObjective(), tau=TAU, denominator=len(labels_N)).loss


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "full logits, CE": full_ce,
    "full logits, SED": full_sed,
    "authors, SED": authors_sed,
    "chunked head, CE": chunked_ce,
    "chunked head, SED": chunked_sed,
}


def measure(
    name: str, dtype: str, options: argparse.Namespace, results: multiprocessing.Queue[tuple[float, float, float]]
) -> None:
    """One forward and backward in a process of its own, whose peak memory is then the variant's; warmed up on few tokens."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden_NH = torch.randn(options.tokens, options.hidden, dtype=kind).requires_grad_()
    weight_VH = (torch.randn(options.vocabulary, options.hidden) / options.hidden**0.5).to(kind).requires_grad_()
    labels_N = torch.randint(options.vocabulary, (options.tokens,))
    VARIANTS[name](hidden_NH[:8], weight_VH, labels_N[:8]).backward()
    hidden_NH.grad = weight_VH.grad = None
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    loss = VARIANTS[name](hidden_NH, weight_VH, labels_N)
    loss.backward()
    seconds = time.perf_counter() - started
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    results.put((seconds, peak_mb, float(loss.detach())))


def run(name: str, dtype: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(name, dtype, options, results))
    process.start()
    measured: tuple[float, float, float] = results.get()
    process.join()
    return measured


def processor() -> str:
    """Model name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Print the table and write the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("tokens", 2048), ("hidden", 576), ("vocabulary", 49152), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in VARIANTS}
        for _ in range(options.rounds):
            for name in VARIANTS:
                taken[name].append(run(name, dtype, options))
        baseline = min(seconds for seconds, _, _ in taken["authors, SED"])
        for name, measured in taken.items():
            seconds, peak_mb = min(m[0] for m in measured), min(m[1] for m in measured)
            row = {
                "dtype": dtype,
                "variant": name,
                "seconds": seconds,
                "of_authors_sed": seconds / baseline,
                "peak_mb": peak_mb,
            }
            rows.append(row | {"loss": measured[0][2]})
            print(f"{dtype:9} {name:18} {seconds:7.2f} s {seconds / baseline:6.2f}x {peak_mb:7.0f} MB over inputs")
    machine = {"processor": processor(), "torch": torch.__version__, **vars(options)}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
