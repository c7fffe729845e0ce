"""What quantization costs: every scheme and recipe against BF16, same prompts, same seeds, no neural judge.

    quality = measure_quality("demo", default_cases(), pick(192), [0], jobs=2)
    print(quality.table())

For each case: the signal to noise of every layer's output on rows of a BF16 run; how far the latents are
after each step; PSNR and SSIM of the frames; and which videos still show what was asked (`adherence.judge`).
The pipeline is the one that `ascendit.load` gives; it is watched from outside.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ascendit.demo.adherence import judge
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError
from ascendit.model.linear import QuantLinear, Tokens
from ascendit.names import is_block_linear
from ascendit.ops.open_device import activate
from ascendit.pipeline.calibrate import experts_of, inputs_of, recorded
from ascendit.pipeline.frame_checks import Frames, to_uint8
from ascendit.pipeline.generate import Pipeline, Stop, denoise
from ascendit.pipeline.load import load
from ascendit.pipeline.request import GenerateRequest
from ascendit.quant.fusion import leader_of
from ascendit.quant.recipe import recipe_names
from ascendit.quant.schemes import QUANTIZED
from ascendit.verify.metrics import cosine, output_sqnr, psnr, relative_l2, ssim
from ascendit.verify.quality_table import Quality, QualityRow

LAYER_TOKENS = 512
"""How many tokens of each input a layer is measured on."""

T = TypeVar("T")
OnVideo = Callable[[str, bool], None]
"""Called with the case and whether its video is right; by any thread, one at a time."""
OnRow = Callable[[Quality], None]
"""Called with all rows so far whenever one is done."""


# ---- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QualityCase:
    """One way to quantize. `options` are what `ascendit.load` takes besides model and device."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    most_lost: int | None = None
    """How many of 192 videos it may get wrong that BF16 gets right."""


BASE = QualityCase(name="bf16")
_LIMITS = {"int8": 2, "mxfp8": 2, "recommended-fp4": 6}
_POLICIES = ("default:w4a8", "0-3:w4a8,default:w4a4")


def default_cases() -> tuple[QualityCase, ...]:
    """Every scheme, MXFP4 by step policies, and every recipe that is shipped."""
    found = [QualityCase(name=s, options={"scheme": s}, most_lost=_LIMITS.get(s)) for s in QUANTIZED]
    found += [
        QualityCase(name=f"mxfp4, {p}", options={"scheme": "mxfp4", "step_policy": p}) for p in _POLICIES
    ]
    recipes = [name for name in recipe_names() if name != "default"]
    found += [QualityCase(name=r, options={"recipe": r}, most_lost=_LIMITS.get(r)) for r in recipes]
    return tuple(found)


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
    with Crew(jobs) as crew:
        for case in (BASE, *chosen):
            pipes = [
                load(model, device=device, dtype="bfloat16", **case.options)  # type: ignore[arg-type]
                for _ in range(crew.jobs)
            ]
            requests = [pipes[0].request(scene.prompt(), seed=seed, **fields) for scene, seed in asked]
            if case is BASE:
                plain, inputs = check_float(pipes[0], model), layer_inputs(pipes[0], requests[0], cancel)
            mark = fingerprint(pipes[0])
            if mark not in known:
                made = make_videos(crew, pipes, requests, asked, case, cancel, on_video)
                base = base or made
                known[mark] = compare_traces(
                    made, base, bits_per_weight(pipes[0]), layer_sqnr(plain, pipes[0], inputs)
                )
            rows.append(
                replace(known[mark], name=case.name, options=dict(case.options), most_lost=case.most_lost)
            )
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


