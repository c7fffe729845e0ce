"""The videos of one `generate` call: rows of `--prompts`, times the seeds of `--seed` and `--num-videos`.

A text file has one prompt per line; blank lines and lines that begin with # are skipped. A `.jsonl` file has
one object per line, with `prompt` and other fields of a request.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendit.cli.generate_options import KEYS, merge, typed_layer
from ascendit.errors import UsageError
from ascendit.pipeline.request import MAX_SEED, GenerateRequest
from ascendit.validation import MAX_BYTES, parse

MAX_VIDEOS = 10_000
STDIN = "-"
OTHER_SYNTAX = (".json", ".toml", ".yaml", ".yml", ".csv", ".tsv")
"""Extensions of files whose lines are not prompts."""
ROW_KEYS = frozenset(GenerateRequest.model_fields) | {"seconds", "preset"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt."""

    prompt: str
    source: str = ""
    """Name of its line in messages."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request that replace those of the call, besides the prompt."""


def read_prompts(file: str) -> list[Row]:
    """The rows of a file, or of standard input for `-`.

    Raises UsageError: E-USE-02 for a file that cannot be read, E-USE-01 for one without prompts, or with
    invalid rows.
    """
    label = "standard input" if file == STDIN else file
    if file.lower().endswith(OTHER_SYNTAX):
        needs = "text with one prompt per line, or a .jsonl file with one object per line"
        raise UsageError(f"--prompts {file}", needs=needs, fix="--prompts prompts.txt")
    rows = []
    for number, line in enumerate(_text_of(file, label).split("\n"), 1):
        line = line.strip()
        source = f"line {number} of {label}"
        if not line or line.startswith("#"):
            continue
        rows.append(_json_row(line, source) if file.endswith(".jsonl") else Row(prompt=line, source=source))
    if not rows:
        needs = "one prompt per line; blank lines and lines that begin with # are skipped"
        raise UsageError(f"no prompt in {label}", needs=needs, fix="write a prompt into the file")
    return rows


def _text_of(file: str, label: str) -> str:
    try:
        if file == STDIN:
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with open(file, "rb") as opened:
                data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8-sig")
    except OSError as e:
        needs = "a text file with one prompt per line, or - for stdin"
        got = f"--prompts {label}: {e.strerror}"
        raise UsageError(got, needs=needs, fix="correct the path", code="E-USE-02") from e
    except ValueError as e:
        fix = "save the file as UTF-8 text"
        raise UsageError(f"--prompts {label}: {e}", needs="text in UTF-8, up to 16 MiB", fix=fix) from e


def _json_row(line: str, source: str) -> Row:
    """A line of a `.jsonl` file. Raises UsageError (E-USE-01)."""
    needs = 'an object with a prompt: {"prompt": "a red circle", "seed": 3}'
    try:
        data = parse(line, "json")
    except ValueError as e:
        raise UsageError(f"{source}: {e}", needs=needs, fix="correct the line") from e
    if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
        raise UsageError(f"{source} has no prompt", needs=needs, fix="correct the line")
    if others := sorted((set(data) & set(KEYS)) - ROW_KEYS):
        needs = f"keys of one video, as {', '.join(sorted(ROW_KEYS)[:6])}, .."
        fix = f"omit {others[0]}, or set it for all videos with --set"
        raise UsageError(f"{source}: {', '.join(others)}", needs=needs, fix=fix)
    values = typed_layer(data, source=source)
    return Row(prompt=values.pop("prompt"), source=source, fields=values)


# ---- seeds --------------------------------------------------------------------------------------


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds of `--seed`: `7`, `1,2,3`, `0-7`, `0-3,10`.

    Raises UsageError (E-USE-01) for other texts, a seed that occurs twice, or too many.
    """
    needs = "a whole number of at least 0, a list as 1,2,3 or a range as 0-7"
    seeds: list[int] = []
    for item in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MAX_SEED:
            fix = "omit --seed for a random one" if text.strip() == "-1" else "--seed 42"
            raise UsageError(f"--seed {text}", needs=needs, fix=fix)
        _check_count(last - first + 1 + len(seeds))
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        fix = f"--seed {','.join(map(str, dict.fromkeys(seeds)))}"
        raise UsageError(f"--seed {text}: {twice} twice", needs="different seeds", fix=fix)
    return tuple(seeds)


def _check_count(videos: int) -> None:
    if videos > MAX_VIDEOS:
        needs = f"at most {MAX_VIDEOS} videos in one call"
        raise UsageError(f"{videos} videos", needs=needs, fix="split the call into several")


def combinations(
    rows: Sequence[Row], fields: Mapping[str, Any], seeds: Sequence[int], num_videos: int | None
) -> Iterator[tuple[int, Row, dict[str, Any]]]:
    """(number of the row from 1, row, fields of the request) of each video, every row with every seed.

    `fields`: those of the call. `num_videos`: consecutive seeds, from the seed of the row or the call on;
    without one, from one random seed for all rows. Raises UsageError (E-USE-01).
    """
    if num_videos is not None and (num_videos < 1 or len(seeds) > 1):
        got = f"--num-videos {num_videos}" + (f" and {len(seeds)} seeds" if len(seeds) > 1 else "")
        needs = "a whole number of at least 1; the seeds are consecutive, from one --seed on"
        fix = "omit --num-videos" if len(seeds) > 1 else "--num-videos 4"
        raise UsageError(got, needs=needs, fix=fix)
    _check_count(len(rows) * (num_videos or max(1, len(seeds))))
    random = secrets.randbelow(2**31)
    for number, row in enumerate(rows, 1):
        merged = merge(dict(fields), dict(row.fields))
        own: Sequence[int] = [] if "seed" in row.fields else seeds
        if num_videos is not None:
            first = merged.get("seed", random)
            own = range(first, first + num_videos)
        if not own:
            yield number, row, merged
        for seed in own:
            yield number, row, merged | {"seed": seed}
