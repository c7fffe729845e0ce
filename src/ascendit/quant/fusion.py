"""Fused groups of linear layers in a Wan block, and the names of fused modules in engines.

Does not import torch.

Layers of a group have the same input: they share smoothing factors and one quantization of the activation,
and those with the same scheme are one matmul. The groups are those of msModelSlim's `iter_smooth` for Wan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

GROUPS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
)
"""Names in a block. All other layers are not fused."""
VLLM_OMNI = {
    "attn1.to_qkv": GROUPS[0],
    "attn1.to_out": ("attn1.to_out.0",),
    "attn2.to_out": ("attn2.to_out.0",),
    "ffn.net_0.proj": ("ffn.net.0.proj",),
    "ffn.net_2": ("ffn.net.2",),
}
"""vLLM-Omni's module in a block -> its layers. Other layers have Diffusers' names there."""

_FIRST = {layer: group[0] for group in GROUPS for layer in group}
_MODULES = {layer: module for module, layers in VLLM_OMNI.items() for layer in layers}
_LEAVES = {
    module.partition(".")[2]: tuple(layer.partition(".")[2] for layer in layers)
    for module, layers in VLLM_OMNI.items()
    if module.startswith("attn")
}
"""Module in an attention -> layers: `to_qkv` -> `to_q`, `to_k`, `to_v`."""
_FEED_FORWARD = ((".ffn.net_0.", ".ffn.net.0."), (".ffn.net_2", ".ffn.net.2"))
"""Replacements in a name, or in a pattern such as `*.ffn.net_0.*`."""


def first_in_group(layer: str) -> str:
    """First layer of the fused group, e.g. `blocks.0.attn1.to_q` for its K and V; `layer` if not fused."""
    owner, inner = _split(layer, _FIRST)
    return owner + _FIRST.get(inner, inner)


def vllm_omni_module(layer: str) -> str:
    """The module of vLLM-Omni that contains a layer of a block, e.g. `blocks.0.attn1.to_qkv`."""
    owner, inner = _split(layer, _MODULES)
    return owner + _MODULES.get(inner, inner)


def layers_of_module(module: str) -> tuple[str, ...]:
    """The layers of a module of vLLM-Omni, e.g. three for `blocks.0.attn1.to_qkv`; other names unchanged."""
    owner, inner = _split(module, VLLM_OMNI)
    return tuple(owner + layer for layer in VLLM_OMNI[inner]) if owner else (module,)


def patterns_of_module(module: str) -> tuple[str, ...]:
    """Like `layers_of_module`, but also for patterns: `*.to_out`, `blocks.*.ffn.net_2`."""
    for theirs, ours in _FEED_FORWARD:
        module = module.replace(theirs, ours)
    owner, dot, leaf = module.rpartition(".")
    return tuple(f"{owner}{dot}{layer}" for layer in _LEAVES.get(leaf, (leaf,)))


def fused_with(layer: str) -> tuple[str, ...]:
    """The layers in the same module of vLLM-Omni, including `layer`."""
    return layers_of_module(vllm_omni_module(layer))


def vllm_omni_modules(excluded: Iterable[str], quantized: Collection[str]) -> list[str] | None:
    """vLLM-Omni's modules of the `excluded` layers; None if one also has `quantized` layers."""
    excluded = list(excluded)
    if any(other in quantized for name in excluded for other in fused_with(name)):
        return None
    return list(dict.fromkeys(map(vllm_omni_module, excluded)))


def _split(name: str, inside: Iterable[str]) -> tuple[str, str]:
    """(`blocks.0.`, `attn1.to_q`) if `name` ends with one of `inside`, else ("", name)."""
    for inner in inside:
        if name.endswith(f".{inner}"):
            return name[: -len(inner)], inner
    return "", name
