"""Quantized linear layers on a CUDA card: which kernel computes which scheme, by what the card has.

| scheme             | native from | by                                                       |
|--------------------|-------------|----------------------------------------------------------|
| int8               | sm80        | torch._int_mm                                            |
| fp8                | sm89        | torch._scaled_mm                                         |
| mxfp8, mxfp4, w4a8 | sm100       | torch.nn.functional.scaled_mm, PyTorch 2.10, blocks of 32 |
| mxfp4_dualscale    | never       |                                                          |

Else a weight is decoded to bfloat16, which is exact, and multiplied with sums in float32. It stays codes in
memory: that of one layer is decoded, on each use; or all of them once (`decode-once`).

`matmul` has the kernels, `steps` and `triton_linear` what they are made of. Cards below sm80 take the plain
kernel of `kernels/reference.py`.

Before a kernel is taken, it must give the numbers of `mx` on that very card, on a few tokens: what a version
of PyTorch, CUDA or Triton refuses or gets wrong is passed over, and the reason says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ascendit.device.device import Device
from ascendit.kernels.kernel import Emulate, QuantLinearKernel
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.ops.cuda import triton_linear
from ascendit.ops.cuda.matmul import FEW_TOKENS, DequantizedMatmul, ScaledMatmul
from ascendit.ops.cuda.steps import PLAIN, LinearSteps
from ascendit.quant.schemes import LINEAR_SCHEMES

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
ERROR_LIMITS: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 4e-3}
"""Dtype of tokens -> largest relative error of a kernel that is right."""


@dataclass(frozen=True)
class CudaCard:
    """What is asked of a card."""

    name: str
    capability: tuple[int, int]
    scaled_mm: bool
    """Whether this PyTorch has torch.nn.functional.scaled_mm."""
    hip: bool = False
    """An AMD card: its numbers of capability mean something else."""

    @classmethod
    def of(cls, device: Device) -> CudaCard | None:
        """That of a `cuda` device; None where there is none."""
        if not torch.cuda.is_available():
            return None
        where = torch.device(device.torch_name)
        scaled_mm = hasattr(torch.nn.functional, "scaled_mm")
        capability = torch.cuda.get_device_capability(where)
        return cls(torch.cuda.get_device_name(where), capability, scaled_mm, torch.version.hip is not None)


def list_kernels(device: Device, emulate: Emulate | None) -> tuple[QuantLinearKernel, ...]:
    """Best first; a kernel is tried when it is next in line, once for each card and process."""
    card = CudaCard.of(device)
    return () if card is None else _kernels(card, torch.device(device.torch_name), emulate)


@functools.cache
def _kernels(card: CudaCard, device: torch.device, emulate: Emulate | None) -> tuple[QuantLinearKernel, ...]:
    listed = candidates(card, emulate, *triton_linear.triton_steps())
    return with_trials(listed, lambda scheme, kernel: problem_of_kernel(scheme, kernel, device))


def candidates(
    card: CudaCard, emulate: Emulate | None, fast: LinearSteps | None, why: str
) -> tuple[QuantLinearKernel, ...]:
    """The kernels that a card might have, one operator for each scheme of a weight, the best first.

    `fast`: the steps in Triton; `why`: its version, or why there are none.
    """
    if card.capability < LEAST:
        return ()
    once = emulate == "decode-once"
    how = "decoded once to BF16" if once else "decoded to BF16 on each use"
    triton = f"Triton {why}" if fast else f"PyTorch, {why}"
    steps = [(s, triton if s is fast or fast is None else s.name) for s in (fast, PLAIN) if s]
    found: list[QuantLinearKernel] = []
    for scheme in dict.fromkeys(s.weight for s in LINEAR_SCHEMES.values()):
        if matmul := _native(scheme, card):
            reason = f"native: {matmul}, the rest by"
            found += [ScaledMatmul(s, once).kernel(scheme, f"{reason} {by}") for s, by in steps]
        found += [DequantizedMatmul(s, once).kernel(scheme, f"emulated: {how} by {by}") for s, by in steps]
    return tuple(found)


def _native(scheme: str, card: CudaCard) -> str | None:
    """The name of the matmul that this card has, if it has one."""
    least, name = NATIVE.get(scheme, ((99, 0), ""))
    if card.hip or card.capability < least or (scheme.startswith("mx") and not card.scaled_mm):
        return None
    return name


def with_trials(
    listed: Iterable[QuantLinearKernel], problem: Callable[[str, QuantLinearKernel], str | None]
) -> tuple[QuantLinearKernel, ...]:
    """A kernel for every scheme, which is missing if it has a `problem` in any scheme of its weight.

    w4a8 and mxfp4 share a weight, and so the kernel and its trial.
    """
    found: list[QuantLinearKernel] = []
    for kernel in listed:
        schemes = [s.name for s in LINEAR_SCHEMES.values() if s.weight == kernel.operator]
        trial = functools.cache(partial(_trial, kernel, schemes, problem))
        found += [replace(kernel, operator=s, missing=trial) for s in schemes]
    return tuple(found)


def _trial(
    kernel: QuantLinearKernel,
    schemes: list[str],
    problem: Callable[[str, QuantLinearKernel], str | None],
) -> str:
    """Why this kernel is passed over, "" if it is right."""
    wrong = [p for s in schemes if (p := problem(s, kernel))]
    if not wrong:
        return ""
    log.debug("%s is not taken for %s: %s", kernel.reason, kernel.operator, "; ".join(wrong))
    return f"not {kernel.reason.partition(': ')[2]}: {wrong[0]}"


def problem_of_kernel(scheme: str, kernel: QuantLinearKernel, device: torch.device) -> str | None:
    """What is wrong with a kernel on a device, None if it gives the numbers of `mx`."""
    for tokens, dtype in ((24, torch.float32), (FEW_TOKENS + 24, torch.bfloat16)):
        x, qdata, bias, wanted = _sample(scheme, tokens, dtype)

        def compute(x: Tensor = x, qdata: Encoded = qdata, bias: Tensor = bias) -> Tensor:
            weight = kernel.prepare(qdata, bias, device)
            return kernel.call(kernel.quantize_activation(x.to(device), scheme), weight)

        if found := problem_of(compute, wanted, ERROR_LIMITS[dtype]):
            return found
    return None


def problem_of(compute: Callable[[], Tensor], wanted: Tensor, limit: float) -> str:
    """What is wrong with a result on a card, "" if its relative error is below `limit`."""
    wanted = wanted.cpu()
    try:
        error = float((compute().cpu().double() - wanted).norm() / wanted.norm())
    except Exception as e:  # a compiler, a driver or PyTorch: each has its own
        return f"{type(e).__name__}: {(str(e).strip() or 'no text').splitlines()[0][:120]}"
    return "" if error < limit else f"its numbers are wrong, by {error:.1e} of them"


@functools.cache
def _sample(scheme: str, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Encoded, Tensor, Tensor]:
    """Tokens, an encoded weight, a bias, and their product in float64. The user's seed is not touched."""
    draw = torch.Generator().manual_seed(5)
    row, n, k = LINEAR_SCHEMES[scheme], 72, 544
    x = torch.randn(tokens, k, generator=draw).to(dtype)
    qdata = encode(torch.randn(n, k, generator=draw), row.weight)
    bias = torch.randn(n, generator=draw)
    a = encode(x, row.activation, scale_rule=row.rule)
    return x, qdata, bias, decode(a).double() @ decode(qdata).double().t() + bias.double()
