"""Every kind of bad input that is knowable before a job starts; good input stays as it is but for its paths."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from sedsft.config import CodeReward
from services.jobspec import JOB_SPEC, JobSpec, PipelineJob, RLStage, SFTStage
from services.preflight import RewardRights, SpecError, check_capacity, plan, resolve, resolve_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    model = root / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(model / "model.safetensors")
    (model / "tokenizer.json").write_text('{"model": {}}')
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}", "pad_token": "<pad>"}')
    (root / "sft.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n' * 3)
    (root / "rl.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 3)
    (root / "bench.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 3)
    return root


def write_safetensors(path: Path) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def job(**changes: Any) -> JobSpec:
    sft = {"objective": {"type": "sed"}, "data": {"path": "sft.jsonl"}, "steps": 2} | changes.pop("sft", {})
    return JOB_SPEC.validate_python({"type": "sft", "model": {"path": "model"}, "sft": sft} | changes)


def pipeline() -> JobSpec:
    stages: list[dict[str, Any]] = [
        {
            "type": "sft",
            "name": "a",
            "model": {"path": "model"},
            "sft": {"objective": {"type": "ce"}, "data": {"path": "sft.jsonl"}, "steps": 1},
        },
        {"type": "rl", "name": "b", "model": {"stage": "a"}, "grpo": {"data": {"path": "rl.jsonl"}, "iterations": 1}},
        {
            "type": "eval",
            "name": "c",
            "models": {"base": {"path": "model"}, "b": {"stage": "b"}},
            "eval": {"benchmarks": [{"name": "x", "path": "bench.jsonl"}]},
        },
    ]
    stages[0]["trainer"] = {"workers": 2, "cpus_per_worker": 1.5}
    stages[1] |= {"rollout": {"workers": 2, "gpus_per_worker": 2, "tensor_parallel": 2}, "scorer": {"cpus_per_worker": 0.5}}
    return JOB_SPEC.validate_python({"type": "pipeline", "stages": stages})


def test_reward_code_needs_the_operator_and_is_pinned(root: Path) -> None:
    """Refused by default; where it is allowed, the file's path and hash become part of the job."""
    (root / "mine.py").write_text("def score(response, gold, data_source, response_tokens):\n    return 1.0\n")
    code = {"type": "code", "path": "mine.py"}

    def spec(**changes: object) -> JobSpec:
        grpo = {"data": {"path": "rl.jsonl"}, "iterations": 1, "reward": {"components": [{"type": "answer"}, code | changes]}}
        return JOB_SPEC.validate_python({"type": "rl", "model": {"path": "model"}, "grpo": grpo})

    with pytest.raises(SpecError, match="start it with SEDSFT_ALLOW_REWARD_CODE=true") as refused:
        resolve(spec(), [root])
    assert [problem.pointer for problem in refused.value.problems] == ["/grpo/reward/components/1/path"]
    allowed = RewardRights(code=True)
    resolved = resolve(spec(), [root], rights=allowed)
    assert isinstance(resolved, RLStage)
    component = resolved.grpo.reward.components[1]
    assert isinstance(component, CodeReward)
    assert component.path == str(root / "mine.py")
    assert component.sha256 == hashlib.sha256((root / "mine.py").read_bytes()).hexdigest()
    assert resolve(resolved, [root], rights=allowed) == resolved
    for changes, said in (
        ({"path": "other.py"}, "it does not; check the spelling"),
        ({"path": "/etc/mine.py"}, "expected a path below"),
        ({"function": "reward"}, "expected a function 'reward'"),
        ({"sha256": "0" * 64}, "as it was submitted"),
    ):
        with pytest.raises(SpecError, match=said):
            resolve(spec(**changes), [root], rights=allowed)


