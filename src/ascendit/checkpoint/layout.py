"""Detect the kind of model in a folder or file from its JSON files and file names. Opens no weights.

`recognise` looks for a Diffusers pipeline folder, then for transformers without the other components:
original Wan folders, msModelSlim exports, Diffusers transformers and single files.
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
    STEM,
    TRANSFORMER,
    WAN_FOLDERS,
    Part,
    irregular,
    read_json,
    stays_inside,
    unsupported_class,
)
from ascendit.checkpoint.headers import begins_as_weights, read_header
from ascendit.checkpoint.part_names import recognise_part
from ascendit.checkpoint.quant_metadata import MANIFEST_GLOB
from ascendit.checkpoint.trust import PART_CLASSES, check_part_files, supported_class
from ascendit.checkpoint.weight_files import Shards
from ascendit.checkpoint.weight_sets import (
    NUMBERED,
    WEIGHT_SUFFIXES,
    has_weight_suffix,
    is_complete_set,
    weight_set,
    weights_in,
)
from ascendit.errors import CheckpointError, UsageError
from ascendit.names import listed, naming_of
from ascendit.report import shell_line

LayoutKind = Literal["diffusers", "transformers-only", "transformer", "wan", "msmodelslim", "file"]
KIND_LABELS: dict[LayoutKind, str] = {
    "diffusers": "a Diffusers pipeline folder",
    "transformers-only": "the transformers of a Diffusers folder, without the other components",
    "transformer": "a standalone Diffusers transformer, without the other components",
    "wan": "a model in the original Wan format",
    "msmodelslim": "an msModelSlim export, which contains only transformers",
    "file": "a single file, which contains only one component",
}
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
INDEX_FILE = "model_index.json"
RECORD_FILE = "ascendit.json"
"""Record of how `quantize` or `repack` created the folder, see `convert.provenance`."""
_ABSENT: tuple[object, ...] = (None, [None, None])
"""Values of `model_index.json` for an optional component that the model does not have."""
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+")


@dataclass(frozen=True)
class Layout:
    """A recognised folder or file, with the configs of its components."""

    kind: LayoutKind
    root: Path
    name: str
    """The name of the repository in a hub cache, else of the folder."""
    index: dict[str, Any]
    """`model_index.json`; empty if absent."""
    parts: dict[str, Part]

    @property
    def experts(self) -> tuple[Part, ...]:
        """The transformers, high noise first."""
        return tuple(self.parts[name] for name in EXPERTS if name in self.parts)

    @property
    def pipeline(self) -> str:
        """The pipeline class in `model_index.json`; empty if absent."""
        return str(self.index.get("_class_name", ""))

    @property
    def source(self) -> str | None:
        """`org/name@revision` if the folder is a snapshot in a hub cache."""
        snapshot = _snapshot(self.root)
        return f"{snapshot[0]}/{snapshot[1]}@{self.root.name}" if snapshot else None

    def part(self, name: str) -> Part:
        """Return the component `name`. Raises CheckpointError (E-CKP-02) if it is missing."""
        if name not in self.parts:
            raise CheckpointError(
                f"{self.root} has no {name}",
                needs=f"a {name} listed in {INDEX_FILE} (it lists {', '.join(sorted(self.parts))})",
                fix="use a complete model folder, or download it again",
                code="E-CKP-02",
            )
        return self.parts[name]

    def require_pipeline(self) -> None:
        """Raise CheckpointError (E-CKP-01) unless this is a complete pipeline, which can generate videos."""
        if self.kind != "diffusers":
            repack = shell_line(["ascendit", "repack", str(self.root)])
            raise CheckpointError(
                f"{self.root} is {KIND_LABELS[self.kind]}; it cannot generate videos on its own",
                needs=f"a Diffusers folder with {INDEX_FILE}, text encoder and VAE",
                fix=f"{repack} --base MODEL -o DST, where MODEL is the Diffusers folder "
                "of the same model, then use DST",
                code="E-CKP-01",
            )


def recognise(path: Path | str) -> Layout:
    """Return the layout of the folder or file at `path`.

    Raises UsageError (E-USE-02) if `path` does not exist; CheckpointError: E-CKP-01 for an unknown kind,
    E-CKP-05 for an unsupported model class, E-CKP-06 for a missing or unreadable config, E-CKP-02 and
    E-CKP-03 for missing folders or weight files, E-CKP-07 for experts in different formats.
    """
    root = Path(os.path.abspath(path))
    try:
        if not root.exists():
            raise UsageError(
                f"no file or folder at {path}",
                needs="a model folder, or a .safetensors file",
                fix="correct the path; for a model on a hub, write hf:ORG/NAME or ms:ORG/NAME",
                code="E-USE-02",
            )
        if (layout := _diffusers(root)) is not None:
            return layout
        if root.is_file():
            recognised = _single_file(root)
        else:
            recognised = _cascade(root) or _transformers_only(root) or _single_transformer(root)
        if recognised is not None:
            kind, parts = recognised
            return Layout(kind, root, _model_name(root), {}, {part.name: part for part in parts})
        _refuse_trainer_formats(root)
        raise CheckpointError(
            f"no model recognised at {root}: {_hint(root)}",
            needs=f"a Diffusers folder with {INDEX_FILE} at its top; a folder with only transformers; "
            "an original Wan folder (config.json, or high_noise_model and low_noise_model); an msModelSlim "
            "export (quant_model_description*.json); or one file of a Wan transformer, text encoder or VAE: "
            f"{', '.join(WEIGHT_SUFFIXES)}",
            fix="pass the folder of the complete model, or the path of the file",
            code="E-CKP-01",
        )
    except OSError as e:
        raise CheckpointError(
            f"{root} cannot be read: {e.strerror}",
            needs="files and folders that this user can read",
            fix="correct the path, or its permissions",
            code="E-CKP-01",
        ) from e


def _refuse_trainer_formats(root: Path) -> None:
    """Raise CheckpointError (E-CKP-04) for a folder that a trainer with several processes saved."""
    new = root.with_name(f"{root.name}-model")
    pieces = sorted([*root.glob("*.distcp"), *root.glob("*/*.distcp")])
    if pieces:
        label = "a checkpoint of torch.distributed (DCP)"
        module = "torch.distributed.checkpoint.format_utils"
        command = [module, "dcp_to_torch", str(pieces[0].parent), f"{new}.pth"]
    elif (root / "zero_to_fp32.py").exists():
        label, command = "a checkpoint of DeepSpeed", ["deepspeed.utils.zero_to_fp32", str(root), str(new)]
    else:
        return
    raise CheckpointError(
        f"{root} is {label}, with the weights in pieces for each process",
        needs="the weights as safetensors, or as one file of torch.save",
        fix=f"join them: {shell_line(['python', '-m', *command])}",
        code="E-CKP-04",
    )


def _hint(root: Path) -> str:
    """Why the kind of `root` is unknown."""
    if root.is_file():
        return f"the name of the file does not end in {', '.join(WEIGHT_SUFFIXES)}"
    if below := sorted(p.parent.name for p in root.glob(f"*/{INDEX_FILE}")):
        return f"{INDEX_FILE} is in a subfolder: {', '.join(below[:3])}"
    if (root / "config.json").exists():
        class_name = read_json(root / "config.json").get("_class_name")
        return f"it has config.json (class {class_name}) but no {INDEX_FILE}"
    if files := weights_in(root):
        return f"it has {len(files)} weight files without an index: {listed(files)}; pass one of them"
    return f"it has no {INDEX_FILE}"


def _model_name(root: Path) -> str:
    snapshot = _snapshot(root)
    if snapshot:
        return snapshot[1]
    return root.stem if has_weight_suffix(root.name) else root.name


def _snapshot(root: Path) -> tuple[str, str] | None:
    """(org, name) for `.../models--org--name/snapshots/<revision>`."""
    match = _SNAPSHOT.fullmatch("/".join(root.parts[-3:]))
    return (match[1], match[2]) if match else None


# ---- a Diffusers pipeline folder ----------------------------------------------------------------


def _diffusers(root: Path) -> Layout | None:
    """A Diffusers pipeline folder: `model_index.json` and one folder per component."""
    if not os.path.lexists(root / INDEX_FILE):
        return None
    index = read_json(root / INDEX_FILE)
    if (class_name := index.get("_class_name")) not in PIPELINES:
        raise unsupported_class(root / INDEX_FILE, class_name, PIPELINES)
    parts: dict[str, Part] = {}
    for name, entry in index.items():
        # [null, null] and plain values are not components
        is_pair = isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str) for x in entry)
        if not name.startswith("_") and (is_pair or (name in PART_CLASSES and entry not in _ABSENT)):
            parts[name] = _read_part(root, name, entry)
    if "transformer" not in parts:
        raise CheckpointError(
            f"{root / INDEX_FILE} lists no transformer",
            needs='an entry "transformer": ["diffusers", "WanTransformer3DModel"]',
            fix="use a complete model folder, or download it again",
            code="E-CKP-02",
        )
    return Layout("diffusers", root, _model_name(root), index, parts)


def _read_part(root: Path, name: str, entry: object) -> Part:
    folder = root / name
    if not stays_inside(name) or Path(name).name != name:
        raise CheckpointError(
            f"{root / INDEX_FILE} lists a component {name!r}",
            needs="the name of a folder next to it",
            fix="download the model from a trusted source",
            code="E-CKP-03",
        )
    config: dict[str, Any] = {}
    if present := folder.is_dir():
        check_part_files(folder, name)
        config = _read_config(folder, name)
    library, class_name = supported_class(root / INDEX_FILE, name, entry, config)
    if not present:
        raise CheckpointError(
            f"{root / INDEX_FILE} lists {name}, but the folder {folder} is missing",
            needs=f"one folder per component; {name} is a {class_name}",
            fix="download all files of the model again",
            code="E-CKP-02",
        )
    return Part(name, folder, library, class_name, config)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read the config of a component. It is required for components with weights, optional for others."""
    candidates = CONFIG_FILES.get(name, ("config.json",))
    for file in candidates:
        if (folder / file).exists() or file == "config.json":
            return read_json(folder / file)
    return {}


