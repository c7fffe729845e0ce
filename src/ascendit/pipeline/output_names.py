"""Names of output files: from time, prompt and seed, or one name for many videos.

default_name("红色的圆", 3, datetime.now())    # outputs/20261120-193012_红色的圆_s3.mp4
names_of("a.mp4", requests, [1, 1])           # a_s7.mp4, a_s8.mp4
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.video import locate
from ascendit.report import numbered

FOLDER = Path("outputs")
MAX_CHARACTERS, MAX_BYTES = 40, 96
"""Limits for the prompt in a name; some file systems allow names of 143 bytes."""
_LITTLE = frozenset("a an and at in is of on the to with".split())
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Invisible letters and marks."""


def default_name(prompt: str, seed: int, when: datetime) -> Path:
    """`outputs/20261120-193012_calico-cat-piano_s42.mp4`: time, prompt, seed. See `slug`."""
    return FOLDER / f"{when:%Y%m%d-%H%M%S}_{slug(prompt) or 'video'}_s{seed}.mp4"


def slug(prompt: str) -> str:
    """Up to 40 letters and digits of the prompt, in any script, lower case, with `-` between words.

    Latin letters lose their accents. Symbols, emoji, control characters and marks of direction are left out;
    empty if nothing remains, or if the file system has no such letters.
    """
    text = re.sub("(?<=[a-z])[\u0300-\u036f]+", "", unicodedata.normalize("NFKD", prompt.lower()))
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    kinds = ((c, unicodedata.category(c)) for c in text)
    text = "".join("" if k == "Cf" else c if k[0] in "LN" or k in ("Mn", "Mc") else " " for c, k in kinds)
    name = ""
    for word in map(_without_leading_marks, text.split()):
        longer = f"{name}-{word}" if name and word else word or name
        if len(longer) > MAX_CHARACTERS or len(longer.encode()) > MAX_BYTES:
            name = name or _cut(longer)
            break
        if word not in _LITTLE:
            name = longer
    try:
        name.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError:
        return ""
    return name


def _without_leading_marks(word: str) -> str:
    start = next((i for i, c in enumerate(word) if unicodedata.category(c)[0] != "M"), len(word))
    return word[start:]


def _cut(word: str) -> str:
    """The first letters of a long word; a letter keeps its marks."""
    cut = word[:MAX_CHARACTERS].encode()[:MAX_BYTES].decode(errors="ignore")
    if len(cut) < len(word) and unicodedata.category(word[len(cut)])[0] == "M":
        letters = [i for i, c in enumerate(cut) if unicodedata.category(c)[0] != "M"]
        cut = cut[: letters[-1]] or cut
    return cut


def names_of(
    output: str | None, requests: Sequence[GenerateRequest], rows: Sequence[int], when: datetime
) -> list[str]:
    """The path of each video, all different. `rows`: number of the prompt of each request, from 1.

    A folder, or no `output`, gets names as `default_name` makes them; `a.mp4` becomes `a_s7.mp4`, or with
    several prompts `a_01_s7.mp4`; a single video keeps it. Raises UsageError (E-USE-01) for an unknown
    extension.
    """
    if output is None or output.endswith("/") or os.path.isdir(output):
        folder = FOLDER if output is None else Path(output)
        paths = [folder / default_name(r.prompt, r.seed, when).name for r in requests]
    else:
        locate(output, requests[0].num_frames)
        if len(requests) == 1:
            return [output]
        base, width = Path(output), len(str(max(rows)))
        numbers = [f"_{row:0{width}d}" if max(rows) > 1 else "" for row in rows]
        names = zip(numbers, requests, strict=True)
        paths = [base.with_name(f"{base.stem}{n}_s{r.seed}{base.suffix}") for n, r in names]
    return _different(paths)


def _different(paths: Sequence[Path]) -> list[str]:
    """`paths` as text, with `-2`, `-3` .. in names that occur again."""
    names: dict[str, None] = {}
    numbers: dict[Path, Iterator[Path]] = {}
    for path in paths:
        name = str(path)
        later = numbers.setdefault(path, numbered(path))
        while name in names:
            name = str(next(later))
        names[name] = None
    return [*names]
