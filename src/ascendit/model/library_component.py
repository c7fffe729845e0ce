"""Strict loading of Diffusers and transformers components: text encoder, image encoder, VAE, tokenizer.

The libraries get values and tensors, not the folder of a checkpoint: `from_pretrained` with a folder would
also follow keys of its configs to other files, libraries and hubs. Only the keys listed here reach a library.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ascendit.checkpoint.component import Part, read_json
from ascendit.checkpoint.reader import TORCH_DTYPES, RowReader, Shards, TensorInfo
from ascendit.checkpoint.trust import TOKENIZER_CONFIGS, TOKENIZER_FILES, check_part_files, supported_class
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import AscenditError, CheckpointError, is_out_of_memory
from ascendit.names import listed

_UMT5 = (
    "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads "
    "relative_attention_num_buckets relative_attention_max_distance dropout_rate classifier_dropout "
    "layer_norm_epsilon initializer_factor feed_forward_proj dense_act_fn is_gated_act "
    "is_encoder_decoder is_decoder use_cache pad_token_id eos_token_id decoder_start_token_id "
    "tie_word_embeddings"
)
_CLIP = (
    "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads num_channels "
    "image_size patch_size hidden_act layer_norm_eps attention_dropout initializer_range "
    "initializer_factor"
)
_IMAGES = (
    "do_resize size default_to_square resample do_center_crop crop_size do_rescale rescale_factor "
    "do_normalize image_mean image_std do_convert_rgb"
)
_TOKENIZER = (
    "added_tokens_decoder additional_special_tokens extra_special_tokens extra_ids bos_token "
    "eos_token unk_token pad_token sep_token cls_token mask_token add_prefix_space "
    "clean_up_tokenization_spaces do_lower_case legacy max_length model_input_names model_max_length "
    "pad_to_multiple_of pad_token_type_id padding_side split_special_tokens stride truncation_side "
    "truncation_strategy"
)
CONFIG_KEYS: dict[str, frozenset[str]] = {
    "text_encoder": frozenset(_UMT5.split()),
    "image_encoder": frozenset(_CLIP.split()),
    "image_processor": frozenset(_IMAGES.split()),
    "tokenizer": frozenset(_TOKENIZER.split()),
}
"""Component -> the keys of its config that reach transformers."""


def default_dtype(specs: Iterable[TensorSpec | TensorInfo], device: str) -> torch.dtype:
    """On a CPU, the dtype of most bytes of `specs`; on other devices, bfloat16."""
    if device != "cpu":
        return torch.bfloat16
    count: Counter[str] = Counter()
    for spec in specs:
        count[spec.dtype] += spec.nbytes
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[count.most_common(1)[0][0]])
    return dtype


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and reports of transformers; our own errors report problems."""
    from transformers.utils import logging as library_log

    level, bar = library_log.get_verbosity(), library_log.is_progress_bar_enabled()
    library_log.set_verbosity_error()
    library_log.disable_progress_bar()
    try:
        yield
    finally:
        library_log.set_verbosity(level)
        if bar:
            library_log.enable_progress_bar()


@contextmanager
def _library_errors(part: Part) -> Iterator[None]:
    """Convert any error of a library to a CheckpointError (E-CKP-04)."""
    try:
        yield
    except (AscenditError, ImportError):
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        reason = next(iter(str(e).strip().splitlines()), "")
        raise CheckpointError(
            f"{part.path}: {type(e).__name__}: {reason}",
            needs=f"a folder that {part.library} loads as {part.class_name}",
            fix="download the component again",
            code="E-CKP-04",
        ) from e


def library_class(part: Part) -> Any:
    """The class of `part` in its library; only classes of `PART_CLASSES` are imported.

    Raises CheckpointError (E-CKP-05) for another class, and the errors of `check_part_files`.
    """
    library, name = supported_class(part.path, part.name, [part.library, part.class_name], part.config)
    check_part_files(part.path, part.name)
    return getattr(importlib.import_module(library), name)


