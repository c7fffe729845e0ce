"""Files of clean latents, kept when a run fails after its last step: only the decoding is repeated.

    ascendit generate --latents circle.latents.safetensors -o circle.mp4

A file holds the tensor `latents`, float32 [1, z, F, h, w], and in its metadata the request, the model and the
options of `load`, as in the JSON beside a video.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ascendit.errors import UsageError
from ascendit.pipeline.request import GenerateRequest
from ascendit.validation import parse

NAME, RECORD = "latents", "ascendit"
SUFFIX = ".latents.safetensors"


@dataclass(frozen=True, kw_only=True)
class KeptLatents:
    """Latents that can be decoded again."""

    latents: Any
    """float32 [1, z, F, h, w], an array."""
    request: GenerateRequest
    source: str
    """The model as passed to `load`."""
    loaded: Mapping[str, Any]
    """The options of `load`, from `LoadOptions.record`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """The versions of the run, as in the JSON beside a video; empty for files of older versions."""

    @property
    def record(self) -> dict[str, Any]:
        """The keys of the JSON beside a video that reproduce it."""
        request = json.loads(self.request.to_json())
        run = {"source": self.source, "load": dict(self.loaded), "versions": dict(self.versions)}
        return {**run, "request": request}

    def save(self, file: Path) -> Path:
        """Write the file, complete or not at all. Raises OSError."""
        from safetensors.numpy import save

        data = save({NAME: np.ascontiguousarray(self.latents)}, {RECORD: json.dumps(self.record)})
        file.parent.mkdir(parents=True, exist_ok=True)
        new = new_file(file)
        try:
            new.write_bytes(data)
            new.replace(file)
        finally:
            new.unlink(missing_ok=True)
        return file


def new_file(file: Path) -> Path:
    """The name of a file of latents until it is complete."""
    return file.with_name(f".{file.name}.new")


def read_latents(file: Path) -> KeptLatents:
    """Read latents. Raises UsageError: E-USE-02 for a missing file, E-USE-01 for any other content."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        fix = "correct the path; a failed run prints the path of its latents"
        raise UsageError(f"no file {file}", needs=f"a {SUFFIX} file", fix=fix, code="E-USE-02")
    try:
        with safe_open(file, framework="np") as opened:
            record = parse((opened.metadata() or {})[RECORD], "json")
            latents = opened.get_tensor(NAME)
        request = GenerateRequest(**record["request"])
        source, loaded, versions = record["source"], record["load"], record.get("versions", {})
        if not isinstance(source, str) or not isinstance(loaded, dict) or not isinstance(versions, dict):
            raise TypeError("source, load or versions has another type")
        if latents.ndim != 5 or latents.dtype != np.float32 or not np.isfinite(latents).all():
            raise ValueError(f"latents are {latents.dtype} {list(latents.shape)}, or not finite")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, UsageError) as e:
        got = f"{file} has no latents of ascendit: {getattr(e, 'got', e)}"
        needs = "a file that --keep-latents or a failed run has written"
        raise UsageError(got, needs=needs, fix="run the request again with --keep-latents") from e
    return KeptLatents(latents=latents, request=request, source=source, loaded=loaded, versions=versions)
