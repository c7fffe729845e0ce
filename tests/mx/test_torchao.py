"""Against torchao's `to_mx`: stored results always, the library where it is installed.

Differences, excluded here: blocks whose scale byte is 0 (torchao divides by 2^-126 or by 1) and blocks with
non-finite values. `mx.scales` has the reasons.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from mx.blocks import FIXTURES, blocks_of, every_finite_amax, random_blocks, raw
from safetensors.torch import load_file
from torch import Tensor

from ascendit.mx.codec import encode

SAME = {"floor": "FLOOR", "ceil": "RCEIL", "pow2": "CEIL", "even": "EVEN"}
DTYPES = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp4": getattr(torch, "float4_e2m1fn_x2", torch.uint8),
}


def compare(x: Tensor, fmt: str, rule: str, scale: Tensor, qdata: Tensor) -> None:
    """All scales are equal, and the qdata of every block whose scale byte is not 0."""
    encoded = encode(x, fmt, scale_rule=rule)
    assert torch.equal(encoded.scale, scale)
    bytes_per_block = qdata.shape[-1] // scale.shape[-1]
    differ = (raw(encoded.qdata) != qdata).unflatten(-1, (-1, bytes_per_block)).any(-1)
    assert not (differ & (scale != 0)).any()
    assert int((scale != 0).sum()) > 0.8 * scale.numel()


@pytest.mark.parametrize("fmt", DTYPES)
@pytest.mark.parametrize("rule", SAME)
def test_stored_results(fmt: str, rule: str) -> None:
    vectors = load_file(FIXTURES / "torchao" / "to_mx.safetensors")
    key = f"x.{fmt}.{SAME[rule]}"
    compare(vectors["x"], fmt, rule, vectors[f"{key}.scale"], vectors[f"{key}.codes"])


@pytest.fixture(scope="module")
def torchao() -> Any:
    """(to_mx, ScaleCalculationMode). Warnings of its import are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed"
        )
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
    return module.to_mx, ScaleCalculationMode


def compare_live(torchao: Any, x: Tensor, fmt: str, rule: str) -> None:
    to_mx, modes = torchao
    scale, qdata = to_mx(x, DTYPES[fmt], 32, modes[SAME[rule]])
    compare(x, fmt, rule, scale.view(torch.uint8), qdata.view(torch.uint8))


@pytest.mark.parametrize("fmt", DTYPES)
@pytest.mark.parametrize("rule", SAME)
def test_a_third_of_all_bf16_amax(torchao: Any, fmt: str, rule: str) -> None:
    compare_live(torchao, blocks_of(every_finite_amax()[::3], seed=0), fmt, rule)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", DTYPES)
@pytest.mark.parametrize("rule", SAME)
def test_a_million_blocks(torchao: Any, fmt: str, rule: str) -> None:
    for seed in range(20):
        compare_live(torchao, random_blocks(50_000, seed), fmt, rule)


def test_cuda_tiles(torchao: Any) -> None:
    from torchao.prototype.mx_formats.utils import to_blocked

    from ascendit.mx.layouts import to_cuda_tiles

    scale = torch.randint(0, 256, (300, 23), dtype=torch.uint8)
    assert torch.equal(to_cuda_tiles(scale), to_blocked(scale))
