"""`ascendit doctor`: does this machine have what is needed, and does its device compute what it should?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ascendit.cli.main import Json, flag
from ascendit.cli.output import Output, check_report, write_report
from ascendit.errors import UsageError
from ascendit.report import columns

if TYPE_CHECKING:
    from ascendit.doctor.operator_cases import Result
    from ascendit.doctor.self_check import SelfCheck

DEFAULT_DEVICE = "npu"
"""The device that is checked where none is named: what a self-check is for."""
SHOWN_VERSIONS = ("torch", "torch_npu", "cann", "mindiesd", "driver")


def doctor(
    ctx: typer.Context,
    self_check: Annotated[
        bool, flag("--self-check", "Run every operator of a device and compare its numbers.")
    ] = False,
    device: Annotated[
        str | None, flag("--device NAME", "To self-check: npu (default), npu:1, twin:a5, cuda, cpu.")
    ] = None,
    file: Annotated[
        Path | None, flag("--out FILE.json", "Write what the self-check found, to send in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine and its libraries. Says how to fix what is wrong."""
    out: Output = ctx.obj
    options = {flag: value for flag, value in (("--device", device), ("--out", file)) if value is not None}
    if not self_check and options:
        raise UsageError(
            f"{' and '.join(options)} without --self-check",
            needs="--self-check, which these belong to",
            fix=f"ascendit doctor --self-check {' '.join(f'{k} {v}' for k, v in options.items())}",
        )
    code = _check_device(device or DEFAULT_DEVICE, file, out) if self_check else _check_machine(out)
    if code:
        raise typer.Exit(code)


def _check_machine(out: Output) -> int:
    """Print what this machine has. The exit code: 0 ready, 3 not."""
    from ascendit.doctor.machine import examine
    from ascendit.doctor.probe import NO_FIX

    with out.work():
        report = examine()
    cells = [
        (r.item, r.detected, r.needed, r.status, "" if r.status in NO_FIX else r.fix) for r in report.rows
    ]
    rows = columns([("item", "found", "needed", "status", "fix"), *cells])
    out.result(report.as_dict(), [*rows, "", *report.verdicts()])
    return 0 if report.ok else 3


def _check_device(device: str, file: Path | None, out: Output) -> int:
    """Run the self-check, print its page, write its file. The exit code: 0 passed, 1 not."""
    from ascendit.device.device import parse_device
    from ascendit.environment import disable_device_plugins

    name = str(parse_device(device))
    if file is not None:
        if file.is_dir() or not file.parent.is_dir():
            raise UsageError(
                f"--out {file}",
                needs="a file in a folder that exists",
                fix="--out self-check.json",
                code="E-USE-02",
            )
        check_report("--out", file)
    disable_device_plugins()  # a card's own torch_npu is imported by name
    from ascendit.doctor.self_check import self_check

    with out.work():
        check = self_check(name)
    told = check.as_dict()
    out.result(told, page(check))
    if file is not None:
        write_report(file, told)
        out.note(f"{file} holds all of it: attach it to a report")
    return 0 if check.ok else 1


def page(check: SelfCheck) -> Iterator[str]:
    """One page: questions, operators, functions, verdict."""
    versions = check.about["versions"]
    known = "   ".join(f"{name} {versions[name]}" for name in SHOWN_VERSIONS if versions[name])
    yield f"Self-check of {check.device}{f', chip {check.chip}' if check.chip else ''}   {known}"
    if questions := check.part("question"):
        yield "\nWhat no document answers"
        for r in questions:
            yield f"  {r.name}\n    {r.answer or r.error}"
            if r.verdict == "differs":
                yield f"    the twin thinks: {r.expected}"
    if check.part("operator"):
        yield "\nOperators against the twin's numbers"
        yield from _rows("operator", _operators(check))
    yield "\nOperators and layers as they are bound, against plain PyTorch"
    yield from _rows(
        "function", ((r.name, "1", *_numbers(r), r.error or r.how) for r in check.part("function"))
    )
    yield f"\n{_verdict(check)}"


def _rows(first: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    return columns([(first, "cases", "verdict", "dB", "us", "remark"), *rows], indent="  ")


def _operators(check: SelfCheck) -> Iterator[tuple[str, ...]]:
    """A row for each that ascendit calls, and for others that are not as expected; the rest in one."""
    from ascendit.doctor.self_check import summary

    fine = []
    for name, results in check.by_operator().items():
        found = summary(results)
        if not found.used and found.verdict in ("exact", "close"):
            fine.append(name)
            continue
        remark = f"{found.name}: {found.error}" if found.error else ""
        remark += "" if found.used else " (not called by ascendit)"
        yield name, str(len(results)), *_numbers(found), remark.strip()
    if fine:
        yield f"{len(fine)} others", str(len(fine)), "fine", "-", "-", "not called by ascendit"


def _numbers(r: Result) -> tuple[str, str, str]:
    return (
        r.verdict,
        "-" if r.db is None else f"{r.db:.0f}",
        "-" if r.microseconds is None else f"{r.microseconds:.0f}",
    )


def _verdict(check: SelfCheck) -> str:
    differ = sum(r.verdict == "differs" for r in check.results)
    tail = f"; {differ} answers differ from the twin's" if differ else ""
    if check.ok:
        return f"passed: {len(check.results)} checks{tail}"
    names = ", ".join(dict.fromkeys(r.operator for r in check.failed)) or "nothing was checked"
    return f"failed: {names}{tail}"
