"""What a denoising run remembers, outside of the modules, and the seams at which runs differ.

One `DenoiseState` per request, expert and CFG branch. It holds what does not change from step to step (RoPE
tables, text keys and values) and the modulation of the current step; modules keep none of it. The model asks
it for whatever a step, a cache, an attention policy or a parallel layout may change: `run_model`,
`run_blocks`, `run_attention`, `attend`, `linear`, `norm`, `gather`. Here these are plain calls, in a subclass
that is given to `WanTransformer.prepare(make=)` something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ascendit.geometry import Grid, num_tokens
from ascendit.kernels.reference import Spans
from ascendit.model.linear import LinearInput, linear, precision_of
from ascendit.ops.operators import Ops
from ascendit.schedule import Precision, Step

log = logging.getLogger("ascendit")

AttentionKind = Literal["self", "text", "image"]
KeyValue = tuple[Tensor, Tensor]
"""Keys and values [B, L, H, d]."""
Timesteps = tuple[float, ...]
"""Distinct ones, in the order of the sequence; `Spans` has the number of tokens of each."""


@dataclass(frozen=True)
class RopeTable:
    """Angles of every token of a grid: cos and sin [S, d/2] float32, or as `Ops.prepare` made of them."""

    cos: Tensor
    sin: Tensor
    made_for: tuple[Any, ...] = ()
    """What the numbers depend on: models that agree in it share a table."""


@dataclass(frozen=True)
class Modulation:
    """Rows of shift, scale and gate, one for each distinct timestep in the sequence.

    `norms`: shift and scale of a block's two norms, [num_layers, 2, 2, R, D]. `gates`: its two gates,
    [num_layers, 2, R, D]. `out`: shift and scale of the last norm, [2, R, D]. float32, or as `Ops.prepare`
    made of them.
    """

    spans: Spans
    norms: Tensor
    gates: Tensor
    out: Tensor


@dataclass(frozen=True)
class Shared:
    """What the two CFG branches of one expert have in common; made once, used by both.

    All that belongs to a place in the sequence comes from here: RoPE, spans and the patches of latents. A
    part is cut out here alone and joined by `DenoiseState.gather`; all but attention works token by token.
    """

    grid: Grid
    rope: RopeTable
    """Of `part`."""
    part: range
    """The tokens of the sequence that are computed."""
    sinusoids: dict[float, Tensor] = field(default_factory=dict)
    """Timestep -> what the time embedder sees of it, [1, freq_dim]; of those that were known beforehand."""
    modulation: dict[tuple[Timesteps, Spans], Modulation] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> Tensor:
        """Those of the part, of the whole sequence [B, S, ..]; a view."""
        return x[:, self.part.start : self.part.stop]

    def rows(self, timesteps: Timesteps, spans: Spans | None) -> tuple[Timesteps, Spans]:
        """The timesteps that occur in the part, and their spans. `spans`: of the sequence, None: one."""
        whole = num_tokens(self.grid)
        spans = spans or (whole,)
        assert len(spans) == len(timesteps) and sum(spans) == whole, (spans, timesteps)
        edges = [min(max(edge, self.part.start), self.part.stop) for edge in accumulate(spans, initial=0)]
        kept = [(t, b - a) for t, (a, b) in zip(timesteps, pairwise(edges), strict=True) if b > a]
        return tuple(t for t, _ in kept), tuple(length for _, length in kept)

    def modulation_for(
        self, timesteps: Timesteps, spans: Spans, make: Callable[[], Modulation]
    ) -> Modulation:
        """The rows of this step; computed by the first branch that asks, then kept until the next step."""
        key = (timesteps, spans)
        if key not in self.modulation:
            self.modulation.clear()
            self.modulation[key] = make()
        return self.modulation[key]


@dataclass(eq=False)
class DenoiseState:
    """One request, one expert, one CFG branch."""

    ops: Ops
    shared: Shared
    steps: Sequence[Step] = (Step(),)
    """What the schedule says of each step of the run."""
    step: int = 0
    expert: str = "transformer"
    branch: int = 0
    """0: with the prompt; 1: without it."""
    agree: Callable[[float], float] = float
    """A number that this rank would act on -> the one that all ranks act on. Once a step; see `predict`."""
    reduce_mean: Callable[[Tensor], Tensor] | None = None
    """A mean over this rank's channels -> over all of them, where a rank has some of the heads."""
    context: dict[AttentionKind, Tensor] = field(default_factory=dict)
    """`text`, and `image` (Wan2.1 I2V): the hidden states [B, L, D] that keys and values are made of."""
    keys: dict[AttentionKind, list[KeyValue]] = field(default_factory=dict)
    """Keys and values of the same, one pair for each block."""
    keys_in: Precision | None = None
    """The precision of the step that they were made in."""

    @property
    def now(self) -> Step:
        """The current one of `steps`."""
        return self.steps[self.step]

    def keys_change(self, layers: Iterable[Any]) -> bool:
        """Whether these layers make other keys and values in this step than in the one they were made in."""
        before, self.keys_in = self.keys_in, self.now.precision
        if before is None:
            return True
        changed = any(precision_of(m, before) != precision_of(m, self.keys_in) for m in layers)
        if changed:
            log.info("%s, step %d: text keys and values again, %s", self.expert, self.step, self.keys_in)
        return changed

    def run_model(self, x: Tensor, t: Timesteps, forward: Callable[[Tensor, Timesteps], Tensor]) -> Tensor:
        """Latents [B, C, F, H, W] -> velocity."""
        return forward(x, t)

    def run_blocks(
        self, blocks: Iterable[Any], hidden: Tensor, modulation: Modulation, run_block: Callable[..., Tensor]
    ) -> Tensor:
        """Hidden states [B, S, D] before the first block -> after the last, by `run_block(i, block, ..)`."""
        for i, block in enumerate(blocks):
            hidden = run_block(i, block, hidden, modulation)
        return hidden

    def run_attention(
        self, kind: AttentionKind, block: int, hidden: Tensor, forward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """One attention with its Q, K, V and output layers, `self` or `text` (image included): [B, S, D]."""
        return forward(hidden)

    def attend(self, kind: AttentionKind, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, q [B, S, H, d], by the kernel of the current step."""
        name = self.now.attention
        kernel = self.ops.attention if name is None else self.ops.attention_kernels[name]
        return kernel(q, k, v)

    def linear(self, layer: Any, x: Tensor | LinearInput) -> Tensor:
        """A linear layer of a block, in the precision of the current step."""
        return linear(self.ops, layer, x, self.now.precision)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the channels of all heads, [B, S, D]; in two phases where a rank has some of them."""
        if self.reduce_mean is None:
            return self.ops.rms_norm(x, weight, eps)
        return self.ops.rms_scale(x, self.reduce_mean(self.ops.mean_square(x)), weight, eps)

    def gather(self, x: Tensor) -> Tensor:
        """Patches of the velocity, [B, S, ..] of this rank's part of the sequence -> of the whole."""
        return x


def rope_table(
    grid: Grid, head_dim: int, theta: float = 10000.0, device: torch.device | str = "cpu"
) -> RopeTable:
    """Angles of 3-D rotary embedding: a third of the head each for frame, row and column.

    Row and column get 2 * (head_dim // 6) channels each, the frame axis the rest, as Diffusers'
    WanRotaryPosEmbed. Drawn up in float64 on the CPU (no NPU has it), kept in float32.
    """
    side = 2 * (head_dim // 6)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid))  # [S, 3]
    angles = []
    for axis, channels in enumerate((head_dim - 2 * side, side, side)):
        power = torch.arange(0, channels, 2, dtype=torch.float64)[: channels // 2] / channels
        angles.append(places[:, axis, None] * (1.0 / theta**power))
    table = torch.cat(angles, dim=-1)
    return RopeTable(table.cos().float().to(device), table.sin().float().to(device))
