"""The pictures of a request: one function opens a path, bytes, PIL image, array or tensor as RGB.

A request names a picture by its path, or by the hash of its pixels, so that it is plain JSON. Does not import
torch.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascendit.checkpoint.headers import POINTER, WEB_PAGE
from ascendit.errors import RequestError, UsageError
from ascendit.pipeline.defaults import Defaults
from ascendit.pipeline.fit import describe_fit, fit_picture
from ascendit.pipeline.request import GenerateRequest
from ascendit.report import shell_line

log = logging.getLogger("ascendit")

PIXELS = "sha256:"
"""Prefix of the name of a picture that is passed as pixels."""
FIELDS = ("image", "last_image")
"""The fields of a request that name pictures."""
MAX_PIXELS = 2**26 * 4 // 3
"""89 million pixels: from here on Pillow warns of a decompression bomb."""
NEEDS = (
    "an image: the path or bytes of a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF file, a PIL image, an array "
    "[H, W, 3] or a tensor [3, H, W], uint8 or float from 0 to 1"
)
ORIENTATION = 0x0112
"""EXIF tag; 2 to 8 say how to turn the stored pixels."""
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_NOT_LOADED = {"EPS"}
"""Formats that Pillow decodes by running another program."""
_FILTERS = threading.Lock()
"""Held while the filters of Python's warnings are changed."""

# ---- the pictures of a request ------------------------------------------------------------------


def name_image(image: Any) -> tuple[str | None, dict[str, Any]]:
    """(name of a picture in a request, pixels by that name). A path is its own name; pixels have their hash.

    `image`: None, a path, or anything that `open_image` accepts. Raises the errors of `open_image`.
    """
    if image is None:
        return None, {}
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image), {}
    picture = open_image(image)
    header = f"uint8 {[picture.height, picture.width, 3]} ".encode()
    name = PIXELS + hashlib.sha256(header + picture.tobytes()).hexdigest()
    return name, {name: picture}


