"""Video: frames in memory, and how they become a file.

`Video.save` writes mp4, webm, gif or png frames: whole or not at all, and never over another file.
`check_output` makes the same refusals before an expensive run; `read_metadata` reads back what save
wrote inside. `check_frames` (`to_uint8`, then `check_not_flat`) stands between the VAE and success.

Pixels become BT.709 YUV in limited range and the stream says so, else players guess by size and
saturated colours shift. Nothing is ever resized or cropped.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ascendit.errors import EnvironmentProblem, QualityError, UsageError
from ascendit.pipeline.request import GenerateRequest

Frames = NDArray[np.uint8]
"""[F, H, W, 3], RGB."""
AnyPath = str | os.PathLike[str]

CODECS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {  # encoder, its options, the container's
    "mp4": ("libx264", {"crf": "18"}, {"movflags": "+faststart+use_metadata_tags"}),
    "webm": ("libvpx-vp9", {"crf": "18", "b": "0", "cpu-used": "4", "row-mt": "1"}, {}),
    "gif": ("gif", {}, {"loop": "0"}),
}
KNOWN = ".mp4, .webm, .gif, .png (one frame: a file, more: a folder of frames), or a folder with / at the end"
BT709, LIMITED, FULL = 1, 1, 2  # FFmpeg's numbers; BT.709 is 1 as matrix, primaries and transfer

BLACK_LEVEL = 20
"""Black: at most `FLAT_SHARE` of all pixels have a channel above this level of 255."""
FLAT_LEVELS, FLAT_STD = 20, 1.5
"""Flat: each channel's standard deviation over the whole video is under `FLAT_STD` levels, and at most
`FLAT_SHARE` of all pixels are more than `FLAT_LEVELS` away from the mean colour."""
FLAT_SHARE = 1e-5
"""4 pixels of an 832x480 frame: a small thing that moves on a plain background is a video."""


class Target(NamedTuple):
    """Where a video goes: `kind` is mp4, webm, gif, png (one file) or folder (of png)."""

    path: Path
    kind: str
    sidecar: Path


def installed_versions() -> dict[str, str]:
    """Versions of what shapes a video, from package metadata; absent packages are left out."""
    found = {"python": platform.python_version()}
    for name in ("ascendit", "torch", "torch_npu", "diffusers", "transformers", "numpy", "av"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(eq=False, repr=False)
class Video:
    """What a run gives back. Raises UsageError (E-USE-01) where `frames` or `fps` make no video."""

    frames: Frames
    """uint8 [F, H, W, 3], RGB."""
    fps: int
    request: GenerateRequest | None = None
    model: str = ""
    versions: dict[str, str] = field(default_factory=installed_versions)
    seconds: float = 0.0
    """Time the run took."""

    def __post_init__(self) -> None:
        x = self.frames
        if (
            not isinstance(x, np.ndarray)
            or x.dtype != np.uint8
            or x.ndim != 4
            or x.shape[-1] != 3
            or not x.size
        ):
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
            rule = "a numpy array, uint8 [F, H, W, 3], at least one frame"
            raise _usage(f"frames are {found}", rule, "convert decoded values with to_uint8")
        if isinstance(self.fps, bool) or not isinstance(self.fps, int) or self.fps < 1:
            raise _usage(f"fps is {self.fps!r}", "a whole number of at least 1", "fps=16")

    def __repr__(self) -> str:
        n, h, w, _ = self.frames.shape
        return f"Video({n} frames, {w}x{h}, {self.fps} fps, model={self.model!r})"

    def describe(self) -> dict[str, Any]:
        """What made this video, ready for JSON: it goes into the file and beside it."""
        n, h, w, _ = self.frames.shape
        r = self.request
        return {
            "prompt": r.prompt if r else None,
            "seed": r.seed if r else None,
            "model": self.model,
            "num_frames": n,
            "width": w,
            "height": h,
            "fps": self.fps,
            "seconds": round(self.seconds, 3),
            "versions": self.versions,
            "request": json.loads(r.to_json()) if r else None,
            "replay": r.replay_line(self.model) if r and self.model else None,
        }

    def save(self, path: AnyPath, *, metadata: bool = True, overwrite: bool = False) -> Path:
        """Write the video and, beside it, `<name>.json`; returns the path of the file or folder made.

        The extension decides: .mp4 (H.264), .webm (VP9), .gif, .png. `out.png` is one file for one
        frame; more frames become `out/frame_0000.png` and so on, as for a path ending with `/`.
        `metadata=False` writes nothing about the request, in the file or beside it.

        Raises UsageError E-USE-01 (extension, size or fps the format cannot hold) and E-USE-03 (the
        name is taken), EnvironmentProblem E-ENV-01 (library) and E-ENV-02 (folder). On any failure,
        Ctrl-C included, nothing half-written stays.
        """
        record = self.describe() if metadata else None
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        # A lone surrogate, from a prompt that is no valid text, becomes the JSON escape for it.
        sidecar = text.encode("utf-8", "backslashreplace") if metadata else None
        target = check_output(path, self.frames.shape[:3], self.fps, sidecar=sidecar, overwrite=overwrite)
        write, folder = _WRITERS[target.kind], target.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _temporary(folder) as new, _temporary(folder) as new_sidecar:
                write(self.frames, self.fps, new, target.kind, json.dumps(record) if metadata else "")
                if sidecar is not None:
                    new_sidecar.write_bytes(sidecar)
                _publish(target, new, new_sidecar, overwrite)
        except FileExistsError as e:
            raise _taken(target, "exists already") from e
        except OSError as e:
            raise _not_writable(folder, e) from e
        return target.path


# ---- where it goes


def default_name(prompt: str, seed: int, when: datetime) -> Path:
    """`outputs/20261120-193012_calico-cat-piano_s42.mp4`: time, at most 40 letters of prompt, seed."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = ""
    for word in re.findall("[a-z0-9]+", plain):
        longer = f"{slug}-{word}" if slug else word[:40]
        if len(longer) > 40:
            break
        if word not in {"a", "an", "and", "at", "in", "is", "of", "on", "the", "to", "with"}:
            slug = longer
    return Path("outputs") / f"{when:%Y%m%d-%H%M%S}_{slug or 'video'}_s{seed}.mp4"


