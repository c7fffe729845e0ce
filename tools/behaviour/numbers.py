"""Areas that depend on kernels: formats, layers, frames, video files, the self-check."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Mapping
from typing import Any

from behaviour.sources import TINY, draw
from behaviour.values import (
    PROMPT,
    RECIPES,
    RULES,
    SCHEMES,
    Context,
    Records,
    cli_outcome,
    folder,
    items,
    outcome,
)


def doctor(context: Context) -> Records:
    """The machine, and the self-check of the CPU and the twins."""
    yield from cli_outcome("doctor/machine", context, "doctor")
    for device in ("cpu", "twin:a2", "twin:a3", "twin:a5"):
        yield from cli_outcome(
            f"doctor/self-check {device}", context, "doctor", "--self-check", "--device", device
        )


def hard_numbers(rows: int, columns: int, dtype: Any) -> Any:
    """Rows of very different magnitudes, a block of zeros, subnormals and an outlier."""
    import torch

    x = 20 * draw(rows * columns, rows, columns)
    x = x * torch.exp2(torch.arange(rows).float() * 3 % 23 - 11)[:, None]
    x[0, :32] = 0
    x[1, 5] = 300
    x[2, ::2] = 2.0**-132
    return x.to(dtype)


def formats(context: Context) -> Records:
    """`mx.encode` and `mx.decode` for every format, rule and dtype; odd lengths and the other axis too."""
    import torch

    from ascendit import mx

    for fmt, rules in RULES.items():
        for rule in rules:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for rows, columns, axis in ((7, 96, -1), (5, 1111, -1), (70, 33, 0)):
                    x = hard_numbers(rows, columns, dtype)
                    case = f"formats/{fmt} {rule} {str(dtype)[6:]} {rows}x{columns} axis {axis}"
                    yield from outcome(case, encode_and_decode, mx, x, fmt, rule, axis)
        for value in (torch.nan, torch.inf):
            yield from outcome(
                f"formats/{fmt} of {value}", encode_and_decode, mx, torch.full((2, 64), value), fmt, None, -1
            )


def encode_and_decode(mx: Any, x: Any, fmt: str, rule: str | None, axis: int) -> dict[str, Any]:
    """Quantized values, scales, decoded values, and their SQNR."""
    encoded = mx.encode(x, fmt, axis=axis, **({"scale_rule": rule} if rule else {}))
    back = mx.decode(encoded, x.dtype)
    qdata = encoded.qdata if hasattr(encoded, "qdata") else encoded.codes  # the name before version 0.2
    parts = {"codes": qdata, "scale": encoded.scale, "dual": encoded.dual_scale, "back": back}
    return parts | {"sqnr": mx.sqnr(x, back)}


def frames(context: Context) -> Records:
    """Frames of the demo: schemes and recipes on each device, online and stored; options; tiny models."""
    import ascendit

    stored = {scheme: context.work / scheme for scheme in SCHEMES}
    for scheme, target in stored.items():
        ascendit.quantize("demo", target, scheme=scheme)
    for device in ("cpu", "twin:a2", "twin:a3", "twin:a5"):
        for online in (None, *SCHEMES):
            if device != "twin:a3" or online in (None, "int8"):
                yield from video_frames(f"frames/{device} {online}", 4, "demo", device=device, scheme=online)
        for recipe in RECIPES if device in ("cpu", "twin:a5") else ():
            yield from video_frames(f"frames/{device} {recipe}", 2, "demo", device=device, recipe=recipe)
        for scheme, target in stored.items() if device in ("cpu", "twin:a5") else ():
            yield from video_frames(f"frames/{device} stored {scheme}", 2, target, device=device)
    for case, options in OPTIONS.items():
        yield from video_frames(f"frames/{case}", 2, "demo", **options)
    image = str(context.sources / "image.png")
    for name in (*TINY, "ti2v with an image"):
        model = context.sources / name.partition(" ")[0]
        fields: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5}
        fields |= {"image": image} if "i2v_" in name or "image" in name else {}
        for options in ({}, {"device": "twin:a2"}, {"scheme": "int8", "device": "twin:a5"}):
            case = " ".join([f"frames/{name}", *options.values()])
            yield from video_frames(case, 2, model, fields, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "vae in bfloat16": {"vae_dtype": "bfloat16"},
    "reference": {"ops": "reference"},
    "reference mxfp8": {"ops": "reference", "scheme": "mxfp8"},
    "text on cpu": {"text_on": "cpu", "device": "twin:a5"},
    "text dropped": {"text_on": "drop"},
    "policy w4a8": {"scheme": "mxfp4", "step_policy": "0:w4a8,default:w4a4"},
    "policy w4a8 twin:a5": {"scheme": "mxfp4", "step_policy": "0:w4a8,default:w4a4", "device": "twin:a5"},
    "policy bf16": {"scheme": "mxfp4", "step_policy": "0:bf16,default:w4a4"},
    "rule": {"scheme": "mxfp4", "activation_rule": "mxfp4=floor"},
    "keep": {"scheme": "int8", "keep": ["blocks.0.*"]},
    "decode-once": {"scheme": "mxfp4", "emulate": "decode-once"},
    "decode-once twin:a2": {"scheme": "mxfp8", "emulate": "decode-once", "device": "twin:a2"},
    "decode-on-use twin:a2": {"scheme": "mxfp4_dualscale", "emulate": "decode-on-use", "device": "twin:a2"},
    "decode-on-use fp8 twin:a3": {"scheme": "fp8", "emulate": "decode-on-use", "device": "twin:a3"},
    "fused_infer twin:a2": {"attention": "fused_infer", "device": "twin:a2"},
    "fused_infer twin:a5": {"attention": "fused_infer", "device": "twin:a5"},
    "nz int8 twin:a2": {"scheme": "int8", "nz": True, "device": "twin:a2"},
    "nz mxfp8 twin:a5": {"scheme": "mxfp8", "nz": True, "device": "twin:a5"},
    "layernorm twin:a5": {"fast_layernorm": True, "device": "twin:a5"},
}
"""Case -> options of `ascendit.load`."""


def video_frames(
    key: str, steps: int, model: Any, fields: Mapping[str, Any] | None = None, **options: Any
) -> Records:
    """The frames of a short video."""

    def run() -> Any:
        import ascendit

        length = {"num_frames": 9} if steps < 4 else {}
        pipe = ascendit.load(model, **options)
        return pipe.generate(PROMPT, seed=7, num_inference_steps=steps, **length | dict(fields or {})).frames

    yield from outcome(key, run)


def files(context: Context) -> Records:
    """Video files of every type, their JSON files, other solvers; the commands `generate` and `verify`."""
    import ascendit

    pipe = ascendit.load("demo", scheme="int8")
    video = pipe.generate(PROMPT, seed=3, num_inference_steps=2, num_frames=9)
    for kind in ("mp4", "webm", "gif", "png"):
        yield from outcome(
            f"files/{kind}", lambda kind=kind: video.save(f"out/v.{kind}", metadata=False).name
        )
    yield from folder("files/written", context.work / "out", context)
    for case, fields in {
        "euler": {"solver": "euler"},
        "timesteps": {"timesteps": [1000, 900, 500]},
        "guidance": {"guidance_scale": 1, "guidance_scale_2": 3, "negative_prompt": "a square"},
        "shift": {"flow_shift": 2.5, "num_inference_steps": 3},
        "size": {"height": 32, "width": 96, "num_frames": 5, "num_inference_steps": 2},
    }.items():
        yield from outcome(
            f"files/{case}", lambda fields=fields: pipe.generate(PROMPT, seed=1, **fields).frames
        )
    args = ("generate", "--demo", PROMPT, "--seed", 5, "--steps", 2, "--frames", 5, "-o", "cli.mp4")
    yield from cli_outcome("files/generate", context, *args, "--scheme", "mxfp8")
    yield from items(
        "files/generate/beside", context.json(json.loads((context.work / "cli.json").read_bytes()))
    )
    check = ("verify", "--demo", "--adherence", "--limit", 1, "--seeds", 1)
    yield from cli_outcome("files/verify", context, *check)
    yield from cli_outcome("files/verify swapped", context, *check, "--swap-experts")
    stop = threading.Event()
    stop.set()
    yield from outcome("files/cancelled", lambda: pipe.generate(PROMPT, cancel=stop).frames)


def layers(context: Context) -> Records:
    """`quantize_` on modules of other libraries, and their outputs."""
    import torch
    from torch import nn

    import ascendit

    sys.path.insert(0, str(context.tests))
    tiny = importlib.import_module("tiny")
    x, t, text = draw(1, 1, 16, 2, 8, 8), torch.tensor([700]), draw(2, 1, 9, tiny.TEXT_DIM)
    for dtype in (torch.float32, torch.bfloat16):
        for device in (None, "twin:a2", "twin:a5"):
            for scheme in SCHEMES:
                wan = tiny.transformer(3).to(dtype)
                torch.manual_seed(1)
                plain = nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 64, bias=False)).to(dtype)
                case = f"layers/{scheme} {str(dtype)[6:]} {device}"
                inputs = 20 * x.to(dtype), t, 20 * text.to(dtype)
                yield from outcome(f"{case} wan", quantize_and_run, ascendit, wan, scheme, device, inputs)
                activation = (hard_numbers(9, 96, dtype),)
                yield from outcome(
                    f"{case} mlp", quantize_and_run, ascendit, plain, scheme, device, activation
                )
                yield from outcome(f"{case} mlp cast", lambda model=plain: model.half() and "cast")


def quantize_and_run(
    ascendit: Any, module: Any, scheme: str, device: str | None, inputs: Any
) -> dict[str, Any]:
    """The report of `quantize_`, and the output of the module."""
    import torch

    report = ascendit.quantize_(module, scheme, device=device)
    with torch.inference_mode():
        output = module(*inputs)
    return {"report": report.lines(), "output": getattr(output, "sample", output)}
