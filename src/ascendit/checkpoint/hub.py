"""Resolve the name of a model to its folder: a path, "demo", or a download pinned to a revision.

Does not import torch.

    hf:org/name[@revision]      downloaded with `huggingface_hub`, which reads HF_ENDPOINT, HF_HOME, the token
    ms:org/name[@revision]      downloaded from ModelScope's HTTP API

Both caches use the layout `<cache>/models--org--name/snapshots/<revision>/`, so the path of a folder names
its source. This module reads no environment variables.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from ascendit.checkpoint.component import stays_inside
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError

logger = logging.getLogger("ascendit")

DEMO = Path(__file__).resolve().parents[1] / "demo" / "models" / "demo"
"""The model that is part of the package."""

MODELSCOPE = "https://modelscope.cn"
_USELESS = "msgpack h5 ckpt onnx bin png jpg jpeg gif webp svg mp4 mov webm".split()
SKIPPED = tuple(f"*.{e}" for ending in _USELESS for e in (ending, ending.upper()))
"""Files that are not downloaded: weights in formats that ascendit does not read, pictures, videos."""
EXPERT_WEIGHTS = ("transformer/*.safetensors*", "transformer_2/*.safetensors*")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def model_folder(model: str | Path, *, experts: bool = True) -> Path:
    """Return the folder of a path, "demo", hf:org/name or ms:org/name (with optional "@revision").

    `experts`: False skips the download of the transformers' weights. Raises UsageError (E-USE-02) for a
    missing path, EnvironmentProblem (E-ENV-01) for a missing demo model, and the errors of `fetch`.
    """
    name = str(model)
    if name == "demo":
        if not DEMO.is_dir():
            raise EnvironmentProblem(
                f"the demo model is not in this installation ({DEMO})",
                needs="the weights that are part of the package",
                fix="install ascendit again, or: python tools/train_demo.py "
                "--export src/ascendit/demo/models/demo",
                code="E-ENV-01",
            )
        return DEMO
    if name.startswith(("hf:", "ms:")):
        return fetch(name, experts=experts)
    path = Path(name).expanduser()
    if not path.exists():
        raise UsageError(
            f"no model at {name}",
            needs="a folder, hf:org/name, ms:org/name, or demo",
            fix="correct the path; for a model on Hugging Face, write hf:org/name",
            code="E-USE-02",
        )
    return path


def fetch(
    name: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
    experts: bool = True,
) -> Path:
    """Download the files that are not in the cache, and return the folder. Its name is the pinned revision.

    `revision`: branch, tag or commit, which may also be part of `name`. `cache`: folder; default: the cache
    of `huggingface_hub`, or `~/.cache/ascendit/modelscope`. `endpoint`: another server with the same API.
    `experts`: False skips the transformers' weights (Hugging Face only; ModelScope downloads all files).
    Without network, a complete cached copy is used. Raises UsageError (E-HUB-01) for an unknown name or
    revision, EnvironmentProblem (E-HUB-01) for network errors, missing access and damaged downloads.
    """
    from huggingface_hub import errors

    hub, repo, revision = _parse(name, revision)
    model = f"{hub}:{repo}" + (f"@{revision}" if revision else "")
    try:
        if hub == "hf":
            skipped = [*SKIPPED, *(() if experts else EXPERT_WEIGHTS)]
            path = _huggingface(model, repo, revision, cache, endpoint, skipped)
        else:
            cache = cache or Path.home() / ".cache" / "ascendit" / "modelscope"
            path = _modelscope(model, repo, revision or "master", cache, endpoint or MODELSCOPE)
    except AscenditError:
        raise
    except errors.GatedRepoError as e:
        fix = f"accept the licence on the page of {repo}, then `hf auth login`"
        raise _download_error(model, "the model is gated: access must be requested", fix) from e
    except errors.RevisionNotFoundError as e:
        raise _unknown_model(model, "no such revision", "give a branch, tag or commit of this model") from e
    except errors.RepositoryNotFoundError as e:
        fix = "correct the name; `hf auth login` if the model is private"
        raise _unknown_model(model, "no such model, or it is private", fix) from e
    except Exception as e:  # httpx, OSError, checks of the library: the download failed
        fix = "check network, HF_ENDPOINT and free disk space, then run it again: complete files are kept"
        if isinstance(e, OSError) and e.filename:
            fix = f"make {e.filename} writable, or give another cache folder"
        raise _download_error(model, _first_line(e), fix) from e
    logger.info("%s:%s@%s in %s", hub, repo, path.name, path)
    return path


def _parse(name: str, revision: str | None) -> tuple[str, str, str | None]:
    """(hub, org/name, revision)."""
    hub, _, path = name.partition(":")
    repo, _, suffix = path.partition("@")
    revisions = {r for r in (revision, suffix) if r}
    valid = hub in ("hf", "ms") and _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo
    if not valid or len(revisions) > 1 or not all(stays_inside(r) and r != "." for r in revisions):
        raise UsageError(
            f"hub name {name!r}" + (f" with revision {revision!r}" if revision else ""),
            needs="hf:org/name or ms:org/name, with at most one revision (hf:org/name@revision)",
            fix="for example hf:Wan-AI/Wan2.2-TI2V-5B-Diffusers; for a local folder, pass its path",
            code="E-HUB-01",
        )
    return hub, repo, revisions.pop() if revisions else None


def _unknown_model(model: str, reason: str, fix: str) -> UsageError:
    needs = "an existing model and revision that you have access to"
    return UsageError(f"{model}: {reason}", needs=needs, fix=fix, code="E-HUB-01")


def _download_error(model: str, reason: object, fix: str) -> EnvironmentProblem:
    needs = "a reachable hub, or a complete copy in the cache"
    return EnvironmentProblem(f"{model}: {reason}", needs=needs, fix=fix, code="E-HUB-01")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---- Hugging Face -------------------------------------------------------------------------------

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _huggingface(
    model: str, repo: str, revision: str | None, cache: Path | None, endpoint: str | None, skipped: list[str]
) -> Path:
    from huggingface_hub import snapshot_download

    begun = time.time()
    options: dict[str, Any] = {"cache_dir": cache, "endpoint": endpoint, "ignore_patterns": skipped}
    path = Path(snapshot_download(repo, revision=revision, **options))
    for link in path.rglob("*"):
        # A large file is named by its sha256 in the cache, and the library compares only sizes. Two seconds
        # allow for file systems with coarse timestamps.
        blob = link.resolve()
        if _SHA256.fullmatch(blob.name) and blob.stat().st_mtime > begun - 2:
            _check(model, str(link.relative_to(path)), blob, blob.name, link)
    return path


def _check(model: str, name: str, file: Path, sha256: str, *links: Path) -> None:
    """Remove a damaged file and the links to it. Raises EnvironmentProblem (E-HUB-01)."""
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != sha256:
        for path in (*links, file):
            path.unlink()
        problem = f"{name} was damaged during the download (sha256 {digest[:12]}..., not {sha256})"
        raise _download_error(model, problem, "run it again: only this file is downloaded again")


# ---- ModelScope ---------------------------------------------------------------------------------

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30  # seconds without a byte


def _modelscope(model: str, repo: str, revision: str, cache: Path, endpoint: str) -> Path:
    """Download into `<revision>.part`, check each file, and rename the folder when it is complete."""
    from filelock import FileLock

    home = Path(os.path.abspath(cache)) / f"models--{repo.replace('/', '--')}"
    snapshots, ref = home / "snapshots", home / "refs" / quote(revision, safe="")
    if _COMMIT.fullmatch(revision) and (snapshots / revision).is_dir():
        return snapshots / revision
    base = f"{endpoint.rstrip('/')}/api/v1/models/{repo}/repo"
    try:
        files, commit = _listing(base, model, revision)
    except AscenditError:  # the hub answers, and refuses
        raise
    except Exception as e:
        if ref.is_file() and (snapshots / ref.read_text()).is_dir():
            logger.warning("%s: hub not reachable (%s); using the cached copy", model, _first_line(e))
            return snapshots / ref.read_text()
        raise
    content = sorted(
        (file["Path"], file.get("Size"), file.get("Sha256") or file.get("Revision")) for file in files
    )
    snapshot = snapshots / (commit or hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40])
    snapshots.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        if not snapshot.is_dir():
            _fill(snapshot, files, base, model, commit or revision)
        ref.parent.mkdir(exist_ok=True)
        partial = ref.with_name(ref.name + ".part")
        partial.write_text(snapshot.name)
        partial.replace(ref)
    return snapshot


def _listing(base: str, model: str, revision: str) -> tuple[list[dict[str, Any]], str | None]:
    """Return the files to download, and their commit if the hub reports it."""
    from huggingface_hub import get_session

    query = {"Revision": revision, "Recursive": "True"}
    response = get_session().get(f"{base}/files", params=query, timeout=_TIMEOUT)
    if response.status_code == 404:
        raise _unknown_model(model, "no such model, revision or file", "correct the name or the revision")
    if response.status_code in (401, 403):
        fix = "download it with ModelScope's own tool, logged in, and pass the path of the folder"
        raise _download_error(model, f"access refused (HTTP {response.status_code})", fix)
    response.raise_for_status()
    try:
        answer = json.loads(response.content)
        if answer.get("Success") is False:
            raise _unknown_model(model, str(answer.get("Message")), "correct the name or the revision")
        files = [file for file in answer["Data"]["Files"] if file["Type"] != "tree"]
        outside = [file["Path"] for file in files if not stays_inside(file["Path"])]
        latest = str((answer["Data"].get("LatestCommitter") or {}).get("Id"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise OSError(f"unexpected response ({type(e).__name__})") from e
    if outside:
        got = f"the hub names a file outside the folder: {outside[0]!r}"
        raise _download_error(model, got, "do not use this model")
    files = [file for file in files if _is_wanted(file["Path"])]
    return files, next((c for c in (revision, latest) if _COMMIT.fullmatch(c)), None)


def _is_wanted(path: str) -> bool:
    return not any(fnmatch.fnmatchcase(path, pattern) for pattern in SKIPPED)


def _fill(snapshot: Path, files: list[dict[str, Any]], base: str, model: str, revision: str) -> None:
    """Download the missing files into `<snapshot>.part`, and rename it."""
    part = snapshot.with_name(snapshot.name + ".part")
    part.mkdir(exist_ok=True)
    missing = [file for file in files if not (part / file["Path"]).is_file()]
    needed = sum(file.get("Size") or 0 for file in missing)
    if (free := shutil.disk_usage(part).free) < needed:
        got = f"{needed / 2**30:.1f} GiB to download, {free / 2**30:.1f} GiB free"
        raise _download_error(model, got, "free disk space")
    for file in missing:
        query = urlencode({"Revision": revision, "FilePath": file["Path"]})
        _download(f"{base}?{query}", part / file["Path"], file, model)
    os.replace(part, snapshot)


def _download(url: str, target: Path, file: dict[str, Any], model: str) -> None:
    """Download into `<name>.incomplete`, resuming it, and rename it once size and sha256 are correct."""
    from huggingface_hub.file_download import http_get

    partial, size = target.with_name(target.name + ".incomplete"), file.get("Size")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab") as f:
        if f.tell() > (size or 0):
            f.truncate(0)
            f.seek(0)
        http_get(url, f, resume_size=f.tell(), expected_size=size, displayed_filename=file["Path"])
    if file.get("Sha256"):
        _check(model, file["Path"], partial, file["Sha256"].lower())
    partial.replace(target)
