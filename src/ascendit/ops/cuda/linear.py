"""Choose the kernel of each quantized scheme on a CUDA GPU, by compute capability and PyTorch version.

| scheme             | native from | by                                                       |
|--------------------|-------------|----------------------------------------------------------|
| int8               | sm80        | torch._int_mm                                            |
| int8_block         | sm80        | torch._int_mm for each 128 of K                          |
| fp8                | sm89        | torch._scaled_mm                                         |
| mxfp8, mxfp4, w4a8 | sm100       | torch.nn.functional.scaled_mm, PyTorch 2.10, blocks of 32 |
| mxfp4_dualscale    | never       |                                                          |

Otherwise a weight is dequantized to bfloat16, which is exact, and multiplied with float32 accumulation. It is
stored quantized and dequantized one layer at a time on each use, or all layers once (`decode-once`).

`matmul` has the kernels, `steps` and `triton_linear` the operations they consist of. GPUs below sm80 use the
reference kernel of `kernels/reference.py`.

Before a kernel is used, it must reproduce `mx` on this GPU for a small input. A kernel that this version of
PyTorch, CUDA or Triton rejects or computes wrongly is skipped, and the reason in the log says so.
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
from ascendit.kernels import reference
from ascendit.kernels.kernel import Emulate, QuantLinearKernel
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.mx.formats import lookup
from ascendit.ops.cuda import triton_linear
from ascendit.ops.cuda.matmul import FEW_ROWS, DequantizedMatmul, ScaledMatmul, TileMatmul
from ascendit.ops.cuda.steps import PLAIN, LinearSteps
from ascendit.quant.schemes import LINEAR_SCHEMES

log = logging.getLogger("ascendit")

MIN_CAPABILITY = (8, 0)
"""Compute capability with bfloat16 on tensor cores."""
NATIVE: Mapping[str, tuple[tuple[int, int], str]] = {
    "int8": ((8, 0), "torch._int_mm"),
    "int8_block": ((8, 0), "torch._int_mm for each 128 of K"),
    "fp8": ((8, 9), "torch._scaled_mm"),
    "mxfp8": ((10, 0), "scaled_mm with blocks of 32"),
    "mxfp4": ((10, 0), "scaled_mm with blocks of 32, FP4 stored as e4m3"),
}
"""Scheme of a weight -> lowest compute capability that has its matmul, and the name of that matmul."""
ERROR_LIMITS: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 4e-3}
"""Dtype of the activation -> largest relative error of a correct kernel."""


@dataclass(frozen=True)
class CudaCard:
    """The properties of a GPU that decide its kernels."""

    name: str
    capability: tuple[int, int]
    scaled_mm: bool
    """Whether this PyTorch has torch.nn.functional.scaled_mm."""
    hip: bool = False
    """An AMD GPU, whose capability numbers have another meaning."""

    @classmethod
    def from_device(cls, device: Device) -> CudaCard | None:
        """The GPU of a `cuda` device; None if CUDA is not available."""
        if not torch.cuda.is_available():
            return None
        gpu = torch.device(device.torch_name)
        scaled_mm = hasattr(torch.nn.functional, "scaled_mm")
        capability = torch.cuda.get_device_capability(gpu)
        return cls(torch.cuda.get_device_name(gpu), capability, scaled_mm, torch.version.hip is not None)


def list_kernels(device: Device, emulate: Emulate | None) -> tuple[QuantLinearKernel, ...]:
    """The kernels of a GPU, best first. Each is checked before its first use, once per GPU and process."""
    card = CudaCard.from_device(device)
    return () if card is None else _kernels(card, torch.device(device.torch_name), emulate)


@functools.cache
def _kernels(card: CudaCard, device: torch.device, emulate: Emulate | None) -> tuple[QuantLinearKernel, ...]:
    listed = candidates(card, emulate, *triton_linear.triton_steps())
    return with_trials(listed, lambda scheme, kernel: problem_of_kernel(scheme, kernel, device))


def candidates(
    card: CudaCard, emulate: Emulate | None, fast: LinearSteps | None, triton: str
) -> tuple[QuantLinearKernel, ...]:
    """The kernels that a GPU may have, one operator for each scheme of a weight, best first.

    `fast`: the steps in Triton; `triton`: its version, or why it is missing.
    """
    if card.capability < MIN_CAPABILITY:
        return ()
    once = emulate == "decode-once"
    method = "decoded once to BF16" if once else "decoded to BF16 on each use"
    label = f"Triton {triton}" if fast else f"PyTorch, {triton}"
    steps = [(s, label if s is fast or fast is None else s.name) for s in (fast, PLAIN) if s]
    kernels: list[QuantLinearKernel] = []
    for scheme in dict.fromkeys(s.weight for s in LINEAR_SCHEMES.values()):
        matmul = _native(scheme, card)
        if lookup(scheme).tile:
            if matmul:
                kernels.append(TileMatmul().kernel(scheme, f"native: {matmul}, other steps by PyTorch"))
            reason = f"emulated: {method.replace('BF16', 'float32')} by PyTorch"
            kernels.append(reference.quant_linear_kernel(scheme, emulate, reason))
            continue
        if matmul:
            reason = f"native: {matmul}, other steps by"
            kernels += [ScaledMatmul(s, once).kernel(scheme, f"{reason} {by}") for s, by in steps]
        reason = f"emulated: {method}"
        kernels += [DequantizedMatmul(s, once).kernel(scheme, f"{reason} by {by}") for s, by in steps]
    return tuple(kernels)


def _native(scheme: str, card: CudaCard) -> str | None:
    """The name of this GPU's matmul for a scheme; None if it has none."""
    required, name = NATIVE.get(scheme, ((99, 0), ""))
    if card.hip or card.capability < required or (scheme.startswith("mx") and not card.scaled_mm):
        return None
    return name


