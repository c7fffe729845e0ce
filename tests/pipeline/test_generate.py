"""Complete runs on tiny models: equal to Diffusers' pipelines, repeatable, cancellable; bad ones fail."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from PIL import Image, ImageOps
from safetensors.torch import load_file

import ascendit
from ascendit.errors import AscenditError, Cancelled, QualityError, RequestError, UsageError
from ascendit.model import wan
from ascendit.model.state import DenoiseState, rope_table
from ascendit.pipeline import generate
from ascendit.pipeline.condition import make_condition
from ascendit.pipeline.images import name_image, open_image
from ascendit.pipeline.solver import make_solver
from ascendit.progress import Progress

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 5}
PROMPT = "a cat on a piano &amp; a dog"


def picture() -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8))


def ours(folder: Path, image: Any = None, **fields: Any) -> torch.Tensor:
    pipe = ascendit.load(folder)
    request = pipe.request(PROMPT, image=name_image(image)[0], **fields)
    return generate.denoise(pipe, request, image, lambda event: None, None)


def theirs(cls: Any, folder: Path, seed: int, flow_shift: float | None = None, **fields: Any) -> torch.Tensor:
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if flow_shift is not None:
        pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)
    generator = torch.Generator().manual_seed(seed)
    out: torch.Tensor = pipe(prompt=PROMPT, generator=generator, output_type="latent", **fields).frames
    return out


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "negative_prompt": "blurry"},
        {"guidance_scale": 5.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0, "flow_shift": 12.0, "num_inference_steps": 8},
        {"guidance_scale": 4.0, "max_sequence_length": 64},
    ],
)
def test_cascade_equals_wan_pipeline(tiny_t2v_cascade: Path, fields: dict[str, Any]) -> None:
    fields = SMALL | fields
    expected = theirs(WanPipeline, tiny_t2v_cascade, 7, **fields)
    assert relative(ours(tiny_t2v_cascade, seed=7, **fields), expected) < 1e-4


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_the_other_solvers_equal_wan_pipeline(
    tiny_t2v_single: Path, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = {
        "dpm++": lambda: DPMSolverMultistepScheduler(**flow),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    }[solver]
    load = WanPipeline.from_pretrained
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda folder: load(folder, scheduler=scheduler()))
    fields = SMALL | {"guidance_scale": 4.0}
    expected = theirs(WanPipeline, tiny_t2v_single, 7, **fields)
    latents = ours(tiny_t2v_single, seed=7, solver=solver, flow_shift=3.0, **fields)
    assert relative(latents, expected) < 1e-4


@pytest.mark.parametrize("name", ["t2v_single", "ti2v"])
def test_one_expert_equals_wan_pipeline(tiny_folder: Any, name: str) -> None:
    fields = SMALL | {"guidance_scale": 5.0, "height": 64, "width": 96}
    expected = theirs(WanPipeline, tiny_folder(name), 1, **fields)
    assert relative(ours(tiny_folder(name), seed=1, **fields), expected) < 1e-4


@pytest.mark.parametrize("name", ["i2v_cascade", "i2v_21", "ti2v_image"])
def test_image_to_video_equals_diffusers(tiny_folder: Any, name: str) -> None:
    fields = SMALL | {"guidance_scale": 3.5, "height": 64, "width": 96}
    expected = theirs(WanImageToVideoPipeline, tiny_folder(name), 5, image=picture(), **fields)
    assert relative(ours(tiny_folder(name), picture(), seed=5, **fields), expected) < 1e-4


@pytest.mark.parametrize("name", ["flf2v", "i2v_cascade"])
def test_first_and_last_image_equal_diffusers(tiny_folder: Any, name: str) -> None:
    fields = SMALL | {"guidance_scale": 3.5, "num_inference_steps": 3}
    first, last = picture(), Image.fromarray(np.asarray(picture())[::-1, ::-1])
    expected = theirs(WanImageToVideoPipeline, tiny_folder(name), 5, image=first, last_image=last, **fields)
    pipe = ascendit.load(tiny_folder(name))
    request = pipe.request(PROMPT, image="a", last_image="z", seed=5, **fields)
    run = partial(generate.denoise, pipe, request, first, lambda event: None, None)
    assert float((run(last_image=last) - expected).abs().max()) < 1e-4
    assert relative(run(last_image=first), expected) > 1e-3  # the last image matters


def test_a_video_between_two_images(tiny_flf2v: Path, tmp_path: Path) -> None:
    pipe = ascendit.load(tiny_flf2v)
    size: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1}
    first, path = picture(), tmp_path / "last.png"
    Image.new("RGB", (40, 40), "red").save(path)
    video = pipe.generate(PROMPT, image=first, last_image=path, seed=1, **size)
    assert video.request and video.request.last_image == str(path) and video.frames.shape == (5, 32, 48, 3)
    by_hand = [open_image(i) for i in (first, path)]
    fitted = [ImageOps.fit(i, (48, 32), Image.Resampling.LANCZOS) for i in by_hand]
    again = pipe.generate(PROMPT, image=fitted[0], last_image=np.asarray(fitted[1]), seed=1, **size)
    assert np.array_equal(video.frames, again.frames)
    stretched = pipe.generate(PROMPT, image=first, last_image=path, fit="stretch", seed=1, **size)
    assert not np.array_equal(video.frames, stretched.frames)
    assert pipe.warm_up(pipe.request(PROMPT, image="a", last_image="z", **size)) > 0


def test_without_a_size_the_video_has_the_ratio_of_the_image(tiny_i2v_cascade: Path) -> None:
    pipe = ascendit.load(tiny_i2v_cascade)
    pipe.defaults = replace(pipe.defaults, width=64, height=64)
    few: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 1, "seed": 1}
    video = pipe.generate(PROMPT, image=Image.new("RGB", (200, 100), "red"), **few)
    assert video.frames.shape == (5, 32, 80, 3)
    assert video.request and "--size 80x32" in video.request.replay_line("m")


@pytest.mark.parametrize(
    ("name", "fields", "code", "text"),
    [
        ("flf2v", {"image": picture()}, "E-REQ-04", "last_image=.FILE"),
        ("flf2v", {"last_image": picture()}, "E-REQ-04", " image=.FILE"),
        ("flf2v", {"image": picture(), "last_image": picture(), "num_frames": 1}, "E-REQ-03", "num_frames=5"),
        ("i2v_21", {"image": picture(), "last_image": picture()}, "E-REQ-04", "takes no last image"),
        ("ti2v_image", {"image": picture(), "last_image": picture()}, "E-REQ-04", "takes no last image"),
        ("t2v_single", {"last_image": picture()}, "E-REQ-04", "takes no last image"),
    ],
)
def test_last_images_that_do_not_fit_the_model(
    tiny_folder: Any, name: str, fields: dict[str, Any], code: str, text: str
) -> None:
    pipe = ascendit.load(tiny_folder(name))
    with pytest.raises(RequestError, match=text) as e:
        pipe.generate(PROMPT, **(SMALL | {"height": 32, "width": 64} | fields))
    assert e.value.code == code


def test_frames_equal_wan_pipeline(tiny_t2v_cascade: Path) -> None:
    fields = SMALL | {"guidance_scale": 4.0}
    video = ascendit.load(tiny_t2v_cascade).generate(PROMPT, seed=7, **fields)
    pipe = WanPipeline.from_pretrained(tiny_t2v_cascade)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = pipe(PROMPT, generator=generator, output_type="np", **fields).frames[0]
    assert video.frames.shape == (9, 32, 48, 3) and video.frames.dtype == np.uint8
    assert np.abs(video.frames.astype(int) - (expected * 255).round().astype(int)).max() <= 1


def test_same_seed_same_bytes_and_another_seed_another_video(tiny_t2v_cascade: Path) -> None:
    pipe = ascendit.load(tiny_t2v_cascade)
    first, again, other = (pipe.generate(PROMPT, seed=s, **SMALL).frames for s in (3, 3, 4))
    fresh = ascendit.load(tiny_t2v_cascade).generate(PROMPT, seed=3, **SMALL).frames
    assert first.tobytes() == again.tobytes() == fresh.tobytes()
    assert first.tobytes() != other.tobytes()


def test_guidance_of_one_runs_no_unconditional_pass(
    tiny_t2v_cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = ascendit.load(tiny_t2v_cascade)
    calls = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name)
        run = model.forward

        def forward(*args: Any, run: Any = run, name: str = name) -> Any:
            calls.append(name)
            return run(*args)

        monkeypatch.setattr(model, "forward", forward)
    pipe.generate(PROMPT, seed=1, guidance_scale=1, **SMALL)
    assert len(calls) == 5 and set(calls) == {"transformer", "transformer_2"}
    calls.clear()
    pipe.generate(PROMPT, seed=1, guidance_scale=1, guidance_scale_2=3, **SMALL)
    assert (
        calls.count("transformer_2") % 2 == 0
        and calls.count("transformer") + calls.count("transformer_2") // 2 == 5
    )


# ---- the hooks of the loop ----------------------------------------------------------------------


def latents_of(pipe: generate.Pipeline, **fields: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last latents, and those after each step."""
    request = pipe.request(PROMPT, seed=1, **(SMALL | fields))
    steps: list[torch.Tensor] = []

    def on_step(i: int, latents: torch.Tensor) -> None:
        assert i == len(steps)
        steps.append(latents.clone())

    return generate.denoise(pipe, request, None, lambda event: None, None, on_step), steps


