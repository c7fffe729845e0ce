"""What kind of model a folder or file holds. JSON and file names only: no weights are opened, no torch.

`recognise` asks first for a Diffusers pipeline folder, then for transformers without the other parts of a
model: original Wan, msModelSlim exports, single files and what is left of a pipeline.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.component import (
    CONFIG_FILES,
    EXPERTS,
    PART_CLASSES,
    STEM,
    TRANSFORMER,
    Part,
    other_class,
    read_json,
    stays_inside,
)
from ascendit.checkpoint.quant_metadata import MANIFEST_GLOB
from ascendit.errors import CheckpointError, UsageError
from ascendit.names import listed, naming_of

LayoutKind = Literal["diffusers", "transformers-only", "transformer", "wan", "msmodelslim", "file"]
WORDS: dict[LayoutKind, str] = {
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
RECORD_FILE = "ascendit.json"
"""How `quantize` or `repack` made the folder: see `convert.provenance`."""
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+")


@dataclass(frozen=True)
class Layout:
    """A folder or file whose kind is known, with the configs of its parts."""

    kind: LayoutKind
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
        found = _file(root) if root.is_file() else _cascade(root) or _transformers_only(root) or _one(root)
        if found is not None:
            kind, parts = found
            return Layout(kind, root, _model_name(root), {}, {part.name: part for part in parts})
        raise CheckpointError(
            f"no model recognised at {root}: {_guess(root)}",
            needs=f"a Diffusers folder, which has {INDEX_FILE} at its top; a folder of transformers alone; "
            "an original Wan folder (config.json, or high_noise_model and low_noise_model); an msModelSlim "
            "export (quant_model_description*.json); or one .safetensors file of a Wan transformer",
            fix="give the folder that holds all parts, or the one file",
            code="E-CKP-01",
        )
    except OSError as e:
        raise CheckpointError(
            f"{root} cannot be read: {e.strerror}",
            needs="files and folders that this user may read",
            fix="correct the path, or the rights on it",
            code="E-CKP-01",
        ) from e


def _guess(root: Path) -> str:
    """One phrase about something that is of no known kind."""
    if root.is_file():
        return "a file, and its name does not end in .safetensors"
    if below := sorted(p.parent.name for p in root.glob(f"*/{INDEX_FILE}")):
        return f"the folder below it has one: {', '.join(below[:3])}"
    if (root / "config.json").exists():
        class_name = read_json(root / "config.json").get("_class_name")
        return f"config.json is there (class {class_name}), {INDEX_FILE} is not"
    if files := weights_in(root):
        return f"it holds {len(files)} weight files that no index joins: {listed(files)}; give one of them"
    return f"it has no {INDEX_FILE}"


def _model_name(root: Path) -> str:
    found = _snapshot(root)
    return found[1] if found else root.name.removesuffix(".safetensors")


def _snapshot(root: Path) -> tuple[str, str] | None:
    """(org, name) for `.../models--org--name/snapshots/<revision>`."""
    found = _SNAPSHOT.fullmatch("/".join(root.parts[-3:]))
    return (found[1], found[2]) if found else None


# ---- a Diffusers pipeline folder ----------------------------------------------------------------


def _diffusers(root: Path) -> Layout | None:
    """A Diffusers pipeline folder: `model_index.json` and one folder for each part."""
    if not (root / INDEX_FILE).exists():
        return None
    index = read_json(root / INDEX_FILE)
    if (found := index.get("_class_name")) not in PIPELINES:
        raise other_class(root / INDEX_FILE, found, PIPELINES)
    parts: dict[str, Part] = {}
    for name, entry in index.items():
        match entry:  # [null, null] and plain values are no parts
            case [str(library), str(class_name)] if not name.startswith("_"):
                parts[name] = _read_part(root, name, library, class_name)
    if "transformer" not in parts:
        raise CheckpointError(
            f"{root / INDEX_FILE} names no transformer",
            needs='an entry "transformer": ["diffusers", "WanTransformer3DModel"]',
            fix="use a complete model folder, or download it again",
            code="E-CKP-02",
        )
    return Layout("diffusers", root, _model_name(root), index, parts)


def _read_part(root: Path, name: str, library: str, class_name: str) -> Part:
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


# ---- transformers without the other parts -------------------------------------------------------

Recognised = tuple[LayoutKind, list[Part]]

WAN = "WanModel"
_EXPORTED = re.compile(r"quant_model_weight.*\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_CASCADES: dict[LayoutKind, LayoutKind] = {
    "msmodelslim": "msmodelslim",
    "wan": "wan",
    "file": "wan",
    "transformer": "transformers-only",
}
"""What two transformers of a kind are together."""
_NOISE = re.compile(r"(?:\w+_)?(?P<noise>high|low)_noise_model")
"""`high_noise_model`; msModelSlim before June 2026: `t2v_high_noise_model`."""


def _cascade(root: Path) -> Recognised | None:
    """A folder for the high-noise and one for the low-noise expert, both of one kind."""
    folders: dict[str, list[Path]] = {"high": [], "low": []}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        if match := _NOISE.fullmatch(folder.name):
            folders[match["noise"]].append(folder)
    if not any(folders.values()):
        return None
    if any(len(noise) != 1 for noise in folders.values()):
        names = [p.name for noise in folders.values() for p in noise]
        raise CheckpointError(
            f"{root} holds {listed(names)}",
            needs="one folder high_noise_model and one low_noise_model",
            fix="give both experts of one model; or name the folder of one expert itself to use it alone",
            code="E-CKP-02",
        )
    experts = [(folders["high"][0], EXPERTS[0]), (folders["low"][0], EXPERTS[1])]
    found = [_one(folder, name) for folder, name in experts]
    for (folder, _), one in zip(experts, found, strict=True):
        if one is None:
            raise _no_weights(folder)
    kinds = {_CASCADES[one[0]] for one in found if one}
    if len(kinds) > 1:
        raise CheckpointError(
            f"the experts in {root} are of different kinds: {', '.join(sorted(kinds))}",
            needs="both experts in one format",
            fix="put both experts of one model there",
            code="E-CKP-07",
        )
    return kinds.pop(), [part for one in found if one for part in one[1]]


def _transformers_only(root: Path) -> Recognised | None:
    """`transformer`, and perhaps `transformer_2`, without `model_index.json`."""
    parts = []
    for name in EXPERTS:
        if not (root / name / "config.json").exists():
            break
        config = read_json(root / name / "config.json")
        if (found := config.get("_class_name", TRANSFORMER)) != TRANSFORMER:
            raise other_class(root / name / "config.json", found, (TRANSFORMER,), part=name)
        parts.append(Part(name, root / name, config=config))
    return ("transformers-only", parts) if parts else None


def _file(path: Path) -> Recognised | None:
    """One file: alone, the only one of its folder, or a shard, which is refused."""
    if path.suffix != ".safetensors":
        return None
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered and int(numbered["count"]) > 1:
        raise CheckpointError(
            f"{path.name} is one of {int(numbered['count'])} files of a model",
            needs="all of them",
            fix=f"give the folder: {path.parent}",
            code="E-CKP-01",
        )
    if weights_in(path.parent) == [path.name] and (found := _one(path.parent)) is not None:
        return found
    return "file", [Part(EXPERTS[0], path, files=(path,))]


def _one(folder: Path, name: str = EXPERTS[0]) -> Recognised | None:
    """One transformer in a folder of its own."""
    return _export(folder, name) or _by_config(folder, name) or _by_weights(folder, name)


def _export(folder: Path, name: str) -> Recognised | None:
    """What msModelSlim wrote: `quant_model_weight*` and, by another check, one description beside it."""
    files = [file for file in weights_in(folder) if _EXPORTED.fullmatch(file)]
    other = [file for file in weights_in(folder) if file.startswith(STEM)]
    described = any(folder.glob(MANIFEST_GLOB))
    if not files and (other or not described):
        return None
    if not files:
        raise _no_weights(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("_class_name", WAN) not in (WAN, TRANSFORMER):
        raise other_class(folder / "config.json", config["_class_name"], (WAN,), part=name)
    return "msmodelslim", [_export_part(folder, name, files, config)]


def _export_part(folder: Path, name: str, files: Sequence[str], config: dict[str, Any]) -> Part:
    indexes = sorted(folder.glob("quant_model_weight*.safetensors.index.json"))
    if len(indexes) == 1 and set(files) <= _named_by(indexes[0]):
        return Part(name, folder, config=config, index=indexes[0])
    if indexes or not _one_set(files):
        found = [*files, *(p.name for p in indexes)]
        raise CheckpointError(
            f"{folder} holds the weights of more than one export, or not all of one: {listed(found, 8)}",
            needs="one quant_model_weight_<type>.safetensors, or all files of one numbered set",
            fix="move other exports to folders of their own, or copy the missing files",
            code="E-CKP-03",
        )
    return Part(name, folder, config=config, files=tuple(folder / file for file in files))


def _named_by(index: Path) -> set[str]:
    """The file names in an index; what is wrong with it is said when the shards are opened."""
    weight_map = read_json(index).get("weight_map")
    return {v for v in weight_map.values() if isinstance(v, str)} if isinstance(weight_map, dict) else set()


def _one_set(files: Sequence[str]) -> bool:
    """Whether this is one file, or a complete numbered set."""
    numbered = [m for file in files if (m := _NUMBERED.fullmatch(file))]
    if not numbered:
        return len(files) == 1
    sets = {(m["stem"], m["count"]) for m in numbered}
    numbers = [int(m["number"]) for m in numbered]
    complete = sorted(numbers) == list(range(1, int(numbered[0]["count"]) + 1))
    return len(numbered) == len(files) and len(sets) == 1 and complete


def _by_config(folder: Path, name: str) -> Recognised | None:
    """A folder with the config.json of a Wan transformer, Diffusers' or the original."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name")
    if class_name == TRANSFORMER:
        return "transformer", [_with_weights(folder, name, config)]
    if class_name == WAN:
        return "wan", [_with_weights(folder, name, config)]
    if isinstance(class_name, str) and "Wan" in class_name and class_name != "AutoencoderKLWan":
        raise other_class(folder / "config.json", class_name, (TRANSFORMER, WAN), part=name)
    return None


