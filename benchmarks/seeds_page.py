"""The page and the picture of seeds_table.py: tables in Markdown, dots with whiskers in SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.charts import COLOURS

TITLES = {
    "avg": "Avg@8",
    "pass@8": "pass@8",
    "self_bleu": "Self-BLEU",
    "token_entropy": "entropy",
    "distinct_correct": "correct paths",
}
NAMES = {"ce": "CE", "gem": "GEM", "dft": "DFT", "sed-no-mask": "SED w/o mask", "sed": "SED"}
STAGES = {"sft": "after SFT", "rl": "after RL"}
DRAWN = ("avg", "pass@8", "self_bleu", "token_entropy")
PANEL_WIDTH, PANEL_HEIGHT, NAME_WIDTH, ROW_HEIGHT = 170, 190, 90, 30

Summary = Mapping[str, Any]


TEXT = """\
# Objectives over seeds

Written by `python -m benchmarks.seeds_table` from {seeds} seeds; `benchmarks/seeds_table.json` has every figure of each.
All stages together took {minutes:.0f} minutes.

The task is the demo's: a 0.19M-parameter base model, pre-trained on all ways of solving countdown problems; SFT on one
canonical way without products ({sft_steps} steps); then GRPO ({iterations} iterations of {prompts} prompts with {samples}
samples). A seed draws SFT rows and RL prompts, their order and all samples; base model and evaluated problems are the same
for all. Figures are means over the three groups of held-out problems, 8 samples each at temperature 1. Responses are more
diverse where Self-BLEU is lower and entropy (nats per token) higher; correct paths are the distinct right answers among the
8. ± is the standard error of the mean over seeds.

![Figures with standard errors](seeds_table.svg)
"""

DIFFERENCES = """
## Differences from CE on the same seed

Mean ± standard error of the differences, and in how many seeds they are above 0. What a seed draws is common to all its
objectives, so these tell more than the columns above. A difference below two standard errors is none.
"""


def page(report: Mapping[str, Any], objectives: Sequence[str]) -> str:
    """docs/seeds_table.md."""
    summary, seeds = report["summary"], len(report["seeds"])
    stages = {stage["type"]: stage for stage in report["job"]["stages"]}
    grpo = stages["rl"]["grpo"]
    text = TEXT.format(
        seeds=seeds,
        minutes=sum(sum(entry["stage_seconds"].values()) for entry in report["seeds"].values()) / 60,
        sft_steps=stages["sft"]["sft"]["steps"],
        iterations=grpo["iterations"],
        prompts=grpo["prompts_per_iteration"],
        samples=grpo["group_size"],
    )
    for stage, title in STAGES.items():
        rows = ({"base model": "base"} if stage == "sft" else {}) | {NAMES[name]: f"{name}-{stage}" for name in objectives}
        text += f"\n## {title[0].upper()}{title[1:]}\n\n{HEAD}"
        text += "".join(_line(label, summary["models"][model]) for label, model in rows.items())
    text += f"{DIFFERENCES}\n{HEAD}"
    for stage, title in STAGES.items():
        for name in objectives:
            if (figures := summary["less_ce"].get(f"{name}-{stage}")) is not None:
                text += _line(f"{NAMES[name]}, {title}", figures, seeds)
    return text


HEAD = "| | " + " | ".join(TITLES.values()) + " |\n" + "|---" * (1 + len(TITLES)) + "|\n"


def _line(label: str, figures: Mapping[str, Any], seeds: int | None = None) -> str:
    """A row of a table; `seeds` marks differences, which get a sign and a count."""
    cells = []
    for name in TITLES:
        figure = figures[name]
        digits, sign = (1 if name == "self_bleu" else 3), ("" if seeds is None else "+")
        error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.{digits}f}"
        count = "" if seeds is None else f" ({figure['above_zero']}/{seeds})"
        cells.append(f"{figure['mean']:{sign}.{digits}f}{error}{count}")
    return f"| {label} | " + " | ".join(cells) + " |\n"


def picture(summary: Summary, objectives: Sequence[str]) -> str:
    """A panel per figure, a row per objective, a dot after SFT and one after RL, whiskers of one standard error."""
    width, height = NAME_WIDTH + PANEL_WIDTH * len(DRAWN), PANEL_HEIGHT + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Figures of each objective after SFT and after RL">',
        "<style>text { font: 11px sans-serif; fill: #57606a; }</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for row, name in enumerate(objectives):
        parts.append(f'<text x="{NAME_WIDTH - 8}" y="{_row_y(row) + 4}" text-anchor="end">{NAMES[name]}</text>')
    for panel, figure in enumerate(DRAWN):
        parts += _panel(summary, objectives, figure, NAME_WIDTH + panel * PANEL_WIDTH)
    for index, title in enumerate(STAGES.values()):
        x = NAME_WIDTH + 90 * index
        parts.append(f'<circle cx="{x}" cy="{height - 10}" r="4" fill="{COLOURS[index]}"/>')
        parts.append(f'<text x="{x + 9}" y="{height - 6}">{title}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row_y(row: int) -> int:
    return 38 + row * ROW_HEIGHT


def _panel(summary: Summary, objectives: Sequence[str], figure: str, left: int) -> list[str]:
    def cell(name: str, stage: str) -> tuple[float, float]:
        found = summary["models"][f"{name}-{stage}"][figure]
        return found["mean"], found["standard_error"] or 0.0

    cells = [cell(name, stage) for name in objectives for stage in STAGES]
    low, high = min(mean - error for mean, error in cells), max(mean + error for mean, error in cells)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return round(left + 8 + (value - low) / span * (PANEL_WIDTH - 50), 1)

    digits = 1 if figure == "self_bleu" else 2
    top, bottom = _row_y(0) - 14, _row_y(len(objectives) - 1) + 14
    parts = [f'<text x="{left + (PANEL_WIDTH - 34) / 2}" y="14" text-anchor="middle">{TITLES[figure]}</text>']
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(f'<line x1="{x(value)}" x2="{x(value)}" y1="{top}" y2="{bottom}" stroke="#e4e8ec"/>')
        parts.append(f'<text x="{x(value)}" y="{bottom + 12}" text-anchor="{anchor}">{value:.{digits}f}</text>')
    for row, name in enumerate(objectives):
        for index, (stage, title) in enumerate(STAGES.items()):
            (mean, error), y, colour = cell(name, stage), _row_y(row) + (-4 if index == 0 else 4), COLOURS[index]
            low_x, high_x = x(mean - error), x(mean + error)
            parts.append(f'<line x1="{low_x}" x2="{high_x}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.5"/>')
            shown = f"{NAMES[name]} {title}: {mean:.3f} ± {error:.3f}"
            parts.append(f'<circle cx="{x(mean)}" cy="{y}" r="4" fill="{colour}"><title>{shown}</title></circle>')
    return parts
