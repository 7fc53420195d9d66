"""Procedural images of several objects, with exact masks and the sentences that name them.

A scene shows two to five coloured, patterned shapes on a textured ground; they may overlap. Every
random number is a function of (seed, number, stream), so that no scene depends on another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from labkit.drawing import SHAPES, compute_coverage, draw_clouds, make_pixel_grid, paint
from labkit.rng import Floats, Keys, draw_between, draw_uniform, make_keys
from labkit.runtime import InputError

TRAINING_SEED, CALIBRATION_SEED, EVALUATION_SEED = 1, 2, 3
"""Each seed serves one purpose, so that no evaluation scene was used to train or to tune."""

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
    """The shape, colour and pattern of an object, in the words that sentences use.

    Example:
        >>> SceneObject("star", "red", "dotted").sentences
        ('star', 'red star', 'dotted star', 'red dotted star')
    """

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


def is_one_word_apart(first: str, second: str) -> bool:
    """Return whether the sentences have the same number of words and differ in one of them.

    Example:
        >>> is_one_word_apart("red star", "blue star"), is_one_word_apart("star", "blue star")
        (True, False)
    """
    a, b = first.split(), second.split()
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


_MAX_OBJECTS = 5
_MIN_VISIBLE_SHARE = 0.65
_MAX_ATTEMPTS = 12


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with its true masks and sentences.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        masks: (N, H, W) bool, the visible part of each object; no two share a pixel.
        objects: the N objects, the hindmost first.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    objects: tuple[SceneObject, ...]

    @cached_property
    def present(self) -> tuple[str, ...]:
        """All sentences that name an object of the scene, sorted."""
        return tuple(sorted({s for scene_object in self.objects for s in scene_object.sentences}))

    @cached_property
    def absent(self) -> tuple[str, ...]:
        """All other sentences of `SCENE_SENTENCES`, sorted."""
        return tuple(s for s in SCENE_SENTENCES if s not in self.present)

    def masks_of(self, sentence: str) -> NDArray[np.bool_]:
        """Return the masks (K, H, W) of the objects that `sentence` names; K may be 0."""
        return self.masks[[sentence in scene_object.sentences for scene_object in self.objects]]

    def sample_sentences(self, seed: int, *, present: int = 3, absent: int = 3) -> tuple[str, ...]:
        """Sample sentences without repetition: `present` true ones, then `absent` false ones.

        Half of the false ones, rounded up, are one word away from a true one; the others are any.
        The scene may have fewer sentences of a kind than asked for; then all of them are given.
        """
        near = {s for s in self.absent for p in self.present if is_one_word_apart(s, p)}
        near_misses = _sample(seed, "near", tuple(sorted(near)), (absent + 1) // 2)
        others = tuple(s for s in self.absent if s not in near_misses)
        return (
            *_sample(seed, "present", self.present, present),
            *near_misses,
            *_sample(seed, "absent", others, absent - len(near_misses)),
        )


@dataclass(frozen=True, eq=False)
class Clip:
    """A scene that moves.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB.
        masks: (T, N, H, W) bool, the visible part of each object; empty while it is hidden.
        objects: the N objects, the hindmost first.
    """

    frames: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, kw_only=True)
class _PlacedObject:
    """An object and its pose.

    `x` and `y` are its centre in pixels from the middle of the image, y upwards; `radius` is in
    pixels and `angle` in radians. All its random numbers come from `key`.
    """

    scene_object: SceneObject
    key: Keys
    x: float
    y: float
    radius: float
    angle: float


def make_object_scene(number: int, *, seed: int, image_size: int = 128) -> Scene:
    """Draw scene `number` of the endless data set of `seed`.

    Args:
        number: at least 0.
        seed: any int; its lower 64 bits count. `EVALUATION_SEED` is for measurements only.
        image_size: width and height in pixels, at least 64.

    Raises:
        InputError: `number` is below 0 or `image_size` below 64.

    Example:
        >>> scene = make_object_scene(0, seed=EVALUATION_SEED)
        >>> scene.image.shape, scene.objects[0].sentences[-1]
        ((128, 128, 3), 'red striped star')
        >>> scene.masks_of("green square").shape
        (1, 128, 128)
    """
    key = _make_scene_key(number, seed, image_size)
    return _render(key, _place_objects(key, image_size), image_size)


def make_object_clip(number: int, *, seed: int, frames: int = 16, image_size: int = 128) -> Clip:
    """Draw the objects of scene `number` in motion.

    Each moves on a straight line and is reflected at the border. Objects pass in front of each
    other, so that one may be hidden for a while.

    Args:
        number: at least 0.
        seed: any int; its lower 64 bits count.
        frames: the number of images, at least 1; the first is the scene itself.
        image_size: width and height in pixels, at least 64.

    Raises:
        InputError: `number`, `image_size` or `frames` is too small.

    Example:
        >>> make_object_clip(0, seed=EVALUATION_SEED, frames=3, image_size=64).frames.shape
        (3, 64, 64, 3)
    """
    if frames < 1:
        raise InputError(f"frames must be at least 1, got {frames}")
    key = _make_scene_key(number, seed, image_size)
    objects = _place_objects(key, image_size)
    scenes = [
        _render(key, [_move(placed, time, image_size) for placed in objects], image_size)
        for time in range(frames)
    ]
    return Clip(
        np.stack([scene.image for scene in scenes]),
        np.stack([scene.masks for scene in scenes]),
        scenes[0].objects,
    )


def _make_scene_key(number: int, seed: int, image_size: int) -> Keys:
    if number < 0:
        raise InputError(f"number must be at least 0, got {number}")
    if image_size < 64:
        raise InputError(f"image_size must be at least 64 pixels, got {image_size}")
    return make_keys(seed, "scene", np.array([number], dtype=np.uint64))


def _sample(seed: int, stream: str, choices: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Sample `count` of `choices` without repetition."""
    key = make_keys(seed, stream, np.array([0], dtype=np.uint64))
    order = np.argsort(draw_uniform(key, "order", max(len(choices), 1))[0], kind="stable")
    return tuple(choices[index] for index in order[:count] if choices)


