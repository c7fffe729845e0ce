"""Calibration: run the float model over prompts and record each layer's input: max|x| per channel, some rows.

    ascendit.quantize("demo", "demo-fp4", scheme="mxfp4_dualscale", calibrate=Calibrator(prompts=4))

Prompts are a text file with one on each line, or some of the demo model's own; a line may begin with the
first frame and a tab, for models that start from an image. The model is not changed: its state
notes what the layers are given. Layers that share an input (Q, K and V) are known by their first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ascendit.checkpoint.hub import DEMO
from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.output_folder import Journal
from ascendit.convert.calibration import ALPHA, STATISTICS, ExpertStatistics, Statistics, check_alpha
from ascendit.device.device import parse_device
from ascendit.errors import UsageError
from ascendit.model.linear import LinearInput
from ascendit.model.state import DenoiseState
from ascendit.model.wan import WanTransformer
from ascendit.names import is_block_linear
from ascendit.pipeline.defaults import Defaults, defaults_for
from ascendit.pipeline.generate import Pipeline, denoise
from ascendit.pipeline.job import load
from ascendit.pipeline.request import GenerateRequest, open_image, resolve
from ascendit.progress import OnProgress, Progress
from ascendit.quant.fusion import first_in_group
from ascendit.weights.lora.fold import Folds, LoraSource

Prompt = tuple[str, Path | None]
"""The text, and the first frame."""
PARTS = ("weight_amax", "amax", "keys", "rows")
"""Tensors of an `Input`."""


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
        shown = self.prompts
        if not isinstance(shown, int):
            shown = Path(shown).name if isinstance(shown, str | Path) else "-"
        return [
            ("--calibrate", str(shown)),
            ("--alpha", f"{self.alpha:g}"),
            ("--device", None if self.device == "cpu" else self.device),
            ("--set", [f"{name}={value}" for name, value in self.fields.items()]),
        ]

    def record(self, layout: Layout) -> dict[str, Any]:
        """What would be run. Raises UsageError and CheckpointError before a weight is read."""
        check_alpha(self.alpha)
        device = parse_device(self.device)
        requests = self.requests(layout)
        content: list[list[str | None]] = []
        for request in requests:
            content.append([request.prompt, None])
            if request.image is not None:
                open_image(request.image)
                content[-1][1] = hashlib.sha256(Path(request.image).read_bytes()).hexdigest()
        first = requests[0]
        guidance = (first.guidance_scale, first.guidance_scale_2)
        made = {
            "alpha": self.alpha,
            "prompts": len(requests),
            "prompts_sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "steps": first.num_inference_steps,
            "size": f"{first.width}x{first.height}",
            "frames": first.num_frames,
            "guidance": [g for g in guidance if g is not None],
            "device": str(device),
        }
        return made | ({"settings": dict(self.fields)} if self.fields else {})

    def requests(self, layout: Layout) -> list[GenerateRequest]:
        """One for each prompt, with the model's own steps, size and guidance, and its number as its seed.

        CheckpointError E-CKP-01: transformers alone cannot be run. UsageError E-REQ-04 for a missing image or
        one too many; others as `read_prompts`.
        """
        layout.require_pipeline()
        defaults = defaults_for(layout)
        made = []
        for i, (prompt, image) in enumerate(read_prompts(self.prompts, defaults)):
            if defaults.task == "i2v" and image is None:
                raise UsageError(
                    f"prompt {i + 1} has no image, and {defaults.model} starts from one",
                    needs="lines of the form FILE<tab>PROMPT, FILE being the first frame",
                    fix="put the image and a tab before the prompt",
                    code="E-REQ-04",
                )
            path = None if image is None else str(image)
            made.append(resolve(defaults, prompt, image=path, **{"seed": i} | dict(self.fields)))
        return made

    def __call__(
        self, layout: Layout, loras: Sequence[LoraSource], rows: int, journal: Journal
    ) -> ExpertStatistics:
        """Run all prompts, or those that a killed run has left; keep `rows` tokens of each input."""
        requests = self.requests(layout)
        file = journal.root / STATISTICS
        done, inputs = _read(file, rows) if journal.complete(file) else (0, {})
        if done < len(requests):
            pipe = load(layout.root, device=self.device, on_progress=self.on_progress)
            fold_loras(pipe.experts, loras)
            inputs = inputs_of(pipe, rows) | inputs
            for i in range(done, len(requests)):
                image = None if requests[i].image is None else open_image(requests[i].image)
                generator = torch.Generator().manual_seed(i)
                report = partial(self._report, i, len(requests))
                denoise(watched(pipe, inputs, generator), requests[i], image, report, None)
                _write(file, i + 1, inputs)
                journal.add(file, file.stat().st_size)
        found: dict[str, dict[str, Statistics]] = {}
        for key, seen in inputs.items():
            name, _, leader = key.partition(".")
            if len(seen.amax):
                found.setdefault(name, {})[leader] = seen.statistics()
        return found

    def _report(self, prompt: int, prompts: int, event: Progress) -> None:
        """The steps of all prompts as one run."""
        if self.on_progress is not None and event.stage == "denoise":
            step = prompt * event.total + event.step
            self.on_progress(replace(event, step=step, total=prompts * event.total))


@torch.no_grad()
def fold_loras(experts: Mapping[str, WanTransformer], loras: Sequence[LoraSource]) -> None:
    """Fold LoRA files into the parameters as `quantize` does: the layers see what they will see then."""
    for expert, model in experts.items():
        parameters = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        folds = Folds.open(loras, expert, shapes, experts=list(experts))
        for name in sorted(folds.names):
            parameters[name].copy_(folds.fold(name, parameters[name].cpu(), 0))


# ---- inputs of the layers -----------------------------------------------------------------------


@dataclass(eq=False)
class Input:
    """What is known of one input: the largest |x| of each channel, and tokens that were drawn evenly.

    Each token draws a number; those with the smallest numbers stay. So any count of calls, of any length,
    gives an even sample, and memory stays at `limit` tokens.
    """

    weight_amax: Tensor
    limit: int
    amax: Tensor = torch.empty(0)
    """float32 [K]; empty while nothing is seen."""
    keys: Tensor = torch.empty(0)
    rows: Tensor = torch.empty(0)

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Hidden states [.., K] on any device."""
        x = x.detach().reshape(-1, x.shape[-1])
        top = torch.maximum(x.amax(0), -x.amin(0)).to(torch.float32)  # without a copy of x, as x.abs() is
        self.amax = torch.maximum(self.amax.to(top.device), top) if len(self.amax) else top
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
        return Statistics(self.amax.cpu(), self.weight_amax, self.rows.view(-1, len(self.weight_amax)))


