"""Processes that are killed in the middle of their work, for tests of what they leave behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"


def moments(seed: int, count: int, longest: float, shortest: float = 0.0) -> list[float]:
    """Seconds after which to kill, drawn from a seed."""
    draw = random.Random(seed)
    return [draw.uniform(shortest, longest) for _ in range(count)]


def python(code: str, *arguments: object) -> list[str]:
    """`argv` for this Python with `code`; it finds ascendit, and its `sys.argv[1:]` are `arguments`."""
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(SRC)!r})\n{code}",
        *map(str, arguments),
    ]


def run_and_kill(
    argv: Sequence[str],
    delay: float,
    *,
    ready: str | None = None,
    until: Callable[[], bool] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 60.0,
) -> bool:
    """Start `argv`, send SIGKILL after `delay` seconds, wait. True if it was killed, False if it had ended.

    The seconds count from the line `ready` on its standard output, or from when `until()` is true (asked
    every millisecond), if one is given. A process that fails by itself is an error that shows what it said.
    """
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    assert process.stdout is not None
    try:
        end = time.monotonic() + timeout
        if ready is not None:
            for line in process.stdout:
                if line.strip() == ready:
                    break
        while until is not None and process.poll() is None and not until():
            assert time.monotonic() < end, "it never came so far"
            time.sleep(0.001)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}\n{out}\n{err}"
    return process.returncode != 0


def kill_often(
    argv: Sequence[str],
    dst: Path,
    delays: Sequence[float],
    check: Callable[[Path], None],
    *,
    ready: str | None = None,
    each: Callable[[], None] | None = None,
) -> int:
    """Run and kill once for each delay; how many were killed. `argv` writes `dst`.

    Whenever `dst` is there it must be whole: `check(dst)` says so, and it is removed. `each` is called after
    every kill, to look at the rest.
    """
    killed = 0
    for delay in delays:
        in_time = run_and_kill(argv, delay, ready=ready)
        killed += in_time
        if os.path.lexists(dst):
            check(dst)
            shutil.rmtree(dst)
        else:
            assert in_time, "it ended by itself, and there is no output"
        if each is not None:
            each()
    return killed


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, links followed: {path in it: bytes}."""
    return {
        os.path.relpath(os.path.join(place, name), folder): Path(place, name).read_bytes()
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
    }
