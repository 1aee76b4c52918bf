from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services import checkpoints
from services.checkpoints import (
    MANIFEST,
    CheckpointInfo,
    FileRecord,
    begin,
    check_identity,
    describe,
    export,
    latest,
    newest_good,
    on_disk,
    prune,
    publish,
    remove,
    state_file,
    steps_below,
    tokenizer_sha256,
    verify,
)
from services.errors import CheckpointInvalid

INFO = CheckpointInfo(
    stage="sft", step=3, spec_sha256="ab" * 32, consumed_samples=384, tau=0.75, calibration={"tau": 0.75, "mask_ratio": 0.7}
)
CONTENT = {"model.safetensors": b"w" * 1000, "tokenizer.json": b"{}", "extra/part.json": b"[1]"}


def write(folder: Path) -> list[FileRecord]:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return [describe(folder, name) for name in CONTENT]


def published(root: Path, step: int = 3) -> Path:
    folder = begin(root, step, attempt=1)
    return Path(publish(folder, write(folder), replace(INFO, step=step)).path)


def test_a_published_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    folder = begin(tmp_path, 3, attempt=2)
    assert folder.name == "step-3.tmp-2"
    record = publish(folder, write(folder), INFO)
    assert (record.stage, record.step, record.path) == ("sft", 3, str(tmp_path / "step-3"))
    assert record.manifest_sha256 == describe(tmp_path / "step-3", MANIFEST).sha256
    assert not folder.exists()
    manifest = verify(tmp_path / "step-3")
    assert manifest.info == INFO
    assert [(f.name, f.size_bytes) for f in manifest.files] == [
        ("extra/part.json", 3),
        ("model.safetensors", 1000),
        ("tokenizer.json", 2),
    ]
    assert set(manifest.versions) == {"torch", "transformers", "deepspeed"}
    assert (tmp_path / "latest").read_text() == "step-3"
    assert latest(tmp_path) == tmp_path / "step-3"


def test_the_tokenizer_hash_depends_on_the_tokenizer_alone(tmp_path: Path) -> None:
    hashes = []
    for step, (model, tokenizer) in enumerate([(b"a", b"{}"), (b"b", b"{}"), (b"b", b"{1}")]):
        folder = begin(tmp_path, step, attempt=1)
        (folder / "model.safetensors").write_bytes(model)
        (folder / "tokenizer.json").write_bytes(tokenizer)
        files = [describe(folder, name) for name in ("model.safetensors", "tokenizer.json")]
        hashes.append(verify(Path(publish(folder, files, replace(INFO, step=step)).path)).tokenizer_sha256)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("crash_in", ["_compare", "_fsync", "write_atomically", "rename"])
def test_a_crash_before_the_rename_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    class Crash(BaseException):
        pass

    def crash(*args: object, **kwargs: object) -> None:
        raise Crash

    folder = begin(tmp_path, 3, attempt=1)
    files = write(folder)
    with monkeypatch.context() as patch:
        if crash_in == "rename":
            patch.setattr(Path, "rename", crash)
        else:
            patch.setattr(checkpoints, crash_in, crash)
        with pytest.raises(Crash):
            publish(folder, files, INFO)
    assert latest(tmp_path) is None
    assert not (tmp_path / "step-3").exists()
    again = begin(tmp_path, 3, attempt=2)
    assert latest(tmp_path) is None
    publish(again, write(again), INFO)
    assert latest(tmp_path) == tmp_path / "step-3"
    verify(tmp_path / "step-3")


def test_a_crash_before_the_pointer_keeps_the_complete_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(tmp_path, step=3)
    write_atomically = checkpoints.write_atomically

    def crash_at_the_pointer(path: Path, text: str) -> None:
        if path.name == "latest":
            raise KeyboardInterrupt
        write_atomically(path, text)

    monkeypatch.setattr(checkpoints, "write_atomically", crash_at_the_pointer)
    with pytest.raises(KeyboardInterrupt):
        published(tmp_path, step=10)
    assert (tmp_path / "latest").read_text() == "step-3"
    assert latest(tmp_path) == tmp_path / "step-10"
    verify(tmp_path / "step-10")


