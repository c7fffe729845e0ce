"""The Wan transformer, with Diffusers' parameter names and a forward built on `Ops`.

The module is independent of device, precision, cache and parallel layout. `Ops` is bound to a device; the
`DenoiseState` runs the linears of the blocks, the norms over heads and the attention as the step requires.
Supports T2V, I2V with concatenated channels, TI2V with a separate timestep for the first frame, and Wan2.1
I2V's image cross-attention.

    state = model.prepare(grid, text)                 # once per prompt: RoPE, text keys and values
    for t in timesteps:
        v = model(x, t, state)                        # 8 of 10 linears per block: text K/V are cached

Shapes: B videos, S video tokens, L text tokens, D hidden size, H heads, d head size, R distinct timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ascendit.arguments import attribute_error
from ascendit.attention.choice import AttentionPolicy, calls_of
from ascendit.attention.plan import AttentionPlan, make_plan
from ascendit.device.attention_kernels import Kind
from ascendit.family import WanConfig
from ascendit.geometry import Grid, num_tokens, patch_grid
from ascendit.kernels.reference import Spans
from ascendit.model.linear import LinearInput, QuantLinear, linear
from ascendit.model.state import (
    DenoiseState,
    KeyValue,
    Modulation,
    RopeTable,
    Shared,
    Timesteps,
    rope_table,
)
from ascendit.names import FLOAT32_PARTS
from ascendit.ops.operators import Ops
from ascendit.schedule import Step


class Attention(nn.Module):
    """One attention. `added_kv_proj_dim` adds keys and values for image tokens.

    `q_rot` and `k_rot` [d, d]: the rotations of a checkpoint, else None; used if the attention is quantized.
    """

    q_rot: nn.Parameter | None
    k_rot: nn.Parameter | None

    def __init__(self, config: WanConfig, cross: bool) -> None:
        super().__init__()
        d = config.dim
        self.head_dim, self.eps = config.attention_head_dim, config.eps
        self.to_q, self.to_k, self.to_v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.to_out = nn.ModuleList([nn.Linear(d, d)])
        self.norm_q, self.norm_k = nn.RMSNorm(d), nn.RMSNorm(d)
        self.scheme: str | None = None
        """How the checkpoint or recipe quantizes this attention, a key of `ATTENTION_FORMATS`."""
        self.register_parameter("q_rot", None)
        self.register_parameter("k_rot", None)
        if cross and config.added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(config.added_kv_proj_dim, d)
            self.add_v_proj = nn.Linear(config.added_kv_proj_dim, d)
            self.norm_added_k = nn.RMSNorm(d)

    def key_layers(self, kind: str) -> tuple[nn.Module, nn.Module, nn.RMSNorm]:
        """The K projection, V projection and K norm of a context, `text` or `image`."""
        if kind == "image":
            return self.add_k_proj, self.add_v_proj, self.norm_added_k
        return self.to_k, self.to_v, self.norm_k

    def keys(self, kind: str, x: LinearInput, state: DenoiseState) -> KeyValue:
        """Keys and values of a context [B, L, D]."""
        to_k, to_v, norm = self.key_layers(kind)
        v = state.linear(to_v, x)  # a slice of a fused output: made contiguous once, not in every step
        return self.normed(to_k, norm, x, state), self.heads(v.contiguous())

    def attend_self(self, i: int, state: DenoiseState, x: Tensor) -> Tensor:
        """Self-attention of block `i`: [B, S, D] -> [B, S, D], same dtype."""
        ops, rope, shared = state.ops, state.shared.rope, LinearInput(x)  # quantized once for Q, K and V
        q = self.normed(self.to_q, self.norm_q, shared, state)
        k = self.normed(self.to_k, self.norm_k, shared, state)
        v = self.heads(state.linear(self.to_v, shared))
        q, k = ops.rope(q, rope.cos, rope.sin), ops.rope(k, rope.cos, rope.sin)
        return state.linear(self.to_out[0], state.attend("self", i, q, k, v).flatten(2))

    def attend_context(self, i: int, state: DenoiseState, x: Tensor) -> Tensor:
        """Cross-attention of block `i` to text and image: [B, S, D] -> [B, S, D], same dtype."""
        q = self.normed(self.to_q, self.norm_q, x, state)
        outputs = [state.attend(kind, i, q, *keys[i]) for kind, keys in state.keys.items()]
        return state.linear(self.to_out[0], sum(outputs[1:], outputs[0]).flatten(2))

    def normed(
        self, layer: nn.Module, norm: nn.RMSNorm, x: Tensor | LinearInput, state: DenoiseState
    ) -> Tensor:
        """Q or K: x [B, S, D] -> [B, S, H, d], x's dtype."""
        return self.heads(state.norm(state.linear(layer, x), norm.weight, self.eps))

    def heads(self, x: Tensor) -> Tensor:
        """Split the heads: [B, S, D] -> [B, S, H, d], same dtype."""
        return x.view(*x.shape[:2], -1, self.head_dim)