def _draw_number(key: Keys, stream: str, low: float, high: float) -> float:
    return float(draw_between(key, stream, low, high).item())


def _draw_choice(key: Keys, stream: str, choices: tuple[str, ...]) -> str:
    return choices[int(_draw_number(key, stream, 0, len(choices)))]


def _place_objects(key: Keys, image_size: int) -> list[_PlacedObject]:
    """Place two to five objects, the hindmost first, so that none is hidden too much."""
    objects: list[_PlacedObject] = []
    areas: list[NDArray[np.bool_]] = []
    x, y = make_pixel_grid(image_size)
    for slot in range(2 + int(_draw_number(key, "count", 0, _MAX_OBJECTS - 1))):
        for attempt in range(_MAX_ATTEMPTS):
            placed = _place_object(key, f"{slot} {attempt}", image_size)
            area = _draw_shape(placed, x, y) > 0.5
            if _is_every_area_visible([*areas, area]):
                objects.append(placed)
                areas.append(area)
                break
    return objects


def _place_object(scene_key: Keys, name: str, image_size: int) -> _PlacedObject:
    """Draw the attributes and the pose of one object."""
    key = make_keys(int(scene_key[0]), name, np.array([0], dtype=np.uint64))
    radius = image_size * _draw_number(key, "radius", 0.15, 0.25)
    room = image_size / 2 - 0.85 * radius
    return _PlacedObject(
        scene_object=SceneObject(
            _draw_choice(key, "shape", SCENE_SHAPES),
            _draw_choice(key, "colour", tuple(SCENE_COLOURS)),
            _draw_choice(key, "pattern", SCENE_PATTERNS),
        ),
        key=key,
        x=_draw_number(key, "x", -room, room),
        y=_draw_number(key, "y", -room, room),
        radius=radius,
        angle=_draw_number(key, "angle", -0.6, 0.6),
    )


def _is_every_area_visible(areas: list[NDArray[np.bool_]]) -> bool:
    """Return whether the areas in front of each area, the hindmost first, leave enough of it."""
    covered = np.zeros_like(areas[0])
    for area in reversed(areas):
        if (area & ~covered).sum() < _MIN_VISIBLE_SHARE * area.sum():
            return False
        covered |= area
    return True


