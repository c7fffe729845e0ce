"""Strict loading of Diffusers and transformers components: text encoder, image encoder, VAE, tokenizer."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ascendit.checkpoint.component import Part
from ascendit.checkpoint.reader import TORCH_DTYPES, Shards, TensorInfo
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import CheckpointError
from ascendit.exclusive import Exclusive
from ascendit.names import listed

LOADING = Exclusive("the loading of a model")
"""Held while a part loads: transformers changes PyTorch's default dtype and initializers of the process."""


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


def load_library_part(part: Part, *, dtype: torch.dtype | None = None) -> Any:
    """Load a text encoder, image encoder or VAE on the CPU through transformers or Diffusers.

    `dtype`: None for the stored dtype. Raises CheckpointError (E-CKP-04) for missing, unexpected or
    mismatched tensors: the libraries initialize missing weights randomly and only log it.
    """
    stored = Shards.open(part.path, part.stem).tensors.values()
    dtype = dtype or default_dtype(stored, "cpu")
    cls = getattr(importlib.import_module(part.library), part.class_name)
    options: dict[str, Any] = {"torch_dtype": dtype}
    if part.library == "transformers":  # else it stops at a mismatched tensor without naming it
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with LOADING.hold(), quiet():
            model, info = cls.from_pretrained(
                part.path, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(
            f"{part.path}: {str(e).splitlines()[0]}",
            needs=f"a folder that {part.library} loads as {part.class_name}",
            fix="download the component again",
            code="E-CKP-04",
        ) from e
    kinds = ("missing keys", "unexpected keys", "mismatched keys")
    problems = {kind: [str(name) for name in info.get(kind.replace(" ", "_")) or ()] for kind in kinds}
    if any(problems.values()):
        raise CheckpointError(
            f"{part.path}: "
            + "; ".join(f"{kind}: {listed(names)}" for kind, names in problems.items() if names),
            needs=f"exactly the tensors of this {part.class_name}",
            fix="download the component again, or check that config.json matches the weights",
            code="E-CKP-04",
        )
    return model.eval().requires_grad_(False)


def load_processor(part: Part) -> Any:
    """Load a tokenizer or image processor, which have no weights."""
    cls = getattr(importlib.import_module(part.library), part.class_name)
    with LOADING.hold(), quiet():
        return cls.from_pretrained(part.path, local_files_only=True)
