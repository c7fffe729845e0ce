"""Names of the tensors of a UMT5 encoder in llama.cpp, which GGUF files of text encoders have.

Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection

LLAMA_CPP_UMT5 = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk.N.attn_norm": "encoder.block.N.layer.0.layer_norm",
    **{f"enc.blk.N.attn_{x}": f"encoder.block.N.layer.0.SelfAttention.{x}" for x in "qkvo"},
    "enc.blk.N.attn_rel_b": "encoder.block.N.layer.0.SelfAttention.relative_attention_bias",
    "enc.blk.N.ffn_norm": "encoder.block.N.layer.1.layer_norm",
    "enc.blk.N.ffn_gate": "encoder.block.N.layer.1.DenseReluDense.wi_0",
    "enc.blk.N.ffn_up": "encoder.block.N.layer.1.DenseReluDense.wi_1",
    "enc.blk.N.ffn_down": "encoder.block.N.layer.1.DenseReluDense.wo",
}
"""Module in llama.cpp -> module in transformers; `N` is the number of a block."""
_BLOCK = re.compile(r"(?<=^enc\.blk\.)(0|[1-9][0-9]{0,3})(?=\.)")


def llama_cpp_names(names: Collection[str]) -> dict[str, str]:
    """Stored name -> name in a UMT5EncoderModel, for the tensors of llama.cpp's encoder among `names`."""
    if not any(name.startswith("enc.blk.") for name in names):
        return {}  # token_embd is in every language model
    gated = any(name.endswith(".ffn_gate.weight") for name in names)
    translated = {}
    for name in names:
        block = _BLOCK.search(name)
        module = _BLOCK.sub("N", name).removesuffix(".weight")
        if name.endswith(".weight") and (new := LLAMA_CPP_UMT5.get(module)):
            new = new if gated else new.replace("wi_1", "wi")
            translated[name] = f"{new.replace('N', block[0]) if block else new}.weight"
    return translated
