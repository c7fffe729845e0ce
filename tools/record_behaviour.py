"""Record the behaviour of ascendit and compare two recordings, to test changes that must not alter it.

    python tools/record_behaviour.py record before.json                     # takes some minutes
    python tools/record_behaviour.py record after.json --package ../other/src --only quantize repack
    python tools/record_behaviour.py compare before.json after.json --common --ignore messages

A recording is one flat JSON object, `mode/area/case/item` -> a sha256 of a tensor, or a short text. `mode` is
`on` or `off`, with the native kernels and without, or `any` if they have no influence. Each area runs in a
process of its own on the package at `--package`. Only the command line and documented Python names are used,
so that files of the package may move between two recordings.

The native kernels are turned off by a PATH without a compiler, which is checked with `doctor`. Recordings can
be compared if both were made on one machine, with the same libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behaviour import checkpoints, numbers, texts, twin
from behaviour.sources import make_sources
from behaviour.values import Context, Records

REPO = Path(__file__).resolve().parents[1]

# ---- recording ----------------------------------------------------------------------------------

FAILED = ":failed"
"""The case of an area that failed."""


@dataclass(frozen=True)
class Area:
    """`kernels`: recorded with and without native kernels, else once. `sources`: reads the area `sources`."""

    run: Callable[[Context], Records]
    kernels: bool = True
    sources: bool = True


AREAS = {
    "sources": Area(make_sources, kernels=False),
    "names": Area(texts.names, kernels=False, sources=False),
    "flags": Area(texts.flags, kernels=False, sources=False),
    "codes": Area(texts.codes, kernels=False, sources=False),
    "errors": Area(texts.errors, kernels=False),
    "inspect": Area(texts.reports, kernels=False),
    "dry-run": Area(texts.dry_runs, kernels=False),
    "doctor": Area(numbers.doctor, sources=False),
    "formats": Area(numbers.formats, sources=False),
    "twin": Area(twin.twin, sources=False),
    "layers": Area(numbers.layers, sources=False),
    "quantize": Area(checkpoints.quantize),
    "lora": Area(checkpoints.lora),
    "repack": Area(checkpoints.repack),
    "frames": Area(numbers.frames),
    "files": Area(numbers.files, sources=False),
}
SETTINGS = ("ALGO", "FAST_LAYERNORM", "USE_SUB_HEAD", "T5_LOAD_CPU", "PRECISION", "OVERLAP", "PYTHONHOME")
"""Environment variables that ascendit or Python reads, removed for a recording."""


def environment(package: Path, mode: str, work: Path) -> dict[str, str]:
    """Environment of every process of a recording. Without native kernels: an empty PATH."""
    variables = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    variables |= {"PYTHONPATH": str(package), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    variables |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "TZ": "UTC", "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HOME": str(work / "hub")}
    return variables | ({"PATH": str(work / "nothing")} if mode == "off" else {})


def child(args: argparse.Namespace) -> None:
    """Run one area and write its entries."""
    context = Context(**json.loads(args.context, object_hook=paths))
    records: dict[str, str] = {}
    for key, value in AREAS[args.area].run(context):
        key = context.text(key)
        assert key not in records, key
        records[key] = context.text(value)
    Path(args.out).write_text(json.dumps(records))


def paths(value: dict[str, Any]) -> dict[str, Any]:
    """`Context` from its JSON."""
    return {key: Path(v) if key in ("work", "sources", "tests", "demo") else v for key, v in value.items()}


def run_area(area: str, mode: str, package: Path, context: Context) -> dict[str, str]:
    """The entries of one area, run in its own process. If it fails: the end of its stderr."""
    context.work.mkdir(parents=True, exist_ok=True)
    file, text = context.work / "records.json", json.dumps(dataclasses.asdict(context), default=str)
    command = [sys.executable, str(Path(__file__).resolve()), "area", area, str(file), text]
    env = environment(package, mode, context.sources.parent)
    done = subprocess.run(command, env=env, cwd=context.work, capture_output=True, text=True)
    if done.returncode:
        print(f"{area}, native {mode}, failed:\n{done.stderr[-4000:]}", file=sys.stderr)
        return {f"{area}/{FAILED}": done.stderr[-4000:]}
    return dict(json.loads(file.read_bytes()))


def demo_folder(package: Path, work: Path) -> Path:
    """The folder of the package's demo model."""
    command = [sys.executable, "-m", "ascendit", "inspect", "demo", "--json"]
    done = subprocess.run(
        command, env=environment(package, "on", work), capture_output=True, text=True, check=True
    )
    return Path(json.loads(done.stdout)["path"])


def check_mode(records: Mapping[str, str], mode: str) -> None:
    """Raises RuntimeError if `doctor` does not report native kernels as `mode` requires."""
    rows = json.loads(records["doctor/machine/json"])["rows"]
    native = [
        row["item"] for row in rows if row["item"].startswith("kernel") and row["found"].startswith("native")
    ]
    if (mode == "on") != bool(native):
        raise RuntimeError(f"native kernels should be {mode}; doctor reports {native or 'none'}")


