"""Write the tables of README.md and docs/ from the code, so that no page shows a stale default or flag.

    python tools/docs_tables.py            # renew the tables
    python tools/docs_tables.py --check    # write nothing; exit code 1 and the names of stale pages

A table is between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from demo_data import WORDINGS

from ascendit.checkpoint.kind_table import KINDS
from ascendit.cli.models import INPUTS
from ascendit.demo import world
from ascendit.device.chip import CHIPS
from ascendit.device.operator_support import chips_for
from ascendit.errors import ERROR_CODES, AscenditError
from ascendit.family import PRESETS, SPECS, Preset, ScheduleName, Size, Solver, WanSpec
from ascendit.geometry import FrameRate
from ascendit.names import ROLES
from ascendit.pipeline.sigmas import Schedule, make_schedule
from ascendit.quant.engines import ENGINES, engines_for
from ascendit.quant.schemes import LINEAR_SCHEMES, SCHEMES, STORED_SCHEMES
from ascendit.weights.lora.keys import SKIPPED

REPO = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---- the Wan family -----------------------------------------------------------------------------


def size_text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def guidance_text(spec: WanSpec) -> str:
    high, low = spec.guidance_scale, spec.guidance_scale_2
    return f"{high:g}" if low is None else f"{high:g} / {low:g}"


def shift_text(spec: WanSpec) -> str:
    """`5; 3 at 832x480, 480x832`."""
    shifts: dict[float, list[str]] = {}
    for size, shift in spec.flow_shift_by_size.items():
        shifts.setdefault(shift, []).append(size_text(size))
    return "; ".join(
        [f"{spec.flow_shift:g}", *(f"{s:g} at {', '.join(sizes)}" for s, sizes in shifts.items())]
    )


def boundary_text(spec: WanSpec) -> str:
    return "-" if spec.boundary_ratio is None else f"{spec.boundary_ratio:g}"


def defaults_table() -> str:
    head = ("model", "input", "size", "frames", "fps", "steps", "shift", "guidance", "boundary")
    return table(
        head,
        (
            (s.name, INPUTS[s.task], size_text(s.sizes[0]), s.num_frames, s.fps, s.num_inference_steps)
            + (shift_text(s), guidance_text(s), boundary_text(s))
            for s in SPECS.values()
        ),
    )


def shapes_table() -> str:
    head = ("model", "experts", "width", "layers", "channels in / out", "sizes", "size multiple")
    return table(
        head,
        (
            (s.name, s.num_experts, s.dim, s.num_layers, f"{s.in_channels} / {s.out_channels}")
            + (", ".join(map(size_text, s.sizes)), s.size_multiple)
            for s in SPECS.values()
        ),
    )


def negative_table() -> str:
    models: dict[str, list[str]] = {}
    for spec in SPECS.values():
        models.setdefault(spec.negative_prompt, []).append(spec.name)
    return table(("models", "negative prompt"), ((", ".join(n), text or "-") for text, n in models.items()))


def timesteps_text(schedule: Schedule) -> str:
    return ", ".join(f"{t:.5g}" for t in schedule.timesteps)


def presets_table() -> str:
    def row(p: Preset) -> tuple[object, ...]:
        schedule = make_schedule(p.solver, len(p.timesteps), p.flow_shift, p.timesteps)
        positions = ",".join(f"{t:g}" for t in p.timesteps)
        flags = f"`{p.solver}`, {p.flow_shift:g}", f"`{positions}`", timesteps_text(schedule)
        return f"`{p.name}`", p.weights, ", ".join(p.models), *flags

    head = ("preset", "weights", "models", "solver, shift", "`--timesteps`", "runs at, after the shift")
    return table(head, (row(p) for p in PRESETS.values()))


def schedules_table() -> str:
    """Diffusers' schedule and the official one of each solver; differences at 40 steps and shift 5."""

    def row(solver: Solver, rule: ScheduleName, same: str) -> tuple[object, ...]:
        four, forty = (make_schedule(solver, steps, 5.0, None, rule) for steps in (4, 40))
        other = make_schedule(solver, 40, 5.0)
        apart = max(abs(a - b) for a, b in zip(forty.timesteps, other.timesteps, strict=True))
        ends = f"{forty.sigmas[0]:.6f}, {forty.sigmas[-2]:.4f}"
        return f"`{solver}`", f"`{rule}`", same, timesteps_text(four), ends, f"{apart:.3g}"

    official, lightning = "Wan's generate.py", "Wan2.2-Lightning"
    rows: list[tuple[Solver, str, str]] = [
        ("unipc", "UniPCMultistepScheduler", official),
        ("dpm++", "DPMSolverMultistepScheduler", official),
        ("euler", "FlowMatchEulerDiscreteScheduler", lightning),
        ("renoise", "the same, `stochastic_sampling`", lightning),
    ]
    head = ("solver", "schedule", "equal to", "4 steps", "first and last noise level of 40", "difference")
    return table(
        head,
        (
            cells
            for solver, diffusers, theirs in rows
            for cells in (row(solver, "diffusers", diffusers), row(solver, "official", theirs))
        ),
    )


