"""The synthetic world of the demo model: one moving object on a plain background, and its prompts.

`tools/demo_data.py` renders it for training, `adherence.py` reads it back from pixels, and tests compare the
two.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels, square
FRAMES = 17  # 4n+1
FPS = 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (20, 170, 40),
    "blue": (30, 60, 230),
    "yellow": (245, 215, 20),
    "purple": (165, 30, 190),
    "cyan": (20, 205, 220),
}
SHAPES = ("circle", "square", "triangle")
# Unit vectors in image coordinates: x to the right, y downwards.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up and right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "up and left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "down and right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down and left": (-math.sqrt(0.5), math.sqrt(0.5)),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
}


class Scene(NamedTuple):
    """A scene as a prompt describes it: colour, shape, direction and background."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def triple(self) -> tuple[str, str, str]:
        """(colour, shape, direction), the unit of held-out combinations."""
        return (self.colour, self.shape, self.direction)

    def prompt(self) -> str:
        """The standard sentence for this scene; training uses other wordings too."""
        return f"a {self.colour} {self.shape} moves {self.direction} on a {self.background} background"


def scenes() -> Iterator[Scene]:
    """Every combination, 6 x 3 x 8 x 3 = 432, in a fixed order."""
    for c, s, d, b in itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS):
        yield Scene(c, s, d, b)


def held_out() -> frozenset[tuple[str, str, str]]:
    """The 22 of 144 triples (15 %) that are not in the training set, in any wording.

    Drawn by hash and balanced: at least three quarters of the triples of each colour, shape and direction
    remain in training, so that every word is learnt.
    """
    triples = list(itertools.product(COLOURS, SHAPES, DIRECTIONS))
    order = sorted(triples, key=lambda t: hashlib.sha256("/".join(t).encode()).hexdigest())
    limit = {"colour": 5, "shape": 9, "direction": 4}
    chosen: list[tuple[str, str, str]] = []
    for t in order:
        counts = [sum(c[i] == t[i] for c in chosen) for i in range(3)]
        if counts[0] < limit["colour"] and counts[1] < limit["shape"] and counts[2] < limit["direction"]:
            chosen.append(t)
        if len(chosen) == round(0.15 * len(triples)):
            break
    return frozenset(chosen)


def coverage(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], r: float) -> NDArray[np.float32]:
    """Share of each pixel that the shape covers, with a one-pixel soft edge.

    `x`, `y`: offsets from its centre in pixels, float32 of any shape; `r`: its radius. Returns float32 in
    [0, 1]. Raises ValueError for an unknown shape.
    """
    if shape == "circle":
        inside = r - np.hypot(x, y)
    elif shape == "square":
        inside = 0.92 * r - np.maximum(np.abs(x), np.abs(y))
    elif shape == "triangle":  # equilateral, point up, centroid at the origin
        h = 0.72 * r  # distance from the centroid to each side
        inside = np.minimum(h - y, h - (math.sqrt(0.75) * np.abs(x) - 0.5 * y))
    else:
        raise ValueError(f"unknown shape {shape!r}, not one of {', '.join(SHAPES)}")
    return np.clip(inside + 0.5, 0.0, 1.0).astype(np.float32)
