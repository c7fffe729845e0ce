"""Encode frames to mp4, mov, mkv, webm, gif or png files. `video.py` chooses, checks and renames the files.

Pixels become BT.709 YUV in limited range, and the stream is tagged so: otherwise players guess from the size
and saturated colours shift. Frames are never resized or cropped. Equal frames, rate and comment give equal
bytes with the same versions of the libraries and the same number of processors, also on a busy machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ascendit.errors import EnvironmentProblem
from ascendit.geometry import FrameRate
from ascendit.pipeline.frame_checks import Frames

CRF = 18
"""Default constant rate factor of H.264 and VP9: lower is better and larger."""


class Codec(NamedTuple):
    """The encoder of one extension, and its options."""

    name: str
    options: dict[str, str]
    container: str
    """FFmpeg's name of the container."""
    container_options: dict[str, str]
    max_crf: int = 0
    """Largest constant rate factor; 0: the encoder has none."""


# x264's SIMD code for mbtree reads uninitialized memory; this selects the C code
_X264 = {"crf": f"{CRF}", "x264-params": "cpu-independent=1"}
_MOV = {"movflags": "+faststart+use_metadata_tags"}
_VP9 = {"crf": f"{CRF}", "b": "0", "cpu-used": "4", "row-mt": "1"}
CODECS = {
    "mp4": Codec("libx264", _X264, "mp4", _MOV, 51),
    "mov": Codec("libx264", _X264, "mov", _MOV, 51),
    "mkv": Codec("libx264", _X264, "matroska", {}, 51),
    "webm": Codec("libvpx-vp9", _VP9, "webm", {}, 63),
    "gif": Codec("gif", {}, "gif", {"loop": "0"}),
}
"""Extension -> its codec, for files of moving pictures."""


class Encoding(NamedTuple):
    """Settings of a file, besides its frames."""

    kind: str
    """Extension without the dot; `folder` for a folder of png files."""
    fps: FrameRate
    comment: str = ""
    """The metadata inside the file."""
    crf: int | None = None
    """Constant rate factor; None: `CRF`."""


BT709, LIMITED, FULL = 1, 1, 2  # FFmpeg's constants; BT.709 is 1 as matrix, primaries and transfer
PALETTE_PIXELS = 1 << 16  # sampled for the palette of a GIF, besides one pixel of each coarse colour
NUM_COLOURS = 255  # of a GIF; the last index marks unchanged pixels


def import_library(module: str, package: str) -> Any:
    """Import an optional module. Raises EnvironmentProblem (E-ENV-01) if that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise EnvironmentProblem(
            f"{module} cannot be imported: {e}",
            needs=f"{package}, to write videos and images",
            fix=f"pip install {package}",
            code="E-ENV-01",
        ) from e


def _encode(pictures: Iterable[Any], frames: Frames, new: Path, encoding: Encoding) -> None:
    """Encode `pictures`, the PyAV frames of `frames`, into a new container."""
    codec = CODECS[encoding.kind]
    options = codec.options | ({} if encoding.crf is None else {"crf": str(encoding.crf)})
    with import_library("av", "av").open(
        str(new), "w", format=codec.container, options={**codec.container_options, "fflags": "+bitexact"}
    ) as container:
        is_gif = codec.name == "gif"
        if encoding.comment and not is_gif:
            container.metadata["comment"] = encoding.comment
        stream = container.add_stream(codec.name, rate=encoding.fps, options=options)
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "pal8" if is_gif else "yuv420p"
        if not is_gif:
            c = stream.codec_context
            c.color_range, c.colorspace, c.color_primaries, c.color_trc = LIMITED, BT709, BT709, BT709
            c.thread_type = "FRAME"  # x264's default; PyAV's is slices, which compress less
        for i, picture in enumerate(pictures):
            picture.pts, picture.time_base = i, 1 / Fraction(encoding.fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_stream(frames: Frames, new: Path, encoding: Encoding) -> None:
    av = import_library("av", "av")
    colours = {"src_colorspace": BT709, "dst_colorspace": BT709}
    colours |= {"src_color_range": FULL, "dst_color_range": LIMITED}
    rgb = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    pictures = (picture.reformat(format="yuv420p", **colours) for picture in rgb)
    _encode(pictures, frames, new, encoding)


def _write_gif(frames: Frames, new: Path, encoding: Encoding) -> None:
    """Write a GIF with one palette for all frames, so that static areas do not flicker. It has no comment.

    Pillow makes the palette and dithers; FFmpeg writes, because Pillow merges equal frames.
    """
    av, images = import_library("av", "av"), import_library("PIL.Image", "pillow")
    palette = _palette(images, frames)
    reference = images.new("P", (1, 1))
    reference.putpalette(palette.tobytes())
    opaque = np.where(np.arange(256) < NUM_COLOURS, 255, 0).astype(np.uint8)
    argb = np.column_stack([opaque, palette])
    rgb = (images.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    indices = (np.asarray(picture.quantize(palette=reference)) for picture in rgb)
    pictures = (av.VideoFrame.from_ndarray((i, argb), format="pal8") for i in indices)
    _encode(pictures, frames, new, encoding)


def _palette(images: Any, frames: Frames) -> Frames:
    """uint8 [256, 3] colours for all frames; unused entries repeat the first colour.

    From evenly spaced pixels, and one pixel of each of 4096 coarse colours: small objects keep their colour.
    """
    pixels = frames.reshape(-1, 3)
    coarse = np.zeros((4096, 3), np.uint8)
    present = np.zeros(4096, bool)
    for frame in frames:
        high = (frame.reshape(-1, 3) >> 4).astype(np.uint16)
        index = high @ np.array([256, 16, 1], np.uint16)
        coarse[index], present[index] = frame.reshape(-1, 3), True
    step = len(pixels) // PALETTE_PIXELS | 1  # odd, so that it reaches every column
    sample = np.concatenate([pixels[::step], coarse[present]])
    image = images.fromarray(sample[None]).quantize(NUM_COLOURS, method=images.Quantize.MAXCOVERAGE, kmeans=1)
    colours = np.array(image.getpalette()[: 3 * NUM_COLOURS], np.uint8).reshape(-1, 3)
    return np.concatenate([colours, np.repeat(colours[:1], 256 - len(colours), axis=0)])


def _write_folder(frames: Frames, new: Path, encoding: Encoding) -> None:
    new.mkdir()
    for i in range(len(frames)):
        _write_png(frames[i : i + 1], new / f"frame_{i:04d}.png", encoding)


def _write_png(frames: Frames, new: Path, encoding: Encoding) -> None:
    info = import_library("PIL.PngImagePlugin", "pillow").PngInfo()
    if encoding.comment:
        info.add_text("Comment", encoding.comment)
    import_library("PIL.Image", "pillow").fromarray(frames[0]).save(new, format="png", pnginfo=info)


WRITERS: dict[str, Callable[[Frames, Path, Encoding], None]] = {
    **dict.fromkeys(CODECS, _write_stream),
    "gif": _write_gif,
    "png": _write_png,
    "folder": _write_folder,
}
