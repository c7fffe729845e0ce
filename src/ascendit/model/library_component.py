"""Strict loading of Diffusers and transformers components: text encoder, image encoder, VAE, tokenizer."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ascendit.checkpoint.component import Part, library_refusal, read_json
from ascendit.checkpoint.part_check import (
    check_part,
    library_config,
    processor_config,
    tensor_mismatch,
)
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.sources import OpenFiles
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TORCH_DTYPES, TensorInfo
from ascendit.checkpoint.tokenizer_check import TOKENIZER_KEYS
from ascendit.checkpoint.trust import TOKENIZER_CONFIGS, TOKENIZER_FILES, supported_class
from ascendit.checkpoint.weight_files import Shards
from ascendit.exclusive import Exclusive

log = logging.getLogger("ascendit")
LOADING = Exclusive("the loading of a model")
"""Held while a part loads: transformers changes PyTorch's default dtype and initializers of the process."""


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


def library_class(part: Part) -> Any:
    """The class of `part` in its library; only classes of `trust.PART_CLASSES` are imported.

    Raises CheckpointError (E-CKP-05) for another class.
    """
    library, name = supported_class(part.path, part.name, [part.library, part.class_name], part.config)
    return getattr(importlib.import_module(library), name)


@contextmanager
def _library_errors(part: Part) -> Iterator[None]:
    """Convert an error of a library with `library_refusal`; a library that is not installed stays one."""
    try:
        yield
    except ImportError:
        raise
    except BaseException as e:
        raise library_refusal(part.path, e) from e


def load_library_part(part: Part, shards: Shards, dtype: torch.dtype) -> Any:
    """Load a text encoder, image encoder or VAE on the CPU through transformers or Diffusers.

    `shards`: its headers, checked by `check_part`. The library gets tensors over memory maps of their files,
    and the checked values of config.json, no folder. A model in the stored dtype keeps the maps. Raises
    CheckpointError: the errors of `library_config`, E-CKP-02 for a file that has changed, E-CKP-06 for files
    that the library refuses, E-CKP-04 for tensors that it misses: it initializes missing weights randomly and
    only logs it.
    """
    values = library_config(part).model_dump()
    for note in shards.notes:
        log.warning(f"{part.name}: {note}")
    build = _from_diffusers if part.library == "diffusers" else _from_transformers
    with LOADING.hold(), _library_errors(part), quiet():
        cls = library_class(part)
        model, problems = build(cls, values, mapped_tensors(shards.tensors), dtype)
    if any(problems.values()):
        raise tensor_mismatch(part, problems)
    return model.eval().requires_grad_(False)


def mapped_tensors(stored: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors [..] of the stored dtypes over private memory maps of their files, read page by page when used;
    encoded tensors are decoded into memory.

    Raises CheckpointError (E-CKP-02) for a file that is not the one whose header was read.
    """
    files, maps, tensors = OpenFiles(), dict[Path, mmap.mmap](), dict[str, Tensor]()
    try:
        for name, info in stored.items():
            if not info.is_plain:
                with RowReader() as reader:
                    tensors[name] = reader.read_tensor(info)
                continue
            descriptor = files.open(info.file, info.state)
            if info.file not in maps:
                maps[info.file] = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
            view = memoryview(maps[info.file])[info.start : info.end]
            if info.start % max(DTYPE_BITS[info.dtype] // 8, 1):  # PyTorch needs aligned numbers
                view = memoryview(bytearray(view))
            dtype = getattr(torch, TORCH_DTYPES[info.dtype])
            empty = torch.empty(0, dtype=dtype)
            tensors[name] = (torch.frombuffer(view, dtype=dtype) if len(view) else empty).view(info.shape)
        files.check()
    finally:
        files.close()
    return tensors


Problems = dict[str, list[str]]
"""`missing keys`, `unexpected keys`, `mismatched keys` -> names of tensors."""


def _from_transformers(
    cls: Any, values: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, Problems]:
    """In a folder, transformers would prefer other weights to those whose headers were checked: adapters, and
    files with names like `shard-00001-model-00001-of-00001.safetensors`.
    """
    model, info = cls.from_pretrained(
        None,
        config=cls.config_class(**values),
        state_dict=weights,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # without it, an error does not name the tensor
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    kinds = ("missing keys", "unexpected keys", "mismatched keys")
    return model, {kind: [str(name) for name in info.get(kind.replace(" ", "_")) or ()] for kind in kinds}


def _from_diffusers(
    cls: Any, values: Mapping[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, Problems]:
    arguments = inspect.signature(cls.__init__).parameters
    with torch.device("meta"):
        model = cls(**{key: value for key, value in values.items() if key in arguments})
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    problems = {
        "missing keys": [name for name in shapes if name not in weights],
        "unexpected keys": [name for name in weights if name not in shapes],
        "mismatched keys": [n for n, shape in shapes.items() if n in weights and weights[n].shape != shape],
    }
    if not any(problems.values()):
        model.load_state_dict({name: weights.pop(name).to(dtype) for name in shapes}, assign=True)
    return model, problems


def load_processor(part: Part) -> Any:
    """Load a tokenizer or image processor, which have no weights.

    Raises CheckpointError (E-CKP-06) as `check_part` does, and for files that the library refuses.
    """
    with LOADING.hold(), _library_errors(part), quiet():
        cls = library_class(part)
        if part.name == "image_processor":
            return cls(**processor_config(part).model_dump(exclude_none=True))
        check_part(part)
        with TemporaryDirectory(prefix="ascendit-") as folder:
            _copy_tokenizer(part, Path(folder))
            tokenizer = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.name_or_path = str(part.path)
        return tokenizer


def _copy_tokenizer(part: Part, folder: Path) -> None:
    """Write JSON with the keys of the models only, and links to the vocabulary, for the library to read."""
    for name in TOKENIZER_CONFIGS:
        if (part.path / name).exists():
            config = read_json(part.path / name)
            if keys := TOKENIZER_KEYS.get(name):
                config = {key: value for key, value in config.items() if key in keys.model_fields}
            (folder / name).write_text(json.dumps(config), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (part.path / name).exists():
            os.symlink(os.path.realpath(part.path / name), folder / name)
