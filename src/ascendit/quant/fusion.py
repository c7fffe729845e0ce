"""Which linear layers of a Wan block are fused, and what engines call them. No torch.

Layers of a group read one input: they share smoothing factors and one quantization of the activation, and
those in one scheme are multiplied as one matrix. Groups are those of msModelSlim's `iter_smooth` for Wan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

GROUPS = (
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn2.to_k", "attn2.to_v"),
    ("attn2.add_k_proj", "attn2.add_v_proj"),
)
"""Inside a block. Every other layer is alone."""
VLLM_OMNI = {
    "attn1.to_qkv": GROUPS[0],
    "attn1.to_out": ("attn1.to_out.0",),
    "attn2.to_out": ("attn2.to_out.0",),
    "ffn.net_0.proj": ("ffn.net.0.proj",),
    "ffn.net_2": ("ffn.net.2",),
}
"""vLLM-Omni's module inside a block -> the layers it holds. Other layers have Diffusers' names there."""

_LEADERS = {layer: group[0] for group in GROUPS for layer in group}
_MODULES = {layer: module for module, layers in VLLM_OMNI.items() for layer in layers}
_LEAVES = {
    module.partition(".")[2]: tuple(layer.partition(".")[2] for layer in layers)
    for module, layers in VLLM_OMNI.items()
    if module.startswith("attn")
}
"""Module inside an attention -> layers: `to_qkv` -> `to_q`, `to_k`, `to_v`."""
_FEED_FORWARD = ((".ffn.net_0.", ".ffn.net.0."), (".ffn.net_2", ".ffn.net.2"))
"""What to replace in a name, or in a pattern such as `*.ffn.net_0.*`."""


def leader_of(layer: str) -> str:
    """The first layer of the group: `blocks.0.attn1.to_q` for its K and V; the layer itself if alone."""
    owner, inner = _split(layer, _LEADERS)
    return owner + _LEADERS.get(inner, inner)


def vllm_omni_module(layer: str) -> str:
    """The module of vLLM-Omni that holds a layer of a block: `blocks.0.attn1.to_qkv`."""
    owner, inner = _split(layer, _MODULES)
    return owner + _MODULES.get(inner, inner)


def layers_of_module(module: str) -> tuple[str, ...]:
    """The layers that a module of vLLM-Omni holds: `blocks.0.attn1.to_qkv` is three. Others as they are."""
    owner, inner = _split(module, VLLM_OMNI)
    return tuple(owner + layer for layer in VLLM_OMNI[inner]) if owner else (module,)


def patterns_of_module(module: str) -> tuple[str, ...]:
    """As `layers_of_module`, for patterns of vLLM-Omni's names too: `*.to_out`, `blocks.*.ffn.net_2`."""
    for theirs, ours in _FEED_FORWARD:
        module = module.replace(theirs, ours)
    owner, dot, leaf = module.rpartition(".")
    return tuple(f"{owner}{dot}{layer}" for layer in _LEAVES.get(leaf, (leaf,)))


def fused_with(layer: str) -> tuple[str, ...]:
    """The layers that vLLM-Omni holds in one module with this one, itself among them."""
    return layers_of_module(vllm_omni_module(layer))


def vllm_omni_modules(kept: Iterable[str], coded: Collection[str]) -> list[str] | None:
    """vLLM-Omni's modules for the layers `kept`; None if one of Q, K, V is kept and another is `coded`."""
    kept = list(kept)
    if any(other in coded for name in kept for other in fused_with(name)):
        return None
    return list(dict.fromkeys(map(vllm_omni_module, kept)))


def _split(name: str, inside: Iterable[str]) -> tuple[str, str]:
    """(`blocks.0.`, `attn1.to_q`) where the end is one of `inside`, else ("", name)."""
    for inner in inside:
        if name.endswith(f".{inner}"):
            return name[: -len(inner)], inner
    return "", name
