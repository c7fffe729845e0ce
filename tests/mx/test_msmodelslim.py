"""Bit equality with msModelSlim: its function vectors, layers of exports, and each quantizer rule."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from mx.blocks import FIXTURES, blocks_of, every_finite_amax, raw
from safetensors.torch import load_file
from torch import Tensor

from ascendit.mx import elements, msmodelslim
from ascendit.mx.codec import decode, encode
from ascendit.mx.smoothing import smooth_weight

FOLDER = FIXTURES / "msmodelslim"


@cache
def stored(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def assert_same(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None and actual.shape == expected.shape
    differ = int((raw(actual) != raw(expected)).sum())
    assert differ == 0, f"{differ} of {expected.numel()}"


# ---- function vectors ---------------------------------------------------------------------------

MINMAX = {
    "mxfp8": ("vectors/weight_mxfp8_minmax", "weight_f8"),
    "mxfp4": ("vectors/weight_mxfp4_minmax", "weight_packed"),
}
MODES = {
    "fp32": (torch.float32, "msms:minmax"),
    "bf16_ac": (torch.bfloat16, "msms:minmax"),
    "bf16": (torch.bfloat16, "msms:minmax_bf16"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fmt", MINMAX)
def test_minmax_vectors(fmt: str, mode: str) -> None:
    file, qdata = MINMAX[fmt]
    vectors = stored(file)
    dtype, rule = MODES[mode]
    cases = {key.split(".")[0] for key in vectors}
    assert len(cases) == 7
    for case in cases:
        encoded = encode(vectors[f"{case}.w_bf16"].to(dtype), fmt, scale_rule=rule)
        assert_same(encoded.qdata, vectors[f"{case}.{mode}.{qdata}"])
        assert_same(encoded.scale, vectors[f"{case}.{mode}.scale_u8"])


def nearest_elements(values: Tensor) -> Tensor:
    """float32 -> uint8 e2m1 elements like msModelSlim's packer: the nearest number, in a tie the smaller.

    Its inputs are FP4 numbers already. Unlike in rounding, the sign of zero is preserved.
    """
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=values.device)
    index = (values.abs().unsqueeze(-1) > midpoints).sum(-1)
    return (index | (torch.signbit(values).to(index.dtype) << 3)).to(torch.uint8)


@pytest.mark.parametrize("case", ["all_pairs", "offgrid"])
def test_packing_vectors(case: str) -> None:
    vectors = stored("vectors/pack_fp4")
    assert_same(elements.pack(nearest_elements(vectors[f"{case}.x"])), vectors[f"{case}.packed"])


# ---- exports ------------------------------------------------------------------------------------

EXPORTS = [
    ("layers_ti2v_d128", "official_w8a8f8", "mxfp8", "msms:minmax"),
    ("layers_ti2v_d128", "minmax", "mxfp4", "msms:minmax"),
    ("layers_ti2v_d128", "int8", "int8", "msms:int8"),
    ("layers_t2v_d64", "int8", "int8", "msms:int8"),
    ("layers_t2v_d64", "legacy_calibrator", "int8", "msms:int8_legacy"),
    ("layers_t2v_d64", "dualscale", "mxfp4_dualscale", "msms:dualscale"),
    ("layers_t2v_d64", "dualscale_smooth", "mxfp4_dualscale", "msms:dualscale"),
]


@pytest.mark.parametrize(("file", "recipe", "fmt", "rule"), EXPORTS)
def test_layers_of_exports(file: str, recipe: str, fmt: str, rule: str) -> None:
    tensors = stored(file)
    names = [
        key.removesuffix(".weight_scale")
        for key in tensors
        if key.startswith(f"{recipe}/") and key.endswith("_scale")
    ]
    names = [name for name in names if f"{name}.weight" in tensors]
    assert len(names) in (3, 10)
    for name in names:
        layer = name.removeprefix(f"{recipe}/").removesuffix(".linear")
        weight = tensors[f"source/{layer}.weight"]
        if recipe.endswith("smooth"):
            weight = smooth_weight(weight, tensors[f"{recipe}/{layer}.div.mul_scale"])
        encoded = encode(weight, fmt, scale_rule=rule)
        assert_same(encoded.qdata, tensors[f"{name}.weight"])
        assert_same(
            encoded.scale,
            tensors[f"{name}.weight_scale"].float() if fmt == "int8" else tensors[f"{name}.weight_scale"],
        )
        if encoded.dual_scale is not None:
            assert_same(encoded.dual_scale, tensors[f"{name}.weight_dual_scale"])


# ---- rule by rule -------------------------------------------------------------------------------

RULES = sorted(
    {key.split(".", 1)[1].rsplit(".bfloat16.", 1)[0] for key in stored("rules") if ".bfloat16.codes" in key}
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["normal", "spread", "ragged"])
@pytest.mark.parametrize("rule", RULES)
def test_quantizers(rule: str, case: str, dtype: torch.dtype) -> None:
    vectors = stored("rules")
    fmt, name = rule.split(".", 1)
    key = f"{case}.{rule}.{str(dtype).removeprefix('torch.')}"
    if f"{key}.codes" not in vectors:
        assert (case, name) == ("ragged", "fouroversix")
        pytest.skip("msModelSlim refuses a K that is not a multiple of 32 for this rule")
    x = vectors[case].to(dtype)
    encoded = encode(x, fmt, scale_rule=f"msms:{name}")
    assert_same(encoded.qdata, vectors[f"{key}.codes"])
    assert_same(encoded.scale, vectors[f"{key}.scale"])
    if encoded.dual_scale is not None:
        assert_same(encoded.dual_scale, vectors[f"{key}.dual_scale"])
    if name == "ceil_x:search":
        best = vectors[f"{key}.c"].item()
        assert msmodelslim.best_ceil_x(msmodelslim.ceil_x_sums(x)) == best
        assert_same(encode(x, fmt, scale_rule=f"msms:ceil_x:{best:g}").qdata, vectors[f"{key}.codes"])


def test_there_are_eight_rules() -> None:
    assert len(RULES) == 8


# ---- ascendit's own behaviour -------------------------------------------------------------------


def test_minmax_exponents_of_every_bf16_amax() -> None:
    """mxfp8: exact floor. mxfp4: the 8/7 rule where epsilon has no effect, and a scale byte >= 105."""
    x = blocks_of(every_finite_amax(), seed=0)
    amax = every_finite_amax().float()
    assert_same(
        encode(x, "mxfp8", scale_rule="msms:minmax").scale, encode(x, "mxfp8", scale_rule="floor").scale
    )
    four = encode(x, "mxfp4", scale_rule="msms:minmax").scale[:, 0]
    even = encode(x, "mxfp4", scale_rule="even").scale[:, 0]
    large = amax > 2.0**-10
    assert_same(four[large], even[large].clamp(max=252))
    assert int(four.min()) == 105 and int(four.max()) == 252


def test_halves_round_away_from_zero_and_negative_zero_is_preserved() -> None:
    x = torch.tensor([[448.0, 17.0, -17.0, 1e-30, -1e-30, 0.0, -0.0]])  # 17 is between 16 and 18
    qdata = encode(x, "mxfp8", scale_rule="msms:minmax").qdata.view(torch.uint8)
    up, even = qdata[0, 1].item(), encode(x, "mxfp8", scale_rule="floor").qdata.view(torch.uint8)[0, 1].item()
    assert (up, even) == (0x59, 0x58)
    assert qdata[0].tolist() == [0x7E, 0x59, 0xD9, 0x00, 0x80, 0x00, 0x00]


def test_mse_round_takes_the_better_of_two_scales() -> None:
    x = blocks_of(torch.linspace(1, 2, 400).to(torch.bfloat16), seed=3)
    chosen = encode(x, "mxfp8", scale_rule="msms:mse_round")
    down, up = (encode(x, "mxfp8", scale_rule=r, rounding="half_away") for r in ("floor", "pow2"))
    errors = [(x.float() - decode(e)).square().mean(-1) for e in (down, up)]
    took_up = chosen.scale[:, 0] > down.scale[:, 0]
    assert torch.equal(took_up, errors[1] < errors[0])
    assert 0 < int(took_up.sum()) < 400 and torch.equal(chosen.scale[took_up], up.scale[took_up])


def test_fouroversix_keeps_scales_in_range() -> None:
    """msModelSlim's byte wraps around for blocks under 6 x 2^-127; ascendit's is 0. All qdata is 0."""
    encoded = encode(torch.full((1, 32), 2.0**-130), "mxfp4", scale_rule="msms:fouroversix")
    assert encoded.scale.item() == 0 and not encoded.qdata.any()


def test_a_group_of_zeros_is_not_nan() -> None:
    x = torch.zeros(1, 1024, dtype=torch.bfloat16)
    x[0, 600] = 3.0
    encoded = encode(x, "mxfp4_dualscale", scale_rule="msms:dualscale")
    assert encoded.dual_scale is not None
    assert encoded.dual_scale.flatten().tolist() == [0.0, 0.5]
    assert not encoded.qdata[:, :256].any()


def test_the_search_without_a_finite_error_takes_the_first() -> None:
    assert msmodelslim.best_ceil_x([float("nan")] + [float("inf")] * 24) == 6.0
    assert msmodelslim.best_ceil_x([3.0, 2.0, 2.0] + [5.0] * 22) == 6.25
