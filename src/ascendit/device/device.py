"""Where a model runs, named by one string: cpu, cuda[:N], npu[:N], twin:a2, twin:a3 or twin:a5.

    device = parse_device("twin:a5")
    device.torch_name                   # "cpu": where its tensors are
    device.operators                    # "npu": which family of operators computes on it

Pure data: kinds of device and what they differ in are one table, `BACKENDS`. `ops/open_device.py` opens one.
Importing this imports no torch, so a wrong name is reported before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ascendit.device.chip import CHIPS
from ascendit.device.operator_support import native_on, no_matmul_for
from ascendit.errors import UsageError
from ascendit.quant.schemes import QUANTIZED

DENOISER_DTYPES = ("float32", "bfloat16", "float16")
"""What the denoiser may be told to run in."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a kind of device is like."""

    operators: str
    """Family of operators: cpu, cuda or npu."""
    tensors: str
    """torch's name for where the tensors are."""
    dtype: str | None
    """Of the denoiser where the user says nothing; None: as stored."""
    wide: bool = True
    """Whether it has float64 and complex numbers. Where not, sinusoids and RoPE are float32 there."""


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(operators="cpu", tensors="cpu", dtype=None),
    "cuda": Backend(operators="cuda", tensors="cuda", dtype="bfloat16"),
    "npu": Backend(operators="npu", tensors="npu", dtype="bfloat16", wide=False),
    "twin": Backend(operators="npu", tensors="cpu", dtype="bfloat16", wide=False),
}
DEVICE_NAMES = "cpu, cuda, cuda:N, npu, npu:N, " + ", ".join(f"twin:{chip}" for chip in CHIPS)


@dataclass(frozen=True)
class Device:
    """One place to run. `chip`: a2, a3 or a5; that of an NPU is known once it is open."""

    kind: str
    index: int | None = None
    chip: str | None = None

    def __str__(self) -> str:
        """The name as a user writes it."""
        tail = self.chip if self.kind == "twin" else self.index
        return self.kind if tail is None else f"{self.kind}:{tail}"

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.kind]

    @property
    def operators(self) -> str:
        """cpu, cuda or npu."""
        return self.backend.operators

    @property
    def exact_gelu(self) -> bool:
        """Whether F.gelu does what it is told; a2 and a3 compute the tanh form whatever that is."""
        return self.chip not in ("a2", "a3")

    @property
    def torch_name(self) -> str:
        """For `.to(...)`: `cuda:1`, `npu:0`, and `cpu` for the twin."""
        return self.backend.tensors if self.index is None else f"{self.backend.tensors}:{self.index}"

    @property
    def native_schemes(self) -> frozenset[str]:
        """The quantized schemes that its chip has a matmul for; none where it has no chip of the table."""
        return native_on(self.chip) if self.chip else frozenset()

    def check_schemes(self, schemes: Iterable[str]) -> None:
        """EnvironmentProblem E-CAP-01 for a scheme that its chip has no matmul for, where its name tells."""
        for scheme in sorted(set(schemes) & set(QUANTIZED)):
            if self.chip is not None and scheme not in self.native_schemes:
                raise no_matmul_for(self, self.chip, scheme)

    @property
    def has_attention_kernels(self) -> bool:
        """Whether there are several dense attention kernels to choose from, by `attention=`."""
        return self.operators == "npu"

    def dtype_name(self, dtype: object) -> str | None:
        """torch's name for the denoiser's dtype, None for "as stored".

        `dtype`: such a name, a torch.dtype, or None for this device's default. UsageError E-USE-01 for one
        that the denoiser does not run in.
        """
        if dtype is None:
            found = self.backend.dtype
        else:
            found = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
        if found == "float64" and self.backend.wide:
            return found  # for tests that need an oracle; no flag gives it
        if found is not None and found not in DENOISER_DTYPES:
            raise UsageError(
                f"dtype={found} on {self}",
                needs=" or ".join(DENOISER_DTYPES),
                fix="--set dtype=bfloat16",
            )
        return found


def parse_device(name: object) -> Device:
    """The device of this name; nothing is looked at. UsageError E-USE-01 for a name that is none."""
    text = str(name)
    found = re.fullmatch(r"(cuda|npu)(?::(\d+))?", text)
    if found:
        return Device(found[1], None if found[2] is None else int(found[2]))
    kind, _, chip = text.partition(":")
    if text == "cpu" or (kind == "twin" and chip in CHIPS):
        return Device(kind, chip=chip or None)
    raise UsageError(f"device {text!r}", needs=DEVICE_NAMES, fix="--device cpu")
