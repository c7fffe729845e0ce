"""Does a video show what its prompt asked for? Read back from pixels, with no neural judge.

`judge` measures one video of the synthetic world (`world.py`) and names what it sees, or says why
it cannot. `measure_adherence` generates and judges many prompts; `score` counts readings that
stand already. A reading never looks at the prompt, so shuffled prompts must score chance.

How `judge` reads: the plain background is the median of the border; what differs from it is the
thing, as a soft mask per frame; the mask's centroid gives the path, the middle of the mask the
colour, and the mean of the masks, aligned by centroid, is compared with the true shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ascendit.demo import world
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError

ATTRIBUTES = Scene._fields
MIN_FRAMES = 5
# Lengths below are in pixels of a picture whose short side is about 64, colours in 0 to 255.
COLOUR_LIMIT = 70.0  # RGB distance to a name; the names are 144 apart, so these balls do not touch
GROUND_LIMIT = 60.0  # the same for backgrounds, which are 221 apart
CONTRAST_LIMIT = 60.0  # least RGB distance between thing and background; the world's least is 122
AREA_LIMIT = (0.008, 0.35)  # share of the picture that one thing covers
SPREAD_LIMIT = 0.7  # mean square radius * pi / area: circle 0.50, square 0.52, triangle 0.60, a pair > 0.75
SEEN_LIMIT = 0.75  # share of the frames that must show the one thing; also of its pixels for its colour
TRAVEL_LIMIT = 5.0
STEADY_LIMIT = 0.85  # least share of the path's variance that steady motion explains
SIDEWAYS_LIMIT = 0.08  # most rms distance from the line, as a share of the travel
SHAPE_LIMIT = 0.85  # least soft IoU with the best template
SHAPE_MARGIN = 0.01  # and its least lead over the second shape

Floats = NDArray[np.float32]
RGB = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a video shows: a name of `world`, or None where it cannot be read."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None
    why: tuple[str, ...] = ()
    """One sentence for each thing that could not be read."""

    def right(self, scene: Scene) -> dict[str, bool]:
        """For each attribute, whether it is as asked."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


class Mask(NamedTuple):
    """The thing in each frame that shows it."""

    weight: Floats  # [F, h, w], share of the pixel, 0 to 1
    area: Floats  # [F]
    centre: Floats  # [F, 2], x and y in pixel indices
    frame: NDArray[np.intp]  # [F], number of the frame
    whole: NDArray[np.bool_]  # [F], whether it is clear of the picture's rim

    def clear(self, least: int) -> Mask:
        """Only whole frames, if there are `least`: at the rim neither centroid nor shape is right."""
        k = self.whole
        if k.sum() < least:
            return self
        return Mask(self.weight[k], self.area[k], self.centre[k], self.frame[k], k[k])


def judge(frames: NDArray[np.uint8]) -> Reading:
    """Read one video, uint8 [F, H, W, 3], F >= 5. Raises UsageError for another kind of array."""
    video = _shrink(_checked(frames))
    edge = np.concatenate([video[:, (0, -1)].reshape(-1, 3), video[:, :, (0, -1)].reshape(-1, 3)])
    ground = np.median(edge, axis=0)
    plain = np.median(np.abs(edge - ground), axis=0).max() < 0.5 * GROUND_LIMIT
    background = _nearest(ground, world.BACKGROUNDS, GROUND_LIMIT) if plain else None
    why = "" if background else f"background {_rgb(ground)} is not plain {', '.join(world.BACKGROUNDS)}"
    smooth = _box3(video)
    mask = _find(smooth, ground.astype(np.float32))
    if isinstance(mask, str):
        return Reading(background=background, why=tuple(filter(None, (why, mask))))
    direction, why_path = _direction(mask, len(video), min(video.shape[1:3]))
    shape, why_shape = _shape(mask)
    colour, why_colour = _colour(smooth, mask)
    return Reading(
        colour=colour,
        shape=shape,
        direction=direction,
        background=background,
        why=tuple(filter(None, (why, why_path, why_shape, why_colour))),
    )


