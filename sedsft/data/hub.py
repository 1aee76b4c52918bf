"""Data sets named by their place on the Hugging Face hub: `hf://owner/name[@revision][/path-or-pattern]`.

Only data files are fetched, whole and at one commit, into a folder that the commit names; scripts of a data set are never
downloaded, let alone run. What reads rows afterwards sees local files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from sedsft.data import DataFileError
from sedsft.data.files import ENDINGS

PREFIX = "hf://"
FOLDER = "hub"
"""Folder of downloaded data sets below the home that is given."""
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<pattern>.+))?", re.ASCII)
_FETCHED = re.compile(rf"/{FOLDER}/(?P<repo>[^/]+/[^/]+)/(?P<commit>[0-9a-f]{{40}})(?:/(?P<pattern>.+))?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REMEDY = "or download the files and give their local path, which always works"
_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class HubName:
    """A parsed name. `pattern` is a file, a folder or a glob pattern within the data set; empty: all its data files."""

    repo: str
    revision: str | None
    pattern: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repo}{revision}" + (f"/{self.pattern}" if self.pattern else "")


def parse_hub_name(text: str) -> HubName | None:
    """The parts of a hub name; None where `text` is a path.

    Raises:
        DataFileError: begins like a hub name and is none.
    """
    if not text.startswith(PREFIX):
        return None
    found = _NAME.fullmatch(text.removeprefix(PREFIX))
    if found is None or ".." in PurePosixPath(found["pattern"] or "").parts:
        raise DataFileError(f"expected hf://owner/name[@revision][/path or pattern], got {text!r}")
    return HubName(found["repo"], found["revision"], (found["pattern"] or "").strip("/"))


def fetch(name: HubName, home: Path) -> Path:
    """Download what `name` stands for and give its path, which may be a pattern, below `home`/hub/owner/name/commit.

    Files that are there are not downloaded again.

    Raises:
        DataFileError: no such data set, revision or data file, or the hub cannot be reached: what was tried and what helps.
    """
    api = HfApi()
    try:
        info = api.dataset_info(name.repo, revision=name.revision, timeout=_TIMEOUT_S)
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise DataFileError(f"expected the commit of {name} from {api.endpoint}, got {commit!r}; {_REMEDY}")
        wanted = _wanted([entry.rfilename for entry in info.siblings or ()], name)
        target = home / FOLDER / name.repo / commit
        for file in wanted:
            hf_hub_download(name.repo, file, repo_type="dataset", revision=commit, local_dir=target)
    except RevisionNotFoundError as error:
        raise DataFileError(f"expected a branch, tag or commit of {name.repo} in {name}, got none at {api.endpoint}") from error
    except RepositoryNotFoundError as error:
        raise DataFileError(
            f"expected a data set at {api.endpoint}, got none for {name}, or one that needs a login; check the spelling, "
            f"{_REMEDY}"
        ) from error
    except HFValidationError as error:
        raise DataFileError(f"expected the name of a data set, got {name}: {error}") from error
    except (OSError, httpx2.HTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataFileError(
            f"expected to download {name} from {api.endpoint}, got {type(error).__name__}: {reason}; try again when it can be "
            f"reached, {_REMEDY}"
        ) from error
    return target / name.pattern


def hub_origin(path: str) -> str | None:
    """The hub name, pinned to its commit, of what `fetch` put at `path`; None for other paths."""
    found = _FETCHED.search(path)
    return str(HubName(found["repo"], found["commit"], found["pattern"] or "")) if found else None


def _wanted(files: Sequence[str], name: HubName) -> list[str]:
    """Data files of the data set that the name's pattern stands for, as `find_files` would find them on a disk."""
    usable = [file for file in files if file.endswith(ENDINGS) and not _unsafe(PurePosixPath(file))]
    wanted = sorted(file for file in usable if _matches(PurePosixPath(file), name.pattern))
    if not wanted:
        got = f"{', '.join(sorted(usable)[:10])}" if usable else "none at all"
        raise DataFileError(f"expected files ending in {', '.join(ENDINGS)} for {name}, got {got} in the data set")
    return wanted


def _unsafe(file: PurePosixPath) -> bool:
    return file.is_absolute() or any(part.startswith(".") for part in file.parts)


def _matches(file: PurePosixPath, pattern: str) -> bool:
    return not pattern or file.is_relative_to(pattern) or _pattern(pattern).fullmatch(str(file)) is not None


def _pattern(pattern: str) -> re.Pattern[str]:
    """Regular expression of a glob pattern, in which `*` and `?` stay within a folder and `**/` crosses folders."""
    words = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    choices = {piece: piece.replace("[!", "[^", 1) for piece in pieces if len(piece) > 2 and piece.startswith("[")}
    try:
        return re.compile("".join((words | choices).get(piece) or re.escape(piece) for piece in pieces))
    except re.error as error:
        raise DataFileError(f"expected a pattern of file names, got {pattern!r}: {error}") from error
