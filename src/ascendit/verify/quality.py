"""What quantization costs: every scheme and recipe against BF16, same prompts, same seeds, no neural judge.

    quality = measure_quality("demo", default_cases(), pick(192), [0], jobs=2)
    print(quality.table())

For each case: the signal to noise of every layer's output on rows of a BF16 run; how far the latents are
after each step; PSNR and SSIM of the frames; and which videos still show what was asked (`adherence.judge`).
The pipeline is the one that `ascendit.load` gives.
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
from ascendit.model.linear import QuantLinear
from ascendit.names import is_block_linear
from ascendit.ops.open_device import activate
from ascendit.pipeline.calibrate import inputs_of, watched
from ascendit.pipeline.frame_checks import Frames, to_uint8
from ascendit.pipeline.generate import Pipeline, Stop, denoise
from ascendit.pipeline.job import load
from ascendit.pipeline.request import GenerateRequest
from ascendit.quant.fusion import first_in_group
from ascendit.quant.recipe import recipe_names
from ascendit.quant.schemes import QUANTIZED, SCHEMES
from ascendit.verify.metrics import cosine, output_sqnr, psnr, relative_l2, ssim
from ascendit.verify.quality_table import Quality, QualityCase, QualityRow

LAYER_TOKENS = 512
"""How many tokens of each input a layer is measured on."""
STORED = ("weight", "weight_scale", "weight_dual_scale")
"""What counts as bits of a weight."""

OnVideo = Callable[[str, bool], None]
"""Called with the case and whether its video is right; by any thread, one at a time."""
OnRow = Callable[[Quality], None]
"""Called with all rows so far whenever one is done."""


# ---- cases --------------------------------------------------------------------------------------


BASE = QualityCase(name="bf16")
_LIMITS = {name: SCHEMES[name].most_lost for name in QUANTIZED} | {"recommended-fp4": 6}
_POLICIES = ("default:w4a8", "0-3:w4a8,default:w4a4")


def default_cases() -> tuple[QualityCase, ...]:
    """Every scheme, MXFP4 by step policies, and every recipe that is shipped."""
    options = {name: {"scheme": name} for name in QUANTIZED}
    options |= {f"mxfp4, {p}": {"scheme": "mxfp4", "step_policy": p} for p in _POLICIES}
    options |= {name: {"recipe": name} for name in recipe_names() if name != "default"}
    return tuple(QualityCase(name=n, options=o, most_lost=_LIMITS.get(n)) for n, o in options.items())


def choose(names: Sequence[str]) -> tuple[QualityCase, ...]:
    """The cases of these names; a recipe's file or a scheme is one too. UsageError E-USE-01."""
    known = {case.name: case for case in default_cases()}
    found = []
    for name in names:
        if name not in known and not name.endswith(".toml"):
            raise UsageError(
                f"case {name!r}",
                needs=f"one of {'; '.join(known)}; or the TOML file of a recipe",
                fix="check the spelling",
            )
        found.append(known.get(name) or QualityCase(name=name, options={"recipe": name}))
    return tuple(found)


# ---- the measurement ----------------------------------------------------------------------------


