"""Video: frames in memory, and saving them to a file.

`Video.save` writes mp4, mov, mkv, webm, gif or png frames: completely or not at all, and never over another
file. `check_output` runs the same checks before an expensive run. `video_codecs.py` has the encoders,
`frame_checks.py` the checks of the pixels, `output_names.py` the names of files without `-o`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ascendit.arguments import attribute_error, checked_call
from ascendit.checkpoint.file_copy import check_writable, nearest_folder, write_error
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.geometry import RATE_RULE, FrameRate, frame_rate, rate_text
from ascendit.native.build import describe_requested
from ascendit.pipeline.frame_checks import Frames
from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.video_codecs import CODECS, CRF, WRITERS, Encoding, import_library
from ascendit.report import human_bytes, json_text, shell_line
from ascendit.validation import bad_value
from ascendit.version import installed

AnyPath = str | os.PathLike[str]

EXTENSIONS = (
    ".mp4, .webm, .gif, .png (one frame: a file; more: a folder of frames), .mov, .mkv, or / for a folder"
)


MAX_EMBEDDED = 20 * 2**20
"""Bytes of a video that a notebook stores in its file."""
SHOWN_WIDTH = 256  # pixels in a notebook, at least


class OutputTarget(NamedTuple):
    """Output path of a video: `kind` is a key of `WRITERS`: an extension, or folder (of png)."""

    path: Path
    kind: str
    sidecar: Path


def installed_versions() -> dict[str, str]:
    """Versions of Python and the installed packages that affect a video, and its compiled kernels, if any."""
    kernels = describe_requested()
    packages = ("ascendit", "torch", "torch_npu", "diffusers", "transformers", "numpy", "av")
    versions = {"python": platform.python_version(), **installed(*packages)}
    return versions | ({"kernels": kernels} if kernels else {})


@dataclass(eq=False, repr=False)
class Video:
    """A generated video: frames, frame rate and metadata.

    Raises UsageError (E-USE-01) for invalid `frames` or `fps`.
    """

    frames: Frames
    """uint8 [F, H, W, 3], RGB."""
    fps: FrameRate
    """Frames per second; see `geometry.frame_rate` for the values that it takes."""
    request: GenerateRequest | None = None
    model: str = ""
    """Name of the model."""
    versions: dict[str, str] = field(default_factory=installed_versions)
    seconds: float = 0.0
    """Duration of the run."""
    source: str = ""
    """The model as passed to `load`: demo, a folder or a hub name. Empty for pipelines not from `load`."""
    loaded: Mapping[str, Any] = field(default_factory=dict)
    """The options of `load`, from `LoadOptions.record`."""
    latents: Any = None
    """The latents that were decoded, float32 [1, z, F, h, w], an array; not saved with the video."""
    warnings: tuple[str, ...] = ()
    """Faults that `allow_flat` accepted."""
    attention: tuple[Mapping[str, Any], ...] = ()
    """The attention kernels of the run, with their steps, blocks and reasons: `AttentionRow.as_dict`.
    Empty for latents of an earlier run."""
    decoded: Mapping[str, Any] = field(default_factory=dict)
    """`load` and `versions` of the decoding, if it was not done by the run that made the latents."""

    def __post_init__(self) -> None:
        x = self.frames
        is_array = isinstance(x, np.ndarray)
        if not is_array or x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not x.size:
            kind = f"{x.dtype} {list(x.shape)}" if is_array else type(x).__name__
            rule = "a numpy array, uint8 [F, H, W, 3], with at least one frame"
            raise UsageError(f"frames are {kind}", needs=rule, fix="convert decoded values with to_uint8")
        try:
            self.fps = frame_rate(self.fps)
        except ValueError:
            raise UsageError(f"fps is {self.fps!r}", needs=RATE_RULE, fix="fps=16") from None

    if not TYPE_CHECKING:  # a type checker reports these itself

        def __getattr__(self, name: str) -> NoReturn:
            raise attribute_error("'Video' object", name, dir(self))

    def __repr__(self) -> str:
        n, h, w, _ = self.frames.shape
        return f"Video({n} frames, {w}x{h}, {rate_text(self.fps)} fps, model={self.model!r})"

    def _repr_html_(self) -> str:
        """The video in a notebook: an element that plays it, with the file inside."""
        kind = "webm" if self.frames.shape[1] % 2 or self.frames.shape[2] % 2 else "mp4"
        title = escape(repr(self))
        try:
            with tempfile.TemporaryDirectory(prefix="ascendit-") as folder:
                data = self.save(Path(folder) / f"video.{kind}", metadata=False).read_bytes()
        except EnvironmentProblem as e:
            return f"<pre>{title}: {escape(str(e))}</pre>"
        if len(data) > MAX_EMBEDDED:
            size = f"{human_bytes(len(data))}, not embedded in the notebook"
            return f"<pre>{title}: {size}; save it with video.save('video.{kind}')</pre>"
        width = max(self.frames.shape[2], SHOWN_WIDTH)
        return (
            f'<video controls loop muted autoplay playsinline width="{width}" title="{title}" '
            f'src="data:video/{kind};base64,{b64encode(data).decode()}"></video>'
        )

    def describe(self) -> dict[str, Any]:
        """Metadata as plain data for JSON: stored in the file and beside it."""
        n, h, w, _ = self.frames.shape
        r, model = self.request, self.source or self.model
        return {
            "prompt": r.prompt if r else None,
            "seed": r.seed if r else None,
            "model": self.model,
            "source": self.source or None,
            "load": dict(self.loaded),
            "num_frames": n,
            "width": w,
            "height": h,
            "fps": self.fps if isinstance(self.fps, int) else float(self.fps),
            "seconds": round(self.seconds, 3),
            "versions": self.versions,
            "request": json.loads(r.to_json()) if r else None,
            "warnings": list(self.warnings),
            "allow_flat": bool(self.warnings),
            **({"attention": [dict(row) for row in self.attention]} if self.attention else {}),
            **({"decoded": dict(self.decoded)} if self.decoded else {}),
            "replay": self._replay(model) if r and model else None,
        }

    def _replay(self, model: str) -> str:
        assert self.request is not None
        flags = ["--allow-flat"] if self.warnings else []
        return self.request.replay_line(model, load=self.loaded, flags=flags)

    @checked_call
    def save(
        self, path: AnyPath, *, metadata: bool = True, overwrite: bool = False, crf: int | None = None
    ) -> Path:
        """Write the video and `<name>.json` beside it; returns the path of the file or folder.

        The extension selects the format: .mp4, .mov and .mkv (H.264), .webm (VP9), .gif, .png. One frame
        becomes the file `out.png`; more become `out/frame_0000.png`, ..., as for a path ending with `/`.
        `metadata=False` writes nothing about the request, in the file or beside it; a gif has it beside only.
        `crf`: constant rate factor of H.264 (0 to 51) or VP9 (0 to 63), 18 by default; lower is better and
        larger.

        Raises UsageError: E-USE-01 for an unsupported extension, size or fps, E-USE-03 for an existing
        output; EnvironmentProblem: E-ENV-01 if the library is missing, E-ENV-02 if the folder is not
        writable, E-ENV-04 if the disk is full. After a failure, including Ctrl-C, no partial file remains.
        """
        for name, switch in (("metadata", metadata), ("overwrite", overwrite)):
            if not isinstance(switch, bool):
                raise bad_value(name, switch, bool)
        record = self.describe() if metadata else None
        text = json_text(record) + "\n"
        # Lone surrogates, from a prompt that is not valid text, become JSON escapes.
        sidecar = text.encode("utf-8", "backslashreplace") if metadata else None
        # The duration is stored beside the file only, so that equal frames give equal bytes.
        inside = json.dumps({k: v for k, v in record.items() if k != "seconds"}) if record else ""
        target = check_output(
            path, self.frames.shape[:3], self.fps, sidecar=sidecar, overwrite=overwrite, crf=crf
        )
        write, folder = WRITERS[target.kind], target.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".ascendit-", dir=folder) as temporary:
                new = Path(temporary) / "video"
                write(self.frames, new, Encoding(target.kind, self.fps, inside, crf))
                _publish(target, new, sidecar, overwrite)
        except FileExistsError as e:
            raise _taken(target, "already exists") from e
        except OSError as e:
            raise write_error(folder, e) from e
        return target.path


# ---- output path --------------------------------------------------------------------------------


def check_output(
    path: AnyPath,
    shape: tuple[int, ...],
    fps: FrameRate,
    *,
    sidecar: bytes | None = b"",
    overwrite: bool = False,
    crf: int | None = None,
) -> OutputTarget:
    """The target of `Video.save`. Raises the UsageError or EnvironmentProblem that `save` would raise.

    `shape`: (frames, height, width). `sidecar`: content of the `.json` beside the video, None for no `.json`;
    before the run, the keys of `SAME`.
    """
    if not isinstance(path, (str, os.PathLike)):
        needs = f"a text or a pathlib.Path that ends in {EXTENSIONS}"
        raise UsageError(f"path {path!r}", needs=needs, fix='video.save("out.mp4")')
    try:
        target = locate(path, shape[0])
        _check_format(target, shape, fps)
        _check_crf(target, crf)
        _check_free(target, sidecar, overwrite)
    except OSError as e:
        raise write_error(Path(path).parent, e) from e
    check_writable(target.path)
    for file in (target.path, *([] if sidecar is None else [target.sidecar])):
        check_name(file)
    return target


def check_name(file: Path) -> None:
    """Raise EnvironmentProblem (E-ENV-02) if the file system refuses the name of `file`, as too long."""
    try:
        os.lstat(nearest_folder(file.parent) / file.name)  # os.path.lexists hides the error
    except FileNotFoundError:
        pass
    except OSError as e:
        raise write_error(file.parent, e) from e


def locate(path: AnyPath, num_frames: int) -> OutputTarget:
    """The files of an output path, unchecked. Raises UsageError (E-USE-01) for an unknown extension."""
    file, suffix = Path(path), Path(path).suffix.lower()
    is_format = suffix == ".png" or suffix[1:] in CODECS
    if file.name and (os.fspath(path).endswith("/") or (file.is_dir() and not is_format)):
        return OutputTarget(file, "folder", file.with_name(f"{file.name}.json"))
    if suffix == ".png" and num_frames > 1:
        return OutputTarget(file.with_suffix(""), "folder", file.with_suffix(".json"))
    if is_format:
        return OutputTarget(file, suffix[1:], file.with_suffix(".json"))
    name = file.with_suffix(".mp4") if file.name.strip(".") else file / "out.mp4"
    name = file.with_name("out.mp4") if file.name == "-" else name
    rule = f"a name that ends in {EXTENSIONS}"
    raise UsageError(f"unknown video format of {os.fspath(path)!r}", needs=rule, fix=_option(name))


def _check_format(target: OutputTarget, shape: tuple[int, ...], fps: FrameRate) -> None:
    """Check that the format supports this size and rate, and that its encoder is installed."""
    _, height, width = shape
    codec = CODECS[target.kind].name if target.kind in CODECS else ""
    if codec == "libx264" and (width % 2 or height % 2):
        rule = "even width and height (H.264 yuv420p); videos are never resized or cropped"
        others = [".webm", ".png"] if fps > 50 else [".webm", ".gif", ".png"]
        fix = " or ".join(_option(target.path.with_suffix(s), shape[0]) for s in others)
        raise UsageError(f"{width}x{height} pixels in a {target.kind} file", needs=rule, fix=fix)
    if codec == "gif" and fps > 50:
        rule = "at most 50 fps: gif delays are in 1/100 s, and players slow down faster files"
        other = target.path.with_suffix(".webm" if width % 2 or height % 2 else ".mp4")
        raise UsageError(f"{rate_text(fps)} fps in a gif", needs=rule, fix=_option(other, shape[0]))
    if codec in ("gif", ""):
        import_library("PIL", "pillow")
    if not codec:
        return
    try:
        import_library("av", "av").Codec(codec, "w")
    except ValueError as e:
        raise EnvironmentProblem(
            f"this PyAV has no {codec} encoder",
            needs=f"{codec}, which is in the wheels on PyPI",
            fix="pip install --force-reinstall av",
            code="E-ENV-01",
        ) from e


def _check_crf(target: OutputTarget, crf: int | None) -> None:
    if crf is None:
        return
    largest = CODECS[target.kind].max_crf if target.kind in CODECS else 0
    if not largest:
        name = "frames" if target.kind in ("png", "folder") else f"a {target.kind}"
        rule = "a file whose encoder has a rate factor: .mp4, .mov, .mkv or .webm"
        raise UsageError(f"crf {crf!r} for {name}", needs=rule, fix="omit --crf")
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= largest:
        rule = f"a whole number from 0 (best) to {largest} (smallest file)"
        raise UsageError(f"crf {crf!r}", needs=rule, fix=f"--crf {CRF}")


def _check_free(target: OutputTarget, sidecar: bytes | None, overwrite: bool) -> None:
    """Refuse an existing output. A `.json` about the same video is shared: by `a.mp4` and `a.gif`."""
    path = target.path
    if target.kind == "folder" and path.is_dir():
        names = sorted(p.name for p in path.iterdir())
        others = [n for n in names if not re.fullmatch(r"frame_\d+\.png", n)]
        if others or (names and not overwrite):
            raise _taken(target, f"contains {', '.join((others or names)[:3])}")
    elif os.path.lexists(path) and (not overwrite or path.is_dir() or target.kind == "folder"):
        raise _taken(target, "is a folder" if path.is_dir() else "already exists")
    if sidecar is None or not os.path.lexists(target.sidecar):
        return
    if not target.sidecar.is_file() or not same_video(target.sidecar.read_bytes(), sidecar):
        if other := _described(target):
            raise _taken(target, f"needs {target.sidecar} beside it, which describes {other}")
        if not overwrite:
            raise _taken(target, f"needs {target.sidecar} beside it, which already exists")


SAME = ("source", "load", "request")
"""Keys of the `.json` beside a video that are equal for two files of one video."""


def same_video(*sidecars: bytes) -> bool:
    """Whether all are the `.json` of the same request to the same model, or the same bytes."""
    if len(set(sidecars)) == 1:
        return True
    try:
        data = [json.loads(text) for text in sidecars]
        records = [[record[key] for key in SAME] for record in data]
    except (ValueError, TypeError, KeyError):
        return False
    return all(record == records[0] and record[-1] for record in records)


def _described(target: OutputTarget) -> Path | None:
    """Another video with this `.json`, for example `a.gif` beside the target `a.mp4`."""
    stem = target.sidecar.with_suffix("")
    others = [stem.with_name(f"{stem.name}.{kind}") for kind in (*CODECS, "png")] + [stem]
    others = [p for p in others if p != target.path and (p.is_dir() if p == stem else p.is_file())]
    return next((p for p in others if p != stem or (p / "frame_0000.png").is_file()), None)


def _taken(target: OutputTarget, reason: str) -> UsageError:
    slash = "/" if target.kind == "folder" else ""
    rule = "a new name; files are overwritten only with --overwrite"
    fix = _option(f"{target.path}{slash}", 1 if target.kind == "png" else 2)
    return UsageError(f"{target.path}{slash} {reason}", needs=rule, fix=fix, code="E-USE-03")


def _option(path: AnyPath, num_frames: int = 2) -> str:
    """`-o` with this name, or the first of `out-2.mp4`, `out-3.mp4`, .. that does not exist."""
    text = os.fspath(path)
    slash, file = "/" if text.endswith("/") else "", Path(path)
    stem, suffix = (file.name, "") if slash else (file.stem, file.suffix)
    later = (f"{file.with_name(f'{stem}-{n}{suffix}')}{slash}" for n in count(2))
    targets = ((name, locate(name, num_frames)) for name in chain([f"{file}{slash}"], later))
    exists = os.path.lexists
    free = next(name for name, target in targets if not (exists(target.path) or exists(target.sidecar)))
    return shell_line(["-o", free])


# ---- writing ------------------------------------------------------------------------------------


def _publish(target: OutputTarget, new: Path, sidecar: bytes | None, overwrite: bool) -> None:
    """Move the files to the target, the `.json` first, so that a visible video is complete."""
    if not overwrite and os.path.lexists(target.sidecar):
        sidecar = None  # that of the same video exists, and must survive a failure below
    if sidecar is not None:
        new.with_name("sidecar").write_bytes(sidecar)
        _move(new.with_name("sidecar"), target.sidecar, overwrite)
    try:
        if target.kind == "folder":
            if overwrite and target.path.is_dir():
                shutil.rmtree(target.path)
            os.rename(new, target.path)
        else:
            _move(new, target.path, overwrite)
    except BaseException:
        if sidecar is not None and not overwrite:
            target.sidecar.unlink(missing_ok=True)
        raise


def _move(new: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(new, path)  # unlike a rename, fails if another run has created the file meanwhile
            return
        except FileExistsError:
            raise
        except OSError:  # no hard links on this file system
            pass
    os.replace(new, path)
