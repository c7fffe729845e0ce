"""Select the files of a repository that ascendit reads, so that nothing else is downloaded.

Three steps, each from the files of the step before: the files at the top (`TOP_FILES`), the small files of
each part (`part_files`), and the weights (`weight_files`). All are patterns of fnmatch, for both hubs.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ascendit.checkpoint.component import EXPERTS, STEM, WAN_FOLDERS, read_json, stays_inside
from ascendit.checkpoint.layout import INDEX_FILE
from ascendit.checkpoint.weight_sets import PICKLED, has_weight_suffix
from ascendit.errors import UsageError
from ascendit.names import listed
from ascendit.report import shell_line

TOP_FILES = (
    *(INDEX_FILE, "ascendit.json", "config.json", "README.md", "LICENSE*", "NOTICE*"),
    *("quant_model_*.json", f"{STEM}.safetensors.index.json"),
)
"""Read or copied by ascendit. A pattern that begins with a letter matches files at the top only."""
_ORIGINAL = (*EXPERTS, *(f"*{folder}" for folder in WAN_FOLDERS.values()))
"""Folders of transformers in a repository without `model_index.json`."""
_SUFFIXES = (".json", ".model", ".txt")
"""Configs, and the vocabularies of tokenizers."""
_STEMS = (STEM, "model", "quant_model_weight*")
"""Names of weight files, without `.safetensors`."""
_USELESS = (
    *PICKLED,
    *".gguf .pkl .msgpack .h5 .onnx .ot .tflite".split(),
    *".xml .png .jpg .jpeg .gif .webp .svg .mp4 .mov .webm .zip .tar .gz".split(),
)
SKIPPED = tuple(f"*{e}" for ending in _USELESS for e in (ending, ending.upper()))
"""Never downloaded, even if an index lists them: weights in other formats, of which most repositories also
have safetensors, pictures, videos."""
NESTED = "*/*/*"
"""Folders in the folder of a part are never read."""


def part_files(folder: Path) -> list[str]:
    """Patterns of the small files of all parts. `folder` has the files at the top.

    Raises CheckpointError (E-CKP-06) if `model_index.json` is not a JSON object.
    """
    return [f"{part}/*{suffix}" for part in _parts(folder) for suffix in _SUFFIXES]


def weight_files(folder: Path, *, experts: bool = True) -> list[str]:
    """Patterns of the weight files. `folder` has all small files; `experts`: False skips the transformers.

    Raises CheckpointError (E-CKP-06) for an index that is not a JSON object.
    """
    parts = [part for part in _parts(folder) if experts or part not in _ORIGINAL]
    if experts and not (folder / INDEX_FILE).is_file():
        parts.append("")
    patterns: list[str] = []
    for part in parts:
        prefix = f"{part}/" if part else ""
        names = [f"{prefix}{stem}.safetensors" for stem in _STEMS]
        indexes = sorted(path for name in names for path in folder.glob(f"{name}.index.json"))
        for index in indexes:
            prefix = f"{glob.escape(index.parent.name)}/" if part else ""
            patterns += [prefix + glob.escape(name) for name in _listed(index)]
        if not indexes:
            patterns += names
    return patterns


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match one of `patterns`, and neither `SKIPPED` nor `NESTED`."""
    wanted, unwanted = tuple(patterns), (*SKIPPED, NESTED)
    return [
        name
        for name in names
        if any(fnmatchcase(name, p) for p in wanted) and not any(fnmatchcase(name, p) for p in unwanted)
    ]


def absent(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Patterns of `weight_files` that match no name; of a part without an index, one match is enough."""
    names, patterns = list(names), list(patterns)
    complete = {pattern.rpartition("/")[0] for pattern in patterns if matching(names, [pattern])}
    alternatives = {f"{stem}.safetensors" for stem in _STEMS}

    def needless(pattern: str) -> bool:
        folder, _, name = pattern.rpartition("/")
        return name in alternatives and folder in complete

    return [pattern for pattern in patterns if not matching(names, [pattern]) and not needless(pattern)]


def single_file(model: str, names: Iterable[str]) -> list[str]:
    """The only weight file at the top, for a repository whose weights have a name of their own.

    Raises UsageError (E-HUB-01) if there are several, or none.
    """
    names = list(names)
    files = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if len(files) == 1:
        return files
    got = f"{model} has {len(files)} weight files at its top and no index of them: {listed(files)}"
    others = [name for name in sorted(names) if has_weight_suffix(name)]
    if not files:
        has = f", but {listed(others)}" if others else ""
        got = f"{model} has no weights in safetensors format at its top{has}"
    hub, _, repo = model.partition(":")
    command = "hf download" if hub == "hf" else "modelscope download"
    arguments = shell_line([repo.partition("@")[0], (files or others or ["FILE"])[0]])
    raise UsageError(
        got,
        needs="a repository with one model, as a Diffusers folder or in the original Wan format",
        fix=f"download the file of one model, and pass its path: {command} {arguments}",
        code="E-HUB-01",
    )


def _parts(folder: Path) -> tuple[str, ...]:
    """The folders of the parts, as patterns."""
    if not (folder / INDEX_FILE).is_file():
        return _ORIGINAL
    index = read_json(folder / INDEX_FILE)
    return tuple(glob.escape(name) for name in index if _is_part(name, index[name]))


def _is_part(name: str, entry: object) -> bool:
    match entry:
        case [str(), str()]:
            return stays_inside(name) and "/" not in name and not name.startswith("_")
    return False


def _listed(index: Path) -> Iterator[str]:
    """The names of files in an index; reading it reports the invalid ones."""
    weight_map = read_json(index).get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    yield from sorted({name for name in values if isinstance(name, str) and stays_inside(name)})
