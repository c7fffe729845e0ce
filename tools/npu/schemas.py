"""(a) Compare the schemas of the twin with those in the wheels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import yaml
from npu import wheels

NATIVE_FUNCTIONS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def of_torch_npu(wheel: Path) -> dict[str, str]:
    """Operator name with overload -> schema, of everything that the wheel adds to torch.ops.npu."""
    entries = yaml.safe_load(wheels.read_text(wheel, NATIVE_FUNCTIONS))
    schemas: dict[str, str] = {}
    for section in ("custom", "symint"):
        for entry in entries[section]:
            schema = entry["func"] if isinstance(entry, dict) else entry
            schemas[schema.partition("(")[0]] = schema
    return schemas


def frozen(package: str) -> dict[str, str]:
    """The twin's own file for `torch_npu_2.13.0` or `mindiesd_3.1.0`."""
    text = resources.files("ascendit.twin").joinpath("data", f"{package}.json").read_text()
    schemas: dict[str, str] = json.loads(text)["schemas"]
    return schemas


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """One line for each schema that differs."""
    lines = [f"only in the twin: {ours[n]}" for n in ours if n not in theirs]
    lines += [f"only in the wheel: {theirs[n]}" for n in theirs if n not in ours]
    return lines + [f"{ours[n]} is {theirs[n]}" for n in ours if n in theirs and ours[n] != theirs[n]]


def absent(ours: Mapping[str, str], plugin: Path) -> list[str]:
    """One line for each of MindIE-SD's schemas that its library does not contain, ignoring spaces."""
    text = re.sub(rb"\s+", b" ", plugin.read_bytes())
    return [
        f"not in {plugin.name}: {s}" for s in ours.values() if re.sub(r"\s+", " ", s).encode() not in text
    ]
