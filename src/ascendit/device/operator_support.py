"""Table of the operators of each chip, and the quantized schemes they allow. Does not import torch.

The twin's checks, the documentation and `doctor` read this table. Check it instead of `hasattr`: torch_npu
has the name of every operator on every chip, and many calls fail only inside CANN.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ascendit.device.chip import CHIPS
from ascendit.errors import EnvironmentProblem
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.quant.schemes import LINEAR_SCHEMES, SCHEMES

Support = Literal["native", "emulated"]

Answer = Literal["yes", "cann", "adapter", "unknown"]
"""yes: there is a kernel. cann: torch_npu accepts the call and CANN refuses it. adapter: torch_npu refuses
it. unknown: not documented, so ascendit does not use it."""


@dataclass(frozen=True, kw_only=True)
class Capability:
    """One operator, or one mode of it, on the three chips. Operators without a row run on all chips."""

    operator: str
    """A name of `torch.ops.npu`, or `mindiesd::` and a name."""
    mode: str = ""
    """The twin's name of the mode; empty for the operator in all modes."""
    scheme: str = ""
    """The row of `quant.schemes.LINEAR_SCHEMES` that it computes, if any."""
    attention: str = ""
    """The row of `quant.attention_schemes.ATTENTION_FORMATS` that it computes, if any."""
    a2: Answer = "yes"
    a3: Answer = "yes"
    a5: Answer = "yes"
    aclnn: str = ""
    """The CANN interface that it calls."""
    dtypes: str = ""
    layout: str = ""
    message: str = ""
    """Error text of the adapter on chips where it refuses the call."""
    instead: str = ""
    """The alternative on chips where it does not run."""
    used_for: str = ""
    """How ascendit uses it; empty if ascendit does not call it."""

    def support_on(self, chip: str) -> Answer:
        """Support on `chip`: a2, a3 or a5."""
        answer: Answer = getattr(self, chip)
        return answer

    @property
    def chips(self) -> tuple[str, ...]:
        """The chips that it runs on."""
        return tuple(c for c in CHIPS if self.support_on(c) == "yes")


# ---- the table ----------------------------------------------------------------------------------

_INT8 = "on a2 and a3 int8 and int8_block are native; other schemes run with --emulate: same numbers, slower"
_NO_ACLNN = (
    "Current device only support aclnn operator, but current operator {0} do not have aclnn implementation"
)
_FUSED, _MM, _QUANT_MATMUL = "npu_fusion_attention", "npu_quant_matmul", "aclnnQuantMatmulV5"
_ROW_QUANT, _BLOCK_QUANT = "npu_dynamic_quant", "npu_dynamic_block_quant"
_INFER, _FLOATS = "fused_infer_attention_score_v2", "fp16 bf16 fp32"
_T_VIEW = "x2 [K, N] and scale as transposed views; or FRACTAL_NZ"

_A5_ONLY = {"a2": "cann", "a3": "cann"}
_A5_ADAPTER = {"a2": "adapter", "a3": "adapter"}
_MX = {**_A5_ONLY, "instead": _INT8}
_NOT_A5 = {"a5": "cann"}
_NOT_A5_ADAPTER = {"a5": "adapter"}
_QUANTIZED_ATTENTION = {**_A5_ONLY, "instead": "bf16 attention, which every chip has"}


def _row(operator: str, mode: str = "", /, **fields: str) -> Capability:
    return Capability(operator=operator, mode=mode, **fields)  # type: ignore[arg-type]


def _row_quantizer(scheme: str, **fields: str) -> Capability:
    use = f"activations in {scheme}"
    return _row(_ROW_QUANT, scheme, used_for=use, scheme=scheme, aclnn="aclnnDynamicQuantV2", **fields)


def _matmul(scheme: str, **fields: str) -> Capability:
    return _row(_MM, scheme, used_for=f"linear in {scheme}", scheme=scheme, aclnn=_QUANT_MATMUL, **fields)


