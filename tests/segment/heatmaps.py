"""Heat maps of one thing and of two, for the tests of instances and of prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
SIDE = 96


def plane(height: int = SIDE, width: int = SIDE) -> tuple[Floats, Floats]:
    """Pixel indices x and y, each (H, W)."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return x, y


def disc(x0: float, y0: float, radius: float, side: int = SIDE) -> Mask:
    x, y = plane(side, side)
    return np.hypot(x - x0, y - y0) <= radius


def soft(mask: Mask, sigma: float = 2.0) -> Floats:
    return np.asarray(ndimage.gaussian_filter(mask.astype(np.float64), sigma))


def star() -> Mask:
    x, y = plane()
    angle, distance = np.arctan2(y - 48, x - 48), np.hypot(x - 48, y - 48)
    return distance < 24 * (1 + 0.6 * np.cos(5 * angle))


def tilted(width: float, height: float) -> tuple[Floats, Floats]:
    x, y = plane()
    along = (x - 48) * np.cos(0.5) + (y - 48) * np.sin(0.5)
    across = (y - 48) * np.cos(0.5) - (x - 48) * np.sin(0.5)
    return along / width, across / height


WHOLE: dict[str, Callable[[], Mask]] = {
    "disc": lambda: disc(40, 50, 20),
    "disc cut by the edge": lambda: disc(0, 50, 20),
    "long ellipse": lambda: np.hypot(*tilted(42, 9)) <= 1,
    "thick ring": lambda: disc(48, 48, 40) & ~disc(48, 48, 26),
    "thin ring": lambda: disc(48, 48, 40) & ~disc(48, 48, 36),
    "bar": lambda: np.maximum(*np.abs(tilted(40, 4))) <= 1,
    "frame": lambda: np.abs(np.maximum(*np.abs(tilted(30, 30))) - 1) < 0.2,
    "star": star,
    "everything": lambda: np.ones((SIDE, SIDE), dtype=bool),
}
TWO = {
    "apart": disc(25, 30, 14) | disc(70, 65, 18),
    "touching": disc(25, 48, 18) | disc(61, 48, 18),
    "touching, unequal": disc(30, 48, 22) | disc(64, 48, 13),
    "at a corner": disc(30, 30, 15) | disc(51, 51, 15),
}
