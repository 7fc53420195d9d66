"""Procedural pictures, drawn by code: the data that the `demo` profile carries with it.

Shapes are signed distance functions: negative inside, in units of the shape's radius, y upwards.
They are evaluated for a whole batch at once and turned into anti-aliased coverage. Every random
number is a function of (seed, picture, stream), so that no picture depends on the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from labkit.runtime import InputError

Floats = npt.NDArray[np.float32]
Keys = npt.NDArray[np.uint64]
Labels = npt.NDArray[np.int64]
Images = npt.NDArray[np.uint8]

_SIDE = 32
_BATCH = 128  # pictures drawn at once: their planes fit into the processor's cache
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32).reshape(3, 1, 1)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _length(x: Floats, y: Floats) -> Floats:
    length: Floats = np.sqrt(x * x + y * y)
    return length


def _circle(x: Floats, y: Floats) -> Floats:
    return _length(x, y) - 0.85


def _ring(x: Floats, y: Floats) -> Floats:
    distance: Floats = np.abs(_length(x, y) - 0.7) - 0.2
    return distance


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(math.sqrt(0.75) * np.abs(x) + 0.5 * y, -y) - 0.55


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.28)


def _star(x: Floats, y: Floats) -> Floats:
    """Five points: mirrored at its axes into half a point, which has one straight edge."""
    x = np.abs(x)
    for degrees in (-18, 54):
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        below = 2 * np.minimum(y * cosine - x * sine, 0)
        x, y = x + below * sine, y - below * cosine
    return 0.946 * np.abs(x) + 0.326 * (y - 1.1)


def _heart(x: Floats, y: Floats) -> Floats:
    """Two lobes, and a corner at the foot whose sides touch them."""
    x = np.abs(x)
    lobe = _length(x - 0.47, y - 0.35) - 0.55
    corner = np.maximum(x - y - 0.9, x + y - 0.82) * math.sqrt(0.5)
    return np.minimum(lobe, np.maximum(corner, y - 0.6))


def _moon(x: Floats, y: Floats) -> Floats:
    return np.maximum(_length(x, y) - 1, 0.75 - _length(x - 0.5, y))


def _stripes(x: Floats, y: Floats) -> Floats:
    return np.maximum(_bars(x), _length(x, y) - 1)


def _checkerboard(x: Floats, y: Floats) -> Floats:
    across, along = _bars(x), _bars(y)
    fields = np.minimum(np.maximum(across, along), np.maximum(-across, -along))
    return np.maximum(fields, _length(x, y) - 1)


def _bars(x: Floats) -> Floats:
    """Bars of width 0.4 with gaps as wide, one of them centred on 0."""
    distance: Floats = np.abs(x - 0.8 * np.rint(x / 0.8)) - 0.2
    return distance


_SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "stripes": _stripes,
    "checkerboard": _checkerboard,
}

SCENE_CLASSES: tuple[str, ...] = tuple(_SHAPES)


def classification_scenes(count: int, *, seed: int, start: int = 0) -> tuple[Images, Labels]:
    """Pictures `start` ... `start + count - 1` of the endless data set that `seed` names.

    Each shows one object of its class near the middle, tilted by up to 90 degrees, in any colour,
    on a textured background with strokes behind it and a spot before it. Every ten pictures from
    a multiple of ten on hold each class once, in random order. Disjoint ranges of one seed serve
    as training and test sets. No class turns into another when mirrored.

    Args:
        count: at least 1.
        seed: any int; its lower 64 bits count.
        start: at least 0.

    Returns:
        Images (count, 32, 32, 3) uint8 RGB, and labels (count,) int64 into `SCENE_CLASSES`.

    Raises:
        InputError: `count` is below 1 or `start` below 0.
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if start < 0:
        raise InputError(f"start must be at least 0, got {start}")
    numbers = np.arange(start, start + count, dtype=np.uint64)
    labels = _labels(numbers, seed)
    keys = _keys(seed, "picture", numbers)
    images = np.empty((count, _SIDE, _SIDE, 3), dtype=np.uint8)
    for first in range(0, count, _BATCH):
        batch = slice(first, first + _BATCH)
        images[batch] = _draw(keys[batch], labels[batch])
    return images, labels