def _only_torch(operator: str, function: str) -> Capability:
    """An operator without a CANN kernel on a5; `function` of torch.nn.functional replaces it."""
    instead = f"torch.nn.functional.{function}, which every chip has"
    return _row(operator, message=_NO_ACLNN.format(operator), instead=instead, **_NOT_A5_ADAPTER)


CAPABILITIES: tuple[Capability, ...] = (
    _row("npu_rms_norm", used_for="rms_norm", aclnn="aclnnRmsNorm", dtypes=_FLOATS),
    _row("npu_rotary_mul", used_for="rope", aclnn="aclnnRotaryPositionEmbeddingV2", dtypes=_FLOATS),
    _row("npu_gelu", used_for="gelu", aclnn="aclnnGeluV2", dtypes=_FLOATS),
    _row(_FUSED, used_for="attention", aclnn="aclnnFlashAttentionScoreV4", dtypes=_FLOATS),
    _row(
        "npu_format_cast", used_for="weights in FRACTAL_NZ", layout="a2, a3: only with allow_internal_format"
    ),
    _row("get_npu_format", used_for="weights in FRACTAL_NZ"),
    _row(
        "npu_dynamic_mx_quant",
        used_for="activations in mxfp8 and mxfp4, attention in mxfp8",
        attention="mxfp8",
        aclnn="aclnnDynamicMxQuantV3",
        dtypes=f"{_FLOATS} -> e4m3 e5m2 e2m1",
        **_MX,
    ),
    _row("npu_anti_mx_quant", aclnn="aclnnAntiMxQuant", **_MX),
    _row(
        "npu_dynamic_dual_level_mx_quant",
        used_for="activations in mxfp4_dualscale",
        aclnn="aclnnDynamicDualLevelMxQuant",
        dtypes="fp16 bf16 -> e2m1",
        **_MX,
    ),
    _row("npu_rms_norm_dynamic_mx_quant", aclnn="aclnnRmsNormDynamicMxQuant", **_MX),
    _row("npu_add_rms_norm_dynamic_mx_quant", aclnn="aclnnAddRmsNormDynamicMxQuant", **_MX),
    _row_quantizer("int8", dtypes="fp16 bf16 -> int8"),
    _row_quantizer("fp8", dtypes="-> e4m3 e5m2", **_MX),
    _row(_BLOCK_QUANT, "int8", aclnn="aclnnDynamicBlockQuantV2", layout="a2, a3: row 1, col 1 or 128"),
    _row(
        _BLOCK_QUANT,
        "int8_block",
        used_for="activations in int8_block",
        aclnn="aclnnDynamicBlockQuantV2",
        layout="row 128, col 128",
        instead="operators of PyTorch",
        **_A5_ONLY,
    ),
    _row(
        _BLOCK_QUANT,
        "fp8",
        used_for="attention in fp8",
        attention="fp8",
        aclnn="aclnnDynamicBlockQuantV2",
        **_QUANTIZED_ATTENTION,
    ),
    _matmul(
        "int8",
        dtypes="int8 x int8, fp32 per token, fp32 or bf16 per channel",
        layout="x2 [K, N] with any strides; or FRACTAL_NZ",
    ),
    _matmul("fp8", dtypes="e4m3 x e4m3, fp32", **_MX),
    _matmul("mxfp8", dtypes="e4m3 e5m2, e8m0 scales", layout=_T_VIEW, **_MX),
    _matmul("mxfp4", dtypes="e2m1 x e2m1, e8m0 scales", layout=_T_VIEW, **_MX),
    _matmul("w4a8", dtypes="e4m3 x e2m1, e8m0 scales", layout=_T_VIEW, **_MX),
    _row(_MM, "block", aclnn=_QUANT_MATMUL, dtypes="e4m3, fp32 per 128 x 128", **_MX),
    _matmul(
        "int8_block",
        dtypes="int8, fp32 per 128 x 128 and per 1 x 128, fp32 bias -> bf16",
        layout="x2 [K, N] a transposed view; a2, a3: K a multiple of 512, N of 256, with a bias",
    ),
    _row(
        "npu_dual_level_quant_matmul",
        used_for="linear in mxfp4_dualscale",
        scheme="mxfp4_dualscale",
        aclnn="aclnnDualLevelQuantMatmulWeightNz",
        dtypes="e2m1 x e2m1, e8m0 and fp32 scales",
        layout="x2 FRACTAL_NZ",
        message="This interface is supported only on the Ascend950 platform and after.",
        instead=_INT8,
        **_A5_ADAPTER,
    ),
    _row(
        "npu_format_cast",
        "customize_dtype",
        used_for="packed FP4 weights in FRACTAL_NZ",
        layout="FRACTAL_NZ of packed e2m1",
        message="customize_dtype is not supported by the current soc version.",
        instead="CANN 9.1.0 has it on a2 and a3; without it cast plain int8 weights only",
        **_A5_ADAPTER,
    ),
    _only_torch("npu_layer_norm_eval", "layer_norm"),
    _only_torch("npu_silu", "silu"),
    _row(
        "npu_prompt_flash_attention",
        aclnn="aclnnPromptFlashAttentionV3",
        message="Interface npu_prompt_flash_attention is no longer supported on Ascend950.",
        instead=f"npu_{_INFER} or {_FUSED}",
        **_NOT_A5_ADAPTER,
    ),
    _row(
        f"npu_{_INFER}",
        used_for="attention, if requested or measured",
        dtypes="fp16 bf16",
        layout="contiguous",
    ),
    _row(
        f"npu_{_INFER}",
        "fp8",
        used_for="attention in fp8, without MindIE-SD",
        attention="fp8",
        aclnn="aclnnFusedInferAttentionScoreV5",
        dtypes="e4m3, modes 7 7 7",
        layout="BNSD, one sample",
        **_QUANTIZED_ATTENTION,
    ),
    _row(
        f"npu_{_INFER}",
        "mxfp8",
        used_for="attention in mxfp8",
        attention="mxfp8",
        aclnn="aclnnFusedInferAttentionScoreV5",
        dtypes="e4m3, modes 6 6 8",
        layout="TND",
        **_QUANTIZED_ATTENTION,
    ),
    _row(
        "npu_apply_rotary_pos_emb",
        "interleave",
        aclnn="aclnnApplyRotaryPosEmbV2",
        instead='npu_rotary_mul(..., rotary_mode="interleave"), which every chip has',
        **_A5_ONLY,
    ),
    _row(
        "npu_block_sparse_attention",
        aclnn="aclnnBlockSparseAttention",
        layout="BNSD or TND, blocks of 128 keys",
        instead="mindiesd::block_sparse_attention on a5",
        a5="unknown",
    ),
    _row(
        "mindiesd::layernorm", used_for="layer_norm, with fast_layernorm", aclnn="aclnnLayerNormWithImplMode"
    ),
    _row(
        "mindiesd::adaln",
        used_for="adaln",
        aclnn="aclnnAdaLayerNorm",
        instead="mindiesd::adaln_v2 on a5",
        **_NOT_A5,
    ),
    _row(
        "mindiesd::adaln_v2",
        used_for="adaln",
        aclnn="aclnnAdaLayerNormV2",
        instead="mindiesd::adaln on a2 and a3",
        **_A5_ONLY,
    ),
    _row(
        f"mindiesd::{_INFER}",
        "fp8",
        used_for="attention in fp8",
        attention="fp8",
        aclnn="aclnnEagleFusedInferAttentionScoreV5",
        dtypes="e4m3, modes 7 7 7",
        layout="BNSD, one sample",
        **_QUANTIZED_ATTENTION,
    ),
    _row(
        "mindiesd::block_sparse_attention",
        aclnn="aclnnBlockSparseAttentionV2",
        instead="npu_block_sparse_attention on a2 and a3",
        **_A5_ONLY,
    ),
    _row(
        "mindiesd::la",
        used_for="attention, on request",
        aclnn="aclnnLaserAttention",
        dtypes="fp16 -> fp32",
        layout="BNSD, D of 128, tokens in multiples of 256",
        instead=f"{_FUSED} on a5",
        **_NOT_A5,
    ),
    _row(
        "mindiesd::rainfusionattention",
        aclnn="aclnnRainFusionAttention",
        instead="mindiesd::block_sparse_attention on a5",
        **_NOT_A5,
    ),
)


