"""Record what ascendit does, and compare two recordings: for changes that must not change behaviour.

    python tools/record_behaviour.py record before.json                     # takes some minutes
    python tools/record_behaviour.py record after.json --package ../other/src --only quantize repack
    python tools/record_behaviour.py compare before.json after.json --ignore messages

A recording is one flat JSON object, `mode/area/case/item` -> a sha256 of a tensor, or a short text. `mode` is
`on` or `off`, with the native kernels and without, or `any` where they cannot matter. Each area runs in a
process of its own on the package at `--package`. Only the command line and documented Python names are used,
so that files of the package may move between two recordings.

The native kernels are turned off by a PATH without a compiler, which is checked with `doctor`. Recordings can
be compared if both were made on one machine, with the same libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SCHEMES = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")
RECIPES = ("recommended-fp4", "ascend-w8a8f8", "ascend-w4a4", "ascend-w4a4f4", "dualscale-bf16-5")
ENGINES = ("vllm-omni", "sglang", "mindie")
PROMPT = "a red circle moves right on a black background"
Records = Iterator[tuple[str, str]]

# ---- what is volatile -------------------------------------------------------------------------------------

VOLATILE = {
    "seconds": "time that a run took",
    "microseconds": "time that a call took",
    "gib_per_s": "speed of a run",
    "made": "date of a report",
    "machine": "kernel of the system",
    "versions": "of Python and the libraries",
}
"""Keys of JSON objects whose value is replaced by `-`, and what they hold."""
FREE = ("memory", "this folder", "platform")
"""Rows of `doctor` whose finding changes from run to run: free memory, free disk, kernel of the system."""
NUMBER = re.compile(r"\b\d+(\.\d+)+\S*")
"""Versions of libraries, in what `doctor` found and in the table of a model card."""
SOURCE_FILE = re.compile(r"\(\w+\.py\)")
"""A file of the package that a text names, as where defaults come from: files may move."""
LONG = 20_000
"""Characters. A longer text is recorded as its sha256."""


@dataclass(frozen=True)
class Place:
    """Where one area works. `names`: folders whose paths are replaced in texts, and by what."""

    work: Path
    sources: Path
    tests: Path
    demo: Path
    names: Mapping[str, str]

    def text(self, text: str) -> str:
        """Paths of folders that differ from run to run by name; then what else is volatile in any text."""
        for path, name in sorted(self.names.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(path, name)
        text = SOURCE_FILE.sub("(<file>)", text)
        return re.sub(r"(?m)^(\| (?:ascendit|torch) \|) \S+ \|$", r"\1 - |", text)

    def json(self, value: Any) -> str:
        """A JSON value as text, without what is volatile."""
        return self.text(json.dumps(scrubbed(value), indent=1, ensure_ascii=False))


def scrubbed(value: Any) -> Any:
    """A JSON value without what is in VOLATILE, and without what `doctor` measured."""
    if isinstance(value, list):
        return [scrubbed(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {key: "-" if key in VOLATILE else scrubbed(v) for key, v in value.items()}
    if {"item", "found", "status"} <= kept.keys():
        kept["found"] = "-" if kept["item"] in FREE else NUMBER.sub("-", str(kept["found"]))
    return kept


# ---- values -----------------------------------------------------------------------------------------------


def sha(*parts: bytes | str) -> str:
    """sha256 of the parts, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def items(key: str, value: Any) -> Records:
    """A value and what is in it: tensors and arrays as sha256 of dtype, shape and bytes, the rest as text."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from items(f"{key}.{name}", part)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from items(f"{key}.{i}", part)
    elif type(value).__name__ == "ndarray":
        yield key, sha(f"{value.dtype} {list(value.shape)}", value.tobytes())
    elif hasattr(value, "untyped_storage"):
        import torch

        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield key, sha(f"{value.dtype} {list(value.shape)}", data)
    else:
        text = str(value)
        yield key, text if len(text) <= LONG else f"sha256 {sha(text)} of {len(text)} characters"


def outcome(key: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Records:
    """The items of what a call returns; for an error its class and code, and its text below `messages/`."""
    try:
        value = call(*args, **kwargs)
    except Exception as error:
        yield key, f"refused: {type(error).__name__} {getattr(error, 'code', '')}".rstrip()
        yield f"messages/{key}", str(error)
    else:
        yield from items(key, value)


def safetensors(key: str, file: Path) -> Records:
    """Every tensor of a file by name, its bytes unread by any library; then their order and the metadata."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        yield f"{key}/{name}", sha(f"{entry['dtype']} {entry['shape']}", data[start + first : start + last])
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    yield f"{key}/:order", sha("\n".join(order))
    yield f"{key}/:metadata", json.dumps(metadata, sort_keys=True)