def test_on_step_receives_the_latents_of_each_step(tiny_t2v_cascade: Path) -> None:
    last, steps = latents_of(ascendit.load(tiny_t2v_cascade))
    assert len(steps) == 5 and torch.equal(steps[-1], last)
    assert not any(torch.equal(a, b) for a, b in zip(steps, steps[1:], strict=False))


def test_predict_can_be_replaced(tiny_t2v_cascade: Path) -> None:
    """A `predict` that omits the unconditional branch computes the video without guidance."""
    pipe = ascendit.load(tiny_t2v_cascade)
    calls = []

    def predict(
        experts: Any, x: Any, timesteps: Any, spans: Any, states: Any, guidance: float
    ) -> torch.Tensor:
        calls.append((states[0].expert, [state.branch for state in states], states[0].step, guidance))
        return generate.predict(experts, x, timesteps, spans, states[:1], guidance)

    fields = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    conditional, _ = latents_of(replace(pipe, predict=predict), **fields)
    expected, _ = latents_of(pipe, guidance_scale=1.0)
    assert torch.equal(conditional, expected)
    assert not torch.equal(latents_of(pipe, **fields)[0], conditional)
    assert [step for _, _, step, _ in calls] == [0, 1, 2, 3, 4]
    assert {(name, *branches, g) for name, branches, _, g in calls} == {
        ("transformer", 0, 1, 4.0),
        ("transformer_2", 0, 1, 3.0),
    }


