"""ModelScope's HTTP API: list the files of a model, and download them into a cache, pinned to a commit.

A client of our own, because the `modelscope` package names its cache folders after branches, which move.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.error import HTTPError
from urllib.parse import quote, urlencode

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ascendit.checkpoint import download
from ascendit.checkpoint.component import stays_inside
from ascendit.checkpoint.download import check_sha256, check_space, download_error, unknown_model
from ascendit.checkpoint.download_list import TOP_FILES, matching, part_files, single_file, weight_files
from ascendit.errors import AscenditError

logger = logging.getLogger("ascendit")

ENDPOINT = "https://modelscope.cn"
WITHOUT_EXPERTS = "without_experts"
"""Folder of empty files: names of the snapshots that lack the transformers' weights."""
MAX_LISTING = 50_000_000
"""Bytes. The listing of 10,000 files has 5 MB."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _file_name(name: str) -> str:
    parts = name.split("/")
    if not stays_inside(name) or "\\" in name or _CONTROL.search(name) or not {"", "."}.isdisjoint(parts):
        raise ValueError("not the name of a file inside the folder")
    if any(len(part.encode()) > 255 for part in parts) or len(name) > 1024:
        raise ValueError("too long")
    return name


class RemoteFile(BaseModel):
    """One file of a listing."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: Annotated[str, Field(alias="Path"), AfterValidator(_file_name)]
    size: Annotated[int, Field(alias="Size", ge=0, le=2**50)]
    """Bytes."""
    sha256: Annotated[str | None, Field(alias="Sha256", pattern=r"^([0-9a-fA-F]{64})?$")] = None
    revision: Annotated[str | None, Field(alias="Revision", max_length=200)] = None


class _Folder(BaseModel):
    type: Annotated[Literal["tree"], Field(alias="Type")]


class _Committer(BaseModel):
    id: Annotated[str, Field(alias="Id", max_length=200)] = ""


class _Data(BaseModel):
    files: Annotated[list[dict[str, Any]], Field(alias="Files", min_length=1, max_length=100_000)]
    latest: Annotated[_Committer | None, Field(alias="LatestCommitter")] = None


def download_model(
    model: str, repo: str, revision: str, cache: Path, endpoint: str, experts: bool = True
) -> Path:
    """Download into `<revision>.part`, check each file, and rename the folder when it is complete.

    `model`: its name in messages. `experts`: False skips the transformers' weights, and a file in
    `without_experts` says so until a later call adds them. Raises UsageError and EnvironmentProblem
    (E-HUB-01), OSError, and CheckpointError (E-CKP-06) for configs that are not JSON.
    """
    from filelock import FileLock

    home = Path(os.path.abspath(cache)) / f"models--{repo.replace('/', '--')}"
    snapshots, ref = home / "snapshots", home / "refs" / quote(revision, safe="")

    def cached(name: str) -> bool:
        complete = not experts or not (home / WITHOUT_EXPERTS / name).exists()
        return complete and bool(_COMMIT.fullmatch(name)) and (snapshots / name).is_dir()

    if cached(revision):
        return snapshots / revision
    base = f"{endpoint.rstrip('/')}/api/v1/models/{repo}/repo"
    try:
        files, commit = _listing(base, model, revision)
    except AscenditError:  # the hub answers, and refuses
        raise
    except Exception as e:
        last = ref.read_text() if ref.is_file() else ""
        if cached(last):
            logger.warning("%s: hub not reachable (%s); using the cached copy", model, e)
            return snapshots / last
        raise
    content = sorted((file.path, file.size, file.sha256 or file.revision) for file in files.values())
    snapshot = snapshots / (commit or hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40])
    snapshots.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        if not cached(snapshot.name):
            part = snapshot if snapshot.is_dir() else snapshot.with_name(snapshot.name + ".part")
            _fill(part, files, base, model, commit or revision, experts)
            mark = home / WITHOUT_EXPERTS / snapshot.name
            if experts:
                mark.unlink(missing_ok=True)
            else:
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
            part.replace(snapshot)
        ref.parent.mkdir(exist_ok=True)
        new = ref.with_name(ref.name + ".part")
        new.write_text(snapshot.name)
        new.replace(ref)
    return snapshot


