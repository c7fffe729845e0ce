"""The judge: right on true videos, even degraded ones; refuses others; at chance level on shuffled labels."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from demo_data import Motion, draw_motion, render
from numpy.typing import NDArray

from ascendit.demo import adherence, world
from ascendit.demo.adherence import ATTRIBUTES, Reading, judge, measure_adherence, pick, score
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError

Video = NDArray[np.uint8]
Rng = np.random.Generator
SCENES = list(world.scenes())
SCENE = Scene("red", "circle", "right", "black")
MOTION = Motion(radius=10.0, travel=22.0, centre=(32.0, 32.0))


def true_video(scene: Scene, seed: int = 0, size: int = 64, frames: int = 17) -> Video:
    rng = np.random.default_rng([seed, SCENES.index(scene)])
    return render(scene, draw_motion(rng, scene.direction, size), frames, size)


def names(r: Reading) -> tuple[str | None, ...]:
    return r.colour, r.shape, r.direction, r.background


@cache
def true_readings() -> tuple[Reading, ...]:
    return tuple(judge(true_video(s)) for s in SCENES)


def paint(alphas: list[NDArray[np.float32]], colours: list[tuple[int, int, int]], ground: int = 0) -> Video:
    """Layers with coverage [F, 64, 64] over a plain gray level."""
    out = np.full((*alphas[0].shape, 3), float(ground))
    for a, c in zip(alphas, colours, strict=True):
        out += a[..., None] * (np.array(c) - out)
    return np.rint(out).astype(np.uint8)


def covered(shape: str, path: NDArray[np.float64], r: float = 10.0) -> NDArray[np.float32]:
    """Coverage [F, 64, 64] of a shape whose centre follows `path` [F, 2]."""
    g = np.arange(64, dtype=np.float32) + 0.5
    return np.stack([world.coverage(shape, g[None] - x, g[:, None] - y, r) for x, y in path])


def line(start: tuple[float, float], end: tuple[float, float], frames: int = 17) -> NDArray[np.float64]:
    return np.linspace(start, end, frames)


ACROSS = line((20, 32), (44, 32))

# ---- videos that must be judged right -----------------------------------------------------------


def test_true_videos_are_judged_right() -> None:
    result = score(true_readings(), SCENES)
    print("\n" + result.table())
    assert result.overall.total == 432 and result.held_out.total == 66
    assert result.overall.share() >= 0.99
    assert result.held_out.share() >= 0.97


def blur(video: Video, rng: Rng) -> NDArray[np.float64]:
    """Gaussian blur with sigma 1 px, in Fourier space."""
    pad = np.pad(video.astype(float), [(0, 0), (8, 8), (8, 8), (0, 0)], mode="edge")
    f = np.exp(-2 * np.pi**2 * np.fft.fftfreq(pad.shape[1]) ** 2)
    freq = np.fft.fft2(pad, axes=(1, 2)) * (f[:, None] * f[None, :])[None, :, :, None]
    return np.fft.ifft2(freq, axes=(1, 2)).real[:, 8:-8, 8:-8]


def noise(video: Video, rng: Rng) -> NDArray[np.float64]:
    return video + rng.normal(0, 10, video.shape)


def colour_shift(video: Video, rng: Rng) -> NDArray[np.float64]:
    return video + rng.uniform(-25.5, 25.5, 3)


def colour_gain(video: Video, rng: Rng) -> NDArray[np.float64]:
    return video * rng.uniform(0.9, 1.1, 3)


def flicker(video: Video, rng: Rng) -> NDArray[np.float64]:
    out = video.astype(float)
    for frame in out:
        y, x = rng.integers(64, size=(2, 5))
        frame[y, x] = rng.integers(0, 256, (5, 3))
    return out


def all_at_once(video: Video, rng: Rng) -> NDArray[np.float64]:
    out = video.astype(float)
    for change in (blur, colour_shift, noise, flicker):
        out = change(np.clip(out, 0, 255).astype(np.uint8), rng)
    return out


@pytest.mark.parametrize("change", [blur, noise, colour_shift, colour_gain, flicker, all_at_once])
def test_degraded_videos_are_still_judged_right(change: Callable[[Video, Rng], NDArray[np.float64]]) -> None:
    rng = np.random.default_rng(5)
    scenes = pick(144, rng_seed=1)
    videos = (change(true_video(s, seed=1), rng) for s in scenes)
    result = score([judge(np.clip(np.rint(v), 0, 255).astype(np.uint8)) for v in videos], scenes)
    print(f"\n{change.__name__}: {result.overall}")
    assert result.overall.share() >= 0.97


def growing(scene: Scene, rng: Rng) -> Video:
    m = draw_motion(rng, scene.direction)
    first, last = rng.uniform(0.85, 1.15, 2)
    sizes = m.radius * np.linspace(first, last, 17)
    parts = [Motion(radius=r, travel=m.travel, centre=m.centre) for r in sizes]
    return np.concatenate([render(scene, p, only=range(i, i + 1)) for i, p in enumerate(parts)])


def leaving(scene: Scene, rng: Rng) -> Video:
    """In the last frame the centre of the object is 0.3 radii from the edge that it moves to."""
    m = draw_motion(rng, scene.direction)
    toward = np.array(world.DIRECTIONS[scene.direction])
    x, y = 32 + np.sign(toward) * 32 - toward * (m.travel / 2) - np.sign(toward) * 0.3 * m.radius
    return render(scene, Motion(radius=m.radius, travel=m.travel, centre=(x, y)))


@pytest.mark.parametrize("make", [growing, leaving])
def test_objects_that_change_size_or_leave_the_picture(make: Callable[[Scene, Rng], Video]) -> None:
    rng, scenes = np.random.default_rng(6), pick(144, rng_seed=2)
    result = score([judge(make(s, rng)) for s in scenes], scenes)
    print(f"\n{make.__name__}: {result.overall}")
    assert result.overall.share() >= 0.97


@pytest.mark.parametrize(("size", "frames"), [(32, 17), (64, 5), (96, 9), (160, 13)])
def test_any_size_and_length(size: int, frames: int) -> None:
    scenes = pick(24, rng_seed=3)
    videos = [true_video(s, 3, size, frames) for s in scenes]
    assert score([judge(video) for video in videos], scenes).overall.everything == 24
    ends = [find_mask(v, s).centre[[0, -1]] for v, s in zip(videos, scenes, strict=True)]
    side = size // max(1, size // 64)  # after blocks of pixels were averaged
    assert all(0.8 < np.hypot(*(last - first)) / (22 * side / 64) < 1.2 for first, last in ends)


def test_pictures_that_are_not_square() -> None:
    video = render(SCENE, MOTION)
    wider = np.concatenate([video, np.zeros((17, 64, 48, 3), np.uint8)], axis=2)
    assert names(judge(wider)) == tuple(SCENE)


def find_mask(video: Video, scene: Scene) -> adherence.Mask:
    """The mask of the object, from which the judge reads the attributes."""
    ground = np.array(world.BACKGROUNDS[scene.background], np.float32)
    mask = adherence._find_object(adherence._box3(adherence._shrink(video)), ground)
    assert not isinstance(mask, str), mask
    return mask


def test_mask_and_shape_scores() -> None:
    video = render(SCENE, MOTION)
    assert judge(video).reasons == ()
    mask = find_mask(video, SCENE)
    assert mask.centre.shape == (17, 2)
    assert np.allclose(mask.centre + 0.5, line((21, 32), (43, 32)), atol=0.1)
    assert np.median(mask.area) == pytest.approx(np.pi * 100, rel=0.03)
    scores = adherence._shape_scores(adherence._aligned(mask, 24).mean(0))
    assert scores["circle"] > 0.95 > 0.9 > scores["square"] > scores["triangle"]


# ---- videos that must be refused ----------------------------------------------------------------


def test_exactly_the_wrong_attribute_is_reported() -> None:
    choices = {
        "colour": list(world.COLOURS),
        "shape": list(world.SHAPES),
        "direction": list(world.DIRECTIONS),
        "background": list(world.BACKGROUNDS),
    }
    for scene, (name, values) in itertools.product(pick(6, rng_seed=4), choices.items()):
        for value in set(values) - {getattr(scene, name)}:
            right = judge(true_video(scene._replace(**{name: value}), 4)).matches(scene)
            assert right == {a: a != name for a in ATTRIBUTES}, (scene, name, value)


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffled_labels_score_at_chance_level(seed: int) -> None:
    shuffled = [SCENES[i] for i in np.random.default_rng(seed).permutation(432)]
    counts = score(true_readings(), shuffled).overall
    print(f"\n{counts}")
    for name in (*ATTRIBUTES, "everything"):
        labels = [getattr(s, name, s) for s in SCENES]
        chance = sum((n / 432) ** 2 for n in Counter(labels).values())  # two draws coincide
        assert abs(counts.share(name) - chance) < 4 * np.sqrt(chance * (1 - chance) / 432), name


def test_a_static_object_has_no_direction() -> None:
    for shape in world.SHAPES:
        r = judge(paint([covered(shape, line((32, 32), (32, 32)))], [(230, 25, 25)]))
        assert names(r) == ("red", shape, None, "black") and "does not move" in r.reasons[0]


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_an_empty_video_shows_nothing_but_its_background(ground: int) -> None:
    r = judge(np.full((17, 64, 64, 3), ground, np.uint8))
    assert names(r)[:3] == (None, None, None) and r.background in world.BACKGROUNDS
    assert "no object differs" in r.reasons[0]


def test_noise_shows_nothing() -> None:
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 256, (1, 64, 64, 3), np.uint8), 17, 0)
    for video in (rng.integers(0, 256, (17, 64, 64, 3), np.uint8), still):
        assert names(judge(video)) == (None, None, None, None)
    faint = np.clip(rng.normal(128, 20, (17, 64, 64, 3)), 0, 255).astype(np.uint8)
    assert names(judge(faint)) == (None, None, None, "gray")


RED, BLUE = (230, 25, 25), (30, 60, 230)
UPPER, LOWER = line((15, 16), (45, 16)), line((45, 46), (15, 46))
PAIRS = {
    "different": [(RED, covered("circle", UPPER)), (BLUE, covered("square", LOWER))],
    "alike": [(RED, covered("circle", UPPER)), (RED, covered("circle", LOWER[::-1]))],
    "touching": [(RED, covered("circle", ACROSS - [9, 0])), (RED, covered("circle", ACROSS + [12, 0]))],
    "one small and static": [
        (BLUE, covered("square", ACROSS)),
        (RED, covered("circle", 0 * ACROSS + 8, r=4)),
    ],
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_two_objects_are_refused(name: str) -> None:
    colours, alphas = zip(*PAIRS[name], strict=True)
    r = judge(paint(list(alphas), list(colours), ground=128))
    assert names(r) == (None, None, None, "gray") and "more than one object" in r.reasons[0]


def wrong_shapes() -> dict[str, NDArray[np.float32]]:
    g = np.arange(64) + 0.5
    x, y = g[None, None] - ACROSS[:, 0, None, None], g[None, :, None] - ACROSS[:, 1, None, None]
    far = np.hypot(x, y)
    inside = {
        "upside-down triangle": np.minimum(7.2 + y, 7.2 - np.sqrt(0.75) * np.abs(x) - 0.5 * y),
        "diamond": 9 - (np.abs(x) + np.abs(y)) / np.sqrt(2),
        "bar": np.minimum(13 - np.abs(x), 6 - np.abs(y)),
        "star": 10 * (0.7 + 0.3 * np.cos(5 * np.arctan2(y, x))) - far,
        "ring": np.minimum(11 - far, far - 6),
    }
    return {k: np.clip(v + 0.5, 0, 1).astype(np.float32) for k, v in inside.items()}


@pytest.mark.parametrize("name", list(wrong_shapes()))
def test_other_shapes_have_no_name(name: str) -> None:
    r = judge(paint([wrong_shapes()[name]], [(20, 205, 220)]))
    assert r.shape is None and r.reasons


def test_an_object_that_changes_shape_has_no_shape() -> None:
    early = (np.arange(17) < 9)[:, None, None]
    for a, b in itertools.combinations(world.SHAPES, 2):
        assert (
            judge(paint([np.where(early, covered(a, ACROSS), covered(b, ACROSS))], [(230, 25, 25)])).shape
            is None
        )


@pytest.mark.parametrize(
    "path",
    [
        np.concatenate([line((20, 32), (44, 32), 9), line((44, 32), (20, 32), 8)]),
        np.concatenate([line((20, 44), (44, 44), 9), line((44, 44), (44, 20), 8)]),
        np.repeat([[20.0, 32.0], [44.0, 32.0]], [9, 8], axis=0),
        line((30, 32), (33, 32)),
    ],
    ids=["there and back", "around a corner", "a jump", "hardly"],
)
def test_other_paths_have_no_direction(path: NDArray[np.float64]) -> None:
    r = judge(paint([covered("circle", path)], [(230, 25, 25)]))
    assert names(r) == ("red", "circle", None, "black")


def test_unsteady_but_straight_motion_counts() -> None:
    t = np.linspace(0, 1, 17)[:, None]
    path = np.array([20, 20]) + (3 * t**2 - 2 * t**3) * np.array([24, 24])
    assert judge(paint([covered("square", path)], [(20, 170, 40)])).direction == "down and right"


@pytest.mark.parametrize(
    "rgb", [(128, 128, 128), (255, 255, 255), (255, 140, 0), (255, 105, 180), (120, 70, 20)]
)
def test_other_colours_have_no_name(rgb: tuple[int, int, int]) -> None:
    r = judge(paint([covered("circle", ACROSS)], [rgb]))
    assert names(r) == (None, "circle", "right", "black") and str(rgb) in r.reasons[0]


def test_an_object_of_two_colours_has_no_colour() -> None:
    square = covered("square", ACROSS)
    left = square * (np.arange(64) + 0.5 < ACROSS[:, 0, None])[:, None, :]
    early = square * (np.arange(17) < 9)[:, None, None]
    for part in (left, early):
        r = judge(paint([square, part], [(230, 25, 25), (245, 215, 20)]))
        assert r.colour is None and r.reasons


def test_a_background_of_two_parts_or_another_colour_has_no_name() -> None:
    video = render(SCENE, MOTION)
    half = video.copy()
    half[:, :, :32] = np.where(half[:, :, :32].max(-1, keepdims=True) == 0, 255, half[:, :, :32])
    assert judge(half).background is None
    assert judge(paint([covered("circle", ACROSS)], [(230, 25, 25)], ground=64)).background is None


def test_an_object_in_half_of_the_frames_is_refused() -> None:
    video = render(SCENE, MOTION)
    video[8:] = 0
    assert names(judge(video))[:3] == (None, None, None)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((17, 64, 64, 3), np.float32),
        np.zeros((4, 64, 64, 3), np.uint8),
        np.zeros((17, 3, 64, 64), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        [[1, 2], [3, 4]],
    ],
    ids=["float", "four frames", "channels first", "one picture", "a list"],
)
def test_other_arrays_are_refused(frames: Video) -> None:
    with pytest.raises(UsageError, match=r"uint8 \[frames, height, width, 3\]") as e:
        judge(frames)
    assert e.value.code == "E-USE-01" and "a video of shape" in e.value.got


# ---- many prompts -------------------------------------------------------------------------------


def test_measure_adherence_counts_and_lists_failures() -> None:
    scenes, calls = [*pick(5, rng_seed=8), SCENE], []
    videos = {s.prompt(): true_video(s) for s in scenes}
    still = paint([covered("circle", line((32, 32), (32, 32)))], [(230, 25, 25)])

    def make(prompt: str, seed: int) -> Video:
        if prompt == scenes[0].prompt() and seed == 2:
            raise QualityError("the video is black", needs="light", fix="another seed", code="E-OUT-02")
        return still if prompt == SCENE.prompt() and seed == 1 else videos[prompt]

    result = measure_adherence(make, scenes, [1, 2], on_result=lambda *a: calls.append(a))
    assert result.overall.total == len(calls) == 12 and result.overall.everything == 10
    assert [(f.scene, f.seed) for f in result.failures] == [(SCENE, 1), (scenes[0], 2)]
    assert result.overall.direction == 10 and result.overall.colour == 11
    assert result.failures[1].reading.reasons == ("the video is black",)
    data = json.loads(json.dumps(result.as_dict()))
    right = {"colour": 11, "shape": 11, "direction": 10, "background": 11, "everything": 10}
    assert data["overall"] == {"total": 12, **right, "share": 0.8333}
    first = data["failures"][0]
    assert first["prompt"] == SCENE.prompt() and first["read"]["direction"] is None


def test_trained_and_held_out_are_counted_separately() -> None:
    held_out = world.held_out()
    wrong = [
        r if s.triple not in held_out else Reading() for r, s in zip(true_readings(), SCENES, strict=True)
    ]
    result = score(wrong, SCENES)
    assert (result.trained.total, result.held_out.total, result.held_out.everything) == (366, 66, 0)
    assert result.trained.share() >= 0.99
    rows = result.table().splitlines()
    assert [row.split()[0] for row in rows] == ["right", *ATTRIBUTES, "everything"]
    assert rows[-1].endswith("0/66    0.0%")


def test_score_needs_as_many_readings_as_scenes() -> None:
    with pytest.raises(ValueError, match="zip"):
        score([Reading()], SCENES[:2])
    assert score([], []).overall.share() == 0.0


@pytest.mark.parametrize("n", [12, 48, 150, 432])
def test_pick_spreads_over_every_attribute(n: int) -> None:
    scenes = pick(n, rng_seed=9)
    assert len(set(scenes)) == n and scenes == pick(n, rng_seed=9)
    assert n == 432 or set(scenes) != set(pick(n, rng_seed=10))
    assert sum(s.triple in world.held_out() for s in scenes) == round(n * 66 / 432)
    for column, values in zip(zip(*scenes, strict=True), (6, 3, 8, 3), strict=True):
        counts = Counter(column)
        assert len(counts) == values and max(counts.values()) - min(counts.values()) <= max(2, n // 40)


@pytest.mark.parametrize("n", [0, 433])
def test_pick_refuses_other_numbers(n: int) -> None:
    with pytest.raises(UsageError, match="1 to 432 scenes") as e:
        pick(n)
    assert e.value.code == "E-USE-01" and f"{n} scenes" in e.value.got
