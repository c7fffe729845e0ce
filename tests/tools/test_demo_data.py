"""Training data of the demo model: videos match their scenes, and a caption means one scene."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from demo_data import DIRECTION_WORDS, WORDINGS, Motion, caption, draw_motion, render
from hypothesis import given
from hypothesis import strategies as st

from ascendit.checkpoint.hub import DEMO
from ascendit.demo import world
from ascendit.demo.world import Scene

EIGHT = [f"{s}-{d}" for s in world.SHAPES for d in world.DIRECTIONS]
seeds = st.integers(0, 2**32 - 1)
some_scene = st.sampled_from(list(world.scenes()))


def share(video: np.ndarray, scene: Scene) -> np.ndarray:
    """Coverage of each pixel by the object, computed from the colours: [frames, size, size] in 0..1."""
    fg = np.array(world.COLOURS[scene.colour], float)
    bg = np.array(world.BACKGROUNDS[scene.background], float)
    return (video.astype(float) - bg) @ (fg - bg) / ((fg - bg) @ (fg - bg))


def centroids(video: np.ndarray, scene: Scene) -> np.ndarray:
    """Centre of the object in each frame, (x, y) in pixels: [frames, 2]."""
    a = share(video, scene)
    grid = np.arange(video.shape[1]) + 0.5
    total = a.sum((1, 2))
    return np.stack([(a.sum(1) @ grid) / total, (a.sum(2) @ grid) / total], 1)


def middle(shape: str = "circle", direction: str = "right", **motion: float) -> tuple[Scene, Motion]:
    fields = {"radius": 10.0, "travel": 20.0} | motion
    return Scene("red", shape, direction, "black"), Motion(centre=(32.0, 32.0), **fields)


@pytest.mark.parametrize("name", EIGHT)
def test_the_object_moves_in_its_direction(name: str) -> None:
    shape, direction = name.split("-")
    scene, motion = middle(shape, direction)
    path = centroids(render(scene, motion), scene)
    moved = path[-1] - path[0]
    ends = direction.split(" and ")
    expected = np.array([("right" in ends) - ("left" in ends), ("down" in ends) - ("up" in ends)], float)
    expected *= motion.travel / np.linalg.norm(expected)
    np.testing.assert_allclose(moved, expected, atol=0.15)
    np.testing.assert_allclose(
        np.diff(path, axis=0), np.tile(moved / 16, (16, 1)), atol=0.15
    )  # constant speed
    np.testing.assert_allclose(path[8], motion.centre, atol=0.15)


AREAS = {  # of radius 1: disc, square of side 1.84, equilateral triangle of inradius 0.72
    "circle": math.pi,
    "square": 1.84**2,
    "triangle": 3 * math.sqrt(3) * 0.72**2,
}


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("radius", [9.0, 12.0])
def test_the_area_is_that_of_the_shape(shape: str, radius: float) -> None:
    scene, motion = middle(shape, "up", radius=radius, travel=6.0)
    area = share(render(scene, motion), scene).sum((1, 2))
    np.testing.assert_allclose(area, AREAS[shape] * radius**2, rtol=0.03)


def test_shapes_have_similar_areas() -> None:
    assert max(AREAS.values()) / min(AREAS.values()) < 1.3


@given(some_scene, seeds, st.sampled_from([32, 64, 128]))
def test_random_motions_stay_inside_the_picture(scene: Scene, seed: int, size: int) -> None:
    motion = draw_motion(np.random.default_rng(seed), scene.direction, size)
    ends = [render(scene, motion, size=size, only=range(i, i + 1)) for i in (0, 16)]
    a = share(np.concatenate(ends), scene)
    area = AREAS[scene.shape] * motion.radius**2
    assert (a.sum((1, 2)) > 0.95 * area).all()  # the point of a triangle may touch the top
    if scene.shape != "triangle":
        edge = np.concatenate([a[:, 0], a[:, -1], a[:, :, 0], a[:, :, -1]], 1)
        assert (edge == 0).all()


@given(some_scene, seeds)
def test_a_motion_depends_on_its_seed_and_frames_have_the_colours_of_the_scene(
    scene: Scene, seed: int
) -> None:
    motion = draw_motion(np.random.default_rng(seed), scene.direction)
    assert motion == draw_motion(np.random.default_rng(seed), scene.direction)
    assert 9 <= motion.radius <= 12 and 18 <= motion.travel <= 26
    frame = render(scene, motion, only=range(8, 9))[0]
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
    x, y = (int(v) for v in motion.centre)
    assert tuple(frame[y, x]) == world.COLOURS[scene.colour]
    colours = Counter(map(tuple, frame.reshape(-1, 3).tolist()))
    assert colours.most_common(1)[0][0] == world.BACKGROUNDS[scene.background]


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (0, 1), (3, 9), (16, 17), (5, 5)])
def test_a_range_of_frames_equals_that_part_of_the_video(start: int, stop: int) -> None:
    scene, motion = middle("triangle", "down and left")
    video = render(scene, motion)
    assert video.shape == (17, 64, 64, 3)
    assert np.array_equal(render(scene, motion, only=range(start, stop)), video[start:stop])


def test_one_frame_can_be_rendered() -> None:
    scene, motion = middle()
    assert render(scene, motion, frames=1).shape == (1, 64, 64, 3)


# ---- captions ------------------------------------------------------------------------------------

VERBS = r"\b(moves|moving|slides|goes|drifts|travels)\b"


def captions(scene: Scene) -> list[str]:
    return [caption(scene, w, d) for w in range(len(WORDINGS)) for d in range(3)]


def test_a_caption_means_one_scene() -> None:
    owner: dict[str, Scene] = {}
    for scene in world.scenes():
        texts = captions(scene)
        assert len(set(texts)) == len(texts) == 24
        for text in texts:
            assert owner.setdefault(text, scene) == scene, text


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_wording_has_every_slot_once_and_a_verb_of_motion(wording: str) -> None:
    assert sorted(re.findall(r"{(\w)}", wording)) == ["b", "c", "d", "s"]
    assert len(re.findall(VERBS, wording)) == 1, wording
    assert "background" in wording


def test_the_first_wording_is_that_of_the_prompt() -> None:
    assert WORDINGS[0] == "a {c} {s} moves {d} on a {b} background"
    scene = Scene("red", "circle", "right", "black")
    assert scene.prompt() == caption(scene, 0, 0) == "a red circle moves right on a black background"
    assert caption(scene, 3, 1) == "on a black background, a red circle moves to the right"
    assert caption(scene, 8, 3) == caption(scene, 0, 0)


def test_direction_words_name_their_directions() -> None:
    assert set(DIRECTION_WORDS) == set(world.DIRECTIONS)
    ends = {"up": ("up", "top"), "down": ("down", "bottom"), "left": ("left",), "right": ("right",)}
    for direction, phrases in DIRECTION_WORDS.items():
        assert len(phrases) == 3
        for word in phrases:
            for end, names in ends.items():
                assert any(name in word for name in names) == (end in direction.split(" and ")), word


def test_the_calibration_prompts_are_those_of_the_training_set() -> None:
    """All scenes and all wordings, in an order in which neighbours differ (gcd(157, 366) = 1)."""
    shown = [scene for scene in world.scenes() if scene.triple not in world.held_out()]
    lines = (DEMO.parent / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [caption(shown[i * 157 % len(shown)], i, i) for i in range(len(shown))]
