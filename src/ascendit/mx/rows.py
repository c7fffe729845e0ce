"""Encoding a weight that is never in memory as a whole: some rows at a time, into the same buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx import fast, msms
from ascendit.mx.codec import check_dtype, decode
from ascendit.mx.encoded import Encoded
from ascendit.mx.formats import lookup, resolve_rounding, resolve_rule
from ascendit.mx.reference import Parts


class RowEncoder:
    """Rows of a weight [N, K], on the CPU -> `Encoded`, bit-identical to `mx.encode` of those rows.

    `length` is K. With `measure`, `signal` and `noise` are the sums of x^2 and (x - decoded)^2 over all rows
    so far, float64. UsageError E-USE-01 for what does not go together, and for `msms:ceil_x:search`, which
    must see the whole weight: `ScaleSearch` gives the rule to use instead.
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
    ) -> None:
        form = lookup(format)
        rule = resolve_rule(form, scale_rule)
        mode = resolve_rounding(form, rule, rounding)
        check_dtype(dtype, form, rule)
        if rule == fast.SEARCH:
            raise UsageError(
                f"scale rule {rule!r} for some rows of a weight",
                needs="one constant for the whole weight",
                fix="look for it with mx.rows.ScaleSearch, and give its rule",
                code="E-USE-01",
            )
        self._form, self._length, self._dtype, self._measure = form, length, dtype, measure
        self._encode = fast.encoder(form, rule, mode, dtype)
        self._out = fast.empty_parts(form, max_rows, length)
        self._sums = torch.zeros(2, dtype=torch.float64)

    def __call__(self, rows: Tensor) -> Encoded:
        """[n, K], n at most `max_rows` -> views of the buffers, valid until the next call."""
        most = self._out.codes.shape[0]
        if rows.dtype != self._dtype or rows.ndim != 2 or not 0 < len(rows) <= most:
            raise _wrong_rows(rows, f"{self._dtype} [1 to {most}, {self._length}]")
        if rows.shape[1] != self._length:
            raise _wrong_rows(rows, f"rows of {self._length}")
        rows, n = rows.detach().contiguous(), len(rows)
        codes, scale, dual = self._out
        out = Parts(codes[:n], scale[:n], None if dual is None else dual[:n])
        self._encode(rows, out)
        codes = out.codes.view(getattr(torch, self._form.codes_dtype))
        dual = None if out.dual is None else out.dual.unsqueeze(-1)
        encoded = Encoded(codes, out.scale, dual, self._form.name, -1, (n, self._length))
        if self._measure and not fast.add_energies(rows, out, self._form, self._sums):
            self._add_energies(rows, encoded)
        return encoded

    def _add_energies(self, rows: Tensor, encoded: Encoded) -> None:
        wide = rows.to(torch.float64)
        noise = wide - decode(encoded).to(torch.float64)
        self._sums += torch.stack((wide.square().sum(), noise.square().sum()))

    @property
    def signal(self) -> float:
        return float(self._sums[0])

    @property
    def noise(self) -> float:
        return float(self._sums[1])

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB, as `mx.sqnr`: inf without noise, nan if anything was not finite."""
        signal, noise = self.signal, self.noise
        if not (math.isfinite(signal) and math.isfinite(noise)):
            return math.nan
        if noise == 0.0:
            return math.inf
        return 10 * math.log10(signal / noise) if signal else -math.inf


class ScaleSearch:
    """`msms:ceil_x:search` for a weight that is read in pieces: one constant for the whole of it."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(msms.CEIL_X_CANDIDATES), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Some rows, bfloat16 or float32 [n, K], on the CPU."""
        fast.add_ceil_x_sums(rows.detach().contiguous(), self._sums)

    def best(self) -> str:
        """The rule, as `msms:ceil_x:7.25`: what `mx.encode` finds on the whole tensor."""
        return f"msms:ceil_x:{msms.best_ceil_x(self._sums.tolist()):g}"


def _wrong_rows(rows: Tensor, needs: str) -> UsageError:
    return UsageError(
        f"rows {rows.dtype} {tuple(rows.shape)}",
        needs=needs,
        fix="give what the encoder was made for",
        code="E-USE-01",
    )