# ---- transformers without the other components --------------------------------------------------

Recognised = tuple[LayoutKind, list[Part]]

WAN = "WanModel"
_EXPORTED = re.compile(r"quant_model_weight.*\.safetensors")
_CASCADES: dict[LayoutKind, LayoutKind] = {
    "msmodelslim": "msmodelslim",
    "wan": "wan",
    "file": "wan",
    "transformer": "transformers-only",
}
"""Kind of one transformer -> kind of a folder with two of them."""


def _cascade(root: Path) -> Recognised | None:
    """A folder with one subfolder per expert, high noise and low noise, both of the same kind."""
    folders: dict[str, list[Path]] = {name: [] for name in WAN_FOLDERS.values()}
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        for name in WAN_FOLDERS.values():
            # msModelSlim before June 2026: `t2v_high_noise_model`; folders of GGUF files: `HighNoise`.
            if re.fullmatch(rf"(?:\w+_)?{name}|{name.split('_')[0]}[-_]?noise", folder.name, re.IGNORECASE):
                folders[name].append(folder)
    if not any(folders.values()):
        return None
    if any(len(noise) != 1 for noise in folders.values()):
        names = [p.name for noise in folders.values() for p in noise]
        raise CheckpointError(
            f"{root} has {listed(names)}",
            needs=f"one folder {' and one '.join(folders)}",
            fix="pass a folder with both experts of one model, or the folder of one expert to use it alone",
            code="E-CKP-02",
        )
    experts = {folders[name][0]: _single_transformer(folders[name][0], x) for x, name in WAN_FOLDERS.items()}
    kinds: set[LayoutKind] = set()
    parts: list[Part] = []
    for folder, expert in experts.items():
        if expert is None:
            raise _no_weights(folder)
        kinds.add(_CASCADES[expert[0]])
        parts += expert[1]
    if len(kinds) > 1:
        raise CheckpointError(
            f"the experts in {root} have different formats: {', '.join(sorted(kinds))}",
            needs="both experts in one format",
            fix="use the two experts of the same model",
            code="E-CKP-07",
        )
    return kinds.pop(), parts


