"""The Diffusers config of a transformer that came without one: from an original config, and from shapes.

Original Wan configs lack `text_dim`, `patch_size` and the image layers; msModelSlim writes none for a
cascade; single files have none. All of it stands in the shapes, but for the number of heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ascendit.checkpoint.names import MAX_LAYERS
from ascendit.checkpoint.part import TRANSFORMER
from ascendit.checkpoint.store import listed
from ascendit.errors import CheckpointError
from ascendit.spec import WanConfig

HEAD_DIM = WanConfig.attention_head_dim
"""Of every published Wan model."""
_SAME = ("qk_norm", "rope_max_seq_len", "added_kv_proj_dim", "image_dim", "pos_embed_seq_len")
_FIXED: dict[str, Any] = {"_class_name": TRANSFORMER, **{key: getattr(WanConfig, key) for key in _SAME}}
"""What every Wan model has, and null for layers that not every one has."""
Shapes = Mapping[str, tuple[int, ...]]


def diffusers_config(raw: Mapping[str, Any], shapes: Shapes) -> tuple[dict[str, Any], str | None]:
    """(config of a WanTransformer3DModel, what could not be told).

    `raw`: an original Wan config, or empty. `shapes`: decoded shapes by Diffusers name. Raises
    CheckpointError E-CKP-04 when the two contradict each other, E-CKP-06 for a value that is no number.
    """
    found = _from_shapes(shapes)
    given = _from_wan(raw)
    if wrong := [
        f"{key} = {value} in config.json, {found[key]} by the shapes"
        for key, value in given.items()
        if found.get(key) is not None and found[key] != value
    ]:
        raise CheckpointError(
            f"config.json and the tensors contradict each other: {listed(wrong)}",
            needs="a config.json of the same model as the weights",
            fix="download the weights and config.json again, both from the same revision",
            code="E-CKP-04",
        )
    told = {**given, **{key: value for key, value in found.items() if value is not None}}
    heads, head_dim, problem = _heads(raw, told.pop("dim", None), shapes)
    config = {**_FIXED, **told, "eps": _eps(raw)}
    config |= {"num_attention_heads": heads, "attention_head_dim": head_dim}
    return dict(sorted(config.items())), problem


def _from_wan(raw: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions in an original config, by their keys here."""
    keys = {"dim": "dim", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "num_layers": "num_layers"}
    keys |= {"in_dim": "in_channels", "out_dim": "out_channels", "text_dim": "text_dim"}
    return {new: _positive(raw, old) for old, new in keys.items() if old in raw}


def _positive(raw: Mapping[str, Any], key: str) -> int:
    value = raw[key]
    if type(value) is not int or not 0 < value < 2**31:
        raise _bad_value(key, value, "a whole number above 0")
    return value


def _from_shapes(shapes: Shapes) -> dict[str, Any]:
    """What the shapes say; None for what they do not."""

    def size(name: str, axis: int, rank: int = 2) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) == rank else None

    embedder, block = "condition_embedder", "blocks.0"
    patch = shapes.get("patch_embedding.weight", ())
    patch_size = list(patch[2:]) if len(patch) == 5 else list(WanConfig.patch_size)
    out, volume = size("proj_out.weight", 0), math.prod(patch_size)
    numbers = [
        int(name.split(".", 2)[1]) for name in shapes if name.startswith("blocks.") and _numbered(name)
    ]
    return {
        "dim": size("patch_embedding.weight", 0, 5),
        "in_channels": size("patch_embedding.weight", 1, 5),
        "out_channels": out // volume if out and volume else None,
        "patch_size": patch_size,
        "freq_dim": size(f"{embedder}.time_embedder.linear_1.weight", 1),
        "text_dim": size(f"{embedder}.text_embedder.linear_1.weight", 1),
        "ffn_dim": size(f"{block}.ffn.net.0.proj.weight", 0),
        "num_layers": max(numbers) + 1 if numbers else None,
        "cross_attn_norm": f"{block}.norm2.weight" in shapes,
        "image_dim": size(f"{embedder}.image_embedder.norm1.weight", 0, 1),
        "added_kv_proj_dim": size(f"{block}.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": size(f"{embedder}.image_embedder.pos_embed", 1, 3),
    }


def _numbered(name: str) -> bool:
    number = name.split(".", 2)[1]
    return number.isascii() and number.isdigit() and len(number) <= len(str(MAX_LAYERS))


def _heads(
    raw: Mapping[str, Any], dim: int | None, shapes: Shapes
) -> tuple[int | None, int | None, str | None]:
    """(heads, head size, problem): by the config, a rotation matrix, or the head size all Wan models have."""
    if dim is None:
        return None, None, "the number of attention heads is unknown"
    if "num_heads" in raw:
        heads = _positive(raw, "num_heads")
        if dim % heads:
            raise _bad_value("num_heads", heads, f"a divisor of the width {dim}")
        return heads, dim // heads, None
    rotations = (shape[0] for name, shape in shapes.items() if name.endswith((".q_rot", ".k_rot")) and shape)
    head_dim = next((size for size in rotations if size and dim % size == 0), HEAD_DIM)
    if dim % head_dim == 0:
        return dim // head_dim, head_dim, None
    problem = (
        f"the number of attention heads is unknown: no config.json says it, and the width {dim} is no "
        f"multiple of {HEAD_DIM}, the head size of every published Wan model"
    )
    return None, None, problem


def _eps(raw: Mapping[str, Any]) -> float:
    value = raw.get("eps", WanConfig.eps)
    if type(value) not in (int, float) or not 0 < value < 1:
        raise _bad_value("eps", value, "a small number above 0")
    return float(value)


def _bad_value(key: str, value: object, needs: str) -> CheckpointError:
    return CheckpointError(
        f"config.json of a transformer has {key} = {value!r:.60}",
        needs=f"{key}: {needs}",
        fix="restore config.json from where the model came from",
        code="E-CKP-06",
    )
