"""The same frames make the same file, independent of other allocations of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ascendit.pipeline.video import Video

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


SIZES = """
import hashlib, sys
import numpy as np
from ascendit.pipeline.video import Video

y, x = np.mgrid[:240, :416]
waves = [128 + 60 * np.sin((x + 4 * i) / 23) + 40 * np.cos((y - 2 * i) / 17) for i in range(5)]
frames = np.random.default_rng(0).normal(np.stack(waves)[..., None], 9, (5, 240, 416, 3)).astype(np.uint8)
for height, width in ((240, 416), (50, 100), (130, 258), (32, 48)):
    path = Video(frames[:, :height, :width], 8).save(f"{sys.argv[1]}/{width}.mp4", metadata=False)
    print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_mp4_does_not_depend_on_uninitialized_memory(tmp_path: Path) -> None:
    """glibc fills new memory with a byte: x264's SIMD code for mbtree then writes a file for each byte."""
    outputs = set()
    for byte in ("17", "170"):
        (tmp_path / byte).mkdir()
        command = [sys.executable, "-c", SIZES, str(tmp_path / byte)]
        environ = os.environ | {"MALLOC_PERTURB_": byte}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1 and len(set(outputs.pop().split())) == 4


def test_mp4_is_encoded_by_frames_on_all_processors(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 480, 832, 3), np.uint8)
    data = Video(frames, 8).save(tmp_path / "out.mp4").read_bytes()
    assert b"sliced_threads=0" in data and b"mbtree=1" in data
    processors = len(os.sched_getaffinity(0))
    assert processors == 1 or b"threads=1 lookahead" not in data


@pytest.mark.slow
def test_200_encodes_of_six_sizes_on_a_busy_machine() -> None:
    """One file for each size and number of threads."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "mp4.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
