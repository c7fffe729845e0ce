"""Run the float model over some prompts and see what each layer is given: max|x| per channel, some tokens.

    ascendit.quantize("demo", "demo-fp4", scheme="mxfp4_dualscale", calibrate=Calibrator(prompts=4))

The model is not changed. Its operators are: `linear` notes its input and does what it did. Weights are known
by identity, those that share an input (Q, K and V) by their first.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.names import is_block_linear
from ascendit.convert.calibration import ALPHA, Found, Save, Statistics, check_alpha
from ascendit.convert.lora import Folds, LoraSource
from ascendit.device.backends import parse_device
from ascendit.model.wan import WanTransformer
from ascendit.pipeline.calibration_prompts import defaults_of, digest, read_prompts, requests_for
from ascendit.pipeline.condition import open_image
from ascendit.pipeline.generate import Pipeline, denoise
from ascendit.pipeline.loading import load
from ascendit.pipeline.progress import OnProgress, Progress
from ascendit.pipeline.request import GenerateRequest
from ascendit.quant.fusion import leader_of


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """What `quantize(calibrate=)` takes."""

    prompts: str | Path | int | Sequence[str]
    """A file with one prompt on each line, the prompts, or how many of the demo model's own."""
    alpha: float = ALPHA
    device: str = "cpu"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of GenerateRequest that are not the model's defaults: `num_inference_steps`, `height`, .."""
    on_progress: OnProgress | None = None

    @property
    def flags(self) -> list[tuple[str, object]]:
        """For the command line in the model card; a file by its name alone."""
        given = self.prompts
        shown = (
            given if isinstance(given, int) else Path(given).name if isinstance(given, str | Path) else "-"
        )
        device = None if self.device == "cpu" else self.device
        settings = [f"{name}={value}" for name, value in self.fields.items()]
        words: list[tuple[str, object]] = [("--calibrate", str(shown)), ("--alpha", f"{self.alpha:g}")]
        return [*words, ("--device", device), ("--set", settings)]

    def record(self, layout: Layout) -> dict[str, Any]:
        """What would be run. Raises UsageError and CheckpointError before a weight is read."""
        check_alpha(self.alpha)
        device = parse_device(self.device)
        defaults = defaults_of(layout)
        prompts = read_prompts(self.prompts, defaults)
        sha256 = digest(prompts)
        request = requests_for(prompts, defaults, dict(self.fields))[0]
        for prompt in prompts:
            if prompt.image is not None:
                open_image(prompt.image)
        guidance = [request.guidance_scale, request.guidance_scale_2]
        told = {
            "alpha": self.alpha,
            "prompts": len(prompts),
            "prompts_sha256": sha256,
            "steps": request.num_inference_steps,
            "size": f"{request.width}x{request.height}",
            "frames": request.num_frames,
            "guidance": [g for g in guidance if g is not None],
            "device": str(device),
        }
        return told | ({"settings": dict(self.fields)} if self.fields else {})

    def __call__(self, layout: Layout, loras: Sequence[LoraSource], rows: int, save: Save) -> Found:
        """Run all prompts, or those that a killed run has left; keep `rows` tokens of each input."""
        defaults = defaults_of(layout)
        requests = requests_for(read_prompts(self.prompts, defaults), defaults, dict(self.fields))
        done, inputs = _read(save.file, rows) if save.resume else (0, {})
        if done < len(requests):
            pipe = load(layout.root, device=self.device, on_progress=self.on_progress)
            experts = experts_of(pipe)
            for name, expert in experts.items():
                fold_loras(expert, loras, name, list(experts))
                for leader, seen in inputs_of(expert, rows).items():
                    inputs.setdefault(f"{name}/{leader}", seen)
            for i in range(done, len(requests)):
                self._run(pipe, experts, inputs, requests, i)
                _write(save.file, i + 1, inputs)
                save.saved()
        found: dict[str, dict[str, Statistics]] = {}
        for key, seen in inputs.items():
            name, _, leader = key.partition("/")
            if seen.amax is not None:
                found.setdefault(name, {})[leader] = seen.statistics()
        return found

    def _run(
        self,
        pipe: Pipeline,
        experts: Mapping[str, WanTransformer],
        inputs: Mapping[str, Input],
        requests: Sequence[GenerateRequest],
        i: int,
    ) -> None:
        """One prompt, through all steps and both branches."""
        request, steps = requests[i], requests[i].num_inference_steps
        generator = torch.Generator().manual_seed(i)

        def report(event: Progress) -> None:
            if self.on_progress is not None and event.stage == "denoise":
                step, total = i * steps + event.step, len(requests) * steps
                self.on_progress(dataclasses.replace(event, step=step, total=total))

        with ExitStack() as stack:
            for name, expert in experts.items():
                mine = {k.partition("/")[2]: v for k, v in inputs.items() if k.startswith(f"{name}/")}
                stack.enter_context(recorded(expert, mine, generator))
            image = None if request.image is None else open_image(request.image)
            denoise(pipe, request, image, report, None)


