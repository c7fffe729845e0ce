"""Quality after quantization: schemes and recipes against BF16 with the same prompts and seeds.

    quality = measure_quality("demo", default_cases(), pick(192), [0], jobs=2)
    print(quality.table())

For each case: SQNR of the output of every quantized layer and attention on inputs of a BF16 run, distance of
the latents after each step, PSNR and SSIM of the frames, and the number of videos that match their prompt
(`adherence.judge`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ascendit.demo.adherence import judge
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError
from ascendit.exclusive import Stop
from ascendit.model.linear import QuantLinear
from ascendit.model.wan import Attention
from ascendit.names import is_block_linear
from ascendit.pipeline.calibrate import inputs_of, with_recording
from ascendit.pipeline.frame_checks import Frames, to_uint8
from ascendit.pipeline.generate import Pipeline, denoise
from ascendit.pipeline.job import load
from ascendit.pipeline.request import GenerateRequest
from ascendit.quant.fusion import first_in_group
from ascendit.verify.attention_quality import attention_calls, attention_sqnr
from ascendit.verify.metrics import cosine, output_sqnr, psnr, relative_l2, ssim, strip
from ascendit.verify.quality_table import BASE, Quality, QualityCase, QualityRow

LAYER_ROWS = 512
"""Number of sampled input rows that each layer is measured on."""
SHOWN = 2
"""Videos of each case that a report shows, besides the one with the least PSNR."""
STORED = ("weight", "weight_scale", "weight_dual_scale")
"""Tensors that count towards the bits per weight."""

OnVideo = Callable[[str, bool], None]
"""Called with the case and whether its video is right, by one thread at a time."""
OnRow = Callable[[Quality], None]
"""Called with all rows so far whenever a row is finished."""


# ---- the measurement ----------------------------------------------------------------------------


def measure_quality(
    model: str,
    cases: Sequence[QualityCase],
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    *,
    device: str = "cpu",
    jobs: int = 1,
    cancel: Stop | None = None,
    on_video: OnVideo | None = None,
    on_row: OnRow | None = None,
    **fields: Any,
) -> Quality:
    """Generate every scene and seed with BF16 and each of `cases`, and compare.

    `jobs`: threads that generate videos, each with its share of the CPU cores. `fields`: request fields that
    override the model's defaults. Raises the errors of `load`, UsageError (E-USE-01) for a quantized model,
    and Cancelled.
    """
    videos = [(scene, seed) for seed in seeds for scene in scenes]
    rows: list[QualityRow] = []
    base: list[Trace] = []
    measured: dict[bytes, QualityRow] = {}
    for case in (BASE, *cases):
        pipes = [load(model, device=device, dtype="bfloat16", **case.options) for _ in range(jobs)]  # type: ignore[arg-type]
        requests = [pipes[0].request(scene.prompt(), seed=seed, **fields) for scene, seed in videos]
        if case is BASE:
            float_pipe, inputs = check_float(pipes[0], model), layer_inputs(pipes[0], requests[0], cancel)
            calls = attention_calls(float_pipe, requests[0], cancel)
        key = fingerprint(pipes[0])
        if key not in measured:
            on_result = partial(on_video, case.name) if on_video else None
            traces = make_videos(pipes, requests, [scene for scene, _ in videos], cancel, on_result)
            base = base or traces
            layers = layer_sqnr(float_pipe, pipes[0], inputs) | attention_sqnr(pipes[0], calls)
            measured[key] = compare_traces(traces, base, bits_per_weight(pipes[0]), layers)
        rows.append(replace(measured[key], **vars(case)))
        quality = Quality(
            model=model,
            device=device,
            prompts=len(scenes),
            seeds=tuple(seeds),
            rows=tuple(rows),
            videos=tuple((scene.prompt(), seed) for scene, seed in videos),
        )
        if on_row:
            on_row(quality)
    return quality


@dataclass(frozen=True, eq=False)
class Trace:
    """A video, and the latents of its steps."""

    latents: Tensor
    """After each step, float32 [steps, C, F, H, W]; zeros in place of values that are not finite."""
    frames: Frames
    right: bool = False
    """Whether it matches its prompt."""


def make_videos(
    pipes: Sequence[Pipeline],
    requests: Sequence[GenerateRequest],
    scenes: Sequence[Scene],
    cancel: Stop | None,
    on_result: Callable[[bool], None] | None,
) -> list[Trace]:
    """Make the video of each request. Every pipeline has its own thread and share of the CPU cores."""
    jobs, threads, lock = len(pipes), torch.get_num_threads(), threading.Lock()

    def run_job(job: int) -> list[Trace]:
        torch.set_num_threads(max(1, threads // jobs))
        traces = []
        for request, scene in zip(requests[job::jobs], scenes[job::jobs], strict=True):
            video = trace(pipes[job], request, cancel)
            traces.append(replace(video, right=all(judge(video.frames).matches(scene).values())))
            with lock:
                if on_result:
                    on_result(traces[-1].right)
        return traces

    try:
        if jobs == 1:  # in the main thread, where a second Ctrl-C stops immediately
            return run_job(0)
        with ThreadPoolExecutor(jobs) as pool:
            by_job = list(pool.map(run_job, range(jobs)))
    finally:
        torch.set_num_threads(threads)
    return [by_job[i % jobs][i // jobs] for i in range(len(requests))]


def fingerprint(pipe: Pipeline) -> bytes:
    """Hash of all weights, the step schedule and attention: equal for pipelines that make the same videos."""
    experts = nn.ModuleDict(pipe.experts)
    schemes = {name: m.scheme for name, m in experts.named_modules() if isinstance(m, Attention)}
    policy = pipe.attention
    requested = policy and (dict(policy.request), policy.sub_head, policy.probabilities)
    digest = hashlib.sha256(f"{pipe.policy} {schemes} {requested}".encode())
    for name, tensor in experts.state_dict().items():
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def compare_traces(
    traces: Sequence[Trace], base: Sequence[Trace], bits: float, layers: Mapping[str, float]
) -> QualityRow:
    """Compare each video with the BF16 video of the same request."""
    pairs = list(zip(traces, base, strict=True))
    steps = [list(zip(a.latents, b.latents, strict=True)) for a, b in pairs]
    psnrs = tuple(psnr(a.frames, b.frames) for a, b in pairs)
    least = min(range(len(psnrs)), key=lambda i: psnrs[i])
    shown = dict.fromkeys([least, *range(min(SHOWN, len(pairs)))]) if base is not traces else {}
    return QualityRow(
        bits=bits,
        layers=layers,
        right=tuple(video.right for video in traces),
        psnr=psnrs,
        ssim=tuple(ssim(a.frames, b.frames) for a, b in pairs),
        cosine=tuple(tuple(cosine(x, y) for x, y in video) for video in steps),
        distance=tuple(tuple(relative_l2(x, y) for x, y in video) for video in steps),
        strips={i: strip([base[i].frames, traces[i].frames]) for i in shown},
    )


def check_float(pipe: Pipeline, model: str) -> Pipeline:
    """Return the pipeline. Raises UsageError (E-USE-01) if it is quantized."""
    if any(isinstance(m, QuantLinear) for m in nn.ModuleDict(pipe.experts).modules()):
        raise UsageError(
            f"{model} is quantized",
            needs="the float model: each case is quantized while it loads, and compared with BF16",
            fix="pass the float model that it was quantized from",
        )
    return pipe


# ---- one video ----------------------------------------------------------------------------------


def trace(pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None) -> Trace:
    """Generate a video and record the latents of its steps.

    If it has NaN or infinite values, its frames are black.
    """
    steps: list[Tensor] = []
    try:
        with pipe.exclusive(cancel):
            final = denoise(
                pipe, request, None, lambda event: None, cancel, lambda i, x: steps.append(x[0].cpu())
            )
            frames = to_uint8(pipe.vae.decode(final)[0])
    except QualityError:
        frames = np.zeros((request.num_frames, request.height, request.width, 3), np.uint8)
    return Trace(torch.stack(steps).nan_to_num(0, 0, 0), frames)


# ---- layers -------------------------------------------------------------------------------------


def layer_inputs(pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None) -> dict[str, Tensor]:
    """`expert.layer` of an input's first reader -> rows [n, K], bf16, sampled over all steps."""
    inputs = inputs_of(pipe, LAYER_ROWS)
    generator = torch.Generator().manual_seed(0)
    with pipe.exclusive(cancel):
        denoise(with_recording(pipe, inputs, generator), request, None, lambda event: None, cancel)
    return {layer: recorded.statistics().rows for layer, recorded in inputs.items()}


