"""Record what ascendit does, and compare two recordings: for changes that must not change behaviour.

    python tools/record_behaviour.py record before.json                     # takes some minutes
    python tools/record_behaviour.py record after.json --package ../other/src --only quantize repack
    python tools/record_behaviour.py compare before.json after.json --common --ignore messages

A recording is one flat JSON object, `mode/area/case/item` -> a sha256 of a tensor, or a short text. `mode` is
`on` or `off`, with the native kernels and without, or `any` where they cannot matter. Each area runs in a
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
from behaviour.values import Place, Records

REPO = Path(__file__).resolve().parents[1]

# ---- recording: each area in a process of its own -----------------------------------------------

FAILED = ":failed"
"""The case of an area that ended with an error of its own."""


@dataclass(frozen=True)
class Area:
    """`kernels`: recorded with native kernels and without; else once. `sources`: works on those made here."""

    run: Callable[[Place], Records]
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
STEERING = ("ALGO", "FAST_LAYERNORM", "USE_SUB_HEAD", "T5_LOAD_CPU", "PRECISION", "OVERLAP", "PYTHONHOME")
"""Variables that ascendit or Python reads; a recording is made without them."""


def environment(package: Path, mode: str, work: Path) -> dict[str, str]:
    """Of every process of a recording. Without native kernels: a PATH on which nothing is."""
    found = {key: value for key, value in os.environ.items() if key not in STEERING}
    found |= {"PYTHONPATH": str(package), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    found |= {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "TZ": "UTC", "HF_HUB_OFFLINE": "1"}
    found |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HOME": str(work / "hub")}
    return found | ({"PATH": str(work / "nothing")} if mode == "off" else {})


def child(args: argparse.Namespace) -> None:
    """Run one area and write what it yields."""
    place = Place(**json.loads(args.place, object_hook=paths))
    records: dict[str, str] = {}
    for key, value in AREAS[args.area].run(place):
        key = place.text(key)
        assert key not in records, key
        records[key] = place.text(value)
    Path(args.out).write_text(json.dumps(records))


def paths(value: dict[str, Any]) -> dict[str, Any]:
    """`Place` from its JSON."""
    return {key: Path(v) if key in ("work", "sources", "tests", "demo") else v for key, v in value.items()}


def run_area(area: str, mode: str, package: Path, place: Place) -> dict[str, str]:
    """What one area yields, in a process of its own. If it fails, what it wrote to stderr last."""
    place.work.mkdir(parents=True, exist_ok=True)
    part, text = place.work / "records.json", json.dumps(dataclasses.asdict(place), default=str)
    command = [sys.executable, str(Path(__file__).resolve()), "area", area, str(part), text]
    env = environment(package, mode, place.sources.parent)
    done = subprocess.run(command, env=env, cwd=place.work, capture_output=True, text=True)
    if done.returncode:
        print(f"{area}, native {mode}, failed:\n{done.stderr[-4000:]}", file=sys.stderr)
        return {f"{area}/{FAILED}": done.stderr[-4000:]}
    return dict(json.loads(part.read_bytes()))


def demo_folder(package: Path, work: Path) -> Path:
    """Where the package has its demo model."""
    words = [sys.executable, "-m", "ascendit", "inspect", "demo", "--json"]
    done = subprocess.run(
        words, env=environment(package, "on", work), capture_output=True, text=True, check=True
    )
    return Path(json.loads(done.stdout)["path"])


def check_mode(records: Mapping[str, str], mode: str) -> None:
    """RuntimeError if `doctor` found native kernels that should be off, or none that should be on."""
    rows = json.loads(records["doctor/machine/json"])["rows"]
    found = [
        row["item"] for row in rows if row["item"].startswith("kernel") and row["found"].startswith("native")
    ]
    if (mode == "on") != bool(found):
        raise RuntimeError(f"native kernels should be {mode}; doctor found {found or 'none'}")


def steps(only: Iterable[str], modes: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(mode, area) in order: `sources` if any area needs them, and once what does not depend on kernels."""
    chosen = [name for name in AREAS if name in only]
    if any(AREAS[name].sources for name in chosen):
        chosen = list(dict.fromkeys(["sources", *chosen]))
    yield from (("any", name) for name in chosen if not AREAS[name].kernels)
    yield from ((mode, name) for mode in modes for name in chosen if AREAS[name].kernels)


