"""`doctor --self-check`: compare the results of a device with the expected ones.

On an NPU or a twin: undocumented questions, every operator against the twin's numbers, and the bound
operators and quantized layers against plain PyTorch. On a CPU or a CUDA card: only the last.

A real card is checked in a child process, in case a kernel crashes or hangs. The child prints a line of JSON
before and after each case, with a prefix, since libraries print too. If the child dies, is silent for too
long, or its card stops working after a fault, the running case counts as crashed and a new child runs the
next case.
"""

from __future__ import annotations

import json
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import IO, Any

from ascendit import environment, twin
from ascendit.device.device import Device, parse_device
from ascendit.doctor.hardware_questions import question_cases
from ascendit.doctor.npu import installed_versions
from ascendit.doctor.operator_cases import (
    CheckCase,
    CheckedDevice,
    Result,
    function_cases,
    largest,
    operator_cases,
    run_case,
    smallest,
    worst,
)
from ascendit.errors import AscenditError, EnvironmentProblem
from ascendit.ops.open_device import open_device
from ascendit.option_text import command_line
from ascendit.report import group_by
from ascendit.version import __version__, installed

FORMAT = 1
"""Version of the JSON format; increases if the meaning of a key changes."""
PARTS = ("question", "operator", "function")


@dataclass(frozen=True)
class SelfCheck:
    """All results of one device."""

    device: str
    chip: str | None
    results: tuple[Result, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Result]:
        """Failed cases of operators that ascendit calls."""
        return [r for r in self.results if r.failed]

    @property
    def ok(self) -> bool:
        return bool(self.results) and not self.failed

    def results_of(self, name: str) -> list[Result]:
        return [r for r in self.results if r.part == name]

    def by_operator(self) -> dict[str, list[Result]]:
        """Results by operator, those that ascendit calls first."""
        return group_by(sorted(self.results_of("operator"), key=lambda r: not r.used), lambda r: r.operator)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON; has no paths, user names or host names."""
        head = {"format": FORMAT, "verdict": "passed" if self.ok else "failed", "device": self.device}
        failed = list(dict.fromkeys(r.operator for r in self.failed))
        parts = {f"{part}s": [asdict(r) for r in self.results_of(part)] for part in PARTS}
        return {**head, "chip": self.chip, "failed": failed, **self.about, **parts}


def self_check(name: str) -> SelfCheck:
    """Run every case on the device with this name.

    Raises UsageError (E-USE-01) for an invalid name, EnvironmentProblem (E-ENV-03) if the device is not
    available.
    """
    parsed = parse_device(name)
    if parsed.backend.tensors == "cpu":
        device = open_device(parsed)
        card = CheckedDevice(device)
        completed = tuple(run_case(card, case) for case in all_cases(device))
        return SelfCheck(name, device.chip, completed, _about())
    chip, results = in_children(name)
    return SelfCheck(name, chip, tuple(results), _about())


def all_cases(device: Device) -> list[CheckCase]:
    """All cases for an open device, in the order of their run."""
    if device.kind == "npu":
        twin.use(str(device.chip))  # only its functions: the operators under torch.ops are the card's
    return [*question_cases(device), *operator_cases(device), *function_cases(device)]


def summary(results: list[Result]) -> Result:
    """Merge the results of one operator: the worst verdict, the lowest dB, the longest time."""
    longest = largest(r.microseconds for r in results)
    return replace(worst(results), db=smallest(r.db for r in results), microseconds=longest)


def _about() -> dict[str, Any]:
    versions = {"ascendit": __version__, "python": platform.python_version()}
    versions |= {**vars(installed_versions()), **installed("numpy")}
    machine = f"{platform.system()} {platform.release()} {platform.machine()}"
    timestamp = datetime.now(UTC).isoformat(timespec="seconds")
    return {"made": timestamp, "machine": machine, "versions": versions}


MARK = "ascendit-self-check "
START_SECONDS, CASE_SECONDS = 300.0, 120.0
"""Time limits: for loading torch_npu and the first kernels, and for one case."""

Command = Callable[[int], Sequence[str]]
"""Command line of a child that starts with this case."""


def in_children(name: str, command: Command | None = None) -> tuple[str | None, list[Result]]:
    """Run all cases in child processes; if one dies, a new one continues. Returns the chip and the results.

    Raises EnvironmentProblem: E-ENV-03 if the device does not start, or the error of `open_device` in the
    child.
    """
    command = command or (
        lambda first: (sys.executable, "-P", "-m", "ascendit.doctor.self_check", name, str(first))
    )
    chip: str | None = None
    results: list[Result] = []
    running: Result | None = None
    while True:
        end = ""
        before = len(results)
        for line in _lines(command(len(results))):
            if "chip" in line:
                chip = line["chip"]
            elif "begins" in line:
                running = _result(line["begins"])
            elif "result" in line:
                results.append(_result(line["result"]))
                running = None
            elif "refused" in line:
                e = line["refused"]
                raise EnvironmentProblem(e["got"], needs=e["needs"], fix=e["try"], code=e["code"])
            else:
                end = line["end"]
        if end == "done":
            return chip, results
        if running is not None:
            results.append(replace(running, verdict="crashed", error=end))
            running = None
        elif len(results) == before:
            raise EnvironmentProblem(
                f"device {name}: {end} before its first check",
                needs="a device that starts",
                fix="run ascendit doctor",
                code="E-ENV-03",
            )


def _lines(args: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The JSON lines of one child; the last is `{"end": "done"}` or has the reason for an early end."""
    child = subprocess.Popen(
        args, stdout=subprocess.PIPE, text=True, env=environment.without_device_plugins(), errors="replace"
    )
    output: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, output), daemon=True)
    reader.start()
    limit, done = START_SECONDS, False
    try:
        while (text := output.get(timeout=limit)) is not None:
            if text.startswith(MARK):
                line = json.loads(text.removeprefix(MARK))
                done = done or line.get("end") == "done"
                limit = CASE_SECONDS
                yield line
    except queue.Empty:
        yield {"end": f"no answer in {limit:g} s"}
    else:
        code = child.wait()
        if not done:
            yield {"end": f"the process ended with code {code}"}
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stdout.close()


def _read(stream: IO[str], output: queue.Queue[str | None]) -> None:
    for text in stream:
        output.put(text)
    output.put(None)


def _result(fields: dict[str, Any]) -> Result:
    return Result(**{**fields, "arguments": tuple(fields["arguments"])})


def main(name: str, first: int) -> None:
    """Run the cases from index `first` on, and print a JSON line before and after each."""
    out = sys.stdout

    def send(**line: Any) -> None:
        print(MARK + json.dumps(line), file=out, flush=True)

    try:
        device = open_device(name)
    except AscenditError as e:
        with command_line():  # the parent rewrites the flags for its reader
            send(refused=e.as_dict())
        return
    send(chip=device.chip)
    card = CheckedDevice(device)
    for case in all_cases(device)[first:]:
        send(begins=asdict(case.base))
        result = run_case(card, case)
        send(result=asdict(result))
        if result.verdict != "exact" and not card.works():
            send(end="the device stopped working after this case")
            return
    send(end="done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