def _transformers_only(root: Path) -> Recognised | None:
    """`transformer` and optionally `transformer_2`, without `model_index.json`."""
    parts = []
    for name in EXPERTS:
        if not (root / name / "config.json").exists():
            break
        config = read_json(root / name / "config.json")
        if (class_name := config.get("_class_name", TRANSFORMER)) != TRANSFORMER:
            raise unsupported_class(root / name / "config.json", class_name, (TRANSFORMER,), part=name)
        parts.append(Part(name, root / name, config=config))
    return ("transformers-only", parts) if parts else None


def _single_file(path: Path) -> Recognised | None:
    """One file. The only one of a folder is read with its JSON files; a shard raises CheckpointError."""
    if not has_weight_suffix(path.name) and (irregular(path, path.stat()) or not begins_as_weights(path)):
        return None
    numbered = NUMBERED.fullmatch(path.name)
    if numbered and int(numbered["count"]) > 1:
        raise CheckpointError(
            f"{path.name} is one of {int(numbered['count'])} files of a model",
            needs="all files of the model",
            fix=f"pass the folder: {path.parent}",
            code="E-CKP-01",
        )
    name = _part_name(path)
    if name != EXPERTS[0]:
        row = PART_CLASSES[name]
        return "file", [Part(name, path, row.library, row.classes[0], files=(path,))]
    if weights_in(path.parent) == [path.name] and (folder := _single_transformer(path.parent)) is not None:
        return folder
    return "file", [Part(name, path, files=(path,))]


