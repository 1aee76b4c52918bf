"""ShareGPT, Alpaca, verl and tokenized rows; renamed columns; rows that are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.config import DataConfig
from sedsft.data import BadRow, DataFileError, DataRowsError
from sedsft.data.layouts import detect, tokens
from sedsft.data.sources import iter_sft_rows, read_prompt_rows, read_sft_rows
from sedsft.data.values import Malformed
from sedsft.records import Example, Row

QA = {"question": "q", "answer": "a"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(speaker: str, value: object) -> dict[str, object]:
    return {"from": speaker, "value": value}


def messages(tmp_path: Path, row: object, **settings: Any) -> tuple[dict[str, str], ...]:
    [read] = read_sft_rows(DataConfig(path=write(tmp_path / "rows.jsonl", row), **settings)).rows
    return read.messages


def reason(tmp_path: Path, row: object, **settings: Any) -> str:
    with pytest.raises(DataRowsError) as caught:
        read_sft_rows(DataConfig(path=write(tmp_path / "rows.jsonl", row), **settings))
    return caught.value.bad[0].reason


def test_sharegpt(tmp_path: Path) -> None:
    talk = [said("system", "s"), said("human", "q"), said("gpt", "a"), said("human", "r"), said("gpt", "b")]
    expected = (turn("system", "s"), turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b"))
    assert messages(tmp_path, {"id": "x", "conversations": talk}) == expected
    assert messages(tmp_path, {"system": "s", "conversations": talk[1:]}) == expected
    assert messages(tmp_path, {"system": "", "conversations": talk[1:]}) == expected[1:]
    assert "system turn and the column system" in reason(tmp_path, {"system": "s", "conversations": talk})
    assert "conversations[1] to be one of system, human, gpt" in reason(
        tmp_path, {"conversations": [said("human", "q"), said("function_call", "{}")]}
    )
    assert "the content of conversations[0]" in reason(tmp_path, {"conversations": [said("human", None)]})
    assert "from and value only, got weight" in reason(tmp_path, {"conversations": [{**said("human", "q"), "weight": 0}]})


def test_alpaca(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert messages(tmp_path, row) == (turn("user", "Add.\n\n1 2"), turn("assistant", "3"))
    full = {**row, "input": None, "system": "s", "history": [["q", "a"]]}
    assert messages(tmp_path, full) == (
        turn("system", "s"),
        turn("user", "q"),
        turn("assistant", "a"),
        turn("user", "Add."),
        turn("assistant", "3"),
    )
    assert "output to have content" in reason(tmp_path, {**row, "output": ""})
    assert "input to be a text, got 3" in reason(tmp_path, {**row, "input": 3})
    assert "history[0] to be a pair" in reason(tmp_path, {**row, "history": [["q"]]})


def test_verl_parquet_with_null_typed_fields(tmp_path: Path) -> None:
    row = {
        "data_source": "math",
        "prompt": [turn("user", "q")],
        "reward_model": {"ground_truth": "1", "style": None},
        "extra_info": {"index": None, "question": "q", "answer": "a"},
        "nothing": None,
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert pq.read_schema(tmp_path / "x.parquet").field("nothing").type == pa.null()
    [sft] = read_sft_rows(DataConfig(path=str(tmp_path / "x.parquet"))).rows
    assert sft.messages == (turn("user", "q"), turn("assistant", "a"))
    [prompt] = read_prompt_rows(DataConfig(path=str(tmp_path / "x.parquet"))).rows
    assert (prompt.messages, prompt.answer) == ((turn("user", "q"),), "1")


def test_tokens_end_with_the_last_trained_one(tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8, 0, 0], "labels": [-100, -100, 7, 8, -100, -100], "attention_mask": [1, 1, 1, 1, 0, 0]}
    read = read_sft_rows(DataConfig(path=write(tmp_path / "x.jsonl", row, {"input_ids": [1, 2], "labels": [1, 2]})))
    assert read.rows == ()
    first, second = read.examples
    assert (first.input_ids_T.tolist(), first.trained_T.tolist()) == ([5, 6, 7, 8], [False, False, True, True])
    assert (first.input_ids_T.dtype, first.trained_T.dtype, first.line, first.file) == (np.int32, np.bool_, 1, "")
    assert (second.input_ids_T.tolist(), second.trained_T.tolist(), second.line) == ([1, 2], [False, True], 2)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels[1] to be -100 or input_ids[1] = 2, got 3"),
        ({"input_ids": [1, 2], "labels": [2]}, "as many labels as input_ids, got 1 and 2"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "expected a trained token behind the first"),
        ({"input_ids": [], "labels": []}, "expected a trained token behind the first"),
        ({"input_ids": [1, -2], "labels": [-100, -100]}, "input_ids[1] to be a whole number from 0 to 2147483647, got -2"),
        ({"input_ids": [1, 2**31], "labels": [-100, -100]}, "input_ids[1] to be a whole number"),
        ({"input_ids": [1, 2.0], "labels": [-100, 2]}, "input_ids[1] to be a whole number"),
        ({"input_ids": [1, True], "labels": [-100, 1]}, "got True"),
        ({"input_ids": "12", "labels": [-100, 2]}, "input_ids to be a list of whole numbers, got a text"),
        ({"input_ids": [0, 1], "labels": [-100, 1], "attention_mask": [0, 1]}, "got padding there"),
        ({"input_ids": [0, 1], "labels": [-100, 1], "attention_mask": [1]}, "another length"),
    ],
)
def test_tokens_that_do_not_fit(tmp_path: Path, row: dict[str, Any], part: str) -> None:
    assert part in reason(tmp_path, row)


def test_tokens_have_no_system_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"input_ids": [1, 2], "labels": [-100, 2]})
    for layout in ("auto", "tokens"):
        with pytest.raises(DataFileError, match="expected no system_prompt with the layout tokens"):
            read_sft_rows(DataConfig(path=path, system_prompt="s", format=layout))  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=12))
def test_tokens_keep_the_labels(pairs: list[tuple[int, bool]]) -> None:
    ids = [token for token, _ in pairs]
    labels = [token if trained else -100 for token, trained in pairs]
    try:
        ids_T, trained_T = tokens({"input_ids": ids, "labels": labels})
    except Malformed:
        assert not any(trained for _, trained in pairs[1:])
        return
    assert ids_T.tolist() == ids[: len(ids_T)]
    assert trained_T[-1]
    assert np.where(trained_T, ids_T, -100)[1:].tolist() == labels[1 : len(ids_T)]
    assert set(labels[len(ids_T) :]) <= {-100}


def test_names_of_columns_can_always_be_shown(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r"got \\ud800, c0, .* and 6 more") as caught:
        read_sft_rows(DataConfig(path=write(tmp_path / "x.jsonl", {"\ud800": 1} | {f"c{index}": 1 for index in range(25)})))
    assert str(caught.value).encode()


def test_several_candidates_are_named_in_their_order() -> None:
    everything: dict[str, object] = {
        "text": "t",
        "extra_info": {"question": "q", "answer": "a"},
        "output": "a",
        "instruction": "q",
        **QA,
        "completion": "a",
        "prompt": "q",
        "conversations": [],
        "messages": [],
        "labels": [],
        "input_ids": [],
    }
    order = "tokens, messages, sharegpt, prompt_completion, question_answer, alpaca, verl"
    with pytest.raises(DataFileError, match=f"which fit {order}; set `format`"):
        detect(everything, "SFT", "x")


def test_columns_are_renamed(tmp_path: Path) -> None:
    row = {"query": "q", "meta": {"reply": "a"}, "answer": "42"}
    columns = {"question": "query", "response": "meta.reply"}
    assert messages(tmp_path, row, columns=columns) == (turn("user", "q"), turn("assistant", "a"))
    # `answer` is the question here and so no answer.
    swapped = messages(tmp_path, {"answer": "q", "question": "a"}, columns={"question": "answer", "answer": "question"})
    assert swapped == (turn("user", "q"), turn("assistant", "a"))
    missing = reason(tmp_path, {"other": 1, "question": "q"}, columns=columns, format="question_answer")
    assert missing.endswith("got the columns other, question being query, response being meta.reply")
    with pytest.raises(DataFileError, match=r"columns of the layout question_answer .* got prompt"):
        messages(tmp_path, QA, columns={"prompt": "answer2"})


def test_twelve_kinds_of_bad_rows_are_skipped_and_listed(tmp_path: Path) -> None:
    human, gpt = said("human", "q"), said("gpt", "a")
    bad: dict[int, tuple[bytes, str]] = {
        2: (b'{"conversations": [', "expected JSON, got"),
        3: (b"", "got an empty line"),
        4: (b"[1, 2]", "expected an object, got a list of 2"),
        5: (b'{"conversations": "\xff"}', "expected UTF-8, got byte 0xff"),
        6: (b'{"text": "x"}', "expected the column conversations, got the columns text"),
        7: (b'{"conversations": null}', "expected the column conversations, got null"),
        8: (b'{"conversations": []}', "got an empty list"),
        9: (json.dumps({"conversations": [human]}).encode(), "expected an assistant turn"),
        10: (json.dumps({"conversations": [gpt, human]}).encode(), "expected a user turn before"),
        11: (json.dumps({"conversations": [human, said("gpt", " ")]}).encode(), "got an empty text"),
        12: (json.dumps({"conversations": [human, said("bot", "a")]}).encode(), "got 'bot'"),
        13: (json.dumps({"conversations": [human, said("gpt", 3)]}).encode(), "to be a text, got 3"),
    }
    good = json.dumps({"conversations": [human, gpt]}).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good, *(line for line, _ in bad.values()), good]))
    read = read_sft_rows(DataConfig(path=str(path), on_bad_row="skip"))
    assert [row.line for row in read.rows] == [1, 14]
    assert [row.line for row in read.skipped] == list(bad)
    for row in read.skipped:
        assert bad[row.line][1] in row.reason
    with pytest.raises(DataRowsError, match="got 12 bad rows") as caught:
        read_sft_rows(DataConfig(path=str(path)))
    assert caught.value.bad == read.skipped
    assert all(f"\n  line {line}: " in str(caught.value) for line in bad)


def test_rows_of_several_files_carry_their_file_and_come_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", QA)
    write(tmp_path / "a.jsonl", QA, {"question": "q", "answer": ""})
    config = DataConfig(path=str(tmp_path), on_bad_row="skip")
    kinds = [(type(item), item.file, item.line) for item in iter_sft_rows(config)]
    assert kinds == [(Row, "a.jsonl", 1), (BadRow, "a.jsonl", 2), (Row, "b.jsonl", 1)]
    with pytest.raises(DataRowsError, match=r"a\.jsonl, line 2: expected answer to have content"):
        read_sft_rows(config.model_copy(update={"on_bad_row": "error"}))
    tokenized = {"input_ids": [1, 2], "labels": [-100, 2]}
    one = DataConfig(path=write(tmp_path / "c.jsonl", tokenized))
    assert [type(item) for item in iter_sft_rows(one)] == [Example]


def test_nothing_but_bad_rows_is_an_error_even_if_they_may_be_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "q", "answer": ""})
    with pytest.raises(DataRowsError, match="got 1 bad row; mend or remove these rows:"):
        read_sft_rows(DataConfig(path=path, on_bad_row="skip"))


def test_prompts_may_be_skipped_too(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"prompt": "q", "answer": answer} for answer in ("", {}, "1")))
    read = read_prompt_rows(DataConfig(path=path, on_bad_row="skip"))
    assert [row.line for row in read.rows] == [3]
    assert [(row.line, row.reason[:22]) for row in read.skipped] == [
        (1, "expected a gold answer"),
        (2, "expected answer to be "),
    ]
    with pytest.raises(DataRowsError, match="got 1 bad row"):
        read_prompt_rows(DataConfig(path=path))
