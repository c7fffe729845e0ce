"""`doctor --self-check`: what a device computes, against what it should.

On an NPU or a twin: the questions that no document answers, every operator against the twin's numbers, and
the operators and quantized layers as they are bound against plain PyTorch. On a CPU or a CUDA card the last.
A case that raises, crashes the process or hangs is a result like others, and the next one goes on.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from ascendit import __version__
from ascendit.device.backends import Device, parse_device
from ascendit.device.check_card import Card
from ascendit.device.check_child import cases, in_children
from ascendit.device.check_operators import run_case
from ascendit.device.check_result import Result, worst
from ascendit.device.npu_probes import found_versions
from ascendit.device.probing import installed
from ascendit.ops.runtime import open_device

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
        found: dict[str, list[Result]] = {}
        for r in sorted(self.part("operator"), key=lambda r: not r.used):
            found.setdefault(r.operator, []).append(r)
        return found

    def as_dict(self) -> dict[str, Any]:
        """The file to send in: no paths, no names of users or hosts."""
        head = {"format": FORMAT, "verdict": "passed" if self.ok else "failed", "device": self.device}
        failed = list(dict.fromkeys(r.operator for r in self.failed))
        parts = {f"{part}s": [asdict(r) for r in self.part(part)] for part in PARTS}
        return {**head, "chip": self.chip, "failed": failed, **self.about, **parts}


def self_check(name: str, progress: Callable[[str], None] = lambda text: None) -> SelfCheck:
    """Run every case on the device of this name; `progress` is told each one.

    UsageError for no such device, EnvironmentProblem E-ENV-03 for one that is not here. Nothing else raises.
    """
    wanted = parse_device(name)
    if wanted.backend.tensors == "cpu":
        device = open_device(wanted)
        return SelfCheck(name, device.chip, tuple(_here(device, progress)), _about())
    chip, results = in_children(name, progress)
    return SelfCheck(name, chip, tuple(results), _about())


def _here(device: Device, progress: Callable[[str], None]) -> Iterator[Result]:
    card = Card(device)
    for case in cases(device):
        progress(case.base.name)
        yield run_case(card, case)


def summary(results: list[Result]) -> Result:
    """Samples of one operator as one: the worst verdict, the lowest dB, the longest time."""
    verdict = worst([r.verdict for r in results])
    first = next(r for r in results if r.verdict == verdict)
    levels = [r.db for r in results if r.db is not None]
    times = [r.microseconds for r in results if r.microseconds is not None]
    return replace(first, db=min(levels, default=None), microseconds=max(times, default=None))


def _about() -> dict[str, Any]:
    found = found_versions()
    versions = {"ascendit": __version__, "python": platform.python_version(), **vars(found)}
    machine = f"{platform.system()} {platform.release()} {platform.machine()}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"made": now, "machine": machine, "versions": {**versions, "numpy": installed("numpy")}}
