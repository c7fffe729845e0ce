"""The exception tree. User mistakes raise one of these classes; `assert` is for bugs of ascendit.

AscenditError                 exit code
  x UsageError                2    invalid call: flags, request values, wrong type of file
    + RequestError            2    a request value that this model cannot run
  x CheckpointError           1    files of a model are damaged, incomplete or of another class
  x QualityError              1    the video has NaN or infinite values, is black, a single colour or noise
  x EnvironmentProblem        3    the machine: library missing, no write permission, no device
    + OutOfMemory             4    reports needed and free memory, and the flag to change
  x Cancelled                 130  stopped between two steps or frames; no partial output

Each error has the value received, the rule, an action that fixes it, and a code from `ERROR_CODES`. Some
classes have a default code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ascendit.option_text import for_reader

ERROR_CODES: dict[str, str] = {
    "E-USE-01": "bad value for an option",
    "E-USE-02": "file or folder does not exist",
    "E-USE-03": "output already exists",
    "E-USE-04": "not an image",
    "E-USE-05": "pattern or key matches no layer",
    "E-USE-06": "output folder inside the input folder, or the reverse",
    "E-REQ-01": "number of frames is not 4n+1",
    "E-REQ-02": "width or height is not a multiple of the required number",
    "E-REQ-03": "value out of range",
    "E-REQ-04": "image missing for this model, or not supported by it",
    "E-CKP-01": "folder contains no known model",
    "E-CKP-02": "shard missing, truncated or not safetensors",
    "E-CKP-03": "index or link leads to a missing file, or out of the folder",
    "E-CKP-04": "tensors missing, unexpected, or of the wrong shape or dtype",
    "E-CKP-05": "config of another model class, or one that asks for other code",
    "E-CKP-06": "config missing or unreadable, or with an invalid value",
    "E-CKP-07": "manifest, config and tensors disagree on a layer, or two parts do not fit each other",
    "E-CKP-08": "weight and scale do not match, or a scale is invalid",
    "E-CKP-09": "two tensors map to the same name",
    "E-CKP-10": "data differs from its source or from its record",
    "E-CKP-11": "no sha256 recorded to check files against",
    "E-QNT-01": "layer or model cannot be quantized as requested",
    "E-QNT-02": "known to lose too much accuracy; requires --force",
    "E-QNT-03": "quantized weights cannot be changed as requested",
    "E-ENG-01": "engine cannot run this checkpoint",
    "E-LRA-01": "LoRA key matches no layer, its pair is incomplete, or two of its strengths disagree",
    "E-HUB-01": "hub model, revision or file is not available",
    "E-OUT-01": "video has NaN or infinite values",
    "E-OUT-02": "video is black or a single colour",
    "E-OUT-03": "quality check below its limit",
    "E-OUT-04": "video is noise",
    "E-ENV-01": "library missing",
    "E-ENV-02": "output folder is not writable",
    "E-ENV-03": "device not present",
    "E-ENV-04": "disk full",
    "E-CAP-01": "operator or scheme is not available on this chip",
    "E-TWN-01": "operator call that an NPU would reject",
    "E-TWN-02": "torch_npu and the twin in one process",
    "E-MEM-01": "out of memory",
    "E-CAN-01": "cancelled",
}


class ReaderText:
    """A text attribute; reading it returns the stored text as `option_text.for_reader` rewrites it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, error: object, owner: type) -> str:
        return for_reader(getattr(error, self._name))

    def __set__(self, error: object, text: str) -> None:
        setattr(error, self._name, text)