def check_output(
    path: AnyPath,
    shape: tuple[int, ...],
    fps: int,
    *,
    sidecar: bytes | None = b"",
    overwrite: bool = False,
) -> Target:
    """Raise before the run what `Video.save` would raise after it; returns where save would write.

    `shape`: (frames, height, width). `sidecar`: what the `.json` beside will hold, None for no `.json`.
    """
    try:
        target = _locate(path, shape[0])
        _check_format(target, shape, fps)
        _check_free(target, sidecar, overwrite)
    except OSError as e:
        raise _not_writable(Path(path).parent, e) from e
    check_writable(target.path)
    return target


def check_writable(path: AnyPath) -> None:
    """Raise EnvironmentProblem (E-ENV-02) if no file can be made where `path` would be.

    Makes and removes a file, since permission bits say little: root, read-only mounts, /proc.
    """
    folder = Path(path).parent
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise _not_writable(folder, e) from e


def _locate(path: AnyPath, num_frames: int) -> Target:
    file, suffix = Path(path), Path(path).suffix.lower()
    known = suffix == ".png" or suffix[1:] in CODECS
    if file.name and (os.fspath(path).endswith("/") or (file.is_dir() and not known)):
        return Target(file, "folder", file.with_name(f"{file.name}.json"))
    if suffix == ".png" and num_frames > 1:
        return Target(file.with_suffix(""), "folder", file.with_suffix(".json"))
    if known:
        return Target(file, suffix[1:], file.with_suffix(".json"))
    name = file.with_suffix(".mp4") if file.name else "out.mp4"
    rule = f"a name that ends in {KNOWN}"
    raise _usage(f"cannot tell a format from {os.fspath(path)!r}", rule, f"-o {name}")


def _check_format(target: Target, shape: tuple[int, ...], fps: int) -> None:
    """What the container can hold, and whether its library is here."""
    _, height, width = shape
    if target.kind == "mp4" and (width % 2 or height % 2):
        rule = "even width and height (H.264 yuv420p); a video is not resized or cropped to fit"
        others = " or ".join(str(target.path.with_suffix(s)) for s in (".webm", ".gif", ".png"))
        raise _usage(f"{width}x{height} pixels in an mp4", rule, f"-o {others}")
    if target.kind == "gif" and fps > 50:
        rule = "at most 50 fps: gif counts in 1/100 s, and players slow down what is faster"
        raise _usage(f"{fps} fps in a gif", rule, f"-o {target.path.with_suffix('.mp4')}")
    if target.kind not in CODECS:
        _library("PIL", "pillow")
        return
    codec = CODECS[target.kind][0]
    try:
        _library("av", "av").Codec(codec, "w")
    except ValueError as e:
        raise EnvironmentProblem(
            f"this PyAV has no {codec} encoder",
            needs=f"{codec}, which the wheels on PyPI include",
            fix="pip install --force-reinstall av",
            code="E-ENV-01",
        ) from e


