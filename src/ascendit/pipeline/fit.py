"""The size of a video from the ratio of its first frame, and a picture brought to the ratio of the video.

`crop` keeps the middle in the ratio of the video, `pad` adds black bars, `stretch` distorts (Diffusers).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from ascendit import geometry
from ascendit.errors import RequestError
from ascendit.family import Size
from ascendit.pipeline.defaults import Defaults

log = logging.getLogger("ascendit")

Fit = Literal["crop", "pad", "stretch"]
LOUD = 0.05
"""Share of a picture, or of the video, that a crop or bars may take without a warning."""


def size_for(defaults: Defaults, picture: Size) -> Size:
    """The size of a video: the model's default area in the ratio of its first frame, `picture`.

    The rule of the model's authors; see `geometry.size_of_area` and `geometry.best_size`. Raises RequestError
    (E-REQ-02) if the picture is too narrow.
    """
    rule = geometry.best_size if defaults.task == "ti2v" else geometry.size_of_area
    size = rule(defaults.width * defaults.height, picture, defaults.size_multiple)
    if 0 in size:
        default = f"{defaults.width}x{defaults.height}"
        raise RequestError(
            f"an image of {picture[0]}x{picture[1]}, which is too narrow for the area of {default}",
            needs=f"a ratio that leaves {defaults.size_multiple} pixels for the shorter side",
            fix=f"--size {default}, which crops the image, or --size {default} --fit pad",
            code="E-REQ-02",
        )
    log.info("size %dx%d: the model's area in the ratio of the image; --size overrides it", *size)
    return size


def has_ratio(picture: Size, size: Size) -> bool:
    """Whether `picture` has the ratio of `size`, to the nearest whole pixel."""
    (w, h), (width, height) = picture, size
    return 2 * abs(w * height - h * width) <= max(width, height)


def fit_picture(picture: Any, size: Size, fit: Fit) -> Any:
    """The PIL image `picture`, to be resized to `size`: unchanged if it has the ratio, else by `fit`."""
    from PIL import Image, ImageOps

    if fit == "stretch" or has_ratio(picture.size, size):
        return picture
    if fit == "crop":
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    inner = _inner(picture.size, size)
    padded = Image.new("RGB", size)
    offset = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
    padded.paste(picture.resize(inner, Image.Resampling.LANCZOS), offset)
    return padded


def describe_fit(picture: Size, size: Size, fit: Fit) -> tuple[str, bool]:
    """(how `fit_picture` treats a picture of this size, whether it changes more than `LOUD` of it)."""
    (w, h), (width, height) = picture, size
    start, end = f"{w}x{h}", f"{width}x{height}"
    if has_ratio(picture, size):
        return (f"{start}, resized to {end}" if picture != size else start), False
    ratio = (w * height) / (h * width)
    loud = 1 - min(ratio, 1 / ratio) > LOUD
    if fit == "stretch":
        return f"{start}, stretched to {end}, another ratio", loud
    if fit == "pad":
        inner = _inner(picture, size)
        return f"{start}, resized to {inner[0]}x{inner[1]}, with black bars to {end}", loud
    shown = (min(w, max(1, round(h * width / height))), min(h, max(1, round(w * height / width))))
    others = "--fit pad adds bars, --fit stretch distorts"
    return f"{start}, cropped to {shown[0]}x{shown[1]}, the ratio of {end} ({others})", loud


def _inner(picture: Size, size: Size) -> Size:
    """The largest size with the ratio of `picture` inside `size`."""
    scale = min(size[0] / picture[0], size[1] / picture[1])
    return max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale))
