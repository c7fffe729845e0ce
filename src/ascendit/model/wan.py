"""The Wan transformer: Diffusers' parameter names, its own forward on the operators it is given.

It branches on no device and no precision: the operators know the device, and each layer gets the precision
of its step. Covers T2V, I2V with concatenated channels, TI2V with one timestep for the first frame and
another for the rest, and Wan2.1 I2V's image cross-attention.

    state = model.prepare(grid, text)                 # once for each prompt: RoPE, text keys and values
    for t in timesteps:
        v = model(x, t, state)                        # 8 of the 10 linears of a block: text K/V are kept

Shapes: B videos, S video tokens, L text tokens, D width, H heads, d head size, R distinct timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ascendit.family import WanConfig
from ascendit.geometry import Grid, patch_grid
from ascendit.model.linear import QuantLinear, Tokens, dtype_of, linear
from ascendit.model.state import DenoiseState, KeyValue, Modulation, RopeTable, Shared, rope_table
from ascendit.ops.operators import Ops
from ascendit.schedule import Precision, StepSchedule


class Norm(nn.Module):
    """Weight, and bias where there is one; the arithmetic is the operators'."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None


class Attention(nn.Module):
    """Parameters of one attention; `added_kv_proj_dim` adds keys and values for image tokens."""

    def __init__(self, config: WanConfig, cross: bool) -> None:
        super().__init__()
        d = config.dim
        self.to_q, self.to_k, self.to_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.norm_q, self.norm_k = Norm(d, bias=False), Norm(d, bias=False)
        if cross and config.added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(config.added_kv_proj_dim, d)
            self.add_v_proj = nn.Linear(config.added_kv_proj_dim, d)
            self.norm_added_k = Norm(d, bias=False)


class FeedForward(nn.Module):
    """Two linears at `net.0.proj` and `net.2`, as Diffusers names them; the activation is the caller's."""

    def __init__(self, dim: int, inner: int, out: int) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(dim, inner)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, out)])


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.attn1 = Attention(config, cross=False)
        self.attn2 = Attention(config, cross=True)
        self.norm2 = Norm(config.dim, bias=True) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.dim))


class TwoLinears(nn.Module):
    """`linear_1`, `linear_2`: the time and text embedders."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, out), nn.Linear(out, out)


class ImageEmbedder(nn.Module):
    """CLIP tokens to width D: norm1, feed-forward, norm2 (Wan2.1 I2V)."""

    def __init__(self, config: WanConfig, image_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(image_dim, bias=True), Norm(config.dim, bias=True)
        self.ff = FeedForward(image_dim, image_dim, config.dim)
        if config.pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_seq_len, image_dim))


class ConditionEmbedder(nn.Module):
    """Timestep, text and image to the width of the model."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.time_embedder = TwoLinears(config.freq_dim, config.dim)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLinears(config.text_dim, config.dim)
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config, config.image_dim)


