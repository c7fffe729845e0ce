"""The self-check of a real card, in its own process: a kernel that crashes or hangs takes only that along.

The child prints one line of JSON before and one after each case, behind a mark, since libraries print too.
When it dies or is silent for too long, the case that was running has crashed and a new child goes on with the
next one; so it does when the card answers nothing more after a fault.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import IO, Any

from ascendit import twin
from ascendit.device import environment
from ascendit.device.backends import Device
from ascendit.device.check_card import Card
from ascendit.device.check_operators import Case, function_cases, operator_cases, run_case
from ascendit.device.check_questions import question_cases
from ascendit.device.check_result import Result
from ascendit.errors import AscenditError, EnvironmentProblem
from ascendit.ops.runtime import open_device

MARK = "ascendit-self-check "
START_SECONDS, CASE_SECONDS = 300.0, 120.0
"""Until the first case: torch_npu and the first kernels are loaded. For one case."""

Command = Callable[[int], Sequence[str]]
"""The words of a child that begins with this case."""


def cases(device: Device) -> list[Case]:
    """Every case for an open device, in the order in which they are run."""
    if device.kind == "npu":
        twin.use(str(device.chip))  # its functions alone: the operators under torch.ops are the card's
    return [*question_cases(device), *operator_cases(device), *function_cases(device)]


def in_children(
    name: str, progress: Callable[[str], None], command: Command | None = None
) -> tuple[str | None, list[Result]]:
    """The chip of device `name`, and the results of all cases; a new child goes on where one ended."""
    command = command or (
        lambda first: (sys.executable, "-m", "ascendit.device.check_child", name, str(first))
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
                progress(running.name)
            elif "result" in line:
                results.append(_result(line["result"]))
                running = None
            elif "refused" in line:
                raise _refusal(line["refused"])
            else:
                end = line["end"]
        if end == "done":
            return chip, results
        if running is not None:
            results.append(replace(running, verdict="crashed", error=end))
            running = None
        elif len(results) == before:
            raise _silent(name, end)


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


def _refusal(told: dict[str, str]) -> AscenditError:
    return EnvironmentProblem(told["got"], needs=told["needs"], fix=told["try"], code=told["code"])


def _silent(name: str, end: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"device {name}: {end} before its first check",
        needs="a device that starts",
        fix="ascendit doctor",
        code="E-ENV-03",
    )


# ---- the child ----------------------------------------------------------------------------------


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
    card = Card(device)
    for case in cases(device)[first:]:
        tell(begins=asdict(case.base))
        result = run_case(card, case)
        tell(result=asdict(result))
        if result.verdict != "exact" and not card.works():
            tell(end="the device answers nothing any more after this case")
            return
    tell(end="done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
