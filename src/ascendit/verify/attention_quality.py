"""SQNR of quantized attention, on q, k and v of a BF16 run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ascendit.attention.quantized import QuantizedAttention
from ascendit.device.attention_kernels import Kind
from ascendit.exclusive import Stop
from ascendit.kernels import reference
from ascendit.model.state import DenoiseState
from ascendit.pipeline.generate import Pipeline, denoise
from ascendit.pipeline.request import GenerateRequest
from ascendit.verify.metrics import output_sqnr

HEADS = 2
"""Heads of each attention that are recorded: one takes 60 MB at 720p."""
MODULES: Mapping[Kind, str] = {"self": "attn1", "text": "attn2"}
Calls = Mapping[tuple[str, Kind, int], tuple[Tensor, Tensor, Tensor]]
"""(expert, kind, block) -> q, k, v [B, tokens, HEADS, d] of its last call with the prompt."""


def attention_calls(pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None) -> Calls:
    """Make a video and record the calls, on the CPU."""
    calls: dict[tuple[str, Kind, int], tuple[Tensor, Tensor, Tensor]] = {}

    def recorded(t: Tensor) -> Tensor:
        return t[:, :, :HEADS].to("cpu", copy=True)

    class RecordingState(DenoiseState):
        def attend(self, kind: Kind, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.branch == 0 and kind in MODULES:
                calls[self.expert, kind, block] = recorded(q), recorded(k), recorded(v)
            return super().attend(kind, block, q, k, v)

    with pipe.exclusive(cancel):
        denoise(replace(pipe, make_state=RecordingState), request, None, lambda event: None, cancel)
    return calls


@torch.inference_mode()
def attention_sqnr(pipe: Pipeline, calls: Calls) -> dict[str, float]:
    """`expert/attention` -> SQNR in dB of a quantized attention's output, against float32.

    Those of `pipe` in the schedule's default step, if they are quantized.
    """
    sqnr = {}
    for name, expert in pipe.experts.items():
        own = {(kind, block): qkv for (of, kind, block), qkv in calls.items() if of == name}
        lengths = {kind: k.shape[1] for (kind, _), (_, k, _) in own.items()}
        if "self" not in lengths:
            continue  # no step of the run was of this expert
        contexts: dict[Kind, int] = {"text": lengths["text"]}
        steps = {0: pipe.policy.default}
        plan = expert.plan_attention(lengths["self"], contexts, steps, policy=pipe.attention, expert=name)
        for (kind, block), (q, k, v) in own.items():
            attend = plan.call(0, kind, block)
            if isinstance(attend, QuantizedAttention):
                out = attend(*(t.to(expert.device) for t in (q, k, v)))
                expected = reference.attention(q.float(), k.float(), v.float())
                sqnr[f"{name}/blocks.{block}.{MODULES[kind]}"] = output_sqnr(out.float().cpu(), expected)
    return sqnr
