"""Resolve the name of a model to its folder: a path, "demo", or a download pinned to a revision.

Does not import torch.

    hf:org/name[@revision]      downloaded with `huggingface_hub`, which reads HF_ENDPOINT, HF_HOME, the token
    ms:org/name[@revision]      downloaded from ModelScope's HTTP API

Both caches use the layout `<cache>/models--org--name/snapshots/<revision>/`, so the path of a folder names
its source. This module reads no environment variables.
"""

from __future__ import annotations

import glob
import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ascendit.checkpoint.download import check_sha256, check_space, download_error, patiently, unknown_model
from ascendit.checkpoint.download_list import (
    NESTED,
    SKIPPED,
    TOP_FILES,
    absent,
    matching,
    part_files,
    single_file,
    weight_files,
)
from ascendit.checkpoint.trust import blob_hash
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError
from ascendit.family import SPECS

logger = logging.getLogger("ascendit")

DEMO = Path(__file__).resolve().parents[1] / "demo" / "models" / "demo"
"""The model that is part of the package."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(f"{_NAME}/{_NAME}")
_FILE = re.compile(f"(?:hf|ms):({_NAME}/{_NAME})/([\\w./-]+)")
_REVISION = re.compile(r"[\w][\w./+-]{0,199}")


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
                fix="install the package again, or in a clone: python tools/train_demo.py "
                "--export src/ascendit/demo/models/demo",
                code="E-ENV-01",
            )
        return DEMO
    if name.startswith(("hf:", "ms:")):
        return fetch(name, experts=experts)
    path, needs = Path(name).expanduser(), "a folder, hf:org/name, ms:org/name, or demo"
    if not name.strip():
        raise UsageError("an empty name of a model", needs=needs, fix="pass demo, or the path of a folder")
    if not path.exists():
        raise UsageError(f"no model at {name}", needs=needs, fix=_suggestion(name), code="E-USE-02")
    return path


def _suggestion(name: str) -> str:
    """The fix for a name that is not a path: the name of a model on a hub, if it looks like one."""
    link = re.match(r"https?://(?:www\.)?(huggingface\.co|modelscope\.cn/models)/([^/?#]+/[^/?#]+)", name)
    if link and _REPO.fullmatch(link[2]):
        return f"pass {'ms' if 'modelscope' in link[1] else 'hf'}:{link[2]}"
    if _REPO.fullmatch(name) and not name.endswith(".safetensors"):
        return f"correct the path; for the model on Hugging Face, pass hf:{name}"
    models = {re.sub(r"[^a-z0-9]", "", spec.name.lower()): spec.hub for spec in SPECS.values()}
    short = re.sub(r"[^a-z0-9]", "", Path(name).name.lower()).removesuffix("diffusers")
    if close := [key for key in models if short and short in (key, key[len("wan22") :])]:
        return f"correct the path; for the model on Hugging Face, pass {models[close[0]]}"
    return "correct the path; for a model on Hugging Face, pass hf:ORG/NAME; for names: ascendit models"


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
    `experts`: False skips the transformers' weights; a later call downloads them into the same folder.
    Without network, a complete cached copy is used. Raises UsageError (E-HUB-01) for an unknown name or
    revision, EnvironmentProblem (E-HUB-01) for network errors, missing access and damaged downloads.
    """
    from huggingface_hub import errors

    hub, repo, revision = _parse(name, revision)
    model = f"{hub}:{repo}" + (f"@{revision}" if revision else "")
    try:
        if hub == "hf":
            path = _huggingface(model, repo, revision, cache, endpoint, experts)
        else:
            from ascendit.checkpoint.modelscope import ENDPOINT, download_model

            cache = cache or Path.home() / ".cache" / "ascendit" / "modelscope"
            path = download_model(model, repo, revision or "master", cache, endpoint or ENDPOINT, experts)
    except AscenditError:
        raise
    except errors.GatedRepoError as e:
        fix = f"accept the licence on the page of {repo}, then `hf auth login`"
        raise download_error(model, "the model is gated: access must be requested", fix) from e
    except errors.RevisionNotFoundError as e:
        raise unknown_model(model, "no such revision", "give a branch, tag or commit of this model") from e
    except errors.RepositoryNotFoundError as e:
        fix = "correct the name; `hf auth login` if the model is private"
        raise unknown_model(model, "no such model, or it is private", fix) from e
    except Exception as e:  # httpx, OSError, checks of the library: the download failed
        fix = "check network, HF_ENDPOINT and free disk space, then run it again: complete files are kept"
        if isinstance(e, OSError) and e.filename:
            fix = f"make {e.filename} writable, or give another cache folder"
        raise download_error(model, _first_line(e), fix) from e
    logger.info("%s:%s@%s in %s", hub, repo, path.name, path)
    return path


