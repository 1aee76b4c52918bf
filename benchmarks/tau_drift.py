"""Share of tokens without the diversity term, step by step, with tau that stays (`initial`) and tau that follows (`running`).

    python benchmarks/tau_drift.py [--steps 150 --batch-size 256]

One pipeline job of two SFT stages from the same base on the same rows, submitted to a local stack as `sedsft demo` does it.
The learning rate is high, so that the model sharpens fast. A batch of n tokens cannot show the share r closer than
sqrt(r (1 - r) / n) or so, whatever tau is: 0.014 with 64 rows of this task, half of that with 256.

Writes tau_drift.json beside this file and docs/tau_drift.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich.console import Console

from api import stack
from api.client import Client
from api.settings import Settings
from api.watch import watch_job
from sedsft.config import SEDObjective
from services import charts

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.03
R: float = SEDObjective().mask_ratio
MODES = ("initial", "running")
LEGEND_HEIGHT = 18


def job(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Spec of the pipeline: both modes, everything else alike."""
    sft = {
        "data": {"path": str(folder / "data" / "sft_narrow.jsonl")},
        "held_out": {"path": str(folder / "data" / "calibration.jsonl")},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": options.steps // 5, "weight_decay": 0.01, "min_ratio": 0.1},
        "steps": options.steps,
        "batch_size": options.batch_size,
        "pack_tokens": 512,
        "max_length": 64,
        "precision": "fp32",
    }
    trainer = {"workers": 2, "cpus_per_worker": 0.4, "zero_stage": 2}
    stages = [
        {
            "type": "sft",
            "name": mode,
            "model": {"path": str(folder / "base")},
            "sft": sft | {"objective": {"type": "sed", "tau_mode": mode}},
            "trainer": trainer,
        }
        for mode in MODES
    ]
    return {"type": "pipeline", "name": "tau-drift", "stages": stages}


def run(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of every step of both modes, from a job on a stack of its own."""
    folder: Path = options.folder
    if not (folder / "base").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "prepare_demo.py"), str(folder)], check=True)
    with tempfile.TemporaryDirectory(prefix="sedsft-tau-") as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        settings = Settings(home=Path(home), port=port, allowed_roots=(folder,))
        running = stack.up(settings)
        try:
            with Client.local(running.api_url, settings.key_path) as client:
                done = watch_job(client, client.submit(job(folder, options))["id"], Console())
                if done["status"] != "succeeded":
                    raise RuntimeError(f"expected the job to succeed, it {done['status']}: {done['status_reason']}")
                return {mode: [point["values"] for point in client.metrics(done["id"], mode)] for mode in MODES}
        finally:
            stack.down(settings)


def summary(shares: list[float]) -> dict[str, Any]:
    """How far the realised shares lie from r."""
    deviations = [share - R for share in shares]
    outside = [step for step, deviation in enumerate(deviations, start=1) if abs(deviation) > TOLERANCE]
    return {
        "steps": len(shares),
        "steps_within": len(shares) - len(outside),
        "first_steps_outside": outside[:10],
        "worst": max(map(abs, deviations)),
        "mean": sum(shares) / len(shares),
        "last": shares[-1],
    }


def drawn(shares: dict[str, list[float]]) -> str:
    """A picture that stands alone, drawn as the report draws its charts."""
    steps = range(1, len(shares["running"]) + 1)
    levels = shares | {f"r + {TOLERANCE}": [R + TOLERANCE] * len(steps), f"r − {TOLERANCE}": [R - TOLERANCE] * len(steps)}
    series = {name: list(zip(steps, values, strict=True)) for name, values in levels.items()}
    chart = charts.line_chart("Masked share", "", series)
    assert chart is not None
    environment = Environment(loader=FileSystemLoader(Path(charts.__file__).parent), autoescape=True)
    figure = str(environment.get_template("chart.html.jinja").module.chart(chart))  # type: ignore[attr-defined]
    [body] = re.findall(r"<svg[^>]*>(.*)</svg>", figure, flags=re.DOTALL)
    top, height = -LEGEND_HEIGHT, charts.HEIGHT + LEGEND_HEIGHT
    legend = "".join(
        f'<text x="{charts.LEFT + 75 * index}" y="{top + 12}" style="fill:{line.colour}">{line.name}</text>'
        for index, line in enumerate(chart.lines)
    )
    style = "<style>text { font: 11px sans-serif; fill: #57606a; }</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {charts.WIDTH} {height}" role="img" '
        f'aria-label="Masked share per step">{style}'
        f'<rect y="{top}" width="{charts.WIDTH}" height="{height}" fill="#fff"/>{legend}{body}</svg>\n'
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=256, help="rows per step")
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo"), help="base model and data; made if not there")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    figures = run(options)
    shares = {mode: [values["masked_share"] for values in figures[mode]] for mode in MODES}
    rows = {mode: summary(shares[mode]) for mode in MODES}
    for mode, row in rows.items():
        print(
            f"{mode:8} within ±{TOLERANCE} of {R} in {row['steps_within']} of {row['steps']} steps, "
            f"worst {row['worst']:.3f}, mean {row['mean']:.3f}, last {row['last']:.3f}"
        )
    report = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": version("torch")},
        "job": job(Path(".cache/demo"), options),
        "mask_ratio": R,
        "tolerance": TOLERANCE,
        "modes": {
            mode: rows[mode]
            | {
                "masked_share": [round(share, 5) for share in shares[mode]],
                "tau": [round(values["tau"], 6) for values in figures[mode]],
            }
            for mode in MODES
        },
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (ROOT / "docs" / "tau_drift.svg").write_text(drawn(shares), encoding="utf-8")


if __name__ == "__main__":
    main()