def test_all_ranks_follow_the_value_of_one_rank(tiny_t2v_cascade: Path) -> None:
    """A cache calls `agree` before it reuses a step, and follows the value of another rank."""

    class Reuse(DenoiseState):
        last: torch.Tensor | None = None

        def run_model(self, x: Any, t: Any, forward: Any) -> torch.Tensor:
            if self.last is None or self.agree(self.step % 2) < 0.5:
                self.last = forward(x, t)
            return self.last

    pipe, values = ascendit.load(tiny_t2v_cascade), []

    def other_rank(value: float) -> float:
        values.append(value)
        return 0.0

    plain, _ = latents_of(pipe, guidance_scale=1.0)
    cached, _ = latents_of(replace(pipe, make_state=Reuse), guidance_scale=1.0)
    predict = partial(generate.predict, agree=other_rank)
    agreed, _ = latents_of(replace(pipe, make_state=Reuse, predict=predict), guidance_scale=1.0)
    assert not torch.equal(cached, plain) and torch.equal(agreed, plain)
    sent = [i % 2 for i in range(5) if i not in (0, first_step_of_second_expert(pipe))]
    assert values == sent
    own, _ = latents_of(replace(pipe, make_state=partial(Reuse, agree=other_rank)), guidance_scale=1.0)
    assert torch.equal(own, plain) and values == 2 * sent


def first_step_of_second_expert(pipe: generate.Pipeline) -> int:
    """The first step of the second expert."""
    request = pipe.request(PROMPT, seed=1, **SMALL)
    timesteps = make_solver(request).schedule.timesteps
    return next(i for i, t in enumerate(timesteps) if t < 1000 * (request.boundary_ratio or 0))


