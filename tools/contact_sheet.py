"""A picture of many videos: some frames of each side by side, with its prompt below.

    python tools/contact_sheet.py docs/contact-sheet.png                  # 12 prompts, the demo model
    python tools/contact_sheet.py OUT.png --model FOLDER --seed 7

The prompts are drawn by `demo.adherence.pick`, so they are spread over every colour, shape, direction and
background, and all have one seed: nothing is chosen by hand. Two of the twelve name a combination
that was held out of training; their captions say so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ascendit.demo import world
from ascendit.demo.adherence import pick

MARGIN, GAP, SCALE = 22, 4, 2  # pixels, pixels, factor
TEXT, OUTLINE, PAPER = "#24292f", "#d0d7de", "#ffffff"
FONT_SIZE = 19


def strip(frames: NDArray[np.uint8], picks: int) -> Image.Image:
    """`picks` frames from first to last, evenly spaced, enlarged without smoothing, in one row."""
    f, h, w, _ = frames.shape
    h, w = h * SCALE, w * SCALE
    row = Image.new("RGB", (picks * (w + 2 + GAP) - GAP, h + 2), PAPER)
    draw = ImageDraw.Draw(row)
    for n, i in enumerate(np.linspace(0, f - 1, picks).round().astype(int)):
        x = n * (w + 2 + GAP)
        draw.rectangle((x, 0, x + w + 1, h + 1), outline=OUTLINE)  # shows the border of white videos
        row.paste(Image.fromarray(frames[i]).resize((w, h), Image.Resampling.NEAREST), (x + 1, 1))
    return row


def fitting_font(texts: Sequence[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font in `FONT_SIZE`, or smaller, so that the longest text fits."""
    for size in range(FONT_SIZE, 9, -1):
        font = ImageFont.load_default(size)
        if max(font.getlength(t) for t in texts) <= width:
            break
    return font


def contact_sheet(
    videos: Sequence[tuple[str, NDArray[np.uint8]]], path: str | Path, columns: int = 2, picks: int = 5
) -> None:
    """Write a PNG. `videos`: (caption, frames uint8 [F, H, W, 3]), at least one, all of one size."""
    strips = [strip(frames, picks) for _, frames in videos]
    width, height = strips[0].size
    captions = [caption for caption, _ in videos]
    font = fitting_font(captions, width)
    cell = height + 8 + FONT_SIZE + MARGIN
    rows = -(-len(videos) // columns)
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * cell + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, (caption, image) in enumerate(zip(captions, strips, strict=True)):
        x, y = MARGIN + n % columns * (width + MARGIN), MARGIN + n // columns * cell
        sheet.paste(image, (x, y))
        draw.text((x + width // 2, y + height + 6), caption, fill=TEXT, font=font, anchor="ma")
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate 12 varied prompts and write a contact sheet.")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--model", default="demo", help="folder, hub name or demo (default)")
    parser.add_argument(
        "--seed", type=int, default=7, help="seed of every video and of the choice of prompts"
    )
    args = parser.parse_args()

    import ascendit

    pipe = ascendit.load(args.model)
    videos = []
    for scene in pick(12, rng_seed=args.seed):
        note = " (not in training)" if scene.triple in world.held_out() else ""
        print(f"{scene.prompt()}{note}", flush=True)
        videos.append((scene.prompt() + note, pipe.generate(scene.prompt(), seed=args.seed).frames))
    contact_sheet(videos, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
