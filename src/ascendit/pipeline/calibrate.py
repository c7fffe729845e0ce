"""Calibration: run the float model over prompts and record each layer's input: max|x| per channel, some rows.

    ascendit.quantize("demo", "demo-fp4", scheme="mxfp4_dualscale", calibrate=Calibrator(prompts=4))

Prompts are a text file with one on each line, or some of the demo model's own; a line may begin with the
first frame and a tab, for models that start from an image. The model is not changed. Its operators are:
`linear` notes its input and does what it did. Weights are known by identity, those that share an input (Q, K
and V) by their first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ascendit.checkpoint.hub import DEMO
from ascendit.checkpoint.layout import Layout
from ascendit.convert.calibration import ALPHA, ExpertStatistics, Save, Statistics, check_alpha
from ascendit.device.device import parse_device
from ascendit.errors import UsageError
from ascendit.model.wan import WanTransformer
from ascendit.names import is_block_linear
from ascendit.pipeline.defaults import Defaults, defaults_for
from ascendit.pipeline.generate import Pipeline, denoise
from ascendit.pipeline.job import load
from ascendit.pipeline.request import GenerateRequest, open_image, resolve
from ascendit.progress import OnProgress, Progress
from ascendit.quant.fusion import leader_of
from ascendit.weights.lora.fold import Folds, LoraSource

DEMO_PROMPTS = 8
"""As many for `demo`."""


# ---- the run ------------------------------------------------------------------------------------


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

    def __call__(
        self, layout: Layout, loras: Sequence[LoraSource], rows: int, save: Save
    ) -> ExpertStatistics:
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


# ---- inputs of the layers -----------------------------------------------------------------------


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


# ---- prompts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What to run."""

    text: str
    image: Path | None = None
    """The first frame."""


def read_prompts(given: str | Path | int | Sequence[str], defaults: Defaults) -> list[Prompt]:
    """`given`: a file, `demo`, a number of the demo model's prompts, or the prompts themselves.

    UsageError E-USE-01: no prompts in it, or the demo's for another model; E-USE-02: no such file.
    """
    text = str(given) if isinstance(given, str | Path | int) else ""
    if isinstance(given, str | Path | int) and (text == "demo" or text.lstrip("-").isdecimal()):
        return _of_the_demo(DEMO_PROMPTS if text == "demo" else int(text), defaults)
    if isinstance(given, str | Path):
        return _from_file(Path(given).expanduser())
    assert not isinstance(given, int)
    return [Prompt(line) for line in given] or _refuse("no prompts")


def requests_for(
    prompts: Iterable[Prompt], defaults: Defaults, fields: dict[str, Any]
) -> list[GenerateRequest]:
    """One request for each, with the model's own steps, size and guidance, and its number as its seed.

    `fields`: of GenerateRequest, over the defaults. UsageError E-REQ-04 for a missing image or one too many.
    """
    made = []
    for i, prompt in enumerate(prompts):
        if defaults.task == "i2v" and prompt.image is None:
            raise UsageError(
                f"prompt {i + 1} has no image, and {defaults.model} starts from one",
                needs="lines of the form FILE<tab>PROMPT, FILE being the first frame",
                fix="put the image and a tab before the prompt",
                code="E-REQ-04",
            )
        image = None if prompt.image is None else str(prompt.image)
        made.append(resolve(defaults, prompt.text, image=image, **{"seed": i} | fields))
    return made


def digest(prompts: Iterable[Prompt]) -> str:
    """sha256 of all texts and images, in their order. UsageError E-USE-02 for an image that is not there."""
    what = []
    for prompt in prompts:
        if prompt.image is not None and not prompt.image.is_file():
            raise _absent(prompt.image, "the first frame of a prompt")
        image = prompt.image and hashlib.sha256(prompt.image.read_bytes()).hexdigest()
        what.append([prompt.text, image])
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def defaults_of(layout: Layout) -> Defaults:
    """Of a whole pipeline. CheckpointError E-CKP-01: transformers alone cannot be run."""
    layout.require_pipeline()
    return defaults_for(layout)


def _of_the_demo(count: int, defaults: Defaults) -> list[Prompt]:
    """Prompts of its training set: neighbours in the file differ in everything."""
    if defaults.spec is None or defaults.spec.name != "ascendit-demo":
        _refuse(f"prompts of the demo model for {defaults.model}")
    lines = (DEMO.parent / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
    if not 1 <= count <= len(lines):
        _refuse(f"{count} prompts of the demo model, which has {len(lines)}")
    return [Prompt(line) for line in lines[:count]]


def _from_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path, "the prompts to calibrate with") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        _refuse(f"prompts in {path}: {reason}")
    found = []
    for line in lines:
        head, tab, tail = line.partition("\t")
        if line.strip():
            image = path.parent / Path(head.strip()).expanduser() if tab else None
            found.append(Prompt((tail if tab else head).strip(), image))
    return found or _refuse(f"no prompts in {path}")


def _refuse(got: str) -> NoReturn:
    raise UsageError(
        got,
        needs="a text file with one prompt on each line, or a number for the demo model's own",
        fix="--calibrate prompts.txt with prompts like those it will be used for; --calibrate 8 for the demo",
        code="E-USE-01",
    )


def _absent(path: Path, what: str) -> UsageError:
    return UsageError(f"no file {path}", needs=what, fix="correct the path", code="E-USE-02")
