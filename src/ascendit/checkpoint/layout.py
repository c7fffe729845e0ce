"""What kind of model a folder or file holds. JSON and file names only: no weights are opened, no torch.

`recognise` asks first for a Diffusers pipeline folder, then for transformers that stand alone
(`checkpoint.bare`): original Wan, msModelSlim exports, single files and what is left of a pipeline.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint import bare
from ascendit.checkpoint.part import CONFIG_FILES, EXPERTS, PART_CLASSES, other_class
from ascendit.checkpoint.part import Part as Part
from ascendit.checkpoint.part import read_json as read_json
from ascendit.checkpoint.part import stays_inside as stays_inside
from ascendit.checkpoint.store import listed
from ascendit.errors import CheckpointError, UsageError

Kind = Literal["diffusers", "transformers-only", "transformer", "wan", "msmodelslim", "file"]
WORDS: dict[Kind, str] = {
    "diffusers": "a Diffusers pipeline folder",
    "transformers-only": "the transformers of a Diffusers folder, without the other parts",
    "transformer": "a bare Diffusers transformer, without the other parts of a model",
    "wan": "a model in the original Wan format",
    "msmodelslim": "an export of msModelSlim, which holds transformers only",
    "file": "a single file, which holds a transformer only",
}
"""Each kind in words."""
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
INDEX_FILE = "model_index.json"
_SNAPSHOT = re.compile(r"^(?:models--)(?P<org>.+?)--(?P<name>.+)$")


@dataclass(frozen=True)
class Layout:
    """A folder or file whose kind is known, with the configs of its parts."""

    kind: Kind
    root: Path
    name: str
    """The model's name: the repository's in a hub cache, else the folder's."""
    index: dict[str, Any]
    """`model_index.json`; empty where there is none."""
    parts: dict[str, Part]

    @property
    def experts(self) -> tuple[Part, ...]:
        """The transformers: high noise first."""
        return tuple(self.parts[name] for name in EXPERTS if name in self.parts)

    @property
    def pipeline(self) -> str:
        """The pipeline class that `model_index.json` names; empty where there is none."""
        return str(self.index.get("_class_name", ""))

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

    def require_pipeline(self) -> None:
        """Raise CheckpointError E-CKP-01 unless this is a whole pipeline, which can make videos."""
        if self.kind != "diffusers":
            raise CheckpointError(
                f"{self.root} is {WORDS[self.kind]}; no video can be made from it alone",
                needs=f"a Diffusers folder with {INDEX_FILE}, text encoder and VAE",
                fix=f"ascendit repack {self.root} --base MODEL -o DST, where MODEL is the Diffusers folder "
                "of the same model, then use DST",
                code="E-CKP-01",
            )


def recognise(path: Path | str) -> Layout:
    """Say what the folder or file at `path` holds.

    Raises UsageError E-USE-02 when there is nothing at `path`; CheckpointError E-CKP-01 when it is of
    no known kind, E-CKP-05 for another model class, E-CKP-06 for a config that is missing or
    unreadable, E-CKP-02 and E-CKP-03 for a part whose folder or weight files are missing, E-CKP-07 for
    several exports in one folder.
    """
    root = Path(os.path.abspath(path))
    try:
        if not root.exists():
            raise UsageError(
                f"no file or folder at {path}",
                needs="a model folder, or a .safetensors file",
                fix="correct the path; names on a hub are written hf:org/name or ms:org/name",
                code="E-USE-02",
            )
        if (layout := _diffusers(root)) is not None:
            return layout
        if (found := bare.find(root)) is not None:
            kind, parts = found
            return Layout(kind, root, _model_name(root), {}, {part.name: part for part in parts})
        raise _unknown(root)
    except OSError as e:
        raise CheckpointError(
            f"{root} cannot be read: {e.strerror}",
            needs="files and folders that this user may read",
            fix="correct the path, or the rights on it",
            code="E-CKP-01",
        ) from e


def _unknown(root: Path) -> CheckpointError:
    return CheckpointError(
        f"no model recognised at {root}: {_guess(root)}",
        needs=f"a Diffusers folder, which has {INDEX_FILE} at its top; a folder of transformers alone; an "
        "original Wan folder (config.json, or high_noise_model and low_noise_model); an msModelSlim "
        "export (quant_model_description*.json); or one .safetensors file of a Wan transformer",
        fix="give the folder that holds all parts, or the one file",
        code="E-CKP-01",
    )


def _diffusers(root: Path) -> Layout | None:
    """A Diffusers pipeline folder: `model_index.json` and one folder for each part."""
    if not (root / INDEX_FILE).exists():
        return None
    index = read_json(root / INDEX_FILE)
    if (found := index.get("_class_name")) not in PIPELINES:
        raise other_class(root / INDEX_FILE, found, PIPELINES)
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
        raise other_class(root / INDEX_FILE, class_name, (wanted,), part=name)
    part = Part(name, folder, library, class_name, _read_config(folder, name))
    if wanted and (found := part.config.get("_class_name", wanted)) != wanted:
        raise other_class(folder / "config.json", found, (wanted,), part=name)
    return part


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """The part's config. Model parts must have `config.json`; the others may come without."""
    candidates = CONFIG_FILES.get(name, ("config.json",))
    for file in candidates:
        if (folder / file).exists() or file == "config.json":
            return read_json(folder / file)
    return {}


def _guess(root: Path) -> str:
    """One phrase about something that is of no known kind."""
    if root.is_file():
        return "a file, and its name does not end in .safetensors"
    if below := sorted(p.parent.name for p in root.glob(f"*/{INDEX_FILE}")):
        return f"the folder below it has one: {', '.join(below[:3])}"
    if (root / "config.json").exists():
        class_name = read_json(root / "config.json").get("_class_name")
        return f"config.json is there (class {class_name}), {INDEX_FILE} is not"
    if files := bare.weights_in(root):
        return f"it holds {len(files)} weight files that no index joins: {listed(files)}; give one of them"
    return f"it has no {INDEX_FILE}"


def _model_name(root: Path) -> str:
    found = _snapshot(root)
    return found[1] if found else root.name.removesuffix(".safetensors")


def _snapshot(root: Path) -> tuple[str, str] | None:
    """(org, name) for `.../models--org--name/snapshots/<revision>`."""
    if root.parent.name != "snapshots":
        return None
    found = _SNAPSHOT.match(root.parent.parent.name)
    return (found["org"], found["name"]) if found else None
