"""Every layout loads, and every kind of bad row is named by its line."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sedsft.config import DataConfig
from sedsft.data import DataFileError, DataRowsError
from sedsft.data.sources import read_benchmark, read_prompt_rows, read_sft_rows

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("q"), assistant("a")], "id": 7},
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "response": "a"},
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"prompt": [user("q")], "response": "a", "completion": None},
        {"question": "q", "answer": "a"},
        {"question": "q", "response": "a", "answer": "42"},
        {"problem": "q", "solution": "a", "answer": "42"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": None}], "id": "x_0"},
        {"instruction": "q", "input": "", "output": "a", "text": "Below is an instruction ..."},
        {
            "prompt": [user("q")],
            "reward_model": {"ground_truth": "1"},
            "extra_info": {"index": None, "question": "q", "answer": "a"},
        },
    ],
)
def test_sft_layouts_are_detected_and_agree(tmp_path: Path, row: dict[str, object]) -> None:
    [read] = read_sft_rows(DataConfig(path=write(tmp_path / "rows.jsonl", row))).rows
    assert read.messages == (user("q"), assistant("a"))
    assert (read.answer, read.line) == (None, 1)


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"messages": [user("q")], "answer": "5"}, "5"),
        ({"prompt": "q", "answer": 5}, "5"),
        ({"question": "q", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "5"),
        ({"question": "q", "response": "5"}, "5"),
        ({"prompt": [user("q")], "reward_model": {"ground_truth": "5", "style": "rule"}, "extra_info": None}, "5"),
        ({"prompt": "q", "reward_model": {"ground_truth": 5.0}, "data_source": "unknown"}, "5"),
        ({"prompt": "q", "reward_model": {"ground_truth": 0.5}}, "0.5"),
        ({"prompt": "q", "reward_model": {"ground_truth": ["\\frac{1}{2}"]}}, "\\frac{1}{2}"),
    ],
)
def test_rl_layouts_are_detected_and_agree(tmp_path: Path, row: dict[str, object], gold: str) -> None:
    read = read_prompt_rows(DataConfig(path=write(tmp_path / "rows.jsonl", row)))
    assert [(r.messages, r.answer) for r in read.rows] == [((user("q"),), gold)]
    assert read.skipped == ()


def test_the_same_rows_load_from_json_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": [user(f"q{i}")], "reward_model": {"ground_truth": str(i)}} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    write(tmp_path / "rows.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = [read_prompt_rows(DataConfig(path=str(tmp_path / f"rows.{suffix}"))) for suffix in ("json", "jsonl", "parquet")]
    assert read[0] == read[1] == read[2]
    assert [row.line for row in read[0].rows] == [1, 2, 3]


def test_system_prompt_fills_in_and_max_rows_stops_before_a_bad_row(tmp_path: Path) -> None:
    own = {"role": "system", "content": "own"}
    path = write(
        tmp_path / "rows.jsonl", {"messages": [own, user("q"), assistant("a")]}, {"messages": [user("q"), assistant("a")]}, 5
    )
    rows = read_sft_rows(DataConfig(path=path, system_prompt="given", max_rows=2)).rows
    assert [row.messages[0]["content"] for row in rows] == ["own", "given"]


def test_all_bad_rows_are_listed_by_line_in_one_error(tmp_path: Path) -> None:
    good = json.dumps({"messages": [user("q"), assistant("a")]}).encode()
    lines = {
        1: (good, None),
        2: (b'{"messages": [', "expected JSON, got"),
        3: (b"[1, 2]", "expected an object, got a list of 2"),
        4: (b"", "got an empty line"),
        5: (b'{"text": "x"}', "expected the column messages, got the columns text"),
        6: (b'{"messages": null}', "expected the column messages, got null"),
        7: (b'{"messages": "hi"}', "expected messages to be a list of turns, got a text"),
        8: (b'{"messages": []}', "got an empty list"),
        9: (b'{"messages": [{"role": "user", "content": "q"}]}', "expected an assistant turn, got none"),
        10: (json.dumps({"messages": [user("q"), assistant(" ")]}).encode(), "messages[1] to have content, got an empty text"),
        11: (json.dumps({"messages": [{"role": "bot", "content": "x"}]}).encode(), "got 'bot'"),
        12: (json.dumps({"messages": [user("q"), {"role": "assistant", "content": 3}]}).encode(), "to be a text, got 3"),
        13: (b'{"messages": "\xff"}', "expected UTF-8, got byte 0xff at position 15"),
        14: (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
        15: (json.dumps({"messages": [assistant("a"), user("q")]}).encode(), "expected a user turn before"),
        16: (json.dumps({"messages": [user("q"), {**assistant("a"), "tool_calls": [1]}]}).encode(), "got tool_calls too"),
        17: (good, None),
    }
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines.values()))
    with pytest.raises(DataRowsError) as caught:
        read_sft_rows(DataConfig(path=str(path)))
    reasons = {row.line: row.reason for row in caught.value.bad}
    assert reasons.keys() == set(range(2, 17))
    for line, (_, part) in lines.items():
        assert part is None or part in reasons[line]
    assert "got 15 bad rows" in str(caught.value)
    assert "line 13: expected UTF-8" in str(caught.value)


def test_the_error_lists_twenty_rows_counts_all_and_can_be_pickled(tmp_path: Path) -> None:
    with pytest.raises(DataRowsError, match="got 25 bad rows; mend or remove these rows, or set on_bad_row to skip") as caught:
        read_sft_rows(DataConfig(path=write(tmp_path / "rows.jsonl", *range(25))))
    text = str(caught.value)
    assert "line 20:" in text
    assert "line 21:" not in text
    assert "and 5 more" in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [user("q"), assistant("a")], "answer": "5"}, "to be the user's, got the assistant's"),
        ({"prompt": "q", "reward_model": {"style": "rule"}}, "reward_model.ground_truth to be a text"),
        ({"prompt": "q", "reward_model": "5"}, "expected reward_model to be an object"),
        ({"prompt": "q", "reward_model": {"ground_truth": ["1", "2"]}}, "got a list of 2"),
        ({"prompt": "q", "reward_model": {"ground_truth": True}}, "got True"),
        ({"prompt": "q", "reward_model": {"ground_truth": float("nan")}}, "got nan"),
        ({"prompt": 4, "reward_model": {"ground_truth": "1"}}, "expected prompt to be a list of turns, got 4"),
    ],
)
def test_bad_rl_rows(tmp_path: Path, row: dict[str, object], part: str) -> None:
    with pytest.raises(DataRowsError) as caught:
        read_prompt_rows(DataConfig(path=write(tmp_path / "rows.jsonl", row)))
    assert part in str(caught.value)


def test_rows_with_an_empty_gold_are_skipped_and_told(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "reward_model": {"ground_truth": gold}} for gold in ("1", "", " ", "4")]
    read = read_prompt_rows(DataConfig(path=write(tmp_path / "rows.jsonl", *rows)))
    assert [row.line for row in read.rows] == [1, 4]
    assert [(row.line, row.reason) for row in read.skipped] == [(n, "expected a gold answer, got an empty one") for n in (2, 3)]
    with pytest.raises(DataFileError, match="2 rows with an empty one"):
        read_prompt_rows(DataConfig(path=write(tmp_path / "none.jsonl", *rows[1:3])))


def test_an_unclear_layout_is_refused_with_the_candidates(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", {"prompt": "q", "completion": "a", "question": "q", "answer": "b"})
    with pytest.raises(DataFileError, match="which fit prompt_completion, question_answer; set `format`"):
        read_sft_rows(DataConfig(path=both))
    assert read_sft_rows(DataConfig(path=both, format="question_answer")).rows[0].messages[1] == assistant("b")
    two = write(tmp_path / "two.jsonl", {"prompt": "q", "completion": "a", "response": "b"})
    with pytest.raises(DataRowsError, match="one of completion and response, got both"):
        read_sft_rows(DataConfig(path=two))
    unknown = write(tmp_path / "unknown.jsonl", {"ask": "q", "reply": "a"})
    with pytest.raises(DataFileError, match="got ask, reply"):
        read_sft_rows(DataConfig(path=unknown))
    with pytest.raises(DataFileError, match="expected a layout for RL"):
        read_prompt_rows(DataConfig(path=both, format="alpaca"))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("rows.jsonl", b"", "got an empty file"),
        ("rows.json", b"[]", "got an empty file"),
        ("rows.json", b"{}", "expected a list of rows"),
        ("rows.json", b"[1,", "expected JSON, got"),
        ("rows.parquet", b"PAR1 not really", "expected a readable parquet file"),
        ("rows.csv", b"a,b", "expected a file ending in"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, part: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError) as caught:
        read_sft_rows(DataConfig(path=str(tmp_path / name)))
    assert part in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="does not exist"):
        read_sft_rows(DataConfig(path=str(tmp_path / "none.jsonl")))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataFileError, match=r"expected files ending in \.jsonl"):
        read_sft_rows(DataConfig(path=str(tmp_path / "folder.jsonl")))


def test_a_byte_order_mark_is_no_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "q", "completion": "a"}\r\n')
    assert len(read_sft_rows(DataConfig(path=str(tmp_path / "rows.jsonl"))).rows) == 1


def test_benchmark_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", {"id": "x", "problem": "p", "answer": 3}, {"problem": "r", "answer": "s"})
    rows = read_benchmark(path, max_rows=1, system_prompt="be brief")
    assert [(row.messages, row.answer) for row in rows] == [(({"role": "system", "content": "be brief"}, user("p")), "3")]
    with pytest.raises(DataRowsError, match="line 1: expected the column problem"):
        read_benchmark(write(tmp_path / "c.jsonl", {"question": "p", "answer": "3"}))
    with pytest.raises(DataRowsError, match="answer to have content"):
        read_benchmark(write(tmp_path / "d.jsonl", {"problem": "p", "answer": ""}))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not beside the repository")
def test_published_files_load_unmodified() -> None:
    prompts = read_prompt_rows(DataConfig(path=str(SHARED / "train" / "sed_rl_math_2069.parquet")))
    assert (len(prompts.rows), [row.line for row in prompts.skipped]) == (2068, [1603])
    assert (prompts.rows[0].answer, prompts.rows[-1].answer) == ("42409", "63")
    assert len(read_sft_rows(DataConfig(path=str(SHARED / "train" / "gsm8k_train.jsonl"))).rows) == 7473
    assert [len(read_benchmark(str(SHARED / "benchmarks" / f"{name}.jsonl"))) for name in ("aime24", "gsm8k")] == [30, 1319]
