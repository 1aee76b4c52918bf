"""Every figure of a data report against counts by hand, on rows of a tokenizer whose tokens are words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from sedsft.config import DataConfig
from sedsft.data import BadRowKind
from sedsft.data.encoding import EncodeSettings
from sedsft.data.ingest import StoredRows, store_rows
from sedsft.data.lengths import LengthLimit, OnTooLong
from sedsft.data.overlap import OverlapScan
from sedsft.data.report import REMEDIES, RENDERED_TOKENS, Bin, Duplicate, Reason, Segment, build_data_report, render
from sedsft.records import Example
from sedsft.tasks.tiny_model import countdown_tokenizer

# 7 tokens, <bos> 3 7 2 > 8 : and 12, 7 + 3 = 10 , 10 - 2 = 8 <eos>
QUESTION, ANSWER = "3 7 2>8", "7+3=10,10-2=8"
# 6 tokens, <bos> 3 7 > 10 : and 6, 7 + 3 = 10 <eos>
SHORT_QUESTION, SHORT_ANSWER = "3 7>10", "7+3=10"


def stored(tmp_path: Path, lines: list[object], on_too_long: OnTooLong = "drop", max_length: int = 100) -> StoredRows:
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    countdown_tokenizer().save_pretrained(model)
    settings = EncodeSettings(model, LengthLimit(max_length, on_too_long))
    config = DataConfig(path=str(data), on_bad_row="skip")
    return store_rows(tmp_path / "rows.arrow", config, settings, 1, lambda done: None)


def row(question: str = QUESTION, answer: str = ANSWER) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def test_sums_add_up_and_figures_are_those_by_hand(tmp_path: Path) -> None:
    short = row(SHORT_QUESTION, SHORT_ANSWER)
    rows = stored(tmp_path, [row(), "{\n", short, row(), "[]\n", row(), "{\n"])
    report = build_data_report(rows, countdown_tokenizer())
    assert (report.rows_read, report.kept, report.skipped, report.dropped, report.cut) == (7, 4, 3, 0, 0)
    assert report.reasons == (
        Reason("invalid_json", 2, "write one JSON object per line"),
        Reason("not_an_object", 1, "write each row as a JSON object"),
    )
    assert [(bad.line, bad.kind) for bad in report.bad_rows] == [(2, "invalid_json"), (5, "not_an_object"), (7, "invalid_json")]
    # 19 + 12 + 19 + 19 tokens, 12 + 6 + 12 + 12 of them trained.
    assert (report.tokens.total, report.trained.total, report.trained_share) == (69, 42, 42 / 69)
    tokens = report.tokens
    assert (tokens.mean, tokens.smallest, tokens.median, tokens.p95, tokens.largest) == (17.25, 12, 19, 19, 19)
    assert tokens.histogram == tuple(Bin(n, n, {12: 1, 19: 3}.get(n, 0)) for n in range(12, 20))
    assert (report.trained.smallest, report.trained.median, report.trained.largest) == (6, 12, 12)
    assert report.duplicates == 2
    assert report.listed_duplicates == (Duplicate("line 4", "line 1"), Duplicate("line 6", "line 1"))
    assert report.overlap == ()
    assert report.source == rows.data.path


def test_long_rows_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    lines: list[object] = [row(SHORT_QUESTION, SHORT_ANSWER), row(), "\n"]
    dropped = build_data_report(stored(tmp_path, lines, "drop", 15), countdown_tokenizer())
    assert (dropped.rows_read, dropped.kept, dropped.skipped, dropped.dropped, dropped.cut) == (3, 1, 1, 1, 0)
    assert [(bad.line, bad.kind) for bad in dropped.bad_rows] == [(3, "empty_line"), (2, "too_long")]
    assert {reason.kind: reason.count for reason in dropped.reasons} == {"empty_line": 1, "too_long": 1}
    cut = build_data_report(stored(tmp_path, lines, "cut", 15), countdown_tokenizer())
    assert (cut.rows_read, cut.kept, cut.skipped, cut.dropped, cut.cut) == (3, 2, 1, 0, 1)
    assert [(bad.line, bad.reason) for bad in cut.cut_rows] == [(2, "19 tokens")]
    assert (cut.tokens.total, cut.tokens.largest, cut.trained.total) == (12 + 15, 15, 6 + 8)


def test_rendered_rows_show_special_tokens_and_the_mask(tmp_path: Path) -> None:
    rows = stored(tmp_path, [row(), row(SHORT_QUESTION, SHORT_ANSWER), row(), row()])
    report = build_data_report(rows, countdown_tokenizer())
    assert [(shown.why, shown.place, shown.tokens) for shown in report.rendered] == [
        ("first, longest", "line 1", 19),
        ("shortest", "line 2", 12),
        ("another", "line 3", 19),
    ]
    assert report.rendered[1].segments == (
        Segment("<bos> 3 7 > 10 :", 6, trained=False),
        Segment("7 + 3 = 10 <eos>", 6, trained=True),
    )


def test_a_long_row_is_broken_off_and_the_first_token_is_never_trained(tmp_path: Path) -> None:
    [short] = stored(tmp_path, [row(SHORT_QUESTION, SHORT_ANSWER)]).examples
    trained_T = short.trained_T.copy()
    trained_T[0] = True
    long = Example(short.input_ids_T.repeat(200), trained_T.repeat(200), 9, "part.jsonl")
    shown = render(long, "first", countdown_tokenizer())
    assert (shown.place, shown.tokens, shown.left_out) == ("part.jsonl, line 9", 2400, 2400 - RENDERED_TOKENS)
    assert sum(segment.tokens for segment in shown.segments) == RENDERED_TOKENS
    assert (shown.segments[0].tokens, shown.segments[0].trained) == (1, False)


def test_wide_distributions_have_twenty_bins_that_hold_every_row(tmp_path: Path) -> None:
    rows = stored(tmp_path, [row(QUESTION, ",".join(["1"] * n)) for n in range(1, 42)])
    # 7 tokens of the question, 2 n - 1 of the answer and one end token: 9, 11 ... 89.
    tokens = build_data_report(rows, countdown_tokenizer()).tokens
    assert (tokens.smallest, tokens.largest, tokens.median, tokens.p95) == (9, 89, 49, 85)
    assert [(own.low, own.high, own.rows) for own in tokens.histogram[:2]] == [(9, 13, 3), (14, 18, 2)]
    assert sum(own.rows for own in tokens.histogram) == 41
    assert len(tokens.histogram) <= 20


def test_overlap_is_looked_for_in_what_is_trained_on(tmp_path: Path) -> None:
    scan = OverlapScan({"countdown": ["3 7>10", "9 9>18"]})
    rows = stored(tmp_path, [row(), row(SHORT_QUESTION, SHORT_ANSWER)])
    [overlap] = build_data_report(rows, countdown_tokenizer(), scan).overlap
    assert (overlap.problems, overlap.exact, overlap.ngram, overlap.listed[0].line) == (2, 1, 1, 2)


def test_the_report_is_json_and_every_kind_has_a_remedy(tmp_path: Path) -> None:
    report = build_data_report(stored(tmp_path, [row(), "{\n"]), countdown_tokenizer(), OverlapScan({"b": ["1"]}))
    value = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (value["rows_read"], value["bad_rows"][0]["kind"], value["overlap"][0]["share"]) == (2, "invalid_json", 0.0)
    assert set(REMEDIES) == set(get_args(BadRowKind))
    assert report.key_figures()["reasons"] == {"invalid_json": 1}


@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_are_all_shown(tmp_path: Path, rows: int) -> None:
    assert len(build_data_report(stored(tmp_path, [row()] * rows), countdown_tokenizer()).rendered) == rows
