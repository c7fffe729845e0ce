"""The canonical folder as data: which tensors a layer has, in which order, and what the two JSON files say.

One transformer folder holds

- tensors under Diffusers names, in the order of `sort_names`: that of the layers, and in a layer `ROLES`;
- the manifest `quant_model_description.json`, from `manifest_for`;
- `config.json`, whose `quantization_config` comes from `marker_for`.

`quantize` and `repack` write nothing else, so a folder does not tell which of them made it. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ascendit.checkpoint.write import TensorSpec
from ascendit.spec import SCHEMES

MANIFEST = "quant_model_description.json"
ROLES = ("weight", "weight_scale", "weight_offset", "weight_dual_scale", "mul_scale", "bias")
"""Every tensor that a linear layer may have, in the order in which they are written."""
CODED = ("weight", "weight_scale", "weight_offset", "weight_dual_scale")
"""Those that the manifest gives the scheme of the layer; the others are FLOAT."""
CODES_DTYPE = {"int8": "I8", "fp8": "F8_E4M3", "mxfp8": "F8_E4M3", "mxfp4": "U8", "mxfp4_dualscale": "U8"}
PACKED = ("mxfp4", "mxfp4_dualscale")
BLOCK, GROUP = 32, 512
"""Elements of K that share an E8M0 scale, and a coarse scale."""


# ---- tensors ------------------------------------------------------------------------------------


def layer_specs(
    name: str,
    scheme: str,
    shape: tuple[int, int],
    *,
    bias: bool,
    mul_scale: bool = False,
    float_dtype: str = "BF16",
) -> list[TensorSpec]:
    """The tensors of the linear layer `name`, in the order they are written.

    `shape`: (N, K) of the decoded weight. `scheme`: a key of `spec.SCHEMES`. `float_dtype`: how weight and
    bias lie in a layer that is not quantized; the bias of one that is, is always float32.
    """
    n, k = shape
    coded = scheme in CODES_DTYPE
    blocks = (n, -(-k // BLOCK))
    codes = (n, -(-k // 2)) if scheme in PACKED else (n, k)
    per_row = scheme in ("int8", "fp8")
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": (CODES_DTYPE.get(scheme, float_dtype), codes),
        "weight_scale": ("F32", (n, 1)) if per_row else ("U8", blocks),
        "weight_offset": ("F32", (n, 1)),
        "weight_dual_scale": ("F32", (n, -(-k // GROUP), 1)),
        "mul_scale": ("F32", (k,)),
        "bias": ("F32" if coded else float_dtype, (n,)),
    }
    roles = [*SCHEMES[scheme].roles, *(["mul_scale"] * mul_scale), *(["bias"] * bias)]
    return [TensorSpec(f"{name}.{role}", *found[role]) for role in roles]


_TOP = (
    "scale_shift_table",
    "patch_embedding",
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.image_embedder.norm1",
    "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.net.2",
    "condition_embedder.image_embedder.norm2",
    "condition_embedder.image_embedder.pos_embed",
    "blocks",
    "proj_out",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "q_rot", "k_rot")
_IN_BLOCK = (
    "scale_shift_table",
    *(f"attn1.{name}" for name in _ATTENTION),
    *(f"attn2.{name}" for name in _ATTENTION),
    *(f"attn2.{name}" for name in ("add_k_proj", "add_v_proj", "norm_added_k")),
    "norm2",
    "ffn.net.0.proj",
    "ffn.net.2",
)
_TOP_RANK = {name: rank for rank, name in enumerate(_TOP)}
_BLOCK_RANK = {name: rank for rank, name in enumerate(_IN_BLOCK)}
_ROLE_RANK = {role: rank for rank, role in enumerate(ROLES)}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)", re.ASCII)


def sort_names(names: Iterable[str]) -> list[str]:
    """Tensor names in canonical order: as the model is built, blocks by number, roles as in `ROLES`.

    Names that the model does not have come last, in their block if they name one, sorted. The order hangs
    on the names alone, so the same tensors give the same file wherever they come from.
    """
    return sorted(names, key=_sort_key)


def _sort_key(name: str) -> tuple[int, int, int, int, str]:
    found = _BLOCK_NAME.fullmatch(name)
    inner = found[2] if found else name
    ranks = _BLOCK_RANK if found else _TOP_RANK
    stem, _, role = inner.rpartition(".")
    if inner in ranks:
        stem, role = inner, ""
    place = ranks.get(stem, len(ranks))
    role_place = _ROLE_RANK.get(role, len(ROLES))
    if found:
        return (_TOP_RANK["blocks"], int(found[1]), place, role_place, name)
    return (place, 0, 0, role_place, name)


# ---- manifest -----------------------------------------------------------------------------------


def manifest_for(
    layers: Mapping[str, str],
    names: Sequence[str],
    attention: Mapping[str, str],
    found: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`quant_model_description.json`: one entry for each of `names`, in their order, the write order.

    `layers`: layer -> scheme. Codes and their scales have msModelSlim's word for the scheme, every other
    tensor is FLOAT, its bias and `mul_scale` too. Then come `attention` (`<attn>.quant_type` -> value), and
    last `model_quant_type`: the word of the last quantized linear of the blocks, as msModelSlim writes it
    (mixed recipes go by their last block), or FLOAT. `found`: values of other tensors, and of keys that name
    no tensor, as the source has them (`fa_quant_type`, FAQuant).
    """
    found = dict(found or {})
    manifest = {}
    for name in names:
        layer, _, role = name.rpartition(".")
        if layer in layers and role in ROLES:
            manifest[name] = SCHEMES[layers[layer]].manifest if role in CODED else "FLOAT"
        else:
            manifest[name] = found.get(name, "FLOAT")
    manifest |= attention
    manifest |= {key: value for key, value in found.items() if key not in manifest}
    manifest.pop("model_quant_type", None)
    manifest["model_quant_type"] = model_quant_type(layers)
    return manifest