class Crew:
    """Threads that work side by side, each on its share of the processors. One is the caller's own."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self) -> Crew:
        self._threads = torch.get_num_threads()
        share = max(1, self._threads // self.jobs)
        self._pool = ThreadPoolExecutor(self.jobs, initializer=lambda: torch.set_num_threads(share))
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def run(self, work: Callable[[int, int], T], count: int) -> list[T]:
        """`work(member, i)` for all i, each by the member i % jobs; in their order."""

        def share(member: int) -> list[T]:
            return [work(member, i) for i in range(member, count, self.jobs)]

        parts = [share(0)] if self.jobs == 1 else list(self._pool.map(share, range(self.jobs)))
        return [parts[i % self.jobs][i // self.jobs] for i in range(count)]


def make_videos(
    crew: Crew,
    pipes: Sequence[Pipeline],
    requests: Sequence[GenerateRequest],
    asked: Sequence[tuple[Scene, int]],
    case: QualityCase,
    cancel: Stop | None,
    tell: OnVideo | None,
) -> list[Trace]:
    """One for each request; each member of the crew has a pipeline of its own."""
    lock = threading.Lock()

    def make(member: int, i: int) -> Trace:
        made = trace(pipes[member], requests[i], cancel)
        right = all(judge(made.frames).right(asked[i][0]).values())
        with lock:
            if tell:
                tell(case.name, right)
        return replace(made, right=right)

    return crew.run(make, len(requests))


def fingerprint(pipe: Pipeline) -> bytes:
    """The same for pipelines that make the same videos: of every weight, and of the steps' precisions."""
    found = hashlib.sha256(str(pipe.policy).encode())
    for expert in pipe.experts:
        for name, tensor in expert.state_dict().items():
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
        name="",
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
    if any(isinstance(m, QuantLinear) for expert in pipe.experts for m in expert.modules()):
        raise UsageError(
            f"{model} is quantized",
            needs="the float model: each case is quantized while it loads, and held against BF16",
            fix="give the folder that it was quantized from",
        )
    return pipe


# ---- one video ----------------------------------------------------------------------------------


def trace(pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None) -> Trace:
    """Make a video and keep the latents of its steps. One that is not finite ends in zeros."""
    with watched(pipe) as seen:
        try:
            activate(pipe.device)
            last = denoise(pipe, request, None, lambda event: None, cancel)
            frames = to_uint8(pipe.vae.decode(last)[0])
        except QualityError:
            frames = np.zeros((request.num_frames, request.height, request.width, 3), np.uint8)
            last = torch.zeros(pipe.vae.latent_shape(request.num_frames, request.height, request.width))
    # the first is the noise: what follows is what a step has left
    steps = [torch.nan_to_num(x[0].float(), 0, 0, 0) for x in (*list(seen.values())[1:], last.cpu())]
    steps += steps[-1:] * (request.num_inference_steps - len(steps))
    return Trace(torch.stack(steps), frames)


@contextmanager
def watched(pipe: Pipeline) -> Iterator[dict[Any, Tensor]]:
    """Inside, timestep -> the latents that an expert was given for it, on the CPU."""
    seen: dict[Any, Tensor] = {}

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given[1] not in seen:
            seen[given[1]] = given[0].detach().cpu().clone()

    handles = [expert.register_forward_pre_hook(note) for expert in pipe.experts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- the layers ---------------------------------------------------------------------------------


def layer_inputs(
    pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None
) -> dict[str, dict[str, Tensor]]:
    """Expert -> first of the layers that share an input -> some of its tokens [n, K], over all steps."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: inputs_of(expert, LAYER_TOKENS) for name, expert in experts_of(pipe).items()}
    with ExitStack() as stack:
        for name, expert in experts_of(pipe).items():
            stack.enter_context(recorded(expert, inputs[name], generator))
        denoise(pipe, request, None, lambda event: None, cancel)
    return {name: {layer: seen.rows for layer, seen in found.items()} for name, found in inputs.items()}


@torch.inference_mode()
def layer_sqnr(
    plain: Pipeline, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """`expert/layer` -> dB: what a layer on codes makes of the tokens, against x W^T of the floats.

    In the precision that the step policy has for most steps. The bias is in neither.
    """
    found = {}
    floats = experts_of(plain)
    for name, expert in experts_of(pipe).items():
        for layer, module in expert.named_modules():
            if not isinstance(module, QuantLinear) or leader_of(layer) not in inputs[name]:
                continue
            x = inputs[name][leader_of(layer)]
            weight: Any = floats[name].get_submodule(layer).weight
            y = module.run(Tokens(x.to(module.device)), pipe.policy.default).float().cpu()
            bias = 0 if module.bias is None else module.bias.cpu()
            found[f"{name}/{layer}"] = output_sqnr(y - bias, x.float() @ weight.float().cpu().t())
    return found


def bits_per_weight(pipe: Pipeline) -> float:
    """Of the linears of the blocks, scales included, biases left out."""
    size = count = 0
    for expert in pipe.experts:
        for layer, module in expert.named_modules():
            if not isinstance(module, nn.Linear) or not is_block_linear(layer):
                continue
            count += module.in_features * module.out_features
            if isinstance(module, QuantLinear):
                e = module.joint.encoded(module.member)
                parts = [t for t in (e.codes, e.scale, e.dual_scale) if t is not None]
                size += sum(t.nbytes for t in parts)
            else:
                size += module.weight.nbytes
    return 8 * size / max(count, 1)
