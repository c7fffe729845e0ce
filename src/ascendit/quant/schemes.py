"""The schemes as one table: how a linear layer is stored and computes, and what tools call it. No torch.

A new scheme is a row here and a row of `mx.formats`; beside them only kernels need to know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ascendit.errors import UsageError
from ascendit.mx.formats import FORMATS

METHOD = "ascendit"
"""The `quant_method` of a config that leaves the schemes to the manifest, or to the tensors."""
FP8_TILES = "fp8_128x128"
"""FP8 in 128 x 128 tiles, as some published models have it. Only read: loading and repacking make it BF16."""
_SAFETENSORS = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
"""Name of a dtype in torch -> in a safetensors header."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One scheme. Formats are rows of `mx.formats.FORMATS`."""

    name: str
    weight: str = ""
    """Format of the weight; "": floating point, as the source has it."""
    activation: str = ""
    """Format of the activation; "": floating point."""
    rule: str = ""
    """Default scale rule of the activation. It differs from that of a weight in the same format for MXFP4."""
    roles: tuple[str, ...] = ()
    """The tensors of a layer on disk without `mul_scale` and `bias`, in the order they are written. Empty: a
    step's choice for weights that are stored in another scheme."""
    manifest: str = ""
    """msModelSlim's word for it, the value in `quant_model_description.json`."""
    manifest_alias: str = ""
    """MindIE-SD's second word for it; only read."""
    vllm_omni_key: str = ""
    """The key of `quantization_config` by which vLLM-Omni knows quantized weights; "": no such method."""
    vllm_omni_smooth: bool = False
    """vLLM-Omni reads a `mul_scale` in these layers."""
    not_in_engines: str = ""
    """Why none of `quant.engines` loads it; empty if one does."""
    most_lost: int | None = None
    """How many of 192 videos the quality table lets it lose against BF16; None: no limit."""
    text: str = ""
    """For `inspect` and the documentation."""

    @property
    def qdata_dtype(self) -> str:
        """Dtype of the codes, as a safetensors header spells it."""
        return _SAFETENSORS[FORMATS[self.weight].qdata_dtype]

    @property
    def packed(self) -> bool:
        """Two codes share a byte of the weight."""
        return bool(self.weight) and FORMATS[self.weight].packed

    @property
    def block(self) -> int:
        """Elements of K that share an E8M0 scale; 0 if the scheme is not MX."""
        form = FORMATS.get(self.weight)
        return form.block if form and form.kind in ("block", "dual") else 0

    @property
    def tile(self) -> int:
        """Rows, and elements of K, that share a float32 scale; 0 if no two rows share one."""
        return FORMATS[self.weight].tile if self.weight else 0

    @property
    def group(self) -> int:
        """Elements of K that share a coarse float32 scale; 0 if there is none."""
        return FORMATS[self.weight].coarse if self.weight else 0

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Role -> (dtype, shape) of codes and scales of a quantized layer with a decoded weight [n, k]."""
        if not self.weight:
            return {}
        qdata, scale, dual = FORMATS[self.weight].shapes((n, k))
        scale_dtype = _SAFETENSORS[FORMATS[self.weight].scale_dtype]
        every = {
            "weight": (self.qdata_dtype, qdata),
            "weight_scale": (scale_dtype, scale),
            "weight_scale_inv": (scale_dtype, scale),
            "weight_offset": ("F32", (n, 1)),
            "weight_dual_scale": ("F32", dual or ()),
        }
        return {role: every[role] for role in self.roles}


_FP8_ENGINES = "it does not read FP8 with float scales as it lies here"
_ROWS = (
    Scheme(name="bf16", roles=("weight",), manifest="FLOAT", text="float values of a smoothed layer (W*s)"),
    Scheme(
        name="int8",
        weight="int8",
        activation="int8",
        rule="amax",
        roles=("weight", "weight_scale", "weight_offset"),
        manifest="W8A8_DYNAMIC",
        vllm_omni_key="is_checkpoint_int8_serialized",
        most_lost=2,
        text="int8 values, one float scale per row",
    ),
    Scheme(
        name="fp8",
        weight="fp8",
        activation="fp8",
        rule="amax",
        roles=("weight", "weight_scale"),
        manifest="WFP8AFP8_DYNAMIC",
        not_in_engines=_FP8_ENGINES,
        text="e4m3 values, one float scale per row",
    ),
    Scheme(
        name="mxfp8",
        weight="mxfp8",
        activation="mxfp8",
        rule="ceil",
        roles=("weight", "weight_scale"),
        manifest="W8A8_MXFP8",
        vllm_omni_key="is_checkpoint_mxfp8_serialized",
        most_lost=2,
        text="e4m3 values, E8M0 scale per 32 along K",
    ),
    Scheme(
        name="mxfp4",
        weight="mxfp4",
        activation="mxfp4",
        rule="floor",
        roles=("weight", "weight_scale"),
        manifest="W4A4_MXFP4",
        manifest_alias="W4A4_MXFP4_DYNAMIC",
        vllm_omni_key="is_checkpoint_mxfp4_serialized",
        vllm_omni_smooth=True,
        text="e2m1 values, E8M0 scale per 32 along K",
    ),
    Scheme(
        name="mxfp4_dualscale",
        weight="mxfp4_dualscale",
        activation="mxfp4_dualscale",
        rule="floor",
        roles=("weight", "weight_scale", "weight_dual_scale"),
        manifest="W4A4_MXFP4_DUALSCALE",
        vllm_omni_key="is_checkpoint_serialized",
        vllm_omni_smooth=True,
        text="e2m1 values, E8M0 scale per 32 and float scale per 512 along K",
    ),
    Scheme(name="w4a8", weight="mxfp4", activation="mxfp8", rule="ceil"),
    Scheme(
        name=FP8_TILES,
        weight=FP8_TILES,
        roles=("weight", "weight_scale_inv"),
        not_in_engines=_FP8_ENGINES,
        text="e4m3 values, one float scale per 128 x 128 tile",
    ),
)

STORED_SCHEMES = {s.name: s for s in _ROWS if s.roles}
"""What a checkpoint may hold."""
SCHEMES = {name: s for name, s in STORED_SCHEMES.items() if name != FP8_TILES}
"""What `quantize` and `repack` write, and what a recipe names."""
if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]
"""The type of an option that takes a scheme."""
QUANTIZED = tuple(name for name, s in SCHEMES.items() if s.weight)
"""`SCHEMES` without `bf16`."""
LINEAR_SCHEMES = {s.name: s for s in _ROWS if s.activation}
"""How a quantized layer computes: `QUANTIZED` and `w4a8`, by which a step multiplies MXFP4 weights."""
FP4 = tuple(name for name in QUANTIZED if SCHEMES[name].packed)
"""Those with 4-bit weights and activations."""
MANIFEST_SCHEMES = {
    word: name for name, s in SCHEMES.items() for word in (s.manifest, s.manifest_alias) if word
}
"""Word in a manifest -> scheme."""


def scheme_after_reading(stored: str) -> str:
    """The scheme of a stored layer once it is loaded or repacked: FP8 in tiles becomes `bf16`."""
    return "bf16" if stored == FP8_TILES else stored


def scheme_of(name: str) -> Scheme:
    """How a quantized layer computes in this scheme. UsageError E-USE-01 lists the names if there is none."""
    if name not in LINEAR_SCHEMES:
        raise UsageError(
            f"scheme {name!r} for a linear layer on codes",
            needs=", ".join(LINEAR_SCHEMES),
            fix="check the spelling; bf16 layers are no codes",
        )
    return LINEAR_SCHEMES[name]