def _part_name(path: Path) -> str:
    """The component that the tensors of a file belong to; a transformer if the file cannot be read."""
    try:
        return recognise_part(read_header(path)) or EXPERTS[0]
    except CheckpointError:
        return EXPERTS[0]  # reading the part reports the damage


def _single_transformer(folder: Path, name: str = EXPERTS[0]) -> Recognised | None:
    """A folder with one transformer."""
    return _export(folder, name) or _by_config(folder, name) or _by_weights(folder, name)


def _export(folder: Path, name: str) -> Recognised | None:
    """An msModelSlim export: `quant_model_weight*`; `find_manifest` checks the description file."""
    files = [file for file in weights_in(folder) if _EXPORTED.fullmatch(file)]
    other = [file for file in weights_in(folder) if file.startswith(STEM)]
    described = any(folder.glob(MANIFEST_GLOB))
    if not files and (other or not described):
        return None
    if not files:
        raise _no_weights(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("_class_name", WAN) not in (WAN, TRANSFORMER):
        raise unsupported_class(folder / "config.json", config["_class_name"], (WAN,), part=name)
    return "msmodelslim", [_export_part(folder, name, files, config)]


def _export_part(folder: Path, name: str, files: Sequence[str], config: dict[str, Any]) -> Part:
    indexes = sorted(folder.glob("quant_model_weight*.safetensors.index.json"))
    if len(indexes) == 1 and set(files) <= _named_by(indexes[0]):
        return Part(name, folder, config=config, index=indexes[0])
    if indexes or not is_complete_set(files):
        names = [*files, *(p.name for p in indexes)]
        raise CheckpointError(
            f"{folder} has the weights of several exports, or an incomplete export: {listed(names, 8)}",
            needs="one quant_model_weight_<type>.safetensors, or all files of one numbered set",
            fix="move other exports to separate folders, or copy the missing files",
            code="E-CKP-03",
        )
    return Part(name, folder, config=config, files=tuple(folder / file for file in files))


def _named_by(index: Path) -> set[str]:
    """The file names in an index; `Shards.from_index` reports invalid ones."""
    weight_map = read_json(index).get("weight_map")
    return {v for v in weight_map.values() if isinstance(v, str)} if isinstance(weight_map, dict) else set()


def _by_config(folder: Path, name: str) -> Recognised | None:
    """A folder with the config.json of a Wan transformer, Diffusers or original."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json")
    class_name = config.get("_class_name")
    if class_name == TRANSFORMER:
        return "transformer", [Part(name, folder, config=config)]
    if class_name == WAN:
        return "wan", [Part(name, folder, config=config)]
    if isinstance(class_name, str) and "Wan" in class_name and class_name != "AutoencoderKLWan":
        raise unsupported_class(folder / "config.json", class_name, (TRANSFORMER, WAN), part=name)
    return None


def _by_weights(folder: Path, name: str) -> Recognised | None:
    """A folder without a config: an index, a numbered set, or a single file."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        naming = naming_of(weight_map) if isinstance(weight_map, dict) else None
        if naming is None:
            return None
        return "wan" if naming == "wan" else "transformer", [Part(name, folder)]
    files = weights_in(folder)
    if files and all(NUMBERED.fullmatch(file) for file in files) and not is_complete_set(files):
        weight_set(folder, STEM)  # raises the numbers that are missing
    if (folder / "config.json").exists() or not is_complete_set(files):
        return None
    if len(files) == 1:
        return "file", [Part(name, folder / files[0], files=(folder / files[0],))]
    naming = naming_of(Shards.from_files([folder / file for file in files]).tensors)
    return "wan" if naming == "wan" else "transformer", [Part(name, folder)]


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(p.name for p in folder.iterdir())
    fix = "copy or download the weight files"
    return CheckpointError(
        f"{folder} has no transformer weights" + (f" (it has {listed(names)})" if names else ""),
        needs=f"{STEM}.safetensors or its index, or quant_model_weight*.safetensors",
        fix=fix,
        code="E-CKP-02",
    )
