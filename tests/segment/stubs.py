"""In the place of SAM-2: a stub that knows its objects, for the tests of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.segment.prompts import Prompt
from tests.segment.heatmaps import Mask

LOW_RES = 48
PATCH = 3  # grain of the maps, in pixels
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class KnownObject:
    """An object of the stub: a point on `ground` gives `mask`; None means the mask itself."""

    mask: Mask
    iou: float = 0.9
    size: float = 5.0
    ground: Mask | None = None

    def is_at(self, x: int, y: int) -> bool:
        return bool((self.mask if self.ground is None else self.ground)[y, x])

    def predict(self) -> tuple[Floats, Floats]:
        """Four masks, the third its own: the others are sure but shaky, or steady but unlikely."""
        height, width = self.mask.shape
        own = self.mask.repeat(LOW_RES // height, axis=0).repeat(LOW_RES // width, axis=1)
        everything = np.ones_like(own)
        signs = np.stack([everything, everything, own, everything]) * 2.0 - 1
        sizes, ious = [0.5, 5, self.size, 5], [1.0, 0.1, self.iou, 0.2]
        return (signs * np.reshape(sizes, (4, 1, 1))).astype(np.float32), np.float32(ious)


class KnowingSam2:
    """A point yields the first of `objects` around it, as does the first point of a prompt.

    Other points yield nothing. With `script`, prompts yield these masks instead, one in each call.
    Its square has twice the pixels of its low resolution. It keeps how often it encoded, how many
    points it was given in each call, and which prompts.
    """

    image_size, low_res_size = 2 * LOW_RES, LOW_RES

    def __init__(self, *objects: KnownObject, script: Sequence[Mask] = ()) -> None:
        self.objects, self.script = objects, list(script)
        self.encode_calls = 0
        self.point_calls, self.prompt_calls = list[int](), list[list[Prompt]]()

    def encode(self, _: object) -> object:
        self.encode_calls += 1
        return object()

    def predict_points(self, _: object, points: NDArray[np.float64]) -> tuple[Floats, Floats]:
        self.point_calls.append(len(points))
        return _stack([self._predict_at(point) for point in points])

    def predict(self, _: object, prompts: Sequence[Prompt]) -> tuple[Floats, Floats]:
        self.prompt_calls.append(list(prompts))
        if self.script:
            scripted = KnownObject(self.script[len(self.prompt_calls) - 1])
            return _stack([scripted.predict()] * len(prompts))
        return _stack([self._predict_at(prompt.points[0]) for prompt in prompts])

    def _predict_at(self, point: NDArray[np.float64]) -> tuple[Floats, Floats]:
        for known in self.objects:
            height, width = known.mask.shape
            spot = (point + 0.5) / self.image_size * (width, height) - 0.5
            assert np.array_equal(spot, np.rint(spot)), "not the middle of a pixel of the map"
            if known.is_at(int(spot[0]), int(spot[1])):
                return known.predict()
        return np.full((4, LOW_RES, LOW_RES), -5, np.float32), np.zeros(4, np.float32)


def _stack(predictions: Sequence[tuple[Floats, Floats]]) -> Any:
    return tuple(np.stack(part) for part in zip(*predictions, strict=True))