def watched(pipe: Pipeline, inputs: Mapping[str, Input], generator: torch.Generator) -> Pipeline:
    """The same pipeline, which notes what layers are given: `transformer.blocks.0.attn1.to_q` in `inputs`."""
    experts = nn.ModuleDict(pipe.experts)
    layers = {id(experts.get_submodule(name)): seen for name, seen in inputs.items()}

    class Watched(DenoiseState):
        def linear(self, layer: Any, x: Tensor | LinearInput) -> Tensor:
            if (seen := layers.get(id(layer))) is not None:
                seen.add(x.x if isinstance(x, LinearInput) else x, generator)
            return super().linear(layer, x)

    return replace(pipe, make_state=Watched)


def inputs_of(pipe: Pipeline, limit: int) -> dict[str, Input]:
    """The inputs of the linears of the blocks, each by its first reader, `expert.layer`; nothing is seen."""
    weights: dict[str, Tensor] = {}
    for name, module in nn.ModuleDict(pipe.experts).named_modules():
        if isinstance(module, nn.Linear) and is_block_linear(name.partition(".")[2]):
            leader, top = first_in_group(name), module.weight.detach().abs().amax(0).float().cpu()
            weights[leader] = torch.maximum(weights.get(leader, top), top)
    return {leader: Input(top, limit) for leader, top in weights.items()}


# ---- between two runs ---------------------------------------------------------------------------


def _write(file: Path, done: int, inputs: Mapping[str, Input]) -> None:
    """Replace `file` in one step."""
    named = {f"{key}:{part}": getattr(seen, part) for key, seen in inputs.items() for part in PARTS}
    new = file.with_name(f"{file.name}.new")
    save_file({k: t.cpu().contiguous() for k, t in named.items()}, new, metadata={"prompts": str(done)})
    os.replace(new, file)


def _read(file: Path, limit: int) -> tuple[int, dict[str, Input]]:
    """(how many prompts are done, what they gave)."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as f:
        for name in f.keys():
            key, _, part = name.rpartition(":")
            parts.setdefault(key, {})[part] = f.get_tensor(name)
        return int(f.metadata()["prompts"]), {key: Input(limit=limit, **of) for key, of in parts.items()}


# ---- prompts ------------------------------------------------------------------------------------


def read_prompts(given: str | Path | int | Sequence[str], defaults: Defaults) -> list[Prompt]:
    """Prompts and their first frames. `given`: a file, `demo`, a number of the demo model's, or the prompts.

    UsageError E-USE-01: no prompts in it, or the demo's for another model; E-USE-02: no such file or image.
    """
    text = str(given) if isinstance(given, str | Path | int) else ""
    if text == "demo" or text.lstrip("-").isdecimal():  # of its training set: neighbours differ in everything
        if defaults.spec is None or defaults.spec.name != "ascendit-demo":
            _refuse(f"prompts of the demo model for {defaults.model}")
        lines = (DEMO.parent / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
        count = 8 if text == "demo" else int(text)
        if not 1 <= count <= len(lines):
            _refuse(f"{count} prompts of the demo model, which has {len(lines)}")
        return [(line, None) for line in lines[:count]]
    if isinstance(given, str | Path):
        return _from_file(Path(given).expanduser())
    assert not isinstance(given, int)
    return [(line, None) for line in given] or _refuse("no prompts")


def _from_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path, "the prompts to calibrate with") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        _refuse(f"prompts in {path}: {reason}")
    prompts: list[Prompt] = []
    for line in filter(str.strip, lines):
        head, tab, tail = line.partition("\t")
        image = path.parent / Path(head.strip()).expanduser() if tab else None
        if image is not None and not image.is_file():
            raise _absent(image, "the first frame of a prompt")
        prompts.append(((tail if tab else head).strip(), image))
    return prompts or _refuse(f"no prompts in {path}")


def _refuse(got: str) -> NoReturn:
    raise UsageError(
        got,
        needs="a text file with one prompt on each line, or a number for the demo model's own",
        fix="--calibrate prompts.txt with prompts like those it will be used for; --calibrate 8 for the demo",
    )


def _absent(path: Path, what: str) -> UsageError:
    return UsageError(f"no file {path}", needs=what, fix="correct the path", code="E-USE-02")
