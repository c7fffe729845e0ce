"""What `quantize` and `repack` leave at the top of a folder: `ascendit.json` and the model card. No torch.

Neither holds a date, a path of this machine or anything else that differs between two runs of the same
command, so equal inputs give equal folders.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendit import __version__
from ascendit.checkpoint.layout import Layout
from ascendit.convert.calibration import Outputs

RECORD_FILE = "ascendit.json"
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
    lines = [*_front_matter(front), f"# {name}", ""]
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


def _front_matter(entries: Mapping[str, object]) -> list[str]:
    lines = ["---"]
    for key, value in entries.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {_yaml(item)}" for item in value)]
        else:
            lines.append(f"{key}: {_yaml(value)}")
    return [*lines, "---", ""]


def _yaml(value: object) -> str:
    """A YAML scalar; what is no plain word is quoted as JSON, which YAML reads."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _licence(root: Path) -> dict[str, str]:
    """The licence lines of the source's own card."""
    try:
        with open(root / CARD_FILE, encoding="utf-8") as f:
            text = f.read(_CARD_LIMIT)
    except (OSError, UnicodeDecodeError):
        return {}
    head = re.match(r"\s*---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    found = {}
    for line in (head[1] if head else "").splitlines():
        key, colon, value = line.partition(":")
        if colon and key in _LICENCE_KEYS and value.strip():
            found[key] = value.strip().strip("\"'")
    return found


def _versions() -> dict[str, str]:
    """Versions that can change the numbers, without importing anything."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"ascendit": __version__}
    try:
        found["torch"] = version("torch")
    except PackageNotFoundError:
        pass
    return found