class WanTransformer(nn.Module):
    """Predicts the velocity of the latents. Build it on the meta device; `model/loader.py` fills it."""

    # Kept in float32 whatever the run's dtype, as Diffusers' `_keep_in_fp32_modules`.
    KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks: Any = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tokens."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.patch_embedding.weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> WanTransformer:
        """A cast that a layer on codes refuses changes nothing at all."""
        for module in self.modules():
            if isinstance(module, QuantLinear):
                module.check_apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def grid_of(self, x: Tensor) -> Grid:
        """Patches along frames, height and width of latents [B, C, F, H, W]."""
        return patch_grid(x.shape[2:], self.config.patch_size)

    # ---- once for each prompt -------------------------------------------------------------------

    def share(self, grid: Grid, timesteps: Collection[float] = ()) -> Shared:
        """What the CFG branches have in common: RoPE tables, and the modulation of the current step.

        `timesteps`: those that will come, so that no step has to wait for a copy to the device.
        """
        table = rope_table(grid, self.config.attention_head_dim, device=self.device)
        rope = RopeTable(*self.ops.prepare("rope", table.cos, table.sin, dtype=self.dtype))
        rows = self.sinusoids(tuple(timesteps)).split(1) if timesteps else ()
        return Shared(grid, rope, dict(zip(timesteps, rows, strict=True)))

    def prepare(
        self,
        where: Grid | Shared,
        text: Tensor,
        image: Tensor | None = None,
        *,
        timesteps: Collection[float] = (),
        policy: StepSchedule | None = None,
        step: int = 0,
    ) -> DenoiseState:
        """Everything of one CFG branch that no step changes; text keys and values in the precision of `step`.

        `where`: a grid, or what `share` made for it and another branch uses too. text [B, L, text_dim];
        image [B, T, image_dim] CLIP tokens or None. `timesteps`: as for `share`.
        """
        shared = where if isinstance(where, Shared) else self.share(where, timesteps)
        state = DenoiseState(shared, [], policy=policy or StepSchedule(), step=step)
        now = state.precision
        tokens = Tokens(self._embed_text(text.to(self.device, self.dtype)))
        for b in self.blocks:
            state.text.append(self._keys(tokens, b.attn2.to_k, b.attn2.to_v, b.attn2.norm_k, now))
        if image is not None:
            tokens = Tokens(self._embed_image(image.to(self.device, self.dtype)))
            state.image = [
                self._keys(tokens, a.add_k_proj, a.add_v_proj, a.norm_added_k, now)
                for a in (b.attn2 for b in self.blocks)
            ]
        return state

    def _keys(self, tokens: Tokens, to_k: nn.Module, to_v: nn.Module, norm: Norm, now: Precision) -> KeyValue:
        k = self.ops.rms_norm(self._linear(to_k, tokens, now), norm.weight, self.config.eps)
        v = self._linear(to_v, tokens, now)  # a part of a joint product: copied once, not on every step
        return self._heads(k), self._heads(v.contiguous())

    def _embed_text(self, text: Tensor) -> Tensor:
        e = self.condition_embedder.text_embedder
        return self._linear(e.linear_2, self.ops.gelu_tanh(self._linear(e.linear_1, text)))

    def _embed_image(self, x: Tensor) -> Tensor:
        e = self.condition_embedder.image_embedder
        if self.config.pos_embed_seq_len is not None:
            x = x.view(-1, 2 * x.shape[1], x.shape[2]) + e.pos_embed
        x = self.ops.layer_norm(x, e.norm1.weight, e.norm1.bias, 1e-5)
        x = self.ops.gelu(self._linear(e.ff.net[0].proj, x))
        return self.ops.layer_norm(self._linear(e.ff.net[2], x), e.norm2.weight, e.norm2.bias, 1e-5)

    # ---- once for each step ---------------------------------------------------------------------

    def sinusoids(self, timesteps: tuple[float, ...]) -> Tensor:
        """What the time embedder sees of R timesteps, [R, freq_dim] float32; drawn up on the CPU."""
        half = self.config.freq_dim // 2
        power = torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half)
        angle = torch.tensor(timesteps, dtype=torch.float32)[:, None] * power.exp()[None, :]
        return torch.cat([angle.cos(), angle.sin()], -1).to(self.device)

    def modulation(
        self,
        timesteps: tuple[float, ...],
        spans: tuple[int, ...],
        known: Mapping[float, Tensor] | None = None,
    ) -> Modulation:
        """Shift, scale and gate of every block for R distinct timesteps: R rows, not one for each token."""
        e, ops = self.condition_embedder, self.ops
        known = known or {}
        rows = [known[t] for t in timesteps if t in known]
        missing = len(rows) < len(timesteps)
        sinusoid = self.sinusoids(timesteps) if missing else rows[0] if len(rows) == 1 else torch.cat(rows)
        first, second = e.time_embedder.linear_1, e.time_embedder.linear_2
        hidden = nn.functional.silu(self._linear(first, sinusoid.to(dtype_of(first))))
        temb = self._linear(second, hidden).to(self.dtype)  # [R, D]
        step = self._linear(e.time_proj, nn.functional.silu(temb)).float().view(len(timesteps), 6, -1)
        tables = torch.cat([b.scale_shift_table for b in self.blocks]).float()  # [num_layers, 6, D]
        blocks = (tables[:, :, None, :] + step.transpose(0, 1)).unflatten(1, (2, 3))  # shift, scale, gate
        out = self.scale_shift_table[0].float()[:, None, :] + temb.float()
        norms, out = ops.prepare("adaln", blocks[:, :, :2], out, dtype=self.dtype)
        (gates,) = ops.prepare("gated_residual", blocks[:, :, 2], dtype=self.dtype)
        return Modulation(timesteps, spans, norms, gates, out)

    def forward(
        self,
        x: Tensor,
        timestep: float | tuple[float, ...],
        state: DenoiseState,
        spans: tuple[int, ...] | None = None,
    ) -> Tensor:
        """One denoising forward: latents [B, in_channels, F, H, W] -> velocity [B, out_channels, F, H, W].

        `timestep`: one number, or R numbers with `spans`, the count of neighbouring tokens that each is
        for (TI2V: the tokens of the given first frame are at 0).
        """
        timesteps = timestep if isinstance(timestep, tuple) else (float(timestep),)
        spans = spans or (state.num_tokens,)
        assert len(spans) == len(timesteps) and sum(spans) == state.num_tokens, (spans, timesteps)
        mod = state.shared.modulation_for(
            timesteps, spans, lambda: self.modulation(timesteps, spans, state.shared.sinusoids)
        )
        tokens = self._patchify(x)
        for i, block in enumerate(self.blocks):
            tokens = self.run_block(i, block, tokens, mod, state)
        shift, scale = mod.out
        tokens = self.ops.adaln(tokens, scale, shift, mod.spans, self.config.eps)
        return self._unpatchify(self._linear(self.proj_out, tokens), state.shared.grid)

    def run_block(self, i: int, block: Any, x: Tensor, mod: Modulation, state: DenoiseState) -> Tensor:
        """Block `i` on tokens [B, S, D]."""
        ops, eps, spans, now = self.ops, self.config.eps, mod.spans, state.precision
        (shift, scale), (c_shift, c_scale) = mod.norms[i]  # each [R, D]
        gate, c_gate = mod.gates[i]
        y = ops.adaln(x, scale, shift, spans, eps)
        x = ops.gated_residual(x, self._self_attention(block.attn1, y, state), gate, spans)
        y = x if block.norm2 is None else ops.layer_norm(x, block.norm2.weight, block.norm2.bias, eps)
        x = x + self._cross_attention(block.attn2, y, state, i)
        y = ops.adaln(x, c_scale, c_shift, spans, eps)
        y = ops.gelu_tanh(self._linear(block.ffn.net[0].proj, y, now))
        return ops.gated_residual(x, self._linear(block.ffn.net[2], y, now), c_gate, spans)

    def _self_attention(self, attn: Any, x: Tensor, state: DenoiseState) -> Tensor:
        ops, rope, now, eps = self.ops, state.shared.rope, state.precision, self.config.eps
        tokens = Tokens(x)  # quantized once for the three of them
        q = self._heads(ops.rms_norm(self._linear(attn.to_q, tokens, now), attn.norm_q.weight, eps))
        k = self._heads(ops.rms_norm(self._linear(attn.to_k, tokens, now), attn.norm_k.weight, eps))
        v = self._heads(self._linear(attn.to_v, tokens, now))
        q, k = ops.rope(q, rope.cos, rope.sin), ops.rope(k, rope.cos, rope.sin)
        return self._linear(attn.to_out[0], ops.attention(q, k, v).flatten(2), now)

    def _cross_attention(self, attn: Any, x: Tensor, state: DenoiseState, i: int) -> Tensor:
        now = state.precision
        q = self._heads(
            self.ops.rms_norm(self._linear(attn.to_q, x, now), attn.norm_q.weight, self.config.eps)
        )
        y = self.ops.attention(q, *state.text[i])
        if state.image is not None:
            y = y + self.ops.attention(q, *state.image[i])
        return self._linear(attn.to_out[0], y.flatten(2), now)

    # ---- shapes ---------------------------------------------------------------------------------

    def _linear(self, m: Any, x: Tensor | Tokens, now: Precision = "stored") -> Tensor:
        return linear(self.ops, m, x, now)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.config.num_attention_heads, -1)  # [B, S, H, d]

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, S, D]. A convolution whose stride is its kernel is one matmul."""
        (pf, ph, pw), (f, h, w), b = self.config.patch_size, self.grid_of(x), x.shape[0]
        x = x.to(self.dtype).view(b, -1, f, pf, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        m = self.patch_embedding
        return self.ops.linear(x.reshape(b, f * h * w, -1), m.weight.flatten(1), m.bias)

    def _unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, S, pf * ph * pw * C] -> [B, C, F, H, W]."""
        (pf, ph, pw), (f, h, w), b = self.config.patch_size, grid, x.shape[0]
        x = x.view(b, f, h, w, pf, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(b, -1, f * pf, h * ph, w * pw)