def _labels(numbers: Keys, seed: int) -> Labels:
    """Labels (B,) of the pictures `numbers` (B,)."""
    tens, places = np.divmod(numbers, np.uint64(len(SCENE_CLASSES)))
    draws = _uniform(_keys(seed, "labels", tens), "order", len(SCENE_CLASSES))
    orders: Labels = np.argsort(draws, axis=1, kind="stable").astype(np.int64)
    return np.take_along_axis(orders, places.astype(np.int64)[:, None], axis=1)[:, 0]


def _draw(keys: Keys, labels: Labels) -> Images:
    """Pictures (B, 32, 32, 3), one for each key and label."""
    x, y = _pixel_grid(_SIDE)
    dark = _between(keys, "dark", 0.12, 0.5)
    light = dark + _between(keys, "difference", 0.22, 0.42)
    lighter = _between(keys, "polarity", 0, 1) < 0.9
    image = _surface(keys, "background", np.where(lighter, dark, light), x, y)
    image = image + _between(keys, "cloudiness", 0.05, 0.3) * _clouds(keys, "background", _SIDE)
    for name in ("stroke 1", "stroke 2", "stroke 3"):
        opacity = _between(keys, f"{name} opacity", 0.3, 0.9) * _stroke(keys, name, x, y)
        image = _paint(image, _any_colour(keys, name), opacity)
    surface = _surface(keys, "object", np.where(lighter, light, dark), x, y)
    image = _paint(image, surface, _object(keys, labels, x, y))
    image = _paint(image, _any_colour(keys, "spot"), _spot(keys, "spot", x, y))
    return _expose(image, keys)


