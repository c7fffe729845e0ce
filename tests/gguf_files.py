"""GGUF files of tiny models, written by the package `gguf`, and blocks of random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

FACTORS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Type -> byte offsets of the float16 factors in a block."""


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def random_blocks(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random stored bytes of a tensor [..., K], uint8 [..., bytes of a row], with factors of about 0.01."""
    rng = np.random.default_rng(seed)
    values, nbytes = gguf.GGML_QUANT_SIZES[kind_of(name)]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // values, nbytes), dtype=np.uint8)
    for offset in FACTORS[name]:
        factors = (rng.standard_normal(len(blocks)) / 100).astype(np.float16)
        blocks[:, offset : offset + 2] = factors.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def stored(values: torch.Tensor, name: str, seed: int = 0) -> np.ndarray:
    """`values` in a ggml type; random blocks for the types that the package only decodes."""
    data = values.detach().to(torch.float32).numpy()
    if name in ("F32", "F16"):
        return data.astype(np.dtype(f"float{name[1:]}"))
    try:
        return gguf.quants.quantize(data, kind_of(name))
    except NotImplementedError:
        return random_blocks(name, data.shape, seed)


def decoded(data: np.ndarray, name: str) -> torch.Tensor:
    """The values in the package's own float32, rounded to bfloat16 unless they are stored as floats."""
    values = torch.from_numpy(gguf.quants.dequantize(data, kind_of(name)).copy())
    return values.to(torch.float16) if name == "F16" else values if name == "F32" else values.bfloat16()


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, str]],
    *,
    arch: str = "wan",
    original_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:
    """Write a GGUF file. `tensors`: name -> (stored array, type)."""
    writer = gguf.GGUFWriter(path, arch)
    for name, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind_of(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(
    path: Path, weights: Mapping[str, torch.Tensor], name: str, *, arch: str = "wan"
) -> dict[str, torch.Tensor]:
    """Write weights as ComfyUI-GGUF does: matrices in the type `name`, others in float32.

    Returns the values that the file stores.
    """
    tensors, values = {}, {}
    for index, (key, weight) in enumerate(weights.items()):
        block = gguf.GGML_QUANT_SIZES[kind_of(name)][0]
        kind = name if weight.ndim == 2 and weight.shape[1] % block == 0 else "F32"
        tensors[key] = stored(weight, kind, index), kind
        values[key] = decoded(tensors[key][0], kind).reshape(weight.shape)
    write(path, tensors, arch=arch)
    return values