class Pictures(dict[str, Any]):
    """Name in a request -> image in RGB, each opened and hashed once.

    `pixels`: name -> image, not yet checked. An entry of this dict has been checked.
    """

    def __init__(self, pixels: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.pixels = pixels or {}

    @classmethod
    def of(cls, pixels: Mapping[str, Any]) -> Pictures:
        """`pixels` itself if it is one of these."""
        return pixels if isinstance(pixels, Pictures) else cls(pixels)

    def open(self, field: str, name: str) -> Any:
        """The image that the request names in `field`. Raises the errors of `pictures_of`."""
        if name not in self:
            self[name] = _picture(field, name, self.pixels)
        return self[name]


def pictures_of(request: GenerateRequest, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """Field -> PIL image in RGB, for the pictures that `request` names. `pixels`: images by name.

    Raises RequestError (E-REQ-04) if the pixels of a picture are missing or different, and the errors of
    `open_image`.
    """
    names, pictures = {field: getattr(request, field) for field in FIELDS}, Pictures.of(pixels)
    return {field: pictures.open(field, name) for field, name in names.items() if name is not None}


def fitted_pictures(request: GenerateRequest, pixels: Mapping[str, Any]) -> dict[str, Any]:
    """`pictures_of`, in the ratio of the video by the request's `fit`; the log says how. Same errors."""
    pictures = pictures_of(request, pixels)
    size = (request.width, request.height)
    for field, picture in pictures.items():
        text, changed = describe_fit(picture.size, size, request.fit)
        log.log(logging.WARNING if changed else logging.INFO, "%s: %s", field, text)
    return {field: fit_picture(picture, size, request.fit) for field, picture in pictures.items()}


def size_source(
    defaults: Defaults, fields: Mapping[str, Any], pixels: Mapping[str, Any]
) -> tuple[int, int] | None:
    """(width, height) of the first frame, if the size of the video depends on it: no width, no height.

    `fields`: fields of GenerateRequest. Raises the errors of `pictures_of`.
    """
    name, explicit = fields.get("image"), (fields.get("width"), fields.get("height"))
    if defaults.task == "t2v" or not isinstance(name, str) or explicit != (None, None):
        return None
    size: tuple[int, int] = Pictures.of(pixels).open("image", name).size
    return size


def _picture(field: str, name: str, pixels: Mapping[str, Any]) -> Any:
    picture = open_image(pixels[name]) if name in pixels else None
    if name.startswith(PIXELS) and (picture is None or name_image(picture)[0] != name):
        needs = "the pixels with the hash in the request"
        fix = f"pass pixels={{name: image}} from name_image, or a file: --{field.replace('_', '-')} FILE"
        got = f"{'no pixels' if picture is None else 'other pixels'} for image {name}"
        raise RequestError(got, needs=needs, fix=fix, code="E-REQ-04")
    return open_image(name) if picture is None else picture


# ---- opening ------------------------------------------------------------------------------------


def open_image(image: Any) -> Any:
    """A PIL image in RGB, upright: equal to `diffusers.utils.load_image`, where that is correct.

    `image`: a path; bytes or a binary file; a PIL image; an array [H, W], [H, W, C] or [1, H, W, C], or a
    tensor [H, W], [C, H, W] or [1, C, H, W], with 1 to 4 channels, of bool, uint8, uint16 or float in [0, 1].

    load_image clips integers above 255 to white and cuts floats to 0: 16 bits are divided by 257 here, floats
    multiplied by 255. Both drop alpha, and show the colours stored in transparent pixels. Raises UsageError:
    E-USE-02 for a missing file, E-USE-04 for anything that is not an image.
    """
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return _decode(_file(os.fsdecode(image)), os.fsdecode(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), f"{len(image)} bytes")
    if isinstance(image, Image.Image):
        with _refused("the PIL image"):
            return _rgb(image, "the PIL image")
    if hasattr(image, "read"):
        return _decode(image, f"the file {getattr(image, 'name', None) or type(image).__name__}")
    if hasattr(image, "is_floating_point") or hasattr(image, "__array__"):
        return _from_array(image)
    raise _no_image(f"a {type(image).__name__}")


def _file(name: str) -> Path:
    """The path of an existing file. Raises UsageError: E-USE-02, or E-USE-04 for a URL."""
    if re.match(r"(?i)(?:https?|ftp|s3|gs|hf|file|data):", name):
        shown = name if len(name) < 80 else name[:60] + "..."
        raise _no_image(f"the URL {shown}", fix=f"{shell_line(['curl', '-LO', shown])}, and pass the file")
    path = Path(name)
    try:
        path = path.expanduser()
        is_file, reason = bool(name) and path.is_file(), "no file"
        if name and not is_file and path.exists():
            reason = "is a folder" if path.is_dir() else "is a device or pipe, not a file"
    except (OSError, RuntimeError, ValueError) as e:
        is_file, reason = False, f"no file ({getattr(e, 'strerror', None) or e})"
    if not is_file:
        shown = (name if len(name) < 300 else name[:100] + "...") or "with an empty name"
        got = f"{shown} {reason}" if reason.startswith("is") else f"{reason} {shown}"
        raise UsageError(got, needs="the path of an image", fix="correct the path", code="E-USE-02")
    return path


@contextmanager
def _refused(name: str, source: Any = None) -> Iterator[None]:
    """Convert every error of a decoder to UsageError (E-USE-04) that names the kind of file."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Image.DecompressionBombError as e:
        raise _too_large(f"{name}: {str(e).partition(',')[0]}") from e
    except Exception as e:  # the decoders raise errors of almost every class
        kind, fix = _kind_of(source)
        unknown = "" if isinstance(e, UnidentifiedImageError) else " ".join(str(e).split())
        reason = kind or unknown or "its format is unknown"
        raise _no_image(f"{name} is not a readable image: {reason}", **({"fix": fix} if fix else {})) from e


def _decode(source: Any, name: str) -> Any:
    """The first frame of a path or binary file."""
    from PIL import Image

    # The filters belong to the process: without the lock, two threads would restore each other's.
    with _refused(name, source), _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.|ascendit\.pipeline\.images")
        with Image.open(source) as file:
            if file.format in _NOT_LOADED:
                raise ValueError(f"{file.format} is not decoded")
            if file.width * file.height > MAX_PIXELS:
                raise _too_large(f"{name} has {file.width}x{file.height} pixels")
            return _rgb(file, name)


def _too_large(got: str) -> UsageError:
    fix = "make the image smaller: magick image.png -resize 4000x4000 smaller.png"
    return _no_image(got, fix=fix, needs=f"at most {MAX_PIXELS // 10**6} million pixels")


def _rgb(image: Any, name: str) -> Any:
    """RGB from any mode of Pillow, turned upright, without metadata."""
    image.load()
    if 0 in image.size:
        raise _no_image(f"{name} has no pixels: {image.width}x{image.height}")
    image = _upright(image, name)
    if image.mode[0] in "IF":
        image = _from_numbers(image, name)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        opaque = image.convert("RGBA").getchannel("A").histogram()[255]
        if opaque < image.width * image.height:
            log.warning("%s: transparent pixels show the colours stored in them, as in Diffusers", name)
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def _upright(image: Any, name: str) -> Any:
    """Turned by its EXIF orientation. Damaged EXIF data are ignored, and the log says so."""
    from PIL import Image

    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception as e:  # its parser raises errors of many classes
        log.warning("%s: its EXIF data are damaged, so it is not turned (%s)", name, e)
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(Image.Transpose[turn])


# ---- numbers ------------------------------------------------------------------------------------


def _from_numbers(image: Any, name: str) -> Any:
    """An image in mode L from one of 16-bit or 32-bit integers, or floats (modes I and F)."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()  # NaN if a value is NaN
    is_16_bit = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if image.mode == "F" and not (low >= 0 and high <= 255 and (high > 1 and (values % 1 == 0).all())):
        values = _to_uint8(values, name)
    elif not is_16_bit and low >= 0 and high <= 255:  # as load_image
        values = values.astype(np.uint8)
    elif low >= 0 and high <= 65535:
        values = _to_uint8(values.astype(np.uint16), name)
    else:
        fix = "scale them to 0 to 65535, or to floats from 0 to 1"
        raise _no_image(f"{name} has integers from {low} to {high}", fix=fix)
    return Image.fromarray(values)


def _from_array(image: Any) -> Any:
    """An RGB image from an array or tensor."""
    import numpy as np
    from PIL import Image

    is_tensor = hasattr(image, "is_floating_point")
    name = f"{'a tensor' if is_tensor else 'an array'} {list(image.shape)} {image.dtype}"
    if isinstance(image, np.ma.MaskedArray) and image.mask.any():
        raise _no_image(f"{name} with masked pixels", fix="image.filled(0), to make them black")
    with _refused(name):
        if is_tensor:
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() and image.itemsize < 4 else image).numpy()
        values = np.asarray(image)
        if values.ndim == 4 and len(values) == 1:
            values = values[0]
        axis = 0 if is_tensor else -1
        if values.ndim == 2:
            values = np.expand_dims(values, axis)
        if values.ndim != 3 or not 1 <= values.shape[axis] <= 4 or 0 in values.shape:
            raise _no_image(name, **_other_layout(values, axis))
        values = _to_uint8(np.moveaxis(values, axis, -1), name)
        return _rgb(Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values), name)


