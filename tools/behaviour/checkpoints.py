"""Folders that `quantize` and `repack` write, tensor by tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from behaviour.sources import TINY
from behaviour.values import ENGINES, RECIPES, RULES, SCHEMES, Context, Records, cli_outcome, folder, written


def quantize(context: Context) -> Records:
    """Folders of every scheme, recipe, engine and scale rule, from the demo, tiny models and Wan models."""
    import ascendit

    s, toml = context.sources, str(context.sources / "mixed.toml")
    cases: dict[str, tuple[Any, dict[str, Any]]] = {}
    for scheme in SCHEMES:
        for engine in (None, *ENGINES):
            cases[f"demo {scheme} for {engine}"] = "demo", {"scheme": scheme, "engine": engine}
        for name in (*TINY, "bare.safetensors", "wan_t2v_d64_l6", "wan_ti2v_d128_l1"):
            cases[f"{name} {scheme}"] = s / name, {"scheme": scheme, "force": True}
    for recipe in (*RECIPES, toml):
        for model in ("demo", s / "i2v_21", s / "wan_ti2v_d128_l1"):
            options = {"recipe": recipe, "force": True}
            cases[f"{Path(model).name} {Path(recipe).name}"] = model, options
            cases[f"{Path(model).name} {Path(recipe).name} for mindie"] = (
                model,
                options | {"engine": "mindie"},
            )
    for fmt, rules in RULES.items():
        for rule in rules[1:] if fmt in SCHEMES else ():
            cases[f"rule {fmt} {rule}"] = s / "wan_t2v_d64_l6", {"scheme": fmt, "scale_rule": rule}
    small = s / "t2v_cascade"
    cases |= {
        "keep": (small, {"scheme": "mxfp8", "keep": ["blocks.0.*", "*.to_out.0", "blocks.1.ffn.2"]}),
        "shards": (small, {"scheme": "int8", "max_shard_bytes": 60_000}),
        "copy": (small, {"scheme": "int8", "copy": True, "report": True}),
    }
    for case, (model, options) in cases.items():
        yield from written(f"quantize/{case}", context, ascendit.quantize, model, **options)
    args = ("quantize", "demo", "--scheme", "mxfp4_dualscale", "--report", "--hash")
    yield from cli_outcome("quantize/report", context, *args, "-o", "report")
    smooth = ("--calibrate", 1, "--alpha", 0.8, "--set", "num_inference_steps=2")
    yield from cli_outcome("quantize/calibrated", context, *args, *smooth, "-o", "smooth")
    yield from folder("quantize/calibrated", context.work / "smooth", context)


def lora(context: Context) -> Records:
    """LoRA files of every name style merged: alone, weighted, together and into one expert."""
    import ascendit

    files = {f.stem: str(f) for f in sorted((context.sources / "lora").glob("*.safetensors"))}
    cases = {name: [f"{file}:0.7"] for name, file in files.items()}
    cases["all"] = [files[name] for name in ("comfyui", "kohya", "diffusers", "lokr")]
    cases["each"] = [f"high={files['kohya']}", f"low={files['loha']}:-0.5"]
    for name, loras in cases.items():
        for scheme in ("mxfp8", "bf16") if name == "all" else ("int8",):
            key = f"lora/{name} {scheme}"
            yield from written(key, context, ascendit.quantize, "demo", scheme=scheme, loras=loras)


def repack(context: Context) -> Records:
    """Exports, floats and quantized folders into every layout, and back into Diffusers'."""
    import ascendit

    s, layouts = context.sources, {"diffusers": {"to": "diffusers"}, "wan": {"to": "wan"}}
    targets: dict[str, dict[str, Any]] = {**layouts, **{engine: {"engine": engine} for engine in ENGINES}}
    sources: dict[str, tuple[Any, Any]] = {
        export.name: (export, None) for export in sorted(s.glob("export_*"))
    }
    sources |= {name: (s / name, None) for name in ("wan_t2v_d64_l6", "bare.safetensors")}
    sources["i2v_21"] = s / "i2v_21", s / "i2v_21"
    sources["demo"] = "demo", "demo"
    for model, schemes in (("t2v_cascade", SCHEMES), ("demo", ("mxfp4", "int8"))):
        for scheme in schemes:
            source, new = s / model if model != "demo" else model, context.work / f"from_{model}_{scheme}"
            ascendit.quantize(source, new, scheme=scheme)
            sources[f"{model} {scheme}"] = new, source
    for name, (source, base) in sources.items():
        for target, options in targets.items():
            key = f"repack/{name} to {target}"
            yield from written(key, context, ascendit.repack, source, check=True, **options)
            folder_of_key = context.work / key.replace("/", "_")
            if folder_of_key.is_dir() and target != "diffusers":
                yield from written(f"{key} and back", context, ascendit.repack, folder_of_key, base=base)
    base_model = make_base(context, context.work / "repack_wan_t2v_d64_l6 to diffusers")
    for export in sorted(s.glob("export_t2v*")):
        key = f"repack/{export.name} with a base"
        yield from written(key, context, ascendit.repack, export, base=base_model, copy=True)
    yield from cli_outcome(
        "repack/report", context, "repack", base_model, "-o", "report", "--to", "wan", "--check"
    )


def make_base(context: Context, transformers: Path) -> Path:
    """A Diffusers folder with the configs of these transformers and the demo's other parts."""
    base = context.work / "base"
    shutil.copytree(context.demo, base)
    for expert in ("transformer", "transformer_2"):
        shutil.rmtree(base / expert)
        (base / expert).mkdir()
        shutil.copyfile(transformers / expert / "config.json", base / expert / "config.json")
    return base