def folder(key: str, path: Path, place: Place) -> Records:
    """Every file below `path`. Links by their targets, JSON and text by content, other files by sha256."""
    for file in sorted(path.rglob("*")):
        name = f"{key}/{file.relative_to(path)}"
        if file.is_symlink():
            yield name, f"link to {os.readlink(file)}"
        elif file.suffix == ".safetensors":
            yield f"{name}/:mode", oct(file.stat().st_mode & 0o777)
            yield from safetensors(name, file)
        elif file.suffix == ".json":
            yield from items(name, place.json(json.loads(file.read_bytes())))
        elif file.suffix in (".md", ".toml", ".yaml", ".txt"):
            yield from items(name, place.text(file.read_text(encoding="utf-8")))
        elif file.is_file():
            yield name, sha(file.read_bytes())


def made(key: str, place: Place, call: Callable[..., Any], source: Any, **options: Any) -> Records:
    """What `quantize` or `repack` writes into a new folder, named after the case, or how it refuses."""
    target = place.work / key.replace("/", "_")
    yield from outcome(f"{key}/:end", lambda: call(source, target, **options) and "done")
    if target.is_dir():
        yield from folder(key, target, place)


def cli(place: Place, *words: Any) -> subprocess.CompletedProcess[str]:
    """One call of the command line, in the folder of the area."""
    command = [sys.executable, "-m", "ascendit", *map(str, words)]
    return subprocess.run(command, cwd=place.work, capture_output=True, text=True, timeout=900)


def told(key: str, place: Place, *words: Any) -> Records:
    """The exit status of a call with --json, and its object; errors as in `outcome`."""
    done = cli(place, *words, "--json")
    try:
        value = json.loads(done.stdout)
    except ValueError:
        value = {"stdout": done.stdout, "stderr": done.stderr[-2000:]}
    error = value.pop("error", None) if isinstance(value, dict) else None
    yield f"{key}/exit", f"{done.returncode} {error['code'] if error else ''}".rstrip()
    if error:
        yield f"messages/{key}", place.json(error)
    if value:
        yield from items(f"{key}/json", place.json(value))


# ---- sources: what the areas work on, made anew from seeds ------------------------------------------------

TINY = {
    "t2v_cascade": "bfloat16",
    "t2v_single": "float32",
    "ti2v": "bfloat16",
    "i2v_cascade": "bfloat16",
    "i2v_21": "float16",
}
"""Models that tests/tiny.py builds, and in which dtype."""
DAMAGED = "t2v_single"


def make_sources(place: Place) -> Records:
    """Tiny models, damaged copies of one, LoRA files, a bare file, an image; their content is recorded."""
    import torch

    sys.path.insert(0, str(place.tests))
    tiny = importlib.import_module("tiny")
    root = place.sources
    for name, dtype in TINY.items():
        tiny.BUILDERS[name](root / name, dtype=getattr(torch, dtype))
    for how in tiny.DAMAGES:
        tiny.damage(tiny.copy(root / DAMAGED, root / f"damaged_{how}"), how)
    shutil.copytree(root / "ti2v", root / "black")
    edit_tensors(root / "black" / "vae" / tiny.WEIGHTS, blacken)
    make_loras(root)
    fixtures = place.tests / "fixtures" / "msmodelslim" / "source_models"
    for model in sorted(fixtures.iterdir()):
        shutil.copytree(model, root / f"wan_{model.name}")
    bare = root / f"wan_{model.name}" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(bare, root / "bare.safetensors")
    for export in sorted((place.tests / "fixtures" / "msmodelslim" / "exports").glob("*/*")):
        shutil.copytree(export, root / f"export_{export.name}")
    make_image(root / "image.png")
    (root / "text.png").write_text("no image")
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
    """sha256 of all files of a folder together, for each entry of it."""
    for entry in sorted(root.iterdir()):
        files = sorted(f for f in entry.rglob("*") if f.is_file()) if entry.is_dir() else [entry]
        yield entry.name, sha(*(part for f in files for part in (str(f.relative_to(root)), f.read_bytes())))


