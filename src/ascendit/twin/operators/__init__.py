"""The operators that the twin computes, by family. Importing this registers them all."""

from ascendit.twin.operators import (  # noqa: F401
    activations,
    block_sparse,
    casts,
    dual_level,
    fused_infer,
    fusion_attention,
    mindie,
    mx_quant,
    norms,
    quant_matmul,
    rotary,
    row_quant,
    weight_only,
)