def _other_layout(values: Any, axis: int) -> dict[str, str]:
    """The fix for an array whose channels are on the other side, or for more than one image."""
    if values.ndim == 4 and len(values) > 1:
        return {"fix": "pass one image, for example image[0]"}
    if values.ndim == 3 and 1 <= values.shape[-1 - axis] <= 4:
        return {"fix": "image.permute(2, 0, 1)" if axis == 0 else "numpy.moveaxis(image, 0, -1)"}
    return {}


def _to_uint8(values: Any, name: str) -> Any:
    """Convert bool, uint8, uint16 or float in [0, 1] to uint8, rounded. Raises UsageError (E-USE-04)."""
    import numpy as np

    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b":
        values = values.astype(np.uint8) * 255
    elif kind == "u" and size == 2:
        values = (values.astype(np.uint32) + 128) // 257
    elif kind == "f":
        values = values.astype(np.float32) if size < 4 else values
        low, high = values.min(), values.max()
        if not (-0.5 / 255 <= low and high <= 1 + 0.5 / 255):
            raise _outside(name, float(low), float(high))
        values = np.rint(np.clip(values, 0, 1) * 255)
    elif kind != "u" or size != 1:
        raise _no_image(f"{name}, of a type without a range", fix="image.astype('uint8'), if it is 0 to 255")
    return np.ascontiguousarray(values.astype(np.uint8))


