"""What the twin says when a call is wrong. RuntimeErrors, as torch_npu raises them, with what to do."""

from __future__ import annotations

from typing import NoReturn

from ascendit.errors import AscenditError, EnvironmentProblem

CONTRACT, CHIP, IMPORT = "E-TWN-01", "E-CAP-01", "E-TWN-02"
"""Codes: a call against the contract; an operator this chip lacks; two torch_npu in one process."""


class TwinError(AscenditError, RuntimeError):
    """A call that the card refuses, or misreads in silence. `got` is the vendor's text where it is known."""


class TwinImportError(EnvironmentProblem, ImportError):
    """torch_npu and the twin exclude each other in one process."""


def refuse(got: str, *, needs: str, fix: str) -> NoReturn:
    """Raise TwinError for a call against the contract."""
    raise TwinError(got, needs=needs, fix=fix, code=CONTRACT)


def require(holds: bool, got: str, *, needs: str, fix: str) -> None:
    """`refuse` unless `holds`."""
    if not holds:
        refuse(got, needs=needs, fix=fix)
