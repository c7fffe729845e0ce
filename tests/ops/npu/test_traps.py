"""Twelve wrong calls that torch_npu accepts; each test checks that ascendit does not make one of them.

Other tests check the numbers. These check the arguments, since on a card these mistakes give wrong numbers or
an error deep inside CANN.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.layers import activation_of, on_disk, weight_of
from ops.recorder import Recorder
from stored import load_transformer

from ascendit.checkpoint.layout import recognise
from ascendit.device.chip import CHIPS
from ascendit.errors import EnvironmentProblem
from ascendit.kernels.kernel import PreparedWeight
from ascendit.ops.operators import bind
from ascendit.quant.schemes import LINEAR_SCHEMES
from ascendit.twin.contract import TwinError

pytestmark = pytest.mark.usefixtures("twin")
MX = ("mxfp8", "mxfp4", "w4a8")
OUTPUTS = ((torch.bfloat16, 15), (torch.float16, 5))


def layer(scheme: str, k: int = 96, nz: bool = False) -> tuple[PreparedWeight, Recorder]:
    """A prepared weight [16, k], and the calls of its layer for a5."""
    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(*on_disk(*weight_of(scheme, 16, k)), scheme, nz=nz)
    with torch.no_grad(), Recorder() as recorder:
        ops.quantized_linear(ops.quantize_activation(activation_of(4, k), scheme), weight)
    return weight, recorder


def matmul(recorder: Recorder) -> dict[str, Any]:
    (args,) = recorder.named("npu_quant_matmul")
    return args


@pytest.mark.parametrize("chip", ["a2", "a3"])
def test_1_mx_is_refused_by_chip_before_any_call(chip: str) -> None:
    """The adapter accepts npu_dynamic_mx_quant on a2; it fails only inside CANN."""
    for scheme in (*MX, "mxfp4_dualscale", "fp8"):
        ops, x = bind(f"twin:{chip}").quantized, activation_of(4, 64)
        with (
            Recorder() as recorder,
            pytest.raises(EnvironmentProblem, match=f"scheme {scheme} on twin:{chip}"),
        ):
            ops.quantize_activation(x, scheme)
        assert not recorder.launched


@pytest.mark.parametrize("scheme", MX)
def test_2_scales_come_in_pairs_and_an_odd_block_is_padded_with_byte_0(scheme: str) -> None:
    weight, _ = layer(scheme, k=96)
    pairs = weight.scale.transpose(0, 1)
    assert pairs.dtype == torch.uint8 and pairs.shape == (16, 2, 2)
    assert not pairs[:, 1, 1].any() and pairs[:, 1, 0].any()


@pytest.mark.parametrize("scheme", MX)
def test_3_weight_and_scale_are_both_transposed_views(scheme: str) -> None:
    weight, recorder = layer(scheme)
    for t in (weight.qdata, weight.scale):
        assert t.stride(0) < t.stride(1) and t.transpose(0, 1).is_contiguous() and not t.is_contiguous()
    args = matmul(recorder)
    assert args["x2"].data_ptr() == weight.qdata.data_ptr()
    assert args["scale"].data_ptr() == weight.scale.data_ptr()
    with pytest.raises(TwinError, match="x2 tensor and scale tensor's transpose are not same"):
        torch.ops.npu.npu_quant_matmul(**args | {"scale": args["scale"].contiguous()})


@pytest.mark.parametrize("scheme", MX)
def test_4_scale_dtypes_and_group_sizes_are_passed(scheme: str) -> None:
    args = matmul(layer(scheme)[1])
    assert args["scale_dtype"] == args["pertoken_scale_dtype"] == 293
    assert list(args["group_sizes"]) == ([0, 0, 32] if scheme == "w4a8" else [1, 1, 32])


@pytest.mark.parametrize(
    ("scheme", "dtypes"),
    [
        ("mxfp8", {}),
        ("fp8", {}),
        ("int8", {}),
        ("mxfp4", {"x1_dtype": 296, "x2_dtype": 296}),
        ("w4a8", {"x2_dtype": 296}),
    ],
)
def test_5_element_dtypes_are_passed_for_packed_bytes_only(scheme: str, dtypes: dict[str, int]) -> None:
    args = matmul(layer(scheme)[1])
    assert {k: v for k, v in args.items() if k in ("x1_dtype", "x2_dtype") and v is not None} == dtypes


def test_6_fp4_is_requested_by_torch_npus_number() -> None:
    """torch.float4_e2m1fn_x2 (45) makes the adapter allocate [M, K] instead of [M, K / 2]."""
    for scheme, number in (("mxfp4", 296), ("mxfp8", 292), ("w4a8", 292)):
        (args,) = layer(scheme)[1].named("npu_dynamic_mx_quant")
        assert args.get("dst_type", 296) == number


@pytest.mark.parametrize(
    ("scheme", "dtype", "number"),
    [(s, d, n) for s in LINEAR_SCHEMES for d, n in OUTPUTS if d == torch.bfloat16 or s != "int8_block"],
)
def test_7_the_output_dtype_is_passed(scheme: str, dtype: torch.dtype, number: int) -> None:
    """None means int8."""
    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(*on_disk(*weight_of(scheme, 16, 64)), scheme)
    with torch.no_grad(), Recorder() as recorder:
        out = ops.quantized_linear(ops.quantize_activation(activation_of(4, 64, dtype), scheme), weight)
    (args,) = recorder.named("npu_quant_matmul") + recorder.named("npu_dual_level_quant_matmul")
    default = 15 if "dual" in scheme else None
    assert args.get("output_dtype", default) == number and out.dtype == dtype


def test_8_the_dual_level_weight_is_fractal_nz_cast_as_int8() -> None:
    ops = bind("twin:a5").quantized
    tensors = on_disk(*weight_of("mxfp4_dualscale", 16, 544))
    with torch.no_grad(), Recorder() as recorder:
        weight = ops.prepare_weight(*tensors, "mxfp4_dualscale")
    (args,) = recorder.named("npu_format_cast")
    assert (args["acl_format"], args["customize_dtype"]) == (29, 1) and args["self"].dtype == torch.int8
    assert int(torch.ops.npu.get_npu_format(weight.qdata)) == 29
    assert weight.dual_scale is not None and weight.dual_scale.shape == (2, 16)
    assert weight.dual_scale.is_contiguous() and weight.scale.shape == (16, 9, 2)


@pytest.mark.parametrize("chip", list(CHIPS))
def test_9_attention_gets_no_mask_and_its_scale(chip: str) -> None:
    """True in a mask means masked out, and the default scale is 1.0."""
    q, k, v = (torch.randn(1, n, 2, 32).to(torch.bfloat16) for n in (9, 7, 7))
    ops = bind(f"twin:{chip}")
    with torch.no_grad(), Recorder() as recorder:
        out = ops.attention(q, k, v)
    (args,) = recorder.named("npu_fusion_attention")
    assert args.get("atten_mask") is None and args["scale"] == pytest.approx(32**-0.5)
    a, b, c = (t.transpose(1, 2).float() for t in (q, k, v))
    expected = F.scaled_dot_product_attention(a, b, c)
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), rtol=1e-2, atol=1e-2)


ONLY_A2_A3 = {
    "npu_prompt_flash_attention",
    "npu_incre_flash_attention",
    "npu_layer_norm_eval",
    "npu_silu",
    "npu_conv3d",
    "mindiesd::la",
}


@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("name", ["i2v_21", "ti2v"])
def test_10_no_operator_that_a_chip_lacks(chip: str, name: str, forward: Callable[..., Recorder]) -> None:
    recorder = forward(chip, name)
    assert not ONLY_A2_A3 & set(recorder.launched)
    assert ("mindiesd::adaln_v2" in recorder.launched) is (chip == "a5")
    assert recorder.launched["npu_fusion_attention"] >= 4


@pytest.mark.parametrize("chip", list(CHIPS))
def test_11_gelu_is_npu_gelu_with_its_approximation(chip: str, forward: Callable[..., Recorder]) -> None:
    """aten's gelu is always the tanh approximation on a2 and a3; the image embedder needs exact GELU."""
    recorder = forward(chip, "i2v_21")
    approximations = [args.get("approximate", "none") for args in recorder.named("npu_gelu")]
    assert sorted(set(approximations)) == ["none", "tanh"] and approximations.count("none") == 1
    assert not {"gelu", "npu_fast_gelu", "fast_gelu"} & set(recorder.launched)