def test_data_of_a_stage_need_an_earlier_filter_of_that_name(root: Path) -> None:
    kept = {"path": "stage:hard"}
    chosen = {"type": "filter", "name": "hard", "model": {"path": "model"}, "filter": {"data": {"path": "rl.jsonl"}}}
    rl = {"type": "rl", "name": "b", "model": {"path": "model"}, "grpo": {"data": kept, "iterations": 1}}
    good = JOB_SPEC.validate_python({"type": "pipeline", "stages": [chosen, rl]})
    resolved = resolve(good, [root])
    assert isinstance(resolved, PipelineJob)
    assert resolved.stages[0].filter.data.path == str(root / "rl.jsonl")
    assert resolved.stages[1].grpo.data.path == "stage:hard"
    assert [(role.role, role.workers) for role in plan(good).stages[0].roles] == [
        ("rollout", 1),
        ("reward", 1),
        ("reference", 1),
    ]

    backwards = JOB_SPEC.validate_python({"type": "pipeline", "stages": [rl, chosen]})
    said = "expected stage:NAME of an earlier filter stage (there is none yet), got 'stage:hard'"
    assert problems(backwards, root) == {"/stages/0/grpo/data/path": said}
    assert problems(JOB_SPEC.validate_python(rl), root) == {"/grpo/data/path": said}
    itself = JOB_SPEC.validate_python(chosen | {"filter": {"data": kept}})
    assert problems(itself, root) == {"/filter/data/path": said}


def test_a_gates_candidates_and_prompts_are_checked_and_its_winner_may_be_any(root: Path) -> None:
    sft = {"objective": {"type": "ce"}, "data": {"path": "sft.jsonl"}, "steps": 1}
    stages: list[dict[str, Any]] = [
        {"type": "sft", "name": "ce", "model": {"path": "model"}, "sft": sft},
        {
            "type": "gate",
            "name": "choose",
            "candidates": [{"stage": "ce"}, {"path": "model"}],
            "gate": {"data": {"path": "rl.jsonl"}},
        },
        {
            "type": "rl",
            "name": "rl",
            "model": {"stage": "choose"},
            "grpo": {"data": {"path": "rl.jsonl"}, "iterations": 1, "ledger": {"data": {"path": "rl.jsonl"}}},
        },
    ]
    good = JOB_SPEC.validate_python({"type": "pipeline", "stages": stages})
    resolved = resolve(good, [root])
    assert isinstance(resolved, PipelineJob)
    _, gate, rl = resolved.stages
    assert [ref.label for ref in gate.candidates] == ["ce", str(root / "model")]
    assert gate.gate.data.path == rl.grpo.ledger.data.path == str(root / "rl.jsonl")
    assert [role.role for role in plan(good).stages[1].roles] == ["rollout", "reward", "reference"]

    (root / "empty.jsonl").write_text('{"prompt": "1+1", "answer": ""}\n')
    (root / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 1024}')
    stages[1] |= {"candidates": [{"stage": "ce"}, {"path": "nowhere"}], "gate": {"data": {"path": "empty.jsonl"}}}
    stages[2]["grpo"]["ledger"] = {"data": {"path": "empty.jsonl"}}
    found = problems(JOB_SPEC.validate_python({"type": "pipeline", "stages": stages}), root)
    assert set(found) == {
        "/stages/1/candidates/1/path",
        "/stages/1/gate/data/path",
        "/stages/1/gate/sampling/max_tokens",
        "/stages/2/grpo/ledger/data/path",
        "/stages/2/grpo/max_tokens",
    }
    alone = JOB_SPEC.validate_python({**stages[1], "candidates": [{"stage": "ce"}], "gate": {"data": {"path": "rl.jsonl"}}})
    said = "expected a model folder, since a job of one stage has no earlier ones, got stage 'ce'; give a path"
    assert problems(alone, root) == {"/candidates/0/stage": said}


def problems(spec: JobSpec, root: Path) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        resolve(spec, [root])
    return {problem.pointer: problem.message for problem in caught.value.problems}


def test_paths_become_absolute_and_nothing_else_changes(root: Path) -> None:
    (root / "link.jsonl").symlink_to(root / "sft.jsonl")
    spec = job(sft={"data": {"path": "link.jsonl"}, "held_out": {"path": str(root / "sft.jsonl"), "max_rows": 1}})
    resolved = resolve(spec, [root])
    expected = spec.model_dump()
    expected["model"]["path"] = str(root / "model")
    expected["sft"]["data"]["path"] = expected["sft"]["held_out"]["path"] = str(root / "sft.jsonl")
    assert resolved.model_dump() == expected
    # What is stored is read back as the same job.
    assert JOB_SPEC.validate_json(resolved.model_dump_json(exclude_unset=True)) == resolved


