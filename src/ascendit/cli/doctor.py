"""`ascendit doctor`: check this machine and its libraries, and the operators of a device."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ascendit.cli.main import Json, flag
from ascendit.cli.output import Output
from ascendit.doctor.probe import NO_FIX
from ascendit.errors import UsageError, escaped
from ascendit.pages.page import check_report_file, write_report
from ascendit.report import columns, wrapped

if TYPE_CHECKING:
    from ascendit.doctor.operator_cases import Result
    from ascendit.doctor.probe import DoctorReport, ProbeRow
    from ascendit.doctor.self_check import SelfCheck

DEFAULT_DEVICE = "npu"
"""The default device of a self-check."""
DETECTED_WIDTH, NEEDED_WIDTH = 50, 28
SHOWN_VERSIONS = ("torch", "torch_npu", "cann", "mindiesd", "driver")


def doctor(
    ctx: typer.Context,
    self_check: Annotated[
        bool, flag("--self-check", "Run every operator of a device and compare the results.")
    ] = False,
    device: Annotated[
        str | None, flag("--device NAME", "With --self-check: npu (default), npu:1, twin:a5, cuda, cpu.")
    ] = None,
    file: Annotated[
        Path | None, flag("--out FILE.json", "With --self-check: write the results, for a bug report.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine and its libraries. Prints a fix for each problem."""
    out: Output = ctx.obj
    if not self_check:
        _refuse_flags({"--device": device, "--out": file})
    code = _check_device(device or DEFAULT_DEVICE, file, out) if self_check else _check_machine(out)
    if code:
        ctx.exit(code)


def _refuse_flags(flags: dict[str, object]) -> None:
    if options := {flag: value for flag, value in flags.items() if value is not None}:
        raise UsageError(
            f"{' and '.join(options)} without --self-check",
            needs="--self-check with these flags",
            fix=f"ascendit doctor --self-check {' '.join(f'{k} {v}' for k, v in options.items())}",
        )


def _check_machine(out: Output) -> int:
    """Print the report of this machine. Returns the exit code: 0 if it is ready, 3 if not."""
    from ascendit.doctor.machine import examine

    with out.work():
        report = examine()
    out.result(report.as_dict(), [*_machine_lines(report, out.width), "", *report.verdicts()], colour=True)
    return 0 if report.ok else 3


def _machine_lines(report: DoctorReport, width: int | None) -> list[str]:
    """One row per requirement; in a narrow terminal, with the requirement and the fix below it."""
    head = ("item", "detected", "needed", "status", "fix")
    rows = [line for row in report.rows for line in _wrapped_cells(row)]
    lines = columns([head, *rows])
    if width is None or max(map(len, lines)) <= width:
        return lines
    narrow = columns([("item", "status", "detected"), *map(_narrow_cells, report.rows)], width=width)
    problems = [row for row in report.rows if row.status not in NO_FIX]
    for row in problems:
        narrow += ["", *wrapped(f"{row.item}  ", f"{row.status}: needs {row.needed}", width)]
        narrow += [f"  fix  {row.fix}"] if row.fix else []  # one line: it may be a command
    return narrow


def _narrow_cells(row: ProbeRow) -> tuple[str, str, str]:
    return escaped(row.item), row.status, escaped(row.detected)


def _wrapped_cells(row: ProbeRow) -> Iterator[tuple[str, str, str, str, str]]:
    """The lines of one row; a fix, which may be a command, stays on one line."""
    fix = "" if row.status in NO_FIX else escaped(row.fix)
    wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    left, right = wrap(escaped(row.detected), DETECTED_WIDTH), wrap(escaped(row.needed), NEEDED_WIDTH)
    for n, (text, rule) in enumerate(zip_longest(left or [""], right, fillvalue="")):
        yield ("", text, rule, "", "") if n else (row.item, text, rule, row.status, fix)


def _check_device(device: str, file: Path | None, out: Output) -> int:
    """Run the self-check, print and write its results. Returns the exit code: 0 if it passed, 1 if not."""
    from ascendit.device.device import parse_device
    from ascendit.environment import disable_device_plugins

    name = str(parse_device(device))
    if file is not None:
        if file.is_dir() or not file.parent.is_dir():
            raise UsageError(
                f"--out {file}",
                needs="a file in an existing folder",
                fix="--out self-check.json",
                code="E-USE-02",
            )
        check_report_file(file, flag="--out", any_name=True)
    disable_device_plugins()  # the self-check imports torch_npu explicitly
    from ascendit.doctor.self_check import self_check

    with out.work():
        check = self_check(name)
    data = check.as_dict()
    out.result(data, page(check, out.width), colour=True)
    if file is not None:
        write_report(file, data)
        out.note(f"{file} has the full results; attach it to a bug report")
    return 0 if check.ok else 1


def page(check: SelfCheck, width: int | None = None) -> Iterator[str]:
    """Lines for a terminal: questions, operators, functions, result. `width`: of the terminal."""
    versions = check.about["versions"]
    shown = "   ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS if versions[name])
    yield f"Self-check of {check.device}{f', chip {check.chip}' if check.chip else ''}   {shown}"
    if questions := check.results_of("question"):
        yield from ("", "Undocumented behaviour")
        for r in questions:
            yield from (f"  {r.name}", f"    {r.answer or r.error}")
            if r.verdict == "differs":
                yield f"    the twin assumes: {r.expected}"
    if check.results_of("operator"):
        yield from ("", "Operators, compared with the twin")
        yield from _rows("operator", _operators(check), width)
    yield from ("", "Selected kernels and layers, compared with plain PyTorch")
    functions = ((r.name, "1", *_numbers(r), r.error or r.how) for r in check.results_of("function"))
    yield from _rows("function", functions, width)
    yield from ("", _verdict(check))


def _rows(first: str, rows: Iterable[tuple[str, ...]], width: int | None) -> list[str]:
    return columns([(first, "cases", "verdict", "dB", "us", "remark"), *rows], indent="  ", width=width)


def _operators(check: SelfCheck) -> Iterator[tuple[str, ...]]:
    """A row per operator that ascendit calls or that fails; one row for all others."""
    from ascendit.doctor.self_check import summary

    passed = []
    for name, results in check.by_operator().items():
        result = summary(results)
        if not result.used and result.verdict in ("exact", "close"):
            passed.append(name)
            continue
        remark = f"{result.name}: {result.error}" if result.error else ""
        remark += "" if result.used else " (not called by ascendit)"
        yield name, str(len(results)), *_numbers(result), remark.strip()
    if passed:
        yield f"{len(passed)} others", str(len(passed)), "passed", "-", "-", "not called by ascendit"


def _numbers(r: Result) -> tuple[str, str, str]:
    return (
        r.verdict,
        "-" if r.db is None else f"{r.db:.0f}",
        "-" if r.microseconds is None else f"{r.microseconds:.0f}",
    )


def _verdict(check: SelfCheck) -> str:
    differ = sum(r.verdict == "differs" for r in check.results)
    note = f"; {differ} answers differ from the twin's" if differ else ""
    if check.ok:
        return f"passed: {len(check.results)} checks{note}"
    names = ", ".join(dict.fromkeys(r.operator for r in check.failed)) or "nothing was checked"
    return f"failed: {names}{note}"
