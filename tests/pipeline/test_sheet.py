"""Contact sheets: frames, captions, sizes and refusals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline.refusals import refused
from wan_defaults import SINGLE

import ascendit
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.pipeline import sheet
from ascendit.pipeline.request import resolve
from ascendit.pipeline.sheet import Sheet, contact_sheet
from ascendit.pipeline.video import Video


def video(count: int = 11, size: tuple[int, int] = (64, 64), prompt: str = "a cat", seed: int = 3) -> Video:
    """Frame i has the grey value 20 * i."""
    frames = (
        np.zeros((count, *size, 3), np.uint8) + (20 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    )
    return Video(frames, 8, resolve(SINGLE, prompt, seed=seed), "m")


def test_a_row_has_evenly_spaced_frames_from_first_to_last() -> None:
    image = ascendit.contact_sheet(video(11), columns=6)
    assert image.width == 2 * 12 + 6 * 128 + 5 * 4  # 64 pixels twice
    greys = [image.getpixel((12 + 64 + i * 132, image.height - 30)) for i in range(6)]
    assert greys == [(40 * i,) * 3 for i in range(6)]
    assert contact_sheet(video(2), columns=6).width == 360 + 24
    assert np.asarray(contact_sheet([video(1)])).std() > 0


def test_captions_are_drawn() -> None:
    one, other = (np.asarray(contact_sheet(video(prompt=p, seed=s))) for p, s in (("a cat", 3), ("a cat", 4)))
    changed = np.argwhere((one != other).any(axis=(1, 2)))
    assert one.shape == other.shape and 31 <= changed.min() <= changed.max() < 50  # the second line of text
    long = contact_sheet(video(prompt="word " * 500))
    assert long.size == contact_sheet(video()).size
    bare = Video(video().frames, 8)
    assert contact_sheet(bare).height < long.height


def test_large_and_many_videos_stay_below_5_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, of which a PNG has three bytes per pixel."""
    assert 3.1 * sheet.MAX_PIXELS < 4_900_000
    monkeypatch.setattr(sheet, "MAX_PIXELS", 100_000)
    noise = np.random.default_rng(0).integers(0, 256, (6, 120, 208, 3), np.uint8)
    contact_sheet([Video(noise, 8)] * 5).save(tmp_path / "s.png")
    assert 200_000 < (tmp_path / "s.png").stat().st_size < 330_000


def test_text_without_a_font_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet._system_fonts.cache_clear()
    monkeypatch.setattr(sheet, "FONTS", ("none.ttf",))
    with caplog.at_level(logging.WARNING, "ascendit"):
        contact_sheet(video(prompt="\U0001f431 a cat"))
        contact_sheet(video(prompt="猫"))
        contact_sheet(video(prompt="猫\U0001f431"))
    assert "no font on this machine has \U0001f431" in caplog.text
    fonts = [record.getMessage().partition("such as ")[2] for record in caplog.records]
    assert fonts == ["fonts-symbola", "fonts-noto-cjk", "fonts-noto-cjk and fonts-symbola"]
    sheet._system_fonts.cache_clear()


@pytest.mark.parametrize("arguments", [([], 6), ([video()], 0)])
def test_sheets_without_frames_are_refused(arguments: Any) -> None:
    with refused(UsageError, "E-USE-01", "at least one video and one column"):
        contact_sheet(arguments[0], columns=arguments[1])


def test_the_file_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.png"
    drawn = Sheet(str(path), ["a.mp4", "b.mp4"])
    drawn.add(video())
    assert drawn.save() == path and [p.name for p in path.parent.iterdir()] == ["s.png"]
    with refused(UsageError, "E-USE-03", "already exists", "s-2.png"):
        Sheet(str(path), ["a.mp4", "b.mp4"])
    assert Sheet(str(path), [], overwrite=True).path == path
    with refused(UsageError, "E-USE-01", "s.pdf", "--sheet", "s.png"):
        Sheet(str(tmp_path / "s.pdf"), [])
    with refused(EnvironmentProblem, "E-ENV-02"):
        Sheet("/proc/s.png", [])
    with refused(UsageError, "E-USE-03", "is the video too", "one-sheet.png"):
        Sheet(str(tmp_path / "one.png"), [str(tmp_path / "one.png")])