def edit_tensors(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def blacken(tensors: dict[str, Any]) -> None:
    """A VAE that makes a black video of anything."""
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
    """LoRA files for the demo model, in the names of several tools, and two that fit nothing."""
    from safetensors.torch import save_file

    q, ffn, wide = "blocks.0.self_attn.q", "blocks.1.ffn.0", demo_width(root)
    flat = "lora_unet_" + ffn.replace(".", "_")
    diffusers = "transformer.blocks.2.attn2.to_v"
    width, hidden = wide
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
    """Small random numbers, the same for one seed."""
    import torch

    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- areas: what does not depend on kernels ---------------------------------------------------------------


def names(place: Place) -> Records:
    """Public names and their arguments with defaults. Annotations are left out: they name internal types."""
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
    """Arguments of a callable, without annotations; else the type. `FORMATS`: its keys and their rules."""
    if isinstance(value, dict):
        return " ".join(f"{key}: {getattr(v, 'rules', '')}" for key, v in value.items())
    if not callable(value):
        return type(value).__name__
    found = inspect.signature(value)
    empty = inspect.Parameter.empty
    plain = [p.replace(annotation=empty) for p in found.parameters.values()]
    return str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def flags(place: Place) -> Records:
    """Commands, and the flags of each with their words, from --help."""
    top = cli(place, "--help").stdout
    yield "flags/ascendit/help", top
    for command in re.findall(r"(?m)^  ([a-z]+)  ", top.partition("Commands:")[2]):
        text = cli(place, command, "--help").stdout
        about, _, options = text.partition("Options:")
        yield f"flags/{command}/:about", about
        yield f"flags/{command}/:order", " ".join(re.findall(r"(?m)^  (-\S.*?)(?:  |$)", options))
        for entry in re.split(r"\n  (?=-)", options)[1:]:
            words = " ".join(entry.split())
            yield f"flags/{command}/{words.partition(' ')[0].rstrip(',')}", words


def codes(place: Place) -> Records:
    """Error codes and what they mean; classes with their bases and exit codes."""
    errors = importlib.import_module("ascendit.errors")
    for code, meaning in errors.CODES.items():
        yield f"codes/{code}/meaning", meaning
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.AscenditError):
            bases = " ".join(base.__name__ for base in value.__mro__[1:-2])
            yield f"codes/{name}/class", f"exit {value.exit_code}, below {bases}"


def wrong_calls(place: Place) -> dict[str, tuple[Any, ...]]:
    """Calls that a user gets wrong, or that meet a damaged model."""
    s, demo = place.sources, ("generate", "--demo", PROMPT)
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
        "exists": (*demo, "-o", s / "image.png"),
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
        "empty folder": ("inspect", place.work),
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


def errors(place: Place) -> Records:
    """Exit status and code of wrong calls, and of damaged models; their texts are below `messages/`."""
    for case, words in wrong_calls(place).items():
        yield from told(f"errors/{case}", place, *words)
    for broken in sorted(place.sources.glob("damaged_*")):
        yield from told(f"errors/inspect {broken.name}", place, "inspect", broken)
        words = ("quantize", broken, "-o", "new", "--scheme", "mxfp8", "--dry-run")
        yield from told(f"errors/quantize {broken.name}", place, *words)
    nan = ("generate", place.sources / "damaged_nan_weights", PROMPT, "--size", "32x32", "--steps", 1)
    yield from told("errors/not finite", place, *nan, "--frames", 5)


def reports(place: Place) -> Records:
    """`inspect`, as JSON and as text, of every source and of what was quantized; `--layers` and `--diff`."""
    import ascendit

    for scheme in ("mxfp8", "mxfp4"):
        ascendit.quantize("demo", place.work / scheme, scheme=scheme)
    ascendit.repack(place.work / "mxfp8", place.work / "mindie", engine="mindie")
    s = place.sources
    found = [s / name for name in (*TINY, "bare.safetensors")] + sorted(
        [*s.glob("wan_*"), *s.glob("export_*")]
    )
    for model in ("demo", "mxfp8", "mxfp4", "mindie", *found):
        case = f"inspect/{getattr(model, 'name', model)}"
        yield from told(case, place, "inspect", model)
        yield from items(f"{case}/text", "\n".join(ascendit.inspect(model).lines()))
    for model in ("demo", "mxfp8", s / "export_t2v_d64_l6__dualscale_smooth_bf16fallback"):
        yield from told(
            f"inspect/{getattr(model, 'name', model)} layers", place, "inspect", model, "--layers"
        )
    yield from told("inspect/diff", place, "inspect", "mxfp8", "--diff", "mxfp4")
    yield from told("inspect/diff of the same", place, "inspect", "mxfp8", "--diff", "mindie")


def dry_runs(place: Place) -> Records:
    """`--dry-run --json` of the three commands that have it."""
    s = place.sources
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
    for case, words in generate.items():
        yield from told(f"dry-run/generate {case}", place, "generate", *words, *run)
    for model in ("demo", *(s / name for name in TINY), *sorted(s.glob("wan_*"))):
        for scheme in SCHEMES:
            words = ("quantize", model, "-o", "new", "--scheme", scheme, "--dry-run", "--force")
            yield from told(f"dry-run/quantize {getattr(model, 'name', model)} {scheme}", place, *words)
    for recipe in (*RECIPES, s / "mixed.toml"):
        words = ("quantize", "demo", "-o", "new", "--recipe", recipe, "--dry-run")
        yield from told(f"dry-run/quantize demo {getattr(recipe, 'name', recipe)}", place, *words)
    for export in sorted(s.glob("export_*")):
        for to in (("--to", "diffusers"), ("--to", "wan"), *(("--for", engine) for engine in ENGINES)):
            words = ("repack", export, "-o", "new", *to, "--dry-run")
            yield from told(f"dry-run/repack {export.name} {to[1]}", place, *words)


