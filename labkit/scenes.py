"""Procedural images of ten classes; the `demo` profile trains its classifier on them."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from labkit.drawing import (
    SHAPES,
    Images,
    compute_coverage,
    draw_clouds,
    make_pixel_grid,
    norm,
    paint,
)
from labkit.rng import Floats, Keys, draw_between, draw_bits, draw_uniform, make_keys
from labkit.runtime import InputError

Labels = npt.NDArray[np.int64]

_IMAGE_SIZE = 32
_BATCH_SIZE = 128  # images drawn at once, so that they fit into the processor's cache
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32).reshape(3, 1, 1)

SCENE_CLASSES: tuple[str, ...] = tuple(SHAPES)


def make_classification_scenes(count: int, *, seed: int, start: int = 0) -> tuple[Images, Labels]:
    """Draw images `start` ... `start + count - 1` of the endless data set of `seed`.

    An image shows one object of its class near the middle. The object is tilted by up to 90
    degrees and has any colour; there are strokes behind it and a spot in front of it. Every ten
    images, counted from a multiple of ten, hold each class once in random order. Disjoint ranges
    of one seed serve as training set and test set. A mirrored image keeps its class.

    Args:
        count: at least 1.
        seed: any int; its lower 64 bits count.
        start: at least 0.

    Returns:
        Images (count, 32, 32, 3) uint8 RGB, and labels (count,) int64, which index
        `SCENE_CLASSES`.

    Raises:
        InputError: `count` is below 1 or `start` below 0.

    Example:
        >>> images, labels = make_classification_scenes(20, seed=0)
        >>> images.shape, sorted(labels[:10].tolist())
        ((20, 32, 32, 3), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if start < 0:
        raise InputError(f"start must be at least 0, got {start}")
    numbers = np.arange(start, start + count, dtype=np.uint64)
    labels = _draw_labels(numbers, seed)
    keys = make_keys(seed, "picture", numbers)
    images = np.empty((count, _IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8)
    for first in range(0, count, _BATCH_SIZE):
        batch = slice(first, first + _BATCH_SIZE)
        images[batch] = _draw_images(keys[batch], labels[batch])
    return images, labels


def _draw_labels(numbers: Keys, seed: int) -> Labels:
    """Draw the labels (B,) of the images with these `numbers` (B,)."""
    tens, positions = np.divmod(numbers, np.uint64(len(SCENE_CLASSES)))
    draws = draw_uniform(make_keys(seed, "labels", tens), "order", len(SCENE_CLASSES))
    orders: Labels = np.argsort(draws, axis=1, kind="stable").astype(np.int64)
    return np.take_along_axis(orders, positions.astype(np.int64)[:, None], axis=1)[:, 0]


def _draw_images(keys: Keys, labels: Labels) -> Images:
    """Draw images (B, 32, 32, 3), one for each key and label."""
    x, y = make_pixel_grid(_IMAGE_SIZE)
    dark = draw_between(keys, "dark", 0.12, 0.5)
    light = dark + draw_between(keys, "difference", 0.22, 0.42)
    lighter = draw_between(keys, "polarity", 0, 1) < 0.9
    image = _draw_surface(keys, "background", np.where(lighter, dark, light), x, y)
    cloudiness = draw_between(keys, "cloudiness", 0.05, 0.3)
    image = image + cloudiness * draw_clouds(keys, "background", _IMAGE_SIZE)
    for name in ("stroke 1", "stroke 2", "stroke 3"):
        opacity = draw_between(keys, f"{name} opacity", 0.3, 0.9) * _draw_stroke(keys, name, x, y)
        image = paint(image, _draw_any_colour(keys, name), opacity)
    surface = _draw_surface(keys, "object", np.where(lighter, light, dark), x, y)
    image = paint(image, surface, _draw_object(keys, labels, x, y))
    image = paint(image, _draw_any_colour(keys, "spot"), _draw_spot(keys, "spot", x, y))
    return _expose(image, keys)


def _draw_object(keys: Keys, labels: Labels, x: Floats, y: Floats) -> Floats:
    """Return the coverage (B, 1, H, W) of an object of each label."""
    radius = draw_between(keys, "radius", 8, 13.5)
    room = 0.55 * (_IMAGE_SIZE / 2 - 0.9 * radius)
    x = x - room * draw_between(keys, "x", -1, 1)
    y = y - room * draw_between(keys, "y", -1, 1)
    angle = draw_between(keys, "angle", -math.pi / 2, math.pi / 2)
    mirror = np.copysign(1, draw_between(keys, "side", -1, 1))
    along = (x * np.cos(angle) + y * np.sin(angle)) / radius * mirror
    across = (y * np.cos(angle) - x * np.sin(angle)) / radius
    stretch = draw_between(keys, "stretch", 0.92, 1.09)
    along, across = along * stretch, across / stretch
    distance = np.empty_like(along)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(along[chosen], across[chosen])
    return compute_coverage(distance * radius)


def _draw_stroke(keys: Keys, name: str, x: Floats, y: Floats) -> Floats:
    """Return the coverage (B, 1, H, W) of a line with round ends."""
    x = x - draw_between(keys, f"{name} x", -16, 16)
    y = y - draw_between(keys, f"{name} y", -16, 16)
    angle = draw_between(keys, f"{name} angle", 0, math.pi)
    length = draw_between(keys, f"{name} length", 2, 14)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    beyond = along - np.clip(along, -length, length)
    return compute_coverage(norm(beyond, across) - draw_between(keys, f"{name} width", 0.5, 1.8))


def _draw_spot(keys: Keys, name: str, x: Floats, y: Floats) -> Floats:
    """Return the coverage (B, 1, H, W) of a small disc."""
    x = x - draw_between(keys, f"{name} x", -14, 14)
    y = y - draw_between(keys, f"{name} y", -14, 14)
    return compute_coverage(norm(x, y) - draw_between(keys, f"{name} radius", 1, 2.5))


def _draw_colour(keys: Keys, name: str, luminance: Floats) -> Floats:
    """Draw colours (B, 3, 1, 1) of any hue and saturation with this luminance (B, 1, 1, 1)."""
    chroma = draw_uniform(keys, f"{name} hue", 3, 1, 1)
    chroma = chroma - (chroma * _LUMA).sum(axis=1, keepdims=True)
    colour: Floats = luminance + draw_between(keys, f"{name} saturation", 0.1, 0.9) * chroma
    return colour


def _draw_any_colour(keys: Keys, name: str) -> Floats:
    return _draw_colour(keys, name, draw_between(keys, f"{name} luminance", 0.15, 0.85))


def _draw_surface(keys: Keys, name: str, luminance: Floats, x: Floats, y: Floats) -> Floats:
    """Draw a colour gradient (B, 3, H, W) that has this `luminance` in the middle."""
    angle = draw_between(keys, f"{name} angle of gradient", -math.pi, math.pi)
    slope = draw_uniform(keys, f"{name} gradient", 3, 1, 1) * (0.3 / _IMAGE_SIZE)
    gradient: Floats = slope * (x * np.cos(angle) + y * np.sin(angle))
    return _draw_colour(keys, name, luminance) + gradient


def _expose(image: Floats, keys: Keys) -> Images:
    """Vary contrast and brightness, add noise: (B, 3, H, W) in about [0, 1] to (B, H, W, 3)."""
    contrast = draw_between(keys, "contrast", 0.6, 1.2)
    image = (image - 0.5) * contrast + draw_between(keys, "brightness", 0.4, 0.6)
    height, width = image.shape[2:]
    noise = draw_bits(keys, "noise", height, width, 1).view(np.uint16)[..., :3] * np.float32(2**-16)
    levels = image.transpose(0, 2, 3, 1) + draw_between(keys, "grain", 0.02, 0.2) * (noise - 0.5)
    return (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)
