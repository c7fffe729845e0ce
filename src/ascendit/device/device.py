"""Device names: cpu, cuda[:N], npu[:N], twin:a2, twin:a3 or twin:a5.

    device = parse_device("twin:a5")
    device.torch_name                   # "cpu": the device of its tensors
    device.operators                    # "npu": its family of operators

The kinds of devices are a table, `BACKENDS`; `ops/open_device.py` opens a device. This module does not import
torch, so an invalid name is reported before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ascendit.device.chip import CHIPS
from ascendit.device.operator_support import native_on, no_matmul_for
from ascendit.errors import UsageError
from ascendit.foreign import value_for
from ascendit.option_text import option
from ascendit.quant.schemes import QUANTIZED

DenoiserDtype = Literal["float32", "bfloat16", "float16"]
VaeDtype = Literal["float32", "bfloat16"]
DTYPES = {"dtype": get_args(DenoiserDtype), "vae_dtype": get_args(VaeDtype)}
"""Option -> the dtypes that it takes."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Properties shared by all devices of one kind."""

    operators: str
    """Family of operators: cpu, cuda or npu."""
    tensors: str
    """torch's name of the device of the tensors."""
    dtype: str | None
    """Default dtype of the denoiser; None: the stored dtype."""
    has_float64: bool = True
    """Whether it has float64 and complex numbers. If not, sinusoids and RoPE are computed in float32."""


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(operators="cpu", tensors="cpu", dtype=None),
    "cuda": Backend(operators="cuda", tensors="cuda", dtype="bfloat16"),
    "npu": Backend(operators="npu", tensors="npu", dtype="bfloat16", has_float64=False),
    "twin": Backend(operators="npu", tensors="cpu", dtype="bfloat16", has_float64=False),
}
TWINS = tuple(f"twin:{chip}" for chip in CHIPS)
WITHOUT_INDEX = (*(kind for kind in BACKENDS if kind != "twin"), *TWINS)
"""The names of devices, without those of the second and later ones."""
DEVICE_NAMES = "cpu, cuda, cuda:N, npu, npu:N, " + ", ".join(TWINS)


@dataclass(frozen=True)
class Device:
    """A device to run on. `chip`: a2, a3 or a5; for an NPU it is set when the device is opened."""

    kind: str
    index: int | None = None
    chip: str | None = None

    def __str__(self) -> str:
        """The device name, which `parse_device` accepts."""
        suffix = self.chip if self.kind == "twin" else self.index
        return self.kind if suffix is None else f"{self.kind}:{suffix}"

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.kind]

    @property
    def operators(self) -> str:
        """Its family of operators: cpu, cuda or npu."""
        return self.backend.operators

    @property
    def is_accelerator(self) -> bool:
        """Whether its tensors are outside the host's memory, so that a driver has to open it."""
        return self.backend.tensors != "cpu"

    @property
    def is_emulated(self) -> bool:
        """Whether it is an NPU emulated on the CPU, whose times are those of the CPU."""
        return self.kind == "twin"

    @property
    def has_chip(self) -> bool:
        """Whether it is an Ascend NPU or emulates one."""
        return self.operators == "npu"

    @property
    def exact_gelu(self) -> bool:
        """Whether F.gelu can be exact; a2 and a3 always compute the tanh approximation."""
        return self.chip not in ("a2", "a3")

    @property
    def torch_name(self) -> str:
        """Argument for `.to(...)`: `cuda:1`, `npu:0`; `cpu` for the twin."""
        return self.backend.tensors if self.index is None else f"{self.backend.tensors}:{self.index}"

    @property
    def native_schemes(self) -> frozenset[str]:
        """The quantized schemes with a matmul on its chip; empty if the chip is not set."""
        return native_on(self.chip) if self.chip else frozenset()

    def check_schemes(self, schemes: Iterable[str]) -> None:
        """Raise EnvironmentProblem (E-CAP-01) if the chip is known and has no matmul for one of these
        schemes.
        """
        for scheme in sorted(set(schemes) & set(QUANTIZED)):
            if self.chip is not None and scheme not in self.native_schemes:
                raise no_matmul_for(self, self.chip, scheme)

    def dtype_name(self, dtype: object, keyword: str = "dtype") -> str | None:
        """torch's name of a dtype, by default the denoiser's; None for the stored dtype.

        `dtype`: such a name, a torch.dtype, or None for this device's default. `keyword`: the option that
        sets it. Raises UsageError (E-USE-01) for a dtype not in `DTYPES[keyword]`.
        """
        if dtype is None:
            name = self.backend.dtype
        else:
            name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
        if name == "float64" and self.backend.has_float64:
            return name  # only for tests that need an oracle
        if name is not None and name not in (choices := DTYPES[keyword]):
            raise UsageError(
                f"{keyword}={name} on {self}",
                needs=" or ".join(choices),
                fix=option(keyword, value_for(keyword, name, choices) or "bfloat16"),
            )
        return name


def parse_device(name: object) -> Device:
    """Parse a device name; the device is not opened. Raises UsageError (E-USE-01) for an invalid name."""
    text = str(name)
    match = re.fullmatch(r"(cuda|npu)(?::(\d+))?", text)
    if match:
        return Device(match[1], None if match[2] is None else int(match[2]))
    kind, _, chip = text.partition(":")
    if text == "cpu" or (kind == "twin" and chip in CHIPS):
        return Device(kind, chip=chip or None)
    similar = value_for("device", kind, BACKENDS.keys() - {"twin"}) or value_for("device", text, TWINS)
    raise UsageError(f"device {text!r}", needs=DEVICE_NAMES, fix=option("device", similar or "cpu"))
