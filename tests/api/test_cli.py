"""The command line against a running service over real HTTP."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from api import cli, watch
from api.app import create_app
from api.backends.base import Observation
from api.settings import Settings
from sedsft.tasks.tiny_model import countdown_model, countdown_tokenizer
from services.checkpoints import CheckpointInfo, begin, on_disk, publish, state_file
from services.rundir import Progress, Result, RunWriter, StatusReason

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def served(settings: Settings, cluster: Any, monkeypatch: Any) -> Iterator[Settings]:
    """The service on a free port, found by the command line through the environment."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    monkeypatch.setenv("SEDSFT_HOME", str(settings.home))
    monkeypatch.setenv("SEDSFT_PORT", str(held.getsockname()[1]))
    monkeypatch.setattr(watch, "POLL_S", 0.05)
    server = uvicorn.Server(uvicorn.Config(create_app(settings, (cluster, cluster)), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield settings
    server.should_exit = True
    thread.join()
    held.close()


@pytest.fixture
def sedsft(served: Settings, monkeypatch: Any, capsys: Any) -> Command:
    """Run a command: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sedsft", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def spec_file(tmp_path: Path, sft_job: dict[str, Any]) -> str:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(sft_job))
    return str(path)


def test_dry_run_stores_nothing(sedsft: Command, spec_file: str) -> None:
    code, out, _ = sedsft("submit", spec_file, "--dry-run")
    assert code == 0
    assert json.loads(out)["plan"]["peak"] == {"cpus": 1.0, "gpus": 0}
    assert json.loads(sedsft("jobs", "--json")[1]) == []


def test_resize(sedsft: Command, tmp_path: Path, pipeline_job: dict[str, Any], cluster: Any) -> None:
    spec = tmp_path / "rl.json"
    spec.write_text(json.dumps(pipeline_job))
    job_id = json.loads(sedsft("submit", str(spec), "--json")[1])["id"]
    code, _, err = sedsft("resize", job_id, "--rollout-workers", "2")
    assert code == 1
    assert "no_rl_stage" in err
    while not cluster.submitted:
        time.sleep(0.01)
    writer = RunWriter(cluster.submitted[0].folder)
    writer.status(Progress("rl", 1, 3, "rollout", 1, 2, engines={"wanted": 1, "alive": 1, "ready": 0}))
    while (answer := sedsft("resize", job_id, "--rollout-workers", "2"))[0]:
        time.sleep(0.02)
    assert answer[1] == "2 rollout workers wanted; 1 live, 0 serve now\n"
    assert json.loads(sedsft("show", job_id, "--json")[1])["rollout"]["wanted"] == 2
    writer.close()


def test_submit_show_cancel(sedsft: Command, spec_file: str, cluster: Any) -> None:
    job = json.loads(sedsft("submit", spec_file, "--json")[1])
    assert job["id"] in json.dumps(json.loads(sedsft("jobs", "--json")[1]))
    assert "first" in sedsft("jobs")[1]
    assert sedsft("cancel", job["id"])[1].strip() in ("cancelling", "cancelled")
    shown = json.loads(sedsft("show", job["id"], "--json")[1])
    assert [event["kind"] for event in shown["events"]][:1] == ["created"]
    assert job["id"] in sedsft("show", job["id"])[1]


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_watch_until_the_end(sedsft: Command, spec_file: str, cluster: Any, status: Any) -> None:
    def drive() -> None:
        while not cluster.submitted:
            time.sleep(0.01)
        run = cluster.submitted[0]
        cluster.runs[run.name] = Observation("running")
        writer = RunWriter(run.folder)
        (run.folder / "driver.log").write_text("hello from the driver\n")
        writer.status(Progress("sft", 0, 1, "training", 1, 2))
        writer.metrics("sft", 1, {"loss": 0.5})
        time.sleep(0.5)
        reason = StatusReason("diverged", "expected a finite loss [got nan]") if status == "failed" else None
        (run.folder / "report.html").write_text("<html>")
        writer.result(Result(status, reason))
        writer.close()
        cluster.runs[run.name] = Observation("ended")

    driver = threading.Thread(target=drive)
    driver.start()
    code, out, _ = sedsft("submit", spec_file, "--watch")
    driver.join()
    assert code == (0 if status == "succeeded" else 1)
    assert status in out
    assert ("diverged: expected a finite loss [got nan]" in out) == (status == "failed")
    job_id = json.loads(sedsft("jobs", "--json")[1])[0]["id"]
    assert sedsft("logs", job_id, "-f")[1] == "hello from the driver\n"
    target = Path(spec_file).with_name("r.html")
    assert sedsft("report", job_id, "-o", str(target))[0] == 0
    assert target.read_text() == "<html>"


def test_errors_are_told_without_a_trace(sedsft: Command, tmp_path: Path, sft_job: dict[str, Any], monkeypatch: Any) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(sft_job | {"surprise": 1, "model": {"path": "none"}}))
    code, _, err = sedsft("submit", str(path))
    assert code == 1
    assert "/surprise" in err
    assert "Traceback" not in err
    path.write_text("{")
    assert "expected JSON" in sedsft("submit", str(path))[2]
    assert "not there" in " ".join(sedsft("show", "job_x")[2].split())
    monkeypatch.setenv("SEDSFT_PORT", "9")
    code, _, err = sedsft("jobs")
    assert code == 1
    assert "sedsft up" in " ".join(err.split())
    monkeypatch.setenv("SEDSFT_HOST", "0.0.0.0")
    assert "SEDSFT_ALLOW_REMOTE" in sedsft("jobs")[2]


@pytest.mark.slow
def test_explore_draws_a_page_without_the_service(monkeypatch: Any, tmp_path: Path, capfd: Any) -> None:
    countdown_model(0, init_std=0.3).save_pretrained(tmp_path / "model")
    countdown_tokenizer().save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "3 7 2 5>24"}, {"role": "assistant", "content": "3*7=21,5-2=3,21+3=24"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    for data, code, told in (("rows.jsonl", 0, "page.html"), ("none.jsonl", 1, "none.jsonl")):
        page = tmp_path / str(code) / "page.html"
        page.parent.mkdir()
        paths = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / data), "--out", str(page)]
        monkeypatch.setattr(sys, "argv", ["sedsft", "explore", *paths, "--mask-ratio", "0.5"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert int(ended.value.code or 0) == code
        assert told in "".join(capfd.readouterr())
        assert page.exists() == (code == 0)


@pytest.mark.slow
def test_check_data_reports_without_the_service(monkeypatch: Any, tmp_path: Path, capfd: Any) -> None:
    countdown_tokenizer().save_pretrained(tmp_path / "model")
    row = {"prompt": "3 7>10", "completion": "7+3=10"}
    sft = {"objective": {"type": "ce"}, "data": {"path": str(tmp_path / "rows.jsonl")}, "steps": 1}
    (tmp_path / "spec.json").write_text(json.dumps({"type": "sft", "model": {"path": str(tmp_path / "model")}, "sft": sft}))
    for last, code, told in ("", 0, "2 read = 2 kept + 0 skipped"), ("[]", 1, "line 3: not_an_object"):
        (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(row) + "\n") + last)
        monkeypatch.setattr(sys, "argv", ["sedsft", "check-data", str(tmp_path / "spec.json"), "-o", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert int(ended.value.code or 0) == code
        assert told in "".join(capfd.readouterr())
        assert (tmp_path / "out" / "sft" / "data_report.html").exists()


def test_export_copies_a_verified_model(monkeypatch: Any, tmp_path: Path, capfd: Any) -> None:
    folder = begin(tmp_path, 3, attempt=1)
    (folder / "trainer").mkdir()
    names = ["config.json", state_file(0)]
    for name in names:
        (folder / name).write_text("{}")
    checkpoint = publish(folder, [on_disk(folder, name) for name in names], CheckpointInfo("sft", 3, "0" * 64, 9)).path
    for code, told in (0, "out: 1 files"), (1, "never replaces files"):
        monkeypatch.setattr(sys, "argv", ["sedsft", "export", checkpoint, str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert int(ended.value.code or 0) == code
        assert told in "".join(capfd.readouterr())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