# ---- the listing --------------------------------------------------------------------------------


def _listing(base: str, model: str, revision: str) -> tuple[dict[str, RemoteFile], str | None]:
    """The files of a model by path, and their commit if the hub reports it."""
    query = urlencode({"Revision": revision, "Recursive": "True"})
    try:
        body = download.patiently(
            model, lambda: download.get(f"{base}/files?{query}", limit=MAX_LISTING, seconds=120)
        )
    except HTTPError as e:
        if e.code == 404:
            fix = "correct the name or the revision"
            raise unknown_model(model, "no such model, revision or file", fix) from e
        if e.code in (401, 403):
            fix = "download it with ModelScope's own tool, logged in, and pass the path of the folder"
            raise download_error(model, f"access refused (HTTP {e.code})", fix) from e
        raise
    try:
        answer = json.loads(body)
        if isinstance(answer, dict) and answer.get("Success") is False:
            message = str(answer.get("Message"))[:200]
            raise unknown_model(model, message, "correct the name or the revision")
        data = _Data.model_validate(answer["Data"])
        files = [RemoteFile.model_validate(file) for file in data.files if file.get("Type") != "tree"]
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        got = f"the hub lists {str(first['input'])[:80]!r}: {first['msg']}"
        raise download_error(model, got, "do not use this model") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise OSError(f"unexpected response ({type(e).__name__})") from e
    _check_distinct(model, files)
    latest = data.latest.id if data.latest else ""
    commit = next((c for c in (revision, latest) if _COMMIT.fullmatch(c)), None)
    return {file.path: file for file in files}, commit


def _check_distinct(model: str, files: Iterable[RemoteFile]) -> None:
    """Raise EnvironmentProblem (E-HUB-01) for two files that are one on some file system, or none at all."""
    counts = Counter(file.path.casefold() for file in files)
    if not counts:
        raise download_error(model, "the hub lists no files", "check the name and the revision")
    folders = {"/".join(path.split("/")[:i]) for path in counts for i in range(1, path.count("/") + 1)}
    if twice := [path for path, n in counts.items() if n > 1 or path in folders]:
        raise download_error(model, f"the hub lists {twice[0]!r} twice", "do not use this model")


# ---- downloads ----------------------------------------------------------------------------------


def _fill(
    part: Path, files: Mapping[str, RemoteFile], base: str, model: str, revision: str, experts: bool
) -> None:
    """Download the files that ascendit reads into the folder `part`, unless they are in it."""
    part.mkdir(exist_ok=True)

    def fetch(patterns: Iterable[str]) -> list[str]:
        names = matching(files, patterns)
        missing = [files[name] for name in names if not (part / name).is_file()]
        check_space(model, part, sum(file.size for file in missing))
        for file in missing:
            query = urlencode({"Revision": revision, "FilePath": file.path})
            _download(f"{base}?{query}", part / file.path, file, model)
        return names

    fetch(TOP_FILES)
    fetch(part_files(part))
    if not fetch(weight_files(part, experts=experts)) and experts:
        fetch([glob.escape(name) for name in single_file(model, files)])


def _download(url: str, target: Path, file: RemoteFile, model: str) -> None:
    """Download into `<name>.incomplete`, resuming it, and rename it once size and sha256 are correct."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    new = target.with_name(target.name + ".incomplete")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(new, "a+b") as f:
        if not file.sha256:  # nothing would show that another version was resumed
            f.truncate(0)
        with tqdm(total=file.size, desc=file.path[-40:], unit="B", unit_scale=True) as bar:  # type: ignore[no-untyped-call]
            try:
                piece = partial(
                    download.download, url, f, size=file.size, progress=lambda n: bar.update(n - bar.n)
                )
                download.patiently(file.path, piece)
            except OSError as e:
                raise OSError(f"{file.path}: {e}") from e
        f.flush()
        os.fsync(f.fileno())
    if file.sha256:
        check_sha256(model, file.path, new, file.sha256.lower())
    new.replace(target)