def measure_quality(
    model: str,
    chosen: Sequence[QualityCase],
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
    """Run `chosen` and BF16 on every scene and seed. `jobs` threads make videos, each on its share of the
    processors. `fields`: of the request, where they are not the model's defaults.

    Raises what `load` raises, UsageError for a model that is quantized already, and Cancelled.
    """
    asked = [(scene, seed) for seed in seeds for scene in scenes]
    rows: list[QualityRow] = []
    base: list[Trace] = []
    known: dict[bytes, QualityRow] = {}
    for case in (BASE, *chosen):
        pipes = [load(model, device=device, dtype="bfloat16", **case.options) for _ in range(jobs)]  # type: ignore[arg-type]
        requests = [pipes[0].request(scene.prompt(), seed=seed, **fields) for scene, seed in asked]
        if case is BASE:
            plain, inputs = check_float(pipes[0], model), layer_inputs(pipes[0], requests[0], cancel)
        mark = fingerprint(pipes[0])
        if mark not in known:
            tell = partial(on_video, case.name) if on_video else None
            made = make_videos(pipes, requests, [scene for scene, _ in asked], cancel, tell)
            base = base or made
            bits, layers = bits_per_weight(pipes[0]), layer_sqnr(plain, pipes[0], inputs)
            known[mark] = compare_traces(made, base, bits, layers)
        rows.append(replace(known[mark], **vars(case)))
        quality = Quality(
            model=model, device=device, prompts=len(scenes), seeds=tuple(seeds), rows=tuple(rows)
        )
        if on_row:
            on_row(quality)
    return quality


@dataclass(frozen=True, eq=False)
class Trace:
    """One video as it was made."""

    latents: Tensor
    """After each step, float32 [steps, C, F, H, W]; zeros after numbers that were not finite."""
    frames: Frames
    right: bool = False
    """Everything in it is as asked."""


def make_videos(
    pipes: Sequence[Pipeline],
    requests: Sequence[GenerateRequest],
    scenes: Sequence[Scene],
    cancel: Stop | None,
    tell: Callable[[bool], None] | None,
) -> list[Trace]:
    """One for each request. Each of several pipelines has a thread, and its share of the processors."""
    jobs, threads, lock = len(pipes), torch.get_num_threads(), threading.Lock()

    def share(member: int) -> list[Trace]:
        torch.set_num_threads(max(1, threads // jobs))
        made = []
        for request, scene in zip(requests[member::jobs], scenes[member::jobs], strict=True):
            one = trace(pipes[member], request, cancel)
            made.append(replace(one, right=all(judge(one.frames).right(scene).values())))
            with lock:
                if tell:
                    tell(made[-1].right)
        return made

    try:
        if jobs == 1:  # in this thread, where a second Ctrl-C stops at once
            return share(0)
        with ThreadPoolExecutor(jobs) as pool:
            parts = list(pool.map(share, range(jobs)))
    finally:
        torch.set_num_threads(threads)
    return [parts[i % jobs][i // jobs] for i in range(len(requests))]


def fingerprint(pipe: Pipeline) -> bytes:
    """The same for pipelines that make the same videos: of every weight, and of the steps' precisions."""
    found = hashlib.sha256(str(pipe.policy).encode())
    for name, tensor in nn.ModuleDict(pipe.experts).state_dict().items():
        found.update(f"{name} {tensor.dtype}".encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.digest()


def compare_traces(
    made: Sequence[Trace], base: Sequence[Trace], bits: float, layers: Mapping[str, float]
) -> QualityRow:
    """Each video beside the one that BF16 made of the same request."""
    pairs = list(zip(made, base, strict=True))
    steps = [list(zip(a.latents, b.latents, strict=True)) for a, b in pairs]
    return QualityRow(
        bits=bits,
        layers=layers,
        right=tuple(one.right for one in made),
        psnr=tuple(psnr(a.frames, b.frames) for a, b in pairs),
        ssim=tuple(ssim(a.frames, b.frames) for a, b in pairs),
        cosine=tuple(tuple(cosine(x, y) for x, y in video) for video in steps),
        distance=tuple(tuple(relative_l2(x, y) for x, y in video) for video in steps),
    )


def check_float(pipe: Pipeline, model: str) -> Pipeline:
    """The pipeline. UsageError E-USE-01 if it has codes already."""
    if any(isinstance(m, QuantLinear) for m in nn.ModuleDict(pipe.experts).modules()):
        raise UsageError(
            f"{model} is quantized",
            needs="the float model: each case is quantized while it loads, and held against BF16",
            fix="give the folder that it was quantized from",
        )
    return pipe


# ---- one video ----------------------------------------------------------------------------------


def trace(pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None) -> Trace:
    """Make a video and keep the latents of its steps. One that is not finite ends in zeros."""
    steps: list[Tensor] = []
    try:
        activate(pipe.device)
        last = denoise(pipe, request, None, lambda event: None, cancel, lambda i, x: steps.append(x[0].cpu()))
        frames = to_uint8(pipe.vae.decode(last)[0])
    except QualityError:
        frames = np.zeros((request.num_frames, request.height, request.width, 3), np.uint8)
    return Trace(torch.stack(steps).nan_to_num(0, 0, 0), frames)


# ---- the layers ---------------------------------------------------------------------------------


def layer_inputs(pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None) -> dict[str, Tensor]:
    """`expert.layer`, the first that reads an input -> some of its rows [n, K], over all steps."""
    inputs = inputs_of(pipe, LAYER_TOKENS)
    generator = torch.Generator().manual_seed(0)
    denoise(watched(pipe, inputs, generator), request, None, lambda event: None, cancel)
    return {layer: seen.statistics().rows for layer, seen in inputs.items()}


@torch.inference_mode()
def layer_sqnr(plain: Pipeline, pipe: Pipeline, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """`expert/layer` -> dB: what a quantized layer makes of the rows, against x W^T of the floats.

    In the precision that the schedule has for most steps. The bias is in neither.
    """
    found = {}
    floats = nn.ModuleDict(plain.experts)
    for name, module in nn.ModuleDict(pipe.experts).named_modules():
        if not isinstance(module, QuantLinear) or (x := inputs.get(first_in_group(name))) is None:
            continue
        weight: Any = floats.get_submodule(name).weight
        y = module(x.to(module.device), pipe.policy.default.precision).float().cpu()
        bias = 0 if module.bias is None else module.bias.cpu()
        found[name.replace(".", "/", 1)] = output_sqnr(y - bias, x.float() @ weight.float().cpu().t())
    return found


def bits_per_weight(pipe: Pipeline) -> float:
    """Of the linears of the blocks, scales included, biases left out."""
    size = count = 0
    for name, module in nn.ModuleDict(pipe.experts).named_modules():
        if not isinstance(module, nn.Linear) or not is_block_linear(name.partition(".")[2]):
            continue
        count += module.in_features * module.out_features
        size += sum(t.nbytes for role, t in module.state_dict().items() if role in STORED)
    return 8 * size / max(count, 1)
