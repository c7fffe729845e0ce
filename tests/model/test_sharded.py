"""FSDP2 on a quantized model: each rank holds half of the weights and scales, and outputs are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Gloo = Callable[..., list[Any]]
SCHEMES = ("int8", "int8_block", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("build", ["ours", "diffusers"])
def test_each_rank_holds_half_and_the_output_is_the_same(
    build: str, scheme: str, gloo: Gloo, tiny_t2v_single: Path
) -> None:
    ranks = gloo("model.sharded:forward", build, str(tiny_t2v_single), scheme)
    tolerance = 0.01 if scheme == "int8_block" else 0  # its rows of scales are an odd number
    for rank in ranks:
        assert rank["same"] == [True] * 3 and rank["rows"]
        assert rank["held"] == rank["after"] == pytest.approx(rank["before"] / 2, rel=tolerance)
    assert sum(rank["held"] for rank in ranks) == ranks[0]["before"]


def test_mixed_precision_is_refused(gloo: Gloo, tiny_t2v_single: Path) -> None:
    for text, same in gloo("model.sharded:mixed_precision", str(tiny_t2v_single)):
        assert text == "E-QNT-03 a cast of a layer in fp8 to torch.bfloat16" and same
