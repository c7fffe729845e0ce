"""The canonical folder as data: which tensors a layer has, in which order, and what the two JSON files say.

One transformer folder holds

- tensors under Diffusers names, in the order of `sort_names`: that of the layers, and in a layer `ROLES`;
- the manifest `quant_model_description.json`, from `manifest_for`;
- `config.json`, whose `quantization_config` comes from `marker_for`.

`quantize` and `repack` write nothing else, so a folder does not tell which of them made it. No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ascendit.checkpoint.writer import TensorSpec
from ascendit.names import CODED_ROLES, ROLES, is_block_linear, sort_names
from ascendit.quant.fusion import vllm_omni_modules
from ascendit.quant.schemes import QUANTIZED, SCHEMES

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

    `shape`: (N, K) of the decoded weight. `scheme`: a key of `quant.schemes.SCHEMES`. `float_dtype`: how
    weight and bias lie in a layer that is not quantized; the bias of one that is, is always float32.
    """
    n, k = shape
    row = SCHEMES[scheme]
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "weight": (float_dtype, shape),
        "mul_scale": ("F32", (k,)),
        "bias": ("F32" if row.weight else float_dtype, (n,)),
    }
    found |= row.tensors(n, k)
    roles = [*row.roles, *(["mul_scale"] * mul_scale), *(["bias"] * bias)]
    return [TensorSpec(f"{name}.{role}", *found[role]) for role in roles]


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
            manifest[name] = SCHEMES[layers[layer]].manifest if role in CODED_ROLES else "FLOAT"
        else:
            manifest[name] = found.get(name, "FLOAT")
    manifest |= attention
    manifest |= {key: value for key, value in found.items() if key not in manifest}
    manifest.pop("model_quant_type", None)
    manifest["model_quant_type"] = model_quant_type(layers)
    return manifest


def model_quant_type(layers: Mapping[str, str]) -> str:
    """The word of the last quantized linear: of the blocks, else (nothing there is quantized) of any."""
    coded = [name for name, scheme in layers.items() if scheme in QUANTIZED]
    last = sort_names([name for name in coded if is_block_linear(name)] or coded)[-1:]
    return SCHEMES[layers[last[0]]].manifest if last else "FLOAT"


# ---- quantization_config ------------------------------------------------------------------------

METHOD = "ascendit"
"""The `quant_method` of a config whose layers are told by the manifest, or by their tensors."""


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
    coded = {name: scheme for name, scheme in layers.items() if scheme in QUANTIZED}
    if not coded:
        return None
    method, *more = set(coded.values())
    scheme = SCHEMES[method]
    if more or not scheme.vllm_omni_key or not all(map(is_block_linear, coded)):
        return own
    if not set(smoothed) <= (set(coded) if scheme.vllm_omni_smooth else set()):
        return own
    kept = [name for name in sort_names(layers) if name not in coded and is_block_linear(name)]
    if (ignored := vllm_omni_modules(kept, coded)) is None:
        return own
    marker: dict[str, Any] = {"quant_method": method, scheme.vllm_omni_key: True}
    if method == "mxfp4" and set(smoothed) == set(coded):
        marker["require_smooth_scale"] = True
    return marker | {"ignored_layers": ignored}
