"""Files of many kinds that show the same scene, for tests of images: kind -> a function that writes one."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (40, 24)
"""Width and height of all files, as shown."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> how the stored pixels differ from those shown."""
Write = Callable[[Path], Any]


def scene(seed: int = 0) -> Image.Image:
    """Coloured patches, without a symmetry."""
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    rgb = np.stack([x * 6, y * 10, 255 - x * 3 - y * 2], -1).astype(np.uint8)
    rgb[:9, :14] = (220, 30, 30)
    rgb[12:20, 22:] = (20, 180, 60 + 50 * seed)
    return Image.fromarray(rgb)


def alpha() -> Image.Image:
    """A gradient from transparent to opaque."""
    return Image.fromarray(np.tile(np.linspace(0, 255, SIZE[0]).astype(np.uint8), (SIZE[1], 1)))


def with_alpha(mode: str) -> Image.Image:
    image = scene().convert(mode[:-1])
    image.putalpha(alpha())
    return image


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def gray16() -> np.ndarray:
    """uint16 [H, W] with the values of a 16-bit scan."""
    return np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)


def fractions() -> np.ndarray:
    """float32 [H, W] from 0 to 1."""
    return (gray16() / 65535).astype(np.float32)


def save(image: Image.Image, **options: Any) -> Write:
    return lambda path: image.save(path, **options)


def turned(orientation: int, **options: Any) -> Write:
    stored = scene().transpose(TURNS[orientation]) if orientation in TURNS else scene()
    return lambda path: stored.save(path, exif=exif(orientation), **options)


def frames(**options: Any) -> Write:
    more = [scene(1), scene(2)]
    return lambda path: scene().save(path, save_all=True, append_images=more, **options)


def palette(transparency: Any) -> Write:
    image = scene().quantize(16)
    return lambda path: image.save(path, transparency=transparency)


def colour_key(path: Path) -> None:
    scene().save(path, transparency=(220, 30, 30))


