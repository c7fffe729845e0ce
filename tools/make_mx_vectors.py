"""Write frozen vectors for tests/mx with torchao and msModelSlim.

    python tools/make_mx_vectors.py torchao tests/fixtures/torchao/to_mx.safetensors
    python tools/make_mx_vectors.py msmodelslim tests/fixtures/msmodelslim/rules.safetensors

The first needs torchao (0.18.0 was used), the second msmodelslim (26.1.0). Neither is a dependency.
Keys: `<input>` and `<input>.<rule or mode>.<codes | scale | dual_scale>`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

PROMOTED = {"log2", "pow", "__pow__", "__rpow__", "reciprocal", "reciprocal_"}


def spread(generator: torch.Generator, rows: int, columns: int, lowest: int = 0) -> Tensor:
    """bfloat16 [rows, columns] of the complete exponent range, each block of 32 within 24 exponents."""
    top = torch.randint(lowest, 255, (rows, columns // 32, 1), generator=generator)
    below = torch.randint(0, 24, (rows, columns // 32, 32), generator=generator)
    bits = (top - below).clamp(min=0) << 7
    bits |= torch.randint(0, 128, bits.shape, generator=generator)
    bits |= torch.randint(0, 2, bits.shape, generator=generator) << 15
    signed = torch.where(bits > 0x7FFF, bits - 0x10000, bits)
    return signed.to(torch.int16).view(torch.bfloat16).reshape(rows, columns)


def from_torchao() -> Iterator[tuple[str, Tensor]]:
    """torchao's to_mx with four scale modes and three element formats."""
    to_mx = importlib.import_module("torchao.prototype.mx_formats.mx_tensor").to_mx
    modes = importlib.import_module("torchao.prototype.mx_formats.config").ScaleCalculationMode
    x = spread(torch.Generator().manual_seed(3), 32, 512)
    yield "x", x
    for fmt, dtype in (
        ("mxfp8", torch.float8_e4m3fn),
        ("mxfp8_e5m2", torch.float8_e5m2),
        ("mxfp4", torch.float4_e2m1fn_x2),
    ):
        for mode in ("FLOOR", "RCEIL", "CEIL", "EVEN"):
            scale, qdata = to_mx(x, dtype, 32, modes[mode])
            yield f"x.{fmt}.{mode}.scale", scale.view(torch.uint8)
            yield f"x.{fmt}.{mode}.codes", qdata.view(torch.uint8)


