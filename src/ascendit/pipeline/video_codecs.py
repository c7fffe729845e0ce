"""Frames into a file: mp4, webm, gif, png. Naming, refusing and renaming are `video.py`'s.

Pixels become BT.709 YUV in limited range and the stream says so, else players guess by size and
saturated colours shift. Nothing is ever resized or cropped.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ascendit.errors import EnvironmentProblem
from ascendit.pipeline.frame_checks import Frames

CODECS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {  # encoder, its options, the container's
    "mp4": (  # x264 writes the same file each time with one thread and without code that depends on alignment
        "libx264",
        {"crf": "18", "threads": "1", "x264-params": "cpu-independent=1"},
        {"movflags": "+faststart+use_metadata_tags"},
    ),
    "webm": ("libvpx-vp9", {"crf": "18", "b": "0", "cpu-used": "4", "row-mt": "1"}, {}),
    "gif": ("gif", {}, {"loop": "0"}),
}
BT709, LIMITED, FULL = 1, 1, 2  # FFmpeg's numbers; BT.709 is 1 as matrix, primaries and transfer


def import_library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise EnvironmentProblem(
            f"{module} cannot be imported: {e}",
            needs=f"{package}, to read and write videos",
            fix=f"pip install {package}",
            code="E-ENV-01",
        ) from e


def _pictures(av: Any, frames: Frames, fps: int) -> Iterator[Any]:
    """av.VideoFrame rgb24, one for each frame, stamped."""
    for i, frame in enumerate(frames):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = i, Fraction(1, fps)
        yield picture


@contextmanager
def _stream(frames: Frames, fps: int, new: Path, kind: str, comment: str) -> Iterator[Any]:
    """`encode(picture)` into a new container; flushed and closed at the end."""
    codec, options, container_options = CODECS[kind]
    with import_library("av", "av").open(
        str(new), "w", format=kind, options={**container_options, "fflags": "+bitexact"}
    ) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=fps, options=dict(options))
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "pal8" if kind == "gif" else "yuv420p"
        if kind != "gif":
            c = stream.codec_context
            c.color_range, c.colorspace, c.color_primaries, c.color_trc = LIMITED, BT709, BT709, BT709
        yield lambda picture: container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _write_stream(frames: Frames, fps: int, new: Path, kind: str, comment: str) -> None:
    colours = {"src_colorspace": BT709, "dst_colorspace": BT709}
    colours |= {"src_color_range": FULL, "dst_color_range": LIMITED}
    with _stream(frames, fps, new, kind, comment) as encode:
        for picture in _pictures(import_library("av", "av"), frames, fps):
            encode(picture.reformat(format="yuv420p", **colours))


def _write_gif(frames: Frames, fps: int, new: Path, kind: str, comment: str) -> None:
    """One palette for the whole video, so that still parts do not flicker; 255 colours fit, to one level."""
    av = import_library("av", "av")
    _, height, width, _ = frames.shape
    size = {"width": width, "height": height, "format": "rgb24", "time_base": Fraction(1, fps)}
    graph = av.filter.Graph()
    source, sink = graph.add_buffer(**size), graph.add("buffersink")
    graph.link_nodes(source, graph.add("palettegen"), sink).configure()
    for picture in _pictures(av, frames, fps):
        source.push(picture)
    source.push(None)
    palette = sink.pull()
    palette.pts, palette.time_base = 0, size["time_base"]

    graph = av.filter.Graph()
    source, sink = graph.add_buffer(**size), graph.add("buffersink")
    use = graph.add("paletteuse", "dither=sierra2_4a")
    colours = graph.add_buffer(**{**size, "width": 16, "height": 16, "format": palette.format.name})
    source.link_to(use, 0, 0)
    colours.link_to(use, 0, 1)
    graph.link_nodes(use, sink).configure()
    colours.push(palette)
    colours.push(None)
    with _stream(frames, fps, new, kind, "") as encode:
        for picture in itertools.chain(_pictures(av, frames, fps), [None]):
            source.push(picture)
            for mapped in _drain(av, sink):
                encode(mapped)
    if comment:
        _add_gif_comment(new, comment)


def _drain(av: Any, sink: Any) -> Iterator[Any]:
    """The pictures that are ready."""
    while True:
        try:
            yield sink.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _add_gif_comment(file: Path, comment: str) -> None:
    """Put a comment block behind the header, the palette and the loop block: FFmpeg writes none."""
    data = file.read_bytes()
    at = 13 + ((6 << (data[10] & 7)) if data[10] & 0x80 else 0)
    at += 19 if data[at : at + 2] == b"\x21\xff" else 0
    text = comment.encode("ascii")
    blocks = b"".join(bytes([len(b)]) + b for b in (text[i : i + 255] for i in range(0, len(text), 255)))
    file.write_bytes(data[:at] + b"\x21\xfe" + blocks + b"\x00" + data[at:])


def _write_folder(frames: Frames, fps: int, new: Path, kind: str, comment: str) -> None:
    new.mkdir()
    for i in range(len(frames)):
        _write_png(frames[i : i + 1], fps, new / f"frame_{i:04d}.png", kind, comment)


def _write_png(frames: Frames, fps: int, new: Path, kind: str, comment: str) -> None:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    if comment:
        info.add_text("Comment", comment)
    Image.fromarray(frames[0]).save(new, format="png", pnginfo=info)


WRITERS: dict[str, Callable[[Frames, int, Path, str, str], None]] = {
    "mp4": _write_stream,
    "webm": _write_stream,
    "gif": _write_gif,
    "png": _write_png,
    "folder": _write_folder,
}


def read_tags(file: Path) -> dict[str, str]:
    if file.suffix.lower() in (".png", ".gif"):
        with import_library("PIL.Image", "pillow").open(file) as image:
            return {k: v.decode() if isinstance(v, bytes) else str(v) for k, v in image.info.items()}
    with import_library("av", "av").open(str(file)) as container:
        return dict(container.metadata)
