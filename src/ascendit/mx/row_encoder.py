"""Encode a weight in blocks of rows, into reused buffers, so that it is never completely in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx import encoder, msmodelslim, native_encoder
from ascendit.mx.codec import Encoded, check_dtype, decibels, decode
from ascendit.mx.formats import SEARCH, lookup, resolve_rounding, resolve_rule
from ascendit.mx.reference import Parts
from ascendit.mx.scales import NAN_BYTE


class RowEncoder:
    """Encodes rows of a weight [N, K] on the CPU, bit-identical to `mx.encode` of those rows.

    `length`: K. `buffers`: how many results are valid at a time. `threads`: threads of the compiled kernels;
    default: PyTorch's number. With `measure`, `sums` (float64 [2]) holds the sums of x^2 and (x - decoded)^2
    over all rows since the last `restart`. Raises UsageError (E-USE-01) for an invalid combination of format,
    rule, rounding and dtype, and for `msms:ceil_x:search`, which needs the complete weight: use the rule from
    `ScaleSearch` instead.
    """

    def __init__(
        self,
        format: str,
        length: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_rows: int,
        scale_rule: str | None = None,
        rounding: str | None = None,
        measure: bool = False,
        buffers: int = 1,
        threads: int | None = None,
    ) -> None:
        fmt = lookup(format)
        rule = resolve_rule(fmt, scale_rule)
        mode = resolve_rounding(fmt, rule, rounding)
        check_dtype(dtype, fmt, rule)
        if rule == SEARCH:
            raise UsageError(
                f"scale rule {rule!r} for part of a weight",
                needs="a rule with one constant for the whole weight",
                fix="find it with mx.row_encoder.ScaleSearch, and pass its rule",
            )
        self._fmt, self._length, self._dtype, self._max_rows = fmt, length, dtype, max_rows
        self._measure, self._threads = measure, threads
        self._encode = encoder.encoder(fmt, rule, mode, dtype, threads)
        self._buffers = [encoder.empty_parts(fmt, max_rows, length) for _ in range(buffers)]
        self.sums = torch.zeros(2, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> Encoded:
        """Rows [n, K], n up to `max_rows` -> views of the next buffer, valid until that buffer is reused.

        Of a format in tiles, all calls but the last of a weight take a multiple of `Format.tile` rows.
        """
        if rows.dtype != self._dtype or rows.ndim != 2 or not 0 < len(rows) <= self._max_rows:
            raise _wrong_rows(rows, f"{self._dtype} [1 to {self._max_rows}, {self._length}]")
        if rows.shape[1] != self._length:
            raise _wrong_rows(rows, f"rows of {self._length}")
        rows = rows.detach().contiguous()
        self._buffers.append(buffer := self._buffers.pop(0))
        out = buffer.rows(0, len(rows), self._fmt.tile)
        self._encode(rows, out)
        if self._measure:
            self._add_energies(rows, out)
        return self._encoded(out)

    def _encoded(self, parts: Parts) -> Encoded:
        qdata = parts.qdata.view(getattr(torch, self._fmt.qdata_dtype))
        dual = None if parts.dual is None else parts.dual.unsqueeze(-1)
        return Encoded(qdata, parts.scale, dual, self._fmt.name, -1, (len(qdata), self._length))

    def _add_energies(self, rows: Tensor, parts: Parts) -> None:
        if native_encoder.add_energies(rows, parts, self._fmt, self.sums, self._threads):
            return
        step = encoder.reference_rows(self._fmt, self._length)
        for start in range(0, len(rows), step):
            piece = rows[start : start + step].to(torch.float64)
            noise = piece - decode(self._encoded(parts.rows(start, start + step, self._fmt.tile)))
            self.sums += torch.stack((piece.square().sum(), noise.square().sum()))

    def restart(self) -> None:
        """Set `sums` to zero."""
        self.sums.zero_()

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB since `restart`: inf if there is no noise, NaN if a sum is
        not finite.
        """
        return decibels(*self.sums.tolist())


def first_bad_row(encoded: Encoded, rows: Tensor) -> int | None:
    """Index of the first of `rows` [n, K] with an infinity or a NaN; None if all are finite.

    `encoded`: the same rows, quantized (any dtype).
    """
    scale = encoded.scale
    if scale.is_floating_point():
        bad = bool(scale.isnan().any())
    else:
        bad = NAN_BYTE in scale.numpy().tobytes()  # single-threaded, unlike an operator of PyTorch
    return int((~rows.isfinite().all(1)).nonzero()[0]) if bad else None


class ScaleSearch:
    """`msms:ceil_x:search` for a weight that is read in blocks of rows: one constant for all of them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(msmodelslim.CEIL_X_CANDIDATES), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add rows [n, K], bfloat16 or float32, on the CPU."""
        encoder.add_ceil_x_sums(rows.detach().contiguous(), self._sums)

    def best(self) -> str:
        """The rule, e.g. `msms:ceil_x:7.25`, the same as `mx.encode` finds for the complete tensor."""
        return f"msms:ceil_x:{msmodelslim.best_ceil_x(self._sums.tolist()):g}"


def _wrong_rows(rows: Tensor, needs: str) -> UsageError:
    return UsageError(
        f"rows of shape {tuple(rows.shape)} and dtype {rows.dtype}",
        needs=needs,
        fix="pass rows of the dtype and length that this RowEncoder was created for",
    )