def test_rope_is_computed_once_for_both_experts_and_branches(
    tiny_t2v_cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return rope_table(*args, **kwargs)

    monkeypatch.setattr(wan, "rope_table", counted)
    latents_of(ascendit.load(tiny_t2v_cascade), guidance_scale=4.0)
    assert len(calls) == 1


def test_progress_has_stage_expert_and_step(tiny_t2v_cascade: Path) -> None:
    events: list[Progress] = []
    pipe = ascendit.load(tiny_t2v_cascade, on_progress=events.append)
    assert {(e.stage, e.unit) for e in events} == {("load", "byte")}
    tensors = [load_file(file).values() for file in tiny_t2v_cascade.rglob("*.safetensors")]
    total = sum(x.nbytes for file in tensors for x in file)
    counts = [e.step for e in events]
    assert counts == sorted(set(counts)) and {e.total for e in events} == {total}
    assert counts[0] == 0 and counts[-1] == total and len(counts) > 20
    events.clear()
    pipe.generate(PROMPT, seed=1, on_progress=events.append, **SMALL)
    steps = [e for e in events if e.stage == "denoise"]
    assert [e.step for e in steps] == [1, 2, 3, 4, 5] and steps[0].total == 5
    assert steps[0].expert == "transformer" and steps[-1].expert == "transformer_2"
    assert all(e.seconds > 0 and e.memory_bytes > 0 for e in steps)
    assert events[0].stage == "encode" and events[-1].stage == "decode"


def test_a_pipeline_is_one_line(tiny_t2v_cascade: Path) -> None:
    text = repr(ascendit.load(tiny_t2v_cascade, scheme="int8"))
    assert text.startswith(f"Pipeline({str(tiny_t2v_cascade)!r}: ") and len(text) < 300 and "\n" not in text
    assert "t2v, two experts, cpu" in text and "scheme='int8'" in text


def test_cancel_between_steps(tiny_t2v_cascade: Path) -> None:
    pipe, stop, steps = ascendit.load(tiny_t2v_cascade), threading.Event(), []

    def watch(event: Progress) -> None:
        if event.stage == "denoise":
            steps.append(event.step)
            if event.step == 2:
                stop.set()

    with pytest.raises(Cancelled) as e:
        pipe.generate(PROMPT, seed=1, on_progress=watch, cancel=stop, **SMALL)
    assert steps == [1, 2] and e.value.exit_code == 130


def test_nan_weights_are_refused_as_not_finite(tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    folder = tiny.damage(tiny.copy(tiny_t2v_cascade, tmp_path / "m"), "nan_weights")
    with pytest.raises(QualityError, match="not finite") as e:
        ascendit.load(folder).generate(PROMPT, seed=1, **SMALL)
    assert e.value.code == "E-OUT-01" and e.value.exit_code == 1


@pytest.mark.parametrize("text_on", ["cpu", "device", "drop"])
def test_text_encoder_policies_give_the_same_video(tiny_t2v_cascade: Path, text_on: Any) -> None:
    pipe = ascendit.load(tiny_t2v_cascade, text_on=text_on)
    assert (pipe.text.model is None) == (text_on == "drop")
    expected = ascendit.load(tiny_t2v_cascade).generate(PROMPT, seed=2, **SMALL).frames
    assert np.array_equal(pipe.generate(PROMPT, seed=2, **SMALL).frames, expected)


def test_reference_operators_give_nearly_the_same_video(tiny_t2v_cascade: Path) -> None:
    fast = ascendit.load(tiny_t2v_cascade).generate(PROMPT, seed=2, **SMALL).frames
    plain = ascendit.load(tiny_t2v_cascade, ops="reference").generate(PROMPT, seed=2, **SMALL).frames
    assert np.abs(fast.astype(int) - plain.astype(int)).max() <= 1


def test_bfloat16_run_is_near_float32(tiny_t2v_cascade: Path) -> None:
    low = ascendit.load(tiny_t2v_cascade, dtype="bfloat16")
    assert low.transformer.dtype == torch.bfloat16
    exact = ascendit.load(tiny_t2v_cascade).generate(PROMPT, seed=2, **SMALL).frames
    near = low.generate(PROMPT, seed=2, **SMALL).frames
    assert 0 < np.abs(exact.astype(int) - near.astype(int)).mean() < 6


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"num_frames": 10}, "E-REQ-01", "num_frames=9 or num_frames=13"),
        ({"height": 40}, "E-REQ-02", "width=48, height=32 or width=48, height=48"),
        ({"num_inference_steps": 0}, "E-REQ-03", "num_inference_steps"),
        ({"image": "x.png"}, "E-REQ-04", "text-to-video"),
    ],
)
def test_invalid_requests(tiny_t2v_cascade: Path, fields: dict[str, Any], code: str, text: str) -> None:
    pipe = ascendit.load(tiny_t2v_cascade)
    with pytest.raises(RequestError) as e:
        pipe.generate(PROMPT, **(SMALL | fields))
    assert e.value.code == code and text in str(e.value)