def _check_free(target: Target, sidecar: bytes | None, overwrite: bool) -> None:
    """Nothing is clobbered. An equal `.json` is no conflict: `a.mp4` and `a.gif` of one video share it."""
    path = target.path
    if target.kind == "folder" and path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        others = [n for n in names if not re.fullmatch(r"frame_\d+\.png", n)]
        if others or (names and not overwrite):
            raise _taken(target, f"holds {', '.join((others or names)[:3])}")
    elif os.path.lexists(path) and (not overwrite or path.is_dir() or target.kind == "folder"):
        raise _taken(target, "is a folder" if path.is_dir() else "exists already")
    if sidecar is not None and not overwrite and os.path.lexists(target.sidecar):
        if not target.sidecar.is_file() or target.sidecar.read_bytes() != sidecar:
            raise _taken(target, f"needs {target.sidecar} beside it, which exists already")


def _taken(target: Target, why: str) -> UsageError:
    path, n, slash = target.path, 2, "/" if target.kind == "folder" else ""
    free = path.with_name(f"{path.stem}-2{path.suffix}")
    while os.path.lexists(free) or os.path.lexists(free.with_suffix(".json")):
        n += 1
        free = path.with_name(f"{path.stem}-{n}{path.suffix}")
    rule = "a free name: nothing is overwritten unasked (overwrite=True)"
    return _usage(f"{path}{slash} {why}", rule, f"-o {free}{slash}", "E-USE-03")


def _usage(got: str, needs: str, fix: str, code: str = "E-USE-01") -> UsageError:
    return UsageError(got, needs=needs, fix=fix, code=code)


def _not_writable(folder: Path, e: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"cannot write in {folder}: {e.strerror or e}",
        needs="a folder that can be written, with room on the disk",
        fix="choose another place with -o FILE",
        code="E-ENV-02",
    )


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise EnvironmentProblem(
            f"{module} cannot be imported: {e}",
            needs=f"{package}, to read and write videos",
            fix=f"pip install {package}",
            code="E-ENV-01",
        ) from e