_ROWS = {(row.operator, row.mode): row for row in CAPABILITIES}


# ---- queries ------------------------------------------------------------------------------------


def capability(operator: str, mode: str = "") -> Capability:
    """The row of an operator and mode; one with `yes` for every chip if the table has none."""
    return _ROWS.get((operator, mode), Capability(operator=operator, mode=mode))


def native_on(chip: str) -> frozenset[str]:
    """The quantized schemes, including `w4a8`, with kernels for all of their operators on this chip."""
    rows: dict[str, list[Answer]] = {}
    for row in CAPABILITIES:
        rows.setdefault(row.scheme, []).append(row.support_on(chip))
    return frozenset(s for s in LINEAR_SCHEMES if s in rows and set(rows[s]) == {"yes"})


def chips_for(schemes: Collection[str], attention: Collection[str] = ()) -> dict[str, Support]:
    """Chip -> `native` if it has a matmul for every scheme and a kernel for every scheme of `attention`, else
    `emulated` (dequantized).
    """
    quantized, attention = set(schemes) - {"bf16"}, set(attention)
    return {
        chip: "native"
        if quantized <= native_on(chip) and attention <= native_attention_on(chip)
        else "emulated"
        for chip in CHIPS
    }


def native_attention_on(chip: str) -> frozenset[str]:
    """The schemes of quantized attention with kernels for all of their operators on this chip."""
    rows: dict[str, list[Answer]] = {}
    for row in CAPABILITIES:
        rows.setdefault(row.attention, []).append(row.support_on(chip))
    return frozenset(s for s in ATTENTION_FORMATS if s in rows and set(rows[s]) == {"yes"})


