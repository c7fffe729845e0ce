"""sha256 of a stream, in a thread of its own."""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue

CHUNK = 1 << 20  # bytes
_CHUNKS = 8  # that wait at most


class Hasher:
    """Hashes files one after the other while the caller goes on: `feed`, ..., `finish`, `feed`, ...

    `feed` copies, into buffers that are used again, so the caller's buffer is free when it returns. It waits
    when 8 MiB are ahead of the hash (about 2 GiB/s where the processor knows SHA).
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._work: SimpleQueue[tuple[bytearray, int] | None] = SimpleQueue()
        self._digests: SimpleQueue[str] = SimpleQueue()
        for _ in range(_CHUNKS):
            self._free.put(bytearray(CHUNK))
        self._thread = threading.Thread(target=self._run, name="ascendit-sha256", daemon=True)
        self._thread.start()

    def feed(self, data: memoryview) -> None:
        """`data`: bytes."""
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            buffer = self._free.get()
            buffer[: len(piece)] = piece
            self._work.put((buffer, len(piece)))

    def finish(self) -> str:
        """The digest of what was fed since the last one, in hex."""
        self._work.put((bytearray(), 0))
        return self._digests.get()

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        digest = hashlib.sha256()
        while (item := self._work.get()) is not None:
            buffer, count = item
            if not count:
                self._digests.put(digest.hexdigest())
                digest = hashlib.sha256()
                continue
            digest.update(memoryview(buffer)[:count])
            self._free.put(buffer)
