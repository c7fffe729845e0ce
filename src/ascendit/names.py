"""Names, order and shapes of the tensors of a Wan transformer, in several name styles.

`expected_tensors` lists the tensors of a config. `to_diffusers` and `to_wan` translate one name and are exact
inverses. Their tables are from Diffusers' `scripts/convert_wan_to_diffusers.py`, but match complete
components between dots instead of substrings. `canonical` also removes prefixes and wrappers that tools add.
`grouped`, `ranges` and `listed` shorten lists of names for messages.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

from ascendit.errors import CheckpointError
from ascendit.family import WanConfig

Shapes = dict[str, tuple[int, ...]]

MAX_LAYERS = 10_000
IGNORED_PARTS = ("norm_added_q",)
"""Parts of names in Wan2.1 I2V folders that the model does not use; Diffusers ignores them too."""

FLOAT32_PARTS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Parts of names of parameters that stay in float32, like Diffusers' `_keep_in_fp32_modules`."""


# ---- the tensors of a model ---------------------------------------------------------------------

_SIZES = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim"),
    *("ffn_dim", "num_layers", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len"),
)
"""Integer keys of a config that determine shapes."""
_OPTIONAL = ("out_channels", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")
"""Keys that may be null: `out_channels` equals `in_channels`, or the layer does not exist."""


def expected_tensors(config: dict[str, Any]) -> Shapes:
    """Name -> shape of all tensors of a WanTransformer3DModel with this `config.json`.

    Missing keys have Diffusers' defaults. Raises CheckpointError (E-CKP-06) for an invalid dimension.
    """
    values = _dimensions(config)
    dim = values["num_attention_heads"] * values["attention_head_dim"]
    patch = _patch_size(config)
    channels = values["in_channels"]
    shapes: Shapes = {"scale_shift_table": (1, 2, dim)}
    shapes["patch_embedding.weight"] = (dim, channels, *patch)
    shapes["patch_embedding.bias"] = (dim,)
    shapes |= _condition_embedder(values, dim)
    for index in range(values["num_layers"]):
        block = _block(values, dim, bool(config.get("cross_attn_norm", WanConfig.cross_attn_norm)))
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in block}
    shapes |= _linear("proj_out", dim, (values["out_channels"] or channels) * math.prod(patch))
    return shapes


def _condition_embedder(values: dict[str, int], dim: int) -> Shapes:
    shapes = (
        _linear("time_embedder.linear_1", values["freq_dim"], dim)
        | _linear("time_embedder.linear_2", dim, dim)
        | _linear("time_proj", dim, 6 * dim)
        | _linear("text_embedder.linear_1", values["text_dim"], dim)
        | _linear("text_embedder.linear_2", dim, dim)
    )
    if image := values["image_dim"]:
        shapes |= _norm("image_embedder.norm1", image)
        shapes |= _linear("image_embedder.ff.net.0.proj", image, image)
        shapes |= _linear("image_embedder.ff.net.2", image, dim)
        shapes |= _norm("image_embedder.norm2", dim)
        if length := values["pos_embed_seq_len"]:
            shapes["image_embedder.pos_embed"] = (1, length, image)
    return {f"condition_embedder.{name}": shape for name, shape in shapes.items()}


