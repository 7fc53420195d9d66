"""Procedural pictures of several objects, with exact masks and the sentences that name them.

A scene shows two to five textured, coloured shapes on a textured ground; they may overlap. Every
random number is a function of (seed, number, stream), so that no scene depends on another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from labkit.drawing import SHAPES, clouds, coverage, paint, pixel_grid
from labkit.rng import Floats, Keys, draw_between, draw_uniform, make_keys
from labkit.runtime import InputError

TRAINING_SEED, CALIBRATION_SEED, EVALUATION_SEED = 1, 2, 3
"""Scenes of one seed serve one purpose: what is evaluated on was never trained or tuned on."""

SCENE_SHAPES = ("circle", "square", "triangle", "star")
SCENE_PATTERNS = ("plain", "striped", "dotted")
SCENE_COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.13, 0.13),
    "yellow": (0.93, 0.82, 0.12),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.15, 0.30, 0.88),
    "purple": (0.62, 0.20, 0.75),
    "white": (0.94, 0.94, 0.94),
}


@dataclass(frozen=True)
class SceneObject:
    """What an object looks like, in the words that sentences use."""

    shape: str
    colour: str
    pattern: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The four sentences that name the object, from the least to the most specific."""
        return (
            self.shape,
            f"{self.colour} {self.shape}",
            f"{self.pattern} {self.shape}",
            f"{self.colour} {self.pattern} {self.shape}",
        )


SCENE_SENTENCES: tuple[str, ...] = tuple(
    sorted(
        {
            sentence
            for shape in SCENE_SHAPES
            for colour in SCENE_COLOURS
            for pattern in SCENE_PATTERNS
            for sentence in SceneObject(shape, colour, pattern).sentences
        }
    )
)


def one_word_apart(first: str, second: str) -> bool:
    """Whether the sentences are as long as each other and differ in one word."""
    a, b = first.split(), second.split()
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


_MOST_OBJECTS = 5
_LEAST_VISIBLE = 0.65
_TRIES = 12


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with its truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        masks: (N, H, W) bool, the visible part of each object; no two share a pixel.
        objects: what each mask shows.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    objects: tuple[SceneObject, ...]

    @cached_property
    def present(self) -> tuple[str, ...]:
        """All sentences that name something in the picture, sorted."""
        return tuple(sorted({s for thing in self.objects for s in thing.sentences}))

    @cached_property
    def absent(self) -> tuple[str, ...]:
        """All sentences of the vocabulary that name nothing in the picture, sorted."""
        return tuple(s for s in SCENE_SENTENCES if s not in self.present)

    def masks_of(self, sentence: str) -> NDArray[np.bool_]:
        """Masks (K, H, W) of the objects that `sentence` names; K is 0 if it names none."""
        return self.masks[[sentence in thing.sentences for thing in self.objects]]

    def sample_sentences(self, seed: int, *, present: int = 3, absent: int = 3) -> tuple[str, ...]:
        """Sentences to ask: `present` that are true of the scene, then `absent` that are not.

        Half of the absent ones, rounded up, miss an object of the picture by one word; the others
        are any. Fewer are given where there are not as many.
        """
        near = {s for s in self.absent for p in self.present if one_word_apart(s, p)}
        half = (absent + 1) // 2
        close = _drawn(seed, "near", tuple(sorted(near)), half)
        rest = tuple(s for s in self.absent if s not in close)
        return (
            *_drawn(seed, "present", self.present, present),
            *close,
            *_drawn(seed, "absent", rest, absent - len(close)),
        )


