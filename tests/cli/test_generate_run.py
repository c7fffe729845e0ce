"""`generate` for many videos: names, one load, failures, Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ascendit.cli.main import main
from ascendit.errors import EnvironmentProblem, QualityError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def videos(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.mp4"))


def fails_for(fake: Any, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], None], *seeds: int) -> None:
    """Make the fake pipeline call `failure`, which raises, for these seeds."""
    real = fake.run

    def run(request: Any, **kwargs: Any) -> Any:
        if request.seed in seeds:
            failure()
        return real(request, **kwargs)

    monkeypatch.setattr(fake, "run", run)


def black() -> None:
    raise QualityError("the video is black", needs="a picture", fix="other steps", code="E-OUT-02")


def test_several_seeds_with_one_load(run, fake, folder):
    ended = run("generate", "--demo", "a cat", "--seed", "1,5-6", "-o", "a.mp4", "--sheet", "s.png")
    assert ended.code == 0 and len(fake.loaded) == 1 and [r.seed for r in fake.requests] == [1, 5, 6]
    assert [line for line in ended.out.splitlines() if line[0] != " "] == ["a_s1.mp4", "a_s5.mp4", "a_s6.mp4"]
    assert "video 2/3; seed 5; took" in ended.out and "video 3/3  denoise" in ended.err
    assert "  sheet   s.png" in ended.out
    with Image.open("s.png") as sheet:
        assert sheet.width > 360
    assert json.loads(Path("a_s5.json").read_text())["seed"] == 5
    quiet = run("generate", "--demo", "a cat", "--seed", "1,5-6", "-o", "a.mp4", "--overwrite", "-q")
    assert quiet.out.split() == ["a_s1.mp4", "a_s5.mp4", "a_s6.mp4"]


def test_prompts_times_seeds_into_a_folder(run, fake, folder):
    Path("p.txt").write_text("a red circle\n# note\n\n红色的圆\n")
    Path("out").mkdir()
    for output in ("out", "new/"):
        args = ["--prompts", "p.txt", "--num-videos", "2", "--seed", "3", "-o", output, "--json"]
        data = run("generate", "--demo", *args).json
        assert [(v["prompt"], v["seed"]) for v in data["videos"]] == [
            ("a red circle", 3),
            ("a red circle", 4),
            ("红色的圆", 3),
            ("红色的圆", 4),
        ]
        names = [Path(v["output"]).name[16:] for v in data["videos"]]
        assert names == ["red-circle_s3.mp4", "red-circle_s4.mp4", "红色的圆_s3.mp4", "红色的圆_s4.mp4"]
        assert all(Path(v["output"]).is_file() for v in data["videos"])
        assert (data["complete"], data["failed"]) == (4, 0)
    assert run("generate", "--demo", "--prompts", "p.txt", "--seed", "9", "-o", "n.mp4").code == 0
    assert {"n_1_s9.mp4", "n_2_s9.mp4"} <= set(videos(folder))


def test_rows_of_a_jsonl_file(run, fake, folder):
    rows = [{"prompt": "a", "seed": 3, "num_frames": 5}, {"prompt": "b", "num_inference_steps": 2}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("generate", "--demo", "--prompts", "p.jsonl", "--seed", "8", "-o", "v.mp4").code == 0
    assert [(r.seed, r.num_frames, r.num_inference_steps) for r in fake.requests] == [(3, 5, 16), (8, 17, 2)]
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "num_frames": 6}')
    ended = run("generate", "--demo", "--prompts", "p.jsonl", "-o", "w.mp4")
    assert ended.code == 2 and "line 2 of p.jsonl: 6 frames" in ended.err and len(fake.loaded) == 1


def test_existing_outputs_are_named_before_the_first_step(run, fake, folder):
    for seed in (1, 2):
        Path(f"a_s{seed}.mp4").write_text("mine")
    args = ["generate", "--demo", "a cat", "--seed", "0-3", "-o", "a.mp4"]
    ended = run(*args)
    assert ended.code == 2 and not fake.loaded and "E-USE-03" in ended.err
    assert "2 of 4 outputs exist: a_s1.mp4, a_s2.mp4" in ended.err
    assert run(*args, "--overwrite").code == 0 and len(videos(folder)) == 4
    Path("s.png").write_text("mine")
    ended = run(*args, "--overwrite", "--sheet", "t.jpeg2")
    assert ended.code == 2 and "--sheet t.png" in ended.err
    ended = run("generate", "--demo", "a cat", "--sheet", "s.png")
    assert ended.code == 2 and "try    --sheet s-2.png" in ended.err and Path("s.png").read_text() == "mine"


def test_one_video_keeps_the_name(run, fake, folder):
    assert (
        run("generate", "--demo", "a cat", "--num-videos", "1", "-o", "a.mp4", "--json").json["complete"] == 1
    )
    assert videos(folder) == ["a.mp4"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["a cat", "--prompts", "p.txt"], "no PROMPT"),
        (["--prompts", "p.txt", "--latents", "x"], "one video"),
        (["a cat", "--seed", "1,2", "--num-videos", "2"], "omit --num-videos"),
        (["a cat", "--seed", "1,2", "-o", "a.avi"], "try    -o a.mp4"),
        (["a cat", "--seed", "1,2", "-o", "a.gif", "--fps", "60"], "60 fps in a gif"),
        (["a cat", "--seed", "x"], "--seed x"),
    ],
)
def test_calls_that_are_refused(run, fake, folder, args, text):
    Path("p.txt").write_text("a\n")
    ended = run("generate", "--demo", *args)
    assert ended.code == 2 and text in ended.err and not fake.loaded


def test_a_failed_video_does_not_lose_the_others(run, fake, folder, monkeypatch):
    fails_for(fake, monkeypatch, black, 1)
    args = ["generate", "--demo", "a cat", "--seed", "0-2", "--sheet", "s.png"]
    ended = run(*args, "-o", "a.mp4")
    assert ended.code == 1 and videos(folder) == ["a_s0.mp4", "a_s2.mp4"] and Path("s.png").is_file()
    assert "error[E-OUT-02]: video 2/3, seed 1: the video is black" in ended.err
    assert ended.err.splitlines()[-1] == "warning: 1 of 3 videos failed; the errors are above"
    ended = run(*args, "-o", "b.mp4", "--overwrite", "--json")
    data = ended.json
    assert ended.code == 1 and (data["complete"], data["failed"], data["sheet"]) == (2, 1, "s.png")
    assert [v["output"] for v in data["videos"]] == ["b_s0.mp4", None, "b_s2.mp4"]
    assert data["videos"][1]["error"]["code"] == "E-OUT-02"
    replay = shlex.split(data["videos"][1]["replay"])
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert replay[-2:] == ["-o", "b_s1.mp4"]


def test_an_internal_error_of_one_video_is_reported(run, fake, folder, monkeypatch):
    def bug() -> None:
        raise ZeroDivisionError("bug")

    fails_for(fake, monkeypatch, bug, 0)
    ended = run("generate", "--demo", "a cat", "--seed", "0-1", "-o", "a.mp4")
    assert ended.code == 1 and videos(folder) == ["a_s1.mp4"]
    assert "error[internal]: video 1/2, seed 0: internal error, ZeroDivisionError" in ended.err


def test_a_full_disk_stops_the_run(run, fake, folder, monkeypatch):
    def full() -> None:
        raise EnvironmentProblem("no space", needs="space", fix="free disk space", code="E-ENV-04")

    fails_for(fake, monkeypatch, full, 1)
    ended = run("generate", "--demo", "a cat", "--seed", "0-3", "-o", "a.mp4", "--json")
    data = ended.json
    assert ended.code == 3 and data["error"]["code"] == "E-ENV-04" and data["complete"] == 1
    assert [v["output"] for v in data["videos"]] == ["a_s0.mp4", None, None, None]


def test_an_error_of_the_loading_is_that_of_one_video(run, fake, folder, monkeypatch):
    monkeypatch.setattr("ascendit.pipeline.load.build", lambda *_: black())
    ended = run("generate", "--demo", "a cat", "--seed", "0-3", "-o", "a.mp4", "--json")
    assert ended.code == 1 and ended.json["error"]["got"] == "the video is black"


def test_ctrl_c_keeps_the_complete_videos_and_names_the_command_for_the_others(
    run, fake, folder, monkeypatch
):
    with monkeypatch.context() as patched:
        fails_for(fake, patched, lambda: os.kill(os.getpid(), signal.SIGINT), 2)
        ended = run("generate", "--demo", "a cat", "--seed", "0-4", "-o", "a.mp4")
        assert ended.code == 130 and videos(folder) == ["a_s0.mp4", "a_s1.mp4"]
        assert "error[E-CAN-01]: cancelled; " in ended.err
        assert "2 of 5 videos are complete: a_s0.mp4, a_s1.mp4" in ended.err
        data = run("generate", "--demo", "a cat", "--seed", "1-4", "-o", "b.mp4", "--json").json
        assert data["error"]["code"] == "E-CAN-01" and data["complete"] == 1 and len(data["videos"]) == 4
    fix = next(line for line in ended.err.splitlines() if line.startswith("  try    "))
    assert run(*shlex.split(fix.removeprefix("  try    "))[1:]).code == 0
    assert [name for name in videos(folder) if name[0] == "a"] == [f"a_s{i}.mp4" for i in range(5)]


def test_ctrl_c_names_a_command_for_each_remaining_prompt(run, fake, folder, monkeypatch):
    Path("p.txt").write_text("a cat; big\na dog\na cow")
    with monkeypatch.context() as patched:
        fails_for(fake, patched, lambda: os.kill(os.getpid(), signal.SIGINT), 2)
        ended = run("generate", "--demo", "--prompts", "p.txt", "--seed", "1,2,3", "-o", "a.mp4")
    assert ended.code == 130 and videos(folder) == ["a_1_s1.mp4"]
    line = next(line for line in ended.err.splitlines() if line.startswith("  try    "))
    words = shlex.split(line.removeprefix("  try    ").replace("; ascendit ", " | ascendit "))
    commands = [list(group) for bar, group in groupby(words, "|".__eq__) if not bar]
    assert len(commands) == 3
    assert all(run(*command[1:]).code == 0 for command in commands)
    assert videos(folder) == [f"a_{row}_s{seed}.mp4" for row in (1, 2, 3) for seed in (1, 2, 3)]
    made = [(r.prompt, r.seed) for r in fake.requests[1:]]
    assert made[-3:] == [("a cow", 1), ("a cow", 2), ("a cow", 3)] and ("a cat; big", 3) in made


@pytest.mark.parametrize("output", ["a.mp4", "new/"])
def test_a_prompt_that_is_repeated_gets_a_command_for_each_row(run, fake, folder, monkeypatch, output):
    Path("p.txt").write_text("a cat\na cat")
    fails_for(fake, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT), 1)
    ended = run("generate", "--demo", "--prompts", "p.txt", "--seed", "1,2", "-o", output)
    assert ended.code == 130 and ended.err.count("--seed 1,2 ") == 2


def test_a_dry_run_lists_the_videos(run, fake, folder):
    args = ["generate", "--demo", "a cat", "--seed", "0-1", "-o", "a.mp4", "--dry-run"]
    ended = run(*args)
    assert ended.code == 0 and not fake.loaded
    assert ended.out.splitlines()[-2:] == ["  seed 0  a_s0.mp4  a cat", "  seed 1  a_s1.mp4  a cat"]
    data = run(*args, "--json").json
    assert [v["output"] for v in data["videos"]] == ["a_s0.mp4", "a_s1.mp4"] and data["given"] == ["seed"]


def test_many_videos_are_the_bytes_of_single_ones(tiny_t2v_cascade: Path, folder, capsys):
    args = ["generate", str(tiny_t2v_cascade), "a cat", "--size", "32x32", "--frames", "5", "--steps", "2"]
    args += ["--allow-flat", "-q"]
    assert main([*args, "--seed", "3,4", "-o", "m.mp4"]) == 0
    assert main([*args, "--seed", "4", "-o", "one.mp4"]) == 0
    assert Path("m_s4.mp4").read_bytes() == Path("one.mp4").read_bytes() != Path("m_s3.mp4").read_bytes()


def test_formats_rates_and_quality(run, fake, folder):
    args = ["generate", "--demo", "a cat", "--seed", "1", "--fps", "23.976", "-o"]
    shown = run(*args, "a.mov").out
    assert "17 frames, 23.976 fps, 0.71 s of video" in shown and "--fps 24000/1001 " in shown
    data = json.loads(Path("a.json").read_text())
    assert (round(data["fps"], 3), data["request"]["fps"]) == (23.976, "24000/1001")
    again = run("generate", "--config", "a.json", "-o", "b.mkv", "--crf", "40")
    assert again.code == 0 and fake.requests[0] == fake.requests[1] and "--crf 40 " in again.out
    replay = shlex.split(again.out.splitlines()[-1].removeprefix("  replay  "))
    assert run(*replay[1:], "-o", "c.mkv").code == 0
    assert Path("b.mkv").stat().st_size == Path("c.mkv").stat().st_size
    assert run(*args, "a.gif").code == 0  # the same request: a.json is shared
    other = run("generate", "--demo", "a cat", "--seed", "2", "-o", "a.webm", "--overwrite")
    assert other.code == 2 and "a.json beside it, which describes a.mov" in other.err.replace("\n", " ")
    for bad, text in (("29,97", "24000/1001"), ("0", "1 to 240"), ("fast", "--fps 24")):
        ended = run("generate", "--demo", "a cat", "--fps", bad)
        assert ended.code == 2 and text in ended.err
    ended = run("generate", "--demo", "a cat", "--crf", "60", "-o", "q.mp4")
    assert ended.code == 2 and "try    --crf 18" in ended.err