# ---- areas: numbers, with and without native kernels ------------------------------------------------------

RULES = {
    "mxfp8": ("ceil", "floor", "pow2", "even", "msms:minmax", "msms:minmax_bf16", "msms:mse_round"),
    "mxfp8_e5m2": ("ceil", "floor", "pow2", "even"),
    "mxfp4": (
        *("max:7", "max:6.5", "ceil", "floor", "pow2", "even", "msms:minmax", "msms:minmax_bf16"),
        *("msms:ceil_x:8", "msms:fouroversix"),
    ),
    "mxfp4_dualscale": ("floor", "msms:dualscale"),
    "int8": ("amax", "msms:int8", "msms:int8_legacy"),
    "fp8": ("amax",),
    "fp8_128x128": ("amax",),
}
"""Format -> its scale rules, as docs/formats.md lists them."""


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
    parts = {"codes": found.codes, "scale": found.scale, "dual": found.dual_scale, "back": back}
    return parts | {"sqnr": mx.sqnr(x, back)}


def quantize(place: Place) -> Records:
    """Folders of every scheme, recipe, engine and scale rule: of the demo, tiny models, exports' sources."""
    import ascendit

    s, toml = place.sources, str(place.sources / "mixed.toml")
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
    for form, rules in RULES.items():
        for rule in rules[1:] if form in SCHEMES else ():
            cases[f"rule {form} {rule}"] = s / "wan_t2v_d64_l6", {"scheme": form, "scale_rule": rule}
    small = s / "t2v_cascade"
    cases |= {
        "keep": (small, {"scheme": "mxfp8", "keep": ["blocks.0.*", "*.to_out.0", "blocks.1.ffn.2"]}),
        "shards": (small, {"scheme": "int8", "max_shard_bytes": 60_000}),
        "copy": (small, {"scheme": "int8", "copy": True, "report": True}),
    }
    for case, (model, options) in cases.items():
        yield from made(f"quantize/{case}", place, ascendit.quantize, model, **options)
    words = ("quantize", "demo", "--scheme", "mxfp4_dualscale", "--report", "--hash")
    yield from told("quantize/report", place, *words, "-o", "report")
    smooth = ("--calibrate", 1, "--alpha", 0.8, "--set", "num_inference_steps=2")
    yield from told("quantize/calibrated", place, *words, *smooth, "-o", "smooth")
    yield from folder("quantize/calibrated", place.work / "smooth", place)


def lora(place: Place) -> Records:
    """LoRA files of every spelling folded in, alone, weighted, together and into one expert."""
    import ascendit

    files = {f.stem: str(f) for f in sorted((place.sources / "lora").glob("*.safetensors"))}
    cases = {name: [f"{file}:0.7"] for name, file in files.items()}
    cases["all"] = [files[name] for name in ("comfyui", "kohya", "diffusers", "lokr")]
    cases["each"] = [f"high={files['kohya']}", f"low={files['loha']}:-0.5"]
    for name, loras in cases.items():
        for scheme in ("mxfp8", "bf16") if name == "all" else ("int8",):
            key = f"lora/{name} {scheme}"
            yield from made(key, place, ascendit.quantize, "demo", scheme=scheme, loras=loras)


def repack(place: Place) -> Records:
    """Exports, floats and quantized folders into every layout, and back into Diffusers'."""
    import ascendit

    s, ways = place.sources, {"diffusers": {"to": "diffusers"}, "wan": {"to": "wan"}}
    targets: dict[str, dict[str, Any]] = {**ways, **{engine: {"engine": engine} for engine in ENGINES}}
    sources: dict[str, tuple[Any, Any]] = {
        export.name: (export, None) for export in sorted(s.glob("export_*"))
    }
    sources |= {name: (s / name, s / name) for name in ("i2v_21", "wan_t2v_d64_l6", "bare.safetensors")}
    sources["wan_t2v_d64_l6"] = sources["wan_t2v_d64_l6"][0], None
    sources["bare.safetensors"] = sources["bare.safetensors"][0], None
    sources["demo"] = "demo", "demo"
    for model, schemes in (("t2v_cascade", SCHEMES), ("demo", ("mxfp4", "int8"))):
        for scheme in schemes:
            source, new = s / model if model != "demo" else model, place.work / f"from_{model}_{scheme}"
            ascendit.quantize(source, new, scheme=scheme)
            sources[f"{model} {scheme}"] = new, source
    for name, (source, base) in sources.items():
        for target, options in targets.items():
            key = f"repack/{name} to {target}"
            yield from made(key, place, ascendit.repack, source, check=True, **options)
            written = place.work / key.replace("/", "_")
            if written.is_dir() and target != "diffusers":
                yield from made(f"{key} and back", place, ascendit.repack, written, base=base)
    whole = a_base(place, place.work / "repack_export_t2v_d64_l6__int8 to diffusers")
    for export in sorted(s.glob("export_t2v*")):
        key = f"repack/{export.name} with a base"
        yield from made(key, place, ascendit.repack, export, base=whole, copy=True)
    yield from told("repack/report", place, "repack", whole, "-o", "report", "--to", "wan", "--check")


