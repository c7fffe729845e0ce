"""Limits for the files of a checkpoint: none of its code runs, and no file outside of it is copied.

`PART_CLASSES` is the only source of classes: a name in a file chooses from it, and is never imported itself.
`check_part_files` refuses the config keys by which Diffusers and transformers load other code or files.
`Home` decides which links stay in a checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from ascendit.checkpoint.component import (
    CONFIG_FILES,
    EXPERTS,
    TRANSFORMER,
    Part,
    check_regular,
    read_json,
    unsupported_class,
)
from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.quant_metadata import MANIFEST_GLOB
from ascendit.checkpoint.weight_sets import WEIGHT_SUFFIXES, has_weight_suffix
from ascendit.errors import CheckpointError
from ascendit.report import shell_line

# ---- classes ------------------------------------------------------------------------------------


class PartClasses(NamedTuple):
    """The classes of one component."""

    library: str
    classes: tuple[str, ...]
    """Empty: any name, because ascendit reads only the config and imports nothing."""
    config_values: Mapping[str, tuple[str, ...]] = {}
    """Keys of its config that name a class or an architecture -> supported values."""


AUTO_TOKENIZER = "AutoTokenizer"
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_CLIP = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_CLIP_IMAGES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
_EXPERT = PartClasses("diffusers", (TRANSFORMER,), {"_class_name": (TRANSFORMER,)})
PART_CLASSES: dict[str, PartClasses] = {
    "transformer": _EXPERT,
    "transformer_2": _EXPERT,
    "vae": PartClasses("diffusers", ("AutoencoderKLWan",), {"_class_name": ("AutoencoderKLWan",)}),
    "scheduler": PartClasses("diffusers", ()),
    "text_encoder": PartClasses("transformers", ("UMT5EncoderModel",), {"model_type": ("umt5",)}),
    "tokenizer": PartClasses("transformers", TOKENIZERS, {"tokenizer_class": (*TOKENIZERS, AUTO_TOKENIZER)}),
    "image_encoder": PartClasses("transformers", _CLIP, {"model_type": ("clip_vision_model", "clip")}),
    "image_processor": PartClasses(
        "transformers",
        _CLIP_IMAGES,
        {
            "image_processor_type": (*_CLIP_IMAGES, "CLIPFeatureExtractor"),
            "feature_extractor_type": (*_CLIP_IMAGES, "CLIPFeatureExtractor"),
        },
    ),
}
"""Component -> the only library and classes that ascendit imports or runs for it."""
LIBRARIES = ("diffusers", "transformers")
"""Components with other names are only linked or copied, and must be of these libraries."""


def supported_class(file: Path, name: str, entry: object, config: Mapping[str, Any]) -> tuple[str, str]:
    """(library, class) of the component `name`, from its `entry` in the index `file` and its config.

    AutoTokenizer becomes the class in the tokenizer's config. Raises CheckpointError: E-CKP-05 unless both
    are in `PART_CLASSES`, E-CKP-06 for an entry that is not a pair of names.
    """
    match entry:
        case [str(library), str(class_name)]:
            pass
        case _:
            raise CheckpointError(
                f"{file} lists {name} as {str(entry)[:60]}",
                needs='two names, the library and the class, such as ["diffusers", "AutoencoderKLWan"]',
                fix="download the file again from the model's authors",
                code="E-CKP-06",
            )
    row = PART_CLASSES.get(name)
    libraries, classes = ((row.library,), row.classes) if row else (LIBRARIES, ())
    if library not in libraries or not class_name.isidentifier():
        raise unsupported_class(file, f"{library}.{class_name}", _pairs(libraries, classes), part=name)
    if name == "tokenizer" and class_name == AUTO_TOKENIZER:
        class_name = str(config.get("tokenizer_class", AUTO_TOKENIZER))
    if classes and class_name not in classes:
        raise unsupported_class(file, class_name, classes, part=name)
    return library, class_name


def _pairs(libraries: tuple[str, ...], classes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{library}.{name}" for library in libraries for name in classes or ("*",))


# ---- the files of a component -------------------------------------------------------------------

OTHER_CODE: dict[str, str] = {
    "auto_map": "Python code of the checkpoint",
    "custom_pipelines": "Python code of the checkpoint",
    "custom_generate": "Python code of the checkpoint",
    "quantization_config": "the library of another quantizer",
    "transformers_weights": "another weight file",
    "gguf_file": "another weight file",
}
"""Keys of a config, at any depth -> the thing that a library would load for them."""
_KERNEL_KEYS = re.compile(r"_?(?:attn|experts)_implementation(?:_internal)?")
_CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
"""The vocabulary of a tokenizer."""
_ADAPTER = "adapter_config.json"


def check_part_files(folder: Path, name: str) -> None:
    """Check the small files of a component, except the weights, that a library would read.

    Raises CheckpointError: E-CKP-05 for a config that asks for another class or for code, E-CKP-06 for an
    unreadable file.
    """
    row = PART_CLASSES.get(name)
    for file in (folder / file for file in (*_CONFIGS, *TOKENIZER_CONFIGS)):
        if not os.path.lexists(file):
            continue
        config = read_json(file)
        for key, values in row.config_values.items() if row else ():
            value = config.get(key)
            if value is not None and value not in values:
                raise unsupported_class(file, f"{key} {value}", values, part=name)
        for key, value in _entries(config):
            _check_entry(file, name, key, value)
    if os.path.lexists(folder / _ADAPTER):
        raise CheckpointError(
            f"{folder / _ADAPTER}: {name} is an adapter of another model",
            needs="complete weights: ascendit loads no PEFT adapters",
            fix=f"merge the adapter with peft (merge_and_unload) and save the result; or remove {_ADAPTER} "
            "if the weights are complete without it",
            code="E-CKP-05",
        )
    for file in (folder / file for file in TOKENIZER_FILES if name == "tokenizer"):
        if os.path.lexists(file):
            check_regular(file)


def _entries(config: object) -> Iterator[tuple[str, Any]]:
    """All keys at any depth, with their values."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield key, value
        yield from _entries(value)
    for item in config if isinstance(config, list) else ():
        yield from _entries(item)


