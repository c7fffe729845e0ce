"""Inputs of the areas: tiny models, damaged copies, LoRA files and exports, made from seeds."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from behaviour.values import Context, Records, sha

TINY = {
    "t2v_cascade": "bfloat16",
    "t2v_single": "float32",
    "ti2v": "bfloat16",
    "i2v_cascade": "bfloat16",
    "i2v_21": "float16",
}
"""Models built by tests/tiny.py -> their dtype."""
DAMAGED = "t2v_single"


def make_sources(context: Context) -> Records:
    """Tiny models, damaged copies, LoRA files, a single weight file, an image. Records their hashes."""
    import torch

    sys.path.insert(0, str(context.tests))
    tiny = importlib.import_module("tiny")
    root = context.sources
    for name, dtype in TINY.items():
        tiny.BUILDERS[name](root / name, dtype=getattr(torch, dtype))
    for damage in tiny.DAMAGES:
        tiny.damage(tiny.copy(root / DAMAGED, root / f"damaged_{damage}"), damage)
    shutil.copytree(root / "ti2v", root / "black")
    edit_tensors(root / "black" / "vae" / tiny.WEIGHTS, blacken)
    make_loras(root)
    fixtures = context.tests / "fixtures" / "msmodelslim" / "source_models"
    for model in sorted(fixtures.iterdir()):
        shutil.copytree(model, root / f"wan_{model.name}")
    standalone = root / f"wan_{model.name}" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(standalone, root / "bare.safetensors")
    for export in sorted((context.tests / "fixtures" / "msmodelslim" / "exports").glob("*/*")):
        shutil.copytree(export, root / f"export_{export.name}")
    make_image(root / "image.png")
    for name in ("text.png", "taken.mp4"):
        (root / name).write_text("neither image nor video")
    damage_exports(root)
    (root / "mixed.toml").write_text(MIXED)
    yield from ((f"sources/{key}", value) for key, value in hashed(root))


MIXED = """about = "three schemes and a rule"

[[rules]]
layers = "*"
scheme = "mxfp4"

[[rules]]
layers = "blocks.0.*"
scheme = "mxfp8"
scale_rule = "floor"

[[rules]]
layers = "*.ffn.net.2"
scheme = "int8"
"""


def hashed(root: Path) -> Records:
    """(name, sha256 of all its files together) of each entry of a folder."""
    for entry in sorted(root.iterdir()):
        files = sorted(f for f in entry.rglob("*") if f.is_file()) if entry.is_dir() else [entry]
        yield entry.name, sha(*(part for f in files for part in (str(f.relative_to(root)), f.read_bytes())))


def edit_tensors(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def damage_exports(root: Path) -> None:
    """Quantized folders with a wrong manifest, wrong scales or wrong names."""
    import torch

    export = root / "export_ti2v_d128_l1__minmax"
    layer = "blocks.0.self_attn.q"
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no_scale": lambda t: t.pop(f"{layer}.weight_scale"),
        "scale_nan": lambda t: t[f"{layer}.weight_scale"].fill_(255),
        "floats": lambda t: t.update({f"{layer}.weight": torch.ones(128, 128)}),
        "two_names": lambda t: t.update({"blocks.0.attn1.to_q.bias": t[f"{layer}.bias"].clone()}),
    }
    for name, edit in edits.items():
        shutil.copytree(export, root / f"damaged_export_{name}")
        (file,) = (root / f"damaged_export_{name}").glob("*.safetensors")
        edit_tensors(file, edit)


def blacken(tensors: dict[str, Any]) -> None:
    """Make a VAE decode everything to black."""
    tensors["decoder.conv_out.weight"].zero_()
    tensors["decoder.conv_out.bias"].fill_(-2)


def make_image(file: Path) -> None:
    """A gradient with a square in it."""
    import numpy
    from PIL import Image

    rows, columns = numpy.mgrid[0:64, 0:64]
    pixels = numpy.stack([4 * rows, 4 * columns, 2 * (rows + columns)], -1).astype("uint8")
    pixels[16:32, 24:48] = (250, 40, 10)
    Image.fromarray(pixels).save(file)


def make_loras(root: Path) -> None:
    """LoRA files for the demo model with the names of several tools, and two invalid ones."""
    from safetensors.torch import save_file

    q, ffn = "blocks.0.self_attn.q", "blocks.1.ffn.0"
    flat = "lora_unet_" + ffn.replace(".", "_")
    diffusers = "transformer.blocks.2.attn2.to_v"
    width, hidden = demo_width(root)
    files = {
        "comfyui": {
            f"diffusion_model.{q}.lora_down.weight": draw(1, 4, width),
            f"diffusion_model.{q}.lora_up.weight": draw(2, width, 4),
            f"diffusion_model.{q}.diff_b": draw(3, width),
            "diffusion_model.blocks.0.norm3.diff": draw(4, width),
        },
        "kohya": {
            f"{flat}.lora_down.weight": draw(5, 4, width),
            f"{flat}.lora_up.weight": draw(6, hidden, 4),
            f"{flat}.alpha": draw(7, 1).abs().reshape(()),
        },
        "diffusers": {
            f"{diffusers}.lora_A.weight": draw(8, 3, width),
            f"{diffusers}.lora_B.weight": draw(9, width, 3),
        },
        "loha": {
            f"{flat}.hada_w1_a": draw(10, hidden, 2),
            f"{flat}.hada_w1_b": draw(11, 2, width),
            f"{flat}.hada_w2_a": draw(12, hidden, 2),
            f"{flat}.hada_w2_b": draw(13, 2, width),
        },
        "lokr": {f"{flat}.lokr_w1": draw(14, 2, 4), f"{flat}.lokr_w2": draw(15, hidden // 2, width // 4)},
        "difference": {f"diffusion_model.{ffn}.diff": draw(16, hidden, width)},
        "misspelt": {"diffusion_model.blocks.0.self_attn.qq.diff": draw(17, width, width)},
        "half": {f"diffusion_model.{q}.lora_down.weight": draw(18, 4, width)},
    }
    (root / "lora").mkdir()
    for name, tensors in files.items():
        save_file(tensors, root / "lora" / f"{name}.safetensors")


def demo_width(root: Path) -> tuple[int, int]:
    """Width and feed-forward width of the demo model."""
    config = json.loads((root / "demo_config.json").read_bytes())
    return config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]


def draw(seed: int, *shape: int) -> Any:
    """Small random numbers from a seed."""
    import torch

    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