def test_hub_names_are_refused_unless_the_operator_allows_them(root: Path) -> None:
    found = problems(job(sft={"data": {"path": "hf://team/words"}}), root)
    assert set(found) == {"/sft/data/path"}
    assert "'hf://team/words', which this service may not download; copy the files there" in found["/sft/data/path"]
    assert "SEDSFT_ALLOW_HUB=true" in found["/sft/data/path"]
    found = problems(job(sft={"data": {"path": "hf://words"}}), root)
    assert found == {"/sft/data/path": "expected hf://owner/name[@revision][/path or pattern], got 'hf://words'"}


def test_a_hub_name_becomes_the_path_of_its_commit_and_is_fetched_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services import preflight

    commit, asked = "0" * 40, []

    def fetch(name: object, home: Path) -> Path:
        asked.append(str(name))
        folder = home / "hub" / "team" / "words" / commit
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n')
        return folder / "rows.jsonl"

    monkeypatch.setattr(preflight, "fetch", fetch)
    source = {"path": "hf://team/words/rows.jsonl"}
    home = tmp_path / "home"
    resolved = resolve(job(sft={"data": source, "held_out": source}), [root], home)
    assert asked == ["hf://team/words/rows.jsonl"]
    assert isinstance(resolved, SFTStage)
    assert resolved.sft.data.path == str(home / "hub" / "team" / "words" / commit / "rows.jsonl")
    assert resolve(resolved, [root], home) == resolved


def test_all_problems_at_once_with_their_pointers(root: Path) -> None:
    (root / "sft.jsonl").write_text("{\n")
    (root / "rl.jsonl").unlink()
    (root / "bench.jsonl").write_text('{"problem": "1+1"}\n')
    (root / "model" / "config.json").unlink()
    assert set(problems(pipeline(), root)) == {
        "/stages/0/model/path",
        "/stages/0/sft/data/path",
        "/stages/1/grpo/data/path",
        "/stages/2/eval/benchmarks/0/path",
        "/stages/2/models/base/path",
    }


