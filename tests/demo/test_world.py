"""The demo world: what is rendered is what the words say, and what is kept back stays kept back."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.checkpoint.hub import DEMO
from ascendit.demo import world
from ascendit.demo.world import Motion, Scene

EIGHT = [f"{s}-{d}" for s in world.SHAPES for d in world.DIRECTIONS]
VERBS = r"\b(moves|moving|slides|goes|drifts|travels)\b"
seeds = st.integers(0, 2**32 - 1)
some_scene = st.sampled_from(list(world.scenes()))


def share(video: np.ndarray, scene: Scene) -> np.ndarray:
    """How much of each pixel the thing covers, read back from the colours: [frames, size, size] in 0..1."""
    fg = np.array(world.COLOURS[scene.colour], float)
    bg = np.array(world.BACKGROUNDS[scene.background], float)
    return (video.astype(float) - bg) @ (fg - bg) / ((fg - bg) @ (fg - bg))


def centroids(video: np.ndarray, scene: Scene) -> np.ndarray:
    """Centre of the thing in each frame, (x, y) in pixels: [frames, 2]."""
    a = share(video, scene)
    grid = np.arange(video.shape[1]) + 0.5
    total = a.sum((1, 2))
    return np.stack([(a.sum(1) @ grid) / total, (a.sum(2) @ grid) / total], 1)


def middle(shape: str = "circle", direction: str = "right", **motion: float) -> tuple[Scene, Motion]:
    fields = {"radius": 10.0, "travel": 20.0} | motion
    return Scene("red", shape, direction, "black"), Motion(centre=(32.0, 32.0), **fields)


def test_size_of_the_world() -> None:
    every = list(world.scenes())
    assert len(every) == len(set(every)) == 6 * 3 * 8 * 3
    assert {"red", "green", "blue", "yellow"} < set(world.COLOURS)
    assert world.FRAMES % 4 == 1 and world.SIZE % 16 == 0


@pytest.mark.parametrize("name", EIGHT)
def test_the_thing_moves_the_way_the_word_says(name: str) -> None:
    shape, direction = name.split("-")
    scene, motion = middle(shape, direction)
    path = centroids(world.render(scene, motion), scene)
    moved = path[-1] - path[0]
    words = direction.split(" and ")
    wanted = np.array([("right" in words) - ("left" in words), ("down" in words) - ("up" in words)], float)
    wanted *= motion.travel / np.linalg.norm(wanted)
    np.testing.assert_allclose(moved, wanted, atol=0.15)
    np.testing.assert_allclose(np.diff(path, axis=0), np.tile(moved / 16, (16, 1)), atol=0.15)  # at one speed
    np.testing.assert_allclose(path[8], motion.centre, atol=0.15)


AREAS = {  # of radius 1: disc, square of side 1.84, equilateral triangle of inradius 0.72
    "circle": math.pi,
    "square": 1.84**2,
    "triangle": 3 * math.sqrt(3) * 0.72**2,
}


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("radius", [9.0, 12.0])
def test_area_is_that_of_the_shape(shape: str, radius: float) -> None:
    scene, motion = middle(shape, "up", radius=radius, travel=6.0)
    area = share(world.render(scene, motion), scene).sum((1, 2))
    np.testing.assert_allclose(area, AREAS[shape] * radius**2, rtol=0.03)


def test_shapes_look_alike_in_size_and_unlike_in_outline() -> None:
    assert max(AREAS.values()) / min(AREAS.values()) < 1.3
    grid = np.arange(64, dtype=np.float32) + 0.5 - 32
    circle, square, triangle = (world.coverage(s, grid[None], grid[:, None], 10.0) for s in world.SHAPES)
    assert circle[32, 40] == 1 and circle[25, 25] > 0.5 > circle[23, 23]
    assert square[24, 24] == 1  # the corner that the circle lacks
    assert triangle[:32].sum() < triangle[32:].sum()  # point up
    assert np.array_equal(triangle, triangle[:, ::-1])


def test_an_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star', known: circle, square, triangle"):
        world.coverage("star", np.zeros(1, np.float32), np.zeros(1, np.float32), 1.0)


@given(some_scene, seeds, st.sampled_from([32, 64, 128]))
def test_random_motions_stay_inside_the_picture(scene: Scene, seed: int, size: int) -> None:
    motion = world.draw_motion(np.random.default_rng(seed), scene.direction, size)
    ends = [world.render(scene, motion, size=size, only=range(i, i + 1)) for i in (0, 16)]
    a = share(np.concatenate(ends), scene)
    area = AREAS[scene.shape] * motion.radius**2
    assert (a.sum((1, 2)) > 0.95 * area).all()  # the point of a triangle may touch the top
    if scene.shape != "triangle":
        edge = np.concatenate([a[:, 0], a[:, -1], a[:, :, 0], a[:, :, -1]], 1)
        assert (edge == 0).all()


@given(some_scene, seeds)
def test_a_motion_comes_from_its_seed_and_shows_its_colours(scene: Scene, seed: int) -> None:
    motion = world.draw_motion(np.random.default_rng(seed), scene.direction)
    assert motion == world.draw_motion(np.random.default_rng(seed), scene.direction)
    assert 9 <= motion.radius <= 12 and 18 <= motion.travel <= 26
    frame = world.render(scene, motion, only=range(8, 9))[0]
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
    x, y = (int(v) for v in motion.centre)
    assert tuple(frame[y, x]) == world.COLOURS[scene.colour]
    colours = Counter(map(tuple, frame.reshape(-1, 3).tolist()))
    assert colours.most_common(1)[0][0] == world.BACKGROUNDS[scene.background]


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (0, 1), (3, 9), (16, 17), (5, 5)])
def test_a_part_of_the_frames_is_that_part(start: int, stop: int) -> None:
    scene, motion = middle("triangle", "down and left")
    whole = world.render(scene, motion)
    assert whole.shape == (17, 64, 64, 3)
    assert np.array_equal(world.render(scene, motion, only=range(start, stop)), whole[start:stop])


def test_one_frame_can_be_rendered() -> None:
    scene, motion = middle()
    assert world.render(scene, motion, frames=1).shape == (1, 64, 64, 3)


def test_kept_back_never_changes() -> None:
    text = "\n".join("/".join(t) for t in sorted(world.kept_back()))
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "e19698f0a4862dba18291acf6ef74312987a6c4c4612ebfaefd29d472fe5f3be"
    )


def test_kept_back_is_15_percent_and_balanced() -> None:
    held = world.kept_back()
    every = set(itertools.product(world.COLOURS, world.SHAPES, world.DIRECTIONS))
    assert held < every and len(held) == 22 == round(0.15 * len(every))
    for part in range(3):
        total = Counter(t[part] for t in every)
        lost = Counter(t[part] for t in held)
        assert max(lost[w] / total[w] for w in total) <= 0.25
    for a, b in [(0, 1), (0, 2), (1, 2)]:  # every pair of words is still seen together
        seen = {(t[a], t[b]) for t in every - held}
        assert seen == {(t[a], t[b]) for t in every}


def test_a_triple_is_kept_back_on_every_background() -> None:
    triples = world.kept_back()
    held = [s for s in world.scenes() if s.triple in triples]
    assert len(held) == 22 * len(world.BACKGROUNDS)


def prompts(scene: Scene) -> list[str]:
    return [scene.prompt(w, d) for w in range(len(world.WORDINGS)) for d in range(3)]


def test_a_prompt_means_one_scene() -> None:
    owner: dict[str, Scene] = {}
    for scene in world.scenes():
        texts = prompts(scene)
        assert len(set(texts)) == len(texts) == 24
        for text in texts:
            assert owner.setdefault(text, scene) == scene, text


@pytest.mark.parametrize("wording", world.WORDINGS)
def test_a_wording_has_every_slot_once_and_a_verb_of_motion(wording: str) -> None:
    assert sorted(re.findall(r"{(\w)}", wording)) == ["b", "c", "d", "s"]
    assert len(re.findall(VERBS, wording)) == 1, wording
    assert "background" in wording


def test_moves_is_among_the_verbs_and_leads() -> None:
    assert world.WORDINGS[0] == "a {c} {s} moves {d} on a {b} background"
    scene = Scene("red", "circle", "right", "black")
    assert scene.prompt() == "a red circle moves right on a black background"
    assert scene.prompt(3, 1) == "on a black background, a red circle moves to the right"
    assert scene.prompt(8, 3) == scene.prompt(0, 0)


def test_a_direction_word_holds_its_directions() -> None:
    assert set(world.DIRECTION_WORDS) == set(world.DIRECTIONS)
    ends = {"up": ("up", "top"), "down": ("down", "bottom"), "left": ("left",), "right": ("right",)}
    for direction, words in world.DIRECTION_WORDS.items():
        assert len(words) == 3
        for word in words:
            for end, marks in ends.items():
                assert any(m in word for m in marks) == (end in direction.split(" and ")), word


def test_the_calibration_prompts_are_those_of_the_training_set() -> None:
    """All of them, in all wordings, in an order in which neighbours differ (gcd(157, 366) = 1)."""
    shown = [scene for scene in world.scenes() if scene.triple not in world.kept_back()]
    lines = (DEMO.parent / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [shown[i * 157 % len(shown)].prompt(i, i) for i in range(len(shown))]