@dataclass(frozen=True, eq=False)
class Clip:
    """A scene that moves.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        masks: (T, N, H, W) bool, the visible part of each object; empty while it is hidden.
        objects: what each mask shows.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """An object in its place: centre in pixels from mid-picture, y upwards; angle in radians."""

    looks: SceneObject
    key: Keys
    x: float
    y: float
    radius: float
    angle: float


def make_object_scene(number: int, *, seed: int, side: int = 128) -> Scene:
    """Scene `number` of the endless data set that `seed` names.

    Args:
        number: at least 0.
        seed: any int; its lower 64 bits count. `EVALUATION_SEED` is for measurements only.
        side: width and height in pixels, at least 64.

    Raises:
        InputError: `number` is below 0 or `side` below 64.
    """
    key = _scene_key(number, seed, side)
    placed, _ = _layout(key, side)
    return _render(key, placed, side)


def make_object_clip(number: int, *, seed: int, frames: int = 16, side: int = 128) -> Clip:
    """The objects of scene `number` in motion: each on a straight line, reflected at the border.

    They pass in front of each other, so that an object may be hidden for a while.

    Raises:
        InputError: `number` is below 0, `side` below 64 or `frames` below 1.
    """
    if frames < 1:
        raise InputError(f"frames must be at least 1, got {frames}")
    key = _scene_key(number, seed, side)
    placed, _ = _layout(key, side)
    scenes = [
        _render(key, [_moved(thing, time, side) for thing in placed], side)
        for time in range(frames)
    ]
    return Clip(
        np.stack([scene.image for scene in scenes]),
        np.stack([scene.masks for scene in scenes]),
        scenes[0].objects,
    )


def _scene_key(number: int, seed: int, side: int) -> Keys:
    if number < 0:
        raise InputError(f"number must be at least 0, got {number}")
    if side < 64:
        raise InputError(f"side must be at least 64 pixels, got {side}")
    return make_keys(seed, "scene", np.array([number], dtype=np.uint64))


def _drawn(seed: int, stream: str, choices: tuple[str, ...], count: int) -> tuple[str, ...]:
    """`count` of `choices` at random, without repetition."""
    key = make_keys(seed, stream, np.array([0], dtype=np.uint64))
    order = np.argsort(draw_uniform(key, "order", max(len(choices), 1))[0], kind="stable")
    return tuple(choices[index] for index in order[:count] if choices)


def _number(key: Keys, stream: str, low: float, high: float) -> float:
    return float(draw_between(key, stream, low, high).item())


def _choice(key: Keys, stream: str, choices: tuple[str, ...]) -> str:
    return choices[int(_number(key, stream, 0, len(choices)))]


def _layout(key: Keys, side: int) -> tuple[list[_Placed], list[NDArray[np.bool_]]]:
    """Objects, the hindmost first, of which none is hidden too much; and their full areas."""
    placed: list[_Placed] = []
    areas: list[NDArray[np.bool_]] = []
    x, y = pixel_grid(side)
    for slot in range(2 + int(_number(key, "count", 0, _MOST_OBJECTS - 1))):
        for attempt in range(_TRIES):
            thing = _proposal(key, f"{slot} {attempt}", side)
            area = _cover(thing, x, y) > 0.5
            if _all_visible([*areas, area]):
                placed.append(thing)
                areas.append(area)
                break
    return placed, areas


def _proposal(key: Keys, name: str, side: int) -> _Placed:
    own = make_keys(int(key[0]), name, np.array([0], dtype=np.uint64))
    radius = side * _number(own, "radius", 0.15, 0.25)
    room = side / 2 - 0.85 * radius
    looks = SceneObject(
        _choice(own, "shape", SCENE_SHAPES),
        _choice(own, "colour", tuple(SCENE_COLOURS)),
        _choice(own, "pattern", SCENE_PATTERNS),
    )
    return _Placed(
        looks=looks,
        key=own,
        x=_number(own, "x", -room, room),
        y=_number(own, "y", -room, room),
        radius=radius,
        angle=_number(own, "angle", -0.6, 0.6),
    )


def _all_visible(areas: list[NDArray[np.bool_]]) -> bool:
    """Whether enough of each area, the hindmost first, is left by those before it."""
    covered = np.zeros_like(areas[0])
    for area in reversed(areas):
        if (area & ~covered).sum() < _LEAST_VISIBLE * area.sum():
            return False
        covered |= area
    return True


def _moved(thing: _Placed, time: int, side: int) -> _Placed:
    """`thing` after `time` frames at its own velocity."""
    room = side / 2 - 0.85 * thing.radius
    heading = _number(thing.key, "heading", -math.pi, math.pi)
    step = side * _number(thing.key, "speed", 0.01, 0.035) * time
    return replace(
        thing,
        x=_reflected(thing.x + step * math.cos(heading), room),
        y=_reflected(thing.y + step * math.sin(heading), room),
        angle=thing.angle + time * _number(thing.key, "spin", -0.06, 0.06),
    )


def _reflected(place: float, room: float) -> float:
    """`place` folded into [-room, room], as by mirrors at both ends."""
    along = (place + room) % (4 * room)
    return min(along, 4 * room - along) - room


def _render(key: Keys, placed: list[_Placed], side: int) -> Scene:
    x, y = pixel_grid(side)
    image = _ground(key, x, y, side)
    masks = np.zeros((len(placed), side, side), dtype=bool)
    for index, thing in enumerate(placed):
        covered = _cover(thing, x, y)
        image = paint(image, _surface(thing, x, y), covered[None])
        masks[index] = covered > 0.5
        masks[:index] &= ~masks[index]
    grain = _number(key, "grain", 0.02, 0.08)
    noise = draw_uniform(key, "noise", side, side, 1)[0] - 0.5
    levels = image.transpose(1, 2, 0) * _number(key, "light", 0.85, 1.08) + grain * noise
    pixels = (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(pixels, masks, tuple(thing.looks for thing in placed))


def _ground(key: Keys, x: Floats, y: Floats, side: int) -> Floats:
    """A dull, cloudy, ribbed ground: (3, H, W)."""
    grey = _number(key, "ground", 0.25, 0.55)
    tint = 0.12 * (draw_uniform(key, "tint", 3, 1, 1)[0] - 0.5)
    cloud = _number(key, "cloudiness", 0.1, 0.35) * clouds(key, "ground", side)[0]
    angle = _number(key, "ribs angle", 0, math.pi)
    wave = 2 * math.pi / (side * _number(key, "ribs", 0.05, 0.2))
    ribs = np.sin(wave * (x * math.cos(angle) + y * math.sin(angle)))
    ground: Floats = grey + tint + cloud + _number(key, "relief", 0, 0.05) * ribs
    return ground.astype(np.float32)


def _local(thing: _Placed, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Coordinates in radii, seen from the object."""
    x, y = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    cosine, sine = math.cos(thing.angle), math.sin(thing.angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _cover(thing: _Placed, x: Floats, y: Floats) -> Floats:
    """Coverage (H, W) of the object."""
    distance = SHAPES[thing.looks.shape](*_local(thing, x, y))
    return coverage(distance * thing.radius)


def _surface(thing: _Placed, x: Floats, y: Floats) -> Floats:
    """Colour (3, H, W) of the object, everywhere: its hue, shaded, under its pattern."""
    jitter = 0.1 * (draw_uniform(thing.key, "hue", 3)[0] - 0.5)
    colour = np.array(SCENE_COLOURS[thing.looks.colour], dtype=np.float32) + jitter
    across, along = _local(thing, x, y)
    shade = 1 + 0.15 * np.clip(along * _number(thing.key, "shade", -1, 1), -1, 1)
    surface: Floats = colour[:, None, None] * shade * _number(thing.key, "light", 0.88, 1.06)
    marks = _marks(thing, across, along)
    ink = colour[:, None, None] * 0.4 if thing.looks.pattern == "striped" else _dot_colour(colour)
    return paint(surface, ink, marks[None])


def _dot_colour(colour: Floats) -> Floats:
    """Dots are near-white on a colour, and near-black on white."""
    dot = 0.95 if colour.min() < 0.6 else 0.12
    return np.full((3, 1, 1), dot, dtype=np.float32)


def _marks(thing: _Placed, across: Floats, along: Floats) -> Floats:
    """Coverage (H, W) of the pattern's marks; none on a plain object."""
    if thing.looks.pattern == "striped":
        period = _number(thing.key, "period", 0.5, 0.65)
        distance = np.abs(across - period * np.rint(across / period)) - period / 4
    elif thing.looks.pattern == "dotted":
        period = _number(thing.key, "period", 0.5, 0.62)
        cells = (v - period * np.rint(v / period) for v in (across, along))
        distance = np.hypot(*cells) - period * 0.3
    else:
        return np.zeros((1, 1), dtype=np.float32)
    return coverage(distance * thing.radius)