def test_image_models_need_a_valid_image(tiny_i2v_cascade: Path, tmp_path: Path) -> None:
    pipe = ascendit.load(tiny_i2v_cascade)
    with pytest.raises(RequestError, match="no image"):
        pipe.generate(PROMPT, **SMALL)
    bad = tmp_path / "photo.png"
    bad.write_text("not a picture")
    with pytest.raises(UsageError, match="is not a readable image") as e:
        pipe.generate(PROMPT, image=bad, **SMALL)
    assert e.value.code == "E-USE-04"
    with pytest.raises(UsageError, match=r"an array \[4\]"):
        pipe.generate(PROMPT, image=np.zeros(4, np.uint8), **SMALL)


def test_image_path_array_and_tensor_give_the_same_video(tiny_i2v_cascade: Path, tmp_path: Path) -> None:
    pipe = ascendit.load(tiny_i2v_cascade)
    image = picture()
    path = tmp_path / "first.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    videos = [pipe.generate(PROMPT, image=i, seed=1, **SMALL) for i in (image, path, array, tensor)]
    assert all(np.array_equal(v.frames, videos[0].frames) for v in videos)
    assert videos[1].request and videos[1].request.image == str(path)
    names = {v.request.image for v in videos if v.request} - {str(path)}
    assert names == {name_image(image)[0]} and str(*names).startswith("sha256:")


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda f: ascendit.load(f / "nowhere"), "E-USE-02"),
        (lambda f: ascendit.load(f, device="tpu"), "E-USE-01"),
        (lambda f: ascendit.load(f, dtype="int3"), "E-USE-01"),
        (lambda f: ascendit.load(f, text_on=cast(Any, "moon")), "E-USE-01"),
        (lambda f: ascendit.load(f, ops="quick"), "E-USE-01"),
        (lambda f: ascendit.load(f).generate("x", strength=2), "E-USE-01"),
        *(
            (partial(lambda more, f: ascendit.load(f).generate("x", **more), {name: value}), "E-USE-01")
            for name, value in (("defaults", "folder"), ("picture", 3), ("cancel", 3), ("on_progress", 3))
        ),
        (lambda f: ascendit.load(f).generate("x", pixels={}), "E-USE-01"),
    ],
)
def test_invalid_calls(tiny_t2v_single: Path, call: Any, code: str) -> None:
    with pytest.raises(AscenditError) as e:
        call(tiny_t2v_single)
    assert e.value.code == code


def test_warm_up_runs_one_step_and_does_not_change_the_next_video(tiny_t2v_cascade: Path) -> None:
    pipe = ascendit.load(tiny_t2v_cascade)
    request = pipe.request(PROMPT, seed=1, **SMALL)
    assert pipe.warm_up(request) > 0
    fresh = ascendit.load(tiny_t2v_cascade).run(request).frames
    assert np.array_equal(pipe.run(request).frames, fresh)


def test_warm_up_of_a_model_that_needs_an_image(tiny_i2v_21: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, images = ascendit.load(tiny_i2v_21), []

    def recorded(task: Any, image: Any, *args: Any) -> Any:
        images.append((image.mode, image.size))
        return make_condition(task, image, *args)

    monkeypatch.setattr(generate, "make_condition", recorded)
    request = pipe.request(PROMPT, image="black", **SMALL)
    assert pipe.warm_up(request) > 0 and images == [("RGB", (48, 32))]


def test_the_loop_does_not_synchronize(tiny_t2v_cascade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read back from a tensor between the first and the last step."""
    pipe = ascendit.load(tiny_t2v_cascade)
    inside = False

    def watch(event: Progress) -> None:
        nonlocal inside
        inside = event.stage == "denoise" and event.step < event.total

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy"):
        real = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *args: Any, real: Any = real, name: str = name) -> Any:
            assert not inside, f"Tensor.{name} inside the loop"
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    pipe.generate(PROMPT, seed=1, on_progress=watch, **SMALL)
