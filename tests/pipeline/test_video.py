"""Saving videos: round trips, metadata, refusals; a failure leaves no incomplete file."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from demo_data import Motion, render
from PIL import Image
from pipeline.metadata import read_metadata
from pipeline.refusals import refused

from ascendit.checkpoint.file_copy import check_writable
from ascendit.demo import world
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.native import build
from ascendit.native.build import Built
from ascendit.pipeline import video as video_module
from ascendit.pipeline import video_codecs
from ascendit.pipeline.frame_checks import Frames
from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.video import (
    Video,
    check_output,
    installed_versions,
)

PROMPT = 'a red circle moves right, "quoted", 一只猫'
STREAMS = (".mp4", ".webm", ".gif")
# Largest mean error of a channel measured on flat patches: 3 of 255 (purple, green channel), from the
# 8-bit limited range and crf 18. BT.601 in place of BT.709 gives 15 and more.
COLOUR_TOLERANCE = 4.0


def request(**changes: Any) -> GenerateRequest:
    values: dict[str, Any] = {
        "prompt": PROMPT,
        "width": 64,
        "height": 64,
        "num_frames": 5,
        "fps": 8,
        "seed": 7,
    }
    values |= {"num_inference_steps": 4, "guidance_scale": 4.0, "flow_shift": 4.0}
    return GenerateRequest(**(values | changes))


def scene(frames: int = 5) -> Frames:
    motion = Motion(radius=10, travel=20, centre=(32, 32))
    return render(world.Scene("purple", "square", "right", "white"), motion, frames)


def patches(frames: int = 5) -> Frames:
    """Six stripes, 16 pixels wide, in the colours of the world."""
    x = np.empty((frames, 64, 96, 3), np.uint8)
    for i, colour in enumerate(world.COLOURS.values()):
        x[:, :, 16 * i : 16 * (i + 1)] = colour
    return x


def make(frames: int = 5, fps: int = 8) -> Video:
    return Video(scene(frames), fps, request(), "demo", seconds=1.25)


def decode(path: Path, pix_fmt: str = "rgb24") -> tuple[np.ndarray[Any, Any], Any, float]:
    """Decoded frames, the stream's codec context, duration in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([f.to_ndarray(format=pix_fmt) for f in container.decode(stream)])
        assert container.duration is not None
        return frames, stream.codec_context, container.duration / 1e6


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---- the class


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        [[1]],
    ],
)
def test_invalid_frames_are_refused(bad: Any) -> None:
    with refused(UsageError, "E-USE-01", "frames are", "uint8 [F, H, W, 3]", "to_uint8"):
        Video(bad, 8)


@pytest.mark.parametrize("fps", [0, -1, 0.5, 241, 24.0001, True, "fast", float("nan")])
def test_an_invalid_fps_is_refused(fps: Any) -> None:
    with refused(UsageError, "E-USE-01", f"fps is {fps!r}", "24000/1001"):
        Video(scene(), fps)


def test_repr_has_size_and_no_pixels() -> None:
    assert repr(make()) == "Video(5 frames, 64x64, 8 fps, model='demo')"


def test_a_notebook_plays_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for frames, kind in ((scene(), "mp4"), (scene()[:, :, :63], "webm")):
        shown = Video(np.ascontiguousarray(frames), 8, request())._repr_html_()
        head, data = shown.split(";base64,")
        assert f'src="data:video/{kind}' in head and "<video controls" in head and "circle" not in head
        (tmp_path / f"a.{kind}").write_bytes(base64.b64decode(data.split('"')[0]))
        decoded, _, _ = decode(tmp_path / f"a.{kind}")
        assert decoded.shape == frames.shape and np.abs(decoded.astype(int) - frames).mean() < 1.5
    assert names(tmp_path) == ["a.mp4", "a.webm"]
    monkeypatch.setattr(video_module, "MAX_EMBEDDED", 1000)
    assert "not embedded" in (shown := make()._repr_html_()) and "video.save('video.mp4')" in shown
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install av" in make()._repr_html_()


def test_versions_are_those_installed() -> None:
    versions = installed_versions()
    assert versions["av"] == av.__version__ and {"torch", "diffusers", "python"} <= set(versions)
    assert make().versions == versions