def _parse(name: str, revision: str | None) -> tuple[str, str, str | None]:
    """(hub, org/name, revision)."""
    hub, _, path = name.partition(":")
    repo, _, suffix = path.partition("@")
    revisions = {r for r in (revision, suffix) if r}
    valid = hub in ("hf", "ms") and _REPO.fullmatch(repo) and ".." not in repo and "--" not in repo
    if (
        not valid
        or len(revisions) > 1
        or not all(_REVISION.fullmatch(r) and ".." not in r for r in revisions)
    ):
        fix = "for example hf:Wan-AI/Wan2.2-TI2V-5B-Diffusers; for a local folder, pass its path"
        if file := _FILE.fullmatch(name):
            command = "hf download" if hub == "hf" else "modelscope download"
            fix = f"download this file with `{command} {file[1]} {file[2]}`, and pass its path"
        raise UsageError(
            f"hub name {name!r}" + (f" with revision {revision!r}" if revision else ""),
            needs="hf:org/name or ms:org/name, with at most one revision (hf:org/name@revision)",
            fix=fix,
            code="E-HUB-01",
        )
    return hub, repo, revisions.pop() if revisions else None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---- Hugging Face -------------------------------------------------------------------------------


def _huggingface(
    model: str, repo: str, revision: str | None, cache: Path | None, endpoint: str | None, experts: bool
) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    begun = time.time()
    options: dict[str, Any] = {"cache_dir": cache, "endpoint": endpoint}
    options["ignore_patterns"] = [*SKIPPED, NESTED]

    def fetch(patterns: Sequence[str], revision: str | None) -> Path:
        options["allow_patterns"] = patterns
        return Path(patiently(model, lambda: snapshot_download(repo, revision=revision, **options)))

    def sizes() -> dict[str, int]:
        api = HfApi(endpoint=endpoint)
        tree = patiently(model, lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
        return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}

    path = fetch(TOP_FILES, revision)
    commit = path.name
    if parts := part_files(path):
        fetch(parts, commit)
    weights = weight_files(path, experts=experts)
    if missing := absent(_files(path), weights):  # the library only warns about a full disk, and fills it
        listed: dict[str, int] = {}
        with suppress(Exception):  # without network, a complete copy is used; else `fetch` has the same error
            listed = sizes()
        check_space(model, path, sum(listed[name] for name in matching(listed, missing)))
    if weights:
        fetch(weights, commit)
    if experts and not matching(_files(path), weights):
        listed = sizes()
        names = single_file(model, listed)
        check_space(model, path, sum(listed[name] for name in names))
        fetch([glob.escape(name) for name in names], commit)
    for link in path.rglob("*"):
        # A large file is named by its sha256 in the cache, and the library compares only sizes. Two seconds
        # allow for file systems with coarse timestamps.
        digest, blob = blob_hash(link), link.resolve()
        if len(digest) == 64 and blob.stat().st_mtime > begun - 2:
            check_sha256(model, str(link.relative_to(path)), blob, digest, link)
    return path


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
