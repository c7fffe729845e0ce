"""The size of a video by the ratio of its first frame, and images of another ratio than the video."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from wan_defaults import I2V, TI2V, defaults_of

from ascendit.errors import RequestError
from ascendit.pipeline.fit import Fit, describe_fit, fit_picture, has_ratio, size_for
from ascendit.pipeline.request import resolve

I2V_480 = defaults_of("Wan2.1-I2V-14B-480P")
FLF2V = defaults_of("Wan2.1-FLF2V-14B-720P")
SIDES = st.integers(200, 4000)


def authors_i2v(width: int, height: int, area: int) -> tuple[int, int]:
    """`image2video.py` of Wan2.1 and Wan2.2: stride 8, patch 2."""
    ratio = height / width
    lat_h = round(np.sqrt(area * ratio) // 8 // 2 * 2)
    lat_w = round(np.sqrt(area / ratio) // 8 // 2 * 2)
    return lat_w * 8, lat_h * 8


def authors_ti2v(w: int, h: int, expected_area: int) -> tuple[int, int]:
    """`best_output_size` of Wan2.2, with multiples of 32."""
    dw = dh = 32
    ratio = w / h
    ow = (expected_area * ratio) ** 0.5
    oh = expected_area / ow
    ow1 = int(ow // dw * dw)
    oh1 = int(expected_area / ow1 // dh * dh)
    ratio1 = ow1 / oh1
    oh2 = int(oh // dh * dh)
    ow2 = int(expected_area / oh2 // dw * dw)
    ratio2 = ow2 / oh2
    if max(ratio / ratio1, ratio1 / ratio) < max(ratio / ratio2, ratio2 / ratio):
        return ow1, oh1
    return ow2, oh2


def is_exact(area: int, a: int, b: int) -> bool:
    """Whether sqrt(area * a / b) is a whole number, where the authors' floats may round down."""
    return area * a % b == 0 and math.isqrt(area * a // b) ** 2 == area * a // b


@given(SIDES, SIDES)
def test_the_size_is_the_authors(width: int, height: int) -> None:
    for defaults in (I2V, I2V_480, FLF2V):
        area = defaults.width * defaults.height
        if not (is_exact(area, width, height) or is_exact(area, height, width)):
            assert size_for(defaults, (width, height)) == authors_i2v(width, height, area)
    area = TI2V.width * TI2V.height
    if not (is_exact(area, width, height) or is_exact(area, height, width)):
        assert size_for(TI2V, (width, height)) == authors_ti2v(width, height, area)


@pytest.mark.parametrize(
    ("defaults", "picture", "size"),
    [
        (I2V, (1280, 720), (1280, 720)),
        (I2V, (720, 1280), (720, 1280)),
        (I2V, (3000, 3000), (960, 960)),
        (I2V, (4032, 3024), (1104, 816)),
        (I2V_480, (832, 480), (832, 480)),  # the authors' floats make 832x464 of it
        (I2V_480, (480, 832), (480, 832)),
        (I2V_480, (64, 128), (432, 880)),
        (TI2V, (1280, 704), (1280, 704)),
        (TI2V, (1920, 1080), (1248, 704)),
        (TI2V, (704, 1280), (704, 1280)),
        (I2V, (100, 1), (9600, 96)),
        (I2V, (1, 100), (96, 9600)),
    ],
)
def test_sizes(defaults: Any, picture: tuple[int, int], size: tuple[int, int]) -> None:
    assert size_for(defaults, picture) == size
    request = resolve(defaults, "a", image="x.png", last_image=None, picture=picture)
    assert (request.width, request.height) == size
    assert resolve(defaults, "a", image="x.png", picture=picture, width=64).width == 64


@pytest.mark.parametrize("picture", [(5000, 1), (1, 5000)])
@pytest.mark.parametrize("defaults", [I2V, TI2V])
def test_an_image_that_is_too_narrow(defaults: Any, picture: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="too narrow") as error:
        size_for(defaults, picture)
    assert error.value.code == "E-REQ-02" and error.value.fix.startswith(f"width={defaults.width}, height=")


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_every_fit_makes_the_ratio(picture: tuple[int, int], units: tuple[int, int]) -> None:
    size = (units[0] * 16, units[1] * 16)
    image = Image.new("RGB", picture, "white")
    for fit in ("crop", "pad", "stretch"):
        fitted = fit_picture(image, size, fit)
        unchanged = fit == "stretch" or has_ratio(picture, size)
        assert fitted is image if unchanged else fitted.size == size


def test_the_ratio_is_exact_to_a_pixel() -> None:
    assert has_ratio((1280, 720), (832, 468)) and has_ratio((1000, 563), (1280, 720))
    assert has_ratio((1000, 562), (1280, 720)) and not has_ratio((1000, 560), (1280, 720))
    assert not has_ratio((64, 128), (128, 64))


def column(fit: Fit) -> np.ndarray:
    """The middle row of a 30x90 picture with three squares (red, green, blue from the top) at 90x90."""
    rgb = np.zeros((90, 30, 3), np.uint8)
    for i in range(3):
        rgb[30 * i : 30 * i + 30, :, i] = 255
    fitted = fit_picture(Image.fromarray(rgb), (96, 96), fit).resize((96, 96))
    return np.asarray(fitted)


def test_crop_keeps_the_middle() -> None:
    pixels = column("crop")
    assert (pixels[8:-8] == (0, 255, 0)).all()


def test_pad_keeps_everything_between_black_bars() -> None:
    pixels = column("pad")
    assert not pixels[:, :30].any() and not pixels[:, -30:].any()
    assert [pixels[y, 48].tolist() for y in (4, 48, 92)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_stretch_keeps_everything_at_full_width() -> None:
    pixels = column("stretch")
    assert [pixels[y, 2].tolist() for y in (4, 48, 92)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    ("fit", "text", "loud"),
    [
        ("crop", "64x128, cropped to 64x32, the ratio of 128x64 (--fit pad adds bars, --fit stretch", True),
        ("pad", "64x128, resized to 32x64, with black bars to 128x64", True),
        ("stretch", "64x128, stretched to 128x64, another ratio", True),
    ],
)
def test_the_description(fit: Fit, text: str, loud: bool) -> None:
    description, is_loud = describe_fit((64, 128), (128, 64), fit)
    assert description.startswith(text) and is_loud == loud
    assert describe_fit((64, 32), (128, 64), fit) == ("64x32, resized to 128x64", False)
    assert describe_fit((128, 64), (128, 64), fit) == ("128x64", False)
    assert describe_fit((129, 64), (126, 64), fit)[1] is False  # 2 %
