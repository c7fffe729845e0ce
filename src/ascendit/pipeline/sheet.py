"""Contact sheets: one row of evenly spaced frames per video, with its prompt and seed.

ascendit.contact_sheet([pipe.generate(prompt, seed=s) for s in range(4)]).save("sheet.png")
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ascendit.checkpoint.file_copy import check_writable, write_error
from ascendit.errors import UsageError, escaped
from ascendit.geometry import rate_text
from ascendit.pipeline.video import Video, check_name
from ascendit.pipeline.video_codecs import import_library
from ascendit.report import free_path, shell_line

log = logging.getLogger("ascendit")

COLUMNS = 6
MAX_WIDTH, MIN_WIDTH = 160, 48  # pixels of a frame
MAX_PIXELS = 1_500_000  # of all frames; a PNG of noise has 3 bytes per pixel
MARGIN, GAP, TEXT = 12, 4, 14
BACKGROUND, INK, GREY = (255, 255, 255), (20, 20, 20), (110, 110, 110)
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")
FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc"),
    *("wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "msyh.ttc", "simhei.ttf", "PingFang.ttc"),
    *("Symbola_hint.ttf", "Symbola.ttf", "seguisym.ttf"),
    *("Arial Unicode.ttf", "DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf"),
)
"""Fonts of systems, tried for text that Pillow's own font lacks."""


class _Row(NamedTuple):
    """One video: its frames, reduced, and two lines of text."""

    frames: list[Any]
    """PIL images of one size."""
    title: str
    details: str


def contact_sheet(videos: Video | Iterable[Video], *, columns: int = COLUMNS) -> Any:
    """A PIL image with one row for each video: up to `columns` frames, its prompt, seed and size.

    Raises UsageError (E-USE-01) without a video or for `columns` below 1, EnvironmentProblem (E-ENV-01) if
    Pillow is missing.
    """
    clips = [videos] if isinstance(videos, Video) else list(videos)
    if not clips or columns < 1:
        got = f"{len(clips)} videos in {columns} columns"
        needs = "at least one video and one column"
        raise UsageError(got, needs=needs, fix="contact_sheet([video], columns=6)")
    return _draw([_row(video, columns, len(clips)) for video in clips])


class Sheet:
    """The contact sheet of one run, which keeps only the reduced frames of its videos.

    `outputs`: the paths of the videos. Raises the errors of `check_sheet`, and UsageError (E-USE-03) if
    `path` is one of them.
    """

    def __init__(self, path: str, outputs: Sequence[str], *, overwrite: bool = False) -> None:
        self.path, self._videos, self._overwrite = Path(path), len(outputs), overwrite
        self._rows: list[_Row] = []
        check_sheet(self.path, overwrite=overwrite)
        if os.path.abspath(path) in map(os.path.abspath, outputs):
            rule = "another name than that of the video"
            fix = shell_line(["--sheet", str(self.path.with_stem(f"{self.path.stem}-sheet"))])
            raise UsageError(f"{path} is the video too", needs=rule, fix=fix, code="E-USE-03")

    def add(self, video: Video) -> None:
        """Add a row."""
        self._rows.append(_row(video, COLUMNS, self._videos))

    def save(self) -> Path:
        """Draw and write the file, complete or not at all.

        Raises the errors of `check_sheet`, EnvironmentProblem: E-ENV-04 for a full disk.
        """
        check_sheet(self.path, overwrite=self._overwrite)
        image, folder = _draw(self._rows), self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".ascendit-", dir=folder) as temporary:
                new = Path(temporary) / f"sheet{self.path.suffix}"
                image.save(new)
                os.replace(new, self.path)
        except OSError as e:
            raise write_error(folder, e) from e
        return self.path


def check_sheet(path: Path, *, overwrite: bool) -> None:
    """Raise the error of a sheet that cannot be written.

    UsageError: E-USE-01 for another extension than `EXTENSIONS`, E-USE-03 for an existing file;
    EnvironmentProblem: E-ENV-01 without Pillow, E-ENV-02 for a folder that is not writable.
    """
    if path.suffix.lower() not in EXTENSIONS:
        rule = f"a name that ends in {', '.join(EXTENSIONS)}"
        fix = shell_line(["--sheet", str(path.with_suffix(".png")) if path.name else "sheet.png"])
        raise UsageError(f"unknown image format of {str(path)!r}", needs=rule, fix=fix)
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        rule = "a new name; files are overwritten only with --overwrite"
        fix = shell_line(["--sheet", str(free_path(path))])
        raise UsageError(f"{path} already exists", needs=rule, fix=fix, code="E-USE-03")
    import_library("PIL", "pillow")
    check_name(path)
    check_writable(path)


