"""What a denoising run remembers, outside of the modules.

One `DenoiseState` per request, expert and CFG branch. It holds everything that does not change from
step to step (RoPE tables, text keys and values) and the modulation of the current step. It goes away
with its request; modules keep none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ascendit.geometry import Grid, num_tokens
from ascendit.schedule import Precision, StepSchedule

KeyValue = tuple[Tensor, Tensor]
"""Keys and values [B, L, H, d]."""


@dataclass(frozen=True)
class RopeTable:
    """Angles of every token of a grid: cos and sin [S, d/2] float32, or as `Ops.prepare` made of them."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Modulation:
    """Rows of shift, scale and gate, one for each distinct timestep in the sequence.

    `spans`: how many neighbouring tokens use each of the R rows; they add up to S. `norms`: shift and scale
    of a block's two norms, [num_layers, 2, 2, R, D]. `gates`: its two gates, [num_layers, 2, R, D].
    `out`: shift and scale of the last norm, [2, R, D]. float32, or as `Ops.prepare` made of them.
    """

    timesteps: tuple[float, ...]
    spans: tuple[int, ...]
    norms: Tensor
    gates: Tensor
    out: Tensor


@dataclass(frozen=True)
class Shared:
    """What the two CFG branches of one expert have in common; made once, used by both."""

    grid: Grid
    rope: RopeTable
    sinusoids: dict[float, Tensor] = field(default_factory=dict)
    """Timestep -> what the time embedder sees of it, [1, freq_dim]; of those that were known beforehand."""
    modulation: dict[tuple[tuple[float, ...], tuple[int, ...]], Modulation] = field(default_factory=dict)

    def modulation_for(
        self, timesteps: tuple[float, ...], spans: tuple[int, ...], make: Callable[[], Modulation]
    ) -> Modulation:
        """The rows of this step; computed by the first branch that asks, then kept until the next step."""
        key = (timesteps, spans)
        if key not in self.modulation:
            self.modulation.clear()
            self.modulation[key] = make()
        return self.modulation[key]


@dataclass
class DenoiseState:
    """One request, one expert, one CFG branch."""

    shared: Shared
    text: list[KeyValue]
    """Cross-attention keys and values of the prompt, one pair for each block."""
    image: list[KeyValue] | None = None
    """The same of the CLIP image tokens (Wan2.1 I2V)."""
    policy: StepSchedule = field(default_factory=StepSchedule)
    """Which precision each step runs in, where the weights leave a choice."""
    step: int = 0

    @property
    def precision(self) -> Precision:
        """Of the current step."""
        return self.policy.at(self.step)

    @property
    def num_tokens(self) -> int:
        """Length S of the video sequence."""
        return num_tokens(self.shared.grid)


def rope_table(
    grid: Grid, head_dim: int, theta: float = 10000.0, device: torch.device | str = "cpu"
) -> RopeTable:
    """Angles of 3-D rotary embedding: a third of the head each for frame, row and column.

    Row and column get 2 * (head_dim // 6) channels each, the frame axis the rest, as Diffusers'
    WanRotaryPosEmbed. Drawn up in float64 on the CPU (no NPU has it), kept in float32.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for length, channels in zip(grid, (head_dim - 2 * side, side, side), strict=True):
        power = torch.arange(0, channels, 2, dtype=torch.float64)[: channels // 2] / channels
        angles.append(torch.outer(torch.arange(length, dtype=torch.float64), 1.0 / theta**power))
    f, h, w = grid
    table = torch.cat(
        [
            angles[0].view(f, 1, 1, -1).expand(f, h, w, -1),
            angles[1].view(1, h, 1, -1).expand(f, h, w, -1),
            angles[2].view(1, 1, w, -1).expand(f, h, w, -1),
        ],
        dim=-1,
    ).reshape(f * h * w, -1)
    return RopeTable(table.cos().float().to(device), table.sin().float().to(device))
