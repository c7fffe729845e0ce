"""From values to entries of a recording, without parts that change from run to run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMES = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")
RECIPES = ("recommended-fp4", "ascend-w8a8f8", "ascend-w4a4", "ascend-w4a4f4", "dualscale-bf16-5")
ENGINES = ("vllm-omni", "sglang", "mindie")
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
PROMPT = "a red circle moves right on a black background"
Records = Iterator[tuple[str, str]]

VOLATILE = {
    "seconds": "time that a run took",
    "microseconds": "time that a call took",
    "gib_per_s": "speed of a run",
    "made": "date of a report",
    "machine": "kernel of the system",
    "versions": "of Python and the libraries",
}
"""Keys of JSON objects whose values are replaced by `-` -> their content."""
FREE = ("memory", "this folder", "platform")
"""Rows of `doctor` whose result changes from run to run: free memory, free disk, kernel of the system."""
NUMBER = re.compile(r"\b\d+(\.\d+)+\S*")
"""Versions of libraries, in results of `doctor` and in the table of a model card."""
SOURCE_FILE = re.compile(r"\(\w+\.py\)")
"""A source file named in a text, such as the origin of defaults: files may move."""
LONG = 20_000
"""Longer texts, in characters, are recorded as their sha256."""


@dataclass(frozen=True)
class Context:
    """Folders of one area. `names`: folders whose paths are replaced in texts -> the replacement."""

    work: Path
    sources: Path
    tests: Path
    demo: Path
    names: Mapping[str, str]

    def text(self, text: str) -> str:
        """`text` with names for paths that differ from run to run, and without other volatile parts."""
        for path, name in sorted(self.names.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(path, name)
        text = SOURCE_FILE.sub("(<file>)", text)
        return re.sub(r"(?m)^(\| (?:ascendit|torch) \|) \S+ \|$", r"\1 - |", text)

    def json(self, value: Any) -> str:
        """A JSON value as text, without volatile parts."""
        return self.text(json.dumps(scrubbed(value), indent=1, ensure_ascii=False))


def scrubbed(value: Any) -> Any:
    """A JSON value without the keys in VOLATILE and the measurements of `doctor`."""
    if isinstance(value, list):
        return [scrubbed(v) for v in value]
    if not isinstance(value, dict):
        return value
    clean = {key: "-" if key in VOLATILE else scrubbed(v) for key, v in value.items()}
    if {"item", "found", "status"} <= clean.keys():
        clean["found"] = "-" if clean["item"] in FREE else NUMBER.sub("-", str(clean["found"]))
    return clean


def sha(*parts: bytes | str) -> str:
    """sha256 of the concatenated parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def items(key: str, value: Any) -> Records:
    """A value and its items: tensors and arrays as sha256 of dtype, shape and bytes, others as text."""
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
    """The items of the result of a call; for an error its class and code, and its text under `messages/`."""
    try:
        value = call(*args, **kwargs)
    except Exception as error:
        yield key, f"refused: {type(error).__name__} {getattr(error, 'code', '')}".rstrip()
        yield f"messages/{key}", str(error)
    else:
        yield from items(key, value)


def safetensors(key: str, file: Path) -> Records:
    """Every tensor of a file by name, read without a library; then their order and the metadata."""
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


def folder(key: str, path: Path, context: Context) -> Records:
    """Every file below `path`: links by target, JSON and text by content, other files by sha256.

    An mp4 is recorded by its header: x264 does not always write the same bytes for the same frames.
    """
    for file in sorted(path.rglob("*")):
        name = f"{key}/{file.relative_to(path)}"
        if file.is_symlink():
            yield name, f"link to {os.readlink(file)}"
        elif file.suffix == ".safetensors":
            yield f"{name}/:mode", oct(file.stat().st_mode & 0o777)
            yield from safetensors(name, file)
        elif file.suffix == ".json":
            yield from items(name, context.json(json.loads(file.read_bytes())))
        elif file.suffix in (".md", ".toml", ".yaml", ".txt"):
            yield from items(name, context.text(file.read_text(encoding="utf-8")))
        elif file.suffix == ".mp4":
            yield from items(name, stream(file))
        elif file.is_file():
            yield name, sha(file.read_bytes())


def stream(file: Path) -> dict[str, Any]:
    """Format of a video file, from its header."""
    import av

    with av.open(str(file)) as container:
        video = container.streams.video[0]
        codec = video.codec_context
        count = sum(packet.size > 0 for packet in container.demux(video))
        colours = codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc
    properties = {"codec": codec.name, "size": f"{codec.width}x{codec.height}", "pixels": codec.pix_fmt}
    return properties | {"rate": video.average_rate, "frames": count, "colours": [int(c) for c in colours]}


def written(key: str, context: Context, call: Callable[..., Any], source: Any, **options: Any) -> Records:
    """The folder that `quantize` or `repack` writes, named after the case, or the error."""
    target = context.work / key.replace("/", "_")
    yield from outcome(f"{key}/:end", lambda: call(source, target, **options) and "done")
    if target.is_dir():
        yield from folder(key, target, context)


def cli(context: Context, *args: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in the folder of the area."""
    command = [sys.executable, "-m", "ascendit", *map(str, args)]
    return subprocess.run(command, cwd=context.work, capture_output=True, text=True, timeout=900)


def cli_outcome(key: str, context: Context, *args: Any) -> Records:
    """The exit status of a command with --json, and its object; errors as in `outcome`."""
    done = cli(context, *args, "--json")
    try:
        value = json.loads(done.stdout)
    except ValueError:
        value = {"stdout": done.stdout, "stderr": done.stderr[-2000:]}
    error = value.pop("error", None) if isinstance(value, dict) else None
    yield f"{key}/exit", f"{done.returncode} {error['code'] if error else ''}".rstrip()
    if error:
        yield f"messages/{key}", context.json(error)
    if value:
        yield from items(f"{key}/json", context.json(value))
