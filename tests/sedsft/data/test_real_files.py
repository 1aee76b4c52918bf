"""Published files load as they are, and a file with every kind of bad row gives a report that names each by line and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sedsft.config import DataConfig
from sedsft.data import DataRowsError
from sedsft.data.encoding import EncodeSettings
from sedsft.data.ingest import store_rows
from sedsft.data.lengths import LengthLimit
from sedsft.data.report import DataReport, build_data_report
from sedsft.data.sources import read_benchmark, read_prompt_rows, read_sft_rows
from sedsft.tasks.tiny_model import countdown_tokenizer

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def shared(name: str) -> DataConfig:
    if not (SHARED / name).exists():
        pytest.skip(f"needs the shared file {name}")
    return DataConfig(path=str(SHARED / name))


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


# ------------------------------------------------------------------------------------------------- good files


def test_the_authors_parquet() -> None:
    prompts = read_prompt_rows(shared("train/sed_rl_math_2069.parquet"))
    # One row's gold answer is empty.
    assert (len(prompts.rows), [(row.line, row.kind) for row in prompts.skipped]) == (2068, [(1603, "empty_gold")])
    assert prompts.rows[0].messages[-1]["role"] == "user"


def test_gsm8k_rows() -> None:
    read = read_sft_rows(shared("train/gsm8k_train.jsonl"))
    assert (len(read.rows), read.skipped) == (7473, ())
    asked, answered = read.rows[0].messages
    assert asked["content"].startswith("Natalia sold clips to 48 of her friends")
    assert answered["content"].endswith("#### 72")


@pytest.mark.parametrize(("name", "rows"), [("gsm8k", 1319), ("math500", 500), ("olympiadbench", 675), ("aime24", 30)])
def test_benchmarks(name: str, rows: int) -> None:
    assert len(read_benchmark(shared(f"benchmarks/{name}.jsonl").path)) == rows


def test_sharegpt_alpaca_and_tokens_in_the_shape_they_are_published_in(tmp_path: Path) -> None:
    sharegpt = [
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": "Name a prime."},
                {"from": "gpt", "value": "Seven."},
                {"from": "human", "value": "Another."},
                {"from": "gpt", "value": "Eleven.", "markdown": None},
            ],
        }
    ]
    alpaca = [
        {"instruction": "Name a prime.", "input": "", "output": "Seven."},
        {"instruction": "Add the numbers.", "input": "3, 4", "output": "7", "text": "Below is an instruction ..."},
    ]
    (tmp_path / "sharegpt.json").write_text(json.dumps(sharegpt, indent=2), encoding="utf-8")
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca, indent=4), encoding="utf-8")
    tokens = {
        "input_ids": [[1, 5, 9, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 0, 0]],
        "labels": [[-100, -100, 9, 2, -100, -100]],
    }
    pq.write_table(pa.table(tokens), tmp_path / "tokens.parquet")
    [conversation] = read_sft_rows(DataConfig(path=str(tmp_path / "sharegpt.json"))).rows
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant", "user", "assistant"]
    rows = read_sft_rows(DataConfig(path=str(tmp_path / "alpaca.json"))).rows
    assert [row.messages[0]["content"] for row in rows] == ["Name a prime.", "Add the numbers.\n\n3, 4"]
    [example] = read_sft_rows(DataConfig(path=str(tmp_path / "tokens.parquet"))).examples
    assert (example.input_ids_T.tolist(), example.trained_T.tolist()) == ([1, 5, 9, 2], [False, False, True, True])


# -------------------------------------------------------------------------------------------------- bad rows

GOOD = json.dumps({"messages": [user("3 7>10"), assistant("7+3=10")]}).encode()


def messages(*turns: object) -> bytes:
    return json.dumps({"messages": turns}).encode()


BAD_MESSAGES: dict[int, tuple[bytes, str, str]] = {
    2: (b'{"messages": [', "invalid_json", "expected JSON, got"),
    3: (b"[1, 2]", "not_an_object", "expected an object, got a list of 2"),
    4: (b"", "empty_line", "got an empty line"),
    5: (b'{"text": "x"}', "missing_column", "expected the column messages, got the columns text"),
    6: (b'{"messages": null}', "null_column", "expected the column messages, got null"),
    7: (b'{"messages": NaN}', "wrong_type", "expected messages to be a list of turns, got nan"),
    8: (b'{"messages": []}', "no_turns", "got an empty list"),
    9: (messages(user("3 7>10")), "no_assistant_turn", "expected an assistant turn, got none"),
    10: (messages(assistant("1"), user("2")), "turn_order", "expected a user turn before the first assistant turn"),
    11: (messages(user("1"), {"role": "bot", "content": "2"}), "unknown_role", "got 'bot'"),
    12: (messages(user("1"), assistant(None)), "wrong_type", "the content of messages[1] to be a text, got null"),
    13: (messages(user("1"), assistant(" ")), "empty_text", "messages[1] to have content, got an empty text"),
    14: (messages(user("1"), assistant(3)), "wrong_type", "messages[1] to be a text, got 3"),
    15: (b'{"messages": "\xff"}', "invalid_utf8", "expected UTF-8, got byte 0xff"),
    16: (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_unicode", "got a lone surrogate"),
    17: (messages(user("1"), assistant("2") | {"tool_calls": [1]}), "unknown_field", "got tool_calls too"),
    18: (messages({"role": "system", "content": "1"}, user("2"), assistant("3")), "template_refused", "refuses it"),
    19: (messages(user("1"), assistant("7+3=10,10-2=8,8*3=24")), "too_long", "21 tokens"),
}
BAD_TOKENS: dict[int, tuple[dict[str, object], str, str]] = {
    2: ({"input_ids": [1, 5], "labels": [-100]}, "label_count", "expected as many labels as input_ids, got 1 and 2"),
    3: ({"input_ids": [1, 5], "labels": [-100, 6]}, "label_mismatch", "expected labels[1] to be -100 or input_ids[1] = 5"),
    4: ({"input_ids": [1, 5], "labels": [1, -100]}, "no_trained_token", "expected a trained token behind the first"),
    5: ({"input_ids": [1, -5], "labels": [-100, -5]}, "not_a_token_id", "expected input_ids[1] to be a whole number from 0"),
    6: ({"input_ids": [1, 5], "labels": [-100, 5], "attention_mask": [0, 1]}, "attention_mask", "expected attention_mask"),
    7: ({"input_ids": "1 5", "labels": [-100, 5]}, "wrong_type", "expected input_ids to be a list of whole numbers"),
}


def settings(tmp_path: Path) -> EncodeSettings:
    countdown_tokenizer().save_pretrained(tmp_path / "model")
    return EncodeSettings(tmp_path / "model", LengthLimit(20, "drop"))


def report_on(path: Path, tmp_path: Path) -> DataReport:
    config = DataConfig(path=str(path), on_bad_row="skip")
    rows = store_rows(tmp_path / "rows.arrow", config, settings(tmp_path), 1, lambda done: None)
    return build_data_report(rows, countdown_tokenizer())


def check(report: DataReport, bad: dict[int, tuple[object, str, str]], rows: int) -> None:
    assert (report.rows_read, report.kept) == (rows, rows - len(bad))
    assert report.skipped + report.dropped == len(bad)
    assert {row.line: row.kind for row in report.bad_rows} == {line: kind for line, (_, kind, _) in bad.items()}
    for row in report.bad_rows:
        assert bad[row.line][2] in row.reason
    counted = {reason.kind: reason.count for reason in report.reasons}
    assert sum(counted.values()) == len(bad)
    assert set(counted) == {kind for _, kind, _ in bad.values()}
    assert all(reason.remedy for reason in report.reasons)


def test_a_file_of_bad_conversations_has_every_one_named_by_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = {1: GOOD, **{line: content for line, (content, _, _) in BAD_MESSAGES.items()}, 20: GOOD}
    path.write_bytes(b"\n".join(lines[line] for line in range(1, 21)))
    report = report_on(path, tmp_path)
    check(report, BAD_MESSAGES, 20)
    assert (report.skipped, report.dropped, report.duplicates) == (17, 1, 1)
    assert len(report.reasons) >= 12


def test_a_file_of_bad_tokens_has_every_one_named_by_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}
    rows = [good, *(row for row, _, _ in BAD_TOKENS.values())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    check(report_on(path, tmp_path), BAD_TOKENS, 7)


def test_token_ids_of_another_tokenizer_are_refused_by_line_since_all_rows_are_suspect(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"input_ids": [1, token], "labels": [-100, token]} for token in (5, len(countdown_tokenizer()), 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataRowsError) as caught:
        report_on(path, tmp_path)
    assert [(row.line, row.kind) for row in caught.value.bad] == [(2, "foreign_token_id")]