def file_kinds_table() -> str:
    rows = ((kind.label, kind.marks, kind.read_as or "no: refused by name") for kind in KINDS.values())
    return table(("kind", "recognised by", "read as"), rows)


# ---- schemes, engines, chips, files -------------------------------------------------------------


def element_bits(name: str) -> int:
    """Bits of one element, without scales. `name`: a format; "" is BF16."""
    from ascendit.mx.formats import FORMATS

    if not name:
        return 16
    element = FORMATS[name].element
    return element.bits if element else 8


def bits_per_value(name: str) -> float:
    """Bits of one element with block scales, without the scales of rows and tiles (32 bits each)."""
    from ascendit.mx.formats import FORMATS

    bits = float(element_bits(name))
    if fmt := FORMATS.get(name):
        bits += 8 / fmt.block if fmt.kind in ("block", "dual") else 0.0
        bits += 32 / fmt.coarse if fmt.coarse else 0.0
    return bits


def schemes_table() -> str:
    from ascendit.mx.formats import FORMATS

    def row(name: str) -> tuple[object, ...]:
        scheme = SCHEMES[name]
        weights = scheme.text if scheme.weight in FORMATS else "floats"
        bits = f"{element_bits(scheme.activation)}", f"{bits_per_value(scheme.weight):g}"
        return f"`{name}`", weights, *bits, f"`{scheme.manifest}`"

    head = ("scheme", "weights", "bits of activations", "bits of a weight", "manifest value")
    return table(head, (row(name) for name in SCHEMES))


def chips_table() -> str:
    return table(("scheme", *CHIPS), ((f"`{s}`", *chips_for({s}).values()) for s in SCHEMES))


def engines_table() -> str:
    def cells(scheme: str) -> Iterator[str]:
        for reason in engines_for([scheme]).values():
            yield f"no: {reason}" if reason else "yes"

    head = ("scheme", *(f"{e.name} {e.version}" for e in ENGINES.values()))
    return table(head, ((f"`{s}`", *cells(s)) for s in SCHEMES))


TRAITS = {
    "mixed": "two schemes in one expert",
    "split_qkv": "one of Q, K, V quantized and another not",
    "unlike_qkv": "Q, K and V with unlike `mul_scale`",
    "outside_blocks": "quantized layers outside the blocks",
    "float_block_linears": "layers of blocks that stay BF16",
    "added_kv": "cross-attention with image tokens (Wan2.1 I2V)",
    "unquantized": "no quantized layer",
}
"""Trait of `quant.engines.Engine.refuses` -> text. `odd_blocks:` and `smoothed:` are followed by a scheme."""


def traits_table() -> str:
    def label(trait: str) -> str:
        name, colon, scheme = trait.partition(":")
        if not colon:
            return TRAITS[trait]
        odd = f"`{scheme}` where K / 32 is odd"
        return {"odd_blocks": odd, "smoothed": f"`{scheme}` layers with a `mul_scale`"}[name]

    rows: list[tuple[str, str, str]] = []
    for engine in ENGINES.values():
        by_reason: dict[str, list[str]] = {}
        for trait, reason in engine.refuses.items():
            if trait not in STORED_SCHEMES:
                by_reason.setdefault(reason, []).append(label(trait))
        rows += [(engine.name, "; ".join(labels), reason) for reason, labels in by_reason.items()]
    return table(("engine", "does not load", "because"), rows)


def tensors_table() -> str:
    """The tensors of a layer [N, K] on disk, from the specs of the writers. Equal schemes share a row."""
    from ascendit.weights.engine_formats import layer_specs

    symbols = {300: "N", 2048: "K", 1024: "K/2", 64: "ceil(K/32)", 4: "ceil(K/512)", 1: "1"}
    symbols |= {3: "ceil(N/128)", 16: "ceil(K/128)"}
    schemes: dict[tuple[str, str, str], list[str]] = {}
    for name in SCHEMES:
        for spec in layer_specs("layer", name, (300, 2048), bias=True, mul_scale=name != "bf16"):
            shape = ", ".join(symbols[size] for size in spec.shape)
            dtype = "as in the source" if name == "bf16" else f"`{spec.dtype}`"
            schemes.setdefault((spec.name, dtype, f"[{shape}]"), []).append(name)
    order = [f"layer.{role}" for role in ROLES]
    by_role = sorted(schemes.items(), key=lambda item: order.index(item[0][0]))
    rows = (
        (f"`{tensor.replace('layer', '<layer>')}`", shape, dtype, ", ".join(names))
        for (tensor, dtype, shape), names in by_role
    )
    return table(("tensor", "shape", "dtype", "schemes"), rows)


