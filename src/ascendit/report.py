"""Helpers of reports: columns for a terminal, sizes and counts as text, data for JSON."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ascendit.errors import UNSAFE

T = TypeVar("T")
K = TypeVar("K")


REPORT_SUFFIXES = (".html", ".json")
"""Extensions of report files: a page with plots, or the data."""
MIN_WRAPPED = 24
"""Minimum width of a column whose cells are wrapped."""


def columns(
    rows: Iterable[Sequence[str]], *, indent: str = "", first_width: int = 0, width: int | None = None
) -> list[str]:
    """Lines of a table: cells padded to the width of their column, two spaces between, no trailing spaces.

    Right-aligned columns need cells of equal width. `first_width`: minimum width of the first column.
    `width`: of the terminal; a wider table has its last column wrapped, or the other cells below the first.
    """
    rows = list(rows)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    widths[:1] = [max(first_width, *widths[:1])] if widths else []
    cells = ("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows)
    lines = [f"{indent}{line}".rstrip() for line in cells]
    if width is None or not widths or max(map(len, lines)) <= width:
        return lines
    start = len(indent) + sum(widths[:-1]) + 2 * len(widths[:-1])
    if start and width - start >= MIN_WRAPPED:
        heads = (line[:start].ljust(start) for line in lines)
        return [line for head, row in zip(heads, rows, strict=True) for line in wrapped(head, row[-1], width)]
    return [line for row in rows for line in _stacked(row, indent, width)]


def _stacked(row: Sequence[str], indent: str, width: int) -> Iterator[str]:
    """The first cell on its own line, the others below it."""
    if row[0]:
        yield f"{indent}{row[0]}".rstrip()
    if others := "  ".join(cell.strip() for cell in row[1:] if cell.strip()):
        yield from wrapped(f"{indent}  ", others, width)


def wrapped(head: str, text: str, width: int | None) -> list[str]:
    """`head` and `text` in lines of at most `width` columns, as far as the blanks allow; None: one line."""
    if width is None:
        return [f"{head}{text}".rstrip()]
    indent = " " * len(head)
    options: Any = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "  "}
    texts = textwrap.wrap(text, max(width - len(head), 8), **options) or [""]
    return [f"{indent if number else head}{line}".rstrip() for number, line in enumerate(texts)]


def titled(blocks: Iterable[tuple[str, Iterable[str]]]) -> Iterator[tuple[str, str]]:
    """Rows (title, line) of blocks of text, the title only in the first row of its block."""
    for title, lines in blocks:
        for index, line in enumerate(lines):
            yield ("" if index else title), line


def human_bytes(nbytes: int) -> str:
    """Bytes as text: `10.6 GiB`, `14.1 MiB`, `512 B`."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):.1f} {unit}"
    return f"{nbytes} B"


SLOW = 0.1  # GiB/s; below, the unit is that of the number


def pace_text(speed: float) -> str:
    """Bytes per second as text: `1.25 GiB/s`, `14.1 MiB/s`."""
    return f"{human_bytes(int(speed))}/s" if speed < SLOW * 2**30 else f"{speed / 2**30:.2f} GiB/s"


def counted(number: int, noun: str) -> str:
    """A count with its noun: `1 file`, `2 files`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def beginning(text: str, length: int = 60) -> str:
    """The first characters of a long text, with `..`."""
    return text if len(text) <= length else f"{text[: length - 3].rstrip()} .."


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Key -> its items, in the order of first occurrence."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def totals(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Key -> sum, in the order of first occurrence."""
    total: dict[str, int] = {}
    for count in counts:
        for key, number in count.items():
            total[key] = total.get(key, 0) + number
    return total


def json_data(value: Any) -> Any:
    """Convert `value` to JSON data: records by `as_dict` or their fields, paths to text, tuples to lists."""
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if is_dataclass(value):
        return {field.name: json_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: json_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_data(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def selected(record: object, *names: str) -> dict[str, Any]:
    """The attributes `names` of a record as JSON data."""
    return {name: json_data(getattr(record, name)) for name in names}


def json_text(data: Any) -> str:
    """Indented JSON, with paths and other objects as text, and `errors.UNSAFE` characters escaped."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    return UNSAFE.sub(lambda m: m[0] if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)


def short_path(path: Path) -> str:
    """A path as text: relative below the working directory. No flag, and no name of `model_folder`."""
    absolute = Path(os.path.abspath(path))
    try:
        text = str(absolute.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(absolute)
    return f"./{text}" if text == "demo" or text.startswith(("-", "hf:", "ms:")) else text


def numbered(path: Path) -> Iterator[Path]:
    """`out-2.mp4`, `out-3.mp4`, .. for `out.mp4`."""
    return (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))


def free_path(path: Path) -> Path:
    """The first of the `numbered` paths that does not exist."""
    return next(other for other in numbered(path) if not os.path.lexists(other))


def shell_line(args: Iterable[str]) -> str:
    """A command line for bash and zsh; arguments with `errors.UNSAFE` characters become `$'a\\nb'`."""
    return " ".join(_ansi_quoted(arg) if UNSAFE.search(arg) else shlex.quote(arg) for arg in args)


def _ansi_quoted(arg: str) -> str:
    def escape(match: re.Match[str]) -> str:
        number = ord(match[0])
        byte = number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else number if number < 0x80 else None
        return f"\\u{number:04x}" if byte is None else f"\\x{byte:02x}"

    quoted = re.sub(r"[\\']", r"\\\g<0>", arg)
    return f"$'{UNSAFE.sub(escape, quoted)}'"
