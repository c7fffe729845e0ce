"""Names of the tensors of text encoders, VAEs and image encoders in other tools. Does not import torch.

`canonical_part` returns the tensors under the names of transformers and Diffusers. The other tools are the
authors' own code (`models_t5_*.pth`, `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, `models_clip_*.pth`), ComfyUI, which
uses the same names for the VAE, and llama.cpp. Their tensors are equal to those of the libraries; only the
query, key and value of the image encoder are one tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import naming_of, unwrapped, without_prefix

VISION_PREFIX = "vision_model."
"""Prefix of a CLIPVisionModel's tensors in files of transformers before version 5."""
PROJECTION = "visual_projection.weight"
"""The tensor that a CLIPVisionModelWithProjection has in addition."""
_NUMBER = r"(0|[1-9][0-9]{0,3})"
_FUSED = "qkv_proj"
"""Name of a layer that is query, key and value, in this order."""


def recognise_part(names: Collection[str]) -> str | None:
    """The component that tensors of these names belong to: `transformer`, `text_encoder`, `vae`,
    `image_encoder`. None: unknown, or several components.
    """
    parts = [part for part, typical in _TYPICAL.items() if typical & set(_renamed(part, names).values())]
    if any(unwrapped(name) == "patch_embedding.weight" for name in names) or not parts:
        parts += ["transformer"] if naming_of(names) else []
    return parts[0] if len(parts) == 1 else None


_OTHER_MODELS = {
    r"vace_(blocks|patch_embedding)\.": "a VACE module without its transformer",
    r"(double|single)_blocks\.|(double|single)_stream_modulation": "a FLUX or HunyuanVideo transformer",
    r"(single_)?transformer_blocks\.|joint_blocks\.": "a transformer of another family",
    r"(en|de)coder\.\d+\.": "a tiny autoencoder (TAEHV)",
    r"control(net)?_(blocks|patch)": "a ControlNet",
}
"""Start of a name -> the model that has it, of those that people take for a part of Wan."""


def other_model(names: Collection[str]) -> str:
    """The model of another kind that tensors of these names belong to; "" if unknown."""
    inner = [without_prefix(name) for name in names]
    labels = (x for start, x in _OTHER_MODELS.items() if any(re.match(start, name) for name in inner))
    return next(labels, "")


def is_unused(part: str, name: str) -> bool:
    """Whether Wan does not use the stored tensor `name` in a file of this component."""
    return part in _UNUSED and _UNUSED[part].match(unwrapped(name)) is not None


