"""A component of a model; the JSON reader and the errors shared by the modules of `checkpoint`."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ascendit.checkpoint.sources import record_source
from ascendit.errors import AscenditError, CheckpointError, is_out_of_memory

TRANSFORMER = "WanTransformer3DModel"
EXPERTS = ("transformer", "transformer_2")
EXPERT_ALIASES = dict(zip(EXPERTS, EXPERTS, strict=True)) | dict(zip(("high", "low"), EXPERTS, strict=True))
"""Names of the experts before `=`, in any case; `high` and `low` are their noise levels."""
WAN_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
"""Expert -> its folder in the original Wan format."""
_NOISE = re.compile(r"(?<![a-z])(high|low)(?![a-z])|(high|low)[_-]?noise", re.IGNORECASE)
STEM = "diffusion_pytorch_model"
MAX_JSON = 100_000_000
"""Size limit of a JSON file in bytes. The index of the largest Wan model has 150 kB."""
MAX_DEPTH = 100
"""Limit of nested objects and lists; deeper ones exhaust the stack of a later reader."""
_SYSTEM = ("/proc/", "/sys/")
CONFIG_FILES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "image_processor": ("preprocessor_config.json", "processor_config.json"),
}
"""Components without weights -> possible names of their config file."""


@dataclass(frozen=True)
class Part:
    """One component of a model, usually a folder."""

    name: str
    """As in `model_index.json`; transformers are `transformer` and `transformer_2` in every layout."""
    path: Path
    """Its folder, or its single weight file."""
    library: str = "diffusers"
    """`diffusers` or `transformers`."""
    class_name: str = TRANSFORMER
    config: dict[str, Any] = field(default_factory=dict)
    """As stored: Diffusers' or the original Wan config; `{}` if absent."""
    files: tuple[Path, ...] = ()
    """The weight files, if their names do not follow from `stem`."""
    index: Path | None = None
    """The index of the weight files, if its name does not follow from `stem`."""

    @property
    def stem(self) -> str:
        """Common prefix of the names of its weight files, for `Shards.open`."""
        return "model" if self.library == "transformers" else STEM

    @property
    def has_weights(self) -> bool:
        """False for schedulers, tokenizers and image processors."""
        return self.name not in CONFIG_FILES

    @property
    def folder(self) -> Path:
        """The folder with its JSON files."""
        return self.path.parent if self.files == (self.path,) else self.path


def noise_of(stem: str) -> str | None:
    """`high` or `low`, if the name of a file names one of them, without its ending; None for both."""
    named = {(a or b).lower() for a, b in _NOISE.findall(stem)}
    return named.pop() if len(named) == 1 else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises CheckpointError (E-CKP-06) if it is missing, unreadable, not a JSON object or has duplicate keys.
    """
    try:
        data = loads(read_small(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise _bad_json(path, f"not JSON ({e})") from e
    if not isinstance(data, dict):
        raise _bad_json(path, f"a JSON {type(data).__name__}, not an object")
    return data


def read_small(path: Path) -> bytes:
    """Return the bytes of a JSON or text file.

    Raises CheckpointError (E-CKP-06) if it is missing, unreadable, not a regular file, or too large.
    """
    try:
        check_regular(path)
        # Without O_NONBLOCK, a pipe that has replaced the file since the check would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _bad_json(path, "not a regular file")
            record_source(path, status)
            data = file.read(MAX_JSON + 1)
    except OSError as e:
        raise _bad_json(path, f"unreadable ({e.strerror})") from e
    if len(data) > MAX_JSON:
        raise _bad_json(path, "too large")
    return data


def check_regular(path: Path) -> None:
    """Raise CheckpointError (E-CKP-06) unless `path` is a regular, readable file of at most `MAX_JSON` bytes.

    A device or a pipe may block or never end; the files of procfs and sysfs show the state of this machine.
    """
    try:
        status = path.stat()
    except OSError as e:
        problem = "missing" if isinstance(e, FileNotFoundError) else f"unreadable ({e.strerror})"
        raise _bad_json(path, problem) from e
    if problem := irregular(path, status):
        raise _bad_json(path, problem)
    if status.st_size > MAX_JSON:
        raise _bad_json(path, f"too large: {status.st_size:,} bytes")
    if not os.access(path, os.R_OK):
        raise _bad_json(path, "unreadable (permission denied)")


def irregular(path: Path, status: os.stat_result) -> str:
    """The reason why a file of a model cannot be this one: not a regular file, or of the system; or ""."""
    if not stat.S_ISREG(status.st_mode):
        return "unreadable (a folder, not a file)" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    if status.st_dev in _system_devices() or os.path.realpath(path).startswith(_SYSTEM):
        return "a file of the system, not of a model"
    return ""


@functools.cache
def _system_devices() -> frozenset[int]:
    """Device numbers of procfs and sysfs, which may also be mounted elsewhere."""
    return frozenset(os.stat(folder).st_dev for folder in _SYSTEM if os.path.ismount(folder))


def loads(text: str) -> Any:
    """Parse JSON.

    Raises ValueError or RecursionError: invalid JSON, duplicate keys, lone surrogates, deep nesting.
    """
    data = json.loads(text, object_pairs_hook=_unique_keys)
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = [c.values() if isinstance(c, dict) else c for c in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if "\\ud" in text.lower():
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("duplicate key")
    return data


def stays_inside(name: str) -> bool:
    """Whether a file name from an index or a hub is relative and stays in its folder, on every system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name
    return bool(posix.parts) and not leaves


def unsupported_class(
    file: Path, class_name: object, supported: tuple[str, ...], part: str = ""
) -> CheckpointError:
    """The error E-CKP-05 for a config in `file` that names an unsupported class."""
    return CheckpointError(
        f"{file}: {part or 'the pipeline'} "
        + (f"is {class_name}" if isinstance(class_name, str) else "has no class name"),
        needs=f"{' or '.join(supported)}: ascendit runs Wan text-to-video and image-to-video models",
        fix="pass the folder of a supported Wan model",
        code="E-CKP-05",
    )


def _bad_json(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is {problem}",
        needs=f"a JSON object in {path.name}",
        fix="download the file again, or restore it from the source of the model",
        code="E-CKP-06",
    )


def library_refusal(path: Path, error: BaseException) -> BaseException:
    """The error E-CKP-06 for a file or folder that a library refuses with `error`.

    Errors of ascendit, a full memory and interruptions are returned unchanged. A panic of a library in Rust
    is no Exception.
    """
    library = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    if isinstance(error, AscenditError) or is_out_of_memory(error) or not library:
        return error
    return CheckpointError(
        f"{path}: {first_line(error)}",
        needs="the files of the model's authors",
        fix="download the component again",
        code="E-CKP-06",
    )


def first_line(error: BaseException) -> str:
    """The class and first line of an error of a library."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