def _checked(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shape, dtype = getattr(frames, "shape", None), getattr(frames, "dtype", None)
    if dtype == np.uint8 and shape and len(shape) == 4 and shape[3] == 3:
        if shape[0] >= MIN_FRAMES and min(shape[1:3]) >= 16:
            return frames
    raise UsageError(
        f"a video of shape {shape} and type {dtype or type(frames).__name__}",
        needs=f"uint8 [frames, height, width, 3], at least {MIN_FRAMES} frames of 16x16",
        fix="pass video.frames",
    )


def _shrink(frames: NDArray[np.uint8]) -> Floats:
    """Average blocks so that the short side is 64 to 127."""
    n, h, w, _ = frames.shape
    k = max(1, min(h, w) // 64)
    if k == 1:
        return frames.astype(np.float32)
    blocks = frames[:, : h // k * k, : w // k * k].reshape(n, h // k, k, w // k, k, 3)
    return np.asarray(blocks.mean((2, 4), np.float32))


def _box3(x: Floats) -> Floats:
    """Mean over 3 x 3 pixels of [N, h, w, ...]: takes out flicker and most of the noise."""
    p = np.pad(x, [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 3), mode="edge")
    p = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    p = p[:, :, :-2] + p[:, :, 1:-1] + p[:, :, 2:]
    return p * np.float32(1 / 9)


def _ramp(x: Floats) -> Floats:
    """Smoothed coverage to weight: steeper, one half stays one half, faint remains are dropped."""
    return np.asarray(np.clip(2 * x - 0.5, 0, 1), np.float32)


def _find(smooth: Floats, ground: Floats) -> Mask | str:
    """The one thing that stands out from the background, or why there is none."""
    n, h, w, _ = smooth.shape
    off = smooth - ground
    far = np.sqrt(np.einsum("fhwc,fhwc->fhw", off, off))
    top = h * w - max(h * w // 100, 1)  # the distance that the farthest percent of pixels exceeds
    contrast = float(np.median(np.partition(far.reshape(n, -1), top, axis=1)[:, top]))
    if contrast < CONTRAST_LIMIT:
        return f"nothing stands out from the background (contrast {contrast:.0f})"
    weight = _ramp(far / contrast)
    area = weight.sum((1, 2))
    typical = float(np.median(area))
    if not AREA_LIMIT[0] < typical / (h * w) < AREA_LIMIT[1]:
        return f"what stands out covers {typical / (h * w):.1%} of the picture"
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)
    columns, rows, some = weight.sum(1), weight.sum(2), np.maximum(area, 1e-6)
    cx, cy = columns @ x / some, rows @ y / some
    square_radius = columns @ x**2 / some - cx**2 + rows @ y**2 / some - cy**2
    rim = weight[:, (0, -1)].sum((1, 2)) + weight[:, :, (0, -1)].sum((1, 2))
    shown = (area > 0.3 * typical) & (area < 3 * typical)
    one = shown & (square_radius * np.pi / some < SPREAD_LIMIT)
    if shown.sum() < SEEN_LIMIT * n:
        return f"only {shown.sum()} of {n} frames show the thing"
    if one.sum() < SEEN_LIMIT * shown.sum():
        return f"more than one thing in {shown.sum() - one.sum()} of {shown.sum()} frames"
    return Mask(weight[one], area[one], np.stack([cx, cy], 1)[one], np.flatnonzero(one), rim[one] < 1)


def _direction(mask: Mask, frames: int, size: int) -> tuple[str | None, str]:
    """Direction of the least-squares line through the centroids, and what is wrong with it."""
    mask = mask.clear(least=max(4, frames // 2))
    t = (mask.frame - mask.frame.mean()).astype(np.float32)
    path = mask.centre - mask.centre.mean(0)
    speed = t @ path / (t @ t)
    step = float(np.hypot(*speed))
    travel = step * (frames - 1)
    if travel < TRAVEL_LIMIT * min(1.0, size / 64):
        return None, f"it does not move ({travel:.1f} px)"
    unit = speed / step
    steady = 1 - float(((path - t[:, None] * speed) ** 2).sum() / (path**2).sum())
    sideways = math.sqrt(float(((path @ np.array([-unit[1], unit[0]])) ** 2).mean())) / travel
    if steady < STEADY_LIMIT or sideways > SIDEWAYS_LIMIT:
        return None, f"its path is not straight (steady {steady:.2f}, sideways {sideways:.2f})"
    return max(world.DIRECTIONS, key=lambda d: float(unit @ np.array(world.DIRECTIONS[d]))), ""


def _colour(smooth: Floats, mask: Mask) -> tuple[str | None, str]:
    """Median colour well inside the thing, named if most of its pixels have the same name."""
    _, h, w, _ = smooth.shape
    dx, dy = np.arange(w) - mask.centre[:, :1], np.arange(h) - mask.centre[:, 1:]
    inner = (dx[:, None, :] ** 2 + dy[:, :, None] ** 2) * np.pi < 0.4 * mask.area[:, None, None]
    pixels = smooth[mask.frame][inner]
    rgb = np.median(pixels, axis=0)
    name = _nearest(rgb, world.COLOURS, COLOUR_LIMIT)
    if name is None:
        return None, f"colour {_rgb(rgb)} is far from every name"
    off = pixels - np.array(world.COLOURS[name], np.float32)
    share = float((np.square(off).sum(1) < (1.2 * COLOUR_LIMIT) ** 2).mean())
    if share < SEEN_LIMIT:
        return None, f"only {share:.0%} of the thing is {name}"
    return name, ""


def _nearest(rgb: NDArray[Any], names: Mapping[str, RGB], limit: float) -> str | None:
    """Nearest name in RGB. For these palettes it keeps shifted colours apart better than Lab or hue."""
    name = min(names, key=lambda n: math.dist(rgb, names[n]))
    return name if math.dist(rgb, names[name]) < limit else None


def _rgb(values: NDArray[Any]) -> RGB:
    r, g, b = (round(float(v)) for v in values)
    return r, g, b


# Area of each shape at radius 1 (`world.coverage`).
UNIT_AREA = {"circle": math.pi, "square": 4 * 0.92**2, "triangle": 3 * math.sqrt(3) * 0.72**2}


def _shape(mask: Mask) -> tuple[str | None, str]:
    """Shape of the aligned mean mask, if the first and the second half of the video agree on it."""
    mask = mask.clear(least=2)
    half = 4 * math.ceil((1.7 * math.sqrt(np.median(mask.area) / math.pi) + 2) / 4)
    windows = _aligned(mask, half)
    scores = _shape_scores(windows.mean(0))
    second, best = sorted(scores, key=lambda s: scores[s])[-2:]
    halves = [_shape_scores(part.mean(0)) for part in np.array_split(windows, 2)]
    steady = all(s[best] == max(s.values()) for s in halves)
    if steady and scores[best] >= SHAPE_LIMIT and scores[best] - scores[second] >= SHAPE_MARGIN:
        return best, ""
    return None, "no shape fits throughout: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items())


def _shape_scores(mean: Floats) -> dict[str, float]:
    """Soft IoU with each shape, the best over a small range of sizes and edge widths."""
    area, scores = float(mean.sum()), {}
    for shape, unit_area in UNIT_AREA.items():
        middle = math.sqrt(area / unit_area)
        radii = sorted({round(4 * middle * f) / 4 for f in (0.92, 0.96, 1.0, 1.04, 1.08)})
        t = np.stack([_template(shape, r, soft, len(mean) // 2) for r in radii for soft in (1.0, 3.0)])
        both = np.minimum(t, mean).sum((1, 2))
        scores[shape] = float((both / (t.sum((1, 2)) + area - both)).max())
    return scores


def _aligned(mask: Mask, half: int) -> Floats:
    """Windows [F, 2 half + 1, 2 half + 1] of the weights, centred on the centroids (bilinear)."""
    padded = np.pad(mask.weight, [(0, 0), (half + 1, half + 2), (half + 1, half + 2)])
    whole = np.floor(mask.centre).astype(int)
    fx, fy = (mask.centre - whole).T.astype(np.float32)[:, :, None, None]
    n = 2 * half + 2
    crops = np.stack([m[y : y + n, x : x + n] for m, (x, y) in zip(padded, whole + 1, strict=True)])
    crops = crops[:, :-1] * (1 - fy) + crops[:, 1:] * fy
    return np.asarray(crops[:, :, :-1] * (1 - fx) + crops[:, :, 1:] * fx, np.float32)


@lru_cache(maxsize=4096)
def _template(shape: str, radius: float, soft: float, half: int) -> Floats:
    """What `_aligned` gives for the true shape with an edge `soft` pixels wide."""
    g = np.arange(-half, half + 1, dtype=np.float32) / soft
    sharp = world.coverage(shape, g[None], g[:, None], radius / soft)
    return _ramp(_box3(sharp[None])[0])


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many of `total` videos are right, for each attribute and in everything."""

    total: int = 0
    colour: int = 0
    shape: int = 0
    direction: int = 0
    background: int = 0
    everything: int = 0

    def share(self, name: str = "everything") -> float:
        """Share that is right, 0 to 1; 0 when nothing was judged."""
        return float(getattr(self, name)) / self.total if self.total else 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{k: v + getattr(other, k) for k, v in vars(self).items()})


class Failure(NamedTuple):
    """A video that does not show what was asked."""

    scene: Scene
    seed: int | None
    reading: Reading


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """Counts on triples that training showed, on those kept back (`world.kept_back`), and the failures."""

    seen: Counts
    kept_back: Counts
    failures: tuple[Failure, ...] = ()

    @property
    def overall(self) -> Counts:
        """Seen and kept back together."""
        return self.seen + self.kept_back

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: counts, and for each failure what was asked and what was read."""
        rows = {"overall": self.overall, "seen": self.seen, "kept_back": self.kept_back}
        failures = [
            {"prompt": f.scene.prompt(), "seed": f.seed, "why": list(f.reading.why)}
            | {"read": {a: getattr(f.reading, a) for a in ATTRIBUTES}}
            for f in self.failures
        ]
        counts = {k: dict(vars(c)) | {"share": round(c.share(), 4)} for k, c in rows.items()}
        return counts | {"failures": failures}

    def table(self) -> str:
        """Lines of plain text: one row for each attribute, counts and percent."""
        groups = {"all videos": self.overall, "seen in training": self.seen, "kept back": self.kept_back}
        lines = ["right".ljust(12) + "".join(name.rjust(20) for name in groups)]
        for name in (*ATTRIBUTES, "everything"):
            cells = [f"{getattr(c, name)}/{c.total} {c.share(name):7.1%}" for c in groups.values()]
            lines.append(name.ljust(12) + "".join(cell.rjust(20) for cell in cells))
        return "\n".join(lines)


def measure_adherence(
    make: Callable[[str, int], NDArray[np.uint8]],
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    on_result: Callable[[Scene, int, Reading], None] | None = None,
) -> Adherence:
    """Generate `make(prompt, seed)` -> uint8 [F, H, W, 3] for every scene and seed, and judge each.

    A video that the pipeline refuses (QualityError: black, not finite) counts as all wrong.
    """
    asked = [(scene, seed) for seed in seeds for scene in scenes]
    readings = []
    for scene, seed in asked:
        try:
            reading = judge(make(scene.prompt(), seed))
        except QualityError as e:
            reading = Reading(why=(e.got,))
        readings.append(reading)
        if on_result:
            on_result(scene, seed, reading)
    return score(readings, [scene for scene, _ in asked], [seed for _, seed in asked])


def score(readings: Iterable[Reading], scenes: Sequence[Scene], seeds: Sequence[int] = ()) -> Adherence:
    """Count readings against the scenes asked for, in the same order. All lengths must be equal."""
    back = world.kept_back()
    numbers: Sequence[int | None] = seeds or [None] * len(scenes)
    counts, failures = [Counts(), Counts()], []
    for reading, scene, seed in zip(readings, scenes, numbers, strict=True):
        right = reading.right(scene)
        good = all(right.values())
        counts[scene.triple in back] += Counts(
            total=1, everything=int(good), **{k: int(v) for k, v in right.items()}
        )
        if not good:
            failures.append(Failure(scene, seed, reading))
    return Adherence(seen=counts[0], kept_back=counts[1], failures=tuple(failures))


def pick(n: int, rng_seed: int = 0) -> list[Scene]:
    """`n` different scenes, spread evenly over every attribute, with the share of kept-back triples
    that all scenes have (at least one of them from n = 4). Raises UsageError unless 1 <= n <= 432.
    """
    every = list(world.scenes())
    if not 1 <= n <= len(every):
        needs = f"1 to {len(every)} scenes"
        raise UsageError(f"{n} scenes", needs=needs, fix="ask for fewer, or add seeds")
    rng = np.random.default_rng(rng_seed)
    back = world.kept_back()
    pools: dict[bool, list[Scene]] = {True: [], False: []}
    for i in rng.permutation(len(every)):
        pools[every[i].triple in back].append(every[i])
    num_back = round(n * len(pools[True]) / len(every))
    taken: list[Scene] = []
    values = [len({s[a] for s in every}) for a in range(len(ATTRIBUTES))]
    for kept in [True] * num_back + [False] * (n - num_back):
        used = [[s[a] for s in taken] for a in range(len(ATTRIBUTES))]
        best = min(pools[kept], key=lambda s: sum(values[a] * used[a].count(v) for a, v in enumerate(s)))
        pools[kept].remove(best)
        taken.append(best)
    return [taken[i] for i in rng.permutation(n)]