def test_versions_name_the_compiled_kernels(monkeypatch) -> None:
    """Those of PyTorch round differently, so one machine may make two videos of a request."""
    built = {"attention": Built(ctypes.CDLL(None), ""), "linear": Built(None, "no C++ compiler on PATH")}
    monkeypatch.setattr(build, "_requested", built)
    expected = "compiled attention; PyTorch for linear: no C++ compiler on PATH"
    assert make().describe()["versions"]["kernels"] == expected
    monkeypatch.setattr(build, "_requested", {})
    assert "kernels" not in make().describe()["versions"]


# ---- round trips


@pytest.mark.parametrize("fps", [8, 16, 24])
@pytest.mark.parametrize("frames", [1, 5, 17])
@pytest.mark.parametrize("suffix", STREAMS)
def test_frame_count_size_rate_and_duration(tmp_path: Path, suffix: str, frames: int, fps: int) -> None:
    path = make(frames, fps).save(tmp_path / f"out{suffix}")
    decoded, _, duration = decode(path)
    assert path == tmp_path / f"out{suffix}" and decoded.shape == (frames, 64, 64, 3)
    # webm counts in 1/1000 s, gif in 1/100 s; a gif of one frame rounds up
    assert duration == pytest.approx(frames / fps, abs={".mp4": 1e-5, ".webm": 1e-3, ".gif": 1.01e-2}[suffix])
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert suffix == ".gif" or rate == fps
    if suffix != ".gif":
        error = np.abs(decoded.astype(int) - scene(frames)).mean()
        assert error < 1.5, error


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
@pytest.mark.parametrize("fps", [23.976, "30000/1001", 12.5])
def test_fractional_rates(tmp_path: Path, suffix: str, fps: Any) -> None:
    rate = Fraction(24000, 1001) if fps == 23.976 else Fraction(fps)
    path = Video(scene(17), fps, request(fps=fps)).save(tmp_path / f"out{suffix}")
    decoded, _, duration = decode(path)
    assert len(decoded) == 17 and duration == pytest.approx(
        17 / rate, abs=1.01e-2 if suffix == ".gif" else 1e-3
    )
    with av.open(str(path)) as container:
        assert suffix == ".gif" or container.streams.video[0].average_rate == rate
    beside = json.loads((tmp_path / "out.json").read_text())
    assert beside["fps"] == float(rate) and beside["request"]["fps"] == str(rate)
    assert GenerateRequest.from_json(json.dumps(beside["request"])).fps == rate


@pytest.mark.parametrize("suffix", [".mov", ".mkv"])
def test_mov_and_mkv_have_the_stream_of_mp4(tmp_path: Path, suffix: str) -> None:
    packets = []
    for kind in (".mp4", suffix):
        path = make().save(tmp_path / kind[1:] / f"out{kind}")
        assert read_metadata(path)["seed"] == 7
        with av.open(str(path)) as container:
            assert (
                suffix[1:] in container.format.name or kind == ".mp4" or "matroska" in container.format.name
            )
            packets.append([bytes(p) for p in container.demux(video=0)])
    assert packets[0] == packets[1]