def png(path: Path, pixels: np.ndarray, colour_type: int) -> None:
    """Write big-endian 16-bit PNG, which Pillow cannot."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", *SIZE, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def rgb16(path: Path) -> None:
    png(path, np.asarray(scene()).astype(np.uint16) * 257, 2)


def mpo(path: Path) -> None:
    scene().save(path, save_all=True, append_images=[scene(1)], format="MPO")


def tiff16_big_endian(path: Path) -> None:
    """A TIFF of 16-bit grey in big-endian order."""
    tags = [(256, 4, SIZE[0]), (257, 4, SIZE[1]), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200)]
    tags += [(277, 3, 1), (278, 4, SIZE[1]), (279, 4, SIZE[0] * SIZE[1] * 2)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, v in tags
    )
    head = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", len(tags)) + entries + b"\0\0\0\0"
    path.write_bytes(head.ljust(200, b"\0") + gray16().astype(">u2").tobytes())


def pgm16(path: Path) -> None:
    path.write_bytes(b"P5 %d %d 65535\n" % SIZE + gray16().astype(">u2").tobytes())


def pfm(path: Path) -> None:
    path.write_bytes(b"Pf\n%d %d\n-1.0\n" % SIZE + fractions()[::-1].astype("<f4").tobytes())


def as_bytes(write: Write, suffix: str, folder: Path) -> bytes:
    path = folder / f"bytes{suffix}"
    write(path)
    return path.read_bytes()


def icc() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


EQUAL: dict[str, Write] = {
    "rgb.png": save(scene()),
    "grey.png": save(scene().convert("L")),
    "bit.png": save(scene().convert("1")),
    "palette.png": save(scene().quantize(16)),
    "palette_transparent_index.png": palette(3),
    "palette_transparent_bytes.png": palette(bytes(range(0, 256, 16))),
    "rgba.png": save(with_alpha("RGBA")),
    "grey_alpha.png": save(with_alpha("LA")),
    "colour_key.png": colour_key,
    "rgb16.png": rgb16,
    "animated.png": frames(),
    "exif.png": turned(6),
    **{f"orientation{i}.jpg": turned(i, quality=95) for i in range(1, 9)},
    "grey.jpg": save(scene().convert("L")),
    "cmyk.jpg": save(scene().convert("CMYK")),
    "progressive.jpg": save(scene(), progressive=True, subsampling=0, icc_profile=icc()),
    "rgb.webp": save(scene(), lossless=True),
    "rgba.webp": save(with_alpha("RGBA"), lossless=True, exact=True),
    "exif.webp": turned(8, lossless=True),
    "animated.webp": frames(lossless=True),
    "palette.gif": save(scene()),
    "animated.gif": frames(),
    "transparent.gif": palette(2),
    "rgb.bmp": save(scene()),
    "rgb.tiff": save(scene()),
    "lzw.tiff": save(scene(), compression="tiff_lzw"),
    "pages.tiff": frames(),
    "cmyk.tiff": save(scene().convert("CMYK")),
    "rgba.tiff": save(with_alpha("RGBA")),
    "lab.tiff": lambda path: lab().save(path),
    "integers.tiff": save(Image.fromarray(np.asarray(scene().convert("L")).astype(np.int32))),
    "floats_to_255.tiff": save(scene().convert("L").convert("F")),
    "rgb.ppm": save(scene()),
    "rgb.tga": save(scene()),
    "rgb.pcx": save(scene()),
    "rgb.jp2": save(scene()),
    "icon.ico": save(scene().resize((32, 32)), sizes=[(32, 32)]),
    "two.mpo": mpo,
}
"""Files whose pixels equal those of `diffusers.utils.load_image`."""
if "AVIF" in Image.SAVE or not Image.init() or "AVIF" in Image.SAVE:
    EQUAL["rgb.avif"] = save(scene(), quality=90)

SIXTEEN: dict[str, Write] = {
    "grey16.png": save(Image.fromarray(gray16())),
    "grey16.tiff": save(Image.fromarray(gray16())),
    "grey16_big_endian.tiff": tiff16_big_endian,
    "grey16.pgm": pgm16,
    "integers16.tiff": save(Image.fromarray(gray16().astype(np.int32))),
    "floats.tiff": save(Image.fromarray(fractions())),
    "floats.pfm": pfm,
}
"""Files of `gray16` or `fractions`, which load_image makes white or black."""


def lab() -> Image.Image:
    from PIL import ImageCms

    srgb, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(scene(), srgb, target, outputMode="LAB")
    assert converted is not None
    return converted


def svg() -> bytes:
    return b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def cut(write: Write, suffix: str) -> Write:
    """The first 60 % of a file."""

    def half(path: Path) -> None:
        write(path.with_name("whole" + suffix))
        data = path.with_name("whole" + suffix).read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])

    return half


def bomb(path: Path) -> None:
    """A PNG of 30,000 x 30,000 pixels in a few hundred bytes."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    buffer = io.BytesIO()
    scene().save(buffer, "PNG")
    data = buffer.getvalue()
    chunk = b"IHDR" + header
    crc = struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:8] + struct.pack(">I", 13) + chunk + crc + data[33:])


def text_bomb(path: Path) -> None:
    """A PNG whose compressed text has 80 MB."""
    text = b"zTXtkey\0\0" + zlib.compress(b"\0" * 80_000_000, 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    buffer = io.BytesIO()
    scene().save(buffer, "PNG")
    data = buffer.getvalue()
    path.write_bytes(data[:33] + chunk + data[33:])


REFUSED: dict[str, tuple[Write, str]] = {
    "half.png": (cut(EQUAL["rgb.png"], ".png"), "truncated|not a readable image"),
    "half.jpg": (cut(EQUAL["grey.jpg"], ".jpg"), "not a readable image"),
    "half.webp": (cut(EQUAL["rgb.webp"], ".webp"), "not a readable image"),
    "half.gif": (cut(EQUAL["palette.gif"], ".gif"), "truncated"),
    "half.tiff": (cut(EQUAL["rgb.tiff"], ".tiff"), "not a readable image"),
    "half.bmp": (cut(EQUAL["rgb.bmp"], ".bmp"), "truncated"),
    "bomb.png": (bomb, "bomb|pixels"),
    "text_bomb.png": (text_bomb, "too large"),
    "empty.png": (lambda path: path.write_bytes(b""), "the file is empty"),
    "drawing.svg": (lambda path: path.write_bytes(svg()), "an SVG drawing"),
    "photo.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40)), "a HEIC file"),
    "clip.mp4": (lambda path: path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(40)), "a video"),
    "paper.pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "a PDF file"),
    "old.eps": (save(scene()), "a PostScript file"),
    "page.png": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "a web page"),
    "pointer.png": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "a pointer of Git LFS",
    ),
    "text.png": (lambda path: path.write_text("not a picture"), "is not a readable image"),
}
"""Files that are refused, and a pattern of the message."""