class AscenditError(Exception):
    """Base class of all errors shown to users.

    `got`: the value received. `needs`: the rule. `fix`: an action. `code`: a key of `ERROR_CODES`.
    They are written with flags, `--scheme mxfp8`, and read in Python as `scheme="mxfp8"`.
    """

    got, needs, fix = ReaderText(), ReaderText(), ReaderText()
    exit_code: ClassVar[int] = 1
    latents: Any = None
    """The clean latents of a run that failed after its last step, float32 [1, z, F, h, w]."""
    kept_in: str = ""
    """The file that these latents were saved in."""
    details: Mapping[str, Any] = MappingProxyType({})
    """More keys of the `--json` object, beside the error."""

    def __init__(self, got: str, *, needs: str, fix: str, code: str) -> None:
        assert code in ERROR_CODES, code
        super().__init__(got)
        self.got, self.needs, self.fix, self.code = got, needs, fix, code

    def __str__(self) -> str:
        got, needs, fix = map(escaped, (self.got, self.needs, self.fix))
        return f"[{self.code}] {got}\n  needs  {needs}\n  try    {fix}"

    def as_dict(self) -> dict[str, str]:
        """Plain data for `--json` and the server; the texts are not escaped."""
        data = {"code": self.code, "got": self.got, "needs": self.needs, "try": self.fix}
        return data | ({"latents": self.kept_in} if self.kept_in else {})


class UsageError(AscenditError):
    """The call is invalid, or cannot be carried out as requested."""

    exit_code = 2

    def __init__(self, got: str, *, needs: str, fix: str, code: str = "E-USE-01") -> None:
        super().__init__(got, needs=needs, fix=fix, code=code)


class RequestError(UsageError):
    """A request value that this model cannot run."""

    def __init__(self, got: str, *, needs: str, fix: str, code: str = "E-REQ-03") -> None:
        super().__init__(got, needs=needs, fix=fix, code=code)


class CheckpointError(AscenditError):
    """The files of a model are damaged, incomplete or of another class."""


class QualityError(AscenditError):
    """The run completed, but the video is not usable."""


class EnvironmentProblem(AscenditError):
    """A library, device, permission or disk space is missing on this machine."""

    exit_code = 3


class OutOfMemory(EnvironmentProblem):
    """More memory is needed than is free."""

    exit_code = 4

    def __init__(self, got: str, *, needs: str, fix: str, code: str = "E-MEM-01") -> None:
        super().__init__(got, needs=needs, fix=fix, code=code)


class Cancelled(AscenditError):
    """The user stopped the run."""

    exit_code = 130

    def __init__(self, got: str, *, needs: str, fix: str, code: str = "E-CAN-01") -> None:
        super().__init__(got, needs=needs, fix=fix, code=code)


UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Characters that change how a terminal or a page shows other text: C0, DEL, C1, line separators, marks that
change the direction of text, and lone surrogates."""


def escaped(text: str) -> str:
    """`text` on one line, with `UNSAFE` characters as `\\n`, `\\x1b` or `\\u202e`.

    File names may contain any bytes; those that are not UTF-8 become `\\xe9`.
    """
    return UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name
        number -= 0xDC00
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0])
    return short or (f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}")


_MEMORY_PHRASES = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, a driver or Python raised this error because memory ran out."""
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    if any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(
        p in str(error).lower() for p in _MEMORY_PHRASES
    )


def out_of_memory(error: BaseException, stage: str = "", device: str = "cpu") -> OutOfMemory:
    """`error` as an OutOfMemory. `stage`: a `Progress.stage`; `device`: the value of `--device`."""
    if isinstance(error, OutOfMemory):
        return error
    text = str(error)
    requested = re.search(r"[Tt]ried to allocate ([\d.]+ ?[kKMGT]?i?[bB]\w*)", text)
    free = re.search(r"([\d.]+ [KMG]iB) is free", text)
    available = free[1] if free else (_host_memory() if device == "cpu" else "")
    return OutOfMemory(
        f"out of memory on {device}" + (f" in stage {stage}" if stage else ""),
        needs=(f"{_gib(requested[1])} more" if requested else "more memory")
        + (f"; {available} is free" if available else ""),
        fix="use a smaller --size or fewer --frames; --text-on drop frees the text encoder after use",
    )


def _gib(size: str) -> str:
    """Convert a text such as `68719476736 bytes` (or kB) to `64.0 GiB`; other texts are unchanged."""
    match = re.fullmatch(r"(\d+) (bytes|kB)\w*", size)
    return f"{int(match[1]) / (2**30 if match[2] == 'bytes' else 2**20):.1f} GiB" if match else size


def _host_memory() -> str:
    try:
        match = re.search(r"MemAvailable:\s+(\d+ kB)", Path("/proc/meminfo").read_text())
    except OSError:
        return ""
    return _gib(match[1]) if match else ""
