"""Plans: kernels as functions, heads in groups, padded keys, quantized attention by block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ascendit.attention.choice import AttentionPolicy
from ascendit.attention.plan import AttentionPlan, dense_kernels, limited, make_plan, with_kernels
from ascendit.attention.quantized import quantized_attention
from ascendit.device.attention_kernels import ATTENTION_KERNELS, Kind, parse_attention
from ascendit.device.attention_limits import AttentionCall
from ascendit.device.device import parse_device
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels import reference
from ascendit.kernels.cpu import attention
from ascendit.mx.smoothing import rotation
from ascendit.ops.operators import Ops, bind
from ascendit.schedule import StepSchedule

S, HEADS, D = 33, 6, 64
BEST = attention.list_kernels()[0].name
"""The kernel of this processor: cpu, or sdpa if it lacks the instructions."""
NAMES = {"cpu": {BEST, "sdpa", "reference"}, "twin:a2": {"fusion", "fused_infer", "reference"}}


def qkv(keys: int = S) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, n, HEADS, D) for n in (S, keys, keys))
    q, k, v = (torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes)
    return q, k, v


def modules(*schemes: str | None, rot: Tensor | None = None) -> list[Any]:
    return [SimpleNamespace(scheme=x, q_rot=rot, k_rot=rot) for x in schemes]


def plan(
    ops: Ops, policy: AttentionPolicy | None, layers: list[Any], steps: str = "", **kw: Any
) -> AttentionPlan:
    size: dict[str, Any] = {"dtype": "bfloat16", "heads": HEADS, "head_dim": D, "queries": S, "keys": S} | kw
    calls: dict[Kind, AttentionCall] = {"self": AttentionCall(kind="self", **size)}
    schedule = StepSchedule.parse(steps) if steps else StepSchedule()
    return make_plan(
        ops, policy, "transformer", calls, {"self": layers}, dict(enumerate(schedule.resolve(3)))
    )


@pytest.mark.parametrize("device", NAMES)
def test_every_kernel_has_the_name_of_a_row_of_its_backend(device: str) -> None:
    kernels = dense_kernels(bind(device))
    backend = parse_device(device).operators
    assert NAMES[device] <= kernels.keys()
    rows = {name: ATTENTION_KERNELS[name] for name in kernels}
    assert all(backend in row.backends for row in rows.values())
    assert all(kernels[name].on_request == row.on_request for name, row in rows.items())
    assert dense_kernels(bind(device, "reference")).keys() == {"reference"}


@pytest.mark.parametrize("device", NAMES)
def test_a_plan_binds_the_chosen_kernels(device: str) -> None:
    ops = bind(device)
    kernels, names = dense_kernels(ops), sorted(NAMES[device] - {"reference"})
    for name in names:
        policy = AttentionPolicy(device=parse_device(device), request=parse_attention(f"self={name}"))
        made = plan(ops, policy, modules(None))
        assert torch.equal(made.call(2, "self", 0)(*qkv()), kernels[name].call(*qkv()))
        assert made.rows[0].kernel == name and made.rows[0].reason == f"requested; {kernels[name].reason}"
        assert made.rows[0].backend == kernels[name].backend
    assert torch.equal(plan(ops, None, modules(None)).call(0, "self", 0)(*qkv()), ops.attention(*qkv()))


def test_quantized_attention_by_block_and_step() -> None:
    ops, (q, k, v) = bind("cpu"), qkv()
    rot = rotation(D, seed=5)
    layers = [*modules(None, "fp8"), *modules("fp8", rot=rot)]
    made = plan(ops, None, layers, "1:attention=bf16,2:attention=mxfp8")
    out = [[made.call(step, "self", block)(q, k, v) for block in range(3)] for step in range(3)]
    dense = ops.attention(q, k, v)
    expected = [quantized_attention("fp8", ops)(q, k, v), quantized_attention("fp8", ops, rot, rot)(q, k, v)]
    assert torch.equal(out[0][0], dense) and all(torch.equal(x, dense) for x in out[1])
    assert torch.equal(out[0][1], expected[0]) and torch.equal(out[0][2], expected[1])
    assert not torch.equal(expected[0], expected[1]), "the rotation of the checkpoint is used"
    assert torch.equal(out[2][0], quantized_attention("mxfp8", ops)(q, k, v))
    assert [(x.kernel, x.blocks, x.steps) for x in made.rows] == [
        *((BEST, "0", "0"), ("fp8", "1-2", "0")),
        *((BEST, "0-2", "1"), ("mxfp8", "0-2", "2")),
    ]
    assert made.rows[1].reason.startswith("of the model; emulated: ")


@pytest.mark.parametrize("sub_head", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(NAMES["cpu"]))
def test_heads_in_groups_are_those_of_one_call(name: str, sub_head: int) -> None:
    call = dense_kernels(bind("cpu"))[name].call
    q, k, v = qkv(keys=21)
    sizes = []

    def counted(q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Any:
        sizes.append(q.shape[2])
        return call(q, k, v, **kw)

    out = limited(counted, sub_head=sub_head)(q, k, v)
    assert sizes == [sub_head] * (HEADS // sub_head)
    torch.testing.assert_close(out, call(q, k, v), rtol=2**-7, atol=2**-9)
    assert out.dtype == q.dtype and out.is_contiguous()


def test_padded_keys_are_sliced_and_the_log_sum_exp_is_joined() -> None:
    q, k, v = qkv(keys=40)
    attend = limited(reference.attention, sub_head=2, key_length=37)
    out, lse = attend(q, k, v, return_lse=True)
    expected, expected_lse = reference.attention(q, k[:, :37], v[:, :37], return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert lse.shape == (1, HEADS, S) and torch.equal(attend(q, k, v), expected)
    assert limited(reference.attention) is reference.attention
    made = plan(bind("cpu"), None, modules(None), keys=40, key_length=37)
    torch.testing.assert_close(made.call(0, "self", 0)(q, k, v), expected, rtol=2**-7, atol=2**-9)


def test_sub_head_of_a_policy() -> None:
    policy = AttentionPolicy(device=parse_device("cpu"), sub_head=2)
    made = plan(bind("cpu"), policy, modules(None))
    assert made.rows[0].sub_head == 2
    with pytest.raises(UsageError, match="--sub-head 4 with 6 heads|sub_head=4 with 6 heads"):
        plan(bind("cpu"), AttentionPolicy(device=parse_device("cpu"), sub_head=4), modules(None))


def test_the_device_of_the_operators_decides() -> None:
    policy = with_kernels(AttentionPolicy(device=parse_device("cpu")), bind("twin:a2"))
    assert str(policy.device) == "twin:a2" and not policy.emulate and not policy.reference
    assert policy.missing("cpu") == "it is not available on this machine" and policy.missing("fusion") == ""
    assert with_kernels(None, bind("cpu", "reference")).reference
    with pytest.raises(EnvironmentProblem, match="attention in fp8 on twin:a2"):
        plan(bind("twin:a2"), None, modules("fp8"))
    assert plan(bind("twin:a2", emulate=True), None, modules("fp8")).rows[0].kernel == "fp8"
