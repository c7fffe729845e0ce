"""Calibration: run the float model on prompts; record max |x| per channel and sample rows of layer inputs.

    ascendit.quantize("demo", "demo-fp4", scheme="mxfp4_dualscale", calibrate=Calibrator(prompts=4))

Prompts come from a text file, one per line, or from the demo model's own list. For image-to-video models a
line starts with the path of the first frame and a tab. The model is unchanged: a DenoiseState subclass
records the inputs. Layers that share an input (Q, K and V) are recorded once, under the first one.
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
from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.layout import Layout
from ascendit.convert.calibration import ALPHA, STATISTICS, ExpertStatistics, Statistics, check_alpha
from ascendit.device.device import parse_device
from ascendit.errors import UsageError
from ascendit.model.linear import LinearInput
from ascendit.model.state import DenoiseState
from ascendit.names import is_block_linear
from ascendit.pipeline.defaults import Defaults
from ascendit.pipeline.generate import Pipeline, denoise
from ascendit.pipeline.images import FIELDS, fitted_pictures, pictures_of, size_source
from ascendit.pipeline.job import load
from ascendit.pipeline.model_check import require_model
from ascendit.pipeline.request import GenerateRequest, resolve
from ascendit.progress import OnProgress, Progress
from ascendit.quant.fusion import first_in_group
from ascendit.weights.lora.fold import LoraSource

Prompt = tuple[str, dict[str, str]]
"""(text, field of a request -> path of an image)."""
PARTS = ("weight_amax", "amax", "keys", "rows")
"""Tensors of an `Input`."""


# ---- the run ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Runs the float model for `quantize(calibrate=)`."""

    prompts: str | Path | int | Sequence[str]
    """A file with one prompt per line, the prompts themselves, or a number of the demo model's prompts."""
    alpha: float = ALPHA
    device: str = "cpu"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """GenerateRequest fields that override the model's defaults: `num_inference_steps`, `height`, ..."""
    on_progress: OnProgress | None = None

    @property
    def options(self) -> dict[str, object]:
        """Options for the command line in the model card; a file without its folder."""
        shown = self.prompts
        if not isinstance(shown, int):
            shown = Path(shown).name if isinstance(shown, str | Path) else "-"
        return {
            "calibrate": str(shown),
            "alpha": f"{self.alpha:g}",
            "device": None if self.device == "cpu" else self.device,
            "set": [f"{name}={value}" for name, value in self.fields.items()],
        }

    def record(self, layout: Layout) -> dict[str, Any]:
        """The settings of the run, for `ascendit.json`.

        Raises the errors of `requests`, before any weight is read.
        """
        check_alpha(self.alpha)
        device = parse_device(self.device)
        requests = self.requests(layout)
        content: list[list[str | None]] = []
        for request in requests:
            files = [name for name in (request.image, request.last_image) if name is not None]
            pictures_of(request, {})
            hashes: list[str | None] = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files]
            content.append([request.prompt, *(hashes or [None])])
        first = requests[0]
        guidance = (first.guidance_scale, first.guidance_scale_2)
        record = {
            "alpha": self.alpha,
            "prompts": len(requests),
            "prompts_sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "steps": first.num_inference_steps,
            "size": f"{first.width}x{first.height}",
            "frames": first.num_frames,
            "guidance": [g for g in guidance if g is not None],
            "device": str(device),
        }
        return record | ({"settings": dict(self.fields)} if self.fields else {})

    def requests(self, layout: Layout) -> list[GenerateRequest]:
        """One request per prompt, with the model's defaults; the seed is the number of the prompt.

        Raises UsageError (E-REQ-04) for a missing or unexpected image, and the errors of `require_model` and
        `read_prompts`.
        """
        defaults = require_model(layout)[1]
        requests = []
        for i, (prompt, images) in enumerate(read_prompts(self.prompts, defaults)):
            if defaults.task == "i2v" and not images:
                raise UsageError(
                    f"prompt {i + 1} has no image, and {defaults.model} starts from one",
                    needs="lines FILE<tab>PROMPT, where FILE is the first frame",
                    fix="start the line with the image path and a tab",
                    code="E-REQ-04",
                )
            fields: dict[str, Any] = {**images, "seed": i, **self.fields}
            requests.append(resolve(defaults, prompt, picture=size_source(defaults, fields, {}), **fields))
        return requests

    def __call__(
        self,
        layout: Layout,
        loras: Sequence[LoraSource],
        rows: int,
        journal: Journal,
        *,
        lora_skip: Sequence[str] = (),
    ) -> ExpertStatistics:
        """Run the prompts that `journal` has no results for, and sample `rows` rows of each input."""
        requests = self.requests(layout)
        file = journal.root / STATISTICS
        done, inputs = _read(file, rows) if journal.complete(file) else (0, {})
        if done < len(requests):
            pipe = load(
                layout.root,
                device=self.device,
                loras=loras,
                lora_skip=lora_skip,
                on_progress=self.on_progress,
            )
            inputs = inputs_of(pipe, rows) | inputs
            for i in range(done, len(requests)):
                pictures = fitted_pictures(requests[i], {})
                first, last = pictures.get("image"), pictures.get("last_image")
                generator = torch.Generator().manual_seed(i)
                report = partial(self._report, i, len(requests))
                recording = with_recording(pipe, inputs, generator)
                with pipe.exclusive():
                    denoise(recording, requests[i], first, report, None, last_image=last)
                _write(file, i + 1, inputs)
                journal.add(file, file.stat().st_size)
        statistics: dict[str, dict[str, Statistics]] = {}
        for key, recorded in inputs.items():
            expert, _, layer = key.partition(".")
            if len(recorded.amax):
                statistics.setdefault(expert, {})[layer] = recorded.statistics()
        return statistics

    def _report(self, prompt: int, prompts: int, event: Progress) -> None:
        """Report the steps of all prompts as if they were one run."""
        if self.on_progress is not None and event.stage == "denoise":
            step = prompt * event.total + event.step
            self.on_progress(replace(event, step=step, total=prompts * event.total))


