"""LoadOptions: the only table of options for loading a model. Validated, frozen, JSON round trip.

Each row has the type, default, help, flag and environment variable of an option. From them come the flags of
`generate`, the keys of `--set` and `--config`, the arguments of `ascendit.load`, the record beside a video
and the replay line.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, PlainValidator

from ascendit.attention.choice import AttentionPolicy
from ascendit.device.attention_kernels import Probabilities, attention_text, parse_attention
from ascendit.device.device import DenoiserDtype, Device, VaeDtype, parse_device
from ascendit.environment import Variable
from ascendit.errors import UsageError
from ascendit.option_text import flag_of, option
from ascendit.pipeline.defaults import Source
from ascendit.quant.schemes import SchemeName
from ascendit.schedule import StepSchedule
from ascendit.validation import Checked
from ascendit.weights.lora.fold import lora_sources

if TYPE_CHECKING:
    from ascendit.checkpoint.layout import Layout
    from ascendit.checkpoint.transformer import Expert
    from ascendit.checkpoint.weight_files import Shards
    from ascendit.pipeline.defaults import Defaults
    from ascendit.weights.applied_recipe import AppliedRecipe

Row = TypeVar("Row")


@dataclass(frozen=True)
class Option:
    """Help and flag of an option. An `environment.Variable` in the same row can set the option too."""

    help: str
    metavar: str | None = None
    """Metavar of its flag; None if it has no flag and is set by `--set KEY=VALUE`."""
    hidden: bool = False
    """Omit the flag from `--help`."""
    repeatable: bool = False
    """Each use of the flag adds a value."""


POWERS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _device(name: object) -> str:
    parse_device(name)
    return str(name)


def _dtype(value: object) -> str | None:
    """A name or a torch.dtype. `Device.dtype_name` checks it against the device."""
    return None if value is None else str(value).removeprefix("torch.")


def _patterns(value: object) -> object:
    """Patterns from text, separated by spaces, commas or semicolons, or from a sequence."""
    if isinstance(value, str):
        return tuple(pattern for pattern in re.split(r"[\s;,]+", value) if pattern)
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    return () if value is None else value


def _loras(value: object) -> object:
    """LoRA files as texts."""
    return tuple(map(str, lora_sources(value)))


def _texts(value: object) -> object:
    """A sequence of texts and paths, or a single one, as texts."""
    if isinstance(value, (str, os.PathLike)):
        return (os.fspath(value),)
    if isinstance(value, (list, tuple)):
        return tuple(os.fspath(item) if isinstance(item, os.PathLike) else item for item in value)
    return () if value is None else value


def _count(value: object) -> object:
    """A number of heads, or its text. Raises UsageError for any other value."""
    if value is None:
        return None
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,8}", str(value)):
        needs = "a whole number of heads, at least 1"
        raise UsageError(option("sub_head", str(value)), needs=needs, fix="omit --sub-head")
    return int(str(value))


def _attention(value: object) -> object:
    """A request as text, with the names of the tables."""
    return None if value is None else attention_text(parse_attention(value))  # type: ignore[arg-type]


def _schedule(value: object) -> object:
    """A schedule as text. Raises UsageError for a StepSchedule that its text cannot express."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, StepSchedule):
        return StepSchedule.parse(value)  # type: ignore[arg-type]  # raises UsageError: not text
    text = str(value) or "default:stored"  # an empty option would select the recipe's schedule
    if StepSchedule.parse(text) != value:
        needs = "a schedule of precisions and attention with ascending steps, without cache settings"
        raise UsageError(f"step_policy={value!r}", needs=needs, fix=f"step_policy={text!r}")
    return text