def load_library_part(part: Part, *, dtype: torch.dtype | None = None) -> Any:
    """Load a text encoder, image encoder or VAE on the CPU through transformers or Diffusers.

    `dtype`: None for the stored dtype. Raises CheckpointError (E-CKP-04) for missing, unexpected or
    mismatched tensors: the libraries initialize missing weights randomly and only log it.
    """
    stored = Shards.open(part.path, part.stem).tensors
    dtype = dtype or default_dtype(stored.values(), "cpu")
    with _library_errors(part), quiet():
        cls = library_class(part)
        with RowReader() as reader:
            weights = {name: reader.read_tensor(info) for name, info in stored.items()}
        build = _from_diffusers if part.library == "diffusers" else _from_transformers
        model, problems = build(cls, part, weights, dtype)
    if any(problems.values()):
        raise CheckpointError(
            f"{part.path}: "
            + "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names),
            needs=f"exactly the tensors of this {part.class_name}",
            fix="download the component again, or check that config.json matches the weights",
            code="E-CKP-04",
        )
    return model.eval().requires_grad_(False)


Problems = dict[str, list[str]]
"""`missing keys`, `unexpected keys`, `mismatched keys` -> names of tensors."""


def _from_transformers(
    cls: Any, part: Part, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, Problems]:
    config_class = cls.config_class
    config = part.config.get(config_class.base_config_key or "", part.config)  # of a complete CLIP model
    model, info = cls.from_pretrained(
        None,
        config=config_class(**_selected(config, part.name)),
        state_dict=weights,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # else it stops at a mismatched tensor without naming it
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    kinds = ("missing keys", "unexpected keys", "mismatched keys")
    return model, {kind: [str(name) for name in info.get(kind.replace(" ", "_")) or ()] for kind in kinds}


def _from_diffusers(
    cls: Any, part: Part, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, Problems]:
    arguments = inspect.signature(cls.__init__).parameters.keys() - {"self"}
    with torch.device("meta"):
        model = cls(**{key: value for key, value in part.config.items() if key in arguments})
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    common = shapes.keys() & weights.keys()
    problems = {
        "missing keys": [name for name in shapes if name not in weights],
        "unexpected keys": [name for name in weights if name not in shapes],
        "mismatched keys": [name for name in common if shapes[name] != weights[name].shape],
    }
    if not any(problems.values()):
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return model, problems


def _selected(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key in CONFIG_KEYS[name]}


def load_processor(part: Part) -> Any:
    """Load a tokenizer or image processor, which have no weights.

    Raises CheckpointError: E-CKP-04 if the library cannot read it, E-CKP-02 for a tokenizer without
    vocabulary, and the errors of `library_class`.
    """
    with _library_errors(part), quiet():
        cls = library_class(part)
        if part.name == "image_processor":
            return cls(**_selected(_image_config(part), part.name))
        with TemporaryDirectory(prefix="ascendit-") as folder:
            _copy_tokenizer(part, Path(folder))
            tokenizer = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.name_or_path = str(part.path)
        return tokenizer


def _image_config(part: Part) -> Mapping[str, Any]:
    """The config of an image processor; a processor of several inputs has it under `image_processor`."""
    processor = part.path / "processor_config.json"
    inner = read_json(processor).get("image_processor") if processor.exists() else None
    return inner if isinstance(inner, dict) else part.config


def _copy_tokenizer(part: Part, folder: Path) -> None:
    """Write the files that transformers reads: JSON with `CONFIG_KEYS` only, and links to the vocabulary."""
    for name in TOKENIZER_CONFIGS:
        if (part.path / name).exists():
            config = read_json(part.path / name)
            if name != "added_tokens.json":
                config = _selected(config, part.name)
            (folder / name).write_text(json.dumps(config), encoding="utf-8")
    if not (vocabulary := [name for name in TOKENIZER_FILES if (part.path / name).exists()]):
        raise CheckpointError(  # transformers would make a vocabulary of four tokens
            f"{part.path} has no vocabulary",
            needs=" or ".join(TOKENIZER_FILES),
            fix="download the tokenizer of the model again",
            code="E-CKP-02",
        )
    for name in vocabulary:
        os.symlink(os.path.realpath(part.path / name), folder / name)
