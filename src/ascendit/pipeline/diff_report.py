"""What differs between two checkpoints: plain data, as lines for a terminal and as a dict for `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ascendit.checkpoint.groups import grouped
from ascendit.checkpoint.names import sort_names
from ascendit.pipeline.inspect_report import Report, human_bytes

Kind = Literal["part", "tensor", "scheme", "smoothing", "shape", "dtype", "attention", "config"]
LAYER_KINDS = ("scheme", "smoothing", "attention")
"""Changes of these kinds have the name of a layer, the others that of a tensor."""
SHOWN = 12  # lines for one kind of difference on a screen; --json has all
WIDTH = 100
NOT_COMPARED = "not compared: headers only (both need the sha256 of the same files in ascendit.json)"
SAME_HEADERS = "the same headers and configs, other numbers"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that differs. `a`, `b`: plain values; None where that side has no such thing."""

    part: str
    kind: Kind
    name: str
    a: Any
    b: Any

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("part", "kind", "name", "a", "b")}


@dataclass(frozen=True, kw_only=True)
class Diff:
    """What differs between the checkpoints `a` and `b`."""

    a: Report
    b: Report
    changes: tuple[Change, ...]
    hashes: str
    """`same`, `different`, or why they say nothing."""

    @property
    def same(self) -> bool:
        """Whether nothing differs that was compared."""
        return not self.changes and self.hashes != "different"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain data."""
        return {
            "same": self.same,
            "a": _side(self.a),
            "b": _side(self.b),
            "hashes": self.hashes,
            "changes": [change.as_dict() for change in self.changes],
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        sides = [_side(self.a), _side(self.b)]
        lines = [
            f"{title:<9}  {side['name']}   layout {side['kind']}   {side['format']}   "
            f"{human_bytes(side['nbytes'])}   {side['path']}"
            for title, side in zip(("A", "B"), sides, strict=True)
        ]
        for title, report in (("A", self.a), ("B", self.b)):
            lines += [f"{'Problem':<9}  {title}  {text}" for text in report.problem_texts()]
        for title, changes in _by_part(self.changes):
            lines += ["", title, *_part_lines(changes, self)]
        before, after = (side["nbytes"] for side in sides)
        ratio = f"   {after / before:.3f} x" if before else ""
        lines += [
            "",
            f"{'Bytes':<9}  {human_bytes(before)} -> {human_bytes(after)} in the transformers{ratio}",
        ]
        source = "" if self.hashes == NOT_COMPARED else " by the sha256 in ascendit.json"
        lines.append(f"{'Values':<9}  {self.hashes}{source}")
        verdict = f"{len(self.changes)} differences"
        if not self.changes:
            same = self.hashes != "different"
            verdict = "headers and configs are the same" if same else SAME_HEADERS
        return [*lines, f"{'Result':<9}  {verdict}"]


def _side(report: Report) -> dict[str, Any]:
    formats = dict.fromkeys(part.format for part in report.experts)
    return {
        "name": report.layout.name,
        "path": str(report.layout.root),
        "kind": report.layout.kind,
        "ok": report.ok,
        "format": " / ".join(formats),
        "nbytes": sum(part.nbytes for part in report.experts),
    }


def _by_part(changes: Iterable[Change]) -> Iterator[tuple[str, list[Change]]]:
    """The changes of each part; parts that differ in the same way stand together."""
    parts: dict[str, list[Change]] = {}
    for c in changes:
        parts.setdefault(c.part, []).append(c)
    alike: dict[str, list[str]] = {}
    for part, found in parts.items():
        alike.setdefault(repr([(c.kind, c.name, c.a, c.b) for c in found]), []).append(part)
    for names in alike.values():
        yield ", ".join(names), parts[names[0]]


def _part_lines(changes: list[Change], found: Diff) -> list[str]:
    """Equal changes of many layers share a line; those of a config have one each."""
    alike: dict[tuple[str, ...], list[Change]] = {}
    for c in changes:
        alike.setdefault(_what(c), []).append(c)
    texts: dict[str, list[str]] = {}
    for what, members in alike.items():
        texts.setdefault(what[0], []).append(_alike_text(members, found))
    return [line for title, lines in texts.items() for line in _limited(title, lines)]


def _what(change: Change) -> tuple[str, ...]:
    """Title first; changes that have all of it in common are alike."""
    if change.kind in ("tensor", "part"):
        return (f"only in {'A' if change.b is None else 'B'}",)
    alone = (change.name,) if change.kind == "config" else ()
    return (change.kind, _text(change.a), _text(change.b), *alone)


def _alike_text(members: list[Change], found: Diff) -> str:
    first = members[0]
    step = f"{_text(first.a)} -> {_text(first.b)}"
    if first.kind == "config":
        return f"{first.name}  {step}"
    names = [c.name for c in members]
    words = ", ".join(_words(first, names, found))
    many = f"   ({len(names)})" if len(names) > 1 else ""
    return f"{words}{many}" if first.kind in ("tensor", "part") else f"{step}   {words}{many}"


def _words(change: Change, names: list[str], found: Diff) -> Iterator[str]:
    """`blocks.0-4` for layers, `bias of blocks.0-4` for tensors."""
    if change.kind == "part":
        yield from names
        return
    every = _every_name(change, found) + names
    if change.kind in LAYER_KINDS:
        yield from grouped(names, dict.fromkeys(every))
        return
    owners = _by_role(every)
    for role, chosen in _by_role(names).items():
        words = ", ".join(grouped(chosen, owners[role]))
        yield f"{role} of {words}" if words else role


def _by_role(names: Iterable[str]) -> dict[str, dict[str, None]]:
    """Last part of a name -> what stands before it, in order."""
    owners: dict[str, dict[str, None]] = {}
    for name in names:
        owner, _, role = name.rpartition(".")
        owners.setdefault(role, {}).update({owner: None} if owner else {})
    return owners


def _limited(title: str, texts: list[str]) -> Iterator[str]:
    more = len(texts) - SHOWN
    shown = texts[:SHOWN] + ([f"and {more} more; --json has all"] if more > 0 else [])
    for index, text in enumerate(shown):
        yield f"  {'' if index else title:<9}  {text}"


def _every_name(change: Change, found: Diff) -> list[str]:
    """The names of that sort on both sides, so that a group says no more than it means."""
    every: dict[str, None] = {}
    for part in (p for report in (found.a, found.b) for p in report.parts if p.name == change.part):
        if part.summary is None:
            every |= dict.fromkeys(t.name for t in part.tensors)
        elif change.kind == "attention":
            every |= dict.fromkeys(part.summary.attentions)
        else:
            layers = change.kind in LAYER_KINDS
            every |= dict.fromkeys(part.summary.linears if layers else part.summary.expert.tensors)
    return sort_names(every)


def _text(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