def rules_table() -> str:
    """The table in the docstring of `mx/scales.py`; continued rows are joined."""
    from ascendit.mx import scales

    lines = [line for line in (scales.__doc__ or "").splitlines() if line.startswith("|")]
    rows: list[list[str]] = []
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    return table(head, ((f"`{rule}`", meaning, same) for rule, meaning, same in rows))


def format_rules_table() -> str:
    from ascendit.mx.formats import FORMATS

    def rows() -> Iterator[tuple[str, str, str]]:
        for fmt in FORMATS.values():
            names = [f"`{rule}{'X' if rule.endswith(':') else ''}`" for rule in fmt.rules]
            if names:
                yield f"`{fmt.name}`", names[0], ", ".join(names[1:]) or "-"

    return table(("format", "default", "others"), rows())


def recipes_table() -> str:
    from ascendit.quant.recipe import load_recipe, recipe_names

    def rows() -> Iterator[tuple[str, ...]]:
        for name in recipe_names():
            recipe = load_recipe(name, "mxfp8" if name == "default" else None)
            yield f"`{name}`", ", ".join(recipe.kinds) or "all", recipe.about, escape(recipe.source) or "-"

    return table(("recipe", "made for", "effect", "source"), rows())


# ---- errors -------------------------------------------------------------------------------------


def errors_table() -> str:
    rows = ((f'<a id="{code.lower()}"></a>`{code}`', text) for code, text in ERROR_CODES.items())
    return table(("code", "meaning"), rows)


def classes(base: type[AscenditError] = AscenditError) -> Iterator[type[AscenditError]]:
    yield base
    for child in base.__subclasses__():
        yield from classes(child)


def exits_table() -> str:
    rows: list[tuple[int, str, str]] = [(0, "-", "Done.")]
    rows += sorted(
        (c.exit_code, f"`{c.__name__}`", (c.__doc__ or "").splitlines()[0])
        for c in classes()
        if c is not AscenditError and c.__module__ == "ascendit.errors"
    )
    return table(("exit code", "class", "meaning"), rows)


# ---- the command line ---------------------------------------------------------------------------


def command(name: str) -> Any:
    """The click command `ascendit NAME`, or `ascendit` itself."""
    import typer.main

    from ascendit.cli.main import app

    group: Any = typer.main.get_command(app)
    return group.get_command(None, name) if name else group


def flags_table(name: str, *, hidden: bool = False) -> str:
    def row(param: Any) -> tuple[str, str]:
        names = ", ".join(f"`{opt}`" for opt in param.opts)
        value = f" `{param.metavar}`" if param.metavar else ""
        default = f" Default {param.default}." if isinstance(param.default, int) and param.default > 1 else ""
        return escape(f"{names}{value}"), escape(f"{param.help}{default}")

    params = command(name).params
    return table(
        ("flag", "meaning"), (row(p) for p in params if p.param_type_name == "option" and p.hidden == hidden)
    )


def commands_table() -> str:
    return table(
        ("command", "does"), ((f"`ascendit {n}`", summary(command(n))) for n in command("").commands)
    )


def summary(cmd: Any) -> str:
    return escape(cmd.help.split("\n")[0])