class Input:
    """What is known of one input: the largest |x| of each channel, and tokens that were drawn evenly.

    Each token draws a number; those with the smallest numbers stay. So any count of calls, of any length,
    gives an even sample, and memory stays at `limit` tokens.
    """

    def __init__(self, weight_amax: Tensor, limit: int) -> None:
        self.weight_amax, self.limit = weight_amax, limit
        self.amax: Tensor | None = None
        self.keys = torch.empty(0)
        self.rows = torch.empty(0, len(weight_amax))

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Tokens [.., K] on any device."""
        x = x.detach().reshape(-1, x.shape[-1])
        top = torch.maximum(x.amax(0), -x.amin(0)).to(torch.float32)  # without a copy of x, as x.abs() is
        self.amax = top if self.amax is None else torch.maximum(self.amax, top.to(self.amax.device))
        if not self.limit:
            return
        keys = torch.rand(len(x), generator=generator)
        if len(self.keys) == self.limit:
            taken = (keys < self.keys[-1]).nonzero().squeeze(1)
        else:
            taken = torch.arange(len(x))
        keys = torch.cat((self.keys, keys[taken]))
        rows = x[taken.to(x.device)].cpu()
        rows = torch.cat((self.rows.to(rows.dtype), rows))
        order = keys.argsort()[: self.limit]
        self.keys, self.rows = keys[order], rows[order]

    def statistics(self) -> Statistics:
        """On the CPU."""
        assert self.amax is not None
        return Statistics(self.amax.cpu(), self.weight_amax, self.rows)


@contextmanager
def recorded(
    expert: WanTransformer, inputs: Mapping[str, Input], generator: torch.Generator
) -> Iterator[None]:
    """Inside, the inputs of the layers in `inputs` (`blocks.0.attn1.to_q`) are seen."""
    plain = expert.ops
    seen = {id(expert.get_submodule(name).weight): value for name, value in inputs.items()}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if (found := seen.get(id(weight))) is not None:
            found.add(x, generator)
        return plain.linear(x, weight, bias)

    expert.ops = dataclasses.replace(plain, linear=linear)
    try:
        yield
    finally:
        expert.ops = plain


def inputs_of(expert: WanTransformer, limit: int) -> dict[str, Input]:
    """Every input of the linears of the blocks, by the first layer that reads it. Nothing is seen yet."""
    weights: dict[str, Tensor] = {}
    for name, module in expert.named_modules():
        if isinstance(module, nn.Linear) and is_block_linear(name):
            top = module.weight.detach().abs().amax(0).to(torch.float32).cpu()
            leader = leader_of(name)
            weights[leader] = torch.maximum(weights[leader], top) if leader in weights else top
    return {leader: Input(top, limit) for leader, top in weights.items()}


def experts_of(pipe: Pipeline) -> dict[str, WanTransformer]:
    """Name -> transformer."""
    both = (pipe.transformer, pipe.transformer_2)
    return {part.name: e for part, e in zip(pipe.layout.experts, both, strict=False) if e is not None}


@torch.no_grad()
def fold_loras(
    expert: WanTransformer, loras: Sequence[LoraSource], name: str, experts: Sequence[str]
) -> None:
    """Fold LoRA files into the parameters as `quantize` does: the layers see what they will see then."""
    parameters = dict(expert.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    folds = Folds.open(loras, name, shapes, experts=experts)
    for n in sorted(folds.names):
        parameters[n].copy_(folds.fold(n, parameters[n].cpu(), 0))


# ---- between two runs ---------------------------------------------------------------------------


def _write(file: Path, done: int, inputs: Mapping[str, Input]) -> None:
    """Replace `file` in one step."""
    tensors: dict[str, Tensor] = {}
    for key, seen in inputs.items():
        parts = {"amax": seen.amax, "weight_amax": seen.weight_amax, "keys": seen.keys, "rows": seen.rows}
        tensors |= {f"{key}:{part}": t.cpu().contiguous() for part, t in parts.items() if t is not None}
    new = file.with_name(f"{file.name}.new")
    save_file(tensors, new, metadata={"prompts": str(done)})
    os.replace(new, file)


def _read(file: Path, limit: int) -> tuple[int, dict[str, Input]]:
    """(how many prompts are done, what they gave)."""
    inputs: dict[str, Input] = {}
    with safe_open(file, framework="pt") as f:
        names = list(f.keys())
        for key in dict.fromkeys(name.rpartition(":")[0] for name in names):
            seen = inputs[key] = Input(f.get_tensor(f"{key}:weight_amax"), limit)
            seen.keys, seen.rows = f.get_tensor(f"{key}:keys"), f.get_tensor(f"{key}:rows")
            seen.amax = f.get_tensor(f"{key}:amax") if f"{key}:amax" in names else None
        return int(f.metadata()["prompts"]), inputs
