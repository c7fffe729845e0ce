"""Which engine can load which scheme: its version and what it refuses, as data. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ascendit.quant.schemes import STORED_SCHEMES


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A program that `--for` writes for, at the version whose wheel was read."""

    name: str
    version: str
    refuses: Mapping[str, str]
    """What it cannot load or run -> why. A key is a scheme, or a trait that `engines_for` names."""

    def problem(self, traits: Collection[str]) -> str:
        """The first reason against a checkpoint with these traits, "" when there is none."""
        return next((why for trait, why in self.refuses.items() if trait in traits), "")


_UNKNOWN = {name: s.not_in_engines for name, s in STORED_SCHEMES.items() if s.not_in_engines}
_OMNI_DROPS = "it drops mul_scale in layers that are not MXFP4, without an error"
_SGLANG_DROPS = "it knows mul_scale in mxfp4 alone and drops it elsewhere, without an error"
_ODD = "it pairs block scales, and a layer has an odd number of them (K / 32)"
_PLAIN = "it builds {} as plain layers and would take the codes for weights"

ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine(
            name="vllm-omni",
            version="0.30.0",
            refuses={
                **_UNKNOWN,
                "mixed": "its config.json names one scheme for all quantized layers",
                "split_qkv": "it fuses Q, K and V of self-attention; one is kept and another quantized",
                "unlike_qkv": "it fuses Q, K and V of self-attention; their mul_scale differ",
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
                "mxfp4_dualscale": "its loader of dual-scale layers fails, on an attribute it does not have",
                "float_block_linears": "it looks for kept layers of a block by other names and stops there",
                "outside_blocks": _PLAIN.format("embedders"),
                "added_kv": "it does not name the layers of cross-attention with image tokens",
                **{f"odd_blocks:{s}": _ODD for s in ("mxfp8", "mxfp4")},
                **dict.fromkeys(("smoothed:int8", "smoothed:mxfp8", "smoothed:bf16"), _SGLANG_DROPS),
            },
        ),
        Engine(
            name="mindie",
            version="3.1.0",
            refuses={**_UNKNOWN, "unquantized": "it reads exports of quantized models only"},
        ),
    )
}
"""Read in the wheels of vLLM-Omni, SGLang and MindIE-SD; none was run on a card."""


def engines_for(traits: Collection[str]) -> dict[str, str]:
    """Engine -> "" when it can run a checkpoint with these traits, else the reason it cannot.

    `traits`: the schemes of the layers, and other keys of `Engine.refuses`, see `weights.engine_formats`.
    "mixed" and "unquantized" are added here.
    """
    coded = {trait for trait in traits if trait in STORED_SCHEMES and trait != "bf16"}
    found = {*traits, "mixed"} if len(coded) > 1 else {*traits}
    if not coded:
        found = found - {"float_block_linears"} | {"unquantized"}
    return {name: engine.problem(found) for name, engine in ENGINES.items()}