def model_quant_type(layers: Mapping[str, str]) -> str:
    """The word of the last quantized linear: of the blocks, else (nothing there is quantized) of any."""
    coded = [name for name, scheme in layers.items() if scheme in CODES_DTYPE]
    last = sort_names([name for name in coded if block_linear(name)] or coded)[-1:]
    return SCHEMES[layers[last[0]]].manifest if last else "FLOAT"


# ---- config marker ------------------------------------------------------------------------------

_LINEAR = re.compile(
    r"blocks\.\d+\.(?:attn[12]\.to_(?:q|k|v|out\.0)|attn2\.add_[kv]_proj|ffn\.net\.(?:0\.proj|2))", re.ASCII
)
_QKV = re.compile(r"(.*\.attn1)\.to_[qkv]")
_RENAMED = ((".ffn.net.0.", ".ffn.net_0."), (".ffn.net.2", ".ffn.net_2"), (".to_out.0", ".to_out"))
METHOD = "ascendit"
"""The `quant_method` of a config whose layers are told by the manifest, or by their tensors."""
_SERIALIZED = {
    "int8": "is_checkpoint_int8_serialized",
    "mxfp8": "is_checkpoint_mxfp8_serialized",
    "mxfp4": "is_checkpoint_mxfp4_serialized",
    "mxfp4_dualscale": "is_checkpoint_serialized",
}
"""vLLM-Omni's method -> the key by which it knows a checkpoint that is quantized already."""
_SMOOTHED = ("mxfp4", "mxfp4_dualscale")
"""Methods that have a `mul_scale`."""


def block_linear(name: str) -> bool:
    """Whether `name` is a linear layer of a block, one of those that recipes quantize."""
    return _LINEAR.fullmatch(name) is not None


def marker_for(layers: Mapping[str, str], smoothed: Collection[str] = ()) -> dict[str, Any] | None:
    """`quantization_config` for config.json, in keys that vLLM-Omni 0.30 knows; None for floats.

    `layers`: every linear of the blocks (and others that are quantized) -> scheme, `bf16` for those that are
    kept; `smoothed`: those with a `mul_scale`. `ignored_layers` holds the kept ones, by the names of its
    modules: `attn1.to_qkv`, `to_out`, `ffn.net_0.proj`, `ffn.net_2`.

    Its schema cannot say two schemes, FP8 by rows, a quantized layer outside the blocks, a Q without its K
    and V, smoothing in a scheme or in a kept layer where it knows none. Then the method is ascendit's own:
    Diffusers asks ascendit, and vLLM-Omni stops instead of taking codes for weights.
    """
    own = {"quant_method": METHOD}
    coded = {name: scheme for name, scheme in layers.items() if scheme in CODES_DTYPE}
    if not coded:
        return None
    method, *more = set(coded.values())
    if more or method not in _SERIALIZED or not all(map(block_linear, coded)):
        return own
    if not set(smoothed) <= (set(coded) if method in _SMOOTHED else set()):
        return own
    kept = [name for name in sort_names(layers) if name not in coded and block_linear(name)]
    if (ignored := fused_names(kept, coded)) is None:
        return own
    marker: dict[str, Any] = {"quant_method": method, _SERIALIZED[method]: True}
    if method == "mxfp4" and set(smoothed) == set(coded):
        marker["require_smooth_scale"] = True
    return marker | {"ignored_layers": ignored}


def fused_names(kept: Sequence[str], coded: Collection[str]) -> list[str] | None:
    """vLLM-Omni's module names for the layers `kept`; None if one of Q, K, V is kept and another `coded`."""
    fused: dict[str, None] = {}
    for name in kept:
        if found := _QKV.fullmatch(name):
            if any(f"{found[1]}.to_{x}" in coded for x in "qkv"):
                return None
            name = f"{found[1]}.to_qkv"
        for old, new in _RENAMED:
            name = name.replace(old, new)
        fused[name] = None
    return list(fused)