# ---- how it is written


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A free path in the same folder, so that renaming is atomic; gone at the end, whatever happened."""
    path = folder / f".ascendit-{secrets.token_hex(6)}.tmp"
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _publish(target: Target, new: Path, new_sidecar: Path, overwrite: bool) -> None:
    """Rename into place, the `.json` first: where the video is, everything is."""
    write_sidecar = new_sidecar.exists() and (overwrite or not os.path.lexists(target.sidecar))
    if write_sidecar:
        _place(new_sidecar, target.sidecar, overwrite)
    try:
        if target.kind == "folder":
            if overwrite and target.path.is_dir():
                shutil.rmtree(target.path)
            os.rename(new, target.path)
        else:
            _place(new, target.path, overwrite)
    except BaseException:
        if write_sidecar and not overwrite:
            target.sidecar.unlink(missing_ok=True)
        raise


def _place(new: Path, path: Path, overwrite: bool) -> None:
    try:
        if not overwrite:
            os.link(new, path)  # unlike a rename, fails if another run took the name meanwhile
            return
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        pass
    os.replace(new, path)


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
    with _library("av", "av").open(str(new), "w", format=kind, options=container_options) as container:
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
        for picture in _pictures(_library("av", "av"), frames, fps):
            encode(picture.reformat(format="yuv420p", **colours))


def _write_gif(frames: Frames, fps: int, new: Path, kind: str, comment: str) -> None:
    """One palette for the whole video, so that still parts do not flicker; 255 colours fit, to one level."""
    av = _library("av", "av")
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


_WRITERS: dict[str, Callable[[Frames, int, Path, str, str], None]] = {
    "mp4": _write_stream,
    "webm": _write_stream,
    "gif": _write_gif,
    "png": _write_png,
    "folder": _write_folder,
}


def read_metadata(path: AnyPath) -> dict[str, Any]:
    """What `save` wrote into an mp4, webm, gif, png or folder of frames; {} where there is nothing.

    Raises UsageError E-USE-02 if the file is not there, E-USE-01 if it cannot be opened as a video.
    """
    file = Path(path) / "frame_0000.png" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise _usage(f"{file} is not there", "a video or picture", "check the path", "E-USE-02")
    try:
        tags = _read_tags(file)
    except (OSError, ValueError) as e:
        raise _usage(f"{file} cannot be opened: {e}", "a video or picture", "check the file") from e
    try:
        found = json.loads(next(v for k, v in tags.items() if k.lower() == "comment"))
    except (StopIteration, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_tags(file: Path) -> dict[str, str]:
    if file.suffix.lower() in (".png", ".gif"):
        with _library("PIL.Image", "pillow").open(file) as image:
            return {k: v.decode() if isinstance(v, bytes) else str(v) for k, v in image.info.items()}
    with _library("av", "av").open(str(file)) as container:
        return dict(container.metadata)


# ---- success means a good video


def check_frames(x: Any) -> Frames:
    """`to_uint8`, then `check_not_flat`. Raises QualityError E-OUT-01 or E-OUT-02."""
    frames = to_uint8(x)
    check_not_flat(frames)
    return frames


def to_uint8(x: Any) -> Frames:
    """Decoded values to pixels, rounded as Diffusers' VideoProcessor and numpy_to_pil do it.

    `x`: torch tensor (any device and float type) or array, [3, F, H, W], in [-1, 1]; what lies outside
    is clipped. Returns uint8 [F, H, W, 3]. Raises QualityError E-OUT-01 if any value is nan or infinite.
    """
    assert x.ndim == 4 and x.shape[0] == 3, f"[3, F, H, W] expected, got {tuple(x.shape)}"
    frames = np.empty((*x.shape[1:], 3), np.uint8)
    bad: dict[int, int] = {}
    for i in range(len(frames)):  # one by one: a whole 720p video in float32 takes 1 GB
        values = x[:, i] * 0.5 + 0.5  # in the type of x, as Diffusers
        if hasattr(values, "detach"):
            values = values.detach().float().cpu().numpy()
        values = np.asarray(values, np.float32)
        if count := int(values.size - np.isfinite(values).sum()):
            bad[i] = count
        else:
            frames[i] = (values.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    if bad:
        which = ", ".join(map(str, list(bad)[:8])) + (", ..." if len(bad) > 8 else "")
        raise QualityError(
            f"{sum(bad.values())} of {frames.size} values are nan or infinite, "
            f"in {len(bad)} of {len(frames)} frames ({which})",
            needs="finite values in every frame",
            fix="look for damaged weights with: ascendit inspect MODEL; or load with dtype float32",
            code="E-OUT-01",
        )
    return frames


def check_not_flat(frames: Frames) -> None:
    """Raise QualityError E-OUT-02 if the whole video is black or one colour: see `BLACK_LEVEL`, `FLAT_STD`.

    `frames`: uint8 [F, H, W, 3]. A dark or plain background with a small thing on it passes.
    """
    counts = np.zeros((3, 256), np.int64)
    for frame in frames:
        for c in range(3):
            counts[c] += np.bincount(frame[..., c].ravel(), minlength=256)
    levels, total = np.arange(256), counts[0].sum()
    mean = counts @ levels / total
    away = np.abs(levels - mean[:, None])
    std = np.sqrt((counts * away**2).sum(1) / total)
    outside = (counts * (away > FLAT_LEVELS)).sum(1) / total
    if (counts[:, BLACK_LEVEL + 1 :].sum(1) <= FLAT_SHARE * total).all():
        got = f"the video is black: its mean level is {mean.mean():.1f} of 255"
    elif (std < FLAT_STD).all() and (outside <= FLAT_SHARE).all():
        r, g, b = mean.round().astype(int)
        got = f"the video is one colour, rgb({r}, {g}, {b}), standard deviation {std.max():.2f} levels"
    else:
        return
    raise QualityError(
        f"{got}, in all {len(frames)} frames",
        needs="a picture in at least one frame",
        fix="another --seed or more --steps; if that does not help: ascendit inspect MODEL",
        code="E-OUT-02",
    )