def test_crf(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    sizes = {}
    for name, largest in (("a.mp4", 51), ("a.mov", 51), ("a.webm", 63)):
        for crf in (None, 18, 30, largest):
            path = Video(frames, 8).save(tmp_path / f"{crf}-{name}", crf=crf)
            sizes[name, crf] = path.read_bytes()
        assert sizes[name, None] == sizes[name, 18]
        assert len(sizes[name, 18]) > len(sizes[name, 30]) > len(sizes[name, largest])
        with refused(UsageError, "E-USE-01", f"crf {largest + 1}", f"0 (best) to {largest}"):
            Video(frames, 8).save(tmp_path / name, crf=largest + 1)
    for name in ("a.gif", "a.png", "a/"):
        with refused(UsageError, "E-USE-01", "crf 20 for", ".mp4"):
            Video(frames, 8).save(f"{tmp_path}/{name}", crf=20)
    with refused(UsageError, "E-USE-01", "crf True"):
        Video(frames, 8).save(tmp_path / "a.mp4", crf=True)


def test_mp4_is_h264_yuv420p_and_declares_its_colours(tmp_path: Path) -> None:
    path = make().save(tmp_path / "out.mp4")
    with av.open(str(path)) as container:
        c = container.streams.video[0].codec_context
        assert (c.name, c.pix_fmt) == ("h264", "yuv420p")
        assert (c.color_range, c.colorspace, c.color_primaries, c.color_trc) == (1, 1, 1, 1)
    assert b"crf=18.0" in path.read_bytes()


def test_webm_is_vp9_and_declares_its_colours(tmp_path: Path) -> None:
    with av.open(str(make().save(tmp_path / "out.webm"))) as container:
        c = container.streams.video[0].codec_context
        assert (c.name, c.pix_fmt) == ("vp9", "yuv420p")
        assert (c.color_range, c.colorspace, c.color_primaries, c.color_trc) == (1, 1, 1, 1)


def test_mp4_has_its_index_first(tmp_path: Path) -> None:
    data, at, boxes = make().save(tmp_path / "out.mp4").read_bytes(), 0, []
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        boxes.append(name)
        at += size
    assert boxes.index(b"moov") < boxes.index(b"mdat")
    assert b"colrnclx" + struct.pack(">HHH", 1, 1, 1) in data


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_saturated_colours_survive(tmp_path: Path, suffix: str) -> None:
    decoded, _, _ = decode(Video(patches(), 8).save(tmp_path / f"out{suffix}"))
    for i, colour in enumerate(world.COLOURS.values()):
        inner = decoded[:, :, 16 * i + 4 : 16 * i + 12].astype(float)  # off the edges of chroma blocks
        assert np.abs(inner - colour).mean(axis=(0, 1, 2)).max() < COLOUR_TOLERANCE


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_luma_is_bt709_in_limited_range(tmp_path: Path, suffix: str) -> None:
    """Compared with the formula of the standard, not with the library that wrote the file."""
    planes, _, _ = decode(Video(patches(), 8).save(tmp_path / f"out{suffix}"), "yuv420p")
    for i, (r, g, b) in enumerate(world.COLOURS.values()):
        y = 16 + 219 * (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255
        assert abs(planes[:, :64, 16 * i + 4 : 16 * i + 12].mean() - y) < 1.0


@pytest.mark.parametrize("frames", [1, 17])
def test_gif_has_one_palette_and_preserves_plain_colours(tmp_path: Path, frames: int) -> None:
    path = Video(patches(frames), 8, request(), "demo").save(tmp_path / "out.gif")
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == frames and image.info["loop"] == 0
        for i in range(frames):
            image.seek(i)
            assert np.abs(np.array(image.convert("RGB")).astype(int) - patches(1)[0]).max() <= 1


def test_gif_preserves_repeated_frames_and_the_rate(tmp_path: Path) -> None:
    x = scene(16)
    x[6] = x[5]
    with Image.open(Video(x, 24).save(tmp_path / "out.gif")) as image:
        times = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            times.append(image.info["duration"])
    assert len(times) == 16 and set(times) == {40, 50} and sum(times) == pytest.approx(16 / 24 * 1000, abs=10)


def test_gif_frames_are_near_the_source(tmp_path: Path) -> None:
    """One palette for a drifting gradient: FFmpeg's palettegen and paletteuse reach 25.9 dB here."""
    y, x = np.mgrid[:96, :128]
    shades = [np.stack([(2 * x + 4 * i) % 256, 2.6 * y, (x + y + 8 * i) % 256], -1) for i in range(9)]
    frames = np.stack(shades).astype(np.uint8)
    decoded, _, _ = decode(Video(frames, 16).save(tmp_path / "out.gif"))
    assert 10 * np.log10(255**2 / np.square(decoded - frames.astype(float)).mean()) > 25.9


def test_a_single_pixel_keeps_its_colour_in_a_gif(tmp_path: Path) -> None:
    """One pixel of 512,000, which a sample would miss."""
    fog = np.random.default_rng(0).normal(128, 20, (64, 64, 3)).astype(np.uint8)
    frames = fog.repeat(5, 0).repeat(5, 1)[None].repeat(5, 0)
    frames[2, 101, 202] = (255, 0, 0)
    decoded, _, _ = decode(Video(frames, 16).save(tmp_path / "out.gif"))
    assert np.abs(decoded[2, 101, 202].astype(int) - (255, 0, 0)).max() <= 8


def test_black_in_one_frame_of_a_gif_stays_black(tmp_path: Path) -> None:
    """No opaque pixel gets the index that means transparent."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    frames[1, :8] = 0
    decoded, _, _ = decode(Video(frames, 8).save(tmp_path / "out.gif"))
    assert decoded[1, :8].mean() < 8 and decoded[0, :8].mean() > 60


@pytest.mark.parametrize("name", ["out.png", "out/"])
def test_png_frames_are_exact_and_in_a_folder(tmp_path: Path, name: str) -> None:
    path = make().save(f"{tmp_path}/{name}")
    assert path == tmp_path / "out"
    assert names(tmp_path) == ["out", "out.json", *(f"out/frame_000{i}.png" for i in range(5))]
    for i, frame in enumerate(scene()):
        with Image.open(path / f"frame_000{i}.png") as image:
            assert np.array_equal(np.array(image), frame)


def test_one_frame_png_is_a_file(tmp_path: Path) -> None:
    path = make(1).save(tmp_path / "out.png")
    assert names(tmp_path) == ["out.json", "out.png"]
    with Image.open(path) as image:
        assert np.array_equal(np.array(image), scene(1)[0])


def test_a_view_that_is_not_contiguous_is_written_correctly(tmp_path: Path) -> None:
    rotated = patches()[:, ::-1, ::-1]
    with Image.open(Video(rotated, 8).save(tmp_path / "out.gif")) as image:
        assert np.abs(np.array(image.convert("RGB")).astype(int) - rotated[0]).max() <= 1


# ---- metadata


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.png", "out/"])
def test_metadata_in_the_file_and_beside_it(tmp_path: Path, name: str) -> None:
    video = make()
    path = video.save(f"{tmp_path}/{name}")
    inside, beside = read_metadata(path), json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert beside == video.describe()
    assert inside == ({} if name == "out.gif" else {k: v for k, v in beside.items() if k != "seconds"})
    assert (beside["prompt"], beside["seed"], beside["model"]) == (PROMPT, 7, "demo")
    assert (beside["num_frames"], beside["width"], beside["height"], beside["fps"]) == (5, 64, 64, 8)
    assert beside["versions"]["torch"] and beside["seconds"] == 1.25
    assert beside["replay"] == request().replay_line("demo")
    assert GenerateRequest.from_json(json.dumps(beside["request"])) == request()


def test_metadata_has_the_load_options() -> None:
    loaded = {"device": "twin:a5", "scheme": "mxfp4", "keep": ["blocks.0.*"]}
    data = Video(scene(), 8, request(), "ascendit-demo", source="demo", loaded=loaded).describe()
    assert (data["model"], data["source"], data["load"]) == ("ascendit-demo", "demo", loaded)
    flags = "--device twin:a5 --scheme mxfp4 --set 'keep=blocks.0.*' --demo "
    assert data["replay"].startswith(f"ascendit generate {flags}")


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif"])
def test_same_frames_make_the_same_bytes(tmp_path: Path, name: str) -> None:
    files = [
        Video(scene(), 8, request(), "demo", seconds=s).save(tmp_path / str(s) / name) for s in (1.0, 2.0)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_prompt_with_invalid_unicode_is_stored(tmp_path: Path) -> None:
    odd = request(prompt="caf\udce9")
    path = Video(scene(), 8, odd, "demo").save(tmp_path / "out.mp4")
    assert (
        read_metadata(path)["prompt"]
        == json.loads((tmp_path / "out.json").read_text())["prompt"]
        == "caf\udce9"
    )


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.png"])
def test_metadata_can_be_omitted(tmp_path: Path, name: str) -> None:
    path = make().save(tmp_path / name, metadata=False)
    assert read_metadata(path) == {} and not (tmp_path / "out.json").exists()
    for file in [path] if path.is_file() else path.iterdir():
        assert b"circle" not in file.read_bytes()


@pytest.mark.parametrize("name", ["metadata", "overwrite"])
def test_a_switch_of_save_takes_no_text(tmp_path: Path, name: str) -> None:
    with refused(UsageError, "E-USE-01", f'{name}="x"' if name == "metadata" else name, "true"):
        make().save(tmp_path / "out.png", **{name: "x"})  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_video_without_request(tmp_path: Path) -> None:
    data = read_metadata(Video(scene(), 8).save(tmp_path / "out.mp4"))
    assert (data["prompt"], data["seed"], data["request"], data["replay"]) == (None,) * 4


# ---- names and refusals


@pytest.mark.parametrize("name", ["out.avi", "out", "mp4"])
def test_unknown_extension_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with refused(UsageError, "E-USE-01", name, ".mp4, .webm, .gif, .png", ".mp4"):
        make().save(tmp_path / name)
    assert names(tmp_path) == []


def test_extension_in_capitals(tmp_path: Path) -> None:
    assert decode(make().save(tmp_path / "OUT.MP4"))[1].name == "h264"


@pytest.mark.parametrize(("width", "height"), [(63, 64), (64, 63)])
def test_odd_sizes_are_never_changed(tmp_path: Path, width: int, height: int) -> None:
    video = Video(np.ascontiguousarray(scene()[:, :height, :width]), 8)
    with refused(UsageError, "E-USE-01", f"{width}x{height}", "even width", "out.webm", "out.gif", "out.png"):
        video.save(tmp_path / "out.mp4")
    assert names(tmp_path) == []
    for suffix in (".webm", ".gif"):
        assert decode(video.save(tmp_path / f"out{suffix}"))[0].shape == (5, height, width, 3)


def test_gif_refuses_rates_above_its_clock(tmp_path: Path) -> None:
    with refused(UsageError, "E-USE-01", "60 fps in a gif", "out.mp4"):
        make(fps=60).save(tmp_path / "out.gif")


@pytest.mark.parametrize("name", ["out.mp4", "out.png", "out/"])
def test_existing_files_are_not_overwritten(tmp_path: Path, name: str) -> None:
    first = make()
    path = first.save(f"{tmp_path}/{name}")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with refused(UsageError, "E-USE-03", str(path), "out-2"):
        Video(patches(), 8).save(f"{tmp_path}/{name}")
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = Video(patches(3), 16)
    assert other.save(f"{tmp_path}/{name}", overwrite=True) == path
    assert (
        read_metadata(path) | {"seconds": 0.0}
        == other.describe()
        == json.loads((tmp_path / "out.json").read_text())
    )
    assert not (tmp_path / "out/frame_0003.png").exists()


def test_an_existing_json_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.json").write_text("mine")
    (tmp_path / "out-2.mp4").write_text("mine")
    with refused(UsageError, "E-USE-03", "out.json", "out-3.mp4"):
        make().save(tmp_path / "out.mp4")
    assert (tmp_path / "out.json").read_text() == "mine"
    make().save(tmp_path / "out.mp4", metadata=False)
    assert names(tmp_path) == ["out-2.mp4", "out.json", "out.mp4"]


def test_one_video_in_two_formats_shares_its_json(tmp_path: Path) -> None:
    video = make()
    video.save(tmp_path / "out.mp4")
    video.save(tmp_path / "out.gif")
    assert names(tmp_path) == ["out.gif", "out.json", "out.mp4"]


def test_the_json_of_another_video_is_kept(tmp_path: Path) -> None:
    make().save(tmp_path / "out.mp4")
    other = Video(scene(), 8, request(seed=8), "demo")
    for overwrite in (False, True):
        with refused(UsageError, "E-USE-03", "which describes", "out.mp4", "out-2.gif"):
            other.save(tmp_path / "out.gif", overwrite=overwrite)
    assert json.loads((tmp_path / "out.json").read_text())["seed"] == 7
    other.save(tmp_path / "out.gif", metadata=False)
    longer = Video(scene(), 8, request(), "demo", seconds=9.0)  # the same request in another run
    longer.save(tmp_path / "out.webm")
    assert json.loads((tmp_path / "out.json").read_text())["seconds"] == 1.25
    (tmp_path / "out.gif").unlink()
    (tmp_path / "out.webm").unlink()
    other.save(tmp_path / "out.mp4", overwrite=True)
    assert json.loads((tmp_path / "out.json").read_text())["seed"] == 8


def test_folders_with_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    (tmp_path / "dir.mp4").mkdir()
    with refused(UsageError, "E-USE-03", "contains thesis.tex"):
        make().save(f"{tmp_path}/out/", overwrite=True)
    with refused(UsageError, "E-USE-03", "is a folder"):
        make().save(tmp_path / "dir.mp4", overwrite=True)
    (tmp_path / "empty").mkdir()
    assert make().save(tmp_path / "empty") == tmp_path / "empty"


def test_a_file_created_during_the_run_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes the same name while this one encodes."""
    path, real = tmp_path / "out.mp4", np.ascontiguousarray

    def taken(x: Any) -> Any:
        path.write_text("theirs")
        return real(x)

    monkeypatch.setattr(np, "ascontiguousarray", taken)
    with refused(UsageError, "E-USE-03", "already exists"):
        make().save(path)
    assert path.read_text() == "theirs" and names(tmp_path) == ["out.mp4"]


def test_missing_folders_are_created(tmp_path: Path) -> None:
    assert make().save(tmp_path / "a/b/out.mp4").is_file()


@pytest.mark.parametrize("folder", ["file", "file/deeper", "/proc", "/proc/none"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("a regular file")
    path = tmp_path / folder / "out.mp4"
    for call in (check_writable, make().save):
        with refused(EnvironmentProblem, "E-ENV-02", "cannot write in", "another output folder"):
            call(path)
    assert names(tmp_path) == ["file"]


def test_check_output_refuses_before_the_run(tmp_path: Path) -> None:
    shape = (5, 64, 64)
    assert check_output(tmp_path / "new/out.mp4", shape, 8).path == tmp_path / "new/out.mp4"
    assert names(tmp_path) == []
    with refused(UsageError, "E-USE-01", "even width"):
        check_output(tmp_path / "out.mp4", (5, 64, 63), 8)
    with refused(EnvironmentProblem, "E-ENV-02"):
        check_output("/proc/out.mp4", shape, 8)
    (tmp_path / "out.json").write_text("mine")
    with refused(UsageError, "E-USE-03"):
        check_output(tmp_path / "out.mp4", shape, 8)
    check_output(tmp_path / "out.mp4", shape, 8, sidecar=None)
    check_output(tmp_path / "out.mp4", shape, 8, overwrite=True)


@pytest.mark.parametrize(("module", "name"), [("av", "out.mp4"), ("PIL", "out.png"), ("PIL", "out.gif")])
def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with refused(EnvironmentProblem, "E-ENV-01", f"pip install {'av' if module == 'av' else 'pillow'}"):
        make().save(tmp_path / name)


def test_missing_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = video_codecs.CODECS["mp4"]._replace(name="libx264_absent")
    monkeypatch.setitem(video_codecs.CODECS, "mp4", codec)
    with refused(EnvironmentProblem, "E-ENV-01", "no libx264_absent encoder", "pip install"):
        make().save(tmp_path / "out.mp4")


# ---- no incomplete files


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_while_encoding_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failure: type[BaseException], overwrite: bool
) -> None:
    if overwrite:
        make().save(tmp_path / name)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    calls, owner, attribute = [], *((Image, "fromarray") if name == "out.png" else (np, "ascontiguousarray"))
    real = getattr(owner, attribute)

    def breaks(x: Any) -> Any:
        calls.append(x)
        if len(calls) == 4:
            raise failure
        return real(x)

    monkeypatch.setattr(owner, attribute, breaks)
    with pytest.raises(failure):
        make().save(tmp_path / name, overwrite=overwrite)
    assert len(calls) == 4 and before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "out.png"])
def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    noise = Video(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8), 8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with refused(EnvironmentProblem, "E-ENV-04", "bytes available", "free disk space"):
            noise.save(tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_failure_of_the_last_rename_removes_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", breaks)
    with pytest.raises(KeyboardInterrupt):
        make().save(tmp_path / "out.png")
    assert names(tmp_path) == []
