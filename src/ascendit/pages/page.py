"""Report files: the data as JSON, or a self-contained HTML page with tables, plots and pictures.

A page needs no network and no script, and is readable in light and dark. Every text of it is escaped: names
come from files.
"""

from __future__ import annotations

import base64
import contextlib
import html
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ascendit.checkpoint.file_copy import check_writable, write_error
from ascendit.errors import EnvironmentProblem, UsageError, escaped
from ascendit.pages import charts
from ascendit.report import REPORT_SUFFIXES, free_path, json_text, shell_line, short_path
from ascendit.version import versions

_NUMBER = re.compile(r"[-+]?[\d.,]+(?:e[-+]?\d+)?(?: ?/ ?[\d.]+)?(?: ?(?:dB|%|x|[KMG]iB|B))?(?: +[\d.]+%)?")
Tone = str
"""`good`, `bad`, or "" for plain text."""


# ---- the parts of a page ------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell of a table with a colour."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under column titles. Numbers are right-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    folded: bool = False
    """Show it only when its title is clicked; for long tables."""

    def markup(self) -> str:
        """HTML of the table."""
        numeric = [_is_numeric(column) for column in zip(*self.rows, strict=True)] or [False] * len(self.head)
        head = "".join(_cell("th", *pair) for pair in zip(self.head, numeric, strict=True))
        cells = (zip(row, numeric, strict=True) for row in self.rows)
        rows = "\n".join(f"<tr>{''.join(_cell('td', *pair) for pair in row)}</tr>" for row in cells)
        table = (
            f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
        )
        if self.folded:
            return f"<details><summary>{_text(self.title)}</summary>{table}</details>"
        return f"<div class='table'>{_heading(self.title)}{table}</div>"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot: `svg` from `charts`, and a sentence about it."""

    svg: str
    caption: str

    def markup(self) -> str:
        """HTML of the figure."""
        return f"<figure>{self.svg}<figcaption>{_text(self.caption)}</figcaption></figure>"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """PNG images in a row, each with a caption."""

    images: Sequence[tuple[str, bytes]]
    title: str = ""

    def markup(self) -> str:
        """HTML of the pictures."""
        figures = ""
        for caption, png in self.images:
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            image = f"<img alt='{_text(caption)}' src='{source}'>"
            figures += f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"
        return f"{_heading(self.title)}<div class='strips'>{figures}</div>"


Part = Table | Figure | Pictures


class Section(NamedTuple):
    """A heading with an introduction and parts."""

    title: str
    parts: Sequence[Part]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One report."""

    title: str
    about: Mapping[str, str]
    """Title -> text of the header: model, command, recipe."""
    sections: Sequence[Section]

    def markup(self) -> str:
        """The complete HTML document."""
        about = {**self.about, **_versions(), "date": f"{datetime.now().astimezone():%d %B %Y, %H:%M %Z}"}
        facts = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in about.items() if v)
        return "\n".join(
            [
                "<!doctype html>",
                "<html lang='en'><head><meta charset='utf-8'>",
                "<meta name='viewport' content='width=device-width, initial-scale=1'>",
                "<meta http-equiv='Content-Security-Policy' "
                "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">",
                f"<title>{_text(self.title)}</title><style>{_STYLE}</style></head><body><main>",
                f"<h1>{_text(self.title)}</h1><dl>{facts}</dl>",
                *map(_section, self.sections),
                "</main></body></html>\n",
            ]
        )


def _section(section: Section) -> str:
    text = f"<p>{_text(section.text)}</p>" if section.text else ""
    parts = "\n".join(part.markup() for part in section.parts)
    return f"<h2>{_text(section.title)}</h2>{text}\n<div class='parts'>{parts}</div>"


def _heading(title: str) -> str:
    return f"<h3>{_text(title)}</h3>" if title else ""


def _is_numeric(column: Sequence[str | Cell]) -> bool:
    """Whether a column is right-aligned: most of its cells are numbers, apart from coloured words."""
    toned = any(isinstance(cell, Cell) and cell.tone and _NUMBER.fullmatch(cell.text) for cell in column)
    plain = (cell for cell in column if not isinstance(cell, Cell) or not cell.tone)
    texts = [cell.text if isinstance(cell, Cell) else cell for cell in plain]
    texts = [text for text in texts if text not in ("", "-")]
    return toned or sum(bool(_NUMBER.fullmatch(text)) for text in texts) > len(texts) / 2


