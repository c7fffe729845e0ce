"""Prompt adherence: whether a video shows its prompt, measured from pixels without a neural judge.

`judge` reads the attributes of one video of the synthetic world (`world.py`), or explains why it cannot.
`measure_adherence` generates and judges many prompts; `score` counts existing readings. `judge` never sees
the prompt, so shuffled prompts must score at chance level.

Method: the background is the median of the border. Pixels that differ from it are the object, as a soft mask
per frame. The mask's centroid gives the path, its middle the colour, and the mean of the masks, aligned by
centroid, is compared with the true shapes.
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
# Lengths are in pixels of a frame with a short side of about 64, colours are 0 to 255.
COLOUR_LIMIT = 70.0  # maximum RGB distance to a named colour; named colours are 144 apart
GROUND_LIMIT = 60.0  # maximum RGB distance to a named background; these are 221 apart
CONTRAST_LIMIT = 60.0  # minimum RGB distance between object and background; 122 in the world
AREA_LIMIT = (0.008, 0.35)  # share of the frame that the object covers
SPREAD_LIMIT = 0.7  # mean square radius * pi / area: circle 0.50, square 0.52, triangle 0.60, a pair > 0.75
SHARE_LIMIT = 0.75  # minimum share of the frames that show one object, and of its pixels with its colour
TRAVEL_LIMIT = 5.0
STEADY_LIMIT = 0.85  # minimum share of the path's variance that uniform motion explains
SIDEWAYS_LIMIT = 0.08  # maximum rms distance from the line, as a share of the travel
SHAPE_LIMIT = 0.85  # minimum soft IoU with the best template
SHAPE_MARGIN = 0.01  # minimum lead over the second-best shape

Floats = NDArray[np.float32]
RGB = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The attributes of a video: names of `world`, or None if unreadable."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None
    reasons: tuple[str, ...] = ()
    """One sentence per unreadable attribute."""

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Attribute -> whether it matches the scene."""
        return {name: getattr(self, name) == getattr(scene, name) for name in ATTRIBUTES}


class Mask(NamedTuple):
    """Where the object is, in the frames that show it."""

    weight: Floats  # [F, h, w], share of the pixel, 0 to 1
    area: Floats  # [F]
    centre: Floats  # [F, 2], x and y in pixel indices
    frame: NDArray[np.intp]  # [F], number of the frame
    complete: NDArray[np.bool_]  # [F], whether the object is clear of the frame's edge

    def only_complete(self, least: int) -> Mask:
        """Only the frames that show the complete object, if at least `least` do: at the edge, its centroid
        is wrong.
        """
        k = self.complete
        if k.sum() < least:
            return self
        return Mask(self.weight[k], self.area[k], self.centre[k], self.frame[k], k[k])


def judge(frames: NDArray[np.uint8]) -> Reading:
    """Read one video, uint8 [F, H, W, 3] with F >= 5. Raises UsageError (E-USE-01) for any other array."""
    video = _shrink(_checked(frames))
    edge = np.concatenate([video[:, (0, -1)].reshape(-1, 3), video[:, :, (0, -1)].reshape(-1, 3)])
    ground = np.median(edge, axis=0)
    uniform = np.median(np.abs(edge - ground), axis=0).max() < 0.5 * GROUND_LIMIT
    background = _nearest(ground, world.BACKGROUNDS, GROUND_LIMIT) if uniform else None
    reason = "" if background else f"background {_rgb(ground)} is not plain {', '.join(world.BACKGROUNDS)}"
    smooth = _box3(video)
    mask = _find_object(smooth, ground.astype(np.float32))
    if isinstance(mask, str):
        return Reading(background=background, reasons=tuple(filter(None, (reason, mask))))
    direction, path_reason = _direction(mask, len(video), min(video.shape[1:3]))
    shape, shape_reason = _shape(mask)
    colour, colour_reason = _colour(smooth, mask)
    return Reading(
        colour=colour,
        shape=shape,
        direction=direction,
        background=background,
        reasons=tuple(filter(None, (reason, path_reason, shape_reason, colour_reason))),
    )


