"""Processes that are killed during their work, for tests of the files they leave."""

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
    """Random delays in seconds after which to kill."""
    draw = random.Random(seed)
    return [draw.uniform(shortest, longest) for _ in range(count)]


def python(code: str, *arguments: object) -> list[str]:
    """`argv` that runs `code` in this Python with ascendit importable and `arguments` as `sys.argv[1:]`."""
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
    """Start `argv`, send SIGKILL after `delay` seconds, wait. Return whether it was killed before its end.

    The delay starts at the line `ready` on its standard output, or when `until()` is true (polled every
    millisecond), if passed. A process that fails is an error with its output.
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
            assert time.monotonic() < end, "`until` was never true"
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
    """Run `argv`, which writes `dst`, and kill it, once for each delay. Return the number of kills.

    If `dst` exists after a run, `check(dst)` must pass, and it is removed. `each` is called after every run,
    to check the other files.
    """
    killed = 0
    for delay in delays:
        in_time = run_and_kill(argv, delay, ready=ready)
        killed += in_time
        if os.path.lexists(dst):
            check(dst)
            shutil.rmtree(dst)
        else:
            assert in_time, "it was not killed, and there is no output"
        if each is not None:
            each()
    return killed


def contents(folder: Path) -> dict[str, bytes]:
    """All files below `folder`, following links: {relative path: bytes}."""
    return {
        os.path.relpath(os.path.join(parent, name), folder): Path(parent, name).read_bytes()
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
    }
