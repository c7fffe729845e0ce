"""(b, c) Compare every valid call with the Meta kernels in the torch_npu wheel, in a process of its own:

    python -m npu.meta WHEEL OUT.json

The calls run first on the twin, which records their arguments and results. Then the twin is disabled, the
wheel's own schemas are defined, its `_meta_registrations.py` is executed unchanged with a minimal module
instead of torch_npu, and each call is repeated on tensors without storage.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from npu import schemas, wheels
from npu.calls import OURS, Recorder, calls, described

import ascendit.twin
from ascendit.device.chip import CHIPS
from ascendit.ops.open_device import open_device
from ascendit.twin import contract, example_calls
from ascendit.twin.example_calls import Sample
from ascendit.twin.registry import UNDEFINABLE

META = "torch_npu/op_plugin/meta/_meta_registrations.py"
CANN = "9.1.0"
"""Some Meta kernels read the version."""


@dataclass(frozen=True)
class Case:
    """One call on one chip, and the twin's result."""

    chip: str
    name: str
    sample: Sample
    expected: list[Any]


class NoMeta(Exception):
    """The wheel has no Meta kernel for this operator."""


def cases(chip: str) -> Iterator[Case]:
    """The samples of the twin, then the calls of ascendit's operators."""
    device = open_device(f"twin:{chip}")
    for sample in example_calls.samples():
        yield Case(chip, sample.name, sample, described(sample.run(ascendit.twin.call)))
    for call in calls(device):
        with torch.no_grad(), Recorder() as recorder:
            call.run()
        for name, args, kwargs, result in recorder.calls:
            sample = Sample(call.name, name, args, kwargs)
            yield Case(chip, f"{OURS}{call.name}", sample, described(result))


def install(wheel: Path) -> dict[str, str]:
    """Define the wheel's schemas and Meta kernels. Returns a dict with the `chip` that they assume."""
    current = {"chip": "a5"}
    library = torch.library.Library("npu", "FRAGMENT")
    for name, schema in schemas.of_torch_npu(wheel).items():
        if name not in UNDEFINABLE:
            library.define(schema)
    libraries.append(library)

    def module(name: str, **attributes: Any) -> None:
        new = types.ModuleType(name)
        new.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(new).update(__path__=[], **attributes)
        sys.modules[name] = new

    error_codes = type("ErrCode", (), {"__getattr__": lambda self, name: name})()
    module("torch_npu", **contract.DTYPE_NUMBERS)
    module("torch_npu.utils")
    module("torch_npu.utils._error_code", ErrCode=error_codes, ops_error=lambda code: "")
    module("torch_npu.npu")
    module("torch_npu.npu.utils", get_cann_version=lambda *args: CANN)
    soc = {chip.name: chip.soc_versions[0] for chip in CHIPS.values()}
    module("torch_npu.npu._backends", get_soc_version=lambda: soc[current["chip"]])
    source = compile(wheels.read_text(wheel, META), META, "exec")
    exec(source, {"__name__": "torch_npu.op_plugin.meta._meta_registrations"})
    return current


libraries: list[torch.library.Library] = []
"""Operators disappear when their library is garbage-collected."""


def by_meta(operator: str, *args: Any, **kwargs: Any) -> Any:
    """Call a Meta kernel. The cast of an argument to NZ has none, and changes no shape."""
    if operator == "npu_format_cast":
        return args[0]
    if "::" in operator or not torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{operator}", "Meta"):
        raise NoMeta(operator)
    return getattr(torch.ops.npu, operator)(*args, **kwargs)


def verdict(case: Case) -> dict[str, Any]:
    """`meta`: "same", "none" (no such kernel), or the difference."""
    try:
        if case.sample.operator == "npu_format_cast":
            raise NoMeta
        actual = described(case.sample.run(by_meta, lambda t: t.to("meta")))
        meta = "same" if actual == case.expected else f"gives {actual}, the twin {case.expected}"
    except NoMeta:
        meta = "none"
    except Exception as e:
        meta = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return {"chip": case.chip, "name": case.name, "operator": case.sample.operator, "meta": meta}


def controls() -> list[str]:
    """Wrong calls, each with the answer of its Meta kernel, which must not be "accepted"."""
    qdata = torch.empty(6, 64, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(6, 1, 2, dtype=torch.uint8, device="meta")
    right = {"pertoken_scale": scale, "scale_dtype": 293, "pertoken_scale_dtype": 293, "output_dtype": 15}
    activation = torch.empty(6, 64, dtype=torch.bfloat16, device="meta")
    wrong = {
        "MX matmul without group_sizes": lambda: matmul(**right),
        "x1_dtype for native float8": lambda: matmul(**right, group_sizes=[1, 1, 32], x1_dtype=292),
        "blocks of 33": lambda: by_meta("npu_dynamic_mx_quant", activation, block_size=33),
        "an unknown keyword": lambda: by_meta("npu_dynamic_mx_quant", activation, dtype=292),
    }

    def matmul(**kwargs: Any) -> Any:
        return by_meta("npu_quant_matmul", qdata, qdata.t(), scale.transpose(0, 1), **kwargs)

    return [f"{name}: {_refusal(call)}" for name, call in wrong.items()]


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as e:
        return f"refused: {str(e).splitlines()[0]}"
    return "accepted"


def main(wheel: Path, out: Path) -> None:
    warnings.simplefilter("ignore")
    all_cases = [case for chip in CHIPS for case in cases(chip)]
    ascendit.twin.disable()
    current = install(wheel)
    rows = []
    for case in all_cases:
        current["chip"] = case.chip
        rows.append(verdict(case))
    out.write_text(json.dumps({"calls": rows, "controls": controls()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
