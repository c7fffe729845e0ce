"""The exception tree. Every user mistake raises from here; `assert` is for our own.

AscenditError                 exit code
  x UsageError                2    the call: flags, request values, wrong kind of file
    + RequestError            2    a value no model of this kind can run
  x CheckpointError           1    what is on disk is damaged, incomplete or of another class
  x QualityError              1    the result is no good video: not finite, black, wrong length
  x EnvironmentProblem        3    the machine: missing library, no right to write, no device
    + OutOfMemory             4    needed and free memory, and the flag to change
  x Cancelled                 130  stopped between two steps, nothing half-written

Each error says what it got, what it needs and what to do, and has a code from `CODES`. Where a class has a
default code, most of its errors have that one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

CODES: dict[str, str] = {
    "E-USE-01": "bad value for an option",
    "E-USE-02": "file or folder not found",
    "E-USE-03": "output exists already",
    "E-USE-04": "not an image",
    "E-USE-05": "pattern or key that fits no layer",
    "E-USE-06": "output and input lie inside each other",
    "E-REQ-01": "number of frames is not 4n+1",
    "E-REQ-02": "size off the multiple",
    "E-REQ-03": "value out of range",
    "E-REQ-04": "this model needs an image, or takes none",
    "E-CKP-01": "no model recognised in this folder",
    "E-CKP-02": "shard missing, truncated or not safetensors",
    "E-CKP-03": "index names a missing file or one outside the folder",
    "E-CKP-04": "tensors missing, left over, misshapen or of a wrong type",
    "E-CKP-05": "config of another model class",
    "E-CKP-06": "config missing or unreadable",
    "E-CKP-07": "manifest, config and tensors disagree about a layer",
    "E-CKP-08": "weight and scale do not pair, or a scale is not valid",
    "E-CKP-09": "two tensors come to one name",
    "E-CKP-10": "what was written is not what was read",
    "E-QNT-01": "layer or model cannot be quantized as asked",
    "E-QNT-02": "known to lose too much accuracy; needs --force",
    "E-QNT-03": "quantized weights cannot be changed as asked",
    "E-ENG-01": "this engine cannot run such a checkpoint",
    "E-LRA-01": "LoRA key that fits nothing, or half of a pair",
    "E-HUB-01": "hub name, revision or file cannot be had",
    "E-OUT-01": "video is not finite",
    "E-OUT-02": "video is black or flat",
    "E-OUT-03": "check below its limit",
    "E-ENV-01": "library missing",
    "E-ENV-02": "output folder cannot be written",
    "E-ENV-03": "device not present",
    "E-ENV-04": "disk full",
    "E-CAP-01": "this chip has no such operator or scheme",
    "E-TWN-01": "call that an NPU would refuse",
    "E-TWN-02": "torch_npu and the twin in one process",
    "E-MEM-01": "out of memory",
    "E-CAN-01": "cancelled",
}


class AscenditError(Exception):
    """Base of all errors a user can cause or meet.

    `got`: what was found. `needs`: the rule. `fix`: what to do now. `code`: a key of `CODES`.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, got: str, *, needs: str, fix: str, code: str) -> None:
        assert code in CODES, code
        super().__init__(got)
        self.got, self.needs, self.fix, self.code = got, needs, fix, code

    def __str__(self) -> str:
        return f"[{self.code}] {self.got}\n  needs  {self.needs}\n  try    {self.fix}"

    def as_dict(self) -> dict[str, str]:
        """For `--json` and the server."""
        return {"code": self.code, "got": self.got, "needs": self.needs, "try": self.fix}


class UsageError(AscenditError):
    """The call cannot be understood or done as written."""

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
    """The run ended, but what came out is no good video."""


class EnvironmentProblem(AscenditError):
    """The machine lacks something."""

    exit_code = 3


class OutOfMemory(EnvironmentProblem):
    """More memory was needed than is free."""

    exit_code = 4

    def __init__(self, got: str, *, needs: str, fix: str, code: str = "E-MEM-01") -> None:
        super().__init__(got, needs=needs, fix=fix, code=code)


class Cancelled(AscenditError):
    """The user stopped the run."""

    exit_code = 130

    def __init__(self, got: str, *, needs: str, fix: str, code: str = "E-CAN-01") -> None:
        super().__init__(got, needs=needs, fix=fix, code=code)


PHRASES = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch, a driver or Python says that memory ran out."""
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(p in str(error).lower() for p in PHRASES)


def out_of_memory(error: BaseException, stage: str = "", device: str = "cpu") -> OutOfMemory:
    """The error to show. `stage`: of the progress events; `device`: as given to `--device`."""
    if isinstance(error, OutOfMemory):
        return error
    text = str(error)
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?[kKMGT]?i?[bB]\w*)", text)
    free = re.search(r"([\d.]+ [KMG]iB) is free", text)
    left = free[1] if free else (_host_memory() if device == "cpu" else "")
    return OutOfMemory(
        f"out of memory on {device}" + (f" in stage {stage}" if stage else ""),
        needs=(f"{_gib(asked[1])} more" if asked else "more memory") + (f"; {left} is free" if left else ""),
        fix="a smaller --size or --frames; --text-on drop frees the text encoder after use",
    )


def _gib(size: str) -> str:
    """`68719476736 bytes` or kB as `64.0 GiB`; other texts as they are."""
    found = re.fullmatch(r"(\d+) (bytes|kB)\w*", size)
    return f"{int(found[1]) / (2**30 if found[2] == 'bytes' else 2**20):.1f} GiB" if found else size


def _host_memory() -> str:
    try:
        found = re.search(r"MemAvailable:\s+(\d+ kB)", Path("/proc/meminfo").read_text())
    except OSError:
        return ""
    return _gib(found[1]) if found else ""
