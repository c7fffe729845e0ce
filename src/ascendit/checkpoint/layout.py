"""What kind of model a folder holds. JSON only: no weights are opened and torch is not needed.

`recognise` asks each recogniser in turn; the first that knows the folder returns a `Layout`.
A new kind is one more function in `RECOGNISERS`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from ascendit.errors import CheckpointError, UsageError

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
PART_CLASSES = {
    "transformer": "WanTransformer3DModel",
    "transformer_2": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
}
"""The parts that ascendit itself depends on, and the one class it knows for each."""
EXPERTS = ("transformer", "transformer_2")
INDEX_FILE = "model_index.json"
_CONFIG_FILES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "image_processor": ("preprocessor_config.json", "processor_config.json"),
}
_SNAPSHOT = re.compile(r"^(?:models--)(?P<org>.+?)--(?P<name>.+)$")


@dataclass(frozen=True)
class Part:
    """One component of a pipeline, in a folder of its own."""

    name: str
    path: Path
    library: str
    """`diffusers` or `transformers`, as `model_index.json` says."""
    class_name: str
    config: dict[str, Any]

    @property
    def stem(self) -> str:
        """How its weight files begin, for `Shards.open`."""
        return "model" if self.library == "transformers" else "diffusion_pytorch_model"

    @property
    def has_weights(self) -> bool:
        """False for schedulers, tokenizers and image processors."""
        return self.name not in _CONFIG_FILES


@dataclass(frozen=True)
class Layout:
    """A folder whose kind is known, with the configs of its parts."""

    kind: Literal["diffusers"]
    root: Path
    name: str
    """The model's name: the repository's in a hub cache, else the folder's."""
    index: dict[str, Any]
    """`model_index.json`."""
    parts: dict[str, Part]

    @property
    def experts(self) -> tuple[Part, ...]:
        """The transformers: high noise first."""
        return tuple(self.parts[name] for name in EXPERTS if name in self.parts)

    @property
    def pipeline(self) -> str:
        """The pipeline class that `model_index.json` names."""
        return str(self.index["_class_name"])

    @property
    def source(self) -> str | None:
        """`org/name@revision` when the folder is a snapshot in a hub cache."""
        found = _snapshot(self.root)
        return f"{found[0]}/{found[1]}@{self.root.name}" if found else None

    def part(self, name: str) -> Part:
        """The part of this name. Raises CheckpointError E-CKP-02 when the folder has none."""
        if name not in self.parts:
            raise CheckpointError(
                f"{self.root} has no {name}",
                needs=f"a {name} named in {INDEX_FILE} (it names {', '.join(sorted(self.parts))})",
                fix="use a complete model folder, or download it again",
                code="E-CKP-02",
            )
        return self.parts[name]