def no_attention_for(device: object, chip: str, scheme: str) -> EnvironmentProblem:
    """The error E-CAP-01 for quantized attention without a kernel on `chip`; lists chips that have one."""
    chips = [c for c in CHIPS.values() if scheme in native_attention_on(c.name)]
    allowed = " or ".join(f"{c.product}, {c.name}" for c in chips) or "another scheme"
    native = ["bf16", *(s for s in ATTENTION_FORMATS if s in native_attention_on(chip))]
    return EnvironmentProblem(
        f"attention in {scheme} on {device}: the {CHIPS[chip].product} has no kernel for it",
        needs=f"{allowed}; {chip} has {', '.join(native)}",
        fix="--emulate decode-on-use: the same numbers, slower",
        code="E-CAP-01",
    )


def no_matmul_for(device: object, chip: str, scheme: str) -> EnvironmentProblem:
    """The error E-CAP-01 for a scheme without a matmul on `chip`; lists the chips that have one."""
    chips = [c for c in CHIPS.values() if scheme in native_on(c.name)]
    native = ["bf16", *(s for s in SCHEMES if s in native_on(chip))]
    allowed = " or ".join(f"{c.product}, {c.name}" for c in chips) or "another scheme"
    return EnvironmentProblem(
        f"scheme {scheme} on {device}: the {CHIPS[chip].product} has no matmul for it",
        needs=f"{allowed}; {chip} has {', '.join(native)}",
        fix="--emulate decode-on-use: the same numbers, slower; or quantize to int8",
        code="E-CAP-01",
    )