# ---- layer inputs -------------------------------------------------------------------------------


@dataclass(eq=False)
class Input:
    """Statistics of one input: the largest |x| per channel, and a uniform sample of at most `limit` rows.

    Every row draws a random key, and the rows with the smallest keys are kept: a uniform sample over any
    number of calls, in constant memory.
    """

    weight_amax: Tensor
    limit: int
    amax: Tensor = torch.empty(0)
    """float32 [K]; empty before the first call."""
    keys: Tensor = torch.empty(0)
    rows: Tensor = torch.empty(0)

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Record hidden states [.., K] of any float dtype, on any device."""
        x = x.detach().reshape(-1, x.shape[-1])
        amax = torch.maximum(x.amax(0), -x.amin(0)).to(torch.float32)  # x.abs() would copy x
        self.amax = torch.maximum(self.amax.to(amax.device), amax) if len(self.amax) else amax
        if not self.limit:
            return
        keys = torch.rand(len(x), generator=generator)
        if len(self.keys) == self.limit:
            chosen = (keys < self.keys[-1]).nonzero().squeeze(1)
        else:
            chosen = torch.arange(len(x))
        keys = torch.cat((self.keys, keys[chosen]))
        rows = x[chosen.to(x.device)].cpu()
        rows = torch.cat((self.rows.to(rows.dtype), rows))
        order = keys.argsort()[: self.limit]
        self.keys, self.rows = keys[order], rows[order]

    def statistics(self) -> Statistics:
        """The statistics on the CPU: `amax` float32 [K], `rows` [n, K]."""
        return Statistics(self.amax.cpu(), self.weight_amax, self.rows.view(-1, len(self.weight_amax)))


def with_recording(pipe: Pipeline, inputs: Mapping[str, Input], generator: torch.Generator) -> Pipeline:
    """The pipeline with a state that records the layers named in `inputs` (`expert.layer`)."""
    experts = nn.ModuleDict(pipe.experts)
    layers = {id(experts.get_submodule(name)): recorded for name, recorded in inputs.items()}

    class RecordingState(DenoiseState):
        def linear(self, layer: Any, x: Tensor | LinearInput) -> Tensor:
            if (recorded := layers.get(id(layer))) is not None:
                recorded.add(x.x if isinstance(x, LinearInput) else x, generator)
            return super().linear(layer, x)

    return replace(pipe, make_state=RecordingState)


def inputs_of(pipe: Pipeline, limit: int) -> dict[str, Input]:
    """Empty records for the inputs of the blocks' linear layers, by `expert.layer` of the first reader."""
    weights: dict[str, Tensor] = {}
    for name, module in nn.ModuleDict(pipe.experts).named_modules():
        if isinstance(module, nn.Linear) and is_block_linear(name.partition(".")[2]):
            first, amax = first_in_group(name), module.weight.detach().abs().amax(0).float().cpu()
            weights[first] = torch.maximum(weights.get(first, amax), amax)
    return {first: Input(amax, limit) for first, amax in weights.items()}