def _block(values: dict[str, int], dim: int, cross_attn_norm: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "scale_shift_table", (1, 6, dim)
    for attention in ("attn1", "attn2"):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{attention}.{layer}", dim, dim).items()
        yield f"{attention}.norm_q.weight", (dim,)
        yield f"{attention}.norm_k.weight", (dim,)
    if added := values["added_kv_proj_dim"]:
        yield from _linear("attn2.add_k_proj", added, dim).items()
        yield from _linear("attn2.add_v_proj", added, dim).items()
        yield "attn2.norm_added_k.weight", (dim,)
    if cross_attn_norm:
        yield from _norm("norm2", dim).items()
    yield from _linear("ffn.net.0.proj", dim, values["ffn_dim"]).items()
    yield from _linear("ffn.net.2", values["ffn_dim"], dim).items()


def _linear(name: str, fan_in: int, fan_out: int) -> Shapes:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _dimensions(config: dict[str, Any]) -> dict[str, int]:
    """The integer keys of a config; 0 for null."""
    values = {}
    for key in _SIZES:
        value = config.get(key, getattr(WanConfig, key))
        values[key] = 0 if value is None and key in _OPTIONAL else whole_number(key, value)
    if values["num_layers"] > MAX_LAYERS:
        raise bad_value("num_layers", values["num_layers"], f"at most {MAX_LAYERS}")
    return values


def _patch_size(config: dict[str, Any]) -> tuple[int, int, int]:
    value = config.get("patch_size", WanConfig.patch_size)
    sizes = value if isinstance(value, list | tuple) else ()
    if len(sizes) != 3 or not all(type(v) is int and v > 0 for v in sizes):
        raise bad_value("patch_size", value, "three whole numbers above 0")
    return (sizes[0], sizes[1], sizes[2])


def whole_number(key: str, value: object) -> int:
    """Return a dimension from a config.

    Raises CheckpointError (E-CKP-06) unless it is a whole number above 0.
    """
    if type(value) is not int or not 0 < value < 2**31:
        raise bad_value(key, value, "a whole number above 0")
    return value


def bad_value(key: str, value: object, needs: str) -> CheckpointError:
    """The error E-CKP-06 for a `key` of config.json whose value is invalid for a Wan transformer."""
    return CheckpointError(
        f"config.json of a transformer has {key} = {value!r:.60}",
        needs=f"{key}: {needs}",
        fix="restore config.json from the source of the model",
        code="E-CKP-06",
    )


# ---- layers -------------------------------------------------------------------------------------

QUANTIZED_ROLES = ("weight", "weight_scale", "weight_offset", "weight_dual_scale")
"""Quantized weight and scales of a linear layer, as in `<layer>.weight_scale`."""
ROLES = (*QUANTIZED_ROLES, "mul_scale", "bias")
"""All tensors that a linear layer may have, in the order they are written."""

_OUTSIDE = {
    "head.modulation": "scale_shift_table",
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
}
"""Modules outside the blocks, original name -> Diffusers name, in the order of the model."""
_TOP = tuple(name for name in _OUTSIDE.values() if name != "proj_out") + ("blocks", "proj_out")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "q_rot", "k_rot")
_IN_BLOCK = (
    "scale_shift_table",
    *(f"attn1.{name}" for name in _ATTENTION),
    *(f"attn2.{name}" for name in _ATTENTION),
    *(f"attn2.{name}" for name in ("add_k_proj", "add_v_proj", "norm_added_k")),
    "norm2",
    "ffn.net.0.proj",
    "ffn.net.2",
)
"""Modules of a block in the order of the model."""
_NOT_LINEAR = re.compile(r"(?:.*\.)?(?:scale_shift_table|patch_embedding|norm\w*|pos_embed|[qk]_rot|blocks)")
_TOP_LINEARS = tuple(name for name in _TOP if not _NOT_LINEAR.fullmatch(name))
_BLOCK_LINEARS = tuple(name for name in _IN_BLOCK if not _NOT_LINEAR.fullmatch(name))
_BLOCK = re.compile(r"blocks\.(?:0|[1-9][0-9]{0,4})\.")


def is_linear(name: str) -> bool:
    """Whether this is the name of a linear layer of a Wan transformer."""
    return is_block_linear(name) or name in _TOP_LINEARS


def is_block_linear(name: str) -> bool:
    """Whether `name` is a linear layer of a block; recipes quantize these."""
    match = _BLOCK.match(name)
    return match is not None and name[match.end() :] in _BLOCK_LINEARS


def block_linears(config: dict[str, Any]) -> tuple[str, ...]:
    """The linear layers in the blocks, in the order of the model; recipes quantize these."""
    values = _dimensions(config)
    inside = [layer for layer in _BLOCK_LINEARS if values["added_kv_proj_dim"] or "add_" not in layer]
    return tuple(f"blocks.{index}.{layer}" for index in range(values["num_layers"]) for layer in inside)


def all_linears(config: dict[str, Any]) -> tuple[str, ...]:
    """All linear layers in the order of the model: embedders, blocks, `proj_out`."""
    image = _dimensions(config)["image_dim"]
    *before, last = (layer for layer in _TOP_LINEARS if image or "image_embedder" not in layer)
    return (*before, *block_linears(config), last)


# ---- order --------------------------------------------------------------------------------------

_TOP_RANK = {name: rank for rank, name in enumerate(_TOP)}
_BLOCK_RANK = {name: rank for rank, name in enumerate(_IN_BLOCK)}
_ROLE_RANK = {role: rank for rank, role in enumerate(ROLES)}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)", re.ASCII)


def sort_names(names: Iterable[str]) -> list[str]:
    """Tensor names in canonical order: modules in model order, blocks by number, roles as in `ROLES`.

    Unknown names come last in alphabetical order, in their block if they have one. The order depends only on
    the names, so that the same tensors from any source give the same file.
    """
    return sorted(names, key=_sort_key)


