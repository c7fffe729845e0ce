"""What goes with the weights: `ascendit.json`, the model card, and the other parts of the model. No torch.

Record and card hold no date, no path of this machine and nothing else that differs between two runs of the
same command, so equal inputs give equal folders. The other parts come from the base of a repacked
transformer, its published Diffusers folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import INDEX_FILE, RECORD_FILE, WORDS, Layout, recognise
from ascendit.checkpoint.output_folder import link_or_copy
from ascendit.checkpoint.quant_metadata import CONFIG_KEY
from ascendit.checkpoint.transformer import Expert, shapes_of
from ascendit.convert.report import Outputs
from ascendit.errors import CheckpointError, UsageError
from ascendit.names import TOLERATED, expected_tensors, problem_counts
from ascendit.version import __version__, installed

CARD_FILE = "README.md"
RECORD_VERSION = 1
PIPELINE_TAGS = {"t2v": "text-to-video", "i2v": "image-to-video", "ti2v": "text-to-video"}
_LICENCE_KEYS = ("license", "license_name", "license_link")
_CARD_LIMIT = 1 << 20  # bytes of a source's README.md that are looked at


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a folder was made; the same for both verbs. What is empty is left out."""

    verb: str
    """quantize or repack."""
    layout: Layout
    """The source."""
    model_kind: str
    """t2v, i2v, ti2v."""
    command: str
    """A line that makes the folder again, see `command_line`."""
    files: Mapping[str, str]
    """Path in the folder -> sha256, if they were computed."""
    schemes: Mapping[str, int]
    """Scheme -> number of linear layers, over all experts."""
    bits_per_weight: float
    recipe: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that belongs into `ascendit.json`."""
    notes: Sequence[str] = ()
    """Paragraphs for the card."""


def ascendit_json(made: Made) -> dict[str, Any]:
    """The record: where the folder comes from, what was done, and the sha256 of each file that was hashed."""
    data: dict[str, Any] = {
        "version": RECORD_VERSION,
        "made_by": f"ascendit {__version__} {made.verb}",
        "versions": _versions(),
        "command": made.command,
        "source": {"name": source_name(made.layout), "layout": made.layout.kind},
        "model_kind": made.model_kind,
        "layers": dict(made.schemes),
        "bits_per_weight": round(made.bits_per_weight, 3),
        "recipe": dict(made.recipe),
        "loras": [dict(lora) for lora in made.loras],
        **made.details,
        "files": dict(sorted(made.files.items())),
    }
    return {key: value for key, value in data.items() if value not in ({}, [])}


def model_card(made: Made, name: str) -> str:
    """README.md for a hub: YAML front matter, then what the folder is. `name`: of the folder."""
    from huggingface_hub import CardData  # 0.1 s

    base = made.layout.source
    front = {
        "base_model": base.rsplit("@", 1)[0] if base else printable(made.layout.name),
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "pipeline_tag": PIPELINE_TAGS[made.model_kind],
        "tags": ["ascendit", *(scheme for scheme in made.schemes if scheme != "bf16")],
        **_licence(made.layout.root),
    }
    layers = ", ".join(f"{count} {scheme}" for scheme, count in made.schemes.items())
    rows = [("Made from", source_name(made.layout)), ("Linear layers", layers)]
    rows.append(("Bits per weight", f"{made.bits_per_weight:.2f} (transformers, scales included)"))
    if about := made.recipe.get("about"):
        rows.insert(1, ("Recipe", f"{made.recipe['name']}: {about}"))
    rows += [("LoRA", f"{lora['file']} at {lora['weight']:g}") for lora in made.loras]
    rows += [(key, version) for key, version in _versions().items()]
    lines = ["---", CardData(**front).to_yaml(), "---", "", f"# {name}", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows), ""]
    lines += ["```bash", made.command, "```", ""]
    for note in made.notes:
        lines += [note, ""]
    hashes = " and the sha256 of each file" if made.files else ""
    lines += [
        f"`{RECORD_FILE}` has the rules and their scale rules{hashes};",
        "`quant_model_description.json` beside the weights has the scheme of every tensor.",
    ]
    return "\n".join(lines) + "\n"


def write_made(folder: Path, made: Made, name: str) -> None:
    """Write both files into `folder`. `name`: what the folder will be called."""
    write_json(folder / RECORD_FILE, ascendit_json(made))
    (folder / CARD_FILE).write_text(model_card(made, printable(name)), encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Indented JSON with a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def source_name(layout: Layout) -> str:
    """`org/name@revision` from a hub, else the name of the folder."""
    return layout.source or printable(layout.name)


def printable(name: str) -> str:
    """A file name as text that can be written: bytes that are no UTF-8 as `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def command_line(verb: str, layout: Layout, dst: Path, flags: Iterable[tuple[str, object]]) -> str:
    """`ascendit quantize hf:org/name@rev -o name --scheme mxfp8`: folders by their names alone.

    A flag with None or False is left out, True stands without a value, a list repeats the flag.
    """
    hub = "ms" if "modelscope" in layout.root.parts else "hf"
    source = f"{hub}:{layout.source}" if layout.source else printable(layout.name)
    words = ["ascendit", verb, source, "-o", printable(dst.name)]
    for flag, value in flags:
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            if one is True:
                words.append(flag)
            elif one is not None and one is not False:
                words += [flag, str(one)]
    return shlex.join(words)


def outputs_table(expert: str, outputs: Outputs) -> str:
    """Signal to noise of what comes out, with and without smoothing, as Markdown."""
    rows = [f"| {name} | {q.plain:.2f} | {q.smoothed:.2f} |" for name, q in outputs.rows(0)]
    head = f"Signal to noise of the outputs of `{expert}` on captured tokens, in dB, mean over the blocks:"
    return "\n".join([head, "", "| layers | without smoothing | smoothed |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _licence(root: Path) -> dict[str, Any]:
    """The licence lines of the source's own card, if that can be read."""
    from huggingface_hub import metadata_load

    card = root / CARD_FILE
    try:
        data = metadata_load(card) if card.stat().st_size <= _CARD_LIMIT else None
    except Exception:  # no card, no text, or no YAML
        return {}
    return {key: value for key, value in (data or {}).items() if key in _LICENCE_KEYS and value}


def _versions() -> dict[str, str]:
    """Versions that can change the numbers."""
    return {"ascendit": __version__, **installed("torch")}


_LICENCE = re.compile(r"(?:LICEN[CS]E|NOTICE)\b", re.IGNORECASE)


def read_base(base: Path | str, source: Layout) -> Layout:
    """The layout of `--base`. UsageError E-USE-01 unless it is a pipeline folder with as many experts."""
    layout = recognise(model_folder(base, experts=False))
    if layout.kind != "diffusers":
        raise UsageError(
            f"--base {base} is {WORDS[layout.kind]}",
            needs=f"a Diffusers folder with {INDEX_FILE}, text encoder and VAE",
            fix="give the published folder of the model, for example hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        )
    if len(layout.experts) != len(source.experts):
        raise _other_model(
            f"{source.root} has {_experts(source)}, --base {layout.root} has {_experts(layout)}",
        )
    return layout


def _experts(layout: Layout) -> str:
    return "two experts" if len(layout.experts) > 1 else "one transformer"


def config_from(base: Layout, expert: Expert) -> dict[str, Any]:
    """The config of this expert in `base`.

    Raises CheckpointError E-CKP-04, which names both, if the base is of another shape.
    """
    config = base.part(expert.name).config
    wanted, found = expected_tensors(config), shapes_of(expert)
    unlike = [f"{n} {list(found[n])} is {list(s)} there" for n, s in wanted.items() if found.get(n, s) != s]
    lacking = [name for name in wanted if name not in found]
    model = {n for n in found if n.endswith((".weight", ".bias", "scale_shift_table", ".pos_embed"))}
    extra = [n for n in model - wanted.keys() if not any(part in n for part in TOLERATED)]
    kinds = {"of other shapes": unlike, "that it lacks": lacking, "that the base lacks": extra}
    if problems := problem_counts(kinds, 2):
        raise _other_model(f"{expert.path} does not fit --base {base.root}: {problems}")
    return {key: value for key, value in config.items() if key != CONFIG_KEY}


def _other_model(got: str) -> CheckpointError:
    return CheckpointError(
        got,
        needs="a base of the same model: as many experts, the same layers and shapes",
        fix="give the Diffusers folder of the model that was quantized, or leave --base out",
        code="E-CKP-04",
    )


def place_parts(base: Layout, folder: Path, *, copy: bool) -> tuple[str, ...]:
    """Put everything but the transformers into `folder`, linked unless `copy`. Returns what was placed.

    Its index and its licences are copied in any case.
    """
    placed = []
    for name, part in base.parts.items():
        if part not in base.experts:
            link_or_copy(part.path, folder / name, copy=copy)
            placed.append(name)
    licences = sorted(p.name for p in base.root.iterdir() if p.is_file() and _LICENCE.match(p.name))
    for file in [INDEX_FILE, *licences]:
        shutil.copyfile(base.root / file, folder / file)
        placed.append(file)
    return tuple(placed)