class FeedForward(nn.Module):
    """Two linears, named `net.0.proj` and `net.2` as in Diffusers; the caller applies the GELU."""

    def __init__(self, dim: int, inner: int, out: int) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(dim, inner)})
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, out)])


class Block(nn.Module):
    """Transformer block: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = Attention(config, cross=False)
        self.attn2 = Attention(config, cross=True)
        self.norm2 = nn.LayerNorm(config.dim) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(self, i: int, x: Tensor, mod: Modulation, state: DenoiseState) -> Tensor:
        """Hidden states [B, S, D], bfloat16 or float32, before block `i` -> after it."""
        ops, eps, spans = state.ops, self.eps, mod.spans
        (shift, scale), (c_shift, c_scale) = mod.norms[i]  # each [R, D]
        gate, c_gate = mod.gates[i]
        y = ops.adaln(x, scale, shift, spans, eps)
        y = state.run_attention("self", i, y, partial(self.attn1.attend_self, i, state))
        x = ops.gated_residual(x, y, gate, spans)
        y = x if self.norm2 is None else ops.layer_norm(x, self.norm2.weight, self.norm2.bias, eps)
        x = x + state.run_attention("text", i, y, partial(self.attn2.attend_context, i, state))
        y = ops.adaln(x, c_scale, c_shift, spans, eps)
        y = ops.gelu_tanh(state.linear(self.ffn.net[0].proj, y))
        return ops.gated_residual(x, state.linear(self.ffn.net[2], y), c_gate, spans)


class ImageEmbedder(nn.Module):
    """CLIP tokens to hidden size D: norm1, feed-forward, norm2 (Wan2.1 I2V)."""

    def __init__(self, config: WanConfig, image_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(image_dim), nn.LayerNorm(config.dim)
        self.ff = FeedForward(image_dim, image_dim, config.dim)
        if config.pos_embed_seq_len is not None:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_seq_len, image_dim))


class ConditionEmbedder(nn.Module):
    """Embeds timestep, text and image in the hidden size of the model."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        d = config.dim
        self.time_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(config.freq_dim, d), "linear_2": nn.Linear(d, d)}
        )
        self.time_proj = nn.Linear(d, 6 * d)
        self.text_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(config.text_dim, d), "linear_2": nn.Linear(d, d)}
        )
        if config.image_dim is not None:
            self.image_embedder = ImageEmbedder(config, config.image_dim)


