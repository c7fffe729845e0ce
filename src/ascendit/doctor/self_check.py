"""`doctor --self-check`: what a device computes, against what it should.

On an NPU or a twin: the questions that no document answers, every operator against the twin's numbers, and
the operators and quantized layers as they are bound against plain PyTorch. On a CPU or a CUDA card the last.

A real card is checked in a child process: a kernel that crashes or hangs takes only that along. The child
prints one line of JSON before and one after each case, behind a mark, since libraries print too. When it
dies, is silent for too long, or its card answers nothing more after a fault, the running case has crashed and
a new child goes on with the next one.
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
from ascendit.doctor.npu import found_versions
from ascendit.doctor.operator_cases import (
    CheckCase,
    CheckedDevice,
    Result,
    function_cases,
    least,
    most,
    operator_cases,
    run_case,
    worst,
)
from ascendit.errors import AscenditError, EnvironmentProblem
from ascendit.ops.open_device import open_device
from ascendit.report import group_by
from ascendit.version import __version__, installed

FORMAT = 1
"""Of the JSON; goes up when the meaning of a key changes."""
PARTS = ("question", "operator", "function")


@dataclass(frozen=True)
class SelfCheck:
    """Everything that was found out on one device."""

    device: str
    chip: str | None
    results: tuple[Result, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Result]:
        """What ascendit calls and must not rely on here."""
        return [r for r in self.results if r.failed]

    @property
    def ok(self) -> bool:
        return bool(self.results) and not self.failed

    def part(self, name: str) -> list[Result]:
        return [r for r in self.results if r.part == name]

    def by_operator(self) -> dict[str, list[Result]]:
        """The samples of each operator, those that ascendit calls first."""
        return group_by(sorted(self.part("operator"), key=lambda r: not r.used), lambda r: r.operator)

    def as_dict(self) -> dict[str, Any]:
        """The file to send in: no paths, no names of users or hosts."""
        head = {"format": FORMAT, "verdict": "passed" if self.ok else "failed", "device": self.device}
        failed = list(dict.fromkeys(r.operator for r in self.failed))
        parts = {f"{part}s": [asdict(r) for r in self.part(part)] for part in PARTS}
        return {**head, "chip": self.chip, "failed": failed, **self.about, **parts}


def self_check(name: str) -> SelfCheck:
    """Run every case on the device of this name.

    UsageError for no such device, EnvironmentProblem E-ENV-03 for one that is not here. Nothing else raises.
    """
    wanted = parse_device(name)
    if wanted.backend.tensors == "cpu":
        device = open_device(wanted)
        card = CheckedDevice(device)
        here = tuple(run_case(card, case) for case in all_cases(device))
        return SelfCheck(name, device.chip, here, _about())
    chip, results = in_children(name)
    return SelfCheck(name, chip, tuple(results), _about())


def all_cases(device: Device) -> list[CheckCase]:
    """Every case for an open device, in the order in which they are run."""
    if device.kind == "npu":
        twin.use(str(device.chip))  # its functions alone: the operators under torch.ops are the card's
    return [*question_cases(device), *operator_cases(device), *function_cases(device)]


def summary(results: list[Result]) -> Result:
    """Samples of one operator as one: the worst verdict, the lowest dB, the longest time."""
    longest = most(r.microseconds for r in results)
    return replace(worst(results), db=least(r.db for r in results), microseconds=longest)


def _about() -> dict[str, Any]:
    found = found_versions()
    versions = {"ascendit": __version__, "python": platform.python_version()}
    versions |= {**vars(found), **installed("numpy")}
    machine = f"{platform.system()} {platform.release()} {platform.machine()}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"made": now, "machine": machine, "versions": versions}


MARK = "ascendit-self-check "
START_SECONDS, CASE_SECONDS = 300.0, 120.0
"""Until the first case: torch_npu and the first kernels are loaded. For one case."""

Command = Callable[[int], Sequence[str]]
"""The words of a child that begins with this case."""


def in_children(name: str, command: Command | None = None) -> tuple[str | None, list[Result]]:
    """The chip of device `name`, and the results of all cases; a new child goes on where one ended."""
    command = command or (
        lambda first: (sys.executable, "-m", "ascendit.doctor.self_check", name, str(first))
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
                told = line["refused"]
                raise EnvironmentProblem(told["got"], needs=told["needs"], fix=told["try"], code=told["code"])
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
                fix="ascendit doctor",
                code="E-ENV-03",
            )


def _lines(words: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What one child tells; last `{"end": "done"}`, or why it ended without."""
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=environment.without_device_plugins(), errors="replace"
    )
    told: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, told), daemon=True)
    reader.start()
    limit, done = START_SECONDS, False
    try:
        while (text := told.get(timeout=limit)) is not None:
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


def _read(stream: IO[str], told: queue.Queue[str | None]) -> None:
    for text in stream:
        told.put(text)
    told.put(None)


def _result(told: dict[str, Any]) -> Result:
    return Result(**{**told, "arguments": tuple(told["arguments"])})


def main(name: str, first: int) -> None:
    """Run the cases from `first` on, and tell each."""
    out = sys.stdout

    def tell(**line: Any) -> None:
        print(MARK + json.dumps(line), file=out, flush=True)

    try:
        device = open_device(name)
    except AscenditError as e:
        tell(refused=e.as_dict())
        return
    tell(chip=device.chip)
    card = CheckedDevice(device)
    for case in all_cases(device)[first:]:
        tell(begins=asdict(case.base))
        result = run_case(card, case)
        tell(result=asdict(result))
        if result.verdict != "exact" and not card.works():
            tell(end="the device answers nothing any more after this case")
            return
    tell(end="done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
