"""Load a model: which numbers its layers have, where they run, and what is checked before a byte is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.device.device import parse_device
from ascendit.kernels.kernel import Emulate
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import Online, policy_for, read_experts, schemes_in
from ascendit.ops.open_device import memory_bytes, open_device, to_dtype
from ascendit.ops.operators import bind
from ascendit.pipeline.defaults import defaults_for
from ascendit.pipeline.generate import Pipeline
from ascendit.pipeline.request import load_record
from ascendit.progress import OnProgress, Progress
from ascendit.schedule import StepSchedule
from ascendit.text.encoders import ImageEncoder, TextEncoder, TextOn
from ascendit.vae.autoencoder import VideoCoder


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    scheme: str | None = None,
    recipe: str | None = None,
    keep: Sequence[str] = (),
    step_policy: str | StepSchedule | None = None,
    emulate: Emulate | bool | None = None,
    activation_rule: str | None = None,
    text_on: TextOn = "device",
    vae_dtype: str | torch.dtype | None = None,
    ops: str | None = None,
    attention: str | None = None,
    nz: bool = False,
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
    prompt. `vae_dtype`: None = float32; bfloat16 takes two thirds of the time, about 50 dB from it. `ops`:
    "reference" or None. `attention`: an NPU's kernel, "fusion" or "fused_infer". `nz`: its weights in
    FRACTAL_NZ where it takes both layouts. `fast_layernorm`: by MindIE-SD where there is one. `force`:
    quantize where accuracy is known to suffer.
    """
    loaded = MappingProxyType(load_record(locals()))  # of the arguments: nothing else has a name yet
    layout = recognise(model_folder(model))
    layout.require_pipeline()
    online = Online.of(scheme, recipe, keep, force=force)
    found = read_experts(layout, online)
    policy = policy_for(step_policy, online, layout, found)
    defaults = defaults_for(layout)
    place = parse_device(device)
    number = to_dtype(place, dtype)
    coder = to_dtype(place, vae_dtype or "float32")
    place = open_device(place)
    bound = bind(
        place,
        ops,
        fast_layernorm=fast_layernorm,
        emulate=emulate,
        activation_rule=activation_rule,
        attention=attention,
        nz=nz,
    )
    bound.quantized.check(schemes_in(found) | ({"w4a8"} & policy.precisions))
    put = place.torch_name
    report = on_progress or (lambda event: None)
    total = 3 + len(found)
    report(Progress(stage="load", total=total, memory_bytes=memory_bytes(place)))

    def done(step: int) -> None:
        report(Progress(stage="load", step=step, total=total, memory_bytes=memory_bytes(place)))

    text = TextEncoder(layout, device=put, text_on=text_on)
    done(1)
    vae = VideoCoder(layout, device=put, dtype=coder)
    done(2)
    needs_clip = layout.experts[0].config.get("image_dim") is not None
    gelu = None if place.exact_gelu else bound.gelu
    clip = ImageEncoder(layout, device=put, gelu=gelu) if needs_clip else None
    done(3)
    experts = []
    for expert, applied in found:
        floats = "bf16" in policy.precisions
        experts.append(load_expert(expert, applied, bound, device=put, dtype=number, floats=floats))
        done(3 + len(experts))
    second = experts[1] if len(experts) == 2 else None
    parts = (text, vae, experts[0], second, clip)
    return Pipeline(layout, defaults, bound, place, *parts, str(model), policy, loaded)
