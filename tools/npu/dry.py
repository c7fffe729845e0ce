"""The dry run: ascendit's NPU path on the real torch_npu over the stub CANN, in a process of its own:

    FAKE_CANN_SOC=Ascend950PR_9589 LD_LIBRARY_PATH=.. PYTHONPATH=.. python -m npu.dry OUT.json

Everything except the kernels is real: the import, the settings, the dispatcher, the adapters with their
checks, the choice of the aclnn interface. The computed numbers have no meaning.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from npu import model
from npu.calls import OURS, Call, calls, described
from npu.trace import Stub, Trace
from torch import Tensor

import ascendit.twin
from ascendit.device.device import Device
from ascendit.ops.open_device import open_device
from ascendit.twin import example_calls
from ascendit.twin.example_calls import Sample
from ascendit.twin.registry import frozen


def by_dispatcher(operator: str, *args: Any, **kwargs: Any) -> Any:
    """One call of torch.ops.npu or torch.ops.mindiesd."""
    namespace, _, name = operator.rpartition("::")
    return getattr(getattr(torch.ops, namespace or "npu"), name)(*args, **kwargs)


def run_sample(sample: Sample, stub: Stub, device: str) -> dict[str, Any]:
    """`dry`: "same" for the twin's shapes and dtypes, else the difference."""
    row: dict[str, Any] = {"name": sample.name, "operator": sample.operator, "launched": []}
    expected = tensors(sample.run(ascendit.twin.call))
    launched: list[str] = []

    def caller(operator: str, *args: Any, **kwargs: Any) -> Any:
        result, trace = stub.during(lambda: by_dispatcher(operator, *args, **kwargs))
        launched.extend(trace.launched)
        return result

    def move(t: Tensor) -> Tensor:
        moved = t.to(device)
        assert moved.stride() == t.stride() or t.numel() < 2, (t.stride(), moved.stride())
        return moved

    try:
        actual = tensors(sample.run(caller, move))
        dry = "same" if actual == expected else f"gives {actual}, the twin {expected}"
    except Exception as e:
        dry = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    return row | {"dry": dry, "launched": launched}


def tensors(result: Any) -> list[Any]:
    """`described` without numbers: seeds and offsets of a random generator may differ."""
    return [item for item in described(result) if isinstance(item, list)]


def run_calls(device: Device, stub: Stub) -> list[dict[str, Any]]:
    """Every function of ascendit that calls operators, with the kernels that it launched."""
    rows = []
    for call in calls(device):
        try:
            _, trace = stub.during(call.run)
            rows.append(_row(call, trace, "same"))
        except Exception as e:
            rows.append(_row(call, Trace((), (), ()), f"{type(e).__name__}: {str(e).splitlines()[0]}"))
    return rows


def _row(call: Call, trace: Trace, dry: str) -> dict[str, Any]:
    row = {"name": OURS + call.name, "scheme": call.scheme, "most": call.most, "dry": dry}
    return row | {"launched": list(trace.launched), "host": trace.host}


def controls(device: Device, stub: Stub) -> dict[str, list[str]]:
    """A wait that must be in the trace, and an operator without a kernel, which must be in stderr."""
    x = torch.ones(3, device=device.torch_name)
    torch.special.bessel_j0(x)
    return {"item": stub.during(x.sum().item)[1].host}


def _mindiesd_schemas() -> dict[str, bool]:
    """Operator of MindIE-SD -> whether its real schema equals the frozen one."""
    same = {}
    for name, text in frozen("mindiesd").items():
        real = getattr(getattr(torch.ops.mindiesd, name), "default", None)
        same[name] = real is not None and str(real._schema) == str(torch._C.parse_schema(f"mindiesd::{text}"))
    return same


def main(out: Path) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ascendit").setLevel(logging.INFO)
    torch.set_num_threads(1)
    device = open_device("npu:0")
    stub = Stub()
    ascendit.twin.use(str(device.chip))  # the twin's functions beside torch_npu, without defining operators
    import torch_npu

    with torch.no_grad():
        report = {
            "chip": device.chip,
            "soc": torch.npu.get_device_name(0),
            "torch_npu": torch_npu.__version__,
            "samples": [run_sample(s, stub, device.torch_name) for s in example_calls.samples()],
            "calls": run_calls(device, stub),
            "model": model.forward(device, stub) | model.diffusers_forward(device, stub),
            "mindiesd": _mindiesd_schemas(),
        }
    report["video"] = model.videos(device, stub)
    report["controls"] = controls(device, stub)
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