# ---- drawing ------------------------------------------------------------------------------------


def _row(video: Video, columns: int, num_rows: int) -> _Row:
    images = import_library("PIL.Image", "pillow")
    count, height, width, _ = video.frames.shape
    indices = sorted({round(i) for i in np.linspace(0, count - 1, min(columns, count))})
    ratio = height / width
    widest = math.isqrt(int(MAX_PIXELS / (num_rows * columns * ratio)))
    target = min(MAX_WIDTH, max(MIN_WIDTH, widest))
    if width <= target:  # pixels stay sharp
        size, rule = (width * (target // width), height * (target // width)), images.Resampling.NEAREST
    else:
        size, rule = (target, max(1, round(target * ratio))), images.Resampling.LANCZOS
    pictures = (images.fromarray(np.ascontiguousarray(video.frames[i])) for i in indices)
    request = video.request
    seed = [f"seed {request.seed}"] if request else []
    details = [*seed, f"{width}x{height}", f"{count} frames", f"{rate_text(video.fps)} fps", video.model]
    return _Row(
        [picture.resize(size, rule) for picture in pictures],
        escaped(request.prompt if request else ""),
        ", ".join(filter(None, details)),
    )


def _draw(rows: list[_Row]) -> Any:
    images, draws = import_library("PIL.Image", "pillow"), import_library("PIL.ImageDraw", "pillow")
    font = _font("".join(f"{row.title}{row.details}" for row in rows))
    line = TEXT + 5
    widths = [sum(x.width + GAP for x in row.frames) - GAP for row in rows]
    heights = [row.frames[0].height + line * (2 if row.title else 1) + MARGIN for row in rows]
    width = max(360, *widths) + 2 * MARGIN
    sheet = images.new("RGB", (width, sum(heights) + MARGIN), BACKGROUND)
    draw, y = draws.Draw(sheet), MARGIN
    for row, height in zip(rows, heights, strict=True):
        top = y
        for text, ink in ((row.title, INK), (row.details, GREY)):
            if text:
                draw.text((MARGIN, top), _shortened(text, font, width - 2 * MARGIN), font=font, fill=ink)
                top += line
        x = MARGIN
        for picture in row.frames:
            sheet.paste(picture, (x, top))
            draw.rectangle((x - 1, top - 1, x + picture.width, top + picture.height), outline=(215, 215, 215))
            x += picture.width + GAP
        y += height
    return sheet


def _shortened(text: str, font: Any, width: int) -> str:
    """`text`, cut with `..` so that it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, min(len(text), 4 * width)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(f"{text[:middle]} ..") <= width else (low, middle - 1)
    return f"{text[:low].rstrip()} .."


def _font(text: str) -> Any:
    """The font with the most characters of `text`; the log names those without a shape."""
    fonts = import_library("PIL.ImageFont", "pillow")
    own = fonts.load_default(TEXT)
    if not _missing(own, text):
        return own
    best = min((own, *_system_fonts()), key=lambda font: len(_missing(font, text)))
    if missing := _missing(best, text):
        letters = any(unicodedata.category(c).startswith("L") for c in missing)
        symbols = any(unicodedata.category(c).startswith("S") for c in missing)
        log.warning(
            "no font on this machine has %s: the sheet shows boxes; install one, such as %s",
            " ".join(sorted(missing)[:10]),
            " and ".join([*["fonts-noto-cjk"] * (letters or not symbols), *["fonts-symbola"] * symbols]),
        )
    return best


@cache
def _system_fonts() -> tuple[Any, ...]:
    fonts = import_library("PIL.ImageFont", "pillow")
    opened = []
    for name in FONTS:
        try:
            opened.append(fonts.truetype(name, TEXT))
        except OSError:  # not on this machine
            continue
    return tuple(opened)


def _missing(font: Any, text: str) -> set[str]:
    """The characters of `text` that `font` draws as an empty box."""
    box = _shape(font, "\U0010fffe")
    return {c for c in set(text) if not c.isascii() and _shape(font, c) == box}


def _shape(font: Any, character: str) -> tuple[Any, bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)