class NpuAutocast(TorchFunctionMode):
    """Compute in float32 the functions that torch_npu's autocast promotes (csrc/aten/AutoCastOps.cpp)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in PROMOTED:
            args = tuple(
                a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args
            )
        return func(*args, **(kwargs or {}))


PACK = "msmodelslim.core.quant_service.modelslim_v1.save.utils.pack"
SMOOTH = "msmodelslim.processor.anti_outlier.common.scale_computation"
MSMS_RULES: dict[str, dict[str, Any]] = {
    "mxfp8.minmax": {"scope": "per_block", "dtype": "mxfp8", "method": "minmax"},
    "mxfp8.mse_round": {"scope": "per_block", "dtype": "mxfp8", "method": "mse_round"},
    "mxfp4.minmax": {"scope": "per_block", "dtype": "mxfp4", "method": "minmax"},
    "mxfp4.ceil_x:7.25": {
        "scope": "per_block",
        "dtype": "mxfp4",
        "method": "ceil_x",
        "ext": {"ceil_x_value": 7.25},
    },
    "mxfp4.ceil_x:search": {
        "scope": "per_block",
        "dtype": "mxfp4",
        "method": "ceil_x",
        "ext": {"enable_search": True},
    },
    "mxfp4.fouroversix": {"scope": "per_block", "dtype": "mxfp4", "method": "fouroversix"},
    "mxfp4_dualscale.dualscale": {
        "scope": "dual_scale",
        "dtype": "mxfp4",
        "method": "dualscale",
        "ext": {"dual_block_size": 512},
    },
    "int8.int8": {"scope": "per_channel", "dtype": "int8", "method": "minmax"},
}


def from_msmodelslim() -> Iterator[tuple[str, Tensor]]:
    """msModelSlim's weight quantizers on a CPU, with the NPU's autocast, in the layout of its saver."""
    generator = torch.Generator().manual_seed(26)
    inputs = {
        "normal": (torch.randn(16, 512, generator=generator) * 0.02).to(torch.bfloat16),
        "spread": spread(generator, 24, 512, lowest=8),
        "ragged": torch.randn(8, 80, generator=generator).to(torch.bfloat16),
    }
    for name, x in inputs.items():
        yield name, x
        for rule, config in MSMS_RULES.items():
            if rule.endswith("fouroversix") and x.shape[-1] % 32:
                continue  # msModelSlim refuses it
            for dtype in (torch.bfloat16, torch.float32):
                stored = quantize_like_msmodelslim(x.to(dtype), config)
                for key, tensor in stored.items():
                    yield f"{name}.{rule}.{str(dtype).removeprefix('torch.')}.{key}", tensor
    yield from smoothing(generator)


def smoothing(generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Factors of iter_smooth for BF16 maxima of inputs and weights, three alphas."""
    reach = torch.exp2(torch.randint(-20, 4, (2, 256), generator=generator).float())
    inputs, weights = (torch.rand(2, 256, generator=generator) * reach).to(torch.bfloat16)
    yield "smooth.input_amax", inputs.contiguous()
    yield "smooth.weight_amax", weights.contiguous()
    for alpha in (0.5, 0.75, 0.9):
        calculator = import_alone(SMOOTH).IterSmoothScaleCalculator(alpha, 1e-5)
        with NpuAutocast():
            yield f"smooth.{alpha}", calculator.compute_smooth_scale(inputs, weights.unsqueeze(0))


def import_alone(name: str) -> Any:
    """A module of msmodelslim without its parent packages, which would import the complete tool."""
    parents = name.split(".")[:-1]
    root = importlib.util.find_spec(parents[0])
    assert root is not None and root.origin is not None
    for depth in range(2, len(parents) + 1):
        package = ModuleType(".".join(parents[:depth]))
        package.__path__ = [str(Path(root.origin).parent.joinpath(*parents[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def quantize_like_msmodelslim(weight: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    base = importlib.import_module("msmodelslim.core.quantizer.base")
    impl = "msmodelslim.core.quantizer.impl."
    for module in ("minmax", "ceil_x", "mse_round", "fouroversix", "dualscale"):
        importlib.import_module(impl + module)
    qal = importlib.import_module("msmodelslim.ir.qal")
    with NpuAutocast(), torch.no_grad():
        quantizer = base.AutoWeightQuantizer.from_config(base.QConfig(symmetric=True, **config))
        quantizer.init_weight(qal.QStorage(qal.QDType.FLOAT, weight.clone()), None)
        # Some quantize in forward; others have quantized already and fail in it on their own shapes.
        with contextlib.suppress(Exception):
            quantizer.forward(None)
        param, values = quantizer.get_q_param(), quantizer.get_q_storage().value
    scale = param.ext["scale"]
    if config["dtype"] == "int8":
        return {"codes": values.to(torch.int8).contiguous(), "scale": scale.unsqueeze(-1).float()}
    qdata = (
        values.to(torch.float8_e4m3fn)
        if config["dtype"] == "mxfp8"
        else import_alone(PACK).pack_fp4_to_uint8(values)
    )
    stored = {"codes": qdata, "scale": (scale.squeeze(-1) + 127).to(torch.uint8)}
    if "dual_scale" in param.ext:
        stored["dual_scale"] = param.ext["dual_scale"].float()
    if config["method"] == "ceil_x" and config["ext"].get("enable_search"):
        stored["c"] = torch.tensor(quantizer._ceil_x_value)
    return {key: tensor.contiguous() for key, tensor in stored.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=("torchao", "msmodelslim"))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tensors = from_torchao() if args.peer == "torchao" else from_msmodelslim()
    save_file(dict(tensors), args.out)


if __name__ == "__main__":
    main()
