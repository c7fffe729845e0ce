"""Linear layers on codes on a CUDA card: which form computes which scheme, by what the card has.

| scheme             | native from | by                                                       |
|--------------------|-------------|----------------------------------------------------------|
| int8               | sm80        | torch._int_mm                                            |
| fp8                | sm89        | torch._scaled_mm                                         |
| mxfp8, mxfp4, w4a8 | sm100       | torch.nn.functional.scaled_mm, PyTorch 2.10, blocks of 32 |
| mxfp4_dualscale    | never       |                                                          |

Else a weight is decoded to bfloat16, which is exact, and multiplied with sums in float32. It stays codes in
memory: that of one layer is decoded, on each use; or all of them once (`decode-once`).

`cuda_codes` has the native forms, `cuda_values` the others, `cuda_steps` and `cuda_launch` what both are made
of. Cards below sm80 take the plain form of `ops/quant_linear.py`.

Before a form is taken, it must give the numbers of `mx` on that very card, on a few tokens: what a version of
PyTorch, CUDA or Triton refuses or gets wrong is passed over, and the reason says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ascendit.mx.codec import decode, encode
from ascendit.mx.encoded import Encoded
from ascendit.ops.cuda import triton_linear as cuda_launch
from ascendit.ops.cuda.dequantized_matmul import FEW_TOKENS, ValuesForm
from ascendit.ops.cuda.scaled_matmul import CodesForm
from ascendit.ops.cuda.steps import PLAIN, Steps
from ascendit.ops.quant_linear import SCHEMES, Emulate, LinearChoice, LinearForm

if TYPE_CHECKING:
    from ascendit.device.backends import Device

log = logging.getLogger("ascendit")

LEAST = (8, 0)
"""Of compute capability: bfloat16 on tensor cores."""
NATIVE: Mapping[str, tuple[tuple[int, int], str]] = {
    "int8": ((8, 0), "torch._int_mm"),
    "fp8": ((8, 9), "torch._scaled_mm"),
    "mxfp8": ((10, 0), "scaled_mm with blocks of 32"),
    "mxfp4": ((10, 0), "scaled_mm with blocks of 32, FP4 put into e4m3"),
}
"""Scheme of a weight -> compute capability from which its matmul is there, and its name."""
LIMITS: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 4e-3}
"""Dtype of tokens -> largest relative error of a form that is right."""


@dataclass(frozen=True)
class Card:
    """What is asked of a card."""

    name: str
    capability: tuple[int, int]
    scaled_mm: bool
    """Whether this PyTorch has torch.nn.functional.scaled_mm."""
    hip: bool = False
    """An AMD card: its numbers of capability mean something else."""

    @classmethod
    def of(cls, device: Device) -> Card | None:
        """That of a `cuda` device; None where there is none."""
        if not torch.cuda.is_available():
            return None
        where = torch.device(device.torch_name)
        scaled_mm = hasattr(torch.nn.functional, "scaled_mm")
        capability = torch.cuda.get_device_capability(where)
        return cls(torch.cuda.get_device_name(where), capability, scaled_mm, torch.version.hip is not None)


def forms(device: Device, emulate: Emulate | None) -> Mapping[str, LinearChoice]:
    """Scheme -> who computes it on this card; looked at, and tried, when it is asked for."""
    card = Card.of(device)
    return {} if card is None else _forms(card, device, emulate)


@functools.cache
def _forms(card: Card, device: Device, emulate: Emulate | None) -> Chosen:
    """One for each card and process: a form is tried once."""
    fast, version = cuda_launch.steps()
    listed = candidates(card, emulate, fast, version)
    return Chosen(listed, lambda scheme, form: problem(scheme, form, device))


def candidates(
    card: Card, emulate: Emulate | None, fast: Steps | None, why: str
) -> Mapping[str, tuple[LinearChoice, ...]]:
    """Scheme of a weight -> the forms that a card might have for it, the best first.

    `fast`: the steps in Triton; `why`: its version, or why there are none.
    """
    if card.capability < LEAST:
        return {}
    once = emulate == "decode-once"
    how = "decoded once to BF16" if once else "decoded to BF16 on each use"
    triton = f"Triton {why}" if fast else f"PyTorch, {why}"
    found: dict[str, tuple[LinearChoice, ...]] = {}
    for scheme in dict.fromkeys(s.weight for s in SCHEMES.values()):
        row: list[LinearChoice] = []
        for steps in (fast, PLAIN):
            if steps and (matmul := _native(scheme, card)):
                by = triton if steps is fast or fast is None else steps.name
                row.append(LinearChoice(CodesForm(steps, once).form(), f"native: {matmul}, the rest by {by}"))
        for steps in (fast, PLAIN):
            if steps:
                by = triton if steps is fast or fast is None else steps.name
                row.append(LinearChoice(ValuesForm(steps, once).form(), f"emulated: {how} by {by}"))
        found[scheme] = tuple(row)
    return found


def _native(scheme: str, card: Card) -> str | None:
    """The name of the matmul that this card has, if it has one."""
    least, name = NATIVE.get(scheme, ((99, 0), ""))
    if card.hip or card.capability < least or (scheme.startswith("mx") and not card.scaled_mm):
        return None
    return name


@dataclass(frozen=True)
class Chosen(Mapping[str, LinearChoice]):
    """Scheme -> the first of its candidates without a `problem`; w4a8 is computed by what mxfp4 is."""

    candidates: Mapping[str, tuple[LinearChoice, ...]]
    problem: Callable[[str, LinearForm], str | None]
    _found: dict[str, LinearChoice | None] = field(default_factory=dict)

    def __getitem__(self, scheme: str) -> LinearChoice:
        weight = SCHEMES[scheme].weight
        if weight not in self._found:
            self._found[weight] = self._first(weight)
        if (choice := self._found[weight]) is None:
            raise KeyError(scheme)
        return choice

    def __iter__(self) -> Iterator[str]:
        return (s for s in SCHEMES if SCHEMES[s].weight in self.candidates and self.get(s) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _first(self, weight: str) -> LinearChoice | None:
        passed: list[str] = []
        for choice in self.candidates.get(weight, ()):
            wrong = [
                p for s in SCHEMES.values() if s.weight == weight if (p := self.problem(s.name, choice.form))
            ]
            if not wrong:
                return LinearChoice(choice.form, "; ".join([choice.reason, *passed]))
            log.debug("%s is not taken for %s: %s", choice.reason, weight, "; ".join(wrong))
            passed.append(f"not {choice.reason.partition(': ')[2]}: {wrong[0]}")
        return None


# ---- is a form right on this card? --------------------------------------------------------------


def problem(scheme: str, form: LinearForm, device: Device) -> str | None:
    """What is wrong with a form on a device, None if it gives the numbers of `mx`."""
    torch_device = device.torch_name
    for tokens, dtype in ((24, torch.float32), (FEW_TOKENS + 24, torch.bfloat16)):
        x, codes, bias, wanted = _sample(scheme, tokens, dtype)
        try:
            weight = form.prepare_weight(codes, bias, device)
            out = form.quantized_linear(form.quantize_activation(x.to(torch_device), scheme), weight).cpu()
        except Exception as e:  # a compiler, a driver or PyTorch: each has its own
            return f"{type(e).__name__}: {(str(e).strip() or 'no text').splitlines()[0][:120]}"
        error = float((out.double() - wanted).norm() / wanted.norm())
        if not error < LIMITS[dtype]:
            return f"its numbers are wrong, by {error:.1e} of them"
    return None


@functools.cache
def _sample(scheme: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Encoded, Tensor, Tensor]:
    """Tokens, an encoded weight, a bias, and their product in float64. The user's seed is not touched."""
    draw = torch.Generator().manual_seed(5)
    row, n, k = SCHEMES[scheme], 72, 544
    x = torch.randn(tokens, k, generator=draw).to(dtype)
    codes = encode(torch.randn(n, k, generator=draw), row.weight)
    bias = torch.randn(n, generator=draw)
    a = encode(x, row.activation, scale_rule=row.rule)
    return x, codes, bias, decode(a).double() @ decode(codes).double().t() + bias.double()