def a_base(place: Place, transformers: Path) -> Path:
    """A Diffusers folder with the configs of these transformers and the demo's other parts."""
    base = place.work / "base"
    shutil.copytree(place.demo, base)
    for expert in ("transformer", "transformer_2"):
        shutil.rmtree(base / expert)
        (base / expert).mkdir()
        config = json.loads((transformers / expert / "config.json").read_bytes())
        config.pop("quantization_config", None)
        (base / expert / "config.json").write_text(json.dumps(config))
    return base


def frames(place: Place) -> Records:
    """Frames of the demo: schemes and recipes on each device, online and stored; options; tiny models."""
    import ascendit

    stored = {scheme: place.work / scheme for scheme in SCHEMES}
    for scheme, target in stored.items():
        ascendit.quantize("demo", target, scheme=scheme)
    for device in ("cpu", "twin:a2", "twin:a3", "twin:a5"):
        for scheme in (None, *SCHEMES):
            if device != "twin:a3" or scheme in (None, "int8"):
                yield from drawn(f"frames/{device} {scheme}", 4, "demo", device=device, scheme=scheme)
        for recipe in RECIPES if device in ("cpu", "twin:a5") else ():
            yield from drawn(f"frames/{device} {recipe}", 2, "demo", device=device, recipe=recipe)
        for scheme, target in stored.items() if device in ("cpu", "twin:a5") else ():
            yield from drawn(f"frames/{device} stored {scheme}", 2, target, device=device)
    for case, options in OPTIONS.items():
        yield from drawn(f"frames/{case}", 2, "demo", **options)
    image = str(place.sources / "image.png")
    for name in (*TINY, "ti2v with an image"):
        model = place.sources / name.partition(" ")[0]
        fields = {"height": 64, "width": 64, "num_frames": 5}
        fields |= {"image": image} if "i2v_" in name or "image" in name else {}
        for options in ({}, {"device": "twin:a2"}, {"scheme": "int8", "device": "twin:a5"}):
            case = " ".join([f"frames/{name}", *options.values()])
            yield from drawn(case, 2, model, fields, **options)


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
    yield from told("files/verify", place, "verify", "--demo", "--adherence", "--limit", 2, "--seeds", 1)
    swapped = ("verify", "--demo", "--adherence", "--limit", 2, "--seeds", 1, "--swap-experts")
    yield from told("files/verify swapped", place, *swapped)


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
                plain = nn.Sequential(nn.Linear(96, 130), nn.GELU(), nn.Linear(130, 64, bias=False)).to(dtype)
                case = f"layers/{scheme} {str(dtype)[6:]} {device}"
                inputs = 20 * x.to(dtype), t, 20 * text.to(dtype)
                yield from outcome(f"{case} wan", computed, ascendit, wan, scheme, device, inputs)
                yield from outcome(
                    f"{case} mlp", computed, ascendit, plain, scheme, device, (hard_numbers(9, 96, dtype),)
                )


def computed(ascendit: Any, module: Any, scheme: str, device: str | None, inputs: Any) -> dict[str, Any]:
    """What `quantize_` reports, and the output of the module."""
    import torch

    report = ascendit.quantize_(module, scheme, device=device)
    with torch.inference_mode():
        found = module(*inputs)
    return {"report": report.lines(), "output": getattr(found, "sample", found)}


def twin(place: Place) -> Records:
    """The twin of each chip: its schemas, right calls and refused ones, and a fresh count of launches."""
    import torch

    import ascendit.twin

    for chip in ("a2", "a3", "a5"):
        ascendit.twin.enable(chip)
        schemas = sorted(
            str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith(("npu::", "mindiesd::"))
        )
        yield f"twin/{chip}/schemas", f"{len(schemas)}, sha256 {sha(*schemas)}"
        ascendit.twin.reset()
        for case, (name, args, options) in twin_calls().items():
            yield from outcome(f"twin/{chip}/{case}", launched, name, args, options)
        yield from items(f"twin/{chip}/launches", json.dumps(ascendit.twin.launches(), sort_keys=True))


