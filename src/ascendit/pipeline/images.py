"""The pictures of a request: paths, or pixels named by the hash of their content (a request is plain JSON).

`open_image` makes one RGB image of everything that a user may pass. Does not import torch.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascendit.errors import RequestError, UsageError
from ascendit.pipeline.request import GenerateRequest

PIXELS = "sha256:"
"""Prefix of the name of an image that is passed as pixels."""


def name_image(image: Any) -> tuple[str | None, dict[str, Any]]:
    """(`image` field of a request, pixels by that name). A path is its own name; pixels are named by a hash.

    `image`: None, a path, or pixels of any type that `open_image` accepts. Raises the errors of `open_image`.
    """
    if image is None or isinstance(image, (str, Path)):
        return (None if image is None else str(image)), {}
    picture = open_image(image)
    header = f"uint8 {[picture.height, picture.width, 3]} ".encode()
    name = PIXELS + hashlib.sha256(header + picture.tobytes()).hexdigest()
    return name, {name: picture}


def image_of(request: GenerateRequest, pixels: Mapping[str, Any]) -> Any:
    """The first image of `request` as a PIL image in RGB, or None. `pixels`: images by name.

    Raises RequestError (E-REQ-04) if the pixels of this image are missing or different, and the errors of
    `open_image`.
    """
    name = request.image
    if name is None:
        return None
    picture = open_image(pixels[name]) if name in pixels else None
    if name.startswith(PIXELS) and (picture is None or name_image(picture)[0] != name):
        needs = "the pixels with the hash in the request"
        fix = "pass pixels={name: image} from name_image, or a file: --image FILE"
        got = f"{'no pixels' if picture is None else 'other pixels'} for image {name}"
        raise RequestError(got, needs=needs, fix=fix, code="E-REQ-04")
    return open_image(name) if picture is None else picture


def open_image(image: Any) -> Any:
    """A PIL image in RGB from a path, a PIL image, uint8 [H, W, 3] or a float tensor [3, H, W] in [0, 1].

    Raises UsageError: E-USE-02 for a missing file, E-USE-04 for an unreadable file or any other type.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            needs = "the path of an image"
            raise UsageError(f"no file {image}", needs=needs, fix="correct the path", code="E-USE-02")
        try:
            with warnings.catch_warnings():  # Pillow's warning about huge images becomes an error
                warnings.simplefilter("error")
                with Image.open(image) as file:
                    return file.convert("RGB")
        except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as e:
            raise _no_image(f"{image} is not a readable image: {e}") from e
    if hasattr(image, "is_floating_point"):  # a tensor
        if image.ndim == 4 and image.shape[0] == 1:
            image = image[0]
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise _no_image(f"a tensor {list(image.shape)} {image.dtype}")
        image = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise _no_image(f"an array {list(image.shape)} {image.dtype}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise _no_image(f"a {type(image).__name__}")
    return image.convert("RGB")


def _no_image(got: str) -> UsageError:
    needs = "a PNG, JPEG or WebP file, a PIL image, uint8 [H, W, 3], or a float tensor [3, H, W] in [0, 1]"
    return UsageError(got, needs=needs, fix="convert the first frame to one of these", code="E-USE-04")
