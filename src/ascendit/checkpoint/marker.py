"""The `quantization_config` of a transformer's config.json: what vLLM-Omni, and FP8 checkpoints, say there.

A marker speaks about the linear layers of the blocks: all of them have its scheme, but for
`ignored_layers`. It binds only if it says that the weights on disk are quantized already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ascendit.checkpoint.layers import Claim, Layer, disagreement
from ascendit.checkpoint.names import is_block_linear
from ascendit.checkpoint.store import listed
from ascendit.errors import CheckpointError
from ascendit.quant.fusion import layers_of_module
from ascendit.quant.schemes import FP8_TILES, QUANTIZED

KEY = "quantization_config"
_SERIALIZED = re.compile(r"is_checkpoint_(?:\w+_)?serialized")


@dataclass(frozen=True)
class Marker:
    """A `quantization_config` that binds."""

    scheme: str
    method: str
    ignored: frozenset[str]
    """Diffusers names, of layers and of whatever else it lists."""

    def claims(self, tensors: Iterable[str]) -> dict[str, Claim]:
        """What it says of each block linear among `tensors`."""
        words = f"config.json says {self.method}"
        return {
            layer: Claim("bf16", f"{words} and ignores it")
            if layer in self.ignored
            else Claim(self.scheme, words)
            for name in tensors
            if name.endswith(".weight") and is_block_linear(layer := name.removesuffix(".weight"))
        }

    def check(self, tensors: Iterable[str], layers: Mapping[str, Layer], others: Mapping[str, Claim]) -> None:
        """Raise CheckpointError E-CKP-07 unless the layers are what this says, and what it ignores exists.

        `others`: what the manifest says, for the message.
        """
        tensors = list(tensors)
        wrong = []
        for name, claim in self.claims(tensors).items():
            found = layers[name].scheme if name in layers else "bf16"
            if found != claim.scheme:
                said = others[name].words if name in others else f"its tensors are {found}"
                wrong.append(f"{name}: {claim.words}, and {said}")
        if wrong:
            raise disagreement(wrong)
        parents = {name[:i] for name in tensors for i, char in enumerate(name) if char == "."}
        if strange := [name for name in self.ignored if name not in parents]:
            raise CheckpointError(
                f"ignored_layers of config.json names {len(strange)} layers that do not exist: "
                + listed(strange),
                needs="names of layers of this transformer, such as blocks.0.attn1.to_qkv",
                fix="correct the names in config.json, or merge the checkpoint again",
                code="E-CKP-07",
            )


def read_marker(config: Mapping[str, Any], *, tolerant: bool) -> Marker | None:
    """The marker of a config; None when there is none, or one that says nothing about the weights.

    `tolerant`: a manifest is there, so that a method which ascendit does not know may be passed over.
    Raises CheckpointError E-CKP-06 for one that is damaged, E-CKP-04 for an unknown method.
    """
    raw = config.get(KEY)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise _damaged(f"{KEY} is a JSON {type(raw).__name__}, not an object")
    method = raw.get("quant_method", raw.get("method"))
    if not isinstance(method, str):
        raise _damaged(f"{KEY} names no quant_method")
    names = raw.get("ignored_layers", raw.get("modules_to_not_convert")) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged("ignored_layers is no list of names")
    ignored = frozenset(layer for name in names for layer in layers_of_module(name))
    if method == "fp8" and (tiles := raw.get("weight_block_size")) is not None:
        if tiles != [128, 128]:
            raise _unknown(f"fp8 in tiles of {tiles!r:.40}")
        return Marker(FP8_TILES, "fp8 in tiles of 128 x 128", ignored)
    if not any(_SERIALIZED.fullmatch(key) and value is True for key, value in raw.items()):
        return None
    if method not in QUANTIZED:
        if tolerant:
            return None
        raise _unknown(method)
    return Marker(method, method, ignored)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json of a transformer: {what}",
        needs=f'{KEY} such as {{"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": true}}, or none',
        fix="restore config.json from where the model came from",
        code="E-CKP-06",
    )


def _unknown(method: str) -> CheckpointError:
    return CheckpointError(
        f"config.json says that the weights are quantized by {method:.60}",
        needs=f"one of {', '.join(QUANTIZED)}, or {FP8_TILES}",
        fix="start from the BF16 weights of this model",
        code="E-CKP-04",
    )