def _with_weights(folder: Path, name: str, config: dict[str, Any]) -> Part:
    """The part of a folder with a config, whose weights may be one file of any name."""
    files = weights_in(folder)
    named = (
        any(file.startswith(STEM) for file in files) or (folder / f"{STEM}.safetensors.index.json").exists()
    )
    only = () if named or len(files) != 1 else (folder / files[0],)
    return Part(name, folder, config=config, files=only)


def _by_weights(folder: Path, name: str) -> Recognised | None:
    """A folder without a config: `diffusion_pytorch_model` with an index, or just one file."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        naming = naming_of(weight_map) if isinstance(weight_map, dict) else None
        if naming is None:
            return None
        return "wan" if naming == "wan" else "transformer", [Part(name, folder)]
    files = weights_in(folder)
    if len(files) != 1 or (folder / "config.json").exists():
        return None
    return "file", [Part(name, folder / files[0], files=(folder / files[0],))]


def weights_in(folder: Path) -> list[str]:
    """Names of the safetensors files in `folder`, sorted."""
    return sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())


def _no_weights(folder: Path) -> CheckpointError:
    there = sorted(p.name for p in folder.iterdir())
    return CheckpointError(
        f"{folder} holds no weights of a transformer" + (f" (there is {listed(there)})" if there else ""),
        needs=f"{STEM}.safetensors or its index, or quant_model_weight*.safetensors",
        fix="copy or download the weight files, in safetensors format",
        code="E-CKP-02",
    )
