"""Strict loading of Diffusers and transformers components: text encoder, image encoder, VAE, tokenizer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ascendit.checkpoint.component import Part
from ascendit.checkpoint.part_check import (
    check_part,
    first_line,
    library_config,
    library_refusal,
    processor_config,
    tensor_mismatch,
)
from ascendit.checkpoint.reader import common_dtype
from ascendit.errors import CheckpointError, is_out_of_memory


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


def load_library_part(part: Part, *, dtype: torch.dtype | None = None) -> Any:
    """Load a text encoder, image encoder or VAE on the CPU through transformers or Diffusers.

    `dtype`: None for the dtype of most stored bytes. The library gets the checked values of config.json
    only. Raises CheckpointError: the errors of `check_part`, and E-CKP-04 for tensors that the library
    misses: it initializes missing weights randomly and only logs it.
    """
    shards = check_part(part)
    assert shards is not None, part.name
    if dtype is None:
        stored = ((info.dtype, info.nbytes) for info in shards.tensors.values())
        dtype = getattr(torch, common_dtype(stored))
    values = library_config(part).model_dump()
    options: dict[str, Any] = {"torch_dtype": dtype, **values}
    try:
        cls = getattr(importlib.import_module(part.library), part.class_name)
        if part.library == "transformers":  # without the option it stops without a name
            options = {"dtype": dtype, "ignore_mismatched_sizes": True, "config": cls.config_class(**values)}
        with quiet():
            model, info = cls.from_pretrained(
                part.path, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
            )
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise CheckpointError(
            f"{part.path}: {first_line(e)}",
            needs=f"a folder that {part.library} loads as {part.class_name}",
            fix="download the component again",
            code="E-CKP-04",
        ) from e
    kinds = ("missing keys", "unexpected keys", "mismatched keys")
    problems = {kind: [str(name) for name in info.get(kind.replace(" ", "_")) or ()] for kind in kinds}
    if any(problems.values()):
        raise tensor_mismatch(part, problems)
    return model.eval().requires_grad_(False)


def load_processor(part: Part) -> Any:
    """Load a tokenizer or image processor, which have no weights.

    Raises CheckpointError (E-CKP-06) as `check_part` does, and for files that the library refuses.
    """
    check_part(part)
    try:
        cls = getattr(importlib.import_module(part.library), part.class_name)
        with quiet():
            if part.name == "image_processor":
                return cls(**processor_config(part).model_dump(exclude_none=True))
            return cls.from_pretrained(part.path, local_files_only=True)
    except BaseException as e:
        raise library_refusal(part.path, e) from e
