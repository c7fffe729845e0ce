"""Shared code of the argument checks of all operators: errors, and the numbers of dtypes.

Errors are RuntimeErrors, like torch_npu's, with a fix; their texts are in `data/refusals.toml`. An `int`
argument of an operator takes the number of a dtype: one of torch's or one of torch_npu's.
"""

from __future__ import annotations

import functools
import string
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from ascendit.errors import AscenditError, EnvironmentProblem

CONTRACT, CHIP, IMPORT = "E-TWN-01", "E-CAP-01", "E-TWN-02"
"""Error codes: invalid arguments; an operator that the chip lacks; torch_npu and the twin in one process."""


class TwinError(AscenditError, RuntimeError):
    """A call that the card refuses or silently misreads. `got` is the vendor's text if known."""


class TwinImportError(EnvironmentProblem, ImportError):
    """torch_npu and the twin cannot be used in the same process."""


class _Formatter(string.Formatter):
    """`str.format` with formats for tensors and dtypes: `{x.shape}`, `{number:dtype}`, `{dtypes:or}`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        match format_spec:
            case "or":
                return " or ".join(map(str, value))
            case "list":
                return ", ".join(map(str, value))
            case "[]":
                return str(list(value))
            case "dtype":
                return dtype_label(value)
            case "tensor":
                return str(value is not None and (tuple(value.shape), value.dtype))
        value = tuple(value) if isinstance(value, torch.Size) else value
        return str(super().format_field(value, format_spec))


@functools.cache
def refusals() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """Family -> refusal -> its templates of got, needs and fix, for `_Formatter`."""
    text = (Path(__file__).parent / "data" / "refusals.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def refuse(refusal: str, /, **values: Any) -> NoReturn:
    """Raise TwinError (E-TWN-01). `refusal`: family.name of `data/refusals.toml`; `values`: for its texts."""
    family, _, name = refusal.partition(".")
    row = {key: _Formatter().vformat(text, (), values) for key, text in refusals()[family][name].items()}
    raise TwinError(row["got"], needs=row["needs"], fix=row["fix"], code=CONTRACT)


def require(condition: bool, refusal: str, /, **values: Any) -> None:
    """Raise TwinError (E-TWN-01) unless `condition`; see `refuse`."""
    if not condition:
        refuse(refusal, **values)


class Call(types.SimpleNamespace):
    """The arguments of one call by name, for operators with many; texts of refusals may use them."""

    def require(self, condition: bool, refusal: str, /, **values: Any) -> None:
        """Raise TwinError (E-TWN-01) unless `condition`; see `refuse`."""
        if not condition:
            refuse(refusal, **(vars(self) | values))


INT4, HIFLOAT8, FP8_E5M2, FP8_E4M3, SCALE_E8M0, FP6_E3M2, FP6_E2M3, FP4_E2M1, FP4_E1M2 = 285, *range(290, 298)

DTYPE_NUMBERS: dict[str, int] = {
    "int4": INT4,
    "hifloat8": HIFLOAT8,
    "float8_e5m2": FP8_E5M2,
    "float8_e4m3fn": FP8_E4M3,
    "float8_e8m0fnu": SCALE_E8M0,
    "float6_e3m2": FP6_E3M2,
    "float6_e2m3": FP6_E2M3,
    "float4_e2m1fn_x2": FP4_E2M1,
    "float4_e1m2fn_x2": FP4_E1M2,
}
"""Attributes of torch_npu that are numbers rather than torch dtypes."""

DTYPE_OF_NUMBER: dict[int, torch.dtype] = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    12: torch.qint8,
    13: torch.quint8,
    14: torch.qint32,
    15: torch.bfloat16,
    16: torch.quint4x2,
    23: torch.float8_e5m2,
    24: torch.float8_e4m3fn,
    44: torch.float8_e8m0fnu,
    45: torch.float4_e2m1fn_x2,
    256: torch.float32,
    257: torch.float16,
    283: torch.bfloat16,
    FP8_E5M2: torch.float8_e5m2,
    FP8_E4M3: torch.float8_e4m3fn,
}
"""Number -> torch dtype, for numbers with a torch dtype. Numbers from 256 on are torch_npu's."""

_NUMBER_OF_DTYPE = {dtype: number for number, dtype in reversed(DTYPE_OF_NUMBER.items())}


FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_DTYPES = FLOAT_DTYPES[:2]


def number_of(dtype: torch.dtype) -> int:
    """The number that torch's binding passes for a torch.dtype.

    Raises KeyError for a dtype without a number.
    """
    return _NUMBER_OF_DTYPE[dtype]


def dtype_label(number: int | None) -> str:
    """Name and number of a dtype: `torch_npu.float4_e2m1fn_x2 (296)`."""
    for name, value in DTYPE_NUMBERS.items():
        if value == number:
            return f"torch_npu.{name} ({number})"
    return f"{DTYPE_OF_NUMBER[number]} ({number})" if number in DTYPE_OF_NUMBER else str(number)


def output_dtype(number: int | None, allowed: tuple[torch.dtype, ...], operator: str) -> torch.dtype:
    """The torch dtype of an `output_dtype`.

    Raises TwinError (E-TWN-01) if it is not `allowed`, or is None (int8).
    """
    dtype = None if number is None else DTYPE_OF_NUMBER.get(number)
    got = "None, which means int8" if number is None else dtype_label(number)
    require(dtype in allowed, "call.output_dtype", got=got, operator=operator, allowed=allowed)
    assert dtype is not None
    return dtype