def steps(only: Iterable[str], modes: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(mode, area) in order; `sources` if needed, then areas that do not depend on kernels, once."""
    chosen = [name for name in AREAS if name in only]
    if any(AREAS[name].sources for name in chosen):
        chosen = list(dict.fromkeys(["sources", *chosen]))
    yield from (("any", name) for name in chosen if not AREAS[name].kernels)
    yield from ((mode, name) for mode in modes for name in chosen if AREAS[name].kernels)


def record(args: argparse.Namespace) -> int:
    """Record the requested areas. Returns 1 if one of them failed."""
    package, modes = args.package.resolve(), ("on", "off") if args.native == "both" else (args.native,)
    if not args.out.parent.is_dir() or not (package / "ascendit").is_dir():
        raise SystemExit(f"{args.out.parent} or {package}/ascendit is no folder")
    started = time.perf_counter()
    recording: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="record") as temporary:
        work = Path(temporary).resolve()
        demo = demo_folder(package, work)
        named = {str(work): "<work>", str(demo): "<demo>", str(package): "<src>", str(Path.home()): "<home>"}
        (work / "sources").mkdir()
        shutil.copyfile(demo / "transformer" / "config.json", work / "sources" / "demo_config.json")
        for mode, area in steps(args.only, modes):
            begun = time.perf_counter()
            context = Context(work / mode / area, work / "sources", args.tests.resolve(), demo, named)
            records = run_area(area, modes[0] if mode == "any" else mode, package, context)
            shutil.rmtree(context.work)
            if "doctor/machine/json" in records:
                check_mode(records, mode)
            recording |= {f"{mode}/{key}": value for key, value in records.items()}
            print(
                f"{mode:<4}{area:<10}{len(records):>7} keys {time.perf_counter() - begun:7.1f} s", flush=True
            )
    args.out.write_text(json.dumps(recording, indent=0, sort_keys=True) + "\n")
    print(f"{args.out}: {len(recording)} keys in {time.perf_counter() - started:.0f} s")
    return 1 if any(key.endswith(FAILED) for key in recording) else 0


# ---- comparing ----------------------------------------------------------------------------------


def differences(
    a: Mapping[str, str], b: Mapping[str, str], ignore: Iterable[str] = (), *, common: bool = False
) -> dict[str, str]:
    """Key -> difference as text. An area missing from one recording is one line, with `common` none."""
    left, right = ({k: v for k, v in x.items() if area_of(k)[1] not in set(ignore)} for x in (a, b))
    lacking = {origin_of(key) for key in left} ^ {origin_of(key) for key in right}
    changes = {} if common else {"/".join(area): "only in one recording" for area in sorted(lacking)}
    for key in sorted(left.keys() | right.keys()):
        if origin_of(key) in lacking or left.get(key) == right.get(key):
            continue
        if key not in right:
            changes[key] = "is gone"
        elif key not in left:
            changes[key] = "is new"
        else:
            changes[key] = change(left[key], right[key])
    return changes


def area_of(key: str) -> tuple[str, str]:
    """(mode, area) of a key; `messages` is an area."""
    mode, area, *_ = key.split("/")
    return mode, area


def origin_of(key: str) -> tuple[str, str]:
    """(mode, area) that yielded a key; for a message the area in which it occurred."""
    mode, area, *parts = key.split("/")
    return mode, parts[0] if area == "messages" else area


def change(before: str, after: str) -> str:
    """Two short values side by side; of longer ones at most ten lines that differ."""
    if "\n" not in before + after:
        return f"{before}  ->  {after}"
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    lines = [line for line in lines if not line.startswith("@@")]
    return "\n    ".join(["", *lines[:10], *(["..."] if len(lines) > 10 else [])])


def compare(args: argparse.Namespace) -> int:
    """Print the differences, `--limit` keys of each area. Returns 1 if there are any."""
    a, b = (json.loads(path.read_bytes()) for path in (args.a, args.b))
    changes = differences(a, b, args.ignore, common=args.common)
    counts = Counter(area_of(f"{key}/") for key in changes)
    shown: Counter[tuple[str, str]] = Counter()
    for key, text in changes.items():
        shown[area_of(f"{key}/")] += 1
        if shown[area_of(f"{key}/")] <= args.limit:
            print(f"{key}: {text}")
    total = Counter(area_of(key) for key in a.keys() | b.keys())
    for (mode, area), count in sorted(counts.items()):
        print(f"{mode}/{area}: {count} of {total[mode, area]} keys differ")
    print(f"{len(changes)} differences in {total.total()} keys")
    return 1 if changes else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("record", help="Write a recording.")
    one.add_argument("out", type=Path)
    one.add_argument("--package", type=Path, default=REPO / "src", help="The folder that holds ascendit.")
    one.add_argument(
        "--tests", type=Path, default=REPO / "tests", help="The folder with tiny.py and fixtures."
    )
    one.add_argument(
        "--only", nargs="+", choices=AREAS, default=list(AREAS), metavar="AREA", help=" ".join(AREAS)
    )
    one.add_argument("--native", choices=("on", "off", "both"), default="both")
    one.set_defaults(run=record)
    two = commands.add_parser("compare", help="Print the differences; exit code 1 if there are any.")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.add_argument("--ignore", nargs="+", default=[], metavar="AREA", help="For example messages.")
    two.add_argument("--common", action="store_true", help="Ignore areas missing from one recording.")
    two.add_argument("--limit", type=int, default=20, help="Printed keys of each area; 20.")
    two.set_defaults(run=compare)
    three = commands.add_parser("area")
    for name in ("area", "out", "context"):
        three.add_argument(name)
    three.set_defaults(run=child)
    args = parser.parse_args(arguments)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
