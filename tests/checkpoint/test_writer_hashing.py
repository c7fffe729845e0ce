"""sha256 in a thread; hashlib itself is the oracle."""

import hashlib
import os
import threading
import time

import pytest

from ascendit.checkpoint import writer
from ascendit.checkpoint.writer import CHUNK, Hasher


def test_one_file_after_the_other() -> None:
    hasher = Hasher()
    for size in (0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 5, 0):
        data = os.urandom(size)
        for start in range(0, size, 700_001):
            hasher.feed(memoryview(data)[start : start + 700_001])
        assert hasher.finish() == hashlib.sha256(data).hexdigest()
    hasher.close()


def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    hasher = Hasher()
    assert threading.active_count() == before + 1
    hasher.feed(memoryview(b"x"))
    hasher.close()
    assert threading.active_count() == before


def test_it_waits_when_it_is_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory stays bounded when the disk is faster than the hash."""
    go = threading.Event()

    class Slow:
        def update(self, data: memoryview) -> None:
            go.wait(10)

        def hexdigest(self) -> str:
            return "end"

    monkeypatch.setattr(writer.hashlib, "sha256", Slow)  # type: ignore[attr-defined]
    hasher = Hasher()
    fed: list[int] = []

    def feed() -> None:
        for i in range(20):
            hasher.feed(memoryview(bytes(CHUNK)))
            fed.append(i)

    thread = threading.Thread(target=feed)
    thread.start()
    while len(fed) < 8:
        time.sleep(0.001)
    time.sleep(0.02)
    assert len(fed) == 8, "8 MiB and no more"
    go.set()
    thread.join()
    assert hasher.finish() == "end"
    hasher.close()
