"""What depends on kernels: formats, layers, frames, video files, the self-check."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Mapping
from typing import Any

from behaviour.sources import TINY, draw
from behaviour.values import PROMPT, RECIPES, RULES, SCHEMES, Place, Records, folder, items, outcome, told


def doctor(place: Place) -> Records:
    """The machine, and the self-check of the devices that every machine has."""
    yield from told("doctor/machine", place, "doctor")
    for device in ("cpu", "twin:a2", "twin:a3", "twin:a5"):
        yield from told(f"doctor/self-check {device}", place, "doctor", "--self-check", "--device", device)


def hard_numbers(rows: int, columns: int, dtype: Any) -> Any:
    """Rows of very different sizes, blocks of zeros, subnormals and an outlier."""
    import torch

    x = 20 * draw(rows * columns, rows, columns)
    x = x * torch.exp2(torch.arange(rows).float() * 3 % 23 - 11)[:, None]
    x[0, :32] = 0
    x[1, 5] = 300
    x[2, ::2] = 2.0**-132
    return x.to(dtype)


def formats(place: Place) -> Records:
    """`mx.encode` and `mx.decode` for every format, rule and dtype; odd lengths and the other axis too."""
    import torch

    from ascendit import mx

    for form, rules in RULES.items():
        for rule in rules:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                for rows, columns, axis in ((7, 96, -1), (5, 1111, -1), (70, 33, 0)):
                    x = hard_numbers(rows, columns, dtype)
                    case = f"formats/{form} {rule} {str(dtype)[6:]} {rows}x{columns} axis {axis}"
                    yield from outcome(case, coded, mx, x, form, rule, axis)
        for value in (torch.nan, torch.inf):
            yield from outcome(
                f"formats/{form} of {value}", coded, mx, torch.full((2, 64), value), form, None, -1
            )


def coded(mx: Any, x: Any, form: str, rule: str | None, axis: int) -> dict[str, Any]:
    """Codes, scales, what they decode to, and how far that is from the input."""
    found = mx.encode(x, form, axis=axis, **({"scale_rule": rule} if rule else {}))
    back = mx.decode(found, x.dtype)
    qdata = found.qdata if hasattr(found, "qdata") else found.codes  # its name before version 0.2
    parts = {"codes": qdata, "scale": found.scale, "dual": found.dual_scale, "back": back}
    return parts | {"sqnr": mx.sqnr(x, back)}


def frames(place: Place) -> Records:
    """Frames of the demo: schemes and recipes on each device, online and stored; options; tiny models."""
    import ascendit

    stored = {scheme: place.work / scheme for scheme in SCHEMES}
    for scheme, target in stored.items():
        ascendit.quantize("demo", target, scheme=scheme)
    for device in ("cpu", "twin:a2", "twin:a3", "twin:a5"):
        for online in (None, *SCHEMES):
            if device != "twin:a3" or online in (None, "int8"):
                yield from drawn(f"frames/{device} {online}", 4, "demo", device=device, scheme=online)
        for recipe in RECIPES if device in ("cpu", "twin:a5") else ():
            yield from drawn(f"frames/{device} {recipe}", 2, "demo", device=device, recipe=recipe)
        for scheme, target in stored.items() if device in ("cpu", "twin:a5") else ():
            yield from drawn(f"frames/{device} stored {scheme}", 2, target, device=device)
    for case, options in OPTIONS.items():
        yield from drawn(f"frames/{case}", 2, "demo", **options)
    image = str(place.sources / "image.png")
    for name in (*TINY, "ti2v with an image"):
        model = place.sources / name.partition(" ")[0]
        fields: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5}
        fields |= {"image": image} if "i2v_" in name or "image" in name else {}
        for given in ({}, {"device": "twin:a2"}, {"scheme": "int8", "device": "twin:a5"}):
            case = " ".join([f"frames/{name}", *given.values()])
            yield from drawn(case, 2, model, fields, **given)


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


def drawn(
    key: str, steps: int, model: Any, fields: Mapping[str, Any] | None = None, **options: Any
) -> Records:
    """The frames of one short video."""

    def run() -> Any:
        import ascendit

        given = {"num_frames": 9} if steps < 4 else {}
        pipe = ascendit.load(model, **options)
        return pipe.generate(PROMPT, seed=7, num_inference_steps=steps, **given | dict(fields or {})).frames

    yield from outcome(key, run)


def files(place: Place) -> Records:
    """Video files of every kind, what lies beside them, other solvers; `generate` and `verify` as called."""
    import ascendit

    pipe = ascendit.load("demo", scheme="int8")
    video = pipe.generate(PROMPT, seed=3, num_inference_steps=2, num_frames=9)
    for kind in ("mp4", "webm", "gif", "png"):
        yield from outcome(
            f"files/{kind}", lambda kind=kind: video.save(f"out/v.{kind}", metadata=False).name
        )
    yield from folder("files/written", place.work / "out", place)
    for case, fields in {
        "euler": {"solver": "euler"},
        "timesteps": {"timesteps": [1000, 900, 500]},
        "guidance": {"guidance_scale": 1, "guidance_scale_2": 3, "negative_prompt": "a square"},
        "shift": {"flow_shift": 2.5, "num_inference_steps": 3},
        "size": {"height": 32, "width": 96, "num_frames": 5, "num_inference_steps": 2},
    }.items():
        yield from outcome(
            f"files/{case}", lambda given=fields: pipe.generate(PROMPT, seed=1, **given).frames
        )
    words = ("generate", "--demo", PROMPT, "--seed", 5, "--steps", 2, "--frames", 5, "-o", "cli.mp4")
    yield from told("files/generate", place, *words, "--scheme", "mxfp8")
    yield from items("files/generate/beside", place.json(json.loads((place.work / "cli.json").read_bytes())))
    check = ("verify", "--demo", "--adherence", "--limit", 1, "--seeds", 1)
    yield from told("files/verify", place, *check)
    yield from told("files/verify swapped", place, *check, "--swap-experts")
    stop = threading.Event()
    stop.set()
    yield from outcome("files/cancelled", lambda: pipe.generate(PROMPT, cancel=stop).frames)


def layers(place: Place) -> Records:
    """`quantize_` on modules of other libraries, and what they compute afterwards."""
    import torch
    from torch import nn

    import ascendit

    sys.path.insert(0, str(place.tests))
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
                yield from outcome(f"{case} wan", computed, ascendit, wan, scheme, device, inputs)
                given = (hard_numbers(9, 96, dtype),)
                yield from outcome(f"{case} mlp", computed, ascendit, plain, scheme, device, given)
                yield from outcome(f"{case} mlp cast", lambda model=plain: model.half() and "cast")


def computed(ascendit: Any, module: Any, scheme: str, device: str | None, inputs: Any) -> dict[str, Any]:
    """What `quantize_` reports, and the output of the module."""
    import torch

    report = ascendit.quantize_(module, scheme, device=device)
    with torch.inference_mode():
        found = module(*inputs)
    return {"report": report.lines(), "output": getattr(found, "sample", found)}
