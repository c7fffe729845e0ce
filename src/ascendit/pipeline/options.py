"""LoadOptions: every option of loading a model, once. Validated, frozen, JSON round trip. No torch.

A row of the table gives an option its type, default, help, flag and environment variable. From it come the
flags of `generate`, the keys of `--set` and `--config`, the arguments of `ascendit.load`, the record beside a
video and the replay line.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, PlainValidator

from ascendit.device.device import Device, parse_device
from ascendit.environment import Variable
from ascendit.errors import UsageError
from ascendit.quant.schemes import SchemeName
from ascendit.schedule import StepSchedule
from ascendit.validation import Checked

if TYPE_CHECKING:
    from ascendit.checkpoint.layout import Layout
    from ascendit.checkpoint.transformer import Expert
    from ascendit.pipeline.defaults import Defaults
    from ascendit.weights.applied_recipe import AppliedRecipe

Row = TypeVar("Row")


@dataclass(frozen=True)
class Option:
    """What a row says besides type and default; a `Variable` beside it also sets the option."""

    help: str
    metavar: str | None = None
    """Of its flag; None: it has no flag, and is set by `--set KEY=VALUE`."""
    hidden: bool = False
    """Whether `--help` leaves its flag out."""


POWERS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _device(name: object) -> str:
    parse_device(name)
    return str(name)


def _dtype(value: object) -> str | None:
    """A name or a torch.dtype; `Device.dtype_name` checks what a device supports."""
    return None if value is None else str(value).removeprefix("torch.")


def _patterns(value: object) -> object:
    """Text with spaces, commas or semicolons between the patterns, or a sequence of them."""
    if isinstance(value, str):
        return tuple(pattern for pattern in re.split(r"[\s;,]+", value) if pattern)
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    return () if value is None else value


def _schedule(value: object) -> object:
    """Text; UsageError for a StepSchedule that is more than its text can say."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, StepSchedule):
        return StepSchedule.parse(value)  # type: ignore[arg-type]  # it refuses what is no text
    text = str(value) or "default:stored"  # an option that is empty would leave the recipe's own
    if StepSchedule.parse(text) != value:
        needs = "precisions alone, the steps rising: attention and cache of a step are no option"
        raise UsageError(f"step_policy={value!r}", needs=needs, fix=f"step_policy={text!r}")
    return text


