"""The table of schemes: storage and computation of a linear layer, and its names in other tools.

Does not import torch.

A new scheme is a row here and a row in `mx.formats`; apart from them, only kernels depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ascendit.errors import UsageError
from ascendit.foreign import value_for
from ascendit.mx.formats import FORMATS

METHOD = "ascendit"
"""`quant_method` of a config whose schemes are determined by the manifest, or by the tensors."""
FP8_TILES = "fp8_128x128"
"""FP8 in 128 x 128 tiles, in some published models. Read-only: loading and repacking convert it to BF16."""
_SAFETENSORS = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float32": "F32"}
"""Name of a torch dtype -> name in a safetensors header."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One scheme. Formats are keys of `mx.formats.FORMATS`."""

    name: str
    weight: str = ""
    """Format of the weight; "": floating point, in the dtype of the source."""
    activation: str = ""
    """Format of the activation; "": floating point."""
    rule: str = ""
    """Default scale rule of the activation; for MXFP4 it differs from that of the weight."""
    roles: tuple[str, ...] = ()
    """The tensors of a layer in a checkpoint without `mul_scale` and `bias`, in the order they are written.
    Empty: only chosen per step, for weights in another scheme."""
    manifest: str = ""
    """Name of the scheme in `quant_model_description.json`: msModelSlim's, ascendit's own for int8_block."""
    manifest_alias: str = ""
    """MindIE-SD's other name of the scheme; read-only."""
    vllm_omni_key: str = ""
    """Key of `quantization_config` that marks quantized weights for vLLM-Omni; "": not supported there."""
    vllm_omni_smooth: bool = False
    """Whether vLLM-Omni reads a `mul_scale` in these layers."""
    not_in_engines: str = ""
    """Why none of `quant.engines` loads the scheme; "" if one does."""
    multiplied_on_cpu: bool = False
    """Whether the compiled matmul of a CPU takes the quantized weight; others are dequantized for it."""
    most_lost: int | None = None
    """Limit of the quality table: videos of 192 that fail and that BF16 gets right; None: no limit."""
    text: str = ""
    """Description for `inspect` and the documentation."""

    @property
    def qdata_dtype(self) -> str:
        """Dtype of the quantized weight, as in a safetensors header."""
        return _SAFETENSORS[FORMATS[self.weight].qdata_dtype]

    @property
    def packed(self) -> bool:
        """Whether a byte of the weight has two values."""
        return bool(self.weight) and FORMATS[self.weight].packed

    @property
    def block(self) -> int:
        """Elements along K per E8M0 scale; 0 if the scheme is not MX."""
        fmt = FORMATS.get(self.weight)
        return fmt.block if fmt and fmt.kind in ("block", "dual") else 0

    @property
    def tile(self) -> int:
        """Rows, and elements along K, per float32 scale; 0 if no two rows share one."""
        return FORMATS[self.weight].tile if self.weight else 0

    @property
    def group(self) -> int:
        """Elements along K per coarse float32 scale; 0 if the scheme has none."""
        return FORMATS[self.weight].coarse if self.weight else 0

    def tensors(self, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Role -> (dtype, shape) of quantized weight and scales of a layer with a weight [n, k]."""
        if not self.weight:
            return {}
        qdata, scale, dual = FORMATS[self.weight].shapes((n, k))
        scale_dtype = _SAFETENSORS[FORMATS[self.weight].scale_dtype]
        tensors = {
            "weight": (self.qdata_dtype, qdata),
            "weight_scale": (scale_dtype, scale),
            "weight_scale_inv": (scale_dtype, scale),
            "weight_offset": ("F32", (n, 1)),
            "weight_dual_scale": ("F32", dual or ()),
        }
        return {role: tensors[role] for role in self.roles}


_FP8_ENGINES = "it does not read FP8 with float scales in this layout"
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
        multiplied_on_cpu=True,
        text="int8 values, one float scale per row",
    ),
    Scheme(
        name="int8_block",
        weight="int8_block",
        activation="int8_block",
        rule="amax",
        roles=("weight", "weight_scale"),
        manifest="W8A8_BLOCK128",
        not_in_engines="it does not read int8 with one scale per 128 x 128 values",
        most_lost=2,
        multiplied_on_cpu=True,
        text="int8 values, one float scale per 128 x 128 tile",
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
        multiplied_on_cpu=True,
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
"""Schemes that a checkpoint may have."""
SCHEMES = {name: s for name, s in STORED_SCHEMES.items() if name != FP8_TILES}
"""Schemes that `quantize` and `repack` write, and that a recipe may name."""
if TYPE_CHECKING:
    SchemeName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]
"""Type of an option whose value is one of `SCHEMES`."""
QUANTIZED = tuple(name for name, s in SCHEMES.items() if s.weight)
"""`SCHEMES` without `bf16`."""
LINEAR_SCHEMES = {s.name: s for s in _ROWS if s.activation}
"""Schemes that a quantized layer computes in: `QUANTIZED`, and `w4a8` for MXFP4 weights in some steps."""
FP4 = tuple(name for name in QUANTIZED if SCHEMES[name].packed)
"""Schemes with 4-bit weights and activations."""
MANIFEST_SCHEMES = {
    value: name for name, s in SCHEMES.items() for value in (s.manifest, s.manifest_alias) if value
}
"""Value in a manifest -> scheme."""


def scheme_after_reading(stored: str) -> str:
    """The scheme of a stored layer after loading or repacking: FP8 in tiles becomes `bf16`."""
    return "bf16" if stored == FP8_TILES else stored


def scheme_of(name: str) -> Scheme:
    """The scheme of a quantized layer by name. Raises UsageError (E-USE-01) if it is unknown."""
    if name not in LINEAR_SCHEMES:
        raise UsageError(
            f"scheme {name!r} for a quantized layer",
            needs=", ".join(LINEAR_SCHEMES),
            fix=f"--scheme {value_for('scheme', name, LINEAR_SCHEMES) or 'mxfp8'}",
        )
    return LINEAR_SCHEMES[name]
