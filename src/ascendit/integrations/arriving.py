"""One layer while its tensors arrive, in any order: from codes on disk, or from floats that become codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ascendit.checkpoint.layers import Layer
from ascendit.checkpoint.store import TORCH_DTYPES, TensorInfo
from ascendit.checkpoint.values import check_positive, check_scale, check_scale_bytes, check_zero
from ascendit.convert.stream import as_bytes
from ascendit.model.linear import SmoothLinear
from ascendit.model.module_plan import ModulePlan
from ascendit.model.quantize_module import PlacedLinear, check_weight, encode_weight, rounded
from ascendit.mx.encoded import Encoded
from ascendit.ops.quant_linear import Schemes


class Awaited(nn.Module):
    """Stands for a layer on codes until its tensors are there: parameters on the meta device."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        for role, info in tensors.items():
            dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
            empty = torch.empty(info.shape, dtype=dtype, device="meta")
            self.register_parameter(role, nn.Parameter(empty, requires_grad=False))


@dataclass
class FromCodes:
    """A layer that lies on disk as codes, or smoothed."""

    layer: Layer
    _got: dict[str, Tensor] = field(default_factory=dict)

    def take(self, role: str, tensor: Tensor) -> bool:
        """Check and keep a tensor; True when it was the last. CheckpointError E-CKP-08."""
        _check_values(f"{self.layer.name}.{role}", tensor)
        # A copy: the tensor maps a file, all of which would stay mapped.
        self._got[role] = tensor.clone(memory_format=torch.contiguous_format)
        return self._got.keys() == self.layer.tensors.keys()

    def finish(self, schemes: Schemes, dtype: torch.dtype) -> nn.Module:
        """The layer, for tokens of `dtype`."""
        got, put = self._got, schemes.device.torch_name
        smooth = got["mul_scale"].to(put) if "mul_scale" in got else None
        bias = got.get("bias")
        if self.layer.scheme == "bf16":
            assert smooth is not None
            plain = None if bias is None else bias.to(put, dtype)
            return SmoothLinear(got["weight"].to(put, dtype), plain, smooth)
        dual, shape = got.get("weight_dual_scale"), self.layer.shape
        encoded = Encoded(got["weight"], got["weight_scale"], dual, self.layer.scheme, -1, shape)
        return PlacedLinear.from_encoded(
            encoded, bias, schemes=schemes, compute_dtype=dtype, mul_scale=smooth
        )


@dataclass
class FromFloats:
    """A layer that lies on disk as floats: its weight becomes codes when it comes."""

    plan: ModulePlan
    name: str
    has_bias: bool
    _encoded: Encoded | None = None
    _bias: Tensor | None = None

    def take(self, role: str, tensor: Tensor) -> bool:
        """Encode the weight, keep the bias; True when both are there. UsageError E-QNT-01."""
        if role == "weight":
            check_weight(self.plan, self.name, tensor)
            self._encoded = encode_weight(self.plan, self.name, tensor)
        else:
            self._bias = (rounded(tensor) if self.plan.round_to else tensor).to(torch.float32, copy=True)
        return self._encoded is not None and (self._bias is not None) == self.has_bias

    def finish(self, schemes: Schemes, dtype: torch.dtype) -> nn.Module:
        """The layer, for tokens of `dtype`."""
        assert self._encoded is not None
        return PlacedLinear.from_encoded(self._encoded, self._bias, schemes=schemes, compute_dtype=dtype)


def _check_values(name: str, tensor: Tensor) -> None:
    """CheckpointError E-CKP-08 for scales, offsets and factors that cannot be."""
    role = name.rpartition(".")[2]
    if role not in ("weight_scale", "weight_dual_scale", "weight_offset", "mul_scale"):
        return
    data = as_bytes(tensor.contiguous())
    if tensor.dtype == torch.uint8:
        check_scale_bytes(data, name)
    elif role == "weight_offset":
        check_zero(data, "F32", name)
    elif role == "mul_scale":
        check_positive(data, "F32", name)
    else:
        check_scale(data, "F32", name)