def canonical_part(part: str, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a component under the names of transformers or Diffusers. `part`: its name.

    Tensors of other parts of a complete UMT5 or CLIP are left out, unknown names do not change. Raises
    CheckpointError (E-CKP-09) if two tensors map to one name.
    """
    tensors: dict[str, TensorInfo] = {}
    renamed = _renamed(part, stored)
    for name, info in stored.items():
        if is_unused(part, name):
            continue
        for new, piece in _pieces(renamed.get(name, name), info):
            if new in tensors:
                raise CheckpointError(
                    f"{tensors[new].name} and {name} both map to {new} of the {part}",
                    needs="each tensor once, under one name",
                    fix="remove one of the two; they are from different tools or versions",
                    code="E-CKP-09",
                )
            tensors[new] = piece
    return tensors


def _renamed(part: str, names: Collection[str]) -> dict[str, str]:
    """Stored name -> name of the library, for the names that are known or have a prefix."""
    if part not in _STYLES:
        return {}
    inner = {name: unwrapped(name) for name in names}
    renamed = {old: new for rename in _STYLES[part] for old, new in rename(inner.values()).items()}
    return {name: renamed.get(short, short) for name, short in inner.items()}


def _pieces(name: str, info: TensorInfo) -> Iterable[tuple[str, TensorInfo]]:
    """The tensors of the library in one stored tensor."""
    if (axes := _CLIP_AXES.get(name)) is not None and len(info.shape) == 3:
        shape = info.shape[-axes:]
        if math.prod(shape) == math.prod(info.shape):
            info = replace(info, shape=shape, strides=info.strides and info.strides[-axes:])
    if name == _CLIP_HEAD:
        name, info = PROJECTION, _transposed(info)
    fused = name.endswith((f".{_FUSED}.weight", f".{_FUSED}.bias"))
    pieces = [piece for i in range(3) if (piece := _third(info, i))] if fused else []
    if not pieces:
        yield name, info
    for layer, piece in zip("qkv", pieces, strict=bool(pieces)):
        yield name.replace(_FUSED, f"{layer}_proj"), piece


def _third(info: TensorInfo, i: int) -> TensorInfo | None:
    """The third `i` of the rows of a tensor, with their scales; None if it cannot be divided."""
    rows, remainder = divmod(info.shape[0] if info.shape else 1, 3)
    encoding = info.encoding
    block = encoding.block if encoding else 1
    if remainder or info.strides is not None or rows * math.prod(info.shape[1:]) % block:
        return None
    if encoding and encoding.scale and encoding.scale.shape[:1] == info.shape[:1]:
        if (scale := _third(encoding.scale, i)) is None:
            return None
        encoding = replace(encoding, scale=scale)
    size = info.nbytes // 3
    start = info.start + i * size
    return replace(info, shape=(rows, *info.shape[1:]), start=start, end=start + size, encoding=encoding)


def _transposed(info: TensorInfo) -> TensorInfo:
    """The transpose of a matrix of plain numbers; others are returned unchanged."""
    if len(info.shape) != 2 or info.encoding is not None:
        return info
    strides = info.strides or (info.shape[1], 1)
    return replace(info, shape=info.shape[::-1], strides=strides[::-1])


# ---- UMT5 ---------------------------------------------------------------------------------------

_UMT5_ATTENTION, _UMT5_FEED_FORWARD = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{x}": f"{_UMT5_ATTENTION}.{x}" for x in "qkvo"},
    "pos_embedding.embedding": f"{_UMT5_ATTENTION}.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": f"{_UMT5_FEED_FORWARD}.wi_0",
    "ffn.fc1": f"{_UMT5_FEED_FORWARD}.wi_1",
    "ffn.fc2": f"{_UMT5_FEED_FORWARD}.wo",
}
_UMT5_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_UMT5 = re.compile(rf"(?:blocks\.{_NUMBER}\.)?([a-z0-9_.]+)\.(\w+)", re.ASCII)


def _wan_umt5(names: Iterable[str]) -> dict[str, str]:
    """Names of the encoder of `wan/modules/t5.py` -> names of a UMT5EncoderModel."""
    renamed = {}
    for name in names:
        if (match := _UMT5.fullmatch(name)) is None:
            continue
        number, module, role = match.groups()
        if number is None and module in _UMT5_TOP:
            renamed[name] = f"{_UMT5_TOP[module]}.{role}"
        elif number is not None and module in _UMT5_BLOCK:
            renamed[name] = f"encoder.block.{number}.{_UMT5_BLOCK[module]}.{role}"
    return renamed


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
_LLAMA_CPP_BLOCK = re.compile(r"(?<=^enc\.blk\.)(0|[1-9][0-9]{0,3})(?=\.)")


def llama_cpp_names(names: Collection[str]) -> dict[str, str]:
    """Stored name -> name in a UMT5EncoderModel, for the tensors of llama.cpp's encoder among `names`."""
    if not any(name.startswith("enc.blk.") for name in names):
        return {}  # token_embd is in every language model
    gated = any(name.endswith(".ffn_gate.weight") for name in names)
    translated = {}
    for name in names:
        block = _LLAMA_CPP_BLOCK.search(name)
        module = _LLAMA_CPP_BLOCK.sub("N", name).removesuffix(".weight")
        if name.endswith(".weight") and (new := LLAMA_CPP_UMT5.get(module)):
            new = new if gated else new.replace("wi_1", "wi")
            translated[name] = f"{new.replace('N', block[0]) if block else new}.weight"
    return translated


# ---- the VAE ------------------------------------------------------------------------------------

_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
"""Modules of a residual block."""
_SCALING = ("resample.1", "time_conv")
"""Modules of a block that changes the size."""
_ENDS = {
    "conv1": "conv_in",
    "middle.1.norm": "mid_block.attentions.0.norm",
    "middle.1.to_qkv": "mid_block.attentions.0.to_qkv",
    "middle.1.proj": "mid_block.attentions.0.proj",
    "head.0": "norm_out",
    "head.2": "conv_out",
    **{
        f"middle.{old}.{a}": f"mid_block.resnets.{new}.{b}"
        for old, new in ((0, 0), (2, 1))
        for a, b in _RESIDUAL.items()
    },
}
"""Modules of an encoder or decoder, without the blocks."""
_VAE_TOP = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{f"{half}.{old}": f"{half}.{new}" for half in ("encoder", "decoder") for old, new in _ENDS.items()},
}
_VAE_BLOCK = re.compile(
    rf"(?P<half>encoder\.down|decoder\.up)samples\.{_NUMBER}\.(?:(?:down|up)samples\.{_NUMBER}\.)?"
    rf"(?P<module>{'|'.join(map(re.escape, (*_RESIDUAL, *_SCALING)))})"
)