def _move(placed: _PlacedObject, time: int, image_size: int) -> _PlacedObject:
    """Move an object for `time` frames at its own velocity."""
    room = image_size / 2 - 0.85 * placed.radius
    heading = _draw_number(placed.key, "heading", -math.pi, math.pi)
    distance = image_size * _draw_number(placed.key, "speed", 0.01, 0.035) * time
    return replace(
        placed,
        x=_reflect(placed.x + distance * math.cos(heading), room),
        y=_reflect(placed.y + distance * math.sin(heading), room),
        angle=placed.angle + time * _draw_number(placed.key, "spin", -0.06, 0.06),
    )


def _reflect(position: float, room: float) -> float:
    """Fold `position` into [-room, room], as mirrors at both ends would."""
    along = (position + room) % (4 * room)
    return min(along, 4 * room - along) - room


def _render(key: Keys, objects: list[_PlacedObject], image_size: int) -> Scene:
    x, y = make_pixel_grid(image_size)
    image = _draw_ground(key, x, y, image_size)
    masks = np.zeros((len(objects), image_size, image_size), dtype=bool)
    for index, placed in enumerate(objects):
        shape = _draw_shape(placed, x, y)
        image = paint(image, _draw_surface(placed, x, y), shape[None])
        masks[index] = shape > 0.5
        masks[:index] &= ~masks[index]
    grain = _draw_number(key, "grain", 0.02, 0.08)
    noise = draw_uniform(key, "noise", image_size, image_size, 1)[0] - 0.5
    levels = image.transpose(1, 2, 0) * _draw_number(key, "light", 0.85, 1.08) + grain * noise
    pixels = (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(pixels, masks, tuple(placed.scene_object for placed in objects))


def _draw_ground(key: Keys, x: Floats, y: Floats, image_size: int) -> Floats:
    """Draw a dull, cloudy, ribbed ground: (3, H, W)."""
    grey = _draw_number(key, "ground", 0.25, 0.55)
    tint = 0.12 * (draw_uniform(key, "tint", 3, 1, 1)[0] - 0.5)
    cloudiness = _draw_number(key, "cloudiness", 0.1, 0.35)
    cloud = cloudiness * draw_clouds(key, "ground", image_size)[0]
    angle = _draw_number(key, "ribs angle", 0, math.pi)
    wave = 2 * math.pi / (image_size * _draw_number(key, "ribs", 0.05, 0.2))
    ribs = np.sin(wave * (x * math.cos(angle) + y * math.sin(angle)))
    ground: Floats = grey + tint + cloud + _draw_number(key, "relief", 0, 0.05) * ribs
    return ground.astype(np.float32)


def _to_object_coordinates(placed: _PlacedObject, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Convert pixels to coordinates of the object, in radii."""
    x, y = (x - placed.x) / placed.radius, (y - placed.y) / placed.radius
    cosine, sine = math.cos(placed.angle), math.sin(placed.angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _draw_shape(placed: _PlacedObject, x: Floats, y: Floats) -> Floats:
    """Return the coverage (H, W) of the object."""
    distance = SHAPES[placed.scene_object.shape](*_to_object_coordinates(placed, x, y))
    return compute_coverage(distance * placed.radius)


def _draw_surface(placed: _PlacedObject, x: Floats, y: Floats) -> Floats:
    """Return the object's colours (3, H, W), shaded and under its pattern, at every pixel."""
    jitter = 0.1 * (draw_uniform(placed.key, "hue", 3)[0] - 0.5)
    colour = np.array(SCENE_COLOURS[placed.scene_object.colour], dtype=np.float32) + jitter
    across, along = _to_object_coordinates(placed, x, y)
    shade = 1 + 0.15 * np.clip(along * _draw_number(placed.key, "shade", -1, 1), -1, 1)
    surface: Floats = colour[:, None, None] * shade * _draw_number(placed.key, "light", 0.88, 1.06)
    if placed.scene_object.pattern == "striped":
        period = _draw_number(placed.key, "period", 0.5, 0.65)
        distance = np.abs(across - period * np.rint(across / period)) - period / 4
        ink = colour[:, None, None] * 0.4
    elif placed.scene_object.pattern == "dotted":
        period = _draw_number(placed.key, "period", 0.5, 0.62)
        cells = (v - period * np.rint(v / period) for v in (across, along))
        distance = np.hypot(*cells) - period * 0.3
        dark_on_white = colour.min() >= 0.6
        ink = np.full((3, 1, 1), 0.12 if dark_on_white else 0.95, dtype=np.float32)
    else:
        return surface
    return paint(surface, ink, compute_coverage(distance * placed.radius)[None])
