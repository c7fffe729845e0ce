"""Names of the tensors of text encoders and VAEs in other tools. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ascendit.checkpoint.gguf_names import llama_cpp_names
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.names import naming_of


def recognise_part(names: Collection[str]) -> str | None:
    """The component that tensors of these names belong to: `transformer`, `text_encoder`, or None."""
    if llama_cpp_names(names):
        return "text_encoder"
    return "transformer" if naming_of({name: None for name in names}) else None


def canonical_part(part: str, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a component under the names of transformers or Diffusers. `part`: its name."""
    renamed = llama_cpp_names(stored) if part == "text_encoder" else {}
    return {renamed.get(name, name): info for name, info in stored.items()}
