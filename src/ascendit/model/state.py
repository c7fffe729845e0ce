"""State of a denoising run, and the hooks that caches, attention policies and parallel layouts override.

There is one `DenoiseState` per request, expert and CFG branch. It holds the step-invariant tensors (RoPE
tables, text keys and values) and the modulation of the current step; modules hold no state. The model calls
`run_model`, `run_blocks`, `run_attention`, `attend`, `linear`, `norm` and `gather` of the state. Here they
are plain calls; a subclass passed to `WanTransformer.prepare(make=)` can replace them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ascendit.attention.plan import AttentionPlan
from ascendit.device.attention_kernels import Kind
from ascendit.geometry import Grid, num_tokens
from ascendit.kernels.reference import Spans
from ascendit.model.linear import LinearInput, linear, precision_of
from ascendit.ops.operators import Ops
from ascendit.schedule import Precision, Step

log = logging.getLogger("ascendit")

KeyValue = tuple[Tensor, Tensor]
"""Keys and values [B, L, H, d]."""
Timesteps = tuple[float, ...]
"""Distinct timesteps in the order of the sequence; `Spans` has the number of tokens of each."""


@dataclass(frozen=True)
class RopeTable:
    """Rotation of every token of a grid: cos and sin [S, d/2] float32, or the layout of `Ops.prepare`."""

    cos: Tensor
    sin: Tensor
    key: tuple[Any, ...] = ()
    """Everything that the values depend on; experts with equal keys share a table."""


@dataclass(frozen=True)
class Modulation:
    """Rows of shift, scale and gate, one for each distinct timestep in the sequence.

    `norms`: shift and scale of a block's two norms, [num_layers, 2, 2, R, D]. `gates`: its two gates,
    [num_layers, 2, R, D]. `out`: shift and scale of the last norm, [2, R, D]. float32, or the dtype of
    `Ops.prepare`.
    """

    spans: Spans
    norms: Tensor
    gates: Tensor
    out: Tensor


@dataclass(frozen=True)
class Shared:
    """Tensors that the two CFG branches of one expert share.

    Everything that depends on the position in the sequence is sliced here: RoPE, spans and latent patches.
    With sequence parallelism a rank computes `part` of the tokens, and `DenoiseState.gather` joins the parts;
    only attention mixes tokens.
    """

    grid: Grid
    rope: RopeTable
    """The rows of `part`."""
    part: range
    """The tokens of the sequence that are computed here."""
    sinusoids: dict[float, Tensor] = field(default_factory=dict)
    """Timestep -> input of the time embedder, [1, freq_dim] float32, for timesteps announced to `share`."""
    modulation: dict[tuple[Timesteps, Spans], Modulation] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of `part`: a view of the sequence [B, S, ..] in its dtype."""
        return x[:, self.part.start : self.part.stop]

    def rows(self, timesteps: Timesteps, spans: Spans | None) -> tuple[Timesteps, Spans]:
        """The timesteps that occur in `part`, and the spans in `part`.

        `spans`: those of the whole sequence; None means a single span.
        """
        length = num_tokens(self.grid)
        spans = spans or (length,)
        assert len(spans) == len(timesteps) and sum(spans) == length, (spans, timesteps)
        edges = [min(max(edge, self.part.start), self.part.stop) for edge in accumulate(spans, initial=0)]
        rows = [(t, b - a) for t, (a, b) in zip(timesteps, pairwise(edges), strict=True) if b > a]
        return tuple(t for t, _ in rows), tuple(span for _, span in rows)

    def modulation_for(
        self, timesteps: Timesteps, spans: Spans, make: Callable[[], Modulation]
    ) -> Modulation:
        """The modulation of this step, computed by the first branch and cached until the next step."""
        key = (timesteps, spans)
        if key not in self.modulation:
            self.modulation.clear()
            self.modulation[key] = make()
        return self.modulation[key]


