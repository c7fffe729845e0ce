"""Every kind of broken model in small: `CASES`. As a script it writes them to look at, or what is committed.

    cd tests; PYTHONPATH=../src:. python -m broken.make /tmp/broken      # one folder for each case
    cd tests; PYTHONPATH=../src:. python -m broken.make --committed      # README.md and raw/ beside this file

A case takes a whole model of `models.MODELS`, breaks one thing in it, and says with which code each verb
refuses it. "" is a verb that cannot see the fault: headers do not tell what the bytes are.
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
    """README.md."""
    lines = [
        "# Broken models",
        "",
        "Every kind of damage that `inspect`, `repack` and `quantize` must refuse, in small. `make.py` makes",
        "them from whole models (`models.py`) when tests run. `test_broken.py` gives each to each verb, and",
        "looks for the code below, an untouched input and no trace of an output. `test_fuzz.py` does random",
        "damage. The files in `raw` are committed, because there the bytes are the point.",
        "",
        "`python -m broken.make --committed` writes this table. An empty field: the verb cannot see it.",
        "",
        "| case | model | what is broken | inspect | repack | quantize |",
        "|---|---|---|---|---|---|",
    ]
    for name, c in CASES.items():
        qdata = " | ".join(c.expected(verb) for verb in ("inspect", "repack", "quantize"))
        lines.append(f"| {name} | {c.base} | {c.what} | {qdata} |".replace("|  |", "| |"))
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
