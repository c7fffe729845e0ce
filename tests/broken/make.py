"""Every kind of broken model at a small size (`CASES`). As a script, write them all, or the committed files.

    cd tests; PYTHONPATH=../src:. python -m broken.make /tmp/broken      # one folder for each case
    cd tests; PYTHONPATH=../src:. python -m broken.make --committed      # README.md and raw/ beside this file

A case takes a complete model of `models.MODELS`, breaks one thing in it, and has the error code that each
verb must raise. "" is for a verb that cannot see the fault: headers do not describe the bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from broken import cases_folder, cases_header, cases_json, cases_tensors
from broken.registry import CASES

RAW = Path(__file__).parent / "raw"
README = Path(__file__).parent / "README.md"
MODULES = (cases_header, cases_tensors, cases_json, cases_folder)
"""Importing them fills `CASES`."""


def table() -> str:
    """Text of README.md."""
    lines = [
        "# Broken models",
        "",
        "Small models with every kind of damage that `inspect`, `repack` and `quantize` must refuse.",
        "`make.py` makes them from complete models (`models.py`) when tests run. `test_broken.py` passes",
        "each to each verb, and checks the code below, an untouched input and that no output is left.",
        "`test_fuzz.py` does random damage. The files in `raw` are committed: their exact bytes matter.",
        "",
        "`python -m broken.make --committed` writes this table. Empty field: the verb cannot see the damage.",
        "",
        "| case | model | fault | inspect | repack | quantize |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in CASES.items():
        expected = " | ".join(c.expected(verb) for verb in ("inspect", "repack", "quantize"))
        lines.append(f"| {name} | {c.base} | {c.fault} | {expected} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def main(argument: str) -> None:
    if argument == "--committed":
        README.write_text(table(), encoding="utf-8")
        RAW.mkdir(exist_ok=True)
        for name, (_, data) in cases_header.RAWS.items():
            (RAW / f"{name}.safetensors").write_bytes(data)
        return
    for name, c in CASES.items():
        c.build(Path(argument) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
