"""The operators that the twin computes, by family. Importing this package registers all of them.

`call` runs one as a function; `ascendit.twin.install` defines them under torch.ops.
"""

from __future__ import annotations

from typing import Any

import torch

from ascendit.twin import contract
from ascendit.twin.operators import (  # noqa: F401
    block_sparse_attention,
    casts,
    elementwise,
    fused_infer_attention,
    fusion_attention,
    mindie,
    mx_quantize,
    quant_matmul,
    rotary,
    row_quantize,
)
from ascendit.twin.registry import current_chip, run, signature


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an operator without the dispatcher: `call("npu_rms_norm", x, gamma)`.

    A torch.dtype may be passed for an int argument, as in torch.ops. Raises the errors of `registry.run`.
    """
    current_chip()
    schema = signature(name)
    named = dict(zip(schema.names, args, strict=False)) | kwargs
    numbers = {
        key: contract.number_of(value)
        for key, value in named.items()
        if key in schema.integers and isinstance(value, torch.dtype)
    }
    positional = [numbers.get(n, a) for n, a in zip(schema.names, args, strict=False)]
    positional += args[len(positional) :]
    return run(name, *positional, **{k: numbers.get(k, v) for k, v in kwargs.items()})