# ---- results of finished prompts ----------------------------------------------------------------


def _write(file: Path, done: int, inputs: Mapping[str, Input]) -> None:
    """Replace `file` atomically."""
    named = {f"{key}:{part}": getattr(recorded, part) for key, recorded in inputs.items() for part in PARTS}
    new = file.with_name(f"{file.name}.new")
    save_file({k: t.cpu().contiguous() for k, t in named.items()}, new, metadata={"prompts": str(done)})
    os.replace(new, file)


def _read(file: Path, limit: int) -> tuple[int, dict[str, Input]]:
    """(number of finished prompts, their statistics)."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as f:
        for name in f.keys():
            key, _, part = name.rpartition(":")
            parts.setdefault(key, {})[part] = f.get_tensor(name)
        return int(f.metadata()["prompts"]), {key: Input(limit=limit, **of) for key, of in parts.items()}


# ---- prompts ------------------------------------------------------------------------------------


def read_prompts(source: str | Path | int | Sequence[str], defaults: Defaults) -> list[Prompt]:
    """Prompts and their images from a file, `demo`, a number of demo prompts, or a list of prompts.

    Raises UsageError: E-USE-01 if there are no prompts, or for demo prompts and another model; E-USE-02 for a
    missing file or image.
    """
    text = str(source) if isinstance(source, str | Path | int) else ""
    if text == "demo" or text.lstrip("-").isdecimal():  # adjacent lines differ in every attribute
        if defaults.spec is None or defaults.spec.name != "ascendit-demo":
            _refuse(f"prompts of the demo model for {defaults.model}")
        lines = (DEMO.parent / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
        count = 8 if text == "demo" else int(text)
        if not 1 <= count <= len(lines):
            _refuse(f"{count} prompts of the demo model, which has {len(lines)}")
        return [(line, {}) for line in lines[:count]]
    if isinstance(source, str | Path):
        return _from_file(Path(source).expanduser(), 1 if defaults.last_frame == "refused" else 2)
    assert not isinstance(source, int)
    return [(line, {}) for line in source] or _refuse("no prompts")


def _from_file(path: Path, max_images: int) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(path, "the prompts to calibrate with") from None
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        _refuse(f"prompts in {path}: {reason}")
    prompts: list[Prompt] = []
    for line in filter(str.strip, lines):
        *names, prompt = line.split("\t", max_images)
        images = [path.parent / Path(name.strip()).expanduser() for name in names]
        for image, frame in zip(images, ("first", "last"), strict=False):
            if not image.is_file():
                raise _absent(image, f"the {frame} frame of a prompt")
        prompts.append((prompt.strip(), dict(zip(FIELDS, map(str, images), strict=False))))
    return prompts or _refuse(f"no prompts in {path}")


def _refuse(got: str) -> NoReturn:
    raise UsageError(
        got,
        needs="a text file with one prompt per line, or the number of demo prompts for the demo model",
        fix="--calibrate 8 for the demo; --calibrate FILE with prompts like those of real use",
    )


def _absent(path: Path, needs: str) -> UsageError:
    return UsageError(f"no file {path}", needs=needs, fix="correct the path", code="E-USE-02")
