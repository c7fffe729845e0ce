"""Check a complete model without reading its weights: each part, and whether the parts belong together.

`inspect` lists all problems; loading and `--dry-run` raise the first one. So all of them refuse the same
models, with the same error. `quantize` and `repack` check the transformers only. Loading reuses the headers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ascendit.checkpoint.component import EXPERTS, Part, read_json
from ascendit.checkpoint.layout import RECORD_FILE, Layout
from ascendit.checkpoint.part_check import (
    LIBRARY_PARTS,
    check_index,
    check_part,
    library_config,
    processor_config,
)
from ascendit.checkpoint.part_configs import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from ascendit.checkpoint.tokenizer_check import check_tokenizer
from ascendit.checkpoint.transformer import Expert, model_config, read_expert
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import AscenditError, CheckpointError
from ascendit.family import WanConfig, out_channels
from ascendit.quant.schemes import scheme_after_reading
from ascendit.schedule import StepSchedule

NEEDED = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
NEEDED_FOR_IMAGE_TOKENS = ("image_encoder", "image_processor")
EQUAL_KEYS = ("in_channels", "out_channels", "text_dim", "patch_size", "image_dim")
"""Keys in which the configs of two experts agree: they take turns on the same latents."""


@dataclass(frozen=True)
class CheckedPart:
    """One part of a model, and its problem if it has one."""

    part: Part
    shards: Shards | None = None
    """Its headers; None for a part without weights, and if they could not be read."""
    expert: Expert | None = None
    """The transformer by Diffusers names; None for other parts, and if it could not be read."""
    problem: AscenditError | None = None


@dataclass(frozen=True)
class CheckedLayout:
    """A model with all its problems, most basic first."""

    layout: Layout
    parts: tuple[CheckedPart, ...]
    problems: tuple[AscenditError, ...]

    @property
    def experts(self) -> list[Expert]:
        """The transformers that could be read, high noise first."""
        return [checked.expert for checked in self.parts if checked.expert is not None]

    def require(self) -> CheckedLayout:
        """Return self. Raises the first problem, a CheckpointError or UsageError."""
        if self.problems:
            raise self.problems[0]
        return self


def check_layout(layout: Layout) -> CheckedLayout:
    """Check every part of `layout`, its record, and that its parts fit each other."""
    pipeline = layout.kind == "diffusers"
    problems = list(_missing_parts(layout)) if pipeline else []
    parts = tuple(_check(part, to_run=pipeline) for part in layout.parts.values())
    problems += [checked.problem for checked in parts if checked.problem is not None]
    problems += _index_problems(layout)
    problems += _record_problems(layout, [x.expert for x in parts if x.expert is not None])
    sound = {x.part.name: x for x in parts if x.problem is None}
    problems += _disagreements(layout, sound)
    return CheckedLayout(layout, parts, tuple(problems))


def check_experts(layout: Layout) -> list[Expert]:
    """The transformers alone, which `quantize` and `repack` convert.

    Raises CheckpointError (E-CKP-01) if there are none, and the first of their problems.
    """
    if not layout.experts:
        raise CheckpointError(
            f"{layout.root} has no transformer, but the weights of a {', '.join(layout.parts)}",
            needs="a transformer",
            fix=f"ascendit repack {layout.root} --base MODEL -o DST",
            code="E-CKP-01",
        )
    parts = tuple(_check(part, to_run=False) for part in layout.experts)
    problems = [checked.problem for checked in parts if checked.problem is not None]
    problems = problems or list(_experts_disagree(layout, {x.part.name: x for x in parts}))
    return CheckedLayout(layout, parts, tuple(problems)).require().experts


def _missing_parts(layout: Layout) -> Iterator[AscenditError]:
    image_tokens = bool(layout.experts) and layout.experts[0].config.get("image_dim") is not None
    for name in NEEDED + (NEEDED_FOR_IMAGE_TOKENS if image_tokens else ()):
        try:
            layout.part(name)
        except CheckpointError as e:
            yield e


def _check(part: Part, *, to_run: bool) -> CheckedPart:
    """`to_run`: the part of a pipeline. Only `repack` reads transformers with an incomplete config."""
    checked = CheckedPart(part)
    try:
        checked = replace(checked, shards=check_part(part))
        if part.name in EXPERTS:
            expert = read_expert(part, checked.shards)
            checked = replace(checked, expert=expert)
            if to_run:
                model_config(expert)
    except AscenditError as e:
        return replace(checked, problem=e)
    return checked


def _index_problems(layout: Layout) -> list[AscenditError]:
    try:
        check_index(layout)
    except CheckpointError as e:
        return [e]
    return []


# ---- the record of the folder -------------------------------------------------------------------


def stored_schedule(layout: Layout) -> StepSchedule:
    """The step schedule in `ascendit.json`, empty if there is none.

    Raises CheckpointError (E-CKP-06) for a damaged record, UsageError (E-USE-01) for an invalid schedule.
    """
    record = layout.root / RECORD_FILE
    recipe = read_json(record).get("recipe") if layout.kind != "file" and record.is_file() else None
    text = recipe.get("step_policy") if isinstance(recipe, dict) else None
    return StepSchedule.parse(text) if isinstance(text, str) and text else StepSchedule()


def _record_problems(layout: Layout, experts: list[Expert]) -> list[AscenditError]:
    try:
        schedule = stored_schedule(layout)
        if schedule != StepSchedule() and len(experts) == len(layout.experts):
            layers = [layer for expert in experts for layer in expert.layers.values()]
            schedule.check_schemes({"bf16", *(scheme_after_reading(x.scheme) for x in layers)}, floats=False)
    except AscenditError as e:
        return [e]
    return []


# ---- parts that belong together -----------------------------------------------------------------


def _disagreements(layout: Layout, parts: Mapping[str, CheckedPart]) -> list[AscenditError]:
    """Problems between parts that have none themselves."""
    problems = list(_experts_disagree(layout, parts))
    name = next((name for name in EXPERTS if name in parts), None)
    if name is not None and layout.kind == "diffusers":
        problems += _around_the_transformer(layout, name, _config_of(parts[name]), parts)
    return problems


def _experts_disagree(layout: Layout, parts: Mapping[str, CheckedPart]) -> Iterator[AscenditError]:
    experts = {name: _config_of(parts[name]) for name in EXPERTS if name in parts}
    for (a, first), (b, second) in pairwise(experts.items()):
        if wrong := [key for key in EQUAL_KEYS if first[key] != second[key]]:
            texts = [", ".join(f"{key} {config[key]}" for key in wrong) for config in (first, second)]
            yield _disagree(layout, a, texts[0], b, texts[1])


def _around_the_transformer(
    layout: Layout, name: str, config: Mapping[str, Any], parts: Mapping[str, CheckedPart]
) -> Iterator[AscenditError]:
    """Problems between the first expert and the other parts."""
    configs = {part: library_config(parts[part].part) for part in LIBRARY_PARTS if part in parts}
    match configs.get("vae"):
        case AutoencoderConfig(z_dim=z, scale_factor_temporal=stride):
            inputs, outputs = config["in_channels"], config["out_channels"]
            allowed = (z,) if layout.index.get("expand_timesteps") else (z, 2 * z + stride)
            if outputs != z or inputs not in allowed:
                channels = f"{inputs} input and {outputs} output channels"
                yield _disagree(layout, name, channels, "vae", f"latents of {z} channels")
    match configs.get("text_encoder"):
        case TextEncoderConfig(vocab_size=count) if (largest := _largest_token(parts)) >= count:
            token = f"a token of number {largest}"
            yield _disagree(layout, "tokenizer", token, "text_encoder", f"{count} embeddings")
        case TextEncoderConfig(d_model=width) if width != config["text_dim"]:
            text = f"text_dim {config['text_dim']}"
            yield _disagree(layout, name, text, "text_encoder", f"d_model {width}")
    match configs.get("image_encoder"):
        case ImageEncoderConfig(hidden_size=width) if config["image_dim"] not in (None, width):
            image = f"image_dim {config['image_dim']}"
            yield _disagree(layout, name, image, "image_encoder", f"hidden_size {width}")
        case ImageEncoderConfig(tokens=tokens) if config["pos_embed_seq_len"] not in (None, 2 * tokens):
            yield _position_embeddings(config["pos_embed_seq_len"], tokens)
        case ImageEncoderConfig(image_size=edge) if "image_processor" in parts:
            size = processor_config(parts["image_processor"].part).output_size
            if size != (edge, edge):
                images = "images of " + ("any size" if size is None else f"{size[1]}x{size[0]}")
                yield _disagree(layout, "image_processor", images, "image_encoder", f"image_size {edge}")


def _largest_token(parts: Mapping[str, CheckedPart]) -> int:
    return (check_tokenizer(parts["tokenizer"].part) or 0) if "tokenizer" in parts else 0


def _position_embeddings(length: int, tokens: int) -> CheckpointError:
    return CheckpointError(
        f"pos_embed_seq_len = {length} in the transformer, and {tokens} tokens per image",
        needs=f"{2 * tokens}: the image encoder's tokens of the first and the last image",
        fix="use the image encoder and the config.json of the model's authors",
        code="E-CKP-06",
    )


def _config_of(checked: CheckedPart) -> dict[str, Any]:
    """The values of `EQUAL_KEYS` and `pos_embed_seq_len` in the config of an expert, with defaults."""
    assert checked.expert is not None
    config = checked.expert.config
    keys = (*EQUAL_KEYS, "pos_embed_seq_len")
    values = {key: config.get(key, getattr(WanConfig, key)) for key in keys}
    values["out_channels"] = out_channels(config)
    return values | {"patch_size": list(values["patch_size"])}


def _disagree(layout: Layout, a: str, a_has: str, b: str, b_has: str) -> CheckpointError:
    return CheckpointError(
        f"{a} and {b} of {layout.root} do not fit each other: {a_has}; {b_has}",
        needs="parts of one model",
        fix=f"download {a} and {b} again, both from the same revision of the model",
        code="E-CKP-07",
    )
