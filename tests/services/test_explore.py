"""The exploration page of a small model: the figures on it, its colours and marks, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedsft.config import DataConfig
from sedsft.data.encoding import encode_sft
from sedsft.data.sources import read_sft_rows
from sedsft.exploration import MassSketch
from sedsft.tasks.demo import write_data
from sedsft.tasks.tiny_model import countdown_model, countdown_tokenizer
from services.explore import main, measure, quantile_charts

ROWS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained base model whose weights are wide enough for masses between 0.1 and 1."""
    folder = tmp_path_factory.mktemp("model")
    countdown_model(0, init_std=0.3).save_pretrained(folder)
    countdown_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, seed=0)
    return folder / "held_out.jsonl"


@pytest.fixture(scope="module")
def page(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    arguments = ["--model", str(model), "--data", str(data), "--out", str(out), "--rows", str(ROWS), "--mask-ratio", "0.6"]
    assert main(arguments) == 0
    return out.read_text(encoding="utf-8")


def test_masses_are_those_of_the_models_own_softmax(data: Path) -> None:
    net = countdown_model(0, init_std=0.3).eval()
    rows = read_sft_rows(DataConfig(path=str(data), max_rows=ROWS))
    examples = encode_sft(rows.rows, countdown_tokenizer(), 256, "error").examples
    for example, measured in zip(examples, measure(net, examples, [1, 3, 10]), strict=True):
        with torch.no_grad():
            probs_TV = net(torch.tensor(example.input_ids_T[None].astype(np.int64))).logits[0].softmax(dim=-1)
        before = np.flatnonzero(example.trained_T[1:])
        for k in (1, 3, 10):
            expected = probs_TV[before].topk(k).values.sum(dim=-1).numpy()
            assert measured.masses_R[k] == pytest.approx(expected, abs=1e-5)
        assert measured.probability_R == pytest.approx(probs_TV[before, example.input_ids_T[1:][before]].numpy(), abs=1e-5)


def test_page_marks_the_share_of_tokens_below_tau(page: str) -> None:
    tokens = re.findall(r'<span class="m(\d)( on)?" title="top-2 mass ([\d.]+), p [\d.]+, M = (\d)">', page)
    masses = np.array([float(mass) for *_, mass, _ in tokens])
    assert page.count("<h3>Line ") == ROWS
    assert [int(level) for level, *_ in tokens] == [min(int(10 * mass), 9) for mass in masses]
    assert [bool(on) for _, on, *_ in tokens] == [on == "1" for *_, on in tokens]
    tau = float(re.search(r"τ = ([\d.]+), M = 0 for ([\d.]+)%", page)[1])  # type: ignore[index]
    assert tau == pytest.approx(MassSketch.of(masses).threshold(0.6), abs=0.0011)
    masked = sum(on == "0" for *_, on in tokens) / len(tokens)
    assert 0.6 <= masked <= 0.6 + 2 / len(tokens)


def test_page_plots_every_k_and_needs_nothing_from_outside(page: str) -> None:
    for k in (1, 2, 3, 10):
        assert page.count(f"<title>k = {k}</title>") == 2
    assert '<td class="chosen">' in page
    assert not re.findall(r"(?:src|href)=|<script|https?://|url\(", page)


def test_rows_that_came_tokenized_and_too_long(model: Path, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "tokens.jsonl"
    ids = countdown_tokenizer()("<bos>3 7 2 5>24:3*7=21,5-2=3,21+3=24")["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * 8 + ids[8:]}
    rows.write_text(f"{json.dumps(row)}\n")
    out = tmp_path / "page.html"
    arguments = ["--model", str(model), "--data", str(rows), "--out", str(out)]
    assert main([*arguments, "--max-length", "10"]) == 0
    page = out.read_text(encoding="utf-8")
    assert "1 rows cut at 10 tokens" in page
    assert page.count('title="top-2 mass') == len(ids[:10]) - 8
    rows.write_text(f"{json.dumps({'input_ids': [*ids, 999], 'labels': [*ids, 999]})}\n")
    assert main(arguments) == 1
    assert "line 1: token id 999" in capsys.readouterr().err


def test_quantiles_by_hand() -> None:
    [mass, rest] = quantile_charts({1: np.float32([0.0, 0.5, 1.0]), 2: np.float32([0.9, 0.9, 0.9])})
    assert [(line.name, line.last) for line in mass.lines] == [("k = 1", "1"), ("k = 2", "0.9")]
    assert [(line.name, line.last) for line in rest.lines] == [("k = 1", "-7"), ("k = 2", "-1")]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"--mask-ratio": "1.5"}, "mask_ratio"),
        ({"--rows": "0"}, "max_rows"),
    ],
)
def test_errors_are_told_without_a_page(
    model: Path, data: Path, tmp_path: Path, capsys: Any, changed: dict[str, str], message: str
) -> None:
    out = tmp_path / "page.html"
    options = {"--model": str(model), "--data": str(data), "--out": str(out), **changed}
    assert main([word for option in options.items() for word in option]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