def test_a_retry_of_the_same_attempt_starts_with_an_empty_folder(tmp_path: Path) -> None:
    write(begin(tmp_path, 3, attempt=1))
    assert list(begin(tmp_path, 3, attempt=1).iterdir()) == []


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    path = published(tmp_path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[500] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors: expected sha256 .*, got"):
        verify(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = published(tmp_path)
    (path / "model.safetensors").write_bytes(b"w" * 999)
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors: expected 1000 bytes, got 999"):
        verify(path)


def test_missing_and_additional_files_are_named(tmp_path: Path) -> None:
    path = published(tmp_path)
    (path / "extra" / "part.json").unlink()
    (path / "surplus.json").write_text("{}")
    with pytest.raises(CheckpointInvalid, match=r"extra/part\.json: missing; surplus\.json: not in the list"):
        verify(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    path = published(tmp_path)
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointInvalid, match="expected"):
        verify(path)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path)
    (path / MANIFEST).unlink()
    with pytest.raises(CheckpointInvalid, match=r"MANIFEST\.json, it is missing"):
        verify(path)


def test_a_manifest_cannot_point_outside_or_at_pickles(tmp_path: Path) -> None:
    path = published(tmp_path)
    (tmp_path / "other.json").write_bytes(b"[1]")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][0]["name"] = "../other.json"
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointInvalid, match=r"\.\./other\.json: expected a safetensors"):
        verify(path)
    folder = begin(tmp_path, 4, attempt=1)
    (folder / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointInvalid, match=r"optimizer\.pt: expected a safetensors"):
        publish(folder, [describe(folder, "optimizer.pt")], replace(INFO, step=4))


def test_publishing_what_the_writer_did_not_hash_is_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path, 3, attempt=1)
    files = write(folder)
    (folder / "tokenizer.json").write_bytes(b"{} ")
    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.json: expected 2 bytes, got 3"):
        publish(folder, files, INFO)


def test_files_of_another_step_are_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path, 4, attempt=1)
    with pytest.raises(CheckpointInvalid, match="made for step 3"):
        publish(folder, write(folder), INFO)


