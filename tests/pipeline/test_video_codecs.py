"""The same frames make the same file, independent of other allocations of the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import hashlib, sys
import numpy as np
from ascendit.pipeline.video import Video

kind, folder, count = sys.argv[1:]
draw = np.random.default_rng(1)
rows, columns = np.mgrid[:64, :64]
frames = draw.integers(0, 6, (17, 64, 64, 3), dtype=np.uint8)
for i, frame in enumerate(frames):
    frame[(rows - 32) ** 2 + (columns - 16 - 2 * i) ** 2 < 100] += np.array([190, 30, 20], np.uint8)
ballast, files = [], set()
for i in range(int(count)):
    ballast.append(bytearray(draw.integers(1, 200_000)))  # moves the allocations of the encoder
    path = Video(frames, 8).save(f"{folder}/{i}.{kind}", metadata=False)
    files.add(hashlib.sha256(path.read_bytes()).hexdigest())
print(len(files))
"""


@pytest.mark.parametrize(("kind", "count"), [("mp4", 20), ("webm", 5), ("gif", 5)])
def test_the_same_frames_make_the_same_file(kind: str, count: int, tmp_path: Path) -> None:
    """In a small process, x264 without `cpu-independent` writes a dozen different files."""
    command = [sys.executable, "-c", CODE, kind, str(tmp_path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stdout + done.stderr