def launched(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """One operator by its name below `torch.ops`. Arguments may be functions, for what another one makes."""
    import torch

    space, _, short = name.rpartition(".")
    values = [a() if callable(a) else a for a in args]
    given = {key: a() if callable(a) else a for key, a in options.items()}
    return getattr(getattr(torch.ops, space or "npu"), short)(*values, **given)


def twin_calls() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Case -> operator, arguments, options. Some are refused by some chips, which is recorded as well."""
    import torch

    def rand(*shape: int, seed: int = 0) -> Any:
        return (20 * draw(seed + 9, *shape)).bfloat16()

    def part(index: int, name: str, *args: Any, **options: Any) -> Callable[[], Any]:
        return lambda: launched(name, args, options)[index]

    def turned(value: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: value().transpose(0, 1)

    x, w, gamma, deep = rand(6, 160), rand(32, 160, seed=1), rand(160, seed=2), rand(3, 640)
    heads, rows = rand(1, 5, 2, 32), rand(2, 64)
    q, k, v = (rand(1, 2, n, 64, seed=n) for n in (7, 9, 9))
    angle = rand(1, 5, 1, 32, seed=4)
    mx, e4m3, e8m0, e2m1 = "npu_dynamic_mx_quant", 292, 293, 296
    calls: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
        "rms norm": ("npu_rms_norm", (x, gamma), {"epsilon": 1e-6}),
        "rms norm of float64": ("npu_rms_norm", (x.double(), gamma.double()), {}),
        "rms norm of another width": ("npu_rms_norm", (x, gamma[:32]), {}),
        "add rms norm": ("npu_add_rms_norm", (x, x, gamma), {}),
        "add layer norm": ("npu_add_layer_norm", (x, x, gamma, gamma), {"additional_output": True}),
        "layer norm": ("npu_layer_norm_eval", (x, [160]), {}),
        "mindie layer norm": ("mindiesd.layernorm", (x, [160], gamma, gamma, 1e-6), {}),
        "adaln": ("mindiesd.adaln", (rand(2, 6, 64), rows[:, None], rows[:, None], None, None, 1e-6), {}),
        "adaln v2": ("mindiesd.adaln_v2", (rand(2, 6, 64), rows, rows, None, None, 1e-6), {}),
        **{name: (f"npu_{name}", (x,), {}) for name in ("gelu", "fast_gelu", "swiglu", "geglu", "silu")},
        "gelu tanh": ("npu_gelu", (x,), {"approximate": "tanh"}),
        "rope": (
            "npu_rotary_mul",
            (heads.float(), angle.float(), angle.float()),
            {"rotary_mode": "interleave"},
        ),
        "rope by halves": ("npu_rotary_mul", (heads, angle, angle), {}),
        "attention": ("npu_fusion_attention", (q, k, v, 2, "BNSD"), {"scale": 0.125}),
        "attention of 3 heads": ("npu_fusion_attention", (q, k, v, 3, "BNSD"), {"scale": 0.125}),
        "infer": (
            "npu_fused_infer_attention_score_v2",
            (q, k, v),
            {
                "num_query_heads": 2,
                "softmax_scale": 0.125,
                "input_layout": "BNSD",
                "return_softmax_lse": True,
            },
        ),
        "prompt": (
            "npu_prompt_flash_attention",
            (q, k, v),
            {"num_heads": 2, "scale_value": 0.125, "input_layout": "BNSD"},
        ),
        "int8": ("npu_dynamic_quant", (x,), {}),
        "int8 per tensor": ("npu_dynamic_quant", (x,), {"quant_mode": "pertensor"}),
        "int8 smoothed": ("npu_dynamic_quant", (x,), {"smooth_scales": gamma.abs()}),
        "fp8": ("npu_dynamic_quant", (x,), {"dst_type": torch.float8_e4m3fn}),
        "mxfp8": (mx, (x,), {"dst_type": e4m3}),
        "mxfp8 ceil": (mx, (x,), {"dst_type": e4m3, "scale_alg": 1}),
        "mxfp8 e5m2": (mx, (x,), {"dst_type": 291}),
        "mxfp4": (mx, (x,), {"dst_type": e2m1}),
        "mxfp4 max": (mx, (x,), {"dst_type": e2m1, "scale_alg": 2, "dst_type_max": 7.25}),
        "mxfp4 of one axis": (mx, (gamma.double(),), {}),
        "dual level": ("npu_dynamic_dual_level_mx_quant", (deep,), {}),
        "blocks": (
            "npu_dynamic_block_quant",
            (rand(2, 200, 128),),
            {"dst_type": e4m3, "row_block_size": 128, "col_block_size": 128},
        ),
        "cast": ("npu_dtype_cast", (x, torch.float16), {}),
        "format": ("npu_format_cast", (x, 29), {}),
        "nothing of it": ("npu_ifmr", (x, x, x, x, x), {}),
    }
    int8 = turned(part(0, "npu_dynamic_quant", w)), part(1, "npu_dynamic_quant", w)
    token = {"pertoken_scale": part(1, "npu_dynamic_quant", x), "output_dtype": 15}
    matmul, codes = "npu_quant_matmul", part(0, "npu_dynamic_quant", x)
    bias = rand(32, seed=3).float()
    calls["int8 matmul"] = matmul, (codes, *int8), {**token, "bias": bias}
    calls["int8 matmul turned"] = matmul, (codes, part(0, "npu_dynamic_quant", w), int8[1]), token
    blocks = {"scale_dtype": e8m0, "pertoken_scale_dtype": e8m0, "group_sizes": [1, 1, 32], "bias": bias}
    blocks["output_dtype"] = torch.bfloat16
    for case, kind, more in (("mxfp8", e4m3, {}), ("mxfp4", e2m1, {"x1_dtype": e2m1, "x2_dtype": e2m1})):
        weight = [turned(part(i, mx, w, dst_type=kind)) for i in (0, 1)]
        given = {**blocks, **more, "pertoken_scale": part(1, mx, x, dst_type=kind)}
        calls[f"{case} matmul"] = matmul, (part(0, mx, x, dst_type=kind), *weight), given
    return calls


# ---- recording: each area in a process of its own ---------------------------------------------------------


@dataclass(frozen=True)
class Area:
    """`kernels`: recorded with native kernels and without; else once."""

    run: Callable[[Place], Records]
    kernels: bool = True


AREAS = {
    "names": Area(names, kernels=False),
    "flags": Area(flags, kernels=False),
    "codes": Area(codes, kernels=False),
    "errors": Area(errors, kernels=False),
    "inspect": Area(reports, kernels=False),
    "dry-run": Area(dry_runs, kernels=False),
    "doctor": Area(doctor),
    "formats": Area(formats),
    "twin": Area(twin),
    "layers": Area(layers),
    "quantize": Area(quantize),
    "lora": Area(lora),
    "repack": Area(repack),
    "frames": Area(frames),
    "files": Area(files),
}
STEERING = ("ALGO", "FAST_LAYERNORM", "USE_SUB_HEAD", "T5_LOAD_CPU", "PRECISION", "OVERLAP", "PYTHONHOME")
"""Variables that ascendit or Python reads; a recording is made without them."""


def environment(package: Path, mode: str, work: Path) -> dict[str, str]:
    """Of every process of a recording. Without native kernels: a PATH on which nothing is."""
    found = {key: value for key, value in os.environ.items() if key not in STEERING}
    found |= {"PYTHONPATH": str(package), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    found |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "TZ": "UTC", "HF_HUB_OFFLINE": "1"}
    found |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HOME": str(work / "hub")}
    return found | ({"PATH": str(work / "nothing")} if mode == "off" else {})


def child(args: argparse.Namespace) -> None:
    """Run one area and write what it yields."""
    place = Place(**json.loads(args.place, object_hook=paths))
    records: dict[str, str] = {}
    run = make_sources if args.area == "sources" else AREAS[args.area].run
    for key, value in run(place):
        key = place.text(key)
        assert key not in records, key
        records[key] = place.text(value)
    Path(args.out).write_text(json.dumps(records))


def paths(value: dict[str, Any]) -> dict[str, Any]:
    """`Place` from its JSON."""
    return {key: Path(v) if key in ("work", "sources", "tests", "demo") else v for key, v in value.items()}


def run_area(area: str, mode: str, package: Path, place: Place) -> dict[str, str]:
    """One area in a process of its own. RuntimeError with the end of its output if it fails."""
    place.work.mkdir(parents=True, exist_ok=True)
    part, text = place.work / "records.json", json.dumps(dataclasses.asdict(place), default=str)
    command = [sys.executable, str(Path(__file__).resolve()), "area", area, str(part), text]
    env = environment(package, mode, place.sources.parent)
    done = subprocess.run(command, env=env, cwd=place.work, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{area}, native {mode}, failed:\n{done.stderr[-4000:]}")
    return json.loads(part.read_bytes())


def demo_folder(package: Path, work: Path) -> Path:
    """Where the package has its demo model."""
    words = [sys.executable, "-m", "ascendit", "inspect", "demo", "--json"]
    done = subprocess.run(
        words, env=environment(package, "on", work), capture_output=True, text=True, check=True
    )
    return Path(json.loads(done.stdout)["path"])


def check_mode(records: Mapping[str, str], mode: str) -> None:
    """RuntimeError if `doctor` found native kernels that should be off, or none that should be on."""
    rows = json.loads(records["doctor/machine/json"])["rows"]
    found = [
        row["item"] for row in rows if row["item"].startswith("kernel") and row["found"].startswith("native")
    ]
    if (mode == "on") != bool(found):
        raise RuntimeError(f"native kernels should be {mode}; doctor found {found or 'none'}")


def record(args: argparse.Namespace) -> int:
    """Record the areas that were asked for."""
    package, modes = args.package.resolve(), ("on", "off") if args.native == "both" else (args.native,)
    if args.out.parent.is_dir() is False or not (package / "ascendit").is_dir():
        raise SystemExit(f"{args.out.parent} or {package}/ascendit is no folder")
    started, found = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="record") as temporary:
        work = Path(temporary).resolve()
        demo = demo_folder(package, work)
        named = {str(work): "<work>", str(demo): "<demo>", str(package): "<src>", str(Path.home()): "<home>"}
        (work / "sources").mkdir()
        shutil.copyfile(demo / "transformer" / "config.json", work / "sources" / "demo_config.json")
        for i, mode in enumerate(modes):
            chosen = [a for a, area in AREAS.items() if a in args.only and (area.kernels or i == 0)]
            for area in ["sources", *chosen] if i == 0 else chosen:
                begun = time.perf_counter()
                place = Place(work / mode / area, work / "sources", args.tests.resolve(), demo, named)
                records = run_area(area, mode, package, place)
                shutil.rmtree(place.work)
                if area == "doctor":
                    check_mode(records, mode)
                prefix = mode if area in AREAS and AREAS[area].kernels else "any"
                found |= {f"{prefix}/{key}": value for key, value in records.items()}
                seconds = time.perf_counter() - begun
                print(f"{prefix:<4}{area:<10}{len(records):>7} keys {seconds:7.1f} s", flush=True)
    args.out.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(f"{args.out}: {len(found)} keys in {time.perf_counter() - started:.0f} s")
    return 0


# ---- comparing --------------------------------------------------------------------------------------------


def differences(a: Mapping[str, str], b: Mapping[str, str], ignore: Iterable[str] = ()) -> dict[str, str]:
    """Key -> what differs, in words. Areas that one recording lacks altogether are one line each."""
    left, right = ({k: v for k, v in x.items() if area_of(k)[1] not in set(ignore)} for x in (a, b))
    areas = [{area_of(key) for key in x} for x in (left, right)]
    found = {"/".join(area): "only in one recording" for area in sorted(areas[0] ^ areas[1])}
    for key in sorted(left.keys() | right.keys()):
        if area_of(key) in areas[0] ^ areas[1] or left.get(key) == right.get(key):
            continue
        if key not in right:
            found[key] = "is gone"
        elif key not in left:
            found[key] = "is new"
        else:
            found[key] = change(left[key], right[key])
    return found


def area_of(key: str) -> tuple[str, str]:
    """(mode, area)."""
    mode, area, *_ = key.split("/")
    return mode, area


def change(before: str, after: str) -> str:
    """Two short values beside each other; of longer ones the lines that differ, ten at most."""
    if "\n" not in before + after:
        return f"{before}  ->  {after}"
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    lines = [line for line in lines if not line.startswith("@@")]
    return "\n    ".join(["", *lines[:10], *(["..."] if len(lines) > 10 else [])])


def compare(args: argparse.Namespace) -> int:
    """Print what differs, `--limit` keys of each area; 1 if anything does."""
    a, b = (json.loads(path.read_bytes()) for path in (args.a, args.b))
    found = differences(a, b, args.ignore)
    counts, shown = Counter(area_of(f"{key}/")[:2] for key in found), Counter()
    for key, what in found.items():
        shown[area_of(f"{key}/")] += 1
        if shown[area_of(f"{key}/")] <= args.limit:
            print(f"{key}: {what}")
    for (mode, area), count in sorted(counts.items()):
        print(f"{mode}/{area}: {count} of {sum(area_of(key) == (mode, area) for key in a)} keys differ")
    print(f"{len(found)} differences in {len(a.keys() | b.keys())} keys")
    return 1 if found else 0


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record", help="Write a recording.")
    one.add_argument("out", type=Path)
    one.add_argument("--package", type=Path, default=REPO / "src", help="The folder that holds ascendit.")
    one.add_argument(
        "--tests", type=Path, default=REPO / "tests", help="The folder with tiny.py and fixtures."
    )
    one.add_argument(
        "--only", nargs="+", choices=AREAS, default=list(AREAS), metavar="AREA", help=" ".join(AREAS)
    )
    one.add_argument("--native", choices=("on", "off", "both"), default="both")
    one.set_defaults(run=record)
    two = commands.add_parser("compare", help="Say what differs; exit code 1 if anything does.")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.add_argument("--ignore", nargs="+", default=[], metavar="AREA", help="As messages.")
    two.add_argument("--limit", type=int, default=20, help="Keys of each area that are printed; 20.")
    two.set_defaults(run=compare)
    three = commands.add_parser("area")
    for name in ("area", "out", "place"):
        three.add_argument(name)
    three.set_defaults(run=child)
    args = parser.parse_args(words)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