def _bytes(value: object) -> object:
    """Parse bytes: a number, or text such as 24GiB, 16 GB or 8e9.

    Raises UsageError for any other text and for 0.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?(?:e\+?\d\d?)?) ?(?:([KMGT])(i?))?B?", str(value).strip())
    number, prefix, binary = match.groups() if match else ("0", None, None)
    size = int(float(number) * (1024 if binary else 1000) ** POWERS[prefix])
    if size < 1:
        needs = "a size above 0, in bytes or in KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        raise UsageError(f"max_memory={value}", needs=needs, fix="--max-memory 24GiB")
    return size


def _emulate(value: object) -> object:
    if isinstance(value, bool):
        return "decode-on-use" if value else None
    return value


class LoadOptions(Checked):
    """Options for loading a model, as plain JSON values."""

    title = "load"

    model: Annotated[str, BeforeValidator(_path), Option("Folder, demo, hf:org/name or ms:org/name.")]
    parts: Annotated[
        tuple[str, ...],
        BeforeValidator(_texts),
        Option(
            "Weights of one component in place of the model's; repeatable.",
            "[NAME=]FILE",
            hidden=True,
            repeatable=True,
        ),
    ] = ()
    defaults: Annotated[
        Source,
        Option(
            "Solver, shift, boundary of a known model: model (its authors') or folder.", "SOURCE", hidden=True
        ),
    ] = "model"
    device: Annotated[
        str,
        BeforeValidator(_device),
        Option("cpu (default), cuda:1, npu:0, or twin:a5 (an NPU emulated on the CPU).", "NAME"),
    ] = "cpu"
    text_on: Annotated[
        Literal["cpu", "device", "drop"],
        Option("Text encoder: cpu, device (default), or drop (free it after use).", "WHERE", hidden=True),
        Variable(
            "T5_LOAD_CPU",
            {"1": "cpu"},
            "the text encoder runs on the CPU (--text-on device overrides it)",
            switch=True,
        ),
    ] = "device"
    scheme: Annotated[
        SchemeName | None,
        Option("Quantize a BF16 model while loading: mxfp8, mxfp4, int8, ...", "NAME"),
    ] = None
    recipe: Annotated[
        str | None,
        BeforeValidator(_path),
        Option("Quantize by a recipe: its name or a TOML file.", "NAME"),
    ] = None
    loras: Annotated[
        tuple[str, ...],
        BeforeValidator(_loras),
        Option(
            "LoRA to add while loading; high=FILE or low=FILE for one expert; repeatable.",
            "FILE[:WEIGHT]",
            repeatable=True,
        ),
    ] = ()
    lora_skip: Annotated[
        tuple[str, ...],
        BeforeValidator(_patterns),
        Option(
            "LoRA keys to leave out: image, text, control, audio, face or patch; repeatable.",
            "GROUP",
            hidden=True,
            repeatable=True,
        ),
    ] = ()
    step_policy: Annotated[
        str | None,
        BeforeValidator(_schedule),
        Option('Precision and attention per step, for example "0-1:w4a8,default:w4a4".', "STEPS:HOW,.."),
    ] = None
    emulate: Annotated[
        Literal["decode-on-use", "decode-once"] | None,
        BeforeValidator(_emulate),
        Option("If the chip lacks the scheme: decode-on-use, or decode-once (faster).", "HOW"),
    ] = None
    keep: Annotated[
        tuple[str, ...],
        BeforeValidator(_patterns),
        Option("Patterns of layers to exclude from quantization."),
    ] = ()
    activation_rule: Annotated[str | None, Option("Activation scale rules, for example mxfp4=max:7.")] = None
    dtype: Annotated[
        DenoiserDtype | None,
        PlainValidator(_dtype),
        Option("dtype of the denoiser; default: as stored on a CPU, else bfloat16."),
    ] = None
    vae_dtype: Annotated[
        VaeDtype | None,
        PlainValidator(_dtype),
        Option("dtype of the VAE; default float32. bfloat16: two thirds of the time, about 50 dB PSNR."),
    ] = None
    ops: Annotated[
        Literal["auto", "reference"] | None,
        BeforeValidator(lambda name: None if name == "auto" else name),
        Option("reference: plain PyTorch operators."),
    ] = None
    attention: Annotated[
        str | None,
        BeforeValidator(_attention),
        Option(
            "Attention kernels or schemes, for example self=laser or self=fp8,cross=bf16.",
            "[KIND=]NAME,..",
            hidden=True,
        ),
        Variable(
            "ALGO",
            {"0": None, "1": "self=laser", "3": "self=fused_infer"},
            "attention {} on an NPU (--attention overrides it)",
            default="the default attention kernels",
        ),
    ] = None
    sub_head: Annotated[
        int | None,
        BeforeValidator(_count),
        Option("Heads of self-attention in one call; must divide the heads.", "N", hidden=True),
        Variable(
            "USE_SUB_HEAD",
            {},
            "heads of self-attention in one call: {} (--sub-head overrides it)",
            number=True,
        ),
    ] = None
    attention_probabilities: Annotated[
        Probabilities | None,
        Option("Probabilities of the BF16 attention of a CPU: one BF16 number each, or two."),
    ] = None
    nz: Annotated[bool, Option("Use FRACTAL_NZ weights where an NPU accepts both layouts.")] = False
    fast_layernorm: Annotated[
        bool,
        Option("Use MindIE-SD's layer norm where available."),
        Variable(
            "FAST_LAYERNORM",
            {"1": True},
            "MindIE-SD's layer norm where available, the same numbers (--set fast_layernorm=false overrides "
            "it)",
            switch=True,
        ),
    ] = False
    force: Annotated[bool, Option("Allow quantization that is known to lose accuracy.")] = False
    max_memory: Annotated[
        int | None,
        BeforeValidator(_bytes),
        Option("Memory limit, for example 24GiB or 8e9; recorded, not enforced yet.", "SIZE", hidden=True),
    ] = None

    @property
    def record(self) -> dict[str, Any]:
        """The options that affect a video, for the JSON beside it; without empty and false ones."""
        unrecorded = {"model"} | ({"defaults"} if self.defaults == "model" else set())
        values = self.model_dump(mode="json", exclude=unrecorded)
        return {name: value for name, value in values.items() if value not in (None, False, [])}


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model that has been checked against its options: its configs, headers and resolved settings."""

    options: LoadOptions
    layout: Layout
    defaults: Defaults
    device: Device
    """Parsed from its name; open if it is a CUDA device or an NPU."""
    dtype: str | None
    """dtype of the denoiser; None: as stored."""
    part_dtypes: Mapping[str, str]
    """dtype of the VAE and of the text and image encoders."""
    shards: Mapping[str, Shards]
    """The headers of each part with weights."""
    experts: tuple[tuple[Expert, AppliedRecipe | None], ...]
    """Each expert with the recipe that quantizes it while loading, or None."""
    schedule: StepSchedule
    attention: AttentionPolicy
    """The requests for attention kernels."""

    @property
    def needs_image_encoder(self) -> bool:
        """Whether the transformer takes CLIP tokens of an image (Wan2.1 I2V)."""
        return self.layout.experts[0].config.get("image_dim") is not None