@dataclass(eq=False)
class DenoiseState:
    """The state of one request, one expert and one CFG branch."""

    ops: Ops
    shared: Shared
    steps: Sequence[Step] = (Step(),)
    """The schedule of the run, one entry per step."""
    step: int = 0
    expert: str = "transformer"
    branch: int = 0
    """0: conditional (the prompt); 1: unconditional (the negative prompt)."""
    plan: AttentionPlan | None = None
    """The attention of each step, kind and block; `WanTransformer.prepare` sets it if it is None."""
    agree: Callable[[float], float] = float
    """This rank's value of a number -> the value that all ranks use. Called once per step, see `predict`."""
    reduce_mean: Callable[[Tensor], Tensor] | None = None
    """Mean over this rank's channels -> mean over all channels; set if the heads are divided among ranks."""
    context: dict[Kind, Tensor] = field(default_factory=dict)
    """`text`, and `image` for Wan2.1 I2V: hidden states [B, L, D], the input of the K and V projections."""
    keys: dict[Kind, list[KeyValue]] = field(default_factory=dict)
    """Keys and values of each context, one pair per block."""
    keys_precision: Precision | None = None
    """The precision of the step that computed `keys`."""

    @property
    def current(self) -> Step:
        """The schedule entry of the current step."""
        return self.steps[self.step]

    def keys_change(self, layers: Iterable[Any]) -> bool:
        """Whether `layers` compute in another precision in this step than when `keys` were computed."""
        before, precision = self.keys_precision, self.current.precision
        self.keys_precision = precision
        if before is None:
            return True
        changed = any(precision_of(m, before) != precision_of(m, precision) for m in layers)
        if changed:
            log.info("%s, step %d: recomputing text keys and values, %s", self.expert, self.step, precision)
        return changed

    def run_model(self, x: Tensor, t: Timesteps, forward: Callable[[Tensor, Timesteps], Tensor]) -> Tensor:
        """Latents [B, in_channels, F, H, W] in any float dtype -> velocity [B, out_channels, F, H, W]."""
        return forward(x, t)

    def run_blocks(
        self, blocks: Iterable[Any], hidden: Tensor, modulation: Modulation, run_block: Callable[..., Tensor]
    ) -> Tensor:
        """Hidden states [B, S, D], bfloat16 or float32, before the first block -> after the last block."""
        for i, block in enumerate(blocks):
            hidden = run_block(i, block, hidden, modulation)
        return hidden

    def run_attention(
        self, kind: Kind, block: int, hidden: Tensor, forward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """One attention with its Q, K, V and output layers: [B, S, D] -> same shape and dtype."""
        return forward(hidden)

    def attend(self, kind: Kind, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`reference.attention` by the function of `plan`: q [B, S, H, d] -> same shape and dtype."""
        assert self.plan is not None, "a state of WanTransformer.prepare has a plan"
        return self.plan.call(self.step, kind, block)(q, k, v)

    def linear(self, layer: Any, x: Tensor | LinearInput) -> Tensor:
        """Apply a linear layer in the precision of the current step: x [.., K] -> [.., N], x's dtype."""
        return linear(self.ops, layer, x, self.current.precision)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of [B, S, D] over all heads, in x's dtype; in two phases if ranks divide the heads."""
        if self.reduce_mean is None:
            return self.ops.rms_norm(x, weight, eps)
        return self.ops.rms_scale(x, self.reduce_mean(self.ops.mean_square(x)), weight, eps)

    def gather(self, x: Tensor) -> Tensor:
        """Gather velocity patches: [B, S, ..] of this rank's part -> [B, S, ..] of the whole sequence, same
        dtype.
        """
        return x


def rope_table(
    grid: Grid, head_dim: int, theta: float = 10000.0, device: torch.device | str = "cpu"
) -> RopeTable:
    """Angles of the 3-D rotary embedding of Diffusers' WanRotaryPosEmbed.

    Row and column get 2 * (head_dim // 6) channels each, the frame axis the remaining ones. Computed in
    float64 on the CPU (NPUs lack it) and stored in float32.
    """
    side = 2 * (head_dim // 6)
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))  # [S, 3]
    angles = []
    for axis, channels in enumerate((head_dim - 2 * side, side, side)):
        power = torch.arange(0, channels, 2, dtype=torch.float64)[: channels // 2] / channels
        angles.append(positions[:, axis, None] * (1.0 / theta**power))
    table = torch.cat(angles, dim=-1)
    return RopeTable(table.cos().float().to(device), table.sin().float().to(device))
