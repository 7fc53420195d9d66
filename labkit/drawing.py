"""Shapes and textures for the procedural images.

A shape is a signed distance function of x and y in units of the shape's radius, y upwards; it is
negative inside. It takes a whole batch at once, and `compute_coverage` turns its distances into
smooth edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from labkit.rng import Floats, Keys, draw_uniform

Images = npt.NDArray[np.uint8]


def norm(x: Floats, y: Floats) -> Floats:
    """Return the distance of each point from the origin."""
    distance: Floats = np.sqrt(x * x + y * y)
    return distance


def _circle(x: Floats, y: Floats) -> Floats:
    return norm(x, y) - 0.85


def _ring(x: Floats, y: Floats) -> Floats:
    distance: Floats = np.abs(norm(x, y) - 0.7) - 0.2
    return distance


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.75


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(math.sqrt(0.75) * np.abs(x) + 0.5 * y, -y) - 0.55


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.28)


def _star(x: Floats, y: Floats) -> Floats:
    """Five points: mirrors fold the plane onto half a point, which has one straight edge."""
    x = np.abs(x)
    for degrees in (-18, 54):
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        below = 2 * np.minimum(y * cosine - x * sine, 0)
        x, y = x + below * sine, y - below * cosine
    return 0.946 * np.abs(x) + 0.326 * (y - 1.1)


def _heart(x: Floats, y: Floats) -> Floats:
    """Two lobes and the corner below them, whose sides touch the lobes."""
    x = np.abs(x)
    lobe = norm(x - 0.47, y - 0.35) - 0.55
    corner = np.maximum(x - y - 0.9, x + y - 0.82) * math.sqrt(0.5)
    return np.minimum(lobe, np.maximum(corner, y - 0.6))


def _moon(x: Floats, y: Floats) -> Floats:
    return np.maximum(norm(x, y) - 1, 0.75 - norm(x - 0.5, y))


def _stripes(x: Floats, y: Floats) -> Floats:
    return np.maximum(_bars(x), norm(x, y) - 1)


def _checkerboard(x: Floats, y: Floats) -> Floats:
    across, along = _bars(x), _bars(y)
    fields = np.minimum(np.maximum(across, along), np.maximum(-across, -along))
    return np.maximum(fields, norm(x, y) - 1)


def _bars(x: Floats) -> Floats:
    """Bars of width 0.4 with gaps as wide, one of them centred on 0."""
    distance: Floats = np.abs(x - 0.8 * np.rint(x / 0.8)) - 0.2
    return distance


SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
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


def compute_coverage(distance: Floats) -> Floats:
    """Return the share of each pixel that lies inside, from the distance of its centre in pixels.

    Example:
        >>> compute_coverage(np.array([-3.0, 0.0, 0.25, 3.0])).tolist()
        [1.0, 0.5, 0.25, 0.0]
    """
    return np.clip(0.5 - distance, 0, 1)


def paint(image: Floats, colour: Floats, opacity: Floats) -> Floats:
    """Blend a layer of `colour` over `image`; `opacity` is in [0, 1], shapes broadcast."""
    return image + opacity * (colour - image)


def draw_clouds(keys: Keys, name: str, image_size: int) -> Floats:
    """Draw smooth noise (B, 1, H, W) in [-0.5, 0.5] that interpolates random values at 6 x 6 nodes.

    The noise of each of the keys (B,) depends on `name` too.
    """
    values = draw_uniform(keys, f"{name} clouds", 1, 6, 6) - 0.5
    positions = np.linspace(0, 5, image_size, endpoint=False, dtype=np.float32)
    node = positions.astype(np.int64)
    share = (positions - node).astype(np.float32)
    share = share * share * (3 - 2 * share)
    upper, lower = values[:, :, node], values[:, :, node + 1]
    rows = paint(upper, lower, share[:, None])
    return paint(rows[..., node], rows[..., node + 1], share)


def make_pixel_grid(image_size: int) -> tuple[Floats, Floats]:
    """Return the pixel centres, seen from the middle: x (W,) to the right, y (H, 1) upwards.

    Example:
        >>> x, y = make_pixel_grid(4)
        >>> x.tolist(), y[0].tolist()
        ([-1.5, -0.5, 0.5, 1.5], [1.5])
    """
    centres = np.arange(image_size, dtype=np.float32) - (image_size - 1) / 2
    return centres, -centres[:, None]
