"""The variants of the linear layers of a model: every scheme, and combinations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ascendit.checkpoint.transformer import read_expert
from ascendit.device.device import Device
from ascendit.model.linear import QuantLinear
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import bind
from ascendit.pipeline.generate import Pipeline
from ascendit.schedule import StepSchedule

MIXED = """
[[rules]]
layers = "*"
scheme = "mxfp4"

[[rules]]
layers = "*.attn*"
scheme = "mxfp8"
"""


@dataclass(frozen=True)
class Way:
    """`schemes`: matmuls that the chip must have. `smooth`: each fused weight has its own `mul_scale`."""

    name: str
    schemes: frozenset[str] = frozenset()
    scheme: str | None = None
    recipe: str = ""
    policy: str = ""
    smooth: bool = False
    nz: bool = False

    @property
    def in_nz(self) -> bool:
        """Whether its weights are in FRACTAL_NZ."""
        return self.nz or self.scheme == "mxfp4_dualscale"


def _plain(scheme: str) -> Way:
    return Way(scheme, frozenset({scheme}), scheme)


WAYS = (
    Way("bf16"),
    _plain("int8"),
    Way("int8, NZ", frozenset({"int8"}), "int8", nz=True),
    Way("int8, smoothed", frozenset({"int8"}), "int8", smooth=True),
    _plain("fp8"),
    _plain("mxfp8"),
    Way("mxfp8, NZ", frozenset({"mxfp8"}), "mxfp8", nz=True),
    Way("mxfp8, smoothed", frozenset({"mxfp8"}), "mxfp8", smooth=True),
    _plain("mxfp4"),
    Way("mxfp4, NZ", frozenset({"mxfp4"}), "mxfp4", nz=True),
    Way("mxfp4, step 0 in w4a8", frozenset({"mxfp4", "w4a8"}), "mxfp4", policy="0:w4a8,default:w4a4"),
    _plain("mxfp4_dualscale"),
    Way("mxfp4, attention in mxfp8", frozenset({"mxfp4", "mxfp8"}), recipe=MIXED),
)


def on(device: Device) -> Iterator[Way]:
    """The variants for which this chip has every matmul."""
    yield from (way for way in WAYS if way.schemes <= device.native_schemes)


def experts(pipe: Pipeline, way: Way, layers: int) -> list[WanTransformer]:
    """Both experts of a float model, quantized while they load, cut to their first blocks."""
    models = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(way.recipe)
        online = Online.from_options(way.scheme, str(recipe) if way.recipe else None)
        for expert in map(read_expert, pipe.layout.experts):
            applied = online.apply(expert) if online else None
            ops, device = bind(pipe.device, nz=way.nz), pipe.device.torch_name
            model = load_expert(expert, applied, ops, device=device, dtype=torch.bfloat16)
            model.blocks = model.blocks[:layers]
            if way.smooth:
                smooth(model)
            models.append(model)
    return models


def smooth(model: torch.nn.Module) -> None:
    """Give every fused weight its own `mul_scale`."""
    scales: dict[int, torch.nn.Parameter] = {}
    for m in model.modules():
        if isinstance(m, QuantLinear):
            ones = torch.nn.Parameter(torch.ones(m.in_features, device=m.device), requires_grad=False)
            m.mul_scale = scales.setdefault(id(m.group), ones)


def policy(way: Way) -> StepSchedule:
    return StepSchedule.parse(way.policy) if way.policy else StepSchedule()
