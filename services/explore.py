"""The page by which k and r are picked before training: response tokens by top-k mass, and the quantiles of the mass.

    python -m services.explore --model M --data D [--out page.html] [--rows 20] [--top-k 2] [--mask-ratio 0.7]

N flat positions of a micro-batch, R labelled tokens of one row.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedsft.config import DataConfig, SEDObjective
from sedsft.data import DataFileError, TokenizerError
from sedsft.data.batching import labelled_values, sft_micro_batches
from sedsft.data.chat import load_tokenizer
from sedsft.data.encoding import encode_sft
from sedsft.data.sources import read_sft_rows
from sedsft.exploration import Calibration, MassSketch, calibrate_sketch
from sedsft.head import token_statistics
from sedsft.records import Example
from services.charts import Chart, line_chart
from services.data_report import template_environment
from services.errors import ModelError
from services.rundir import write_atomically
from services.training.model import linear_head, open_model

PLOTTED_TOP_K = (1, 2, 3, 10)
TABLE_RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9)
ROWS_PER_PASS = 4
SHARPEST = 1e-7
"""Smallest 1 - mass of the logarithmic chart: fp32 knows nothing between 6e-8 and 0."""
COLOURS = (
    "#b35806", "#c76a15", "#da7d25", "#ea9140", "#f4a65e", "#f9bb80", "#fccda2", "#fdddc0", "#feebdc", "#ffffff",
)  # fmt: skip
"""Backgrounds of the mass's tenths, from much to explore to none."""

FloatR = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExploreRequest:
    """What the page is made of."""

    model: Path
    data: DataConfig
    objective: SEDObjective
    """Its `top_k` and `mask_ratio` are drawn."""
    max_length: int


@dataclass(frozen=True, slots=True, eq=False)
class RowStatistics:
    """Labelled tokens of one row: the top-k mass for several k, and the probability of the token itself."""

    masses_R: Mapping[int, FloatR]
    probability_R: FloatR


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of the page; `mass` is None where the row carries no label."""

    text: str
    mass: float | None = None
    probability: float = 0.0
    level: int = 0
    """Index into COLOURS."""
    active: bool = False
    """M = 1."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row of the page."""

    line: int
    tokens: tuple[ShownToken, ...]


def explore(request: ExploreRequest) -> str:
    """The page as one HTML document without scripts or outside assets.

    Errors: DataFileError, TokenizerError and ModelError for data and models that cannot be used.
    """
    tokenizer = load_tokenizer(request.model)
    rows = read_sft_rows(request.data)
    encoded = encode_sft([*rows.rows, *rows.examples], tokenizer, request.max_length, "cut")
    on_gpu = torch.cuda.is_available()
    model = open_model(str(request.model), torch.bfloat16 if on_gpu else torch.float32).eval()
    _check_vocabulary(model, encoded.examples)
    top_k = request.objective.top_k
    measured = measure(model.to("cuda") if on_gpu else model, encoded.examples, sorted({*PLOTTED_TOP_K, top_k}))
    flat = {k: np.concatenate([row.masses_R[k] for row in measured]) for k in measured[0].masses_R}
    sketches = {k: MassSketch.of(masses_N) for k, masses_N in flat.items()}
    calibration = calibrate_sketch(sketches[top_k], request.objective.mask_ratio, top_k=top_k)
    ratios = sorted({*TABLE_RATIOS, calibration.mask_ratio})
    return (
        template_environment()
        .get_template("explore.html.jinja")
        .render(
            model=str(request.model),
            data=request.data.path,
            cut=len(encoded.cut),
            dropped=len(encoded.dropped),
            max_length=request.max_length,
            built=datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC"),
            calibration=calibration,
            charts=quantile_charts({k: flat[k] for k in PLOTTED_TOP_K}),
            ratios=ratios,
            tau_table=[(k, [sketch.threshold(ratio) for ratio in ratios]) for k, sketch in sketches.items()],
            colours=COLOURS,
            rows=[_shown(*row, calibration, tokenizer) for row in zip(encoded.examples, measured, strict=True)],
        )
    )


