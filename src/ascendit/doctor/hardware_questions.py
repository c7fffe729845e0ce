"""Undocumented behaviour of NPUs, as questions that `doctor --self-check` answers by running operators.

`ask` takes a function that calls operators on CPU inputs, and returns the answer as text. It runs on the card
and on the twin, so a report shows where the twin is wrong. Answers are coarse, so that only relevant
differences are reported. Questions with `card_only` have no answer on the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ascendit import mx, twin
from ascendit.device.device import Device
from ascendit.doctor.operator_cases import Caller, CheckCase, CheckedDevice, Result, seeded, shortened
from ascendit.ops.operators import bind
from ascendit.twin.contract import FP4_E2M1, FP8_E4M3, SCALE_E8M0

FP32, BF16 = torch.float32, torch.bfloat16
ONE, NO_TWIN = 127, "answered only by a card"
ALL_CHIPS, A5 = ("a2", "a3", "a5"), ("a5",)


@dataclass(frozen=True)
class Question:
    """A question about `operator`. `card_only`: computes the answer on the card; the twin has none."""

    text: str
    operator: str
    ask: Callable[[Caller], str] | None = None
    card_only: Callable[[CheckedDevice], str] | None = None
    chips: tuple[str, ...] = A5


# ---- matmuls ------------------------------------------------------------------------------------


def _mx_matmul(call: Caller, q: Tensor, s1: Tensor, w: Tensor, s2: Tensor) -> Tensor:
    """q [M, K] x w [N, K] in e4m3, scales as [.., K / 64, 2] bytes; float32 [M, N]."""
    out: Tensor = call(
        "npu_quant_matmul",
        q,
        w.transpose(0, 1),
        s2.transpose(0, 1),
        pertoken_scale=s1,
        scale_dtype=SCALE_E8M0,
        pertoken_scale_dtype=SCALE_E8M0,
        output_dtype=6,
        group_sizes=[1, 1, 32],
    )
    return out


def _ones(rows: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, k).to(torch.float8_e4m3fn), torch.full((rows, k // 64, 2), ONE, dtype=torch.uint8)


def _order_of_sums(call: Caller) -> str:
    """Add one large block and many small ones, then subtract the large one; the remainder shows the order."""
    (q, s1), (w, s2) = _ones(16, 4096), _ones(16, 4096)
    s1[:, 0, 0] = s1[:, -1, 1] = ONE + 25  # 32 x 2^25, where 32 is less than half a step of float32
    signs = torch.ones(16, 4096)
    signs[:, -32:] = -1
    remainder = float(_mx_matmul(call, (q.float() * signs).to(torch.float8_e4m3fn), s1, w, s2)[0, 0])
    if remainder == 126 * 32.0:
        return "exactly: in more than float32, or with separate sums of small and large blocks"
    return "in float32, " + ("in the order of K" if remainder == 0 else "in another order")


def _odd_scales(call: Caller) -> str:
    """Multiply a row with a scale byte of 255, and one with scale bytes of 0."""
    (q, s1), (w, s2) = _ones(16, 64), _ones(16, 64)
    s1[0, 0, 0] = 255
    s1[1] = 0
    out = _mx_matmul(call, q, s1, w, s2)
    tiny = {0.0: "0", 2.0**-121: "2^-127"}.get(float(out[1, 0]), f"{float(out[1, 0]):g} of 64 x 2^-127")
    others = "unchanged" if out[2, 0] == 64 else "changed too"
    return f"255 gives {float(out[0, 0]):g}; 0 is {tiny}; other rows {others}"


def _odd_rows(call: Caller) -> str:
    """Quantize a row of zeros, one with an infinity and one with a NaN to int8."""
    x = torch.ones(3, 64, dtype=BF16)
    x[0], x[1, 5], x[2, 5] = 0, float("inf"), float("nan")
    qdata, scale = call("npu_dynamic_quant", x)
    rows = (
        f"scale {float(s):g}, values {sorted(set(q.tolist()))}" for q, s in zip(qdata, scale, strict=True)
    )
    return "; ".join(f"{name}: {row}" for name, row in zip(("zeros", "inf", "nan"), rows, strict=True))


# ---- quantizers ---------------------------------------------------------------------------------

RISES: dict[tuple[int, ...], str] = {
    (1, 1, 1): "6 (up from 1.5)",
    (0, 1, 1): "7 (up from 1.75)",
    (0, 0, 1): "7.25",
    (0, 0, 0): "scale_alg=0",
}
"""Which of the blocks with largest value 1.6, 1.79 and 1.9 get the next higher scale -> dst_type_max."""


def _dst_type_max(call: Caller) -> str:
    x = torch.tensor([1.6, 1.79, 1.9]).to(BF16).repeat_interleave(64).view(3, 64)
    answers = []
    for dst_type_max in (0.0, 6.0, 7.0, 7.25):
        options = {"scale_alg": 2, "dst_type_max": dst_type_max}
        try:
            scale = call("npu_dynamic_mx_quant", x, dst_type=FP4_E2M1, **options)[1]
        except RuntimeError as e:
            answers.append(f"{dst_type_max:g} refused ({shortened(str(e), 60)})")
            continue
        default = call("npu_dynamic_mx_quant", x, dst_type=FP4_E2M1)[1]
        rise = tuple(int(a) - int(b) for a, b in zip(scale[:, 0, 0], default[:, 0, 0], strict=True))
        answers.append(f"{dst_type_max:g} acts as {RISES.get(rise, rise)}")
    return "; ".join(answers)


def _smooth_scale(call: Caller) -> str:
    """Which of three interpretations gives the same qdata and scales as the quantizer."""
    name = "npu_dynamic_dual_level_mx_quant"
    x, smooth = seeded(8, 1024).to(BF16), seeded(1024).abs().to(BF16) + 0.25
    smoothed = call(name, x, smooth_scale=smooth)
    interpretations = {
        "multiplied in the dtype of the activation": x * smooth,
        "divided in the dtype of the activation": x / smooth,
        "ignored": x,
    }
    for label, equivalent in interpretations.items():
        if all(torch.equal(a, b) for a, b in zip(smoothed, call(name, equivalent), strict=True)):
            return label
    return "multiplied in float32, or another operation: no interpretation gives the same result"


# ---- attention ----------------------------------------------------------------------------------


def _fp8_attention(call: Caller) -> str:
    """Modes 7, 7, 7 of npu_fused_infer_attention_score_v2: accepted sizes, and correctness of results."""
    return "; ".join(f"B={b} S={s}: {_fp8_once(call, b, s)}" for b, s in ((1, 256), (1, 300), (2, 256)))


def _fp8_once(call: Caller, batch: int, tokens: int) -> str:
    floats = [seeded(batch, 2, tokens, 128, seed=seed).to(BF16) for seed in (1, 2, 3)]
    options: dict[str, Any] = {f"{n}_quant_mode": 7 for n in ("query", "key", "value")}
    qdata = []
    try:
        for name, t, rows in zip(("query", "key", "value"), floats, (128, 256, 256), strict=True):
            size = {"dst_type": FP8_E4M3, "row_block_size": rows, "col_block_size": 128}
            q, s = call("npu_dynamic_block_quant", t.flatten(0, 1), **size)
            qdata.append(q.view(t.shape))
            options[f"dequant_scale_{name}"] = s.view(batch, 2, *s.shape[1:])
        named = {"num_query_heads": 2, "softmax_scale": 128**-0.5, "input_layout": "BNSD", "out_dtype": BF16}
        out = call("npu_fused_infer_attention_score_v2", *qdata, **options, **named)[0]
    except RuntimeError as e:
        return f"refused ({shortened(str(e), 80)})"
    q, k, v = (t.float() for t in floats)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    noise = (out.float() - expected).square().mean() / expected.square().mean()
    return "correct" if float(noise) < 10**-2.0 else "wrong numbers"


def _graphs(card: CheckedDevice) -> str:
    """Capture, replay and compare operators that have no Meta kernel or use seeds."""
    heads = card.to_device(seeded(1, 64, 4, 64).to(BF16))
    rows = heads.flatten(2)
    answers = [
        _captured(card, "npu_fusion_attention", heads, heads, heads, 4, "BSND", scale=0.125),
        _captured(card, "npu_dynamic_quant", rows),
    ]
    if card.device.chip == "a5":
        answers.append(_captured(card, "npu_dynamic_mx_quant", rows, dst_type=FP8_E4M3))
    return "; ".join(answers)


def _captured(card: CheckedDevice, name: str, *args: Any, **kwargs: Any) -> str:
    """The operator name, and whether a graph can capture it."""
    try:
        api: Any = getattr(torch, card.device.backend.tensors)
        expected = card.to_cpu(card.call(name, *args, **kwargs))[0]
        graph = api.NPUGraph()
        with api.graph(graph):
            out = card.call(name, *args, **kwargs)
        graph.replay()
        same = torch.equal(card.to_cpu(out)[0], expected)
        return f"{name} captured" if same else f"{name} captured, but replays other numbers"
    except (RuntimeError, AttributeError, NotImplementedError) as e:
        return f"{name} refused ({shortened(str(e), 160)})"


# ---- speed and cards ----------------------------------------------------------------------------


SIZES = (5120, (512, 4096, 32760))
"""K = N of a Wan layer, and numbers of tokens."""


def _formats(card: CheckedDevice) -> str:
    """Times of MXFP8 matmuls with weights in ND and FRACTAL_NZ, and of quantizing a complete weight."""
    ops, (size, lengths) = bind(card.device).quantized, SIZES
    weight = seeded(size, size)
    e = mx.encode(weight, "mxfp8")
    tensors = (e.qdata, e.scale, e.dual_scale, None, "mxfp8")
    weights = [ops.prepare_weight(*tensors, nz=nz) for nz in (False, True)]
    answers = []
    for tokens in lengths:
        a = ops.quantize_activation(card.to_device(seeded(tokens, size).to(BF16)), "mxfp8")
        nd, nz = (card.seconds(lambda a=a, w=w: ops.quantized_linear(a, w)) for w in weights)  # type: ignore[misc]
        flops = 2 * tokens * size**2 / nd / 1e12
        answers.append(f"{tokens} tokens: ND {nd * 1e6:.0f} us ({flops:.0f} TFLOPS), NZ {nz * 1e6:.0f} us")
    bf16_weight = card.to_device(weight.to(BF16))
    seconds = card.seconds(lambda: card.call("npu_dynamic_mx_quant", bf16_weight, dst_type=FP8_E4M3))
    return "; ".join((*answers, f"quantizing {size} x {size}: {size**2 * 3 / seconds / 1e9:.0f} GB/s"))


def _cards(card: CheckedDevice) -> str:
    api: Any = getattr(torch, card.device.backend.tensors)
    names = [api.get_device_name(i) for i in range(api.device_count())]
    memory = api.mem_get_info(card.device.index or 0)[1] / 2**30
    models = ", ".join(sorted(set(names)))
    return f"{len(names)} devices: {models}; SoC {api.get_soc_version()}; {memory:.1f} GiB"


_INT8, _DUAL = "npu_dynamic_quant", "npu_dynamic_dual_level_mx_quant"
_INFER = "npu_fused_infer_attention_score_v2"
QUESTIONS: tuple[Question, ...] = (
    Question("In which order and dtype does the MX matmul sum?", "npu_quant_matmul", _order_of_sums),
    Question("How does the MX matmul treat the scale bytes 255 and 0?", "npu_quant_matmul", _odd_scales),
    Question("How does the int8 quantizer treat zeros, inf and nan?", _INT8, _odd_rows, chips=ALL_CHIPS),
    Question("Are scale_alg=2 and dst_type_max supported?", "npu_dynamic_mx_quant", _dst_type_max),
    Question("How does the dual-level quantizer apply smooth_scale?", _DUAL, _smooth_scale),
    Question("Which batches and lengths does FP8 attention (mode 7) accept?", _INFER, _fp8_attention),
    Question(
        "Can a graph capture these operators?", "npu_fusion_attention", card_only=_graphs, chips=ALL_CHIPS
    ),
    Question(
        "From how many tokens on is FRACTAL_NZ faster for MXFP8?", "npu_quant_matmul", card_only=_formats
    ),
    Question(
        "How many devices does the card have, and which?", "get_npu_format", card_only=_cards, chips=ALL_CHIPS
    ),
)


def question_cases(device: Device) -> Iterator[CheckCase]:
    """The questions for the chip of this device; none if it has no chip."""
    for q in QUESTIONS:
        if device.chip in q.chips:
            base = Result(part="question", name=q.text, operator=q.operator, used=False)
            yield CheckCase(base, lambda card, base, q=q: _answered(card, base, q))  # type: ignore[misc]


def _answered(card: CheckedDevice, base: Result, q: Question) -> Result:
    if q.ask is None:
        assert q.card_only is not None
        answer = q.card_only(card) if card.real else NO_TWIN
        return replace(base, verdict="answered", answer=answer)
    answer, expected = _ask(q.ask, card.on_cpu), _ask(q.ask, twin.call)
    base = replace(base, answer=answer, expected=expected)
    return replace(base, verdict="answered" if answer == expected else "differs")


def _ask(ask: Callable[[Caller], str], call: Caller) -> str:
    try:
        return ask(call)
    except RuntimeError as e:
        return f"refused ({shortened(str(e), 120)})"
