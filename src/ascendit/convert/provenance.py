"""Write the record `ascendit.json` and the model card; check the base of a repacked transformer.

Does not import torch.

Record and card contain no dates, local paths or anything else that differs between two runs of the same
command, so equal inputs give equal folders. The other components of a repacked transformer come from its
base, the published Diffusers folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import INDEX_FILE, KIND_LABELS, RECORD_FILE, Layout, recognise
from ascendit.checkpoint.quant_metadata import CONFIG_KEY
from ascendit.checkpoint.sources import files_below, sha256_of
from ascendit.checkpoint.transformer import Expert, shapes_of
from ascendit.checkpoint.trust import Home
from ascendit.convert.other_files import CARD_FILE
from ascendit.convert.report import Outputs
from ascendit.errors import CheckpointError, UsageError, escaped
from ascendit.family import has_position_embeddings, spec_of
from ascendit.names import IGNORED_PARTS, expected_tensors, problem_counts
from ascendit.option_text import flag_of
from ascendit.report import json_text, shell_line, short_path
from ascendit.version import __version__, installed
from ascendit.weights.engine_formats import model_kind

RECORD_VERSION = 1
PIPELINE_TAGS = {"t2v": "text-to-video", "i2v": "image-to-video", "ti2v": "text-to-video"}
_LICENCE_KEYS = ("license", "license_name", "license_link")
_CARD_LIMIT = 1 << 20  # bytes; a larger README.md of the source is not read


@dataclass(frozen=True, kw_only=True)
class ConversionRecord:
    """How a folder was created by `quantize` or `repack`. Empty values are omitted from the files."""

    verb: str
    """quantize or repack."""
    layout: Layout
    """The source."""
    model_kind: str
    """t2v, i2v, ti2v."""
    command: str
    """The command line that creates the folder again, see `command_line`."""
    files: Mapping[str, str]
    """Path in the folder -> sha256; empty if not computed."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Path in the folder -> bytes."""
    schemes: Mapping[str, int]
    """Scheme -> number of linear layers, over all experts; empty if no transformer is converted."""
    bits_per_weight: float
    recipe: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Other entries of `ascendit.json`."""
    notes: Sequence[str] = ()
    """Paragraphs for the card."""


def ascendit_json(record: ConversionRecord) -> dict[str, Any]:
    """The content of `ascendit.json`: source, command, recipe, versions, sizes, sha256 of hashed files."""
    data: dict[str, Any] = {
        "version": RECORD_VERSION,
        "made_by": f"ascendit {__version__} {record.verb}",
        "versions": _versions(),
        "command": record.command,
        "source": {"name": source_name(record.layout), "layout": record.layout.kind},
        "model_kind": record.model_kind,
        "layers": dict(record.schemes),
        "bits_per_weight": round(record.bits_per_weight, 3),
        "recipe": dict(record.recipe),
        "loras": [dict(lora) for lora in record.loras],
        **record.details,
        "files": dict(sorted(record.files.items())),
        "sizes": dict(sorted(record.sizes.items())),
    }
    return {key: value for key, value in data.items() if value not in ({}, [])}


def model_card(record: ConversionRecord, name: str) -> str:
    """The content of README.md for a hub: YAML front matter and a description. `name`: name of the folder."""
    from huggingface_hub import CardData  # 0.1 s

    base, is_float = record.layout.source, not {*record.schemes} - {"bf16"}
    front = {
        "base_model": base.rsplit("@", 1)[0] if base else escaped(record.layout.name),
        "base_model_relation": "merge" if is_float and record.loras else "quantized",
        "library_name": "diffusers",
        "pipeline_tag": PIPELINE_TAGS[record.model_kind],
        "tags": ["ascendit", *(scheme for scheme in record.schemes if scheme != "bf16")],
        **_licence(record.layout.root),
    }
    layers = ", ".join(f"{count} {scheme}" for scheme, count in record.schemes.items())
    rows = [("Source", source_name(record.layout))]
    if about := record.recipe.get("about"):
        rows.append(("Recipe", f"{record.recipe['name']}: {about}"))
    if record.schemes:
        bits = f"{record.bits_per_weight:.2f} (transformers, scales included)"
        rows += [("Linear layers", layers), ("Bits per weight", bits)]
    rows += [("LoRA", f"{lora['file']} with weight {lora['weight']:g}") for lora in record.loras]
    rows += [(key, version) for key, version in _versions().items()]
    lines = ["---", CardData(**front).to_yaml(), "---", "", f"# {_markdown(name)}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows), ""]
    lines += ["Created with:", "", "```bash", record.command, "```", ""]
    for note in record.notes:
        lines += [note, ""]
    rules = "the command of this folder" if is_float else "the quantization rules with their scale rules"
    hashes = ", and the sha256 of each file" if record.files else ""
    lines.append(f"`{RECORD_FILE}` contains {rules}{hashes}.")
    if not is_float:
        lines.append(
            "`quant_model_description.json` in the folder of the weights lists the scheme of every tensor."
        )
    return "\n".join(lines) + "\n"


def write_record_and_card(folder: Path, record: ConversionRecord, name: str, *, hash: bool = False) -> None:
    """Write README.md, then `ascendit.json` with the size of every other file of `folder` that is not a link.

    `hash`: with the sha256 of those that `record.files` lacks. `name`: final name of the folder.
    """
    (folder / CARD_FILE).write_text(model_card(record, escaped(name)), encoding="utf-8")
    sizes, digests = {}, dict(record.files)
    for path in files_below(folder):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or relative in (CARD_FILE, RECORD_FILE):
            continue
        sizes[relative] = path.stat().st_size
        if hash and relative not in digests:
            digests[relative] = sha256_of(path)
    write_json(folder / RECORD_FILE, ascendit_json(replace(record, files=digests, sizes=sizes)))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write indented JSON with a newline at the end."""
    path.write_text(json_text(data) + "\n", encoding="utf-8")