def _object(keys: Keys, labels: Labels, x: Floats, y: Floats) -> Floats:
    """Coverage (B, 1, H, W) of the object that each label names."""
    radius = _between(keys, "radius", 8, 13.5)
    room = 0.55 * (_SIDE / 2 - 0.9 * radius)
    x = x - room * _between(keys, "x", -1, 1)
    y = y - room * _between(keys, "y", -1, 1)
    angle = _between(keys, "angle", -math.pi / 2, math.pi / 2)
    side = np.copysign(1, _between(keys, "side", -1, 1))
    along = (x * np.cos(angle) + y * np.sin(angle)) / radius * side
    across = (y * np.cos(angle) - x * np.sin(angle)) / radius
    stretch = _between(keys, "stretch", 0.92, 1.09)
    along, across = along * stretch, across / stretch
    distance = np.empty_like(along)
    for label, shape in enumerate(_SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(along[chosen], across[chosen])
    return _coverage(distance * radius)


def _stroke(keys: Keys, name: str, x: Floats, y: Floats) -> Floats:
    """Coverage (B, 1, H, W) of a line with round ends."""
    x = x - _between(keys, f"{name} x", -16, 16)
    y = y - _between(keys, f"{name} y", -16, 16)
    angle = _between(keys, f"{name} angle", 0, math.pi)
    length = _between(keys, f"{name} length", 2, 14)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    beyond = along - np.clip(along, -length, length)
    return _coverage(_length(beyond, across) - _between(keys, f"{name} width", 0.5, 1.8))


def _spot(keys: Keys, name: str, x: Floats, y: Floats) -> Floats:
    """Coverage (B, 1, H, W) of a small disc."""
    x = x - _between(keys, f"{name} x", -14, 14)
    y = y - _between(keys, f"{name} y", -14, 14)
    return _coverage(_length(x, y) - _between(keys, f"{name} radius", 1, 2.5))


def _coverage(distance: Floats) -> Floats:
    """Share of each pixel that is inside, from the distance of its centre in pixels."""
    return np.clip(0.5 - distance, 0, 1)


def _paint(image: Floats, colour: Floats, opacity: Floats) -> Floats:
    return image + opacity * (colour - image)


def _colour(keys: Keys, name: str, luminance: Floats) -> Floats:
    """Colours (B, 3, 1, 1) of a luminance (B, 1, 1, 1), of any hue and saturation."""
    chroma = _uniform(keys, f"{name} hue", 3, 1, 1)
    chroma = chroma - (chroma * _LUMA).sum(axis=1, keepdims=True)
    colour: Floats = luminance + _between(keys, f"{name} saturation", 0.1, 0.9) * chroma
    return colour


def _any_colour(keys: Keys, name: str) -> Floats:
    return _colour(keys, name, _between(keys, f"{name} luminance", 0.15, 0.85))


def _surface(keys: Keys, name: str, luminance: Floats, x: Floats, y: Floats) -> Floats:
    """A colour of that `luminance` mid-picture, and a gradient away from there: (B, 3, H, W)."""
    angle = _between(keys, f"{name} angle of gradient", -math.pi, math.pi)
    slope = _uniform(keys, f"{name} gradient", 3, 1, 1) * (0.3 / _SIDE)
    gradient: Floats = slope * (x * np.cos(angle) + y * np.sin(angle))
    return _colour(keys, name, luminance) + gradient


def _clouds(keys: Keys, name: str, side: int) -> Floats:
    """Smooth noise (B, 1, side, side) in [-0.5, 0.5], between random values at 6 by 6 nodes."""
    values = _uniform(keys, f"{name} clouds", 1, 6, 6) - 0.5
    places = np.linspace(0, 5, side, endpoint=False, dtype=np.float32)
    node = places.astype(np.int64)
    share = (places - node).astype(np.float32)
    share = share * share * (3 - 2 * share)
    upper, lower = values[:, :, node], values[:, :, node + 1]
    rows = _paint(upper, lower, share[:, None])
    return _paint(rows[..., node], rows[..., node + 1], share)


def _expose(image: Floats, keys: Keys) -> Images:
    """Contrast, brightness and noise: (B, 3, H, W) in about [0, 1] to (B, H, W, 3)."""
    contrast, brightness = (
        _between(keys, "contrast", 0.6, 1.2),
        _between(keys, "brightness", 0.4, 0.6),
    )
    image = (image - 0.5) * contrast + brightness
    height, width = image.shape[2:]
    noise = _bits(keys, "noise", height, width, 1).view(np.uint16)[..., :3] * np.float32(2**-16)
    levels = image.transpose(0, 2, 3, 1) + _between(keys, "grain", 0.02, 0.2) * (noise - 0.5)
    return (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)


def _pixel_grid(side: int) -> tuple[Floats, Floats]:
    """Pixel centres seen from mid-picture, x to the right (W,), y upwards (H, 1)."""
    centres = np.arange(side, dtype=np.float32) - (side - 1) / 2
    return centres, -centres[:, None]


def _between(keys: Keys, stream: str, low: float, high: float) -> Floats:
    """One number in [low, high) for each key: (B, 1, 1, 1)."""
    return low + (high - low) * _uniform(keys, stream, 1, 1, 1)


def _uniform(keys: Keys, stream: str, *shape: int) -> Floats:
    """Numbers in [0, 1), multiples of 2**-24: (B, *shape)."""
    whole = (_bits(keys, stream, *shape) >> np.uint64(40)).astype(np.float32)
    return whole * 2**-24


def _bits(keys: Keys, stream: str, *shape: int) -> Keys:
    """64 random bits each: (B, *shape)."""
    starts = _mix(keys ^ _hash(stream))
    steps = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * _GAMMA
    return _mix(starts[:, None] + steps).reshape(-1, *shape)


def _keys(seed: int, stream: str, numbers: Keys) -> Keys:
    """A key (B,) for each of `numbers` (B,)."""
    return _mix(numbers * _GAMMA + _hash(f"{seed % 2**64} {stream}"))


def _hash(text: str) -> np.uint64:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mix(bits: Keys) -> Keys:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
