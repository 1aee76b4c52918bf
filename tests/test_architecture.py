"""The directions between the rooms, the size budget and the banned names, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("sedsft", "services", "api")
WORKERS = ("services.training", "services.rollout", "services.scoring", "services.serving")
SETTINGS = ("sedsft.config", "sedsft.config_base", "sedsft.gate_config", "sedsft.overlap_config", "sedsft.reward_config")
ENVIRONMENT_READERS = {
    "api/settings.py",
    "api/stack.py",
    "sedsft/data/encoding.py",
    "services/driver.py",
    "services/training/engine.py",
    "services/rollout/engine.py",
    "services/rollout/worker_extension.py",
}


def modules() -> dict[str, Path]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def forbidden(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`; None when it may."""
    if within(module, ("sedsft",)) and within(imported, ("ray", "deepspeed", "vllm", "fastapi", "services", "api")):
        return "the library knows neither Ray nor the service"
    if module in SETTINGS and not within(imported, ("__future__", "typing", "pydantic", *SETTINGS)):
        return "the settings import pydantic alone"
    if within(module, ("services",)) and within(imported, ("api", "fastapi")):
        return "the workers do not know the API"
    if within(imported, ("deepspeed",)) and module != "services.training.engine":
        return "deepspeed lives in one file"
    if within(imported, ("vllm",)) and not within(module, ("services.rollout",)):
        return "vllm lives in one package"
    if within(module, ("api",)) and within(imported, ("torch", "transformers", "vllm", "deepspeed", "ray", "sedsft.head")):
        return "the API validates and records, it does not compute"
    own = next((worker for worker in WORKERS if within(module, (worker,))), None)
    if own and any(within(imported, (other,)) for other in WORKERS if other != own):
        return "workers never import each other; only loops know two kinds"
    if own and within(imported, ("services.loops", "services.driver")):
        return "loops call workers, not the other way round"
    return None


def test_imports_follow_the_directions() -> None:
    found = [
        f"{module} imports {imported}: {reason}"
        for module, path in modules().items()
        for imported in imports_of(path)
        if (reason := forbidden(module, imported))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("sedsft.grpo", "ray"),
        ("sedsft.config", "torch"),
        ("services.driver", "api.app"),
        ("services.loops.sft", "deepspeed"),
        ("services.training.engine", "vllm"),
        ("services.rollout.fleet", "services.training.engine"),
        ("api.app", "torch.nn"),
    ],
)
def test_a_planted_violation_is_seen(module: str, imported: str) -> None:
    assert forbidden(module, imported)


@pytest.mark.parametrize("module", ["sedsft.config", "services.jobspec", "services.preflight", "api.app", "api.cli"])
def test_light_modules_leave_torch_out(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'ray', 'vllm', 'deepspeed'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_no_dumping_grounds() -> None:
    banned = {"utils", "util", "common", "helpers", "misc"}
    assert not [name for name in modules() if name.rpartition(".")[2] in banned]


def test_sizes_stay_within_the_budget() -> None:
    found = []
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 500:
            found.append(f"{path}: {lines} lines, at most 500")
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and (lines := (node.end_lineno or 0) - node.lineno + 1) > 80:
                found.append(f"{path}:{node.lineno} {node.name}: {lines} lines, at most 80")
    assert not found, "\n".join(found)


def test_the_environment_is_read_at_the_borders_only() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    }
    assert readers <= ENVIRONMENT_READERS


def test_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        str(path.relative_to(ROOT))
        for path in modules().values()
        if path.name != "__init__.py"
        and "versions" not in path.parts
        and f"      {Path(*path.relative_to(ROOT).parts[1:])} " not in readme
    ]
    assert not missing