def source_name(layout: Layout) -> str:
    """`org/name@revision` from a hub, else the name of the folder."""
    return layout.source or escaped(layout.name)


def source_argument(layout: Layout) -> str:
    """A model in a command line: `hf:org/name@rev` from a hub, else the name of its folder or file."""
    hub = "ms" if "modelscope" in layout.root.parts else "hf"
    return f"{hub}:{layout.source}" if layout.source else escaped(layout.name)


def command_line(verb: str, layout: Layout, dst: Path, options: Mapping[str, object]) -> str:
    """`ascendit quantize hf:org/name@rev -o name --scheme mxfp8`, with names of folders and files, not paths.

    `options`: keyword -> value; None and False omit its flag, True adds it without a value, a list repeats
    it. With a base, a file has the name of its component, because the base may have two of the kind.
    """
    if layout.kind != "file":
        sources = [source_argument(layout)]
    elif len(layout.parts) > 1 or options.get("base"):
        sources = [f"{name}={escaped(part.path.name)}" for name, part in layout.parts.items()]
    else:
        sources = [escaped(layout.root.name)]
    args = ["ascendit", verb, *sources, "-o", escaped(dst.name)]
    for keyword, setting in options.items():
        flag = flag_of(keyword)
        for value in setting if isinstance(setting, list | tuple) else [setting]:
            if value is True:
                args.append(flag)
            elif value is not None and value is not False:
                args += [flag, str(value)]
    return shell_line(args)


def next_command(
    dst: Path, config: Mapping[str, Any], source: Layout, *, is_pipeline: bool, engine: str | None = None
) -> str:
    """The command line that uses an output: `generate` for a pipeline, else `repack --base`.

    `config`: of its first expert. The files of an engine without the other components are for that engine:
    `inspect` shows how it starts.
    """
    name, spec = short_path(dst), spec_of(config, len(source.experts), source.name)
    base = spec.hub if spec else "MODEL"
    if is_pipeline:
        images = ["--image", "first.png"] if model_kind(config) == "i2v" else []
        images += ["--last-image", "last.png"] if has_position_embeddings(config) else []
        demo, cat = "a red circle moves right on a black background", "a cat plays the piano"
        prompt = demo if base == "demo" else cat
        return shell_line(["ascendit", "generate", name, prompt, *images])
    if engine is not None:
        return shell_line(["ascendit", "inspect", name])
    return shell_line(["ascendit", "repack", name, "-o", f"{name}-full", "--base", base])


