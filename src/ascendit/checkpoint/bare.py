"""Recognise transformers that stand alone, without text encoder and VAE. JSON and file names only.

Each recogniser returns None for what is not of its kind, and raises for a damaged one that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.part import EXPERTS, STEM, TRANSFORMER, Part, other_class, read_json
from ascendit.checkpoint.spelling import naming_of
from ascendit.checkpoint.store import listed
from ascendit.errors import CheckpointError

BareKind = Literal["transformers-only", "transformer", "wan", "msmodelslim", "file"]
Found = tuple[BareKind, list[Part]]

WAN = "WanModel"
DESCRIPTION = "quant_model_description*.json"
_EXPORTED = re.compile(r"quant_model_weight.*\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_CASCADES: dict[BareKind, BareKind] = {
    "msmodelslim": "msmodelslim",
    "wan": "wan",
    "file": "wan",
    "transformer": "transformers-only",
}
"""What two transformers of a kind are together."""
_NOISE = re.compile(r"(?:\w+_)?(?P<noise>high|low)_noise_model")
"""`high_noise_model`; msModelSlim before June 2026: `t2v_high_noise_model`."""


def find(root: Path) -> Found | None:
    """What stands at `root`, a folder or file without `model_index.json`; None when nothing is known."""
    if root.is_file():
        return _file(root)
    if not root.is_dir():
        return None
    return _cascade(root) or _transformers_only(root) or _one(root)


def weights_in(folder: Path) -> list[str]:
    """Names of the safetensors files in `folder`, sorted."""
    return sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())


def _one(folder: Path, name: str = EXPERTS[0]) -> Found | None:
    """One transformer in a folder of its own."""
    return _export(folder, name) or _by_config(folder, name) or _by_weights(folder, name)


def _cascade(root: Path) -> Found | None:
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


def _export(folder: Path, name: str) -> Found | None:
    """What msModelSlim wrote: `quant_model_weight*` and, by another check, one description beside it."""
    files = [file for file in weights_in(folder) if _EXPORTED.fullmatch(file)]
    other = [file for file in weights_in(folder) if file.startswith(STEM)]
    described = any(folder.glob(DESCRIPTION))
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
        return _part(name, folder, config, index=indexes[0])
    if indexes or not _one_set(files):
        found = [*files, *(p.name for p in indexes)]
        raise CheckpointError(
            f"{folder} holds the weights of more than one export, or not all of one: {listed(found, 8)}",
            needs="one quant_model_weight_<type>.safetensors, or all files of one numbered set",
            fix="move other exports to folders of their own, or copy the missing files",
            code="E-CKP-03",
        )
    return _part(name, folder, config, files=tuple(folder / file for file in files))


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
    return len(numbered) == len(files) and len(sets) == 1 and sorted(numbers) == _up_to(numbered[0]["count"])


def _up_to(count: str) -> list[int]:
    return list(range(1, int(count) + 1))


def _by_config(folder: Path, name: str) -> Found | None:
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
    return _part(name, folder, config, files=only)


def _by_weights(folder: Path, name: str) -> Found | None:
    """A folder without a config: `diffusion_pytorch_model` with an index, or just one file."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        naming = naming_of(weight_map) if isinstance(weight_map, dict) else None
        if naming is None:
            return None
        return "wan" if naming == "wan" else "transformer", [_part(name, folder, {})]
    files = weights_in(folder)
    if len(files) != 1 or (folder / "config.json").exists():
        return None
    return "file", [_file_part(folder / files[0], name)]


def _transformers_only(root: Path) -> Found | None:
    """`transformer`, and perhaps `transformer_2`, without `model_index.json`."""
    parts = []
    for name in EXPERTS:
        if not (root / name / "config.json").exists():
            break
        config = read_json(root / name / "config.json")
        if (found := config.get("_class_name", TRANSFORMER)) != TRANSFORMER:
            raise other_class(root / name / "config.json", found, (TRANSFORMER,), part=name)
        parts.append(_part(name, root / name, config))
    return ("transformers-only", parts) if parts else None


def _file(path: Path) -> Found | None:
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
    return "file", [_file_part(path, EXPERTS[0])]


def _file_part(path: Path, name: str) -> Part:
    return _part(name, path, {}, files=(path,))


def _part(
    name: str, path: Path, config: dict[str, Any], *, files: Iterable[Path] = (), index: Path | None = None
) -> Part:
    return Part(name, path, "diffusers", TRANSFORMER, config, tuple(files), index)


def _no_weights(folder: Path) -> CheckpointError:
    there = sorted(p.name for p in folder.iterdir())
    return CheckpointError(
        f"{folder} holds no weights of a transformer" + (f" (there is {listed(there)})" if there else ""),
        needs=f"{STEM}.safetensors or its index, or quant_model_weight*.safetensors",
        fix="copy or download the weight files, in safetensors format",
        code="E-CKP-02",
    )
