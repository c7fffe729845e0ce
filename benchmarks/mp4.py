"""The mp4 files of `Video.save`: reproducible under load, and the time against x264's defaults.

    python benchmarks/mp4.py            # 200 encodes of six sizes beside eight busy processes
    python benchmarks/mp4.py --time     # 81 frames of 1280x720 against x264's default settings, interleaved

The first command encodes each size with the default number of threads and with 1, 2, 3 and 5, in child
processes whose allocations are filled with different bytes (`MALLOC_PERTURB_`), and counts the distinct files
of each size and number of threads; x264's defaults with the same fillings are a control. Both print a table.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
from _timing import interleaved

from ascendit.pipeline import video_codecs
from ascendit.pipeline.frame_checks import Frames
from ascendit.pipeline.video import Video

SIZES = {(64, 64): 17, (100, 50): 17, (258, 130): 17, (480, 832): 9, (832, 480): 9, (1280, 720): 5}
"""(width, height) -> number of frames."""
THREADS = (None, 1, 2, 3, 5)
"""None: x264's default number of threads."""
MP4 = video_codecs.CODECS["mp4"]
DEFAULTS = {"crf": MP4.options["crf"]}
BUSY = "while True: pass"


def moving(width: int, height: int, frames: int) -> Frames:
    """Waves with fixed grain that drift, and a disc that moves: uint8 [F, H, W, 3]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    grain = np.random.default_rng(0).normal(0, 12, (height, width)).astype(np.float32)
    video = np.empty((frames, height, width, 3), np.uint8)
    for i, frame in enumerate(video):
        red = 110 + 60 * np.sin((x + 4 * i) / 23) + 40 * np.cos((y - 2 * i) / 17) + np.roll(grain, 3 * i, 1)
        green = 100 + 50 * np.sin((0.7 * x - 3 * i + y) / 31) + np.roll(grain, -2 * i, 0)
        blue = 128 + 70 * np.cos((x - y + 5 * i) / 41)
        frame[:] = np.stack([red, green, blue], -1).clip(0, 255)
        disc = (x - (20 + 6 * i) % width) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 5) ** 2
        frame[disc] = (230, 40, 30)
    return video


def encode(frames: Frames, folder: Path, options: dict[str, str]) -> bytes:
    """The bytes of the mp4 that `Video.save` writes with these encoder options."""
    with mock.patch.dict(video_codecs.CODECS, mp4=MP4._replace(options=options)):
        return Video(frames, 16).save(folder / "out.mp4", metadata=False, overwrite=True).read_bytes()


def child(width: int, height: int, threads: str, repetitions: int) -> None:
    """Print a hash of each encode; `threads`: a number, `auto`, or `control` for x264's defaults."""
    frames, options = moving(width, height, SIZES[width, height]), dict(MP4.options)
    if threads == "control":
        options = dict(DEFAULTS)
    elif threads != "auto":
        options["threads"] = threads
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repetitions):
            print(hashlib.sha256(encode(frames, Path(folder), options)).hexdigest())


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def reproducible(total: int, load: int) -> bool:
    """Encode `total` times beside `load` busy processes; print the distinct files of each size."""
    files: dict[tuple[tuple[int, int], str], list[str]] = {}
    names = [*("auto" if n is None else str(n) for n in THREADS), "control"]
    rounds = -(-total // (len(SIZES) * len(THREADS)))
    with busy(load):
        for i, size, name in itertools.product(range(rounds), SIZES, names):
            command = [sys.executable, __file__, "--child", *map(str, size), name, "1"]
            environ = os.environ | {"MALLOC_PERTURB_": str((37 * i + 17) % 256)}
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
            files.setdefault((size, name), []).extend(done.stdout.split())
    count = sum(len(hashes) for (_, name), hashes in files.items() if name != "control")
    print(f"{count} encodes, {load} busy processes, {os.cpu_count()} processors; distinct files of encodes\n")
    print("| size | " + " | ".join(f"threads {n}" for n in names[:-1]) + " | x264's defaults |")
    print("|---" * (len(names) + 1) + "|")
    for size in SIZES:
        cells = (f"{len(set(files[size, n]))} of {len(files[size, n])}" for n in names)
        print(f"| {size[0]}x{size[1]} | " + " | ".join(cells) + " |")
    return all(len(set(hashes)) == 1 for (_, name), hashes in files.items() if name != "control")


def measure(frames: Frames, repetitions: int) -> None:
    """Print the time of `Video.save` with ascendit's options and with x264's defaults."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "x264's defaults": partial(encode, frames, Path(folder), DEFAULTS),
            "ascendit": partial(encode, frames, Path(folder), dict(MP4.options)),
        }
        processor: dict[str, list[float]] = {name: [] for name in runs}

        def counted(name: str) -> None:
            start = time.process_time()
            runs[name]()
            processor[name].append(time.process_time() - start)

        seconds = interleaved({name: partial(counted, name) for name in runs}, repetitions)
        sizes = {name: len(run()) for name, run in runs.items()}
    base = statistics.median(seconds["x264's defaults"])
    print("| options | median s | min s | x time | CPU s | bytes |\n|---|---|---|---|---|---|")
    for name, values in seconds.items():
        median, cpu = statistics.median(values), statistics.median(processor[name])
        print(
            f"| {name} | {median:.2f} | {min(values):.2f} | {median / base:.2f} | {cpu:.2f} | {sizes[name]} |"
        )


def main() -> int:
    """Run one of the two measurements. Exit code 1 if a size and number of threads has two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encodes", type=int, default=200)
    parser.add_argument("--load", type=int, default=8, help="busy processes")
    parser.add_argument("--time", action="store_true", help="measure the time")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        width, height, threads, repetitions = args.child
        child(int(width), int(height), threads, int(repetitions))
        return 0
    if args.time:
        measure(moving(1280, 720, args.frames), args.reps)
        return 0
    return 0 if reproducible(args.encodes, args.load) else 1


if __name__ == "__main__":
    sys.exit(main())