def outputs_table(expert: str, outputs: Outputs) -> str:
    """The SQNR of layer outputs with and without smoothing, as Markdown."""
    rows = [f"| {name} | {q.plain:.2f} | {q.smoothed:.2f} |" for name, q in outputs.rows(0)]
    head = f"SQNR of the layer outputs of `{expert}` on captured activations in dB, mean over the blocks:"
    return "\n".join([head, "", "| layers | without smoothing | smoothed |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return _markdown(text.replace("\n", " "))


def _markdown(name: str) -> str:
    """A name as Markdown: it starts no link, tag, cell or code."""
    return re.sub(r"[<>\[\]|`]", r"\\\g<0>", escaped(name))


def _licence(root: Path) -> dict[str, Any]:
    """The licence entries of the source's card, if it has a readable one."""
    from huggingface_hub import metadata_load

    card = root / CARD_FILE
    try:
        own = card.is_file() and Home.of(root).contains(card) and card.stat().st_size <= _CARD_LIMIT
        data = metadata_load(card) if own else None
    except Exception:  # no card, not text, or invalid YAML
        return {}
    texts = {key: value for key, value in (data or {}).items() if key in _LICENCE_KEYS and value}
    return {key: escaped(value) for key, value in texts.items() if isinstance(value, str)}


def _versions() -> dict[str, str]:
    """Versions that can change the numbers."""
    return {"ascendit": __version__, **installed("torch")}


def read_base(base: Path | str, source: Layout | None = None, *, experts: bool = False) -> Layout:
    """Read the layout of `--base`. `source`: a checkpoint with all transformers of the model. `experts`: also
    download the transformers of the base.

    Raises UsageError (E-USE-01) if it is not a pipeline folder, CheckpointError (E-CKP-04) if the number of
    experts differs, and the errors of `model_folder` and `recognise`.
    """
    layout = recognise(model_folder(base, experts=experts))
    if layout.kind != "diffusers":
        raise UsageError(
            f"--base {base} is {KIND_LABELS[layout.kind]}",
            needs=f"a Diffusers folder with {INDEX_FILE}, text encoder and VAE",
            fix="pass the published folder of the model, for example hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        )
    if source is not None and len(layout.experts) != len(source.experts):
        raise _other_model(
            f"{source.root} has {_experts(source)}, but --base {layout.root} has {_experts(layout)}",
        )
    return layout


def _experts(layout: Layout) -> str:
    return "two experts" if len(layout.experts) > 1 else "one transformer"


def config_from(base: Layout, expert: Expert) -> dict[str, Any]:
    """Return the config of this expert in `base`.

    Raises CheckpointError (E-CKP-04), which names both, if the shapes of the base differ.
    """
    config = base.part(expert.name).config
    expected, shapes = expected_tensors(config), shapes_of(expert)
    misshapen = [
        f"{n} {list(shapes[n])}, not {list(s)}" for n, s in expected.items() if shapes.get(n, s) != s
    ]
    missing = [name for name in expected if name not in shapes]
    model = {n for n in shapes if n.endswith((".weight", ".bias", "scale_shift_table", ".pos_embed"))}
    extra = [n for n in model - expected.keys() if not any(part in n for part in IGNORED_PARTS)]
    kinds = {"with another shape": misshapen, "missing": missing, "not in the base": extra}
    if problems := problem_counts(kinds, 2):
        raise _other_model(f"{expert.path} does not match --base {base.root}: {problems}")
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


def _other_model(got: str) -> CheckpointError:
    return CheckpointError(
        got,
        needs="a base of the same model: the same number of experts, layers and shapes",
        fix="pass the Diffusers folder of the model that was quantized, or omit --base",
        code="E-CKP-04",
    )
