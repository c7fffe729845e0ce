"""The demo world: its words and shapes; the held-out triples never change."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from ascendit.demo import world
from ascendit.demo.world import Scene


def test_size_of_the_world() -> None:
    every = list(world.scenes())
    assert len(every) == len(set(every)) == 6 * 3 * 8 * 3
    assert {"red", "green", "blue", "yellow"} < set(world.COLOURS)
    assert world.FRAMES % 4 == 1 and world.SIZE % 16 == 0


def test_shapes_have_different_outlines() -> None:
    grid = np.arange(64, dtype=np.float32) + 0.5 - 32
    circle, square, triangle = (world.coverage(s, grid[None], grid[:, None], 10.0) for s in world.SHAPES)
    assert circle[32, 40] == 1 and circle[25, 25] > 0.5 > circle[23, 23]
    assert square[24, 24] == 1  # the corner that the circle lacks
    assert triangle[:32].sum() < triangle[32:].sum()  # point up
    assert np.array_equal(triangle, triangle[:, ::-1])


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star', not one of circle, square, triangle"):
        world.coverage("star", np.zeros(1, np.float32), np.zeros(1, np.float32), 1.0)


def test_held_out_never_changes() -> None:
    text = "\n".join("/".join(t) for t in sorted(world.held_out()))
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "e19698f0a4862dba18291acf6ef74312987a6c4c4612ebfaefd29d472fe5f3be"
    )


def test_held_out_is_15_percent_and_balanced() -> None:
    held = world.held_out()
    every = set(itertools.product(world.COLOURS, world.SHAPES, world.DIRECTIONS))
    assert held < every and len(held) == 22 == round(0.15 * len(every))
    for part in range(3):
        total = Counter(t[part] for t in every)
        excluded = Counter(t[part] for t in held)
        assert max(excluded[w] / total[w] for w in total) <= 0.25
    for a, b in [(0, 1), (0, 2), (1, 2)]:  # every pair of words still occurs in training
        trained = {(t[a], t[b]) for t in every - held}
        assert trained == {(t[a], t[b]) for t in every}


def test_a_triple_is_held_out_on_every_background() -> None:
    triples = world.held_out()
    held = [s for s in world.scenes() if s.triple in triples]
    assert len(held) == 22 * len(world.BACKGROUNDS)


def test_a_prompt_means_one_scene() -> None:
    assert (
        Scene("red", "circle", "right", "black").prompt() == "a red circle moves right on a black background"
    )
    assert len({scene.prompt() for scene in world.scenes()}) == len(list(world.scenes()))
