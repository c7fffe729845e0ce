"""Every name that an error about the output suggests can be used as it is."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ascendit.errors import UsageError
from ascendit.option_text import command_line
from ascendit.pipeline.video import Video, check_output


def _file(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


CASES: list[tuple[str, tuple[int, int, int], int, Callable[[Path], object]]] = [
    ("frames", (5, 32, 32), 8, lambda d: None),
    ("frames", (5, 32, 32), 8, lambda d: _file(d, "frames.mp4", "frames-2.json")),
    ("clip.avi", (5, 32, 32), 8, lambda d: None),
    ("my clip.avi", (5, 32, 32), 8, lambda d: None),
    (".", (5, 32, 32), 8, lambda d: None),
    ("..", (5, 32, 32), 8, lambda d: None),
    ("a/..", (5, 32, 32), 8, lambda d: None),
    ("a.mp4", (5, 32, 32), 8, lambda d: _file(d, "a.mp4")),
    ("it's a.mp4", (5, 32, 32), 8, lambda d: _file(d, "it's a.mp4", "it's a-2.json")),
    ("a.mp4", (5, 32, 32), 8, lambda d: _file(d, "a.json", "a-2.mp4")),
    ("a.mp4", (5, 32, 32), 8, lambda d: (d / "a.mp4").mkdir()),
    ("a.png", (5, 32, 32), 8, lambda d: _file(d, "a.json")),
    ("a.png", (5, 32, 32), 8, lambda d: _file(d, "a/thesis.tex", "a-2")),
    ("a.png", (1, 32, 32), 8, lambda d: _file(d, "a.png")),
    ("frames/", (5, 32, 32), 8, lambda d: _file(d, "frames/notes.txt")),
    ("v1.2/", (5, 32, 32), 8, lambda d: _file(d, "v1.2/notes.txt", "v1.2-2.json")),
    ("frames/", (5, 32, 32), 8, lambda d: _file(d, "frames")),
    ("frames/", (5, 32, 32), 8, lambda d: _file(d, "frames.json")),
    ("a b/", (5, 32, 32), 8, lambda d: _file(d, "a b/frame_0000.png")),
    ("odd.mp4", (5, 31, 32), 8, lambda d: None),
    ("odd.mp4", (5, 32, 33), 60, lambda d: _file(d, "odd.webm", "odd.json")),
    ("fast.gif", (5, 32, 32), 60, lambda d: _file(d, "fast.mp4")),
    ("fast.gif", (5, 31, 32), 60, lambda d: None),
]


@pytest.mark.parametrize(("name", "shape", "fps", "prepare"), CASES)
def test_every_suggested_name_works(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shape: tuple[int, int, int],
    fps: int,
    prepare: Callable[[Path], object],
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    prepare(Path.cwd())
    with command_line(), pytest.raises(UsageError) as error:
        check_output(name, shape, fps)
    with command_line():
        fix = error.value.fix
    words = shlex.split(fix)
    names = [word for before, word in zip(words, words[1:], strict=False) if before == "-o"]
    assert names and len(names) == len(re.findall("-o ", fix))
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for suggested in names:
        assert not Video(frames, fps).save(suggested, metadata=False).name.startswith(name.rstrip("/") + "/")
        check_output(f"again-{Path(suggested).name}" + "/" * suggested.endswith("/"), shape, fps)
