"""What procedural pictures are drawn with: shapes and textures.

Shapes are signed distance functions: negative inside, in units of the shape's radius, y upwards.
They are evaluated for a whole batch at once and turned into anti-aliased coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from labkit.rng import Floats, Keys, draw_uniform

Images = npt.NDArray[np.uint8]


def norm(x: Floats, y: Floats) -> Floats:
    """Distance from the origin."""
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
    lobe = norm(x - 0.47, y - 0.35) - 0.55
    corner = np.maximum(x - y - 0.9, x + y - 0.82) * math.sqrt(0.5)
    return np.minimum(lobe, np.maximum(corner, y - 0.6))


def _moon(x: Floats, y: Floats) -> Floats:
    return np.maximum(norm(x, y) - 1, 0.75 - norm(x - 0.5, y))


def _stripes(x: Floats, y: Floats) -> Floats:
    return np.maximum(bars(x), norm(x, y) - 1)


def _checkerboard(x: Floats, y: Floats) -> Floats:
    across, along = bars(x), bars(y)
    fields = np.minimum(np.maximum(across, along), np.maximum(-across, -along))
    return np.maximum(fields, norm(x, y) - 1)


def bars(x: Floats) -> Floats:
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


def coverage(distance: Floats) -> Floats:
    """Share of each pixel that is inside, from the distance of its centre in pixels."""
    return np.clip(0.5 - distance, 0, 1)


def paint(image: Floats, colour: Floats, opacity: Floats) -> Floats:
    """`image` under a layer of `colour` with that `opacity` in [0, 1]; shapes broadcast."""
    return image + opacity * (colour - image)


def clouds(keys: Keys, name: str, side: int) -> Floats:
    """Smooth noise (B, 1, side, side) in [-0.5, 0.5], between random values at 6 by 6 nodes."""
    values = draw_uniform(keys, f"{name} clouds", 1, 6, 6) - 0.5
    places = np.linspace(0, 5, side, endpoint=False, dtype=np.float32)
    node = places.astype(np.int64)
    share = (places - node).astype(np.float32)
    share = share * share * (3 - 2 * share)
    upper, lower = values[:, :, node], values[:, :, node + 1]
    rows = paint(upper, lower, share[:, None])
    return paint(rows[..., node], rows[..., node + 1], share)


def pixel_grid(side: int) -> tuple[Floats, Floats]:
    """Pixel centres seen from mid-picture, x to the right (W,), y upwards (H, 1)."""
    centres = np.arange(side, dtype=np.float32) - (side - 1) / 2
    return centres, -centres[:, None]
