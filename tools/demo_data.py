"""Training data of the demo model: true videos of its world, and captions in many wordings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ascendit.demo.world import BACKGROUNDS, COLOURS, DIRECTIONS, FRAMES, SIZE, Scene, coverage

# The first wording is that of `Scene.prompt`, which the docs and the adherence check use.
WORDINGS = (
    "a {c} {s} moves {d} on a {b} background",
    "a {c} {s} moving {d} on a {b} background",
    "{c} {s} moves {d}, {b} background",
    "on a {b} background, a {c} {s} moves {d}",
    "the {c} {s} slides {d} over a plain {b} background",
    "a video of a {c} {s} that goes {d} in front of a {b} background",
    "a {c} {s} drifts slowly {d} against a {b} background.",
    "{b} background, a {c} {s} travels {d}",
)
DIRECTION_WORDS: dict[str, tuple[str, ...]] = {
    "right": ("right", "to the right", "rightwards"),
    "left": ("left", "to the left", "leftwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
    "up and right": ("up and right", "up and to the right", "diagonally up right"),
    "up and left": ("up and left", "up and to the left", "diagonally up left"),
    "down and right": ("down and right", "down and to the right", "diagonally down right"),
    "down and left": ("down and left", "down and to the left", "diagonally down left"),
}


def caption(scene: Scene, wording: int, direction_word: int) -> str:
    """The caption of a scene in one of the wordings."""
    directions = DIRECTION_WORDS[scene.direction]
    return WORDINGS[wording % len(WORDINGS)].format(
        c=scene.colour, s=scene.shape, d=directions[direction_word % len(directions)], b=scene.background
    )


@dataclass(frozen=True, kw_only=True)
class Motion:
    """Position and motion of the object, in pixels."""

    radius: float
    """Half of the extent: the radius of a circle; squares and triangles are scaled to a similar area."""
    travel: float
    """Length of the path."""
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