def _checked(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shape, dtype = getattr(frames, "shape", None), getattr(frames, "dtype", None)
    if dtype == np.uint8 and shape and len(shape) == 4 and shape[3] == 3:
        if shape[0] >= MIN_FRAMES and min(shape[1:3]) >= 16:
            return frames
    raise UsageError(
        f"a video of shape {shape} and dtype {dtype or type(frames).__name__}",
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
    """Mean over 3 x 3 pixels of [N, h, w, ...]: removes flicker and most of the noise."""
    p = np.pad(x, [(0, 0), (1, 1), (1, 1)] + [(0, 0)] * (x.ndim - 3), mode="edge")
    p = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    p = p[:, :, :-2] + p[:, :, 1:-1] + p[:, :, 2:]
    return p * np.float32(1 / 9)


def _ramp(x: Floats) -> Floats:
    """Smoothed coverage to weight: steeper around one half, and zero for faint pixels."""
    return np.asarray(np.clip(2 * x - 0.5, 0, 1), np.float32)


def _find_object(smooth: Floats, ground: Floats) -> Mask | str:
    """The object in front of the background, or the reason why there is not exactly one."""
    n, h, w, _ = smooth.shape
    off = smooth - ground
    far = np.sqrt(np.einsum("fhwc,fhwc->fhw", off, off))
    top = h * w - max(h * w // 100, 1)  # index of the 99th percentile
    contrast = float(np.median(np.partition(far.reshape(n, -1), top, axis=1)[:, top]))
    if contrast < CONTRAST_LIMIT:
        return f"no object differs from the background (contrast {contrast:.0f})"
    weight = _ramp(far / contrast)
    area = weight.sum((1, 2))
    typical = float(np.median(area))
    if not AREA_LIMIT[0] < typical / (h * w) < AREA_LIMIT[1]:
        return f"the object covers {typical / (h * w):.1%} of the frame"
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)
    columns, rows, total = weight.sum(1), weight.sum(2), np.maximum(area, 1e-6)
    cx, cy = columns @ x / total, rows @ y / total
    square_radius = columns @ x**2 / total - cx**2 + rows @ y**2 / total - cy**2
    rim = weight[:, (0, -1)].sum((1, 2)) + weight[:, :, (0, -1)].sum((1, 2))
    shown = (area > 0.3 * typical) & (area < 3 * typical)
    single = shown & (square_radius * np.pi / total < SPREAD_LIMIT)
    if shown.sum() < SHARE_LIMIT * n:
        return f"only {shown.sum()} of {n} frames show the object"
    if single.sum() < SHARE_LIMIT * shown.sum():
        return f"more than one object in {shown.sum() - single.sum()} of {shown.sum()} frames"
    centre = np.stack([cx, cy], 1)
    return Mask(weight[single], area[single], centre[single], np.flatnonzero(single), rim[single] < 1)


def _direction(mask: Mask, frames: int, size: int) -> tuple[str | None, str]:
    """(direction of the least-squares line through the centroids, "") or (None, reason)."""
    mask = mask.only_complete(least=max(4, frames // 2))
    t = (mask.frame - mask.frame.mean()).astype(np.float32)
    path = mask.centre - mask.centre.mean(0)
    speed = t @ path / (t @ t)
    step = float(np.hypot(*speed))
    travel = step * (frames - 1)
    if travel < TRAVEL_LIMIT * min(1.0, size / 64):
        return None, f"the object does not move ({travel:.1f} px)"
    unit = speed / step
    steady = 1 - float(((path - t[:, None] * speed) ** 2).sum() / (path**2).sum())
    sideways = math.sqrt(float(((path @ np.array([-unit[1], unit[0]])) ** 2).mean())) / travel
    if steady < STEADY_LIMIT or sideways > SIDEWAYS_LIMIT:
        return None, f"the path is not straight (steady {steady:.2f}, sideways {sideways:.2f})"
    return max(world.DIRECTIONS, key=lambda d: float(unit @ np.array(world.DIRECTIONS[d]))), ""


def _colour(smooth: Floats, mask: Mask) -> tuple[str | None, str]:
    """(median colour well inside the object, "") or (None, reason)."""
    _, h, w, _ = smooth.shape
    dx, dy = np.arange(w) - mask.centre[:, :1], np.arange(h) - mask.centre[:, 1:]
    inner = (dx[:, None, :] ** 2 + dy[:, :, None] ** 2) * np.pi < 0.4 * mask.area[:, None, None]
    pixels = smooth[mask.frame][inner]
    rgb = np.median(pixels, axis=0)
    name = _nearest(rgb, world.COLOURS, COLOUR_LIMIT)
    if name is None:
        return None, f"colour {_rgb(rgb)} is far from every named colour"
    off = pixels - np.array(world.COLOURS[name], np.float32)
    share = float((np.square(off).sum(1) < (1.2 * COLOUR_LIMIT) ** 2).mean())
    if share < SHARE_LIMIT:
        return None, f"only {share:.0%} of the object is {name}"
    return name, ""


def _nearest(rgb: NDArray[Any], names: Mapping[str, RGB], limit: float) -> str | None:
    """Nearest name in RGB, which separates shifted colours of these palettes better than Lab or hue."""
    name = min(names, key=lambda n: math.dist(rgb, names[n]))
    return name if math.dist(rgb, names[name]) < limit else None


def _rgb(values: NDArray[Any]) -> RGB:
    r, g, b = (round(float(v)) for v in values)
    return r, g, b


# Area of each shape at radius 1 (`world.coverage`).
UNIT_AREA = {"circle": math.pi, "square": 4 * 0.92**2, "triangle": 3 * math.sqrt(3) * 0.72**2}


def _shape(mask: Mask) -> tuple[str | None, str]:
    """(shape of the aligned mean mask, "") if both halves of the video agree, or (None, reason)."""
    mask = mask.only_complete(least=2)
    half = 4 * math.ceil((1.7 * math.sqrt(np.median(mask.area) / math.pi) + 2) / 4)
    windows = _aligned(mask, half)
    scores = _shape_scores(windows.mean(0))
    second, best = sorted(scores, key=lambda s: scores[s])[-2:]
    halves = [_shape_scores(part.mean(0)) for part in np.array_split(windows, 2)]
    steady = all(s[best] == max(s.values()) for s in halves)
    if steady and scores[best] >= SHAPE_LIMIT and scores[best] - scores[second] >= SHAPE_MARGIN:
        return best, ""
    return None, "no shape fits in both halves: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items())


def _shape_scores(mean: Floats) -> dict[str, float]:
    """Soft IoU with each shape: the maximum over a small range of sizes and edge widths."""
    area, scores = float(mean.sum()), {}
    for shape, unit_area in UNIT_AREA.items():
        middle = math.sqrt(area / unit_area)
        radii = sorted({round(4 * middle * f) / 4 for f in (0.92, 0.96, 1.0, 1.04, 1.08)})
        t = np.stack([_template(shape, r, soft, len(mean) // 2) for r in radii for soft in (1.0, 3.0)])
        overlap = np.minimum(t, mean).sum((1, 2))
        scores[shape] = float((overlap / (t.sum((1, 2)) + area - overlap)).max())
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
    """The window of `_aligned` for the true shape with an edge `soft` pixels wide."""
    g = np.arange(-half, half + 1, dtype=np.float32) / soft
    sharp = world.coverage(shape, g[None], g[:, None], radius / soft)
    return _ramp(_box3(sharp[None])[0])


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many of `total` videos are right, per attribute and in all of them (`everything`)."""

    total: int = 0
    colour: int = 0
    shape: int = 0
    direction: int = 0
    background: int = 0
    everything: int = 0

    def share(self, name: str = "everything") -> float:
        """Share of right videos, 0 to 1; 0 if there are no videos."""
        return float(getattr(self, name)) / self.total if self.total else 0.0

    def text(self, name: str = "everything") -> str:
        """`38/40   95.0%`; `-` if there are no videos."""
        return f"{getattr(self, name)}/{self.total} {self.share(name):7.1%}" if self.total else "-"

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{k: v + getattr(other, k) for k, v in vars(self).items()})


class Failure(NamedTuple):
    """A video that does not match its scene."""

    scene: Scene
    seed: int | None
    reading: Reading


@dataclass(frozen=True, kw_only=True)
class Adherence:
    """Counts for triples in the training set, for held-out ones (`world.held_out`), and the failures."""

    trained: Counts
    held_out: Counts
    failures: tuple[Failure, ...] = ()

    @property
    def overall(self) -> Counts:
        """The counts over trained and held-out triples."""
        return self.trained + self.held_out

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the counts, and prompt and reading of each failure."""
        rows = {"overall": self.overall, "seen": self.trained, "kept_back": self.held_out}
        failures = [
            {"prompt": f.scene.prompt(), "seed": f.seed, "why": list(f.reading.reasons)}
            | {"read": {a: getattr(f.reading, a) for a in ATTRIBUTES}}
            for f in self.failures
        ]
        counts = {k: dict(vars(c)) | {"share": round(c.share(), 4)} for k, c in rows.items()}
        return counts | {"failures": failures}

    def table(self) -> str:
        """A plain-text table: one row per attribute, with counts and percentages."""
        groups = {"all videos": self.overall, "seen in training": self.trained, "held out": self.held_out}
        lines = ["right".ljust(12) + "".join(name.rjust(20) for name in groups)]
        for name in (*ATTRIBUTES, "everything"):
            lines.append(name.ljust(12) + "".join(c.text(name).rjust(20) for c in groups.values()))
        return "\n".join(lines)


def measure_adherence(
    make: Callable[[str, int], NDArray[np.uint8]],
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    on_result: Callable[[Scene, int, Reading], None] | None = None,
) -> Adherence:
    """Generate `make(prompt, seed)` -> uint8 [F, H, W, 3] for every scene and seed, and judge the videos.

    A video that the pipeline refuses (QualityError: black, or NaN) counts as wrong in every attribute.
    """
    videos = [(scene, seed) for seed in seeds for scene in scenes]
    readings = []
    for scene, seed in videos:
        try:
            reading = judge(make(scene.prompt(), seed))
        except QualityError as e:
            reading = Reading(reasons=(e.got,))
        readings.append(reading)
        if on_result:
            on_result(scene, seed, reading)
    return score(readings, [scene for scene, _ in videos], [seed for _, seed in videos])


def score(readings: Iterable[Reading], scenes: Sequence[Scene], seeds: Sequence[int] = ()) -> Adherence:
    """Count the readings that match `scenes`, which are in the same order. All lengths must be equal."""
    held_out = world.held_out()
    numbers: Sequence[int | None] = seeds or [None] * len(scenes)
    counts, failures = [Counts(), Counts()], []
    for reading, scene, seed in zip(readings, scenes, numbers, strict=True):
        right = reading.matches(scene)
        all_right = all(right.values())
        counts[scene.triple in held_out] += Counts(
            total=1, everything=int(all_right), **{k: int(v) for k, v in right.items()}
        )
        if not all_right:
            failures.append(Failure(scene, seed, reading))
    return Adherence(trained=counts[0], held_out=counts[1], failures=tuple(failures))


def pick(n: int, rng_seed: int = 0) -> list[Scene]:
    """`n` different scenes, balanced over every attribute, with the world's share of held-out triples
    (at least one from n = 4). Raises UsageError (E-USE-01) unless 1 <= n <= 432.
    """
    scenes = list(world.scenes())
    if not 1 <= n <= len(scenes):
        needs = f"1 to {len(scenes)} scenes"
        raise UsageError(f"{n} scenes", needs=needs, fix="use fewer scenes, or more seeds")
    rng = np.random.default_rng(rng_seed)
    held_out = world.held_out()
    pools: dict[bool, list[Scene]] = {True: [], False: []}
    for i in rng.permutation(len(scenes)):
        pools[scenes[i].triple in held_out].append(scenes[i])
    num_held_out = round(n * len(pools[True]) / len(scenes))
    picked: list[Scene] = []
    values = [len({s[a] for s in scenes}) for a in range(len(ATTRIBUTES))]
    for pool in [pools[True]] * num_held_out + [pools[False]] * (n - num_held_out):
        used = [[s[a] for s in picked] for a in range(len(ATTRIBUTES))]
        best = min(pool, key=lambda s: sum(values[a] * used[a].count(v) for a, v in enumerate(s)))
        pool.remove(best)
        picked.append(best)
    return [picked[i] for i in rng.permutation(n)]