def _bytes(value: object) -> object:
    """A size in bytes, or text as 24GiB, 16 GB or 8e9. UsageError E-USE-01 for another text and for 0."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?(?:e\+?\d\d?)?) ?(?:([KMGT])(i?))?B?", str(value).strip())
    number, prefix, binary = found.groups() if found else ("0", None, None)
    size = int(float(number) * (1024 if binary else 1000) ** POWERS[prefix])
    if size < 1:
        needs = "a size above 0, in bytes or with KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        raise UsageError(f"max_memory={value}", needs=needs, fix="--max-memory 24GiB")
    return size


def _emulate(value: object) -> object:
    if isinstance(value, bool):
        return "decode-on-use" if value else None
    return value


class LoadOptions(Checked):
    """How a model is loaded: plain values, whatever Python callers pass."""

    title = "load"

    model: Annotated[str, BeforeValidator(_path), Option("A folder, demo, hf:org/name or ms:org/name.")]
    device: Annotated[
        str,
        BeforeValidator(_device),
        Option("cpu (default), cuda:1, npu:0, or an NPU's twin on the CPU: twin:a5.", "NAME"),
    ] = "cpu"
    text_on: Annotated[
        Literal["cpu", "device", "drop"],
        Option("Text encoder on cpu, on device (default), or drop it after use.", "WHERE", hidden=True),
        Variable(
            "T5_LOAD_CPU",
            {"1": "cpu"},
            "the text encoder runs on the CPU (--text-on device overrides it)",
            switch=True,
        ),
    ] = "device"
    scheme: Annotated[
        SchemeName | None,
        Option("Quantize a BF16 model while it loads: mxfp8, mxfp4, int8, ...", "NAME"),
    ] = None
    recipe: Annotated[
        str | None,
        BeforeValidator(_path),
        Option("The same by a recipe, or a TOML file of your own.", "NAME"),
    ] = None
    step_policy: Annotated[
        str | None,
        BeforeValidator(_schedule),
        Option('Precision by step, as "0-1:w4a8,default:w4a4".', "STEPS:HOW,.."),
    ] = None
    emulate: Annotated[
        Literal["decode-on-use", "decode-once"] | None,
        BeforeValidator(_emulate),
        Option("Where a chip lacks the scheme: decode-on-use, or decode-once (faster).", "HOW"),
    ] = None
    keep: Annotated[
        tuple[str, ...],
        BeforeValidator(_patterns),
        Option("Patterns of layers that stay as they are stored."),
    ] = ()
    activation_rule: Annotated[str | None, Option("Scale rules of activations, as mxfp4=max:7.")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        PlainValidator(_dtype),
        Option("Of the denoiser; default as stored on a CPU, else bfloat16."),
    ] = None
    vae_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        PlainValidator(_dtype),
        Option("Default float32; bfloat16 takes two thirds of the time, about 50 dB from it."),
    ] = None
    ops: Annotated[
        Literal["auto", "reference"] | None,
        BeforeValidator(lambda name: None if name == "auto" else name),
        Option("reference: plain PyTorch operators."),
    ] = None
    attention: Annotated[
        Literal["fusion", "fused_infer"] | None,
        Option("The attention kernel of an NPU."),
        Variable(
            "ALGO",
            {"0": "fusion", "3": "fused_infer"},
            "attention={} on an NPU (--set attention overrides it)",
        ),
    ] = None
    nz: Annotated[bool, Option("Weights in FRACTAL_NZ where an NPU takes both layouts.")] = False
    fast_layernorm: Annotated[
        bool,
        Option("Layer norms by MindIE-SD where the device has it."),
        Variable(
            "FAST_LAYERNORM",
            {"1": True},
            "layer norms by MindIE-SD where the device has it, the same numbers (--set fast_layernorm=false "
            "overrides it)",
            switch=True,
        ),
    ] = False
    force: Annotated[bool, Option("Quantize where accuracy is known to suffer.")] = False
    max_memory: Annotated[
        int | None,
        BeforeValidator(_bytes),
        Option("Memory to stay below, as 24GiB or 8e9: recorded, not enforced yet.", "SIZE", hidden=True),
    ] = None

    @property
    def record(self) -> dict[str, Any]:
        """The options that shape a video, for the JSON beside it; without those that are None or off."""
        values = self.model_dump(mode="json", exclude={"model"})
        return {name: value for name, value in values.items() if value not in (None, False, [])}


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model that can be loaded as asked: what was read from its configs and headers, and decided."""

    options: LoadOptions
    layout: Layout
    defaults: Defaults
    device: Device
    """By its name; it is not open."""
    dtype: str | None
    """Of the denoiser; None: as stored."""
    vae_dtype: str
    experts: tuple[tuple[Expert, AppliedRecipe | None], ...]
    """Each with the recipe that quantizes it on its way into memory."""
    schedule: StepSchedule


def _rows(kind: type[Row]) -> dict[str, Row]:
    """Option -> what its row says of this kind."""
    fields = LoadOptions.model_fields.items()
    return {name: x for name, field in fields for x in field.metadata if isinstance(x, kind)}


OPTIONS = _rows(Option)
FLAGS = {name: f"--{name.replace('_', '-')}" for name, row in OPTIONS.items() if row.metavar}
"""Option -> its flag."""
VARIABLES = _rows(Variable)
"""Option -> the environment variable that sets it."""


def load_words(record: Mapping[str, Any]) -> list[str]:
    """`record` as flags and `--set` of a replay line, without values that are the default."""
    words = []
    for name, field in LoadOptions.model_fields.items():
        value = record.get(name)
        if value and value != field.default:
            text = ";".join(value) if isinstance(value, list) else "true" if value is True else str(value)
            words.append([FLAGS[name], text] if name in FLAGS else ["--set", f"{name}={text}"])
    return [word for pair in words for word in pair]


def load_signature(*more: inspect.Parameter) -> inspect.Signature:
    """The signature of a function that takes the options of loading by name, the model first, and `more`."""
    fields = LoadOptions.model_fields
    found = inspect.signature(LoadOptions).parameters.values()
    model, *options = (p.replace(annotation=fields[p.name].annotation) for p in found)
    model = model.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([model, *options, *more])
