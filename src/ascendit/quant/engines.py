"""Engines as data: version, and the schemes and layouts that each cannot load. Does not import torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ascendit.quant.schemes import STORED_SCHEMES


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A target of `--for`, at the version whose wheel was examined."""

    name: str
    version: str
    refuses: Mapping[str, str]
    """Unsupported scheme or other trait (see `engines_for`) -> reason."""

    def problem(self, traits: Collection[str]) -> str:
        """The first reason why the engine cannot run a checkpoint with these traits, or ""."""
        return next((reason for trait, reason in self.refuses.items() if trait in traits), "")


_UNKNOWN = {name: s.not_in_engines for name, s in STORED_SCHEMES.items() if s.not_in_engines}
_OMNI_DROPS = "it silently ignores mul_scale in layers that are not MXFP4"
_SGLANG_DROPS = "it reads mul_scale only in mxfp4 layers and silently ignores it elsewhere"
_ODD = "it stores block scales in pairs, and a layer has an odd number of them (K / 32)"
_PLAIN = "it creates {} as unquantized layers and would read quantized weights as floats"

ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine(
            name="vllm-omni",
            version="0.30.0",
            refuses={
                **_UNKNOWN,
                "mixed": "its config.json names one scheme for all quantized layers",
                "split_qkv": "it fuses Q, K and V of self-attention, but only some of them are quantized",
                "unlike_qkv": "it fuses Q, K and V of self-attention, but their mul_scale differ",
                "outside_blocks": _PLAIN.format("embedders and proj_out"),
                "odd_blocks:mxfp4_dualscale": _ODD,
                **dict.fromkeys(("smoothed:int8", "smoothed:mxfp8", "smoothed:bf16"), _OMNI_DROPS),
            },
        ),
        Engine(
            name="sglang",
            version="0.5.23",
            refuses={
                **_UNKNOWN,
                "mxfp4_dualscale": "its loader of dual-scale layers fails with an AttributeError",
                "float_block_linears": "it looks up excluded layers of a block under other names and fails",
                "outside_blocks": _PLAIN.format("embedders"),
                "added_kv": "it has no names for the layers of cross-attention with image tokens",
                **{f"odd_blocks:{s}": _ODD for s in ("mxfp8", "mxfp4")},
                **dict.fromkeys(("smoothed:int8", "smoothed:mxfp8", "smoothed:bf16"), _SGLANG_DROPS),
            },
        ),
        Engine(
            name="mindie",
            version="3.1.0",
            refuses={**_UNKNOWN, "unquantized": "it reads only quantized models"},
        ),
    )
}
"""From the source in the wheels of vLLM-Omni, SGLang and MindIE-SD; none was run on a card."""


def engines_for(traits: Collection[str]) -> dict[str, str]:
    """Engine -> the reason why it cannot run a checkpoint with these traits, or "" if it can.

    `traits`: the schemes of the layers, and other keys of `Engine.refuses`, see `weights.engine_formats`.
    "mixed" and "unquantized" are derived here.
    """
    quantized = {trait for trait in traits if trait in STORED_SCHEMES and trait != "bf16"}
    all_traits = {*traits, "mixed"} if len(quantized) > 1 else {*traits}
    if not quantized:
        all_traits = all_traits - {"float_block_linears"} | {"unquantized"}
    return {name: engine.problem(all_traits) for name, engine in ENGINES.items()}
