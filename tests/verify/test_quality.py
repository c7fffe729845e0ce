"""The quality table on short runs of the demo: its measurements, and that it detects a loss."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ascendit
from ascendit.attention.choice import AttentionPolicy
from ascendit.demo.adherence import pick
from ascendit.errors import Cancelled, UsageError
from ascendit.mx.codec import decode, encode
from ascendit.pipeline import generate, solver
from ascendit.pipeline.generate import Pipeline
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.quant.recipe import FOLDER, recipe_names
from ascendit.quant.schemes import SCHEMES
from ascendit.verify.quality import (
    bits_per_weight,
    fingerprint,
    layer_inputs,
    layer_sqnr,
    measure_quality,
    trace,
)
from ascendit.verify.quality_table import (
    BASE,
    Quality,
    QualityCase,
    QualityRow,
    choose_cases,
    default_cases,
)

SHORT: dict[str, Any] = {"num_inference_steps": 3, "num_frames": 5}
PROMPT = "a red circle moves right on a black background"
LAYER = "blocks.3.ffn.net.0.proj"


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    torch.set_num_threads(1)


@cache
def demo(scheme: str | None = None) -> Pipeline:
    return ascendit.load("demo", dtype="bfloat16", scheme=scheme)


@cache
def short_quality(jobs: int = 1) -> Quality:
    chosen = choose_cases(["mxfp8", "mxfp4"])
    return measure_quality("demo", chosen, pick(2), [0], jobs=jobs, **SHORT)


# ---- the rows -----------------------------------------------------------------------------------


def test_every_scheme_and_every_recipe_has_a_row() -> None:
    options = [case.options for case in default_cases()]
    assert {o["scheme"] for o in options if "scheme" in o} == set(SCHEMES) - {"bf16"}
    assert {o["recipe"] for o in options if "recipe" in o} == set(recipe_names()) - {"default"}
    assert sum("step_policy" in o for o in options) >= 2
    assert {o["attention"] for o in options if "attention" in o} == {f"self={n}" for n in ATTENTION_FORMATS}
    assert {c.name: c.most_lost for c in default_cases() if c.most_lost is not None} == {
        "int8": 2,
        "int8_block": 2,
        "mxfp8": 2,
        "recommended-fp4": 6,
    }


def test_choose() -> None:
    assert [c.name for c in choose_cases(["mxfp8", "own/mine.toml"])] == ["mxfp8", "own/mine.toml"]
    assert choose_cases(["own/mine.toml"])[0].options == {"recipe": "own/mine.toml"}
    with pytest.raises(UsageError, match="case 'mxfp6'") as e:
        choose_cases(["mxfp6"])
    assert e.value.code == "E-USE-01" and "mxfp4_dualscale" in e.value.needs


# ---- a short measurement ------------------------------------------------------------------------


def test_more_bits_have_smaller_errors() -> None:
    base, mxfp8, mxfp4 = short_quality().rows
    assert [base.name, mxfp8.name, mxfp4.name] == ["bf16", "mxfp8", "mxfp4"]
    assert (base.bits, mxfp8.bits, mxfp4.bits) == (16, 8.25, 4.25)
    assert base.layers == {} and set(base.psnr) == {99.0} and set(base.ssim) == {1.0}
    assert set(sum(base.distance, ())) == {0.0}
    assert len(mxfp8.layers) == len(mxfp4.layers) == 2 * 80
    worst8, worst4 = (min(row.layers.values()) for row in (mxfp8, mxfp4))
    assert worst8 > 24 and 10 < worst4 < worst8 - 8
    for a, b in zip(mxfp8.psnr, mxfp4.psnr, strict=True):
        assert 99 > a > b
    for row in (mxfp8, mxfp4):
        assert all(len(video) == SHORT["num_inference_steps"] for video in row.cosine)
        assert 0 < row.per_step["relative_l2"][0] < row.per_step["relative_l2"][-1] < 1
        assert 0.5 < row.per_step["cosine"][-1] < row.per_step["cosine"][0] <= 1


def test_two_threads_measure_the_same_as_one() -> None:
    assert short_quality(jobs=2) == short_quality()


def test_table_and_json() -> None:
    quality = short_quality()
    lines = quality.table().splitlines()
    assert len(lines) == 2 + 3 and len({line.count("|") for line in lines}) == 1
    assert "right of 2" in lines[0] and lines[3].startswith("| mxfp8 | 8.25 |")
    data = json.loads(json.dumps(quality.as_dict()))
    case = data["cases"][1]
    assert case["layer_sqnr"]["layers"][case["layer_sqnr"]["worst_layer"]] == case["layer_sqnr"]["worst"]
    assert data["videos"] == 2 and len(case["steps"]["cosine"]) == 3
    assert case["steps"]["worst_cosine"] <= min(case["steps"]["cosine"])


def test_the_report_shows_the_worst_video() -> None:
    quality = short_quality()
    base, mxfp8, mxfp4 = quality.rows
    assert base.strips == {} and set(mxfp8.strips) == set(mxfp4.strips) == {0, 1}
    assert next(iter(mxfp4.strips)) == mxfp4.psnr.index(min(mxfp4.psnr))
    assert [seed for _, seed in quality.videos] == [0, 0]
    text = quality.page().markup()
    assert text.count("src='data:image/png;base64,") == 4
    for prompt, _ in quality.videos:
        assert f"<td>{prompt}</td>" in text
    for value in (*mxfp8.psnr, *mxfp4.psnr):
        assert f" {value:.1f}</td>" in text


def test_equal_cases_are_run_once(tmp_path: Path) -> None:
    """A recipe in another file; two recipes that differ only in attention are different."""
    copy = tmp_path / "copy.toml"
    shutil.copy(FOLDER / "ascend-w4a4.toml", copy)
    reported: list[str] = []
    cases = choose_cases(["ascend-w4a4", str(copy), "ascend-w4a4f4"])
    fields = {**SHORT, "num_inference_steps": 1}
    quality = measure_quality("demo", cases, pick(1), [0], on_video=lambda c, _: reported.append(c), **fields)
    assert reported == ["bf16", "ascend-w4a4", "ascend-w4a4f4"]
    _, first, same, other = quality.rows
    assert same == replace(first, name=str(copy), options=cases[1].options)
    name = "transformer/blocks.3.attn1"
    assert first.layers[name] > other.layers[name] + 5  # fp8 and mxfp4
    assert "transformer/blocks.0.attn1" not in first.layers
    assert {k: v for k, v in first.layers.items() if "to_" in k} == {
        k: v for k, v in other.layers.items() if "to_" in k
    }


def test_the_fingerprint_depends_on_policy_and_weights() -> None:
    one = fingerprint(demo("mxfp4"))
    assert one == fingerprint(ascendit.load("demo", dtype="bfloat16", scheme="mxfp4"))
    other = ascendit.load("demo", dtype="bfloat16", scheme="mxfp4", step_policy="0:w4a8")
    partial = ascendit.load("demo", dtype="bfloat16", scheme="mxfp4", keep=["blocks.7.ffn.net.2"])
    assert len({one, fingerprint(other), fingerprint(partial), fingerprint(demo())}) == 4
    policies = [AttentionPolicy(device=demo().device, probabilities=x) for x in ("one", "two")]
    assert len({fingerprint(replace(demo(), attention=policy)) for policy in policies}) == 2


def test_every_video_is_reported_and_a_cancellation_stops() -> None:
    reported: list[tuple[str, bool]] = []
    stop = threading.Event()

    def on_video(case: str, right: bool) -> None:
        reported.append((case, right))
        assert threading.current_thread() is threading.main_thread()
        stop.set()

    with pytest.raises(Cancelled):
        measure_quality("demo", choose_cases(["int8"]), pick(2), [0], cancel=stop, on_video=on_video, **SHORT)
    assert [case for case, _ in reported] == ["bf16"]


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    ascendit.quantize("demo", tmp_path / "q", scheme="int8")
    with pytest.raises(UsageError, match="q is quantized") as e:
        measure_quality(str(tmp_path / "q"), [], pick(1), [0], **SHORT)
    assert e.value.code == "E-USE-01" and "quantized from" in e.value.fix


# ---- one video ----------------------------------------------------------------------------------


def test_trace_has_the_latents_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    latents: list[torch.Tensor] = []
    make = solver.make_solver

    def make_recorded(request: Any) -> Any:
        recorded = make(request)
        step = recorded.step

        def record(*args: Any) -> torch.Tensor:
            latents.append(step(*args))
            return latents[-1]

        recorded.step = record  # type: ignore[assignment]
        return recorded

    monkeypatch.setattr(generate, "make_solver", make_recorded)
    request = demo().request(PROMPT, seed=3, **SHORT)
    traced = trace(demo(), request)
    assert torch.equal(traced.latents, torch.cat(latents))
    assert np.array_equal(traced.frames, demo().run(request).frames)
    assert not any(expert._forward_pre_hooks for expert in demo().experts.values())


def test_a_video_that_is_not_finite_is_wrong() -> None:
    pipe = ascendit.load("demo", dtype="bfloat16")
    pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    traced = trace(pipe, pipe.request(PROMPT, seed=3, **SHORT))
    assert traced.latents.shape[0] == 3 and bool(traced.latents.isfinite().all())
    assert not traced.frames.any()


# ---- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "rule"), [("int8", "amax"), ("mxfp8", "ceil"), ("mxfp4", "floor")])
def test_the_sqnr_of_a_layer_equals_its_formula(scheme: str, rule: str) -> None:
    plain, pipe = demo(), demo(scheme)
    inputs = layer_inputs(plain, plain.request(PROMPT, seed=3, **SHORT))
    measured = layer_sqnr(plain, pipe, inputs)
    x, w = inputs[f"transformer.{LAYER}"], plain.transformer.get_submodule(LAYER).weight
    y = x.double() @ w.double().t()  # type: ignore[operator]
    weight = decode(encode(w, scheme)).double()  # type: ignore[arg-type]
    activation = decode(encode(x, scheme, scale_rule=rule)).double()
    noise = (activation @ weight.t() - y).square().sum()
    assert measured[f"transformer/{LAYER}"] == pytest.approx(
        float(10 * torch.log10(y.square().sum() / noise)), abs=0.15
    )
    assert x.shape == (512, 192) and float(x.float().std()) > 0.1


def test_layer_inputs_come_from_the_run() -> None:
    """Every sampled row is one of the inputs of the layer."""
    request = demo().request(PROMPT, seed=3, **SHORT)
    inputs: list[torch.Tensor] = []
    plain, weight = demo().transformer.ops, demo().transformer.get_submodule(LAYER).weight

    def linear(x: torch.Tensor, w: Any, b: Any = None) -> torch.Tensor:
        if w is weight:
            inputs.append(x.flatten(0, -2))
        return plain.linear(x, w, b)

    demo().transformer.ops = replace(plain, linear=linear)
    try:
        demo().run(request)
    finally:
        demo().transformer.ops = plain
    sampled = layer_inputs(demo(), request)[f"transformer.{LAYER}"]
    rows = {tuple(row) for row in torch.cat(inputs).tolist()}
    assert len(sampled) == 512 and all(tuple(row) in rows for row in sampled.tolist())


def test_bits_per_weight_count_stored_tensors() -> None:
    weights = 8 * 192**2 + 2 * 192 * 448  # of one block
    scales = 8 * 192 + 448 + 192  # int8: one float32 for each row
    assert bits_per_weight(demo("int8")) == pytest.approx(8 + 32 * scales / weights)
    assert bits_per_weight(demo()) == 16


# ---- the report ---------------------------------------------------------------------------------


def row(name: str, right: str, most_lost: int | None = None) -> QualityRow:
    n = len(right)
    return QualityRow(
        name=name,
        most_lost=most_lost,
        bits=8.25,
        layers={"a": 30.0, "b": 28.0, "c": 31.0},
        right=tuple(letter == "y" for letter in right),
        psnr=tuple(40.0 + i for i in range(n)),
        ssim=(0.99,) * n,
        cosine=((1.0, 0.98),) * (n - 1) + ((0.9, 0.7),),
        distance=((0.01, 0.1),) * (n - 1) + ((0.3, 0.6),),
    )


def test_lost_won_and_the_limit() -> None:
    base, good, bad = row("bf16", "yyyyyn"), row("x", "yyyyny", 2), row("y", "nnyyyn", 2)
    quality = Quality(model="m", device="cpu", prompts=6, seeds=(0,), rows=(base, good, bad))
    assert (good.lost(base), good.won(base), bad.lost(base), bad.won(base)) == (1, 1, 2, 0)
    assert good.allowed() == 1 and base.allowed() is None  # 2 of 192: of 6, rounded up
    assert [(r.name, passed) for r, passed in quality.verdicts()] == [("x", True), ("y", False)]
    assert good.cells(base)[1:] == [
        "8.25",
        "28.0 / 30.0",
        "1.0000 / 0.9800 / 0.7000",
        "0.0100 / 0.1000 / 0.6000",
        "42.5 / 40.0",
        "0.9900 / 0.9900",
        "5",
        "1 / 1",
    ]


def test_the_base_has_no_options() -> None:
    assert BASE.options == {} and isinstance(BASE, QualityCase)