def with_trials(
    listed: Iterable[QuantLinearKernel], problem: Callable[[str, QuantLinearKernel], str | None]
) -> tuple[QuantLinearKernel, ...]:
    """One kernel per scheme, which counts as missing if `problem` finds one in any scheme of its weight.

    w4a8 and mxfp4 share a weight, and therefore the kernel and its trial.
    """
    kernels: list[QuantLinearKernel] = []
    for kernel in listed:
        schemes = [s.name for s in LINEAR_SCHEMES.values() if s.weight == kernel.operator]
        trial = functools.cache(partial(_trial, kernel, schemes, problem))
        kernels += [replace(kernel, operator=s, missing=trial) for s in schemes]
    return tuple(kernels)


def _trial(
    kernel: QuantLinearKernel,
    schemes: list[str],
    problem: Callable[[str, QuantLinearKernel], str | None],
) -> str:
    """Why this kernel is skipped, "" if it is correct."""
    problems = [p for s in schemes if (p := problem(s, kernel))]
    if not problems:
        return ""
    log.debug("%s is not used for %s: %s", kernel.reason, kernel.operator, "; ".join(problems))
    return f"not {kernel.reason.partition(': ')[2]}: {problems[0]}"


def problem_of_kernel(scheme: str, kernel: QuantLinearKernel, device: torch.device) -> str | None:
    """Describe the problem of a kernel on a device; None if it reproduces `mx`."""
    for rows, dtype in ((24, torch.float32), (FEW_ROWS + 24, torch.bfloat16)):
        x, encoded, bias, expected = _sample(scheme, rows, dtype)

        def compute(x: Tensor = x, encoded: Encoded = encoded, bias: Tensor = bias) -> Tensor:
            weight = kernel.prepare(encoded, bias, device)
            return kernel.call(kernel.quantize_activation(x.to(device), scheme), weight)

        if problem := problem_of(compute, expected, ERROR_LIMITS[dtype]):
            return problem
    return None


def problem_of(compute: Callable[[], Tensor], expected: Tensor, limit: float) -> str:
    """The problem of a result [..], "" if its relative error to float64 `expected` is below `limit`."""
    expected = expected.cpu()
    try:
        error = float((compute().cpu().double() - expected).norm() / expected.norm())
    except Exception as e:  # compilers, drivers and PyTorch raise types of their own
        return f"{type(e).__name__}: {(str(e).strip() or 'no text').splitlines()[0][:120]}"
    return "" if error < limit else f"relative error {error:.1e} exceeds {limit:g}"


@functools.cache
def _sample(scheme: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Encoded, Tensor, Tensor]:
    """Activation, quantized weight, bias and their float64 result. Uses its own generator."""
    generator = torch.Generator().manual_seed(5)
    resolved, n, k = LINEAR_SCHEMES[scheme], 72, 544
    x = torch.randn(rows, k, generator=generator).to(dtype)
    encoded = encode(torch.randn(n, k, generator=generator), resolved.weight)
    bias = torch.randn(n, generator=generator)
    a = encode(x, resolved.activation, scale_rule=resolved.rule)
    return x, encoded, bias, decode(a).double() @ decode(encoded).double().t() + bias.double()