def record(args: argparse.Namespace) -> int:
    """Record the areas that were asked for; 1 if one of them could not be."""
    package, modes = args.package.resolve(), ("on", "off") if args.native == "both" else (args.native,)
    if not args.out.parent.is_dir() or not (package / "ascendit").is_dir():
        raise SystemExit(f"{args.out.parent} or {package}/ascendit is no folder")
    started = time.perf_counter()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="record") as temporary:
        work = Path(temporary).resolve()
        demo = demo_folder(package, work)
        named = {str(work): "<work>", str(demo): "<demo>", str(package): "<src>", str(Path.home()): "<home>"}
        (work / "sources").mkdir()
        shutil.copyfile(demo / "transformer" / "config.json", work / "sources" / "demo_config.json")
        for mode, area in steps(args.only, modes):
            begun = time.perf_counter()
            place = Place(work / mode / area, work / "sources", args.tests.resolve(), demo, named)
            records = run_area(area, modes[0] if mode == "any" else mode, package, place)
            shutil.rmtree(place.work)
            if "doctor/machine/json" in records:
                check_mode(records, mode)
            found |= {f"{mode}/{key}": value for key, value in records.items()}
            print(
                f"{mode:<4}{area:<10}{len(records):>7} keys {time.perf_counter() - begun:7.1f} s", flush=True
            )
    args.out.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(f"{args.out}: {len(found)} keys in {time.perf_counter() - started:.0f} s")
    return 1 if any(key.endswith(FAILED) for key in found) else 0


# ---- comparing ----------------------------------------------------------------------------------


def differences(
    a: Mapping[str, str], b: Mapping[str, str], ignore: Iterable[str] = (), *, common: bool = False
) -> dict[str, str]:
    """Key -> what differs, in words. An area that one recording lacks is one line, with `common` none."""
    left, right = ({k: v for k, v in x.items() if area_of(k)[1] not in set(ignore)} for x in (a, b))
    lacking = {origin_of(key) for key in left} ^ {origin_of(key) for key in right}
    found = {} if common else {"/".join(area): "only in one recording" for area in sorted(lacking)}
    for key in sorted(left.keys() | right.keys()):
        if origin_of(key) in lacking or left.get(key) == right.get(key):
            continue
        if key not in right:
            found[key] = "is gone"
        elif key not in left:
            found[key] = "is new"
        else:
            found[key] = change(left[key], right[key])
    return found


def area_of(key: str) -> tuple[str, str]:
    """(mode, area) of a key; `messages` is an area."""
    mode, area, *_ = key.split("/")
    return mode, area


def origin_of(key: str) -> tuple[str, str]:
    """(mode, area) that yielded a key: for a message the area in which it was met."""
    mode, area, *rest = key.split("/")
    return mode, rest[0] if area == "messages" else area


def change(before: str, after: str) -> str:
    """Two short values beside each other; of longer ones the lines that differ, ten at most."""
    if "\n" not in before + after:
        return f"{before}  ->  {after}"
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]
    lines = [line for line in lines if not line.startswith("@@")]
    return "\n    ".join(["", *lines[:10], *(["..."] if len(lines) > 10 else [])])


def compare(args: argparse.Namespace) -> int:
    """Print what differs, `--limit` keys of each area; 1 if anything does."""
    a, b = (json.loads(path.read_bytes()) for path in (args.a, args.b))
    found = differences(a, b, args.ignore, common=args.common)
    counts = Counter(area_of(f"{key}/") for key in found)
    shown: Counter[tuple[str, str]] = Counter()
    for key, what in found.items():
        shown[area_of(f"{key}/")] += 1
        if shown[area_of(f"{key}/")] <= args.limit:
            print(f"{key}: {what}")
    total = Counter(area_of(key) for key in a.keys() | b.keys())
    for (mode, area), count in sorted(counts.items()):
        print(f"{mode}/{area}: {count} of {total[mode, area]} keys differ")
    print(f"{len(found)} differences in {total.total()} keys")
    return 1 if found else 0


def main(words: list[str] | None = None) -> int:
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
    two = commands.add_parser("compare", help="Say what differs; exit code 1 if anything does.")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    two.add_argument("--ignore", nargs="+", default=[], metavar="AREA", help="As messages.")
    two.add_argument("--common", action="store_true", help="Leave out areas that one recording lacks.")
    two.add_argument("--limit", type=int, default=20, help="Keys of each area that are printed; 20.")
    two.set_defaults(run=compare)
    three = commands.add_parser("area")
    for name in ("area", "out", "place"):
        three.add_argument(name)
    three.set_defaults(run=child)
    args = parser.parse_args(words)
    return args.run(args) or 0


if __name__ == "__main__":
    sys.exit(main())
