"""Single weight files as components of a model: `[NAME=]FILE`. Does not import torch.

    transformer=Wan2.2-High-Q4_K_M.gguf  transformer_2=Wan2.2-Low-Q4_K_M.gguf  umt5-xxl-encoder-Q8_0.gguf

Without a name, the tensors of a file say which component it is. Of two transformers, the high-noise expert is
the one with `high` in its name, and the low-noise expert the one with `low`. Of an all-in-one checkpoint, the
name chooses the component: `text_encoder=FILE`, and without a name it is the transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ascendit.checkpoint.component import EXPERT_ALIASES, EXPERTS, Part, noise_of
from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import KIND_LABELS, Layout, recognise
from ascendit.checkpoint.part_names import other_model, recognise_part
from ascendit.checkpoint.quant_metadata import CONFIG_KEY
from ascendit.checkpoint.stored_kinds import parts_in
from ascendit.checkpoint.trust import PART_CLASSES
from ascendit.errors import UsageError
from ascendit.names import listed, naming_of

PART_NAMES = {
    **EXPERT_ALIASES,
    "text_encoder": "text_encoder",
    "vae": "vae",
    "image_encoder": "image_encoder",
}
"""Allowed before `=`, in any case -> component."""


def split_name(text: str | Path) -> tuple[str | None, str]:
    """(component or None, path) of `[NAME=]FILE`; FILE may contain `=`."""
    name, equals, path = str(text).partition("=")
    part = PART_NAMES.get(name.strip().lower()) if equals else None
    return (part, path) if part else (None, str(text))


def read_part_files(files: Sequence[str | Path], num_experts: int = 1) -> Layout:
    """The components in `files`, each `[NAME=]FILE`, as a layout of the kind `file`.

    `num_experts`: transformers of the model; of two, the name of a file has to say which one it is.
    Raises UsageError: E-USE-01 for a folder, a name that does not fit the tensors, and two files for one
    component; E-USE-02 for a missing file; CheckpointError (E-CKP-01) for a file of another kind.
    """
    parts: dict[str, Part] = {}
    unnamed: list[Part] = []
    for text in files:
        name, path = split_name(text)
        part = _part_of(path, name)
        if part.name in EXPERTS and name is None:
            unnamed.append(part)
        else:
            _add(parts, part)
    for part in unnamed:
        several = len(unnamed) > 1 or num_experts > 1
        _add(parts, replace(part, name=_expert_of(part.path)) if several else part)
    root = next(iter(parts.values())).path
    ordered = dict.fromkeys(name for name in (*PART_NAMES.values(), *parts) if name in parts)
    return Layout("file", root, root.stem, {}, {name: parts[name] for name in ordered})


def _part_of(path: str, name: str | None) -> Part:
    """The component in one file, called `name` if that fits its tensors: of several, the one of that name."""
    if not path.startswith(("hf:", "ms:")) and not Path(path).expanduser().exists():
        raise _no_file(path)
    layout = recognise(model_folder(path))
    if len(layout.parts) != 1 or not layout.root.is_file():
        raise UsageError(
            f"{path} is {KIND_LABELS[layout.kind]}",
            needs="files with one component each, if several are passed",
            fix="pass the files of the components, or only this folder",
        )
    (part,) = layout.parts.values()
    if name is None or name == part.name:
        return part
    if {name, part.name} <= set(EXPERTS):
        return replace(part, name=name)
    header = read_header(layout.root)
    if name in parts_in(header):
        row = PART_CLASSES[name]
        return Part(name, layout.root, row.library, row.classes[0], files=(layout.root,))
    if recognise_part(header) is None and naming_of(header) is None:
        other = other_model(header) or "no component of a Wan model"
        got, fix = f"{other}: {listed(header, 3)}", f"pass the {name} of a Wan model, or omit {name}="
    else:
        got, fix = f"a {part.name}", f"pass it as {part.name}={path}, or without a name"
    raise UsageError(
        f"{name}={path}, but the file has the tensors of {got}",
        needs=f"a file with the weights of a {name}",
        fix=fix,
    )


def _no_file(path: str) -> UsageError:
    """The error for a path without a file, or with another name before `=`."""
    name, equals, file = path.partition("=")
    names = ", ".join(dict.fromkeys(PART_NAMES.values()))
    fix = f"correct the path, or write one of {names} instead of {name}" if equals else "correct the path"
    needs = f"[NAME=]FILE, with a name among {names}"
    return UsageError(f"no file at {path}", needs=needs, fix=fix, code="E-USE-02")


def _expert_of(path: Path) -> str:
    """The expert in the name of a file. Raises UsageError (E-USE-01) if it names none, or both."""
    if (noise := noise_of(path.stem)) is None:
        raise UsageError(
            f"{path} is one of two transformers, and its name does not say whether for high or low noise",
            needs="the expert of each transformer file",
            fix=f"pass it as transformer={path} (high noise) or transformer_2={path} (low noise)",
        )
    return EXPERT_ALIASES[noise]


def _add(parts: dict[str, Part], part: Part) -> None:
    if part.name in parts:
        raise UsageError(
            f"{parts[part.name].path} and {part.path} are both the {part.name}",
            needs="one file for each component",
            fix="omit one of them, or name the experts: transformer=FILE transformer_2=FILE",
        )
    parts[part.name] = part


def with_part_files(layout: Layout, files: Layout) -> Layout:
    """The pipeline `layout` with the components of `files` in place of its own.

    A component keeps its config, without `quantization_config`, which describes the replaced weights. Raises
    CheckpointError (E-CKP-01) for a layout that is not a pipeline, UsageError (E-USE-01) for a component that
    it does not have.
    """
    layout.require_pipeline()
    if absent := [name for name in files.parts if name not in layout.parts]:
        raise UsageError(
            f"{files.parts[absent[0]].path} is a {absent[0]}, which {layout.name} does not have",
            needs=f"files for its components: {', '.join(layout.parts)}",
            fix="pass another model, or omit the file",
        )
    parts = {
        name: _replaced(part, files.parts[name]) if name in files.parts else part
        for name, part in layout.parts.items()
    }
    return replace(layout, parts=parts)


def _replaced(part: Part, file: Part) -> Part:
    config = {key: value for key, value in part.config.items() if key != CONFIG_KEY}
    config |= {key: value for key, value in file.config.items() if key == CONFIG_KEY}
    return replace(part, path=file.path, files=file.files, index=file.index, config=config)