def _cell(tag: str, cell: str | Cell, numeric: bool) -> str:
    text, tone = cell if isinstance(cell, Cell) else (cell, "")
    names = " ".join(["n"] * numeric + [tone] * bool(tone))
    return f"<{tag} class='{names}'>{_text(text)}</{tag}>" if names else f"<{tag}>{_text(text)}</{tag}>"


def _text(text: str) -> str:
    return html.escape(escaped(text))


def _versions() -> dict[str, str]:
    return {"versions": ", ".join(f"{name} {version}" for name, version in versions().items())}


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1c2026;--soft:#5b6470;--line:#d5dae1;--band:#f4f6f8;
--good:#13743c;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--page:#14171c;--text:#e4e7ec;--soft:#9aa4b1;--line:#363d48;
--band:#1c2128;--good:#5fd08b;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:20px;margin:38px 0 10px;border-top:1px solid var(--line);padding-top:18px}
h3{font-size:15px;margin:22px 0 6px}
p{margin:6px 0 12px;max-width:75ch}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.parts{display:flex;flex-wrap:wrap;gap:0 48px}.parts>figure,.parts>details,.parts>.strips{flex:0 0 100%}
.table{min-width:0;max-width:100%}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:3px 14px 3px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}
td{overflow-wrap:break-word}
tbody tr:hover{background:var(--band)}
td.n,th.n{text-align:right}td.n{white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad);font-weight:600}
figure{margin:14px 0;max-width:100%;overflow-x:auto}
figcaption{color:var(--soft);font-size:13px;max-width:95ch}
svg{min-width:600px;max-width:100%;height:auto;color:var(--text)}
.strips{display:flex;flex-wrap:wrap;gap:10px 18px}.strips figure{margin:0;max-width:100%}
.strips img{display:block;max-width:100%;image-rendering:pixelated;border:1px solid var(--line)}
summary{cursor:pointer;font-weight:600;font-size:15px;margin:18px 0 6px}
@media print{details{display:none}}
"""


# ---- files --------------------------------------------------------------------------------------


def check_report_file(
    file: Path, *, overwrite: bool = False, flag: str = "--report", any_name: bool = False
) -> None:
    """Check before a long run that a report can be written: JSON, or a page for a name with `.html`.

    `any_name`: a name without `.json` is JSON too. Raises UsageError: E-USE-03 if `file` exists and
    `overwrite` is not set, or is a folder, E-USE-01 for another suffix; EnvironmentProblem: E-ENV-01 without
    matplotlib for a page, E-ENV-02 if the folder is not writable.
    """
    if not any_name and file.suffix.lower() not in REPORT_SUFFIXES:
        raise UsageError(
            f"{flag} {file}",
            needs="a name that ends in .html (a page with plots) or .json",
            fix=shell_line([flag, short_path(file.with_suffix(".html")) if file.name else "report.html"]),
        )
    if os.path.lexists(file) and (not overwrite or file.is_dir()):
        raise UsageError(
            f"{flag} {file} already exists" + (": a folder" if file.is_dir() else ""),
            needs="a new name: an existing report is replaced only with --overwrite (overwrite=True)",
            fix=f"use another name, for example {shell_line([flag, short_path(free_path(file))])}",
            code="E-USE-03",
        )
    if is_page(file) and (problem := charts.import_problem()):
        raise EnvironmentProblem(
            f"{flag} {file}: matplotlib, which draws the plots, cannot be imported: {problem}",
            needs='matplotlib, which is in the extra "report" of ascendit; a .json report needs nothing',
            fix="pip install matplotlib",
            code="E-ENV-01",
        )
    check_writable(file)


def is_page(file: Path) -> bool:
    """Whether a report with this name is an HTML page."""
    return file.suffix.lower() == ".html"


def write_report(file: Path, data: Mapping[str, Any], page: Callable[[], Page] | None = None) -> None:
    """Write `page()` if the name ends in `.html`, else `data` as JSON; creates the folder, replaces the file.

    Raises EnvironmentProblem: E-ENV-02 if the folder is not writable, E-ENV-04 for a full disk.
    """
    text = page().markup() if page and is_page(file) else json_text(data) + "\n"
    new = file.with_name(f".{file.name}.{os.getpid()}.new")  # another process may write the same report
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)  # a link would be followed
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)
    except OSError as e:
        with contextlib.suppress(OSError):
            new.unlink()
        raise write_error(file.parent, e) from e
