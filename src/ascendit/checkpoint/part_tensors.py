"""Names and shapes of the tensors of VAE, text encoder and image encoder, from their configs alone.

They equal `state_dict()` of the classes of Diffusers and transformers, without building one. `names.py` does
the same for the transformers.
"""

from __future__ import annotations

from collections.abc import Iterator

from ascendit.checkpoint.part_configs import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from ascendit.checkpoint.part_names import PROJECTION
from ascendit.names import Shapes

Entries = Iterator[tuple[str, tuple[int, ...]]]

# ---- UMT5 ---------------------------------------------------------------------------------------

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""One tied tensor, which files store under either name, or both."""


def text_encoder_tensors(config: TextEncoderConfig) -> Shapes:
    """The tensors of a UMT5EncoderModel; the embedding as `shared.weight`."""
    width, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
    up = ("wi_0", "wi_1") if config.gated else ("wi",)
    shapes: Shapes = {EMBEDDINGS[0]: (config.vocab_size, width)}
    for i in range(config.num_layers):
        block = f"encoder.block.{i}.layer"
        attention = f"{block}.0.SelfAttention"
        shapes |= {f"{attention}.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{attention}.o.weight"] = (width, inner)
        buckets = (config.relative_attention_num_buckets, config.num_heads)
        shapes[f"{attention}.relative_attention_bias.weight"] = buckets
        shapes |= {f"{block}.1.DenseReluDense.{name}.weight": (hidden, width) for name in up}
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{block}.{j}.layer_norm.weight": (width,) for j in (0, 1)}
    shapes["encoder.final_layer_norm.weight"] = (width,)
    return shapes


# ---- CLIP ---------------------------------------------------------------------------------------


def image_encoder_tensors(config: ImageEncoderConfig) -> Shapes:
    """The tensors of a CLIPVisionModel, without `VISION_PREFIX`."""
    width, patch = config.hidden_size, config.patch_size
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, config.num_channels, patch, patch),
        "embeddings.position_embedding.weight": (config.tokens, width),
    }
    shapes |= dict([*_norm("pre_layrnorm", width), *_norm("post_layernorm", width)])
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= dict(_layer(f"{layer}.self_attn.{name}", width, width))
        shapes |= dict(_layer(f"{layer}.mlp.fc1", config.intermediate_size, width))
        shapes |= dict(_layer(f"{layer}.mlp.fc2", width, config.intermediate_size))
        shapes |= dict([*_norm(f"{layer}.layer_norm1", width), *_norm(f"{layer}.layer_norm2", width)])
    return shapes


def image_projection(config: ImageEncoderConfig) -> Shapes:
    """The shape of `PROJECTION`."""
    return {PROJECTION: (config.projection_dim, config.hidden_size)}


def _layer(name: str, out: int, *kernel: int) -> Entries:
    """A linear layer or a convolution: `kernel` is the input size, then the size of the kernel."""
    yield f"{name}.weight", (out, *kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Entries:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


# ---- the VAE ------------------------------------------------------------------------------------


def autoencoder_tensors(config: AutoencoderConfig) -> Shapes:
    """The tensors of an AutoencoderKLWan."""
    z = config.z_dim
    entries = [*_encoder(config), *_decoder(config)]
    entries += [*_layer("quant_conv", 2 * z, 2 * z, 1, 1, 1), *_layer("post_quant_conv", z, z, 1, 1, 1)]
    return dict(entries)


def _encoder(config: AutoencoderConfig) -> Entries:
    sizes = [config.base_dim * m for m in (1, *config.dim_mult)]
    yield from _layer("encoder.conv_in", sizes[0], config.in_channels, 3, 3, 3)
    index = 0  # of the flat list of blocks of Wan2.1
    for i, (size, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        scaled = i < len(config.temperal_downsample)
        temporal = scaled and config.temperal_downsample[i]
        for j in range(config.num_res_blocks):
            name = f"{i}.resnets.{j}" if config.is_residual else f"{index}"
            yield from _residual(f"encoder.down_blocks.{name}", size if j == 0 else out, out)
            index += 1
        if scaled:
            name = f"{i}.downsampler" if config.is_residual else f"{index}"
            yield from _layer(f"encoder.down_blocks.{name}.resample.1", out, out, 3, 3)
            if temporal:
                yield from _layer(f"encoder.down_blocks.{name}.time_conv", out, out, 3, 1, 1)
            index += 1
    yield from _ends("encoder", sizes[-1], sizes[-1], 2 * config.z_dim)


def _decoder(config: AutoencoderConfig) -> Entries:
    base = config.decoder_base_dim or config.base_dim
    sizes = [base * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
    temporal = config.temperal_downsample[::-1]
    yield from _layer("decoder.conv_in", sizes[0], config.z_dim, 3, 3, 3)
    for i, (size, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        block = f"decoder.up_blocks.{i}"
        first = size if i == 0 or config.is_residual else size // 2
        for j in range(config.num_res_blocks + 1):
            yield from _residual(f"{block}.resnets.{j}", first if j == 0 else out, out)
        if i < len(temporal):
            name = f"{block}.upsampler" if config.is_residual else f"{block}.upsamplers.0"
            yield from _layer(f"{name}.resample.1", out if config.is_residual else out // 2, out, 3, 3)
            if temporal[i]:
                yield from _layer(f"{name}.time_conv", 2 * out, out, 3, 1, 1)
    yield from _ends("decoder", sizes[0], sizes[-1], config.out_channels)


def _residual(name: str, size: int, out: int) -> Entries:
    yield f"{name}.norm1.gamma", (size, 1, 1, 1)
    yield from _layer(f"{name}.conv1", out, size, 3, 3, 3)
    yield f"{name}.norm2.gamma", (out, 1, 1, 1)
    yield from _layer(f"{name}.conv2", out, out, 3, 3, 3)
    if size != out:
        yield from _layer(f"{name}.conv_shortcut", out, size, 1, 1, 1)


def _ends(name: str, middle: int, size: int, out: int) -> Entries:
    """The blocks in the middle, and the last layers, of an encoder or decoder."""
    for j in (0, 1):
        yield from _residual(f"{name}.mid_block.resnets.{j}", middle, middle)
    attention = f"{name}.mid_block.attentions.0"
    yield f"{attention}.norm.gamma", (middle, 1, 1)
    yield from _layer(f"{attention}.to_qkv", 3 * middle, middle, 1, 1)
    yield from _layer(f"{attention}.proj", middle, middle, 1, 1)
    yield f"{name}.norm_out.gamma", (size, 1, 1, 1)
    yield from _layer(f"{name}.conv_out", out, size, 3, 3, 3)
