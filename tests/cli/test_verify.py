"""`ascendit verify` with a fake pipeline whose videos are right or wrong."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from demo_data import draw_motion, render

from ascendit.demo import world
from ascendit.errors import Cancelled, QualityError
from ascendit.pipeline import job
from ascendit.verify import quality
from ascendit.verify.quality_table import BASE, Quality, QualityRow, default_cases


class Painter:
    """A fake cascade: renders the scene of the prompt, unless its experts are swapped."""

    def __init__(self) -> None:
        self.transformer, self.transformer_2 = "high", "low"
        self.wrong: set[tuple[str, str, str]] = set()
        self.black = False
        self.by_prompt = {scene.prompt(): scene for scene in world.scenes()}

    def request(self, prompt, *, seed):
        return SimpleNamespace(prompt=prompt, seed=seed, num_frames=17, height=64, width=64)

    def run(self, request, *, cancel):
        assert not cancel.is_set()
        if self.black:
            raise QualityError("black", needs="n", fix="f", code="E-OUT-02")
        scene = self.by_prompt[request.prompt]
        if scene.triple in self.wrong or self.transformer == "low":
            scene = scene._replace(shape="square" if scene.shape != "square" else "circle")
        motion = draw_motion(np.random.default_rng(request.seed), scene.direction)
        return SimpleNamespace(frames=render(scene, motion))


@pytest.fixture
def painter(monkeypatch):
    painter = Painter()
    monkeypatch.setattr(job, "load", lambda name: painter)
    return painter


def test_pass(run, painter):
    ended = run("verify", "--demo", "--adherence", "--limit", "20", "--seeds", "2")
    assert ended.code == 0
    assert "40/40" in ended.out and "held out" in ended.out
    assert "PASS  all videos   100.0%   at least 90%" in ended.out
    assert "PASS  held out     100.0%   at least 85%" in ended.out
    assert "judged 40/40  right 100.0%" in ended.err
    assert sum(line.startswith("judged") for line in ended.err.splitlines()) <= 11


def test_fail_on_held_out_scenes(run, painter, tmp_path):
    painter.wrong = set(world.held_out())
    report = tmp_path / "new" / "report.json"
    ended = run("verify", "--demo", "--adherence", "--limit", "40", "--seeds", "1", "--report", report)
    assert ended.code == 1
    assert "FAIL  held out       0.0%   at least 85%" in ended.out
    error = ended.err[ended.err.index("error[") :]
    assert error.startswith(
        "error[E-OUT-03]: prompt adherence is below its limit: all videos 85.0%, held out 0.0%"
    )
    data = json.loads(report.read_text())
    assert data["pass"] is False and data["kept_back"]["everything"] == 0 and data["kept_back"]["shape"] == 0
    assert data["kept_back"]["colour"] == data["kept_back"]["total"] == 6
    assert len(data["failures"]) == 6 and data["failures"][0]["prompt"]


def test_swapped_experts_are_the_control(run, painter):
    ended = run("verify", "--demo", "--adherence", "--limit", "5", "--seeds", "1", "--swap-experts", "--json")
    data = ended.json
    assert ended.code == 1 and data["swapped_experts"] is True
    assert data["overall"]["everything"] == 0 and data["overall"]["direction"] == 5
    assert data["error"]["code"] == "E-OUT-03" and ended.err == ""


def test_a_black_video_is_a_wrong_answer(run, painter):
    painter.black = True
    data = run("verify", "--demo", "--adherence", "--limit", "3", "--seeds", "1", "--json").json
    assert data["overall"]["everything"] == 0 and len(data["failures"]) == 3


def test_a_group_without_videos_is_not_judged(run, painter):
    ended = run("verify", "--demo", "--adherence", "--limit", "1", "--seeds", "1")
    assert ended.code == 0
    assert "-     held out    no videos" in ended.out and " 0/0" not in ended.out and " 0.0%" not in ended.out


def test_the_report_is_a_page(run, painter, tmp_path):
    painter.wrong = set(world.held_out())
    file = tmp_path / "r.html"
    args = ("verify", "--demo", "--adherence", "--limit", "8", "--seeds", "1", "--report", file)
    ended = run(*args)
    text = file.read_text()
    assert ended.code == 1 and "<td class='bad'>FAIL</td>" in text and text.count("<svg") == 1
    assert text.partition("Failures</h2>")[2].count("<tr>") == 1 + 1, "a header and the held-out scene"
    assert run(*args).code == 2 and run(*args, "--overwrite").code == 1


def test_cancelled(run, painter, monkeypatch):
    def stop(request, *, cancel):
        raise Cancelled("cancelled", needs="n", fix="f", code="E-CAN-01")

    monkeypatch.setattr(painter, "run", stop)
    assert run("verify", "--demo", "--adherence", "--limit", "1").code == 130


def test_an_interrupt_while_the_model_loads(run, painter, monkeypatch):
    def load(name):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(job, "load", load)
    # A shell may have started the tests with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("verify", "--demo", "--adherence", "--limit", "1").code == 130
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("args", "got"),
    [
        (["--demo"], "no check"),
        (["--adherence"], "no model"),
        (["dir", "--demo", "--adherence"], "--demo and a MODEL"),
        (["--demo", "--adherence", "--seeds", "0"], "--seeds 0"),
        (["--demo", "--adherence", "--limit", "0"], "0 scenes"),
        (["--demo", "--adherence", "--quality"], "two checks in one call"),
        (["--demo", "--quality", "--limit", "0"], "0 scenes"),
        (["--demo", "--quality", "--jobs", "0"], "--jobs 0"),
        (["--demo", "--quality", "--case", "mxfp6"], "case 'mxfp6'"),
        (["--demo", "--quality", "--swap-experts"], "--swap-experts with --quality"),
    ],
)
def test_bad_calls(run, painter, args, got):
    ended = run("verify", *args)
    assert ended.code == 2 and ended.err.startswith(f"error[E-USE-01]: {got}")


def test_the_name_of_a_report_says_its_kind(run, painter, tmp_path):
    ended = run("verify", "--demo", "--adherence", "--report", tmp_path / "r.txt")
    assert ended.code == 2 and "needs  a name that ends in .html" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_report_is_not_overwritten(run, painter, tmp_path):
    (tmp_path / "r.json").write_text("mine")
    ended = run("verify", "--demo", "--adherence", "--report", tmp_path / "r.json")
    assert ended.code == 2 and ended.err.startswith("error[E-USE-03]: ")
    assert (tmp_path / "r.json").read_text() == "mine"


# ---- --quality ----------------------------------------------------------------------------------


class Measure:
    """Replaces `measure_quality`: BF16 is always right, every other case loses `lost` videos."""

    def __init__(self) -> None:
        self.lost = 0
        self.calls: list[tuple] = []

    def __call__(self, model, chosen, scenes, seeds, *, jobs, cancel, on_video, on_row):
        self.calls.append((model, [c.name for c in chosen], len(scenes), list(seeds), jobs))
        total, rows = len(scenes) * len(seeds), []
        for case in (BASE, *chosen):
            lost = 0 if case is BASE else self.lost
            for i in range(total):
                on_video(case.name, i >= lost)
            rows.append(
                QualityRow(
                    name=case.name,
                    most_lost=case.most_lost,
                    bits=16.0,
                    right=tuple(i >= lost for i in range(total)),
                    psnr=(40.0,) * total,
                    ssim=(0.9,) * total,
                    cosine=((1.0, 0.9),) * total,
                    distance=((0.0, 0.1),) * total,
                )
            )
            result = Quality(
                model=model, device="cpu", prompts=len(scenes), seeds=tuple(seeds), rows=tuple(rows)
            )
            on_row(result)
        return result


@pytest.fixture
def measure(monkeypatch):
    measure = Measure()
    monkeypatch.setattr(quality, "measure_quality", measure)
    return measure


def test_quality_prints_a_table_and_passes(run, measure, tmp_path):
    report = tmp_path / "new" / "q.json"
    measure.lost = 2
    ended = run("verify", "--demo", "--quality", "--case", "int8", "--case", "fp8", "--report", report)
    assert ended.code == 0 and measure.calls == [("demo", ["int8", "fp8"], 192, [0], 1)]
    assert "right of 192" in ended.out and "| int8 | 16.00 |" in ended.out
    assert "PASS  int8                 2 lost   at most 2" in ended.out
    assert "fp8: right 190/192   video 576/576" in ended.err
    data = json.loads(report.read_text())
    assert data["pass"] is True and [c["case"] for c in data["cases"]] == ["bf16", "int8", "fp8"]


def test_a_quality_page_has_every_case(run, measure, tmp_path):
    measure.lost = 3
    names = ["int8", "mxfp4, default:w4a8"]
    cases = [part for name in names for part in ("--case", name)]
    args = ("verify", "--demo", "--quality", "--limit", "4", *cases, "--report", tmp_path / "q.html")
    assert run(*args).code == 1
    text = (tmp_path / "q.html").read_text()
    assert all(f"<td>{name}</td>" in text for name in names) and text.count("FAIL") == 1
    assert "1 of 4" in text and text.count("<svg") == 4


def test_quality_fails_below_a_limit(run, measure):
    measure.lost = 3
    ended = run("verify", "--demo", "--quality", "--seeds", "2", "--limit", "96", "--json", "--jobs", "2")
    assert ended.code == 1 and ended.err == ""
    assert ended.json["pass"] is False and ended.json["error"]["code"] == "E-OUT-03"
    losses = "; ".join(f"{name} loses 3, at most 2" for name in ("int8", "int8_block", "mxfp8"))
    assert losses in ended.json["error"]["got"]
    model, cases, scenes, seeds, jobs = measure.calls[0]
    assert cases == [c.name for c in default_cases()] and (scenes, seeds, jobs) == (96, [0, 1], 2)
    assert {c["case"]: c["lost"] for c in ended.json["cases"]}["recommended-fp4"] == 3


def test_quality_stores_finished_cases_when_cancelled(run, measure, monkeypatch, tmp_path):
    def stop(*args, on_row, **kwargs):
        measure(*args, on_row=on_row, **kwargs)
        raise Cancelled("cancelled", needs="n", fix="f", code="E-CAN-01")

    monkeypatch.setattr(quality, "measure_quality", stop)
    ended = run("verify", "--demo", "--quality", "--limit", "4", "--report", tmp_path / "q.json")
    assert ended.code == 130
    assert len(json.loads((tmp_path / "q.json").read_text())["cases"]) == 1 + len(default_cases())
