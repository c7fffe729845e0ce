"""What reports share: columns for a terminal, sizes and counts in words, plain data for JSON. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K")


def columns(rows: Iterable[Sequence[str]], *, indent: str = "", first_width: int = 0) -> list[str]:
    """Lines of a table: cells padded to the widest of their column, two spaces between, none at the end.

    A column can be aligned to the right by cells that are. `first_width`: at least, of the first column.
    """
    rows = list(rows)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    widths[:1] = [max(first_width, *widths[:1])] if widths else []
    lines = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    return [f"{indent}{line}".rstrip() for line in lines]


def titled(blocks: Iterable[tuple[str, Iterable[str]]]) -> Iterator[tuple[str, str]]:
    """Rows of two columns from blocks of text: a title beside the first line of its block."""
    for title, texts in blocks:
        for index, text in enumerate(texts):
            yield ("" if index else title), text


def human_bytes(nbytes: int) -> str:
    """`10.6 GiB`, `14.1 MiB`, `512 B`."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):.1f} {unit}"
    return f"{nbytes} B"


def counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items of each key, in the order in which keys come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def totals(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by key, in the order in which keys come."""
    total: dict[str, int] = {}
    for count in counts:
        for key, number in count.items():
            total[key] = total.get(key, 0) + number
    return total


def plain(value: Any) -> Any:
    """Plain data for JSON: records as their `as_dict` or their fields, paths as text, tuples as lists."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def selected(record: object, *names: str) -> dict[str, Any]:
    """The attributes `names` of a record, as plain data."""
    return {name: plain(getattr(record, name)) for name in names}
