from __future__ import annotations

import pytest
import torch
from mx.blocks import FIXTURES
from safetensors.torch import load_file

from ascendit.errors import UsageError
from ascendit.mx import smoothing

FOLDER = FIXTURES / "msmodelslim"


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_msmodelslim(size: int, dtype: torch.dtype) -> None:
    vectors = load_file(FOLDER / "vectors" / "hadamard_seed1234.safetensors")
    name = "fp32" if dtype == torch.float32 else "bf16"
    assert torch.equal(smoothing.rotation(size, dtype=dtype), vectors[f"had{size}.{name}"])


def test_rotation_in_an_export() -> None:
    tensors = load_file(FOLDER / "layers_ti2v_d128.safetensors")
    for role in ("q_rot", "k_rot"):
        exported = tensors[f"official_w8a8f8/blocks.0.self_attn.{role}"]
        assert torch.equal(smoothing.rotation(exported.shape[0]), exported)


def test_rotation_leaves_attention_unchanged_and_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    matrix = smoothing.rotation(64, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    q, k = torch.randn(5, 64), torch.randn(7, 64)
    rotated = (q @ matrix.to(q.dtype)) @ (k @ matrix.to(k.dtype)).t()
    torch.testing.assert_close(rotated, q @ k.t())
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(64))
    assert not torch.equal(matrix, smoothing.rotation(64, dtype=torch.float32, seed=1))


def test_rotation_needs_a_power_of_two() -> None:
    with pytest.raises(UsageError, match=r"rotation of size 96\n  needs  a power of two"):
        smoothing.rotation(96)


def test_a_smoothed_layer_in_bf16_has_w_times_s() -> None:
    tensors = load_file(FOLDER / "layers_t2v_d64.safetensors")
    names = [
        key.removesuffix(".linear.weight") for key in tensors if key.startswith("dualscale_smooth/blocks.0")
    ]
    names = [name for name in names if f"{name}.div.mul_scale" in tensors]
    assert names
    for name in names:
        weight = tensors[name.replace("dualscale_smooth", "source") + ".weight"]
        smoothed = smoothing.smooth_weight(weight, tensors[f"{name}.div.mul_scale"])
        assert torch.equal(smoothed, tensors[f"{name}.linear.weight"]) and not torch.equal(smoothed, weight)


def test_every_bf16_factor_can_be_recovered_from_its_mul_scale() -> None:
    bits = torch.arange(0x0100, 0x7E80, dtype=torch.int32).to(torch.int16)  # 2^-125 to 2^126
    factors = bits.view(torch.bfloat16)
    ones = torch.ones(1, factors.numel(), dtype=torch.bfloat16)
    assert torch.equal(smoothing.smooth_weight(ones, smoothing.to_mul_scale(factors))[0], factors)


def test_smoothing_leaves_the_product_unchanged() -> None:
    x, weight = torch.randn(6, 48) * torch.logspace(-2, 2, 48), torch.randn(8, 48)
    factors = smoothing.smoothing_factors(x.abs().amax(0), weight.abs().amax(0), 0.5, dtype=torch.float32)
    mul_scale = smoothing.to_mul_scale(factors)
    product = smoothing.smooth_input(x, mul_scale) @ smoothing.smooth_weight(weight, mul_scale).t()
    torch.testing.assert_close(product, x @ weight.t())
    spread = smoothing.smooth_input(x, mul_scale).abs().amax(0)
    assert spread.max() / spread.min() < x.abs().amax(0).max() / x.abs().amax(0).min() / 10


@pytest.mark.parametrize("alpha", [0.5, 0.75, 0.9])
def test_factors_equal_msmodelslim(alpha: float) -> None:
    vectors = load_file(FOLDER / "rules.safetensors")
    factors = smoothing.smoothing_factors(vectors["smooth.input_amax"], vectors["smooth.weight_amax"], alpha)
    assert torch.equal(factors, vectors[f"smooth.{alpha}"])


def test_factors_follow_the_formula_and_are_bounded_below() -> None:
    inputs, weights = torch.tensor([4.0, 0.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])
    factors = smoothing.smoothing_factors(inputs, weights, 0.5, dtype=torch.float32)
    torch.testing.assert_close(factors, torch.tensor([2.0, 1e-5, 3 / 1e-5**0.5]))


@pytest.mark.parametrize("bad", [[1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [1.0]])
def test_a_damaged_mul_scale_is_refused(bad: list[float]) -> None:
    with pytest.raises(UsageError, match="mul_scale of shape") as caught:
        smoothing.smooth_weight(torch.ones(3, 2), torch.tensor(bad))
    assert caught.value.needs == "2 finite values above zero"