def _wan_vae(names: Iterable[str]) -> dict[str, str]:
    """Names of `wan/modules/vae.py` and `vae2_2.py` -> names of an AutoencoderKLWan.

    Wan2.1 numbers all blocks of the decoder in one list, in which a block that changes the size is the last
    one of its level.
    """
    names = list(names)
    matches = {name: match for name in names if (match := _VAE_BLOCK.match(name))}
    scaling = {
        int(m[2])
        for m in matches.values()
        if m["half"] == "decoder.up" and m[3] is None and m["module"] in _SCALING
    }
    renamed = {}
    for name in names:
        if (match := matches.get(name)) is not None:
            renamed[name] = _vae_block(match, scaling) + name[match.end() :]
        elif (new := _VAE_TOP.get(name.rpartition(".")[0])) is not None:
            renamed[name] = f"{new}.{name.rpartition('.')[2]}"
    return renamed


def _vae_block(match: re.Match[str], scaling: Collection[int]) -> str:
    """The new name of a module in a block. `scaling`: numbers of the blocks of the decoder that change the
    size, for Wan2.1.
    """
    half, module, number = match["half"], match["module"], int(match[2])
    side = half.rpartition(".")[2]
    new = _RESIDUAL.get(module, module)
    if match[3] is not None:  # Wan2.2
        inner = f"{side}sampler" if module in _SCALING else f"resnets.{match[3]}"
        return f"{half}_blocks.{number}.{inner}.{new}"
    if side == "down":
        return f"{half}_blocks.{number}.{new}"
    before = [i for i in scaling if i < number]
    if module in _SCALING:
        return f"{half}_blocks.{len(before)}.upsamplers.0.{new}"
    return f"{half}_blocks.{len(before)}.resnets.{number - max(before, default=-1) - 1}.{new}"


# ---- the image encoder --------------------------------------------------------------------------

_CLIP_LAYER = {
    "norm1": "layer_norm1",
    "attn.to_qkv": f"self_attn.{_FUSED}",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_CLIP_TOP = {
    "cls_embedding": "embeddings.class_embedding",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pos_embedding": "embeddings.position_embedding.weight",
    **{f"pre_norm.{role}": f"pre_layrnorm.{role}" for role in ("weight", "bias")},
    **{f"post_norm.{role}": f"post_layernorm.{role}" for role in ("weight", "bias")},
}
_CLIP_AXES = {
    f"{VISION_PREFIX}{_CLIP_TOP['cls_embedding']}": 1,
    f"{VISION_PREFIX}{_CLIP_TOP['pos_embedding']}": 2,
}
"""Tensor -> its axes in the library. The others of the three stored axes have one element."""
_CLIP_HEAD = "visual.head"
"""The projection, of which the library stores the transpose."""
_CLIP = re.compile(rf"transformer\.{_NUMBER}\.({'|'.join(map(re.escape, _CLIP_LAYER))})\.")


def _wan_clip(names: Iterable[str]) -> dict[str, str]:
    """Names of the image encoder of `wan/modules/clip.py` -> names of a CLIPVisionModel."""
    renamed = {}
    for name in names:
        inner = name.removeprefix("visual.")
        if inner == name:
            continue
        if match := _CLIP.match(inner):
            layer = f"{VISION_PREFIX}encoder.layers.{match[1]}.{_CLIP_LAYER[match[2]]}"
            renamed[name] = f"{layer}.{inner[match.end() :]}"
        elif inner in _CLIP_TOP:
            renamed[name] = f"{VISION_PREFIX}{_CLIP_TOP[inner]}"
    return renamed


# ---- the components -----------------------------------------------------------------------------

_STYLES = {"text_encoder": (_wan_umt5, llama_cpp_names), "vae": (_wan_vae,), "image_encoder": (_wan_clip,)}
"""Component -> its names in other tools."""
_UNUSED = {
    "text_encoder": re.compile(r"(decoder|lm_head|dec)\.|(logit_scale|output\.weight)$"),
    "vae": re.compile(r"(mean|std|inv_std)$"),
    "image_encoder": re.compile(
        r"(textual|text_model)\.|(log_scale|logit_scale|text_projection(\.weight)?|logit_bias)$"
    ),
}
"""Component -> tensors in its files that Wan does not use: the decoder of a complete UMT5, the text model of
a complete CLIP, the statistics of latents, which are in the config of the VAE.
"""
_TYPICAL = {
    "text_encoder": {
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
    },
    "vae": {"decoder.mid_block.attentions.0.to_qkv.weight", "decoder.mid_block.attentions.0.norm.gamma"},
    "image_encoder": {f"{prefix}{_CLIP_TOP['cls_embedding']}" for prefix in ("", VISION_PREFIX)},
}
"""Component -> names of the library, of which every file has one; a quantizer renames no norm."""