def test_a_published_step_is_never_replaced(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(CheckpointInvalid, match="a published checkpoint never changes"):
        published(tmp_path)


def test_latest_counts_steps_as_numbers_and_skips_unfinished_ones(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None
    for step in (9, 10):
        published(tmp_path, step)
    begin(tmp_path, 11, attempt=1)
    assert latest(tmp_path) == tmp_path / "step-10"


def test_a_lost_history_is_an_error_and_no_new_start(tmp_path: Path) -> None:
    shutil.rmtree(published(tmp_path))
    with pytest.raises(CheckpointInvalid, match="it is missing; restore it"):
        latest(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", [*CONTENT, MANIFEST])
def test_the_newest_good_checkpoint_is_taken_and_a_broken_one_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    roots = [tmp_path / "attempt-1", tmp_path / "attempt-2", tmp_path / "attempt-3"]
    older, broken = published(roots[0], step=2), published(roots[1], step=10)
    assert newest_good(roots, pytest.fail) == (broken, verify(broken))
    damage(broken / name)
    bad: list[Path] = []
    assert newest_good(roots, lambda path, error: bad.append(path)) == (older, verify(older))
    assert bad == [broken]
    damage(older / name)
    with pytest.raises(CheckpointInvalid, match="expected one good checkpoint among 2, all are broken"):
        newest_good(roots, lambda path, error: None)


def test_of_equal_steps_that_of_the_later_attempt_is_taken(tmp_path: Path) -> None:
    roots = [tmp_path / "attempt-1", tmp_path / "attempt-2"]
    found = newest_good([published(root).parent for root in roots], pytest.fail)
    assert found is not None
    assert found[0] == roots[1] / "step-3"


@pytest.mark.parametrize("files_written", range(len(CONTENT) + 1))
def test_a_crash_behind_any_file_leaves_the_checkpoint_before(tmp_path: Path, files_written: int) -> None:
    def torn(step: int) -> None:
        folder = begin(tmp_path, step, attempt=1)
        write(folder)
        for name in list(CONTENT)[files_written:]:
            (folder / name).unlink()

    torn(1)
    assert newest_good([tmp_path], pytest.fail) is None
    before = published(tmp_path, step=2)
    torn(3)
    found = newest_good([tmp_path], pytest.fail)
    assert found is not None
    assert found[0] == before


def test_a_lost_checkpoint_is_reported(tmp_path: Path) -> None:
    older, lost = published(tmp_path, step=2), published(tmp_path, step=3)
    shutil.rmtree(lost)
    bad: list[Path] = []
    found = newest_good([tmp_path], lambda path, error: bad.append(path))
    assert found is not None
    assert (found[0], bad) == (older, [lost])
    shutil.rmtree(older)
    with pytest.raises(CheckpointInvalid, match="it is missing"):
        newest_good([tmp_path], lambda path, error: None)


def test_pruning_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    paths = [published(tmp_path, step) for step in (2, 8, 9, 10)]
    truncate(paths[2] / "model.safetensors")
    assert prune(tmp_path, keep=2) == [paths[0]]
    assert [path.exists() for path in paths] == [False, True, True, True]
    assert latest(tmp_path) == paths[3]
    assert prune(tmp_path, keep=2) == []
    with pytest.raises(ValueError, match="at least 2"):
        prune(tmp_path, keep=1)


def test_a_crash_while_pruning_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [published(tmp_path, step) for step in (1, 2, 3)]

    def crash(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, keep=2)
    assert not paths[0].exists()
    assert newest_good([tmp_path], pytest.fail) == (paths[2], verify(paths[2]))
    assert prune(tmp_path, keep=2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-3"]


def test_other_settings_are_refused_with_a_diff(tmp_path: Path) -> None:
    identity = {"stage": {"sft": {"seed": 1, "betas": (0.9, 0.95)}, "workers": 2}, "data_sha256": "ab"}
    folder = begin(tmp_path, 3, attempt=1)
    path = Path(publish(folder, write(folder), replace(INFO, identity=identity)).path)
    manifest = verify(path)
    check_identity(manifest, identity, path)
    other = {"stage": {"sft": {"seed": 2, "betas": (0.9, 0.95)}, "ranks": 2}, "data_sha256": "cd"}
    with pytest.raises(CheckpointInvalid) as caught:
        check_identity(manifest, other, path)
    assert (
        'these differ: data_sha256: "ab" there, "cd" here; stage.ranks: absent there, 2 here; stage.sft.seed: 1 there, 2 here; '
        "stage.workers: 2 there, absent here. Use the same settings"
    ) in caught.value.message
    with pytest.raises(CheckpointInvalid, match="saved without"):
        check_identity(verify(published(tmp_path, 4)), identity, path)


def test_a_model_folder_and_its_checkpoint_have_the_same_tokenizer(tmp_path: Path) -> None:
    path = published(tmp_path)
    assert tokenizer_sha256(path) == verify(path).tokenizer_sha256


def with_training_state(root: Path, step: int = 3) -> Path:
    folder = begin(root, step, attempt=1)
    files = write(folder)
    (folder / state_file(0)).parent.mkdir()
    (folder / state_file(0)).write_bytes(b"s" * 500)
    return Path(publish(folder, [*files, on_disk(folder, state_file(0))], INFO).path)


def test_an_export_is_the_model_alone(tmp_path: Path) -> None:
    path, folder = with_training_state(tmp_path), tmp_path / "out" / "model"
    assert export(path, folder) == sorted(CONTENT)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == CONTENT
    with pytest.raises(FileExistsError, match="never replaces files"):
        export(path, folder)


def test_an_export_needs_no_training_state_and_no_broken_model(tmp_path: Path) -> None:
    path, folder = with_training_state(tmp_path), tmp_path / "out" / "model"
    flip(path / state_file(0))
    assert len(export(path, folder)) == len(CONTENT)
    flip(path / "model.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors: expected sha256"):
        export(path, tmp_path / "out" / "other")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model"]
    with pytest.raises(CheckpointInvalid, match="it is missing"):
        export(tmp_path, tmp_path / "out" / "other")


def test_a_removed_checkpoint_is_gone_at_once(tmp_path: Path) -> None:
    older, newer = published(tmp_path, 3), published(tmp_path, 4)
    assert steps_below(tmp_path) == {3: older, 4: newer}
    remove(newer)
    assert steps_below(tmp_path) == {3: older}
    assert published(tmp_path, 4) == newer
