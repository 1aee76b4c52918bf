"""The images against the locks, their build context, the manifests' user and what the API imports."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "k8s" / "images"
# Imports the API with every package hidden but those named.
IMPORT_WITH_THESE_ALONE = """
import sys
from importlib.metadata import packages_distributions

owners, names = packages_distributions(), set(sys.argv[1:])

class Hide:
    @staticmethod
    def find_spec(module, path=None, target=None):
        of = {owner.lower().replace("_", "-") for owner in owners.get(module.partition(".")[0], [])}
        if of and not of & names:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

sys.meta_path.insert(0, Hide)
import api.app
"""


def dockerfile(name: str) -> str:
    return (IMAGES / f"{name}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")


def test_both_images_have_one_python_and_the_manifests_user() -> None:
    bases = {line for name in ("api", "worker") for line in re.findall(r"^FROM (\S+)", dockerfile(name), re.MULTILINE)}
    assert bases == {"python:3.11-slim"}
    for name in ("api", "worker"):
        assert re.findall(r"^USER (.*)$", dockerfile(name), re.MULTILINE) == ["10001:10001"]
        assert "useradd --uid 10001 " in dockerfile(name)


@pytest.mark.parametrize("name", ["api", "worker"])
def test_what_an_image_copies_exists_and_is_in_its_context(name: str) -> None:
    ignore = (IMAGES / f"{name}.Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert ignore[0] == "*"
    for line in re.findall(r"^COPY (?!--)(.*)$", dockerfile(name), re.MULTILINE):
        for source in line.split()[:-1]:
            for path in (source.replace("${LOCK}", lock) for lock in ("cpu", "gpu")):
                assert (ROOT / path).exists(), path
                assert any(fnmatch(path, pattern) for pattern in allowed), f"{path} is left out of the context"


def test_the_api_image_has_what_the_api_imports() -> None:
    (pattern,) = re.findall(r'grep -E "(\^\(.*?\)==)"', dockerfile("api"))
    lock = (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    names = set(re.fullmatch(r"\^\((.*)\)==", pattern)[1].split("|"))  # type: ignore[index]
    installed = {line.split("==")[0] for line in lock if re.match(pattern, line)}
    assert installed == names, "every name is in the lock"
    command = [sys.executable, "-c", IMPORT_WITH_THESE_ALONE, "sedsft", *names]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_index_of_cpu_builds_is_the_makefiles() -> None:
    (index,) = re.findall(r"^ARG TORCH_CPU_INDEX=(\S+)$", dockerfile("worker"), re.MULTILINE)
    assert index in (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ("api", "worker"):
        assert set(re.findall(r"https?://\S+", dockerfile(name))) <= {index}