def _check_entry(file: Path, name: str, key: str, value: object) -> None:
    loads = OTHER_CODE.get(key)
    if key == "quantization_config" and name in EXPERTS:
        return  # read and checked by `quant_metadata`
    if _KERNEL_KEYS.fullmatch(key) and isinstance(value, str) and "/" in value:
        loads = "kernels from a hub"
    if not loads or value in (None, {}, [], "", False):
        return
    method = value.get("quant_method") if isinstance(value, dict) else None
    raise CheckpointError(
        f"{file}: {key} of {name} asks for {loads}: {str(method or value)[:80]}",
        needs="a config without this key: ascendit runs no code of a checkpoint and loads no other files",
        fix=f"use the original {name} of the model's authors; remove {key} if the model works without it",
        code="E-CKP-05",
    )


_NEEDED = {*_CONFIGS, *TOKENIZER_CONFIGS, *TOKENIZER_FILES, *(f for v in CONFIG_FILES.values() for f in v)}
_WEIGHT_FILES = (*WEIGHT_SUFFIXES, ".index.json")

# ---- links --------------------------------------------------------------------------------------

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Names in the cache of Hugging Face: git's sha1 of a small file, the sha256 of a large one."""


def blob_hash(path: Path) -> str:
    """The hash that names a blob of a hub cache, after all links; "" for another file.

    The folders of snapshots consist of links to blobs.
    """
    blob = Path(os.path.realpath(path))
    return blob.name if blob.parent.name == "blobs" and _HASH.fullmatch(blob.name) else ""


def _blobs_of(folder: Path) -> Path | None:
    """The folder of the blobs of a snapshot, or of a part of it; None for a folder outside of hub caches."""
    for snapshot in (folder, folder.parent):
        home = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and home.name.startswith("models--"):
            return home / "blobs"
    return None


@dataclass(frozen=True)
class Home:
    """The folders that the files of one checkpoint may be in. Paths are real paths."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, root: Path, part: Part | None = None) -> Self:
        """The home of the checkpoint at `root`, or of one of its components.

        The folder of an expert may be a link, because only its weights and validated JSON files are read.
        Another component may be a link to the same component of a Diffusers folder: `quantize` and `repack`
        write such links.
        """
        folders = [Path(os.path.realpath(root if root.is_dir() else root.parent))]
        if part is not None:
            real = Path(os.path.realpath(part.folder))
            if part.name in EXPERTS:
                folders.append(real)
            elif real.name == part.name and (real.parent / "model_index.json").is_file():
                folders.append(real.parent)
        return cls(tuple(folders))

    def contains(self, path: Path) -> bool:
        """Whether `path`, with all links resolved, is in the checkpoint or a blob of it in a hub cache."""
        real = Path(os.path.realpath(path))
        if blob_hash(real) and real.parent in map(_blobs_of, self.folders):
            return True
        return any(real.is_relative_to(folder) for folder in self.folders)

    def copies(self, path: Path) -> bool:
        """Whether an output may get a copy of `path`: links to other disks may lead to weights only."""
        return self.contains(path) or (has_weight_suffix(path.name) and _is_weights(path))

    def require(self, path: Path) -> None:
        """Raise CheckpointError (E-CKP-03) if `path`, which an output needs, leads out of the checkpoint."""
        if self.copies(path):
            return
        old, new = shell_line([str(path)]), shell_line([f"{path}.copy"])
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint, to {os.path.realpath(path)}",
            needs="files of the checkpoint itself: an output gets nothing from other folders",
            fix=f"if it is of the model, make it a copy: cp -rL {old} {new} && rm {old} && mv {new} {old}",
            code="E-CKP-03",
        )


def _is_weights(path: Path) -> bool:
    try:
        return bool(read_header(path))
    except CheckpointError:
        return False


def outside_links(root: Path, part: Part, *, copied: bool) -> list[Path]:
    """The links in the folder of `part` that lead out of the checkpoint at `root` and are not needed.

    `copied`: the output gets a copy of the folder, not a link to it. Raises CheckpointError (E-CKP-03) if a
    file that the output needs leads out of the checkpoint.
    """
    home = Home.of(root, part)
    if part.name in EXPERTS:
        for pattern in ("config.json", "*.index.json", MANIFEST_GLOB):
            for file in part.folder.glob(pattern):
                home.require(file)
        return []
    home.require(part.folder)
    if not copied:
        return []
    top, skipped = os.path.realpath(part.folder), []
    for folder, folders, files in os.walk(top):
        for path in (Path(folder) / name for name in sorted(folders + files)):
            if path.is_symlink() and not home.copies(path):
                if folder == top and (path.name in _NEEDED or path.name.lower().endswith(_WEIGHT_FILES)):
                    home.require(path)
                skipped.append(path)
    return skipped
