"""Components of Diffusers and transformers: text encoder, image encoder, VAE, tokenizer. Loaded strictly."""

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
from ascendit.names import listed


def default_dtype(specs: Iterable[TensorSpec | TensorInfo], device: str) -> torch.dtype:
    """The dtype most bytes are stored in, on a CPU; bfloat16 elsewhere."""
    if device != "cpu":
        return torch.bfloat16
    count: Counter[str] = Counter()
    for spec in specs:
        count[spec.dtype] += spec.nbytes
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[count.most_common(1)[0][0]])
    return dtype


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and reports of transformers; what is wrong is said by our own error."""
    from transformers.utils import logging as chatter

    level, bar = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bar:
            chatter.enable_progress_bar()


def load_library_part(part: Part, *, dtype: torch.dtype | None = None) -> Any:
    """A text encoder, image encoder or VAE through transformers or Diffusers, on the CPU, strict.

    `dtype` None = as stored. The libraries fill gaps with random weights and only log it; here a gap is
    CheckpointError E-CKP-04.
    """
    stored = Shards.open(part.path, part.stem).tensors.values()
    dtype = dtype or default_dtype(stored, "cpu")
    cls = getattr(importlib.import_module(part.library), part.class_name)
    options: dict[str, Any] = {"torch_dtype": dtype}
    if part.library == "transformers":  # it names misshapen tensors only when told not to stop at them
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            model, info = cls.from_pretrained(
                part.path, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
            )
    except (OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(
            f"{part.path}: {str(e).splitlines()[0]}",
            needs=f"a folder that {part.library} loads as {part.class_name}",
            fix="download the part again",
            code="E-CKP-04",
        ) from e
    kinds = ("missing keys", "unexpected keys", "mismatched keys")
    wrong = {kind: [str(name) for name in info.get(kind.replace(" ", "_")) or ()] for kind in kinds}
    if any(wrong.values()):
        raise CheckpointError(
            f"{part.path}: "
            + "; ".join(f"{kind}: {listed(names)}" for kind, names in wrong.items() if names),
            needs=f"exactly the tensors of this {part.class_name}",
            fix="download the part again, or check that config.json and the weights belong together",
            code="E-CKP-04",
        )
    return model.eval().requires_grad_(False)


def load_processor(part: Part) -> Any:
    """A tokenizer or image processor; configs only."""
    cls = getattr(importlib.import_module(part.library), part.class_name)
    with quiet():
        return cls.from_pretrained(part.path, local_files_only=True)
