"""Which files in a folder are the weights of one component, if no index and no usual name says so.

Safetensors files come before GGUF files, and these before pickles, as in Diffusers and transformers: a folder
may have the same weights in several formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ascendit.errors import CheckpointError
from ascendit.names import listed
from ascendit.report import counted

PICKLED = (".bin", ".pth", ".pt", ".ckpt")
"""Endings of files of torch.save."""
FORMATS = ((".safetensors",), (".gguf",), PICKLED)
"""Endings of weight files, preferred ones first."""
WEIGHT_SUFFIXES = tuple(suffix for suffixes in FORMATS for suffix in suffixes)
"""In lower case; `has_weight_suffix` ignores the case of a name."""
NUMBERED = re.compile(
    r"(?P<stem>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.\w+)?(?P<suffix>\.\w+)"
)
"""`model-00001-of-00003.safetensors`, or with a variant `model-00001-of-00003.fp16.safetensors`."""
_VARIANT = re.compile(
    r"\.(?P<a>\w+)(?:-\d{5}-of-\d{5})?\.\w+|-\d{5}-of-\d{5}\.(?P<b>\w+)\.\w+|\.\w+\.index\.(?P<c>\w+)\.json"
)
"""The end of a name after the usual stem, with the variant that `save_pretrained(variant=...)` adds."""
_OLD_STEM = "pytorch_model"
"""Name of pickled weights of transformers, beside `model.safetensors`."""


def has_weight_suffix(name: str) -> bool:
    """Whether the name of a file ends as those of weights do, in any case."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def weights_in(folder: Path) -> list[str]:
    """Names of the weight files in `folder`, sorted: those of the preferred format that it has."""
    names = sorted(path.name for path in folder.glob("*") if path.is_file())
    for suffixes in FORMATS:
        if chosen := [name for name in names if name.lower().endswith(suffixes)]:
            return chosen
    return []


def weight_set(folder: Path, stem: str) -> tuple[Path | None, tuple[Path, ...]]:
    """(index, files) of the weights in `folder`: an index, else files; (None, ()) if there are none.

    `stem`: the usual name, such as `diffusion_pytorch_model`. Raises CheckpointError (E-CKP-03) for several
    variants, an incomplete numbered set, and files that do not belong together.
    """
    if not folder.is_dir():
        return None, ()
    names = {path.name for path in folder.glob("*") if not path.is_dir()}
    usual = [f"{stem}.safetensors.index.json", f"{stem}.safetensors"]
    usual += [f"{x}{end}" for x in (stem, _OLD_STEM) for end in (".bin.index.json", ".bin")]
    if name := next((name for name in usual if name in names), None):
        path = folder / name
        return (path, ()) if name.endswith(".json") else (None, (path,))
    files = weights_in(folder)
    if variants := _variants(stem, [*files, *(name for name in names if name.endswith(".json"))]):
        if len(variants) > 1:
            raise _ambiguous(folder, files, f"several variants: {', '.join(sorted(variants))}")
        (files,) = variants.values()
        if index := next((name for name in files if name.endswith(".json")), None):
            return folder / index, ()
    if files and not is_complete_set(files):
        raise _ambiguous(
            folder, files, f"{counted(len(files), 'weight file')} without an index: {listed(files)}"
        )
    return None, tuple(folder / name for name in files)


def _variants(stem: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Variant -> its files: `fp16` of `model.fp16.safetensors`."""
    variants: dict[str, list[str]] = {}
    for name in names:
        match = _VARIANT.fullmatch(name.removeprefix(stem)) if name.startswith(stem) else None
        if match and (variant := match["a"] or match["b"] or match["c"]) != "index":
            variants.setdefault(variant, []).append(name)
    return variants


def is_complete_set(names: Sequence[str]) -> bool:
    """Whether `names` are one file, or all files of one numbered set."""
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    if not matches:
        return len(names) == 1
    sets = {(m["stem"], m["count"], m["variant"], m["suffix"]) for m in matches}
    numbers = sorted(int(m["number"]) for m in matches)
    complete = numbers == list(range(1, int(matches[0]["count"]) + 1))
    return len(matches) == len(names) and len(sets) == 1 and complete


def _ambiguous(folder: Path, names: Sequence[str], problem: str) -> CheckpointError:
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    counts = {int(m["count"]) for m in matches}
    fix = f"pass one of the files, for example {folder / names[0]}, or move the others to other folders"
    if len(matches) == len(names) and len(counts) == 1:
        (count,) = counts
        present = {int(m["number"]) for m in matches}
        missing = [number for number in range(1, count + 1) if number not in present]
        if missing:
            problem += f"; number {', '.join(map(str, missing[:5]))} of {count} is missing"
            fix = "download the missing files"
    return CheckpointError(
        f"{folder} has {problem}",
        needs="one file, one complete numbered set, or an index",
        fix=fix,
        code="E-CKP-03",
    )