@pytest.mark.parametrize(
    "path", ["../outside.jsonl", "/etc/passwd", "link.jsonl", "folder/../../outside.jsonl", "a\0b", "x" * 5000]
)
def test_paths_outside_the_roots(root: Path, path: str) -> None:
    (root.parent / "outside.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    (root / "link.jsonl").symlink_to(root.parent / "outside.jsonl")
    message = problems(job(sft={"data": {"path": path}}), root)["/sft/data/path"]
    assert message.startswith("expected a path")


def test_a_sibling_with_the_root_s_name_as_prefix_is_outside(root: Path) -> None:
    sibling = root.parent / "root-other"
    sibling.mkdir()
    (sibling / "x.jsonl").write_text("{}")
    assert "below" in problems(job(sft={"data": {"path": str(sibling / "x.jsonl")}}), root)["/sft/data/path"]


def test_missing_file(root: Path) -> None:
    message = problems(job(sft={"data": {"path": "none.jsonl"}}), root)["/sft/data/path"]
    assert (
        message == f"expected {root / 'none.jsonl'} to exist, it does not; check the spelling, relative paths start at {root}"
    )


def test_malformed_rows_are_listed_by_line(root: Path) -> None:
    (root / "sft.jsonl").write_text(
        '{"prompt": "1", "completion": "2"}\n\n{"prompt": "1", "completion": ""}\n{"prompt": "3"}\n{x\n'
    )
    message = problems(job(), root)["/sft/data/path"]
    assert all(f"line {line}:" in message for line in (2, 3, 4, 5))
    assert "line 1:" not in message


@pytest.mark.parametrize(
    ("content", "said"), [("", "empty"), ('{"a": 1}\n', "columns"), ('{"prompt": "1", "answer": "2"}\n', "layout for SFT")]
)
def test_files_that_are_no_sft_data(root: Path, content: str, said: str) -> None:
    (root / "sft.jsonl").write_text(content)
    assert said in problems(job(), root)["/sft/data/path"]


def test_data_must_be_a_regular_file_of_a_known_kind(root: Path) -> None:
    os.mkfifo(root / "pipe.jsonl")
    assert "expected a data file" in problems(job(sft={"data": {"path": "pipe.jsonl"}}), root)["/sft/data/path"]
    (root / "rows.csv").write_text("a,b\n")
    assert "ending in" in problems(job(sft={"data": {"path": "rows.csv"}}), root)["/sft/data/path"]
    (root / "empty").mkdir()
    assert "ending in" in problems(job(sft={"data": {"path": "empty"}}), root)["/sft/data/path"]


def test_folders_and_patterns_become_absolute_and_name_bad_rows_by_file(root: Path) -> None:
    data = root / "data[1]"
    data.mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (data / name).write_text('{"prompt": "1", "completion": "2"}\n')
    (root / "link").symlink_to(data)
    assert resolve(job(sft={"data": {"path": "link"}}), [root]).sft.data.path == str(data)  # type: ignore[union-attr]
    resolved = resolve(job(sft={"data": {"path": "link/*.jsonl"}}), [root])
    assert resolved.sft.data.path == str(root / "data[[]1]" / "*.jsonl")  # type: ignore[union-attr]
    assert resolve(resolved, [root]) == resolved
    (data / "b.jsonl").write_text("{\n")
    assert "b.jsonl, line 1: expected JSON" in problems(job(sft={"data": {"path": "link"}}), root)["/sft/data/path"]


@pytest.mark.parametrize("path", ["data", "data/*.jsonl", "**/b.jsonl", "../*.jsonl", "/*", "data/*/../../../outside.jsonl"])
def test_files_of_a_folder_or_pattern_outside_the_roots(root: Path, path: str) -> None:
    (root.parent / "outside.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    (root / "data").mkdir()
    (root / "data" / "a.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    (root / "data" / "b.jsonl").symlink_to(root.parent / "outside.jsonl")
    message = problems(job(sft={"data": {"path": path}}), root)["/sft/data/path"]
    assert "below" in message or "expected no .." in message


def test_rows_to_skip_do_not_refuse_a_job_unless_none_is_left(root: Path) -> None:
    (root / "sft.jsonl").write_text('{\n{"prompt": "1", "completion": "2"}\n')
    resolve(job(sft={"data": {"path": "sft.jsonl", "on_bad_row": "skip"}}), [root])
    (root / "sft.jsonl").write_text("{\n")
    assert "line 1" in problems(job(sft={"data": {"path": "sft.jsonl", "on_bad_row": "skip"}}), root)["/sft/data/path"]


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _no_template(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=None)


def _no_pad(model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token=None)


def _pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _remote_code(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModel": "code.Model"})


def _tokenizer_code(model: Path) -> None:
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})


def _truncated(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _pointer_file(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _missing_shard(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
    )


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def _broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def _no_type(model: Path) -> None:
    (model / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_template, "expected a chat template"),
        (_no_pad, "expected a pad token"),
        (_pickle_only, "got only pytorch_model.bin, which can run code"),
        (_remote_code, "auto_map"),
        (_tokenizer_code, "auto_map"),
        (_truncated, "it was cut off"),
        (_pointer_file, "expected a safetensors file"),
        (_missing_shard, "got no model-2.safetensors"),
        (_no_tokenizer, "expected a tokenizer"),
        (_broken_config, "expected JSON"),
        (_no_type, "expected model_type"),
    ],
)
def test_models_that_cannot_be_used(root: Path, damage: Any, said: str) -> None:
    damage(root / "model")
    found = problems(job(), root)
    assert set(found) == {"/model/path"}
    assert said in found["/model/path"]
    with pytest.raises(SpecError, match=said.split(",")[0]):
        resolve_model("model", [root])


def test_template_and_pad_token_may_lie_in_their_own_files(root: Path) -> None:
    _no_template(root / "model")
    _no_pad(root / "model")
    (root / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (root / "model" / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    assert resolve_model("model", [root]) == root / "model"


def test_a_shared_file_is_read_once(root: Path, monkeypatch: Any) -> None:
    from services import preflight

    calls: list[str] = []
    monkeypatch.setattr(preflight, "check_model_folder", lambda path: calls.append(str(path)))
    resolve(pipeline(), [root])
    assert calls == [str(root / "model")]


def test_plan_counts_roles_stages_and_the_peak() -> None:
    resources = plan(pipeline())
    assert [(s.stage, s.cpus, s.gpus) for s in resources.stages] == [
        ("a", 3.0, 0),
        ("b", 1 + 2 + 0.5, 4),
        ("c", 1 + 1 + 0.1, 0),
    ]
    assert (resources.peak_cpus, resources.peak_gpus) == (3.5, 4)
    assert resources.as_dict()["stages"][1]["roles"][1] == {"role": "rollout", "workers": 2, "cpus": 1.0, "gpus": 2}


def test_capacity_names_stage_and_numbers() -> None:
    spec = pipeline()
    check_capacity(spec, plan(spec), {"CPU": 3.5, "GPU": 4.0})
    with pytest.raises(SpecError) as caught:
        check_capacity(spec, plan(spec), {"CPU": 3.0, "GPU": 1.0})
    assert [p.pointer for p in caught.value.problems] == ["/stages/1", "/stages/1"]
    first, second = (p.message for p in caught.value.problems)
    assert first.startswith(
        "expected at most the cluster's 3 CPU in stage 'b', got 3.5 (1 trainer x 1, 2 rollout x 1, 1 reward x 0.5)"
    )
    assert second.startswith(
        "expected at most the cluster's 1 GPU in stage 'b', got 4 (1 trainer x 0, 2 rollout x 2, 1 reward x 0)"
    )


def test_golds_that_the_scorer_cannot_read_are_listed(root: Path) -> None:
    (root / "count.jsonl").write_text('{"problem": "3 7 2 5>24", "answer": "3 7 2 5>24"}\n{"problem": "a", "answer": "42"}\n')
    evaluation = {"benchmarks": [{"name": "x", "path": "count.jsonl"}], "reward": {"name": "countdown"}}
    spec = JOB_SPEC.validate_python({"type": "eval", "models": {"m": {"path": "model"}}, "eval": evaluation})
    (said,) = problems(spec, root).values()
    assert "line 2: expected a countdown problem" in said
    assert "line 1" not in said


def test_responses_longer_than_the_model_are_refused_also_behind_a_stage(root: Path) -> None:
    edit(root / "model" / "config.json", max_position_embeddings=1024)
    said = problems(pipeline(), root)
    assert said == {
        "/stages/1/grpo/max_tokens": "expected fewer than the model's 1024 positions, got 1024; lower max_tokens",
        "/stages/2/eval/sampling/max_tokens": "expected fewer than the model's 1024 positions, got 1024; lower max_tokens",
    }
    edit(root / "model" / "config.json", max_position_embeddings=1025)
    resolve(pipeline(), [root])


def test_resume_from_is_a_checkpoint_below_the_roots(root: Path) -> None:
    step = root / "run" / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    with pytest.raises(SpecError, match="expected a checkpoint or a folder of checkpoints") as caught:
        resolve(job(sft={"resume_from": "run/checkpoints"}), [root])
    assert [problem.pointer for problem in caught.value.problems] == ["/sft/resume_from"]
    (step / "MANIFEST.json").write_text("{}")
    for given, expected in (("run/checkpoints", step.parent), ("run/checkpoints/step-2", step)):
        resolved = resolve(job(sft={"resume_from": given}), [root])
        assert isinstance(resolved, SFTStage)
        assert resolved.sft.resume_from == str(expected)
    with pytest.raises(SpecError, match="expected a path below"):
        resolve(job(sft={"resume_from": "../elsewhere"}), [root])
