"""Load a model: which numbers its layers have, where they run, and what is checked before a byte is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ascendit.checkpoint.expert import Expert
from ascendit.checkpoint.folder import model_folder
from ascendit.checkpoint.layout import Layout, recognise
from ascendit.checkpoint.part import read_json
from ascendit.convert.card import RECORD_FILE
from ascendit.convert.expert_plan import ExpertPlan
from ascendit.convert.step_policy import StepPolicy
from ascendit.convert.steps import schemes_of
from ascendit.device.backends import open_device, parse_device
from ascendit.model.load import load_expert
from ascendit.model.online import Online, read_experts
from ascendit.ops.bind import bind
from ascendit.ops.quantized import Emulate
from ascendit.pipeline.defaults import defaults_for
from ascendit.pipeline.encoders import ImageEncoder, TextEncoder, TextOn, VideoCoder
from ascendit.pipeline.generate import Pipeline
from ascendit.pipeline.progress import OnProgress, Progress

log = logging.getLogger("ascendit")


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    scheme: str | None = None,
    recipe: str | None = None,
    keep: Sequence[str] = (),
    step_policy: str | StepPolicy | None = None,
    emulate: Emulate | bool | None = None,
    activation_rule: str | None = None,
    text_on: TextOn = "device",
    ops: str | None = None,
    fast_layernorm: bool = False,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Pipeline:
    """Load a model: a folder, "demo", "hf:org/name" or "ms:org/name" (with "@revision").

    `device`: "cpu", "cuda", "cuda:1", "npu", "npu:1", "twin:a2", "twin:a3", "twin:a5". `dtype`: of the
    denoiser, None = as stored on a CPU, else bfloat16. A quantized folder needs no flag; `scheme`, or a
    `recipe` by name or TOML file, quantizes a float model while it loads, as `ascendit.quantize` would;
    `keep`: patterns of layers that stay floats. `step_policy`: as "0-1:w4a8,default:w4a4". `emulate`:
    "decode-on-use" or "decode-once", for schemes that the device has no matmul for. `activation_rule`: scale
    rules of the tokens, as "mxfp4=max:7". `text_on`: where UMT5 lives: "device", "cpu", or "drop" after each
    prompt. `ops`: "reference" or None. `fast_layernorm`: by MindIE-SD where there is one. `force`: quantize
    where accuracy is known to suffer.
    """
    layout = recognise(model_folder(model))
    layout.require_pipeline()
    online = Online.of(scheme, recipe, keep, force=force)
    found = read_experts(layout, online)
    policy = policy_for(step_policy, online, layout, found)
    defaults = defaults_for(layout)
    place = parse_device(device)
    number = place.to_dtype(dtype)
    place = open_device(place)
    bound = bind(place, ops, fast_layernorm=fast_layernorm, emulate=emulate, activation_rule=activation_rule)
    for name in schemes_in(found) - {"bf16"}:
        bound.quantized.form(name)
    put = place.torch_name
    report = on_progress or (lambda event: None)
    total = 3 + len(found)
    report(Progress(stage="load", total=total, memory_bytes=place.memory_bytes()))

    def done(step: int) -> None:
        report(Progress(stage="load", step=step, total=total, memory_bytes=place.memory_bytes()))

    text = TextEncoder(layout, device=put, text_on=text_on)
    done(1)
    vae = VideoCoder(layout, device=put)
    done(2)
    needs_clip = layout.experts[0].config.get("image_dim") is not None
    clip = ImageEncoder(layout, device=put) if needs_clip else None
    done(3)
    experts = []
    for expert, plan in found:
        floats = "bf16" in policy.precisions
        experts.append(load_expert(expert, plan, bound, device=put, dtype=number, floats=floats))
        done(3 + len(experts))
    second = experts[1] if len(experts) == 2 else None
    return Pipeline(layout, defaults, bound, place, text, vae, experts[0], second, clip, str(model), policy)


def schemes_in(found: Sequence[tuple[Expert, ExpertPlan | None]]) -> set[str]:
    """Those of the layers on codes, planned or stored."""
    return {
        scheme for expert, plan in found for scheme in (plan.schemes if plan else schemes_of(expert).values())
    }


def policy_for(
    asked: str | StepPolicy | None,
    online: Online | None,
    layout: Layout,
    found: Sequence[tuple[Expert, ExpertPlan | None]],
) -> StepPolicy:
    """What was asked for, else the recipe's: of this load, or of the `quantize` that wrote the folder.

    UsageError E-USE-01 for a precision that no weight of the model has.
    """
    if asked is not None:
        policy = StepPolicy.parse(asked) if isinstance(asked, str) else asked
    elif online is not None:
        policy = online.recipe.step_policy
    else:
        record = layout.root / RECORD_FILE
        recipe = read_json(record).get("recipe") if record.is_file() else None
        text = recipe.get("step_policy") if isinstance(recipe, dict) else None
        policy = StepPolicy.parse(text) if isinstance(text, str) and text else StepPolicy()
    if policy != StepPolicy():
        policy.check_schemes(schemes_in(found), floats=all(plan for _, plan in found))
        log.info("step policy %s", policy)
    return policy