def _sort_key(name: str) -> tuple[int, int, int, int, str]:
    match = _BLOCK_NAME.fullmatch(name)
    inner = match[2] if match else name
    ranks = _BLOCK_RANK if match else _TOP_RANK
    stem, _, role = inner.rpartition(".")
    if inner in ranks:
        stem, role = inner, ""
    rank = ranks.get(stem, len(ranks))
    role_rank = _ROLE_RANK.get(role, len(ROLES))
    if match:
        return (_TOP_RANK["blocks"], int(match[1]), rank, role_rank, name)
    return (rank, 0, 0, role_rank, name)


# ---- original Wan names -------------------------------------------------------------------------

_SCALES = tuple(f"fa{n}_{x}" for n in ("", "3") for x in "qkv")
_SAME = ("norm_q", "norm_k", "q_rot", "k_rot", "quant_type", *_SCALES)
_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"} | {name: name for name in _SAME}
_INSIDE = {
    "modulation": "scale_shift_table",
    "norm1": "norm1",
    "norm3": "norm2",  # Diffusers numbers norms in order of use: norm1, cross-attention, ffn
    "norm2": "norm3",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _LAYERS.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _LAYERS.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
"""Modules in a block, original name -> Diffusers name."""


def to_diffusers(name: str) -> str | None:
    """The Diffusers name of an original Wan tensor or module, or None if Wan has no such module.

    The text after the module (`.weight`, `.weight_scale`, `.linear.bias`, `.lora_A.weight`) is unchanged.
    """
    return _translate(name, _OUTSIDE, _INSIDE)


def to_wan(name: str) -> str | None:
    """The inverse of `to_diffusers`: the original Wan name of a Diffusers tensor or module, or None."""
    return _translate(name, _OUTSIDE_INVERSE, _INSIDE_INVERSE)


def _inverse(table: dict[str, str]) -> dict[str, str]:
    inverse = {new: old for old, new in table.items()}
    assert len(inverse) == len(table)
    return inverse


_OUTSIDE_INVERSE, _INSIDE_INVERSE = _inverse(_OUTSIDE), _inverse(_INSIDE)


def _translate(name: str, outside: dict[str, str], inside: dict[str, str]) -> str | None:
    """Replace the longest module at the start of `name` that is in a table; None if there is none."""
    match = _BLOCK.match(name)
    start, table = (match.end(), inside) if match else (0, outside)
    end = len(name)
    while end > start:
        if (new := table.get(name[start:end])) is not None:
            return name[:start] + new + name[end:]
        end = name.rfind(".", start, end)
    return None


# ---- names written by tools ---------------------------------------------------------------------

Naming = Literal["diffusers", "wan"]

PREFIXES: dict[str, str | None] = {
    **dict.fromkeys(
        (
            *("model", "base_model", "inner_model", "diffusion_model", "dit_model", "transformer_model"),
            *("wan_model", "wan", "unet", "net", "network", "backbone", "denoiser", "generator", "student"),
            *("pipe", "pipeline", "state_dict", "model_state_dict"),
        )
    ),
    **dict.fromkeys(("transformer", "transformer_1", "dit", "high_noise_model"), "transformer"),
    **dict.fromkeys(("transformer_2", "dit2", "low_noise_model"), "transformer_2"),
}
"""Components that tools add, in any order and number, before all names of a transformer -> the expert that
they name. Several may also be before the names of another part.
"""
PARTS = (
    *("vae", "first_stage_model", "text_encoder", "text_encoders", "umt5xxl", "t5xxl", "cond_stage_model"),
    *("clip_vision", "image_encoder"),
)
"""Components before the names of the other parts of a model."""
EMA = ("ema", "ema_model", "model_ema", "net_ema", "transformer_ema", "generator_ema", "unet_ema", "dit_ema")
"""Components before a moving average of the weights, which trainers store beside them or alone."""
_PREFIX = re.compile(rf"(?:(?:{'|'.join([*PREFIXES, *PARTS, *EMA])})\.)+")
WRAPPERS = (
    "module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module base_layer".split()
)
"""Wrappers of modules in training, anywhere in a name: DDP, torch.compile, FSDP, activation checkpoints,
DeepSpeed, PEFT.
"""
_WRAPPER = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")
_WRAPPED = re.compile(r"\.linear(\.(?:weight(?:_\w+)?|bias))$|\.div(\.mul_scale)$")
"""msModelSlim moves a smoothed layer X to `X.linear` and adds `X.div.mul_scale`."""
_HALF_TRANSLATED = re.compile(r"(\.attn[12]\.)to_((?:[qk]_rot|quant_type))$")
"""SGLang and vLLM-Omni replace the substring `self_attn.q`, also in `self_attn.q_rot`."""


def naming_of(names: Iterable[str]) -> Naming | None:
    """The name style of these names, or None if none of them is a name of a Wan transformer."""
    votes = {"diffusers": 0, "wan": 0}
    any_match = False
    for name in names:
        inner = unwrapped(name)
        wan, diffusers = to_diffusers(inner) is not None, to_wan(inner) is not None
        any_match |= wan or diffusers
        votes["wan"] += wan and not diffusers
        votes["diffusers"] += diffusers and not wan
    if not any_match:
        return None
    return "wan" if votes["wan"] > votes["diffusers"] else "diffusers"


def canonical(name: str, naming: Naming) -> str:
    """The Diffusers name of a tensor or manifest entry, without prefix and wrapper.

    `naming` resolves names that differ in meaning, such as `norm2`. Unknown names are returned without their
    prefix.
    """
    inner = unwrapped(name)
    if naming == "diffusers" and to_wan(inner) is not None:
        return inner
    return to_diffusers(inner) or _HALF_TRANSLATED.sub(r"\1\2", inner)


def unwrapped(name: str) -> str:
    """`without_prefix(name)` without msModelSlim's wrapper of a smoothed layer."""
    return _WRAPPED.sub(lambda match: match[1] or match[2], without_prefix(name))


def without_prefix(name: str) -> str:
    """`name` without the prefixes in `PREFIXES`, `PARTS` and `EMA`, and without `WRAPPERS` at any depth.

    For tensors of a transformer, a text encoder or a VAE, none of which has a module of these names at its
    top.
    """
    if "mod" in name or "base_layer" in name:
        name = _WRAPPER.sub("", name)
    match = _PREFIX.match(name)
    return name[match.end() :] if match else name


def on_disk(name: str, naming: Naming) -> str:
    """A Diffusers name in the name style of the files, for messages."""
    return (to_wan(name) or name) if naming == "wan" else name


# ---- lists of names, shortened ------------------------------------------------------------------


def grouped(chosen: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """The shortest exact patterns for the names `chosen`, a subset of `among`, in the order of `among`.

    A subtree of names that is chosen completely is one pattern: `condition_embedder.*`. Blocks with the same
    choice share one: `blocks.0-4` if complete, `blocks.5,7-9.ffn.*` if partial.
    """
    selected = set(chosen)
    names = list(among)
    sizes = Counter(node for name in names for node in _nodes(name))
    hits = Counter(node for name in names if name in selected for node in _nodes(name))
    patterns: dict[tuple[str, str, str], list[int]] = {}
    for name in names:
        if name in selected:
            head, number, tail = _split(_highest_complete(name, sizes, hits))
            numbers = patterns.setdefault((head, "#" if number is not None else "", tail), [])
            if number is not None and number not in numbers[-1:]:
                numbers.append(number)
    blocks = {int(n) for _, n, _ in map(_split, names) if n is not None}
    return tuple(_pattern(head, numbers, tail, blocks) for (head, _, tail), numbers in patterns.items())


def _nodes(name: str) -> list[str]:
    """The nodes of the name tree from the root to `name`, inclusive."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format))


def _highest_complete(name: str, sizes: Counter[str], hits: Counter[str]) -> str:
    """The highest ancestor of `name` that is chosen completely, with `.*`, or `name` if there is none.

    Never `blocks`, whose children are grouped by number.
    """
    above = (node for node in _nodes(name)[:-1] if node != "blocks" and sizes[node] > 1)
    return next((f"{node}.*" for node in above if sizes[node] == hits[node]), name)


def _split(node: str) -> tuple[str, int | None, str]:
    """`blocks.3.ffn.*` -> ("blocks", 3, ".ffn.*"); the tail of a complete block is ""."""
    head, _, inner = node.partition(".")
    number, _, tail = inner.partition(".")
    if head != "blocks" or not number.isdecimal():
        return node, None, ""
    return head, int(number), f".{tail}" if tail not in ("", "*") else ""


def _pattern(head: str, numbers: list[int], tail: str, blocks: Collection[int]) -> str:
    if not numbers:
        return head
    if set(numbers) == blocks and not tail:
        return f"{head}.*"
    return f"{head}.{ranges(numbers)}{tail}"


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text: `0-4,7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def problem_counts(kinds: Mapping[str, Collection[str]], limit: int = 5) -> str:
    """`2 missing: a, b; 1 unexpected: c`: for each kind that has names, their number and the first `limit` of
    them.
    """
    return "; ".join(f"{len(names)} {kind}: {listed(names, limit)}" for kind, names in kinds.items() if names)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names, sorted, and the number of remaining ones."""
    ordered = sorted(names)
    more = len(ordered) - limit
    return ", ".join(itertools.islice(ordered, limit)) + (f" and {more} more" if more > 0 else "")
