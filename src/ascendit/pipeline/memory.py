"""Bytes of a model's weights as `load` loads them, from headers alone, beside the free memory.

Does not import torch for a device on the host. Activations come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ascendit.checkpoint.part_tensors import EMBEDDINGS
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TORCH_DTYPES
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.weight_files import Shards
from ascendit.device.device import Device
from ascendit.device.limits import QuantizedLayer
from ascendit.device.memory import host_memory
from ascendit.device.prepared_bytes import prepared_bytes
from ascendit.model.quantize_on_load import quantized_layers, stored_dtype
from ascendit.names import FLOAT32_PARTS, expected_tensors
from ascendit.pipeline.options import PreparedModel
from ascendit.quant.fusion import first_in_group
from ascendit.quant.schemes import SCHEMES

BYTES = {torch_name: DTYPE_BITS[name] // 8 for name, torch_name in TORCH_DTYPES.items()}
"""torch dtype -> bytes of an element."""
HOST = "cpu"
FLOAT32_IN_FLOAT16 = ".DenseReluDense.wo."
"""Layers that transformers keeps in float32 in a float16 model."""


@dataclass(frozen=True, kw_only=True)
class PartMemory:
    """The weights of one part in memory."""

    bytes: int
    dtype: str
    """dtype of its floating-point weights."""
    schemes: tuple[str, ...] = ()
    """Schemes of its quantized layers."""
    device: str
    until: str = ""
    """When its memory is released, if before the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The weights of a model in memory."""

    parts: Mapping[str, PartMemory]
    available: Mapping[str, int | None]
    """Device -> free bytes, None if unknown; the device of the denoiser comes first."""

    @property
    def main(self) -> str:
        """The device of the denoiser; `cpu` for the twin."""
        return next(iter(self.available))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parts, on all devices."""
        return sum(part.bytes for part in self.parts.values())

    def bytes_on(self, device: str) -> int:
        """Bytes of the parts on one device."""
        return sum(part.bytes for part in self.parts.values() if part.device == device)

    @property
    def too_small(self) -> tuple[str, ...]:
        """Devices whose free memory does not hold their weights."""
        free = {device: free for device, free in self.available.items() if free is not None}
        return tuple(device for device in free if self.bytes_on(device) > free[device])


def memory_of(model: PreparedModel) -> Memory:
    """Bytes of the weights of every part, and the free memory of their devices."""
    options, device = model.options, model.device
    main = str(device) if device.is_accelerator else HOST
    parts: dict[str, PartMemory] = {}
    for name, dtype in model.part_dtypes.items():
        if name == "image_encoder" and not model.needs_image_encoder:
            continue
        text_on = options.text_on if name == "text_encoder" else "device"
        parts[name] = PartMemory(
            bytes=library_bytes(model.shards[name], dtype),
            dtype=dtype,
            device=HOST if text_on == "cpu" else main,
            until="the prompt is encoded" if text_on == "drop" else "",
        )
    for expert, applied in model.experts:
        dtype = model.dtype or stored_dtype(expert, applied)
        layers = tuple(quantized_layers(expert, applied))
        floats = applied is not None and "bf16" in model.schedule.precisions
        plain, emulate = options.ops == "reference", options.emulate
        prepared = sum(prepared_bytes(x, device, reference=plain, emulate=emulate) for x in layers)
        parts[expert.name] = PartMemory(
            bytes=expert_bytes(expert, layers, dtype, floats=floats) + prepared,
            dtype=dtype,
            schemes=tuple(sorted({layer.scheme for layer in layers})),
            device=main,
        )
    devices = dict.fromkeys((main, *(part.device for part in parts.values())))
    return Memory(parts=parts, available={name: _free_bytes(name, device) for name in devices})


def _free_bytes(name: str, device: Device) -> int | None:
    if name == HOST:
        return host_memory()
    from ascendit.ops.open_device import free_bytes

    return free_bytes(device)


def library_bytes(shards: Shards, dtype: str) -> int:
    """Bytes of a VAE or encoder that its library loads in `dtype`."""
    tied = all(name in shards.tensors for name in EMBEDDINGS)
    return sum(
        math.prod(info.shape) * (4 if dtype == "float16" and FLOAT32_IN_FLOAT16 in name else BYTES[dtype])
        for name, info in shards.tensors.items()
        if not (tied and name == EMBEDDINGS[1])
    )


def expert_bytes(
    expert: Expert, layers: tuple[QuantizedLayer, ...], dtype: str, *, floats: bool = False
) -> int:
    """Bytes of the parameters of a transformer whose `layers` are quantized.

    `dtype`: that of the other parameters, except those kept in float32. `floats`: whether the quantized
    layers store their unquantized weights too.
    """
    quantized = {layer.name for layer in layers}
    expected = expected_tensors(expert.config)
    total = 0
    for name, shape in expected.items():
        if name.rpartition(".")[0] not in quantized:
            float32 = any(part in FLOAT32_PARTS for part in name.split("."))
            total += math.prod(shape) * (4 if float32 else BYTES[dtype])
    for name, scheme, (n, k) in layers:
        stored = SCHEMES[scheme].tensors(n, k).values()
        total += sum(math.prod(shape) * DTYPE_BITS[stored_as] // 8 for stored_as, shape in stored)
        bias = n if f"{name}.bias" in expected else 0
        total += 4 * bias + (n * k + bias) * BYTES[dtype] * floats
    # Layers that share an input share its factors.
    factors = {first_in_group(name): expert.layers[name].shape[1] for name in expert.smoothed}
    return total + 4 * sum(factors.values())
