"""Arguments for each operator, with the dtypes that the model passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

B, S, H, D_HEAD = 1, 37, 3, 32
D = H * D_HEAD


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def arguments(name: str, dtype: torch.dtype, spans: tuple[int, ...]) -> list[Any]:
    """Arguments of one operator: hidden states and linear weights in `dtype`, the others in float32."""
    x, segments = draw(B, S, D, dtype=dtype), len(spans)
    heads = [draw(B, n, H, D_HEAD, dtype=dtype) for n in (S, 21, 21)]
    angle = torch.rand(S, D_HEAD // 2) * 6
    table: dict[str, list[Any]] = {
        "linear": [x, draw(40, D, dtype=dtype), draw(40, dtype=dtype)],
        "rms_norm": [3 * x, draw(D), 1e-6],
        "layer_norm": [3 * x + 1, draw(D), draw(D), 1e-6],
        "adaln": [3 * x + 1, draw(segments, D), draw(segments, D), spans, 1e-6],
        "gated_residual": [x, draw(B, S, D, dtype=dtype), draw(segments, D), spans],
        "rope": [heads[0], angle.cos(), angle.sin()],
        "gelu_tanh": [3 * x],
        "gelu": [3 * x],
        "attention": heads,
    }
    return table[name]
