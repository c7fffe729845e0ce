"""Encoding a weight that is never in memory as a whole: some rows at a time, into the same buffers."""

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
    """Rows of a weight [N, K], on the CPU -> `Encoded`, bit-identical to `mx.encode` of those rows.

    `length` is K. `buffers`: how many results are valid at a time. `threads`: of the compiled kernels, by
    default those of PyTorch. With `measure`, `sums` has those of x^2 and (x - decoded)^2 over all rows since
    the last `restart`, float64 [2]. UsageError E-USE-01 for what does not go together, and for
    `msms:ceil_x:search`, which must see the whole weight: `ScaleSearch` gives the rule to use instead.
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
        form = lookup(format)
        rule = resolve_rule(form, scale_rule)
        mode = resolve_rounding(form, rule, rounding)
        check_dtype(dtype, form, rule)
        if rule == SEARCH:
            raise UsageError(
                f"scale rule {rule!r} for some rows of a weight",
                needs="one constant for the whole weight",
                fix="look for it with mx.row_encoder.ScaleSearch, and give its rule",
            )
        self._form, self._length, self._dtype, self._max_rows = form, length, dtype, max_rows
        self._measure, self._threads = measure, threads
        self._encode = encoder.encoder(form, rule, mode, dtype, threads)
        self._buffers = [encoder.empty_parts(form, max_rows, length) for _ in range(buffers)]
        self.sums = torch.zeros(2, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> Encoded:
        """[n, K], n at most `max_rows` -> views of the next buffer, valid until its next turn."""
        if rows.dtype != self._dtype or rows.ndim != 2 or not 0 < len(rows) <= self._max_rows:
            raise _wrong_rows(rows, f"{self._dtype} [1 to {self._max_rows}, {self._length}]")
        if rows.shape[1] != self._length:
            raise _wrong_rows(rows, f"rows of {self._length}")
        rows = rows.detach().contiguous()
        self._buffers.append(buffer := self._buffers.pop(0))
        out = buffer.rows(0, len(rows))
        self._encode(rows, out)
        if self._measure:
            self._add_energies(rows, out)
        return self._encoded(out)

    def _encoded(self, parts: Parts) -> Encoded:
        qdata = parts.qdata.view(getattr(torch, self._form.qdata_dtype))
        dual = None if parts.dual is None else parts.dual.unsqueeze(-1)
        return Encoded(qdata, parts.scale, dual, self._form.name, -1, (len(qdata), self._length))

    def _add_energies(self, rows: Tensor, parts: Parts) -> None:
        if native_encoder.add_energies(rows, parts, self._form, self.sums, self._threads):
            return
        step = max(1, encoder.REFERENCE_PIECE // self._length)
        for start in range(0, len(rows), step):
            wide = rows[start : start + step].to(torch.float64)
            noise = wide - decode(self._encoded(parts.rows(start, start + step))).to(torch.float64)
            self.sums += torch.stack((wide.square().sum(), noise.square().sum()))

    def restart(self) -> None:
        """Forget what was measured."""
        self.sums.zero_()

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB, as `mx.sqnr`: inf without noise, NaN if not finite."""
        return decibels(*self.sums.tolist())


def first_bad_row(encoded: Encoded) -> int | None:
    """The first row of a weight [N, K] that held an infinity or a NaN."""
    scale = encoded.scale
    if scale.is_floating_point():
        bad = scale.isnan().flatten().nonzero()
        return int(bad[0]) if len(bad) else None
    found = scale.numpy().tobytes().find(NAN_BYTE)  # a search of bytes takes no threads
    return None if found < 0 else found // scale.shape[1]


class ScaleSearch:
    """`msms:ceil_x:search` for a weight that is read in pieces: one constant for the whole of it."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(msmodelslim.CEIL_X_CANDIDATES), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Some rows, bfloat16 or float32 [n, K], on the CPU."""
        encoder.add_ceil_x_sums(rows.detach().contiguous(), self._sums)

    def best(self) -> str:
        """The rule, as `msms:ceil_x:7.25`: what `mx.encode` finds on the whole tensor."""
        return f"msms:ceil_x:{msmodelslim.best_ceil_x(self._sums.tolist()):g}"


def _wrong_rows(rows: Tensor, needs: str) -> UsageError:
    return UsageError(
        f"rows {rows.dtype} {tuple(rows.shape)}",
        needs=needs,
        fix="give what the encoder was made for",
    )