class WanTransformer(nn.Module):
    """Predicts the velocity of the latents. Built on the meta device and filled by `model/loader.py`."""

    KEEP_FP32 = FLOAT32_PARTS

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks: Any = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:  # as transformer.set_attention_backend of Diffusers
                own = {*dir(self)} - {*dir(nn.Module)}
                raise attribute_error("'WanTransformer' object", name, own) from None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.patch_embedding.weight.device

    def _apply(self, fn: Any, recurse: bool = True) -> WanTransformer:
        """Check every quantized layer first, so that a refused cast changes nothing."""
        for module in self.modules():
            if isinstance(module, QuantLinear):
                module.check_apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def grid_of(self, x: Tensor) -> Grid:
        """Number of patches along frames, height and width of latents [B, C, F, H, W] of any dtype."""
        return patch_grid(x.shape[2:], self.config.patch_size)

    # ---- once for each prompt -------------------------------------------------------------------

    def share(
        self, grid: Grid, timesteps: Timesteps = (), *, part: range | None = None, other: Shared | None = None
    ) -> Shared:
        """Tensors shared by the CFG branches: RoPE tables and, later, the modulation of the current step.

        `timesteps`: all timesteps of the run, embedded here so that no step waits for a copy. `part`: the
        tokens to compute. `other`: the result for the other expert, whose RoPE table is reused if equal.
        """
        part = part or range(num_tokens(grid))
        key = (grid, part, self.config.attention_head_dim, self.dtype, self.device)
        if other is not None and other.rope.key == key:
            rope = other.rope
        else:
            table = rope_table(grid, self.config.attention_head_dim, device=self.device)
            pair = (t[part.start : part.stop] for t in (table.cos, table.sin))
            cos, sin = self.ops.prepare("rope", *pair, dtype=self.dtype)
            rope = RopeTable(cos, sin, key)
        rows = self.sinusoids(timesteps).split(1) if timesteps else ()
        return Shared(grid, rope, part, dict(zip(timesteps, rows, strict=True)))

    def prepare(
        self,
        grid: Grid | Shared,
        text: Tensor,
        image: Tensor | None = None,
        *,
        timesteps: Timesteps = (),
        make: Callable[..., DenoiseState] = DenoiseState,
        **run: Any,
    ) -> DenoiseState:
        """The state of one CFG branch, with text keys and values for its first step.

        `grid`: a grid, or the result of `share` that another branch uses too. text [B, L, text_dim] and image
        [B, T, image_dim] (CLIP tokens, or None) in any float dtype. `timesteps`: see `share`. `make`: the
        class of the state; `run`: its `steps`, `step`, `expert`, `branch` and `plan`. Without a plan, the
        attention is as the steps and the checkpoint say.
        """
        shared = grid if isinstance(grid, Shared) else self.share(grid, timesteps)
        state = make(self.ops, shared, **run)
        state.context["text"] = self._embed_text(text.to(self.device, self.dtype))
        if image is not None:
            state.context["image"] = self._embed_image(image.to(self.device, self.dtype))
        if state.plan is None:
            lengths = {kind: x.shape[1] for kind, x in state.context.items()}
            steps = dict(enumerate(state.steps))
            state.plan = self.plan_attention(len(shared.part), lengths, steps, expert=state.expert)
        self._make_keys(state)
        return state

    def plan_attention(
        self,
        tokens: int,
        contexts: Mapping[Kind, int],
        steps: Mapping[int, Step],
        *,
        policy: AttentionPolicy | None = None,
        expert: str = "transformer",
        key_length: int | None = None,
    ) -> AttentionPlan:
        """The attention of `steps`, for both CFG branches.

        `tokens`: those of the video; after the first `key_length` they are padding. `contexts`: kind ->
        tokens of text and image. `policy`: the requests, None for the default kernels. Raises the errors of
        `make_plan`.
        """
        calls = calls_of(self.config, str(self.dtype)[6:], tokens, contexts, key_length)
        layers = {kind: [b.attn1 if kind == "self" else b.attn2 for b in self.blocks] for kind in calls}
        return make_plan(self.ops, policy, expert, calls, layers, steps)

    def image_keys(self, image: Tensor) -> int:
        """Number of keys of CLIP tokens [B, T, image_dim], any dtype; [2B, ..] with a last image."""
        return image.shape[1] * (1 if self.config.pos_embed_seq_len is None else 2)

    def _make_keys(self, state: DenoiseState) -> None:
        """Compute keys and values of text and image in every block, unless those in `state` are valid."""
        layers = {kind: [b.attn2.key_layers(kind) for b in self.blocks] for kind in state.context}
        if not state.keys_change(m for blocks in layers.values() for block in blocks for m in block):
            return
        state.keys.clear()
        for kind in layers:
            x = LinearInput(state.context[kind])  # quantized once for all blocks
            state.keys[kind] = [b.attn2.keys(kind, x, state) for b in self.blocks]

    def _embed_text(self, text: Tensor) -> Tensor:
        e = self.condition_embedder.text_embedder
        return linear(self.ops, e.linear_2, self.ops.gelu_tanh(linear(self.ops, e.linear_1, text)))

    def _embed_image(self, x: Tensor) -> Tensor:
        e = self.condition_embedder.image_embedder
        if self.config.pos_embed_seq_len is not None:
            x = x.view(-1, 2 * x.shape[1], x.shape[2]) + e.pos_embed
        x = self.ops.layer_norm(x, e.norm1.weight, e.norm1.bias, 1e-5)
        x = self.ops.gelu(linear(self.ops, e.ff.net[0].proj, x))
        return self.ops.layer_norm(linear(self.ops, e.ff.net[2], x), e.norm2.weight, e.norm2.bias, 1e-5)

    # ---- once for each step ---------------------------------------------------------------------

    def sinusoids(self, timesteps: Timesteps) -> Tensor:
        """Sinusoidal embedding of R timesteps, the input of the time embedder: [R, freq_dim] float32."""
        half = self.config.freq_dim // 2
        power = torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half)
        angle = torch.tensor(timesteps, dtype=torch.float32)[:, None] * power.exp()[None, :]
        return torch.cat([angle.cos(), angle.sin()], -1).to(self.device)

    def modulation(
        self, timesteps: Timesteps, spans: Spans, sinusoids: Mapping[float, Tensor] | None = None
    ) -> Modulation:
        """Modulation rows of R timesteps. `sinusoids`: timestep -> float32 [1, freq_dim], if precomputed."""
        e, ops, ready = self.condition_embedder, self.ops, sinusoids or {}
        rows = [ready[t] if t in ready else self.sinusoids((t,)) for t in timesteps]
        sinusoid = rows[0] if len(rows) == 1 else torch.cat(rows)
        first: Any = e.time_embedder.linear_1
        dtype = first.compute_dtype if isinstance(first, QuantLinear) else first.weight.dtype
        hidden = nn.functional.silu(linear(self.ops, first, sinusoid.to(dtype)))
        temb = linear(self.ops, e.time_embedder.linear_2, hidden).to(self.dtype)  # [R, D]
        step = linear(self.ops, e.time_proj, nn.functional.silu(temb)).float().view(len(timesteps), 6, -1)
        tables = torch.cat([b.scale_shift_table for b in self.blocks]).float()  # [num_layers, 6, D]
        blocks = (tables[:, :, None, :] + step.transpose(0, 1)).unflatten(1, (2, 3))  # shift, scale, gate
        out = self.scale_shift_table[0].float()[:, None, :] + temb.float()
        norms, out = ops.prepare("adaln", blocks[:, :, :2], out, dtype=self.dtype)
        (gates,) = ops.prepare("gated_residual", blocks[:, :, 2], dtype=self.dtype)
        return Modulation(spans, norms, gates, out)

    def forward(
        self, x: Tensor, timestep: float | Timesteps, state: DenoiseState, spans: Spans | None = None
    ) -> Tensor:
        """One forward pass: latents [B, in_channels, F, H, W] -> velocity [B, out_channels, F, H, W].

        Latents in any float dtype; the velocity has the dtype of the model. `timestep`: one number, or R
        numbers with `spans`, the number of consecutive tokens of each (TI2V: the first frame has timestep 0).
        """
        shared = state.shared
        timesteps = timestep if isinstance(timestep, tuple) else (float(timestep),)

        def velocity(x: Tensor, t: Timesteps) -> Tensor:
            if state.keys_precision != state.current.precision:
                self._make_keys(state)
            rows, lengths = shared.rows(t, spans)
            make = partial(self.modulation, rows, lengths, shared.sinusoids)
            mod = shared.modulation_for(rows, lengths, make)
            hidden = self._patchify(x, shared)
            hidden = state.run_blocks(
                self.blocks, hidden, mod, lambda i, block, x, mod: block(i, x, mod, state)
            )
            shift, scale = mod.out
            hidden = self.ops.adaln(hidden, scale, shift, lengths, self.config.eps)
            return self._unpatchify(state.gather(linear(self.ops, self.proj_out, hidden)), shared.grid)

        return state.run_model(x, timesteps, velocity)

    # ---- shapes ---------------------------------------------------------------------------------

    def _patchify(self, x: Tensor, shared: Shared) -> Tensor:
        """[B, C, F, H, W] -> [B, S, D] of this rank's part. Convolution with stride = kernel, as a matmul."""
        (pf, ph, pw), (f, h, w), b = self.config.patch_size, self.grid_of(x), x.shape[0]
        x = x.to(self.dtype).view(b, -1, f, pf, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        m = self.patch_embedding
        return self.ops.linear(shared.tokens(x.reshape(b, f * h * w, -1)), m.weight.flatten(1), m.bias)

    def _unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, S, pf * ph * pw * C] -> [B, C, F, H, W]."""
        (pf, ph, pw), (f, h, w), b = self.config.patch_size, grid, x.shape[0]
        x = x.view(b, f, h, w, pf, ph, pw, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(b, -1, f * pf, h * ph, w * pw)