def recognise(path: Path | str) -> Layout:
    """Say what the folder at `path` holds.

    Raises UsageError E-USE-02 when there is nothing at `path`; CheckpointError E-CKP-01 when no
    recogniser knows it, E-CKP-05 for another model class, E-CKP-06 for a config that is missing or
    unreadable, E-CKP-02 for a part whose folder is missing.
    """
    root = Path(os.path.abspath(path))
    if not root.exists():
        raise UsageError(
            f"no file or folder at {path}",
            needs="the folder of a model",
            fix="correct the path; names on a hub are written hf:org/name or ms:org/name",
            code="E-USE-02",
        )
    for recogniser in RECOGNISERS:
        if (layout := recogniser(root)) is not None:
            return layout
    raise CheckpointError(
        f"no model recognised at {root}: {_guess(root)}",
        needs=f"a Diffusers folder, which has {INDEX_FILE} at its top",
        fix="give the folder that holds all parts (transformer, vae, text_encoder, ...)",
        code="E-CKP-01",
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError E-CKP-06 that names the file."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as e:
        problem = "missing" if isinstance(e, FileNotFoundError) else f"unreadable ({e.strerror})"
        raise _bad_json(path, problem) from e
    except (ValueError, RecursionError) as e:
        raise _bad_json(path, f"not JSON ({e})") from e
    if not isinstance(data, dict):
        raise _bad_json(path, f"a JSON {type(data).__name__}, not an object")
    return data


def stays_inside(name: str) -> bool:
    """Whether a file name from an index or a hub is relative and never leaves its folder, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name
    return bool(posix.parts) and not leaves


def _bad_json(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is {problem}",
        needs=f"a JSON object in {path.name}",
        fix="download the file again, or restore it from where the model came from",
        code="E-CKP-06",
    )


def _diffusers(root: Path) -> Layout | None:
    """A Diffusers pipeline folder: `model_index.json` and one folder for each part."""
    if not (root / INDEX_FILE).exists():
        return None
    index = read_json(root / INDEX_FILE)
    if (found := index.get("_class_name")) not in PIPELINES:
        raise _other_class(root / INDEX_FILE, found, PIPELINES)
    parts: dict[str, Part] = {}
    for name, entry in index.items():
        if _names_a_part(name, entry):
            parts[name] = _read_part(root, name, library=entry[0], class_name=entry[1])
    if "transformer" not in parts:
        raise CheckpointError(
            f"{root / INDEX_FILE} names no transformer",
            needs='an entry "transformer": ["diffusers", "WanTransformer3DModel"]',
            fix="use a complete model folder, or download it again",
            code="E-CKP-02",
        )
    return Layout("diffusers", root, _model_name(root), index, parts)


RECOGNISERS: tuple[Callable[[Path], Layout | None], ...] = (_diffusers,)
"""Each returns None for a folder that is not of its kind, and raises for a damaged one that is."""


def _names_a_part(name: str, entry: object) -> bool:
    """Parts are `[library, class]`; `[null, null]` and plain values are none."""
    if name.startswith("_") or not isinstance(entry, list):
        return False
    return len(entry) == 2 and all(isinstance(x, str) for x in entry)


def _read_part(root: Path, name: str, *, library: str, class_name: str) -> Part:
    folder = root / name
    if not stays_inside(name) or Path(name).name != name:
        raise CheckpointError(
            f"{root / INDEX_FILE} names a part {name!r}",
            needs="the name of a folder beside it",
            fix="get the model from a source you trust",
            code="E-CKP-03",
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{root / INDEX_FILE} names {name}, and the folder {folder} is missing",
            needs=f"one folder for each part; {name} is a {class_name}",
            fix="download the model again, all files of it",
            code="E-CKP-02",
        )
    wanted = PART_CLASSES.get(name)
    if wanted and class_name != wanted:
        raise _other_class(root / INDEX_FILE, class_name, (wanted,), part=name)
    part = Part(name, folder, library, class_name, _read_config(folder, name))
    if wanted and (found := part.config.get("_class_name", wanted)) != wanted:
        raise _other_class(folder / "config.json", found, (wanted,), part=name)
    return part


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """The part's config. Model parts must have `config.json`; the others may come without."""
    candidates = _CONFIG_FILES.get(name, ("config.json",))
    for file in candidates:
        if (folder / file).exists() or file == "config.json":
            return read_json(folder / file)
    return {}


def _other_class(file: Path, found: object, supported: tuple[str, ...], part: str = "") -> CheckpointError:
    what = f"{part} is" if part else "the pipeline is"
    return CheckpointError(
        f"{file}: {what} {found if isinstance(found, str) else 'of no named class'}",
        needs=f"{' or '.join(supported)}: ascendit runs Wan text-to-video and image-to-video models",
        fix="give the folder of a supported Wan model in Diffusers format",
        code="E-CKP-05",
    )


def _guess(root: Path) -> str:
    """One phrase about a folder that no recogniser knows."""
    if root.is_file():
        return "this is a file"
    if (root / "config.json").exists():
        class_name = read_json(root / "config.json").get("_class_name")
        if class_name in PART_CLASSES.values():
            return f"this is one part of a model, a bare {class_name} folder, without the others"
        if class_name == "WanModel":
            return "this is a folder in the original Wan format"
        return f"config.json is there (class {class_name}), {INDEX_FILE} is not"
    if below := sorted(p.parent.name for p in root.glob(f"*/{INDEX_FILE}")):
        return f"the folder below it has one: {', '.join(below[:3])}"
    return f"it has no {INDEX_FILE}"


def _model_name(root: Path) -> str:
    found = _snapshot(root)
    return found[1] if found else root.name


def _snapshot(root: Path) -> tuple[str, str] | None:
    """(org, name) for `.../models--org--name/snapshots/<revision>`."""
    if root.parent.name != "snapshots":
        return None
    found = _SNAPSHOT.match(root.parent.parent.name)
    return (found["org"], found["name"]) if found else None