def _outside(name: str, low: float, high: float) -> UsageError:
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        return _no_image(f"{name} has NaN or infinite values", fix="replace them by numbers from 0 to 1")
    fix = "scale the values to 0 to 1"
    if -1.01 <= low < 0 and high <= 1.01:
        fix = "(image + 1) / 2, if its values are -1 to 1"
    elif low >= 0 and high <= 255:
        fix = "image / 255, if its values are 0 to 255"
    return _no_image(f"{name} has values from {low:g} to {high:g}", fix=fix)


# ---- other kinds of file ------------------------------------------------------------------------

_CONVERT = "magick {} image.png"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (rb"\Z", "the file is empty", "download or save it again"),
    (rb"(?s).{4}ftyp(?:hei|hev|mif1|msf1)", "a HEIC file", _CONVERT),
    (rb"(?s).{4}ftypavi", "an AVIF file that this Pillow cannot decode", _CONVERT),
    (rb"(?s).{4}ftypcrx", "a raw file of a camera", "export it as JPEG or PNG"),
    (rb"(?s).{4}ftyp|\x1aE\xdf\xa3", "a video", "ffmpeg -i {} -frames:v 1 image.png"),
    (rb"(?is)\s*(?:<\?xml.*?|<!--.*?-->\s*)*<svg|\x1f\x8b", "an SVG drawing", _CONVERT),
    (rb"%PDF", "a PDF file", "pdftoppm -png -singlefile {} image"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", _CONVERT),
    (*POINTER, "git lfs pull"),
    (*WEB_PAGE, "download the image itself, not the page that shows it"),
    (rb"\xff\x0a|\0\0\0\x0cJXL", "a JPEG XL file", _CONVERT),
    (rb"PK\x03\x04", "a ZIP archive", "unpack it, and pass one image"),
)
"""Start of a file, the kind of file, and a fix; {} is the file."""


def _kind_of(source: Any) -> tuple[str, str]:
    """(kind of file, fix), from the first bytes of a path or binary file; empty if unknown."""
    shown = shell_line([str(source)]) if isinstance(source, Path) else "FILE"
    try:
        if isinstance(source, Path):
            with source.open("rb") as file:
                head = file.read(1024)
        else:
            source.seek(0)
            head = source.read(1024)
        text = head.encode() if isinstance(head, str) else head
        if isinstance(head, str):
            return "a file opened as text", "open(path, 'rb')"
    except (AttributeError, OSError, TypeError, ValueError):
        return "", ""
    kinds = ((kind, fix.format(shown)) for start, kind, fix in _KINDS if re.match(start, text))
    return next(kinds, ("", ""))


def _no_image(got: str, *, fix: str = "convert it to a PNG or JPEG file", needs: str = NEEDS) -> UsageError:
    return UsageError(got, needs=needs, fix=fix, code="E-USE-04")
