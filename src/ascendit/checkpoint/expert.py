"""One transformer under Diffusers names, whatever layout it lies in. Headers and JSON only, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.store import TensorInfo

Container = Literal["plain", "packed", "e4m3", "bf16"]
"""How codes lie: as the format says; FP4 two to a byte; FP4 numbers one to an element of a wider type."""
Origin = Literal["float", "msmodelslim", "vllm-omni", "sglang", "ascendit", "fp8-block"]


@dataclass(frozen=True)
class Layer:
    """A linear layer that is stored as codes and scales, or whose input is smoothed."""

    name: str
    """`blocks.0.attn1.to_q`."""
    scheme: str
    """A key of `spec.SCHEMES`, or `fp8_128x128` where `weight_scale_inv` stands beside the weight."""
    shape: tuple[int, int]
    """(N, K) of the decoded weight."""
    container: Container
    tensors: dict[str, TensorInfo]
    """Role (`weight`, `weight_scale`, `mul_scale`, `bias`, ...) -> where it lies."""


@dataclass(frozen=True)
class Expert:
    """One transformer. `tensors` and `layers` go by Diffusers names; a `TensorInfo` keeps its name on disk."""

    name: str
    """`transformer` or `transformer_2`."""
    path: Path
    config: dict[str, Any]
    """Of a WanTransformer3DModel."""
    config_problem: str | None
    """What the files do not tell, such as the number of heads."""
    naming: Literal["diffusers", "wan"]
    tensors: dict[str, TensorInfo]
    layers: dict[str, Layer]
    manifest: dict[str, str] | None
    attention: dict[str, str]
    """`<attn>.quant_type` -> its value."""
    marker: dict[str, Any] | None
    """`quantization_config` of config.json."""
    origin: Origin
