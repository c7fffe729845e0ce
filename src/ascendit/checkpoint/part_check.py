"""Check a part of a model without reading its weights: config values, and headers against the config."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from ascendit.checkpoint.component import CONFIG_FILES, Part, unsupported_class
from ascendit.checkpoint.layer_format import FLOAT_DTYPES
from ascendit.checkpoint.layout import INDEX_FILE, Layout
from ascendit.checkpoint.part_configs import (
    PUBLISHED,
    AutoencoderConfig,
    ImageEncoderConfig,
    ImageProcessorConfig,
    IndexConfig,
    PartConfig,
    TextEncoderConfig,
)
from ascendit.checkpoint.part_names import PROJECTION, VISION_PREFIX, canonical_part, is_unused
from ascendit.checkpoint.part_tensors import (
    EMBEDDINGS,
    autoencoder_tensors,
    image_encoder_tensors,
    image_projection,
    text_encoder_tensors,
)
from ascendit.checkpoint.scheduler import scheduler_of
from ascendit.checkpoint.stored_kinds import interpret
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.tokenizer_check import check_tokenizer
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.names import Shapes, listed
from ascendit.report import counted, shell_line

LIBRARY_CONFIGS: dict[str, type[PartConfig]] = {
    "AutoencoderKLWan": AutoencoderConfig,
    "UMT5EncoderModel": TextEncoderConfig,
    "CLIPVisionModel": ImageEncoderConfig,
    "CLIPVisionModelWithProjection": ImageEncoderConfig,
}
"""Class of a part that a library runs -> the model of its config."""
BUFFER = "embeddings.position_ids"
"""A constant in files of older versions of transformers, which ignores it."""
LIBRARY_PARTS = ("vae", "text_encoder", "image_encoder")


def check_part(part: Part) -> Shards | None:
    """The headers of `part`, checked against its config; None if it has no weights.

    Raises CheckpointError: E-CKP-06 for an invalid value or file; E-CKP-05 for a class without a model of its
    config; E-CKP-04 for tensors that the config does not imply, or, without config.json, the published model;
    the errors of `Shards.from_part` and of `stored_kinds.interpret`.
    """
    if part.has_weights:
        config = library_config(part) if part.name in LIBRARY_PARTS else None
        shards = Shards.from_part(part)
        if config is not None:
            read = interpret(shards.tensors, part.config, part=part.name)
            tensors = canonical_part(part.name, read.tensors)
            if part.class_name == "CLIPVisionModel":
                tensors.pop(PROJECTION, None)
            notes = read.notes
            if unused := [name for name in read.tensors if is_unused(part.name, name)]:
                count = counted(len(unused), "tensor")
                notes += (f"{count} not used, which Wan does not need: {listed(unused, 3)}",)
            shards = replace(shards, tensors=tensors, kinds=read.kinds, notes=notes)
            stored = {n: info for n, info in shards.tensors.items() if not n.endswith(BUFFER)}
            config = config if part.config else _published_config(part, stored)
            _check_tensors(part, _expected_tensors(part, config, stored), stored)
        return shards
    if part.name == "scheduler":
        scheduler_of(part)
    elif part.name == "image_processor":
        processor_config(part)
    elif part.name == "tokenizer":
        check_tokenizer(part)
    return None


def check_index(layout: Layout) -> None:
    """Check the plain values of `model_index.json`. Raises CheckpointError (E-CKP-06)."""
    IndexConfig.read(layout.root / INDEX_FILE, layout.index)


def library_config(part: Part) -> PartConfig:
    """The checked config of a VAE, text encoder or image encoder.

    Raises CheckpointError: E-CKP-05 for a class that is not in `LIBRARY_CONFIGS`, E-CKP-06 for a value.
    """
    file, data = part.folder / "config.json", part.config
    if part.class_name not in LIBRARY_CONFIGS:
        raise unsupported_class(file, part.class_name, tuple(LIBRARY_CONFIGS), part=part.name)
    vision = data.get("vision_config")
    if data.get("model_type") == "clip" and isinstance(vision, dict):  # the config of a complete CLIP
        data = vision
    return LIBRARY_CONFIGS[part.class_name].read(file, data)


def image_tokens(part: Part) -> int:
    """Tokens of one image from this image encoder. Raises the errors of `library_config`."""
    config = library_config(part)
    assert isinstance(config, ImageEncoderConfig)
    return config.tokens


def processor_config(part: Part) -> ImageProcessorConfig:
    """The checked config of an image processor. Raises CheckpointError (E-CKP-06)."""
    file, config = _config_file(part), part.config
    inner = config.get("image_processor")  # in the config of a processor of several inputs
    return ImageProcessorConfig.read(file, inner if isinstance(inner, dict) else config)


def _config_file(part: Part) -> Path:
    """The config file of a part without weights, as `recognise` chooses it."""
    files = [part.folder / name for name in CONFIG_FILES[part.name]]
    return next((file for file in files if file.exists()), files[0])


# ---- tensors ------------------------------------------------------------------------------------


def _published_config(part: Part, stored: Mapping[str, TensorInfo]) -> PartConfig:
    """The sizes of the published model that most of these tensors have, for a file without config.json."""

    def equal(config: PartConfig) -> int:
        expected = _expected_tensors(part, config, stored)
        return sum(expected.get(name) == info.shape for name, info in stored.items())

    config = max(PUBLISHED[part.name], key=equal)
    if 2 * equal(config) > len(stored):
        return config
    raise CheckpointError(
        f"{part.path} has no config.json, and its tensors have the sizes of no published {part.name}",
        needs=f"the config.json of the {part.name}",
        fix=f"pass the folder of the {part.name}; or: "
        + shell_line(["ascendit", "repack", str(part.path), "--base", "MODEL", "-o", "DIR"]),
        code="E-CKP-06",
    )


def _expected_tensors(part: Part, config: PartConfig, stored: Collection[str]) -> Shapes:
    """The tensors of a library part, under the names that its file uses."""
    if isinstance(config, TextEncoderConfig):
        shapes = text_encoder_tensors(config)
        used = [name for name in EMBEDDINGS if name in stored] or EMBEDDINGS[:1]
        embedding = shapes.pop(EMBEDDINGS[0])
        return shapes | dict.fromkeys(used, embedding)
    if isinstance(config, ImageEncoderConfig):
        prefix = VISION_PREFIX if any(name.startswith(VISION_PREFIX) for name in stored) else ""
        shapes = {f"{prefix}{name}": shape for name, shape in image_encoder_tensors(config).items()}
        projected = part.class_name == "CLIPVisionModelWithProjection"
        return shapes | (image_projection(config) if projected else {})
    assert isinstance(config, AutoencoderConfig)
    return autoencoder_tensors(config)


def _check_tensors(part: Part, expected: Shapes, stored: Mapping[str, TensorInfo]) -> None:
    """Raise `tensor_mismatch` unless `stored` are the expected tensors, in floating point."""
    both = [name for name in stored if name in expected]
    problems = {
        "missing keys": [name for name in expected if name not in stored],
        "unexpected keys": [name for name in stored if name not in expected],
        "mismatched keys": [
            f"{name} {list(stored[name].shape)}, not {list(expected[name])}"
            for name in both
            if stored[name].shape != expected[name]
        ],
        "keys that are not floating point": [
            f"{name} {stored[name].dtype}" for name in both if stored[name].dtype not in FLOAT_DTYPES
        ],
    }
    if any(problems.values()):
        raise tensor_mismatch(part, problems)


def tensor_mismatch(part: Part, problems: Mapping[str, Collection[str]]) -> CheckpointError:
    """The error E-CKP-04 for tensors that the config of a library part does not imply; kind -> names."""
    return CheckpointError(
        f"{part.path}: " + "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names),
        needs=f"exactly the tensors of this {part.class_name}",
        fix="download the component again, or check that config.json matches the weights",
        code="E-CKP-04",
    )
