"""The attention of each step, kind and block of one expert, as functions: chosen once, before the loop.

    plan = make_plan(ops, policy, "transformer", calls, layers, steps)
    out = plan.call(step, "self", block)(q, k, v)            # [B, S, H, d]

`DenoiseState.attend` calls it. All functions have the signature `call(q, k, v, *, return_lse=False)`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ascendit.attention.choice import AttentionPolicy, Choice
from ascendit.attention.measured import fastest
from ascendit.attention.quantized import quantized_attention
from ascendit.attention.steps import AttentionRow, report, resolve
from ascendit.device.attention_kernels import Kind
from ascendit.device.attention_limits import AttentionCall
from ascendit.kernels import reference
from ascendit.kernels.kernel import Attended, Function, Kernel
from ascendit.ops.open_device import hardware_name
from ascendit.ops.operators import Ops
from ascendit.ops.select import kernels_of
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.schedule import Step


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The attention functions of one expert, for both CFG branches."""

    calls: Mapping[int, Mapping[Kind, Sequence[Function]]]
    """Step -> kind -> the function of each block."""
    rows: tuple[AttentionRow, ...] = ()
    """The same for a report."""

    def call(self, step: int, kind: Kind, block: int) -> Function:
        """The attention of a block: q [B, S, H, d], k and v [B, L, H, d] -> [B, S, H, d], q's dtype."""
        return self.calls[step][kind][block]


def make_plan(
    ops: Ops,
    policy: AttentionPolicy | None,
    expert: str,
    calls: Mapping[Kind, AttentionCall],
    layers: Mapping[Kind, Sequence[Any]],
    steps: Mapping[int, Step],
) -> AttentionPlan:
    """Resolve the attention of `expert` before the loop.

    `layers`: the attention module of each block, whose `scheme`, `q_rot` and `k_rot` declare quantized
    attention. `steps`: those that the expert runs. Raises the errors of `resolve` and
    `quantized_attention`.
    """
    kernels, policy = dense_kernels(ops), with_kernels(policy, ops)
    declared = {kind: [module.scheme for module in modules] for kind, modules in layers.items()}
    resolved = resolve(policy, calls, declared, steps)

    @functools.cache
    def bound(kind: Kind, choice: Choice, block: int) -> Function:
        call = _function(choice, kernels, ops, layers[kind][block])
        return limited(call, sub_head=choice.sub_head, key_length=calls[kind].key_length)

    def describe(name: str) -> tuple[str, str]:
        kernel = ops.quantized.attention(name) if name in ATTENTION_FORMATS else kernels[name]
        return kernel.backend, kernel.reason

    return AttentionPlan(
        {
            step: {
                kind: tuple(bound(kind, choice, block) for block, choice in enumerate(choices))
                for kind, choices in kinds.items()
            }
            for step, kinds in resolved.items()
        },
        report(expert, resolved, describe),
    )


def dense_kernels(ops: Ops) -> dict[str, Kernel]:
    """Name -> dense kernel that the backend of `ops` lists; `reference` is always one of them."""
    device, wish = ops.quantized.device, ops.quantized.wish
    listed = () if wish.reference else kernels_of(device, wish)
    kernels = {k.name: k for k in listed if k.operator == "attention"}
    plain = Kernel("attention", "reference", reference.attention, "plain PyTorch", name="reference")
    return {"reference": plain, **kernels}


def with_kernels(policy: AttentionPolicy | None, ops: Ops) -> AttentionPolicy:
    """`policy` (None: no requests) for the device of `ops`, with the kernels that this machine has."""
    device, wish = ops.quantized.device, ops.quantized.wish
    kernels = dense_kernels(ops)

    def missing(name: str) -> str:
        return kernels[name].missing() if name in kernels else "it is not available on this machine"

    return replace(
        policy or AttentionPolicy(device=device),
        device=device,
        reference=wish.reference,
        emulate=wish.emulate is not None,
        missing=missing,
        measured=functools.partial(fastest, hardware=hardware_name(device)),
    )


def limited(call: Function, *, sub_head: int | None = None, key_length: int | None = None) -> Function:
    """An attention function that computes `sub_head` heads per call, with the first `key_length` keys.

    Raises AssertionError if `sub_head` does not divide the heads, which `check_heads` refuses before.
    """
    if sub_head is None and key_length is None:
        return call

    def attend(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
        k, v = k[:, :key_length], v[:, :key_length]
        heads = q.shape[2]
        size = sub_head or heads
        assert heads % size == 0, (heads, size)
        groups = [slice(start, start + size) for start in range(0, heads, size)]
        outputs = [call(q[:, :, g], k[:, :, g], v[:, :, g], return_lse=return_lse) for g in groups]
        if not return_lse:
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return torch.cat([out for out, _ in outputs], dim=2), torch.cat([lse for _, lse in outputs], dim=1)

    return attend


def _function(choice: Choice, kernels: Mapping[str, Kernel], ops: Ops, module: Any) -> Function:
    if choice.name in ATTENTION_FORMATS:
        return quantized_attention(choice.name, ops, module.q_rot, module.k_rot)
    return kernels[choice.name].call