def _rows(kind: type[Row]) -> dict[str, Row]:
    """Option name -> its metadata of type `kind`, for the options that have one."""
    fields = LoadOptions.model_fields.items()
    return {name: x for name, field in fields for x in field.metadata if isinstance(x, kind)}


OPTIONS = _rows(Option)
FLAGS = {name: flag_of(name) for name, row in OPTIONS.items() if row.metavar}
"""Option name -> its flag."""
VARIABLES = _rows(Variable)
"""Option name -> the environment variable that sets it."""


def load_args(record: Mapping[str, Any]) -> list[str]:
    """`record` as command-line arguments: flags and `--set`, without default values."""
    args = []
    for name, field in LoadOptions.model_fields.items():
        value = record.get(name)
        if value and value != field.default:
            if OPTIONS[name].repeatable:
                args += [arg for item in value for arg in (FLAGS[name], item)]
                continue
            text = ";".join(value) if isinstance(value, list) else "true" if value is True else str(value)
            args += [FLAGS[name], text] if name in FLAGS else ["--set", f"{name}={text}"]
    return args


def load_signature(*more: inspect.Parameter) -> inspect.Signature:
    """The signature of a function with parameter `model`, the other load options as keywords, and `more`."""
    fields = LoadOptions.model_fields
    parameters = inspect.signature(LoadOptions).parameters.values()
    model, *options = (p.replace(annotation=fields[p.name].annotation) for p in parameters)
    model = model.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([model, *options, *more])