@torch.inference_mode()
def layer_sqnr(float_pipe: Pipeline, pipe: Pipeline, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """`expert/layer` -> SQNR in dB of a quantized layer's output, against x W^T with the float weight.

    `inputs`: rows [n, K], bf16. Computed in the schedule's default precision, without the bias.
    """
    sqnr = {}
    floats = nn.ModuleDict(float_pipe.experts)
    for name, module in nn.ModuleDict(pipe.experts).named_modules():
        if not isinstance(module, QuantLinear) or (x := inputs.get(first_in_group(name))) is None:
            continue
        weight: Any = floats.get_submodule(name).weight
        y = module(x.to(module.device), pipe.policy.default.precision).float().cpu()
        bias = 0 if module.bias is None else module.bias.cpu()
        sqnr[name.replace(".", "/", 1)] = output_sqnr(y - bias, x.float() @ weight.float().cpu().t())
    return sqnr


def bits_per_weight(pipe: Pipeline) -> float:
    """Bits per weight of the blocks' linear layers, with scales and without biases."""
    size = count = 0
    for name, module in nn.ModuleDict(pipe.experts).named_modules():
        if not isinstance(module, nn.Linear) or not is_block_linear(name.partition(".")[2]):
            continue
        count += module.in_features * module.out_features
        size += sum(t.nbytes for role, t in module.state_dict().items() if role in STORED)
    return 8 * size / max(count, 1)
