"""Signal to noise in decibels, for every error that is measured here. No torch."""

from __future__ import annotations

import math


def decibels(signal: float, noise: float, *, cap: float = math.inf) -> float:
    """10 log10(signal / noise) of two powers, within [-cap, cap]; NaN if one of them is not finite.

    No noise gives `cap`, even without a signal; noise without a signal gives -cap.
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise <= 0:
        return cap
    ratio = signal / noise
    return max(-cap, min(cap, 10 * math.log10(ratio))) if ratio > 0 else -cap
