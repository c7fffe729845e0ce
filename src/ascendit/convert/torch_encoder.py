"""`mx.rows.RowEncoder` with the face of `direct.DirectEncoder`. torch is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascendit.convert import stream
from ascendit.convert.direct import NAN_BYTE, Coded, decibels

if TYPE_CHECKING:
    import torch


class TorchEncoder:
    """Encodes rows [n <= max_rows, length]; every rule, every dtype, every machine."""

    def __init__(
        self,
        format: str,
        rule: str,
        length: int,
        dtype: str,
        max_rows: int,
        *,
        measure: bool = False,
    ) -> None:
        """`dtype`: name in torch, as `bfloat16`."""
        import torch

        from ascendit.mx.rows import RowEncoder

        kind: torch.dtype = getattr(torch, dtype)
        self._rows = RowEncoder(
            format, length, dtype=kind, max_rows=max_rows, scale_rule=rule, measure=measure
        )
        self._before = (0.0, 0.0)

    def __call__(self, rows: torch.Tensor) -> Coded:
        """The result is valid until the next call."""
        encoded = self._rows(rows)
        scale, dual = encoded.scale, encoded.dual_scale
        bad = scale.isnan() if scale.is_floating_point() else scale == NAN_BYTE
        bad_row = int(bad.any(-1).nonzero()[0]) if bool(bad.any()) else None
        return Coded(
            stream.as_bytes(encoded.codes),
            stream.as_bytes(scale),
            None if dual is None else stream.as_bytes(dual),
            bad_row,
            len(rows),
        )

    def restart(self) -> None:
        """Forget what was measured."""
        self._before = (self._rows.signal, self._rows.noise)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise since the last `restart`, in dB."""
        signal, noise = self._rows.signal - self._before[0], self._rows.noise - self._before[1]
        return decibels(signal, noise)
