"""Table of the schemes of quantized attention. Does not import torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

log = logging.getLogger("ascendit")


@dataclass(frozen=True, kw_only=True)
class AttentionFormat:
    """How Q, K and V of one attention are quantized, per head.

    A scale covers a tile of [tokens, channels] values; None: all tokens, or all channels of the head.
    """

    quant_type: str
    """msModelSlim's value of `<attn>.quant_type` in the manifest."""
    format: str
    """The number format: int8, fp8 (e4m3), mxfp8 or mxfp4."""
    query_tile: tuple[int | None, int | None]
    key_tile: tuple[int | None, int | None]
    value_tile: tuple[int | None, int | None]
    rotate: bool
    """Multiply Q and K by a Hadamard matrix first, if no `q_rot` and `k_rot` are stored; stored ones are used
    in every scheme."""
    smooth_key: bool = False
    """Subtract the mean over tokens from K first, which changes no probability."""


ATTENTION_FORMATS: Mapping[str, AttentionFormat] = {
    "int8": AttentionFormat(
        quant_type="INT8_DYNAMIC",
        format="int8",
        query_tile=(1, None),
        key_tile=(1, None),
        value_tile=(None, 1),
        rotate=False,
        smooth_key=True,
    ),
    "fp8": AttentionFormat(
        quant_type="FP8_DYNAMIC",
        format="fp8",
        query_tile=(128, None),
        key_tile=(256, None),
        value_tile=(256, None),
        rotate=True,
    ),
    "mxfp8": AttentionFormat(
        quant_type="MXFP8_DYNAMIC",
        format="mxfp8",
        query_tile=(1, 32),
        key_tile=(1, 32),
        value_tile=(32, 1),
        rotate=True,
    ),
    "mxfp4": AttentionFormat(
        quant_type="MXFP4_DYNAMIC",
        format="mxfp4",
        query_tile=(1, 32),
        key_tile=(1, 32),
        value_tile=(32, 1),
        rotate=True,
    ),
}
"""Scheme -> how it quantizes."""
QUANT_TYPES: Mapping[str, str] = {f.quant_type: name for name, f in ATTENTION_FORMATS.items()}
"""`AttentionFormat.quant_type` -> scheme."""


def warn_about_bf16(name: str, schemes: Iterable[str]) -> None:
    """Log a warning that model `name`, whose attention is not ascendit's, neither quantizes nor saves it so.

    `schemes`: one for each quantized attention.
    """
    if counts := Counter(schemes):
        text = ", ".join(f"{scheme} for {n}" for scheme, n in counts.items())
        log.warning(
            "%s: attention is not quantized, and save_pretrained drops its types; "
            "only ascendit's own pipeline quantizes it (%s)",
            name,
            text,
        )
