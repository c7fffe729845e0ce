"""From the name of a model to its folder: a path, "demo", or a download pinned to a revision. No torch.

    hf:org/name[@revision]      through `huggingface_hub`, which reads HF_ENDPOINT, HF_HOME and the token
    ms:org/name[@revision]      through the plain HTTP API of ModelScope

Both caches have the same shape, so that a folder tells its own source:
`<cache>/models--org--name/snapshots/<revision>/`. No environment variable is read here.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from ascendit.checkpoint.component import stays_inside
from ascendit.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from urllib.error import HTTPError

logger = logging.getLogger("ascendit")

DEMO = Path(__file__).resolve().parents[1] / "demo" / "models" / "demo"
"""The model that comes with the package."""

MODELSCOPE = "https://modelscope.cn"
_USELESS = "msgpack h5 ckpt onnx bin png jpg jpeg gif webp svg mp4 mov webm".split()
SKIPPED = tuple(f"*.{e}" for ending in _USELESS for e in (ending, ending.upper()))
"""What no model folder needs: weights in formats that are not read, pictures, videos."""
EXPERT_WEIGHTS = ("transformer/*.safetensors*", "transformer_2/*.safetensors*")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def model_folder(model: str | Path, *, experts: bool = True) -> Path:
    """The folder of "demo", a path, hf:org/name or ms:org/name (with "@revision").

    `experts`: False when the weights of its transformers are not wanted, which need not be downloaded then.
    Raises UsageError E-USE-02 if there is no such folder.
    """
    name = str(model)
    if name == "demo":
        if not DEMO.is_dir():
            raise EnvironmentProblem(
                f"the demo model is not in this installation ({DEMO})",
                needs="the weights that come with the package",
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
            fix="correct the path, or put hf: before a name on Hugging Face",
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
    """Download what is not in the cache yet, and return the folder. Its name is the revision it is pinned to.

    `revision`: branch, tag or commit; also as `@revision` in `name`. `cache`: folder; None = the one of
    `huggingface_hub`, or `~/.cache/ascendit/modelscope`. `endpoint`: another server that speaks the same API.
    `experts`: False leaves the weights of the transformers out, from Hugging Face (ModelScope: all files).
    Without network a complete cached copy serves. Raises UsageError E-HUB-01 for a name or revision that
    is not there, EnvironmentProblem E-HUB-01 for network, access and damaged downloads.
    """
    hub, repo, revision = _parse(name, revision)
    if hub == "hf":
        skipped = (*SKIPPED, *(() if experts else EXPERT_WEIGHTS))
        path = _huggingface(repo, revision, cache, endpoint, skipped)
    else:
        cache = cache or Path.home() / ".cache" / "ascendit" / "modelscope"
        path = _modelscope(repo, revision or "master", cache, endpoint or MODELSCOPE)
    logger.info("%s:%s@%s in %s", hub, repo, path.name, path)
    return path


def _parse(name: str, revision: str | None) -> tuple[str, str, str | None]:
    """(hub, org/name, revision)."""
    hub, _, rest = name.partition(":")
    repo, _, written = rest.partition("@")
    revisions = {r for r in (revision, written) if r}
    good = hub in ("hf", "ms") and _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo
    if not good or len(revisions) > 1 or not all(stays_inside(r) and r != "." for r in revisions):
        raise UsageError(
            f"hub name {name!r}" + (f" with revision {revision!r}" if revision else ""),
            needs="hf:org/name or ms:org/name, and one revision at most (hf:org/name@revision)",
            fix="for example hf:Wan-AI/Wan2.2-TI2V-5B-Diffusers; a folder is given by its path alone",
            code="E-HUB-01",
        )
    return hub, repo, revisions.pop() if revisions else None


def _unknown(what: str, why: str, fix: str) -> UsageError:
    needs = "a model and revision that the hub has and that you may read"
    return UsageError(f"{what}: {why}", needs=needs, fix=fix, code="E-HUB-01")


def _trouble(what: str, why: object, fix: str) -> EnvironmentProblem:
    needs = "the hub within reach, or a complete copy in the cache"
    return EnvironmentProblem(f"{what}: {why}", needs=needs, fix=fix, code="E-HUB-01")


# ---- Hugging Face -------------------------------------------------------------------------------

_SHA256 = re.compile(r"[0-9a-f]{64}")


def _huggingface(
    repo: str, revision: str | None, cache: Path | None, endpoint: str | None, skipped: tuple[str, ...]
) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as e:
        raise EnvironmentProblem(
            "huggingface_hub is not installed",
            needs="it, for names that begin with hf:",
            fix="pip install huggingface_hub, or give the path of a folder",
            code="E-ENV-01",
        ) from e
    what = f"hf:{repo}" + (f"@{revision}" if revision else "")
    begun = time.time()
    try:
        path = snapshot_download(
            repo, revision=revision, cache_dir=cache, endpoint=endpoint, ignore_patterns=list(skipped)
        )
    except errors.GatedRepoError as e:
        fix = f"accept the licence on the page of {repo}, then `hf auth login`"
        raise _trouble(what, "access must be asked for", fix) from e
    except errors.RevisionNotFoundError as e:
        raise _unknown(what, "no such revision", "give a branch, tag or commit of this model") from e
    except errors.RepositoryNotFoundError as e:
        fix = "correct the name; `hf auth login` if the model is private"
        raise _unknown(what, "no such model, or it is private", fix) from e
    except Exception as e:  # httpx, OSError, checks of the library: all are trouble with this download
        fix = "check network, HF_ENDPOINT and free disk space, then run it again: finished files are kept"
        raise _trouble(what, _first_line(e), fix) from e
    _check_blobs(Path(path), begun, what)
    return Path(path)


def _check_blobs(snapshot: Path, begun: float, what: str) -> None:
    """Hash the large files that came since `begun`: their cache name is their sha256, and the library
    compares sizes only. Two seconds are for file systems with coarse clocks."""
    for link in snapshot.rglob("*"):
        blob = link.resolve()
        if not _SHA256.fullmatch(blob.name) or blob.stat().st_mtime < begun - 2:
            continue
        with open(blob, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != blob.name:
            link.unlink()
            blob.unlink()
            problem = (
                f"{link.relative_to(snapshot)} arrived damaged (sha256 {digest[:12]}..., not {blob.name})"
            )
            raise _trouble(what, problem, "run it again: only this file is downloaded anew")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- ModelScope ---------------------------------------------------------------------------------

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30  # seconds without a byte
_TRIES = 3
_BLOCK = 1 << 20


@dataclass(frozen=True)
class _File:
    path: str
    size: int | None
    sha256: str | None
    commit: str


class _Unreachable(Exception):
    """The server did not answer, or broke off."""


def _modelscope(repo: str, revision: str, cache: Path, endpoint: str) -> Path:
    """Files arrive in `<revision>.part`, each checked, and the folder gets its name when it is complete."""
    what = f"ms:{repo}@{revision}"
    home = Path(os.path.abspath(cache)) / f"models--{repo.replace('/', '--')}"
    ref = home / "refs" / quote(revision, safe="")
    if (snapshot := home / "snapshots" / revision).is_dir() and _COMMIT.fullmatch(revision):
        return snapshot
    base = f"{endpoint.rstrip('/')}/api/v1/models/{repo}/repo"
    try:
        files, commit = _listing(base, what, revision)
        snapshot = home / "snapshots" / (commit or _digest(files))
        from filelock import FileLock

        snapshot.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):
            if not snapshot.is_dir():
                _fill(snapshot, files, base, what, commit or revision)
            ref.parent.mkdir(exist_ok=True)
            written = ref.with_name(ref.name + ".part")
            written.write_text(snapshot.name)
            written.replace(ref)
    except _Unreachable as e:
        if ref.is_file() and (snapshot := home / "snapshots" / ref.read_text()).is_dir():
            logger.warning("%s: hub out of reach (%s); using the cached copy", what, e)
            return snapshot
        raise _trouble(what, e, "check the network and run it again: finished files are kept") from e
    except OSError as e:
        raise _trouble(what, e, f"make {cache} writable, or give another cache folder") from e
    return snapshot


def _listing(base: str, what: str, revision: str) -> tuple[list[_File], str | None]:
    """The files worth having, and the commit they belong to when the hub names it."""
    query = urlencode({"Revision": revision, "Recursive": "True"})
    with _get(f"{base}/files?{query}", what) as response:
        body = response.read()
    try:
        answer = json.loads(body)
        if answer.get("Success") is False:
            raise _unknown(what, str(answer.get("Message")), "correct the name or the revision")
        files = [_file(entry) for entry in answer["Data"]["Files"] if entry["Type"] != "tree"]
        latest = str((answer["Data"].get("LatestCommitter") or {}).get("Id"))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise _Unreachable(f"answer not understood ({type(e).__name__})") from e
    for file in files:
        if not stays_inside(file.path):
            problem = f"the hub names a file outside the folder: {file.path!r}"
            raise _trouble(what, problem, "do not use this model")
    files = [f for f in files if not any(fnmatch.fnmatchcase(f.path, s) for s in SKIPPED)]
    commit = revision if _COMMIT.fullmatch(revision) else latest
    return files, commit if _COMMIT.fullmatch(commit) else None


def _file(entry: dict[str, Any]) -> _File:
    size = entry.get("Size")
    return _File(
        path=str(entry["Path"]),
        size=None if size is None else int(size),
        sha256=str(entry.get("Sha256") or "").lower() or None,
        commit=str(entry.get("Revision")),
    )


def _digest(files: list[_File]) -> str:
    """In place of a commit that the hub does not name: the same 40 digits for the same content."""
    content = sorted((f.path, f.size, f.sha256 or f.commit) for f in files)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]


def _fill(snapshot: Path, files: list[_File], base: str, what: str, revision: str) -> None:
    part = snapshot.with_name(snapshot.name + ".part")
    part.mkdir(exist_ok=True)
    needed = sum(f.size or 0 for f in files if not (part / f.path).exists())
    if (free := shutil.disk_usage(part).free) < needed:
        raise _trouble(
            what, f"{needed / 2**30:.1f} GiB to download, {free / 2**30:.1f} GiB free", "free disk space"
        )
    for file in files:
        target = part / file.path
        if target.is_file():  # checked before it got this name
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        query = urlencode({"Revision": revision, "FilePath": file.path})
        _download(f"{base}?{query}", target, file, what)
    os.replace(part, snapshot)


def _download(url: str, target: Path, file: _File, what: str) -> None:
    """Into `<name>.incomplete`, taken up where it broke off; renamed when size and sha256 are right."""
    partial = target.with_name(target.name + ".incomplete")
    for attempt in range(_TRIES):
        try:
            _append(url, partial, file, what)
            break
        except _Unreachable:
            if attempt == _TRIES - 1:
                raise
    size = partial.stat().st_size
    with open(partial, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if size != (size if file.size is None else file.size) or digest != (file.sha256 or digest):
        partial.unlink()
        got = f"{size} bytes, sha256 {digest[:12]}...; announced {file.size} bytes, {file.sha256}"
        fix = "run it again; if that does not help, the copy on the hub is damaged"
        raise _trouble(what, f"{file.path} arrived damaged ({got})", fix)
    partial.replace(target)


def _append(url: str, partial: Path, file: _File, what: str) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    if start and start == file.size:
        return
    if start > (file.size or 0):
        start = 0
    with _get(url, what, start) as response, open(partial, "ab") as f:
        if response.status != 206:  # the whole file comes, whatever was asked for
            f.truncate(0)
        while block := response.read(_BLOCK):
            f.write(block)
        if response.length:
            raise _Unreachable("the connection broke off")


@contextmanager
def _get(url: str, what: str, start: int = 0) -> Iterator[Any]:
    """An open response. A refusal becomes an error for the user; everything else is _Unreachable."""
    import http.client
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    headers = {"User-Agent": "ascendit"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as response:
            yield response
    except HTTPError as e:
        with e:
            raise _refusal(e, what) from e
    except (URLError, ConnectionError, TimeoutError, http.client.HTTPException) as e:
        raise _Unreachable(_first_line(e)) from e


def _refusal(error: HTTPError, what: str) -> Exception:
    if error.code == 404:
        return _unknown(what, "no such model, revision or file", "correct the name or the revision")
    if error.code in (401, 403):
        fix = "download it with ModelScope's own tool, logged in, and give the path of the folder"
        return _trouble(what, f"access refused (HTTP {error.code})", fix)
    return _Unreachable(f"HTTP {error.code} {error.reason}")
