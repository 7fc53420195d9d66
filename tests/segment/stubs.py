"""In the place of SAM-2: one that knows its objects, for the tests of division and of inquiry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.segment.prompts import Prompt
from tests.segment.heatmaps import Mask

GRID = 48
PATCH = 3  # grain of the maps, in pixels
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Thing:
    """What a click on `ground` is answered with; None: the mask itself."""

    mask: Mask
    iou: float = 0.9
    size: float = 5.0
    ground: Mask | None = None

    def is_at(self, x: int, y: int) -> bool:
        return bool((self.mask if self.ground is None else self.ground)[y, x])

    def answer(self) -> tuple[Floats, Floats]:
        """Four masks, the third its own: the others are sure but shaky, or steady but unlikely."""
        height, width = self.mask.shape
        own = self.mask.repeat(GRID // height, axis=0).repeat(GRID // width, axis=1)
        everything = np.ones_like(own)
        signs = np.stack([everything, everything, own, everything]) * 2.0 - 1
        sizes, ious = [0.5, 5, self.size, 5], [1.0, 0.1, self.iou, 0.2]
        return (signs * np.reshape(sizes, (4, 1, 1))).astype(np.float32), np.float32(ious)


class Knowing:
    """A click yields the first of `things` around it, as does the first point of a prompt.

    Other clicks yield nothing. With `script`, prompts are answered with these masks instead, with
    one in each call. Its square has twice the pixels of its grid.
    """

    side, grid = 2 * GRID, GRID

    def __init__(self, *things: Thing, script: Sequence[Mask] = ()) -> None:
        self.things, self.script = things, list(script)
        self.encoded, self.clicked, self.told = 0, list[int](), list[list[Prompt]]()

    def encode(self, _: object) -> object:
        self.encoded += 1
        return object()

    def click(self, _: object, points: NDArray[np.float64]) -> tuple[Floats, Floats]:
        self.clicked.append(len(points))
        return _stacked([self._at(point) for point in points])

    def decode(self, _: object, prompts: Sequence[Prompt]) -> tuple[Floats, Floats]:
        self.told.append(list(prompts))
        if self.script:
            thing = Thing(self.script[len(self.told) - 1])
            return _stacked([thing.answer()] * len(prompts))
        return _stacked([self._at(prompt.points[0]) for prompt in prompts])

    def _at(self, point: NDArray[np.float64]) -> tuple[Floats, Floats]:
        for thing in self.things:
            height, width = thing.mask.shape
            spot = (point + 0.5) / self.side * (width, height) - 0.5
            assert np.array_equal(spot, np.rint(spot)), "not the middle of a pixel of the map"
            if thing.is_at(int(spot[0]), int(spot[1])):
                return thing.answer()
        return np.full((4, GRID, GRID), -5, np.float32), np.zeros(4, np.float32)


def _stacked(answers: Sequence[tuple[Floats, Floats]]) -> Any:
    return tuple(np.stack(part) for part in zip(*answers, strict=True))
