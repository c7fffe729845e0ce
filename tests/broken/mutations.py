"""Random JSON values, and changes of one value or key at any depth of a JSON text."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

LONG = "a" * 100_000


def nested(depth: int) -> Any:
    """A number in `depth` lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**9, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, -0.0]),
    st.booleans(),
)
strings = st.one_of(
    st.sampled_from(["", "x", "1", "1.0", "true", "null", "é", "\0", "\ud800", "\x1b[2J", "\n", LONG]),
    st.sampled_from(
        ["../x", "/", "/dev/stdin", "/proc/self/environ", "../../secret.txt", "https://x.invalid"]
    ),
    st.sampled_from(["relu", "gelu", "silu", "gated-x", "rms_norm", "epsilon", "left", "bfloat16", "int8"]),
    st.text(max_size=8),
)
keys = st.one_of(
    strings,
    st.sampled_from("num_layers num_heads d_model d_kv hidden_size num_hidden_layers vocab_size".split()),
    st.sampled_from("eps flow_shift shift boundary_ratio expand_timesteps z_dim latents_mean".split()),
    st.sampled_from("patch_size image_dim added_kv_proj_dim pos_embed_seq_len dtype torch_dtype".split()),
    st.sampled_from("return_dict output_attentions is_decoder pruned_heads model_type attn_scales".split()),
    st.sampled_from("_attn_implementation tie_word_embeddings _use_default_values architectures".split()),
    st.sampled_from("extra_ids padding_side pad_token model_input_names vocab_file tokenizer_file".split()),
    st.sampled_from("gguf_file init_inputs sp_model_kwargs extra_special_tokens auto_map backend".split()),
    st.sampled_from("size crop_size do_resize resample image_mean quantization_config metadata".split()),
)
values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    numbers,
    strings,
    st.builds(nested, st.sampled_from([20, 90, 110, 400])),
    st.recursive(
        st.one_of(st.none(), numbers, strings),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)),
        max_leaves=6,
    ),
)


def containers(data: Any) -> list[Any]:
    """All dicts and lists that are not empty, from the outside to the inside."""
    every, level = [], [data]
    while level := [c for c in level if isinstance(c, dict | list) and c]:
        every += level
        level = [value for c in level for value in (c.values() if isinstance(c, dict) else c)]
    return every


def change(draw: Any, data: Any) -> None:
    """Change one value or key of `data`, in place."""
    inner = containers(data)
    container = draw(st.sampled_from(range(len(inner))))
    target = inner[container]
    key = draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
    kind = draw(st.sampled_from(["replace"] * 4 + ["remove", "add", "rename", "swap", "wrap", "text"]))
    if kind == "replace":
        target[key] = draw(values)
    elif kind == "remove":
        del target[key]
    elif kind == "wrap":
        target[key] = [target[key]]
    elif kind == "text":
        target[key] = str(target[key])
    elif kind == "swap":
        other = draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        target[key], target[other] = target[other], target[key]
    elif isinstance(target, dict):
        target[draw(keys)] = target.pop(key) if kind == "rename" else draw(values)
    else:
        target.append(draw(values))


def damaged(draw: Any, content: bytes) -> bytes:
    """A JSON file with one or two changes: of values and keys, or of bytes."""
    kind = draw(st.sampled_from(["values"] * 12 + ["duplicate", "bytes", "cut", "other"]))
    if kind == "other":
        return json.dumps(draw(values)).encode()
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "bytes":
        data = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    if kind == "duplicate":
        return content.replace(b"{", b'{"x": 1, "x": 2,', 1)
    parsed = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        if containers(parsed):
            change(draw, parsed)
    return json.dumps(parsed).encode()
