"""Areas that do not depend on kernels: names, flags, error codes, reports and dry runs."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from behaviour.sources import TINY
from behaviour.values import ENGINES, PROMPT, RECIPES, SCHEMES, Context, Records, cli, cli_outcome, items


def names(context: Context) -> Records:
    """Public names and their parameters with defaults. Annotations are omitted: they name internal types."""
    import ascendit

    for module in ("ascendit", "ascendit.mx", "ascendit.twin"):
        public = sorted(importlib.import_module(module).__all__)
        yield f"names/{module}/__all__", " ".join(public)
        for name in public:
            yield f"names/{module}/{name}", signature(getattr(importlib.import_module(module), name))
    for owner in (ascendit.Pipeline, ascendit.Video, ascendit.AscenditError):
        for name in ("load", "generate", "run", "request", "warm_up", "save", "describe", "as_dict"):
            if hasattr(owner, name):
                yield f"names/{owner.__name__}/{name}", signature(getattr(owner, name))


def signature(value: Any) -> str:
    """Parameters of a callable without annotations, else its type; for `FORMATS` the keys and their rules."""
    if isinstance(value, dict):
        return " ".join(f"{key}: {getattr(v, 'rules', '')}" for key, v in value.items())
    if not callable(value):
        return type(value).__name__
    full = inspect.signature(value)
    empty = inspect.Parameter.empty
    plain = [p.replace(annotation=empty) for p in full.parameters.values()]
    return str(full.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def flags(context: Context) -> Records:
    """Commands and their flags with their help texts, from --help."""
    top = cli(context, "--help").stdout
    yield "flags/ascendit/help", top
    for command in re.findall(r"(?m)^  ([a-z]+)  ", top.partition("Commands:")[2]):
        text = cli(context, command, "--help").stdout
        about, _, options = text.partition("Options:")
        yield f"flags/{command}/:about", about
        yield f"flags/{command}/:order", " ".join(re.findall(r"(?m)^  (-\S.*?)(?:  |$)", options))
        for entry in re.split(r"\n  (?=-)", options)[1:]:
            line = " ".join(entry.split())
            yield f"flags/{command}/{line.partition(' ')[0].rstrip(',')}", line


def codes(context: Context) -> Records:
    """Error codes and their meanings; classes with their bases and exit codes."""
    errors: Any = importlib.import_module("ascendit.errors")
    for code, meaning in errors.ERROR_CODES.items():
        yield f"codes/{code}/meaning", meaning
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.AscenditError):
            bases = " ".join(base.__name__ for base in value.__mro__[1:-2])
            yield f"codes/{name}/class", f"exit {value.exit_code}, below {bases}"


def wrong_calls(context: Context) -> dict[str, tuple[Any, ...]]:
    """Calls with a mistake, or with a damaged model."""
    s, demo = context.sources, ("generate", "--demo", PROMPT)
    q = ("quantize", "demo", "-o", "new")
    lora = [
        (*q, "--scheme", "int8", "--lora", s / "lora" / f)
        for f in ("misspelt.safetensors", "half.safetensors")
    ]
    return {
        "frames": (*demo, "--frames", 16),
        "size": (*demo, "--size", "100x64"),
        "size text": (*demo, "--size", "wide"),
        "steps": (*demo, "--steps", 0),
        "guidance": (*demo, "--guidance", "much"),
        "setting": (*demo, "--set", "solvr=euler"),
        "setting value": (*demo, "--set", "solver=heun"),
        "flag": (*demo, "--stpes", 4),
        "no prompt": ("generate", "--demo"),
        "extension": (*demo, "-o", "video.avi"),
        "folder": (*demo, "-o", "/proc/none/video.mp4"),
        "exists": (*demo, "-o", s / "taken.mp4"),
        "device": (*demo, "--device", "gpu"),
        "no cuda": (*demo, "--device", "cuda:7"),
        "no npu": (*demo, "--device", "npu"),
        "no matmul": (*demo, "--device", "twin:a2", "--scheme", "mxfp8"),
        "scheme": (*demo, "--scheme", "mxfp9"),
        "scheme and recipe": (*demo, "--scheme", "int8", "--recipe", "ascend-w4a4"),
        "policy": (*demo, "--scheme", "int8", "--step-policy", "0-1:w4a8"),
        "policy steps": (*demo, "--scheme", "mxfp4", "--steps", 2, "--step-policy", "5:w4a8"),
        "config": (*demo, "--config", s / "mixed.toml"),
        "image refused": (*demo, "--image", s / "image.png"),
        "image needed": ("generate", s / "i2v_cascade", PROMPT),
        "image damaged": ("generate", s / "i2v_cascade", PROMPT, "--image", s / "text.png"),
        "black": ("generate", s / "black", PROMPT, "--size", "32x32", "--frames", 5, "--steps", 1),
        "no model": ("inspect", "nowhere"),
        "no hub": ("inspect", "hf:no/such"),
        "empty folder": ("inspect", context.work),
        "no scheme": q,
        "quantize scheme": (*q, "--scheme", "mxfp9"),
        "quantize rule": (*q, "--scheme", "int8", "--scale-rule", "ceil"),
        "quantize recipe": (*q, "--recipe", "ascend-w9"),
        "quantize pattern": (*q, "--scheme", "int8", "--keep", "blocks.0.atn1.*"),
        "quantize exists": ("quantize", "demo", "-o", s / "ti2v", "--scheme", "int8"),
        "quantize inside": ("quantize", s / "ti2v", "-o", s / "ti2v" / "new", "--scheme", "int8"),
        "quantize again": ("quantize", s / "export_t2v_d64_l6__int8", "-o", "new", "--scheme", "int8"),
        "quantize ti2v": ("quantize", s / "ti2v", "-o", "new", "--scheme", "mxfp4"),
        "quantize engine": (*q, "--scheme", "mxfp4_dualscale", "--for", "sglang"),
        "quantize no engine": (*q, "--scheme", "int8", "--for", "tensorrt"),
        "quantize alpha": (*q, "--scheme", "int8", "--alpha", 0.5),
        "quantize lora misspelt": lora[0],
        "quantize lora half": lora[1],
        "quantize no lora": (*q, "--scheme", "int8", "--lora", "none.safetensors"),
        "repack float": ("repack", "demo", "-o", "new", "--for", "mindie"),
        "repack names": ("repack", "demo", "-o", "new", "--to", "comfyui"),
        "repack base": ("repack", s / "export_t2v_d64_l6__int8", "-o", "new", "--base", "demo"),
        "verify nothing": ("verify", "--demo"),
        "doctor chip": ("doctor", "--self-check", "--device", "twin:a9"),
    }


def errors(context: Context) -> Records:
    """Exit status and error code for wrong calls and damaged models; the texts are under `messages/`."""
    for case, args in wrong_calls(context).items():
        yield from cli_outcome(f"errors/{case}", context, *args)
    for broken in sorted(context.sources.glob("damaged_*")):
        yield from cli_outcome(f"errors/inspect {broken.name}", context, "inspect", broken)
        exported = broken.name.startswith("damaged_export")
        command, *flags_of_command = ("repack", "--check") if exported else ("quantize", "--scheme", "mxfp8")
        yield from cli_outcome(
            f"errors/{command} {broken.name}", context, command, broken, "-o", "new", *flags_of_command
        )
    nan = ("generate", context.sources / "damaged_nan_weights", PROMPT, "--size", "32x32", "--steps", 1)
    yield from cli_outcome("errors/not finite", context, *nan, "--frames", 5)


def reports(context: Context) -> Records:
    """`inspect`, as JSON and as text, of every source and of quantized models; `--layers` and `--diff`."""
    import ascendit

    for scheme in ("mxfp8", "mxfp4"):
        ascendit.quantize("demo", context.work / scheme, scheme=scheme)
    ascendit.repack(context.work / "mxfp8", context.work / "mindie", engine="mindie")
    s = context.sources
    folders = [s / name for name in (*TINY, "bare.safetensors")] + sorted(
        [*s.glob("wan_*"), *s.glob("export_*")]
    )
    models: list[Any] = ["demo", "mxfp8", "mxfp4", "mindie", *folders]
    for model in models:
        case = f"inspect/{getattr(model, 'name', model)}"
        yield from cli_outcome(case, context, "inspect", model)
        yield from items(f"{case}/text", "\n".join(ascendit.inspect(model).lines()))
    for model in ("demo", "mxfp8", s / "export_t2v_d64_l6__dualscale_smooth_bf16fallback"):
        yield from cli_outcome(
            f"inspect/{getattr(model, 'name', model)} layers", context, "inspect", model, "--layers"
        )
    yield from cli_outcome("inspect/diff", context, "inspect", "mxfp8", "--diff", "mxfp4")
    yield from cli_outcome("inspect/diff of the same", context, "inspect", "mxfp8", "--diff", "mindie")


def dry_runs(context: Context) -> Records:
    """`--dry-run --json` of the three commands that have the flag."""
    s = context.sources
    run = ("--seed", 1, "-o", "video.mp4", "--dry-run")
    generate: dict[str, tuple[Any, ...]] = {
        "demo": ("--demo", PROMPT),
        "demo scheme": (
            "--demo",
            PROMPT,
            "--scheme",
            "mxfp4",
            "--device",
            "twin:a5",
            "--step-policy",
            "0:w4a8",
        ),
        "demo settings": ("--demo", PROMPT, "--set", "solver=euler", "--guidance", "3,2", "--seconds", 1.5),
        "demo recipe": ("--demo", PROMPT, "--recipe", s / "mixed.toml", "--steps", 8),
        **{
            name: (s / name, PROMPT, *(("--image", s / "image.png") if "i2v_" in name else ()))
            for name in TINY
        },
    }
    for case, args in generate.items():
        yield from cli_outcome(f"dry-run/generate {case}", context, "generate", *args, *run)
    for model in ("demo", *(s / name for name in TINY), *sorted(s.glob("wan_*"))):
        for scheme in SCHEMES if model == "demo" else ("mxfp4",):
            args = ("quantize", model, "-o", "new", "--scheme", scheme, "--dry-run", "--force")
            yield from cli_outcome(
                f"dry-run/quantize {getattr(model, 'name', model)} {scheme}", context, *args
            )
    for recipe in (*RECIPES, s / "mixed.toml"):
        args = ("quantize", "demo", "-o", "new", "--recipe", recipe, "--dry-run")
        yield from cli_outcome(f"dry-run/quantize demo {getattr(recipe, 'name', recipe)}", context, *args)
    for export in sorted(s.glob("export_*")):
        for to in (("--to", "diffusers"), ("--to", "wan"), *(("--for", engine) for engine in ENGINES)):
            args = ("repack", export, "-o", "new", *to, "--dry-run")
            yield from cli_outcome(f"dry-run/repack {export.name} {to[1]}", context, *args)
