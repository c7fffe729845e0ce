"""One component of a model and the small readers that every other module of `checkpoint` builds on."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ascendit.errors import CheckpointError

TRANSFORMER = "WanTransformer3DModel"
PART_CLASSES = {"transformer": TRANSFORMER, "transformer_2": TRANSFORMER, "vae": "AutoencoderKLWan"}
"""The parts that ascendit itself depends on, and the one class it knows for each."""
EXPERTS = ("transformer", "transformer_2")
STEM = "diffusion_pytorch_model"
MAX_JSON = 100_000_000
"""Bytes. The index of the largest Wan model has 150 kB."""
CONFIG_FILES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "image_processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Parts without weights, and the file names that their config may have."""


@dataclass(frozen=True)
class Part:
    """One component of a model, most often in a folder of its own."""

    name: str
    """As in `model_index.json`; of a transformer `transformer` or `transformer_2`, in every layout."""
    path: Path
    """Its folder, or the one weight file that it is."""
    library: str = "diffusers"
    """`diffusers` or `transformers`."""
    class_name: str = TRANSFORMER
    config: dict[str, Any] = field(default_factory=dict)
    """As stored: Diffusers' or the original Wan config; `{}` if absent."""
    files: tuple[Path, ...] = ()
    """The weight files where their names do not follow from `stem`."""
    index: Path | None = None
    """The index of the weight files, where its name does not follow from `stem`."""

    @property
    def stem(self) -> str:
        """How its weight files begin, for `Shards.open`."""
        return "model" if self.library == "transformers" else STEM

    @property
    def has_weights(self) -> bool:
        """False for schedulers, tokenizers and image processors."""
        return self.name not in CONFIG_FILES

    @property
    def folder(self) -> Path:
        """The folder of its JSON files."""
        return self.path.parent if self.files == (self.path,) else self.path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError E-CKP-06 that names the file, for a key twice too."""
    try:
        status = path.stat()
        if status.st_size > MAX_JSON or not is_plain(status):
            raise _bad_json(path, "no regular file, or too long")
        data = loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as e:
        problem = "missing" if isinstance(e, FileNotFoundError) else f"unreadable ({e.strerror})"
        raise _bad_json(path, problem) from e
    except (ValueError, RecursionError) as e:
        raise _bad_json(path, f"not JSON ({e})") from e
    if not isinstance(data, dict):
        raise _bad_json(path, f"a JSON {type(data).__name__}, not an object")
    return data


def loads(text: str) -> Any:
    """Parse JSON. ValueError or RecursionError for invalid JSON, duplicate keys and lone surrogates."""
    data = json.loads(text, object_pairs_hook=_once)
    if "\\ud" in text.lower():
        json.dumps(data, ensure_ascii=False).encode()
    return data


def is_plain(status: os.stat_result) -> bool:
    """Whether opening it returns at once: a file or a folder, no pipe and no device."""
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a name stands there twice")
    return data


def stays_inside(name: str) -> bool:
    """Whether a file name from an index or a hub is relative and never leaves its folder, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name
    return bool(posix.parts) and not leaves


def other_class(file: Path, found: object, supported: tuple[str, ...], part: str = "") -> CheckpointError:
    """E-CKP-05: the config in `file` names another class than those supported."""
    what = f"{part} is" if part else "the pipeline is"
    return CheckpointError(
        f"{file}: {what} {found if isinstance(found, str) else 'of no named class'}",
        needs=f"{' or '.join(supported)}: ascendit runs Wan text-to-video and image-to-video models",
        fix="give the folder of a supported Wan model",
        code="E-CKP-05",
    )


def unreadable(file: Path | str, problem: str) -> CheckpointError:
    """E-CKP-02: a weight file whose header was read before has changed since."""
    return CheckpointError(
        f"{file}: {problem}",
        needs="source files that stay as they are until the run is over",
        fix="find what changed the file; download it again if it is damaged",
        code="E-CKP-02",
    )


def _bad_json(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is {problem}",
        needs=f"a JSON object in {path.name}",
        fix="download the file again, or restore it from where the model came from",
        code="E-CKP-06",
    )
