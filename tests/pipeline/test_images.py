"""Images of every kind: equal to Diffusers' `load_image` where it is right, else correct, or refused."""

from __future__ import annotations

import io
import logging
import re
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from image_files import fractions, gray16, scene
from PIL import Image
from wan_defaults import CASCADE, I2V, TI2V, defaults_of

from ascendit.errors import RequestError, UsageError
from ascendit.pipeline import images
from ascendit.pipeline.images import (
    Pictures,
    fitted_pictures,
    name_image,
    open_image,
    pictures_of,
    size_source,
)
from ascendit.pipeline.request import GenerateRequest, resolve

RGB = np.asarray(scene())
GRAY = np.asarray(scene().convert("L"))


def pixels_of(image: Any) -> np.ndarray:
    picture = open_image(image)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB" and not picture.info
    return np.asarray(picture)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", image_files.EQUAL)
@pytest.mark.filterwarnings("ignore:Palette images")
def test_a_file_equals_load_image(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    image_files.EQUAL[name](path)
    with Image.open(path) as file:
        expected = np.asarray(load_image(file))
    for image in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(pixels_of(image), expected)
    with Image.open(path) as file:
        assert np.array_equal(pixels_of(file), expected)
    if name not in ("bit.png", "icon.ico"):
        assert np.abs(expected.astype(int) - RGB).mean() < 70


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_viewers_show_it(orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "photo.webp"
    image_files.turned(orientation, lossless=True)(path)
    assert np.array_equal(pixels_of(path), RGB)
    assert np.array_equal(pixels_of(open_image(path)), RGB)  # once, not twice


@pytest.mark.parametrize("name", image_files.SIXTEEN)
def test_16_bits_and_floats_that_load_image_clips(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    image_files.SIXTEEN[name](path)
    exact = gray16() / 257
    assert np.abs(pixels_of(path) - exact[..., None]).max() <= 0.5 + 1e-6
    assert np.abs(np.asarray(load_image(str(path))) - exact[..., None]).mean() > 100  # white or black


@pytest.mark.parametrize("name", image_files.REFUSED)
def test_a_file_that_is_refused(name: str, tmp_path: Path) -> None:
    write, pattern = image_files.REFUSED[name]
    path = tmp_path / name
    write(path)
    for image in (path, path.read_bytes()):
        with pytest.raises(UsageError, match=pattern) as error:
            open_image(image)
        assert error.value.code == "E-USE-04" and error.value.fix


def test_limits_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    scene().save(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 959)
    with pytest.raises(UsageError, match="40x24 pixels") as error:
        open_image(path)
    assert "smaller" in error.value.fix and error.value.code == "E-USE-04"


@pytest.mark.parametrize("orientation", [0, 9, 65535, "6", b"6"])
def test_an_invalid_orientation_is_ignored(orientation: Any) -> None:
    image = scene()
    image.getexif()[image_files.ORIENTATION] = orientation
    assert np.array_equal(pixels_of(image), RGB)


def test_damaged_exif_data_are_ignored_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i, data in enumerate(
        (b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(9))
    ):
        path = tmp_path / f"{i}.png"
        scene().save(path, exif=data)
        assert np.array_equal(pixels_of(path), RGB)
    assert any("EXIF data are damaged" in record.message for record in caplog.records)


def test_transparent_pixels_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opaque = scene().convert("RGBA")
    open_image(opaque)
    assert not caplog.records
    open_image(image_files.with_alpha("RGBA"))
    assert "transparent pixels show the colours stored in them" in caplog.text


@pytest.mark.parametrize(
    ("path", "code", "text"),
    [
        ("https://a.org/b.png", "E-USE-04", "the URL https://a.org/b.png"),
        ("data:image/png;base64," + "A" * 500, "E-USE-04", "the URL data:image"),
        ("file:///tmp/a.png", "E-USE-04", "the URL file:"),
        ("nowhere.png", "E-USE-02", "no file nowhere.png"),
        ("", "E-USE-02", "no file with an empty name"),
        (".", "E-USE-02", r"\. is a folder"),
        ("a" * 5000, "E-USE-02", "no file"),
        ("a\0b", "E-USE-02", "no file"),
        ("/dev/zero", "E-USE-02", "is a device or pipe"),
    ],
)
def test_paths_that_are_refused(path: str, code: str, text: str) -> None:
    with pytest.raises(UsageError, match=text) as error:
        open_image(path)
    assert error.value.code == code and len(error.value.got) < 6000


# ---- PIL images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_modes_of_pillow_equal_load_image(mode: str) -> None:
    image = image_files.lab() if mode == "LAB" else image_files.with_alpha("RGBA").convert("RGBA")
    image = image if mode in ("LAB", "RGBA") else image.convert("P" if mode == "PA" else mode).convert(mode)
    assert image.mode == mode
    assert np.array_equal(pixels_of(image), np.asarray(load_image(image)))


def test_premultiplied_grey() -> None:
    image = image_files.with_alpha("LA").convert("La")
    solid = np.asarray(image_files.alpha()) > 200
    assert np.abs(pixels_of(image)[..., 0].astype(int) - GRAY)[solid].max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_modes(mode: str) -> None:
    data = gray16().astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, image_files.SIZE, data)
    assert np.array_equal(pixels_of(image)[..., 0], np.round(gray16() / 257))


def test_the_range_of_integers_and_floats() -> None:
    def picture(values: Any, dtype: Any) -> Image.Image:
        return Image.fromarray(np.asarray(values, dtype))

    assert pixels_of(picture([[0, 100, 255]], np.int32))[0, :, 0].tolist() == [0, 100, 255]  # as load_image
    assert pixels_of(picture([[0, 257, 65535]], np.int32))[0, :, 0].tolist() == [0, 1, 255]
    assert pixels_of(picture([[0, 1, 0.5]], np.float32))[0, :, 0].tolist() == [0, 255, 128]
    assert pixels_of(picture([[0, 1, 200]], np.float32))[0, :, 0].tolist() == [0, 1, 200]  # as load_image
    for values, dtype in (([[-1, 3]], np.int32), ([[0, 65536]], np.int32), ([[0, 1.5]], np.float32)):
        with pytest.raises(UsageError, match="from"):
            open_image(picture(values, dtype))
    with pytest.raises(UsageError, match="NaN"):
        open_image(picture([[0, np.nan]], np.float32))
    with pytest.raises(UsageError, match="no pixels: 0x3"):
        open_image(Image.new("RGB", (0, 3)))


# ---- arrays and tensors -------------------------------------------------------------------------

HWC = RGB.astype(np.float32) / 255
CHW = torch.from_numpy(RGB.copy()).permute(2, 0, 1)
ALPHA = np.asarray(image_files.with_alpha("RGBA"))
RIGHT: dict[str, tuple[Any, np.ndarray]] = {
    "uint8": (RGB, RGB),
    "batch": (RGB[None], RGB),
    "grey": (GRAY, np.stack([GRAY] * 3, -1)),
    "grey channel": (GRAY[..., None], np.stack([GRAY] * 3, -1)),
    "rgba": (ALPHA, RGB),
    "uint16": (RGB.astype(np.uint16) * 257, RGB),
    "uint16 big-endian": (RGB.astype(">u2") * 257, RGB),
    "uint16 grey": (gray16(), np.stack([np.round(gray16() / 257).astype(np.uint8)] * 3, -1)),
    "float32": (HWC, RGB),
    "float64": (RGB / 255, RGB),
    "float16": (HWC.astype(np.float16), RGB),
    "float grey": (fractions(), np.stack([np.round(fractions() * 255).astype(np.uint8)] * 3, -1)),
    "slightly outside": (HWC + 1e-4, RGB),
    "bool": (GRAY > 99, np.stack([(GRAY > 99).astype(np.uint8) * 255] * 3, -1)),
    "not contiguous": (np.asfortranarray(RGB), RGB),
    "mirrored": (RGB[:, ::-1], RGB[:, ::-1]),
    "tensor uint8": (CHW, RGB),
    "tensor float": (CHW / 255, RGB),
    "tensor batch": (CHW[None] / 255, RGB),
    "tensor grey": (torch.from_numpy(GRAY.copy())[None], np.stack([GRAY] * 3, -1)),
    "tensor plane": (torch.from_numpy(GRAY.copy()), np.stack([GRAY] * 3, -1)),
    "tensor rgba": (torch.from_numpy(ALPHA.copy()).permute(2, 0, 1), RGB),
    "tensor with gradient": ((CHW / 255).requires_grad_(), RGB),
    "tensor float64": (CHW.double() / 255, RGB),
    "tensor bool": (torch.ones(1, 2, 3, dtype=torch.bool), np.full((2, 3, 3), 255)),
}


@pytest.mark.parametrize("case", RIGHT)
def test_arrays_and_tensors(case: str) -> None:
    image, expected = RIGHT[case]
    assert np.array_equal(pixels_of(image), expected)


def test_half_precision_is_rounded_once() -> None:
    image = (CHW / 255).bfloat16()
    assert np.array_equal(pixels_of(image), (image.double() * 255).round().permute(1, 2, 0).byte().numpy())


WRONG: dict[str, tuple[Any, str, str]] = {
    "channels first": (np.moveaxis(RGB, -1, 0), r"an array \[3, 24, 40\]", "moveaxis"),
    "channels last": (CHW.permute(1, 2, 0), r"a tensor \[24, 40, 3\]", "permute"),
    "two images": (np.stack([RGB, RGB]), r"\[2, 24, 40, 3\]", "image[0]"),
    "one row": (RGB[0, :, 0], r"an array \[40\]", "PNG"),
    "empty": (RGB[:0], r"\[0, 40, 3\]", "PNG"),
    "0 to 255": (RGB.astype(np.float32), "values from 0 to 2", "/ 255"),
    "-1 to 1": (CHW / 127.5 - 1, "values from -", r"+ 1) / 2"),
    "NaN": (np.where(RGB == 0, np.nan, HWC), "NaN", "replace"),
    "infinite": (torch.full((3, 4, 4), torch.inf), "infinite", "replace"),
    "int64": (RGB.astype(np.int64), "int64", "uint8"),
    "complex": (RGB.astype(np.complex64), "complex64", "uint8"),
    "text": (np.array([["a", "b"]]), "U1", "uint8"),
    "meta": (torch.empty(3, 4, 4, device="meta"), r"a tensor \[3, 4, 4\]", "PNG"),
    "list": ([scene()], "a list", "PNG"),
    "number": (7, "a int", "PNG"),
    "text file": (io.StringIO("abc"), "opened as text", "rb"),
    "empty bytes": (b"", "the file is empty", "again"),
}


@pytest.mark.parametrize("case", WRONG)
def test_pixels_that_are_refused(case: str) -> None:
    image, got, fix = WRONG[case]
    with pytest.raises(UsageError, match=got) as error:
        open_image(image)
    assert error.value.code == "E-USE-04" and fix in error.value.fix


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    """300 files with a few random bytes changed: opened, or refused."""
    rng = np.random.default_rng(0)
    names = ["exif.png", "palette_transparent_bytes.png", "cmyk.jpg", "animated.gif", "exif.webp", "lzw.tiff"]
    names += ["two.mpo", "rgb.jp2", "rgb.bmp", "icon.ico"]
    for name in names:
        path = tmp_path / name
        image_files.EQUAL[name](path)
        whole = bytearray(path.read_bytes())
        for _ in range(30):
            data = whole.copy()
            for at in rng.integers(0, min(len(data), 400), 3):
                data[at] = rng.integers(256)
            try:
                assert open_image(data).mode == "RGB"
            except UsageError as error:
                assert error.code == "E-USE-04"


def test_fixes_name_the_file(tmp_path: Path) -> None:
    clip = tmp_path / "a clip.mp4"
    image_files.REFUSED["clip.mp4"][0](clip)
    for image, command in (
        (clip, f"ffmpeg -i '{clip}' "),
        ("https://a.org/b.png", "curl -LO https://a.org/b.png"),
    ):
        with pytest.raises(UsageError) as error:
            open_image(image)
        assert command in error.value.fix


def test_unknown_bytes_and_masked_arrays() -> None:
    with pytest.raises(UsageError, match="3 bytes is not a readable image: its format is unknown"):
        open_image(b"abc")
    with pytest.raises(UsageError, match="masked") as error:
        open_image(np.ma.masked_equal(RGB, RGB[0, 0, 0]))
    assert "filled" in error.value.fix


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, filters, barrier = tmp_path / "a.png", list(warnings.filters), threading.Barrier(2)
    scene().save(path)
    rgb = images._rgb

    def slow(image: Any, name: str) -> Any:
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.05)  # both threads inside at once, unless one waits for the other
        return rgb(image, name)

    monkeypatch.setattr(images, "_rgb", slow)
    threads = [threading.Thread(target=open_image, args=(path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert warnings.filters == filters and barrier.broken


# ---- names of pictures --------------------------------------------------------------------------


def test_pixels_are_named_by_their_content(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    pictures = (array, tensor, Image.fromarray(array))
    names = {name_image(image)[0] for image in pictures}
    assert len(names) == 1 and re.fullmatch("sha256:[0-9a-f]{64}", str(*names))
    assert name_image(array.reshape(4, 6, 3))[0] not in names and name_image(array // 2)[0] not in names
    assert name_image(None) == (None, {}) and name_image(tmp_path / "a.png") == (str(tmp_path / "a.png"), {})


def test_a_request_with_pixels_is_json_and_names_them() -> None:
    first, last = np.zeros((6, 4, 3), np.uint8), np.ones((6, 4, 3), np.uint8)
    (name, pixels), (last_name, last_pixels) = name_image(first), name_image(last)
    request = resolve(I2V, "a", image=name, last_image=last_name)
    request = GenerateRequest.from_json(request.to_json())
    pictures = pictures_of(request, pixels | last_pixels)
    assert np.array_equal(pictures["image"], first) and np.array_equal(pictures["last_image"], last)
    assert pictures_of(resolve(TI2V, "a"), {}) == {}
    with pytest.raises(RequestError, match="no pixels for image") as error:
        pictures_of(request, {})
    assert error.value.code == "E-REQ-04" and 'image="FILE"' in error.value.fix
    with pytest.raises(RequestError, match="no pixels for image") as error:
        pictures_of(request, pixels)
    assert error.value.code == "E-REQ-04" and 'last_image="FILE"' in error.value.fix
    with pytest.raises(RequestError, match="other pixels for image") as error:
        pictures_of(request, {str(name): first + 1})
    assert error.value.code == "E-REQ-04"


def test_pictures_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "a.png", []
    scene().save(path)
    real = images.open_image

    def counted(image: Any) -> Any:
        opened.append(image)
        return real(image)

    monkeypatch.setattr(images, "open_image", counted)
    pictures = Pictures()
    assert size_source(I2V, {"image": str(path)}, pictures) == (40, 24)
    pictures_of(resolve(I2V, "a", image=str(path)), pictures)
    assert opened == [str(path)]
    name, pixels = name_image(scene())
    checked = Pictures.of(pixels)
    for _ in range(2):
        pictures_of(resolve(I2V, "a", image=name), checked)
    assert len(opened) == 4  # by name_image, from outside, and for its hash


def test_the_size_follows_the_image_unless_it_is_explicit(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    image_files.turned(6, quality=90)(path)  # stored as 24x40
    fields = {"image": str(path)}
    assert size_source(I2V, fields, {}) == (40, 24) == size_source(TI2V, fields, {})
    name, pixels = name_image(scene())
    assert size_source(I2V, {"image": name}, pixels) == (40, 24)
    assert size_source(I2V, fields | {"width": 64}, {}) is None
    assert size_source(I2V, fields | {"height": 64}, {}) is None
    assert size_source(I2V, {}, {}) is None and size_source(CASCADE, {"image": "nowhere.png"}, {}) is None
    with pytest.raises(RequestError, match="no pixels for image"):
        size_source(I2V, {"image": name}, {})


def test_the_log_says_how_images_are_fitted(caplog: pytest.LogCaptureFixture) -> None:
    name, pixels = name_image(np.zeros((128, 64, 3), np.uint8))
    flf2v = defaults_of("Wan2.1-FLF2V-14B-720P")
    request = resolve(flf2v, "a", image=name, last_image=name, width=128, height=64)
    with caplog.at_level(logging.INFO, "ascendit"):
        fitted = fitted_pictures(request, pixels)
    assert [picture.size for picture in fitted.values()] == [(128, 64), (128, 64)]
    levels = {
        (r.levelname, r.message.split(":")[0]) for r in caplog.records if "cropped to 64x32" in r.message
    }
    assert levels == {("WARNING", "image"), ("WARNING", "last_image")}
