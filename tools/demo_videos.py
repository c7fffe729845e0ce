"""The true videos of the demo model's world: what it is trained on, and what tests judge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ascendit.demo.world import BACKGROUNDS, COLOURS, DIRECTIONS, FRAMES, SIZE, Scene, coverage


@dataclass(frozen=True, kw_only=True)
class Motion:
    """Where the thing is and how it moves, in pixels."""

    radius: float
    """Half of the extent: circle radius; squares and triangles are scaled to look as large."""
    travel: float
    """Length of the whole path."""
    centre: tuple[float, float]
    """Middle of the path (x, y)."""


def draw_motion(rng: np.random.Generator, direction: str, size: int = SIZE) -> Motion:
    """A random motion that stays inside the picture."""
    k = size / 64
    radius = rng.uniform(9.0, 12.0) * k
    travel = rng.uniform(18.0, 26.0) * k
    centre = []
    for axis in (0, 1):
        reach = abs(DIRECTIONS[direction][axis]) * travel / 2 + 1.25 * radius
        slack = max(0.0, size / 2 - reach)
        centre.append(size / 2 + rng.uniform(-slack, slack))
    return Motion(radius=radius, travel=travel, centre=(centre[0], centre[1]))


def render(
    scene: Scene,
    motion: Motion,
    frames: int = FRAMES,
    size: int = SIZE,
    only: range | None = None,
) -> NDArray[np.uint8]:
    """The true video: uint8 [frames, size, size, 3]; `only` renders a part of its frames."""
    only = range(frames) if only is None else only
    fg = np.array(COLOURS[scene.colour], np.float32)
    bg = np.array(BACKGROUNDS[scene.background], np.float32)
    dx, dy = DIRECTIONS[scene.direction]
    grid = np.arange(size, dtype=np.float32) + 0.5
    out = np.empty((len(only), size, size, 3), np.uint8)
    for n, i in enumerate(only):
        along = motion.travel * (i / max(frames - 1, 1) - 0.5)
        cx, cy = motion.centre[0] + dx * along, motion.centre[1] + dy * along
        a = coverage(scene.shape, grid[None, :] - cx, grid[:, None] - cy, motion.radius)[..., None]
        out[n] = np.rint(a * fg + (1 - a) * bg).astype(np.uint8)
    return out