def escape(text: str) -> str:
    """`text` escaped for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


MEANINGS = {
    "prompt": "The text of the video.",
    "width": "Width in pixels.",
    "height": "Height in pixels.",
    "timesteps": "Positions of the steps before the shift; replaces num_inference_steps.",
    "guidance_scale": "Guidance of the only or the high-noise expert; at most 1: none.",
    "guidance_scale_2": "Guidance of the low-noise expert; default: the model's, or guidance_scale if set.",
    "boundary_ratio": "From this part of 1000 on, a timestep runs the high-noise expert.",
    "schedule": "Timesteps of Diffusers' scheduler, or of the authors' own code.",
    "max_sequence_length": "Tokens of the prompt, at most 512.",
    "crf": "Quality of the file: lower is better and larger; default 18. Command line only.",
    "seed": "The same seed gives the same video; default: random, and printed.",
    "metadata": "Whether to write the .json and the metadata of the video. Command line only.",
    "seconds": "Length in seconds, instead of num_frames. Command line only.",
}
"""Key of `--set` -> its meaning, for keys that differ from a flag or have none."""


def settings_table() -> str:
    """The keys of `--set` and `--config`."""
    from ascendit.cli.generate_options import KEYS
    from ascendit.pipeline.options import OPTIONS

    values = {key: value_text(hint) for key, hint in KEYS.items()}
    values |= {"max_memory": "a size, as 24GiB or 8e9", "loras": "`FILE[:WEIGHT]`, or a list of them"}
    meanings = {p.name: p.help for p in command("generate").params if p.param_type_name == "option"}
    meanings |= {name: row.help for name, row in OPTIONS.items()} | MEANINGS
    rows = ((f"`{key}`", text, escape(meanings[key])) for key, text in values.items())
    return table(("key", "value", "meaning"), rows)


def value_text(hint: Any) -> str:
    """Text for a type: `int | None` is a whole number."""
    types = [t for t in get_args(hint) if t is not NoneType] if NoneType in get_args(hint) else [hint]
    if get_origin(types[0]) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(types[0]))
    texts: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}
    texts |= {tuple[float, ...]: "numbers", tuple[str, ...]: "names or patterns, separated by spaces or ;"}
    texts[FrameRate] = "number or fraction, as `24000/1001`"
    return texts[types[0]]


# ---- devices ------------------------------------------------------------------------------------


def npu_operators_table() -> str:
    from ascendit.device.operator_support import capability
    from ascendit.ops.npu.kernels import KERNELS

    def row(k: Any) -> tuple[object, ...]:
        chips = ", ".join(c for c in CHIPS if capability(k.needs).support_on(c) == "yes")
        return f"`{k.operator}`", f"`{k.needs}`", chips, k.reason

    return table(("operator", "kernel", "chips", "reason"), (row(k) for k in KERNELS))


def npu_capabilities_table() -> str:
    """The operators of each chip, from the table that the twin and `doctor` use."""
    from ascendit.device.operator_support import CAPABILITIES

    answers = {"yes": "yes", "cann": "no", "adapter": "no", "unknown": "not documented"}

    def row(c: Any) -> tuple[object, ...]:
        name = f"`{c.operator}`" + (f", {c.mode}" if c.mode else "")
        return (
            name,
            c.used_for or "-",
            *(answers[c.support_on(chip)] for chip in CHIPS),
            c.dtypes or "-",
            c.layout or "-",
        )

    rows = (row(c) for c in sorted(CAPABILITIES, key=lambda c: not c.used_for))
    return table(("operator", "used for", *CHIPS, "dtypes", "layout"), rows)


def npu_versions_table() -> str:
    from ascendit.doctor.npu import DRIVERS, MINDIESD, VERSION_SETS, begins

    def beside(table: Any, cann: str | None) -> str:
        matching = [v for c, versions in table.items() if cann and begins(c, cann) for v in versions]
        return ", ".join(dict.fromkeys(matching)) or "?"

    def row(s: Any) -> tuple[object, ...]:
        tail = (beside(MINDIESD, s.cann), beside(DRIVERS, s.cann), f"[page]({s.source})")
        return s.torch, s.torch_npu, s.cann or "?", *tail

    return table(
        ("torch", "torch_npu", "CANN", "MindIE-SD", "driver", "published on"), (row(s) for s in VERSION_SETS)
    )


def npu_settings_table() -> str:
    from ascendit.device.npu_runtime import SETTINGS, VARIABLES

    rows = [(f"`{v.name}`", f"`{v.value}`", v.reason) for v in VARIABLES]
    rows += [(f"`torch.npu`: `{s.path}`", f"`{s.value}`", s.reason) for s in SETTINGS]
    return table(("setting", "value", "reason"), rows)


def linear_schemes_table() -> str:
    from ascendit.device.operator_support import native_on

    head = ("scheme", "activation", "scale rule", "weight", *CHIPS)
    native = {chip: native_on(chip) for chip in CHIPS}
    return table(
        head,
        (
            (f"`{s.name}`", s.activation, f"`{s.rule}`", s.weight)
            + tuple("native" if s.name in native[c] else "emulated" for c in CHIPS)
            for s in LINEAR_SCHEMES.values()
        ),
    )


# ---- attention ----------------------------------------------------------------------------------


def attention_kernels_table() -> str:
    from ascendit.device.attention_kernels import ATTENTION_KERNELS, FLOATS, AttentionKernel

    def limits(row: AttentionKernel) -> Iterator[str]:
        if row.kinds == ("self",):
            yield "self-attention"
        if row.dtypes != FLOATS:
            yield " or ".join(row.dtypes)
        if row.head_multiple > 1:
            yield f"heads of {row.head_multiple} x n"
        if row.largest_head:
            yield f"heads of at most {row.largest_head}"
        if row.shortest > 1:
            yield f"at least {row.shortest} tokens"
        if not row.padded_keys:
            yield "no padded keys"

    rows = (
        (
            f"`{name}`" + (", on request" if row.on_request else ""),
            " ".join(row.backends),
            row.about,
            "; ".join(limits(row)) or "-",
            ", ".join(f"`{alias}`" for alias in row.aliases) or "-",
        )
        for name, row in ATTENTION_KERNELS.items()
    )
    return table(("kernel", "devices", "about", "limits", "other names"), rows)


def attention_schemes_table() -> str:
    from ascendit.device.operator_support import native_attention_on
    from ascendit.quant.attention_schemes import ATTENTION_FORMATS

    def tile(sizes: tuple[int | None, int | None]) -> str:
        tokens, channels = ("all" if n is None else n for n in sizes)
        return f"{tokens} x {channels}"

    rows = (
        (
            f"`{name}`",
            f"`{f.quant_type}`",
            *(tile(t) for t in (f.query_tile, f.key_tile, f.value_tile)),
            "K smoothed" if f.smooth_key else "Q and K rotated" if f.rotate else "-",
            ", ".join(c for c in CHIPS if name in native_attention_on(c)) or "-",
        )
        for name, f in ATTENTION_FORMATS.items()
    )
    return table(("scheme", "manifest value", "Q", "K", "V", "before", "native on"), rows)


# ---- the demo's scenes --------------------------------------------------------------------------


def world_table() -> str:
    rows = {
        "colour": world.COLOURS,
        "shape": world.SHAPES,
        "direction": world.DIRECTIONS,
        "background": world.BACKGROUNDS,
        "wording": WORDINGS,
    }

    def text(values: Iterable[str], mark: str) -> str:
        return ", ".join(f"{mark}{value}{mark}" for value in values)

    return table(
        ("part", "count", "words"),
        ((part, len(row), text(row, "`" if part == "wording" else "")) for part, row in rows.items()),
    )


def lora_groups_table() -> str:
    rows = ((f"`{name}`", group.keys) for name, group in SKIPPED.items())
    return table(("`--lora-skip`", "keys"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "defaults": defaults_table,
    "shapes": shapes_table,
    "negative": negative_table,
    "presets": presets_table,
    "schedules": schedules_table,
    "schemes": schemes_table,
    "chips": chips_table,
    "engines": engines_table,
    "engine-traits": traits_table,
    "tensors": tensors_table,
    "scale-rules": rules_table,
    "format-rules": format_rules_table,
    "file-kinds": file_kinds_table,
    "recipes": recipes_table,
    "lora-groups": lora_groups_table,
    "errors": errors_table,
    "exits": exits_table,
    "commands": commands_table,
    "flags": lambda: flags_table(""),
    "flags-generate": lambda: flags_table("generate"),
    "more-flags-generate": lambda: flags_table("generate", hidden=True),
    "flags-quantize": lambda: flags_table("quantize"),
    "flags-repack": lambda: flags_table("repack"),
    "flags-inspect": lambda: flags_table("inspect"),
    "flags-verify": lambda: flags_table("verify"),
    "flags-bench": lambda: flags_table("bench"),
    "flags-models": lambda: flags_table("models"),
    "flags-doctor": lambda: flags_table("doctor"),
    "settings": settings_table,
    "npu-operators": npu_operators_table,
    "npu-settings": npu_settings_table,
    "npu-capabilities": npu_capabilities_table,
    "npu-versions": npu_versions_table,
    "linear-schemes": linear_schemes_table,
    "attention-kernels": attention_kernels_table,
    "attention-schemes": attention_schemes_table,
    "world": world_table,
}


def rewrite(text: str) -> str:
    """`text` with current tables. KeyError for a name that is not in `TABLES`."""
    return TABLE.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def pages() -> list[Path]:
    return [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is stale")
    check = parser.parse_args().check
    stale = [(page, new) for page in pages() if (new := rewrite(old := page.read_text())) != old]
    for page, new in stale:
        print(page.relative_to(REPO), "is stale" if check else "written")
        if not check:
            page.write_text(new)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
