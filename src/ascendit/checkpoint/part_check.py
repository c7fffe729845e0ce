"""Check a part of a model without reading its weights: config values, and headers against the config."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ascendit.checkpoint.component import CONFIG_FILES, Part, read_json, unsupported_class
from ascendit.checkpoint.layer_format import FLOAT_DTYPES
from ascendit.checkpoint.layout import INDEX_FILE, Layout
from ascendit.checkpoint.part_configs import (
    AutoencoderConfig,
    ImageEncoderConfig,
    ImageProcessorConfig,
    IndexConfig,
    PartConfig,
    TextEncoderConfig,
    TokenizerConfig,
    TokenMapConfig,
    bad_config_value,
)
from ascendit.checkpoint.part_tensors import (
    EMBEDDINGS,
    VISION_PREFIX,
    autoencoder_tensors,
    image_encoder_tensors,
    image_projection,
    text_encoder_tensors,
)
from ascendit.checkpoint.reader import Shards, TensorInfo
from ascendit.checkpoint.scheduler import scheduler_of
from ascendit.checkpoint.trust import TOKENIZER_CONFIGS, TOKENIZER_FILES
from ascendit.errors import AscenditError, CheckpointError, is_out_of_memory
from ascendit.names import Shapes, listed

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
    config; E-CKP-04 for tensors that the config does not imply; the errors of `Shards.from_part`.
    """
    if part.has_weights:
        config = library_config(part) if part.name in LIBRARY_PARTS else None
        shards = Shards.from_part(part)
        if config is not None:
            stored = {n: info for n, info in shards.tensors.items() if not n.endswith(BUFFER)}
            _check_tensors(part, _expected_tensors(part, config, stored), stored)
        return shards
    if part.name == "scheduler":
        scheduler_of(part)
    elif part.name == "image_processor":
        processor_config(part)
    elif part.name == "tokenizer":
        _check_tokenizer(part)
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


# ---- tokenizer ----------------------------------------------------------------------------------


TOKENIZER_KEYS: dict[str, type[TokenMapConfig]] = {
    "tokenizer_config.json": TokenizerConfig,
    "special_tokens_map.json": TokenMapConfig,
}
"""Config file of a tokenizer -> its model, whose keys are the only ones that reach the library."""


def _check_tokenizer(part: Part) -> None:
    """Check the JSON files that the library gets for a tokenizer; it parses `tokenizer.json` itself."""
    names = (*TOKENIZER_CONFIGS, "tokenizer.json")
    files = {name: read_json(part.folder / name) for name in names if os.path.lexists(part.folder / name)}
    names = ("tokenizer_config.json", "special_tokens_map.json")
    config = TokenizerConfig.read(part.folder / names[0], part.config)
    special = TokenMapConfig.read(part.folder / names[1], files.get(names[1], {}))
    if files.get(names[1], {}).get("pad_token", "") is None:  # it replaces that of the config
        raise bad_config_value(part.folder / names[1], "pad_token", None, "a token of tokenizer.json")
    for token, number in files.get("added_tokens.json", {}).items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise bad_config_value(part.folder / "added_tokens.json", token, number, "the number of a token")
    if "tokenizer.json" in files:
        _check_template(part.folder / "tokenizer.json", files["tokenizer.json"].get("post_processor"))
        tokenizer = _parse_tokenizer(part.folder / "tokenizer.json")
        _try_tokenizer(part, (config.pad_token, special.pad_token), tokenizer)
    elif not any((part.folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{part.folder} has no vocabulary",
            needs=" or ".join(TOKENIZER_FILES),
            fix="download the component again",
            code="E-CKP-02",
        )


def _check_template(file: Path, processor: object) -> None:
    """Special tokens of a template must be in its table: the library panics when it tokenizes without."""
    if not isinstance(processor, dict):
        return
    processors = processor.get("processors")
    for inner in processors if isinstance(processors, list) else ():
        _check_template(file, inner)
    table = processor.get("special_tokens")
    templates = [processor.get(key) for key in ("single", "pair")]
    pieces = [piece for template in templates if isinstance(template, list) for piece in template]
    used = [piece.get("SpecialToken") for piece in pieces if isinstance(piece, dict)]
    for token in used:
        name = token.get("id") if isinstance(token, dict) else None
        if name is not None and not (isinstance(table, dict) and isinstance(name, str) and name in table):
            raise bad_config_value(file, "post_processor", name, "special tokens that are in special_tokens")


def _try_tokenizer(part: Part, declared: tuple[Any, ...], tokenizer: Tokenizer) -> None:
    """Prompts are padded: the pad token must be named, and in the vocabulary. Tokenize one."""
    tokens = [token["content"] if isinstance(token, dict) else token for token in declared if token]
    if not tokens and tokenizer.padding:
        tokens = [tokenizer.padding["pad_token"]]
    if not tokens and "pad_token" not in part.config and part.class_name.startswith("T5Tokenizer"):
        tokens = ["<pad>"]  # the default of these classes
    if not tokens or any(tokenizer.token_to_id(token) is None for token in tokens):
        rule = "a token of tokenizer.json"
        raise bad_config_value(_config_file(part), "pad_token", tokens[0] if tokens else None, rule)
    try:  # as it is called for a prompt, which replaces the stored padding and truncation
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("a red circle")
    except BaseException as e:
        raise library_refusal(part.folder / "tokenizer.json", e) from e


def _parse_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
    except BaseException as e:
        raise library_refusal(file, e) from e


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