@torch.inference_mode()
def measure(model: PreTrainedModel, examples: Sequence[Example], top_ks: Sequence[int]) -> list[RowStatistics]:
    """Statistics of the labelled tokens of each example, for every k, from one forward pass a row."""
    head = linear_head(model)
    found: dict[int, RowStatistics] = {}
    for cpu_batch in sft_micro_batches(examples, ROWS_PER_PASS):
        batch = cpu_batch.to(model.device)
        hidden_NH = model.base_model(**batch.inputs).last_hidden_state.flatten(0, 1)
        masses: dict[int, list[FloatR]] = {}
        for k in top_ks:
            statistics = token_statistics(hidden_NH, head.weight_VH, batch.labels_N, top_k=k, **head.options)
            assert statistics.topk_mass_N is not None
            masses[k] = labelled_values(batch, statistics.topk_mass_N)
        probabilities = labelled_values(batch, statistics.log_prob_N.exp())
        for position, row in enumerate(batch.rows):
            found[row] = RowStatistics({k: rows[position] for k, rows in masses.items()}, probabilities[position])
    return [found[row] for row in range(len(examples))]


def quantile_charts(masses: Mapping[int, npt.NDArray[np.float32]]) -> list[Chart]:
    """Quantiles of the masses of each k, as they are and as the decimal logarithm of what they leave to 1."""
    percents = np.arange(101)
    quantiles = {f"k = {k}": np.quantile(masses_N.astype(np.float64), percents / 100) for k, masses_N in masses.items()}
    plain = {name: [(float(x), float(y)) for x, y in zip(percents, ys, strict=True)] for name, ys in quantiles.items()}
    rest = {name: [(x, math.log10(max(1 - y, SHARPEST))) for x, y in points] for name, points in plain.items()}
    charts = [
        line_chart("Top-k mass", "quantiles over response tokens", plain, "% of tokens"),
        line_chart("What is left to explore", "log10(1 − top-k mass), the same quantiles", rest, "% of tokens"),
    ]
    return [chart for chart in charts if chart is not None]


def _check_vocabulary(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    for example in examples:
        if (largest := int(example.input_ids_T.max())) >= size:
            raise DataFileError(
                f"expected token ids below the model's {size}, got {largest} in line {example.line}; use its own tokenizer"
            )


def _shown(
    example: Example, statistics: RowStatistics, calibration: Calibration, tokenizer: PreTrainedTokenizerBase
) -> ShownRow:
    texts = [str(tokenizer.decode([token])) for token in example.input_ids_T.tolist()]
    tokens = [ShownToken(text) for text in texts]
    # The first token is never predicted, so it has no statistics even where it is the assistant's.
    positions = (np.flatnonzero(example.trained_T[1:]) + 1).tolist()
    columns = zip(positions, statistics.masses_R[calibration.top_k], statistics.probability_R, strict=True)
    for position, mass, probability in columns:
        level = min(int(10 * mass), len(COLOURS) - 1)
        tokens[position] = ShownToken(
            texts[position], float(mass), float(probability), level, active=bool(mass < calibration.tau)
        )
    return ShownRow(example.line, tuple(tokens))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and tell its path; errors as one message, exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m services.explore", description="Draw the exploration space of a model.")
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--data", required=True, help="SFT rows, as in a job's data.path")
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="file to write")
    parser.add_argument("--rows", type=int, default=20, help="rows to read, measure and show")
    parser.add_argument("--top-k", type=int, default=2, help="k of the coloured mass")
    parser.add_argument("--mask-ratio", type=float, default=0.7, help="r, the share of tokens with M = 0")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens after which a row is cut")
    given = parser.parse_args(arguments)
    try:
        objective = SEDObjective(top_k=given.top_k, mask_ratio=given.mask_ratio)
        request = ExploreRequest(given.model, DataConfig(path=given.data, max_rows=given.rows), objective, given.max_length)
        page = explore(request)
    except (DataFileError, TokenizerError, ModelError, ValidationError) as error:
        sys.stderr.write(f"error {error}\n")
        return 1
    write_atomically(given.out, page)
    sys.stdout.write(f"{given.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