@pytest.mark.parametrize("chip", list(CHIPS))
def test_12_rope_rotates_in_float32_interleaved(chip: str, forward: Callable[..., Recorder]) -> None:
    """The operator casts the tables to the dtype of its input, and a5 accepts any rotary_mode."""
    calls = forward(chip, "ti2v").named("npu_rotary_mul")
    assert len(calls) == 4
    for args in calls:
        x, cos = args["self"], args["r1"]
        assert x.dtype == cos.dtype == args["r2"].dtype == torch.float32
        assert args["rotary_mode"] == "interleave"
        assert cos.shape == (1, x.shape[1], 1, 32) and torch.equal(cos[..., 0::2], cos[..., 1::2])


@pytest.fixture
def forward(tiny_folder: Callable[[str], Path]) -> Callable[..., Recorder]:
    """`forward(chip, name)`: calls of a BF16 forward of a tiny model, with its text and image."""

    def run(chip: str, name: str) -> Recorder:
        part = recognise(tiny_folder(name)).parts["transformer"]
        model = load_transformer(part, bind(f"twin:{chip}"), dtype=torch.bfloat16)
        x, text = torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 16, model.config.text_dim)
        image = torch.randn(1, 17, 32) if model.config.image_dim else None
        timesteps, spans = ((0.0, 500.0), (6, 12)) if name == "ti2v" else ((500.0,), (18,))
        with torch.no_grad(), Recorder() as recorder:
            model(x, timesteps, model.prepare(model.grid_of(x), text, image, timesteps=timesteps), spans)
        return recorder

    return run
