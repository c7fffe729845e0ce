"""What `repack` says about a run: plain data, for a terminal and for `--json`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.convert.report import add_up, human_bytes


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """One transformer."""

    name: str
    folder: str
    """Below the output; `.` when it is the output."""
    origin: str
    """Who wrote the source."""
    schemes: Mapping[str, int]
    """Scheme -> number of linear layers; bf16 last."""
    num_tensors: int
    """Written."""
    num_renamed: int
    moved_bytes: int
    """Bytes that are as they were."""
    rewritten_bytes: int
    """Bytes of tensors that were stored otherwise."""
    num_weights: int
    rewritten: Mapping[str, int]
    """What was done -> number of tensors."""
    decoded_sha256: str = ""
    """Of all numbers, the same before and after; empty without `check`."""
    num_checked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        data: dict[str, Any] = {
            "name": self.name,
            "folder": self.folder,
            "origin": self.origin,
            "layers": dict(self.schemes),
            "tensors": self.num_tensors,
            "renamed": self.num_renamed,
            "moved_bytes": self.moved_bytes,
            "rewritten_bytes": self.rewritten_bytes,
            "rewritten": dict(self.rewritten),
        }
        if self.decoded_sha256:
            data |= {"checked": self.num_checked, "decoded_sha256": self.decoded_sha256}
        return data


@dataclass(frozen=True, kw_only=True)
class RepackReport:
    """The whole run. Nothing is ever left over: what cannot be placed is an error."""

    path: Path
    """The folder that was written, or would be."""
    source: str
    layout: str
    """Of the source, in words."""
    to: str
    engine: str | None
    experts: tuple[ExpertReport, ...]
    placed: tuple[str, ...]
    """Other parts that were linked or copied."""
    warnings: tuple[str, ...]
    dry_run: bool
    seconds: float

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme -> number of linear layers in all experts."""
        return add_up(expert.schemes for expert in self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as written."""
        return sum(expert.moved_bytes + expert.rewritten_bytes for expert in self.experts)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all stored tensors, scales included, over the numbers of the model."""
        return 8 * self.nbytes / max(sum(expert.num_weights for expert in self.experts), 1)

    @property
    def gib_per_s(self) -> float:
        """Written bytes per second, 0 for a dry run."""
        return 0.0 if self.dry_run else self.nbytes / 2**30 / max(self.seconds, 1e-9)

    @property
    def checked(self) -> bool:
        """Whether all numbers were compared."""
        return all(expert.decoded_sha256 for expert in self.experts)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "source": self.source,
            "layout": self.layout,
            "to": self.to,
            "engine": self.engine,
            "dry_run": self.dry_run,
            "checked": self.checked,
            "layers": self.schemes,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "seconds": round(self.seconds, 3),
            "gib_per_s": round(self.gib_per_s, 3),
            "experts": [expert.as_dict() for expert in self.experts],
            "placed": list(self.placed),
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """For a terminal: titled rows."""
        rows = [("Source", f"{self.source}  ({self.layout})")]
        rows.append(("Layout", f"for {self.engine}" if self.engine else f"{self.to} names"))
        for expert in self.experts:
            counts = ", ".join(f"{count} {scheme}" for scheme, count in expert.schemes.items())
            renamed = f"{expert.num_tensors} tensors, {expert.num_renamed} under another name, none left over"
            rows += [(expert.name, counts), ("", renamed), ("", _bytes(expert))]
            if expert.decoded_sha256:
                text = (
                    f"{expert.num_checked} tensors decode to the same numbers, sha256 {expert.decoded_sha256}"
                )
                rows.append(("", text))
        rows.append(("Size", f"{human_bytes(self.nbytes)}   {self.bits_per_weight:.2f} bits/weight"))
        rows += [("Also", ", ".join(self.placed))] if self.placed else []
        rows += [("Warning", warning) for warning in self.warnings]
        if self.dry_run:
            rows.append(("Dry run", f"nothing written; it would be {self.path}"))
        else:
            rows.append(("Time", f"{self.seconds:.1f} s, {self.gib_per_s:.2f} GiB/s"))
        width = max(len(title) for title, _ in rows)
        return [f"{title:<{width}}  {text}" for title, text in rows]


def _bytes(expert: ExpertReport) -> str:
    moved = f"{human_bytes(expert.moved_bytes)} as they were"
    if not expert.rewritten:
        return moved
    ways = ", ".join(f"{count} {way}" for way, count in expert.rewritten.items())
    return f"{moved}, {human_bytes(expert.rewritten_bytes)} rewritten ({ways})"
