"""One prompt that stands for several like objects, taken apart: SAM-2 knows where each one ends.

Where objects that a sentence names touch, their heat is one region, and a box around it means all
of them. A click in one of them means that one. So each foreground point is tried by itself; if the
masks are of different objects, each gets a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labkit.segment.prompts import Prompt, box_of, mask_logits
from labkit.segment.sam2 import ImageFeatures, Sam2, cleaned, enlarged, repeats, stability

_TRUSTED = 0.6  # predicted IoU × stability from which the mask of a click counts
_CLICKS_AT_ONCE = 32  # of which only the best masks are kept, small
_HOT = 0.5  # share of its pixels that must lie in the region that was clicked


@dataclass(frozen=True, eq=False)
class _Part:
    """What one click found: the point (2,), its mask (h, w) and how far that is trusted."""

    point: NDArray[np.float64]
    mask: NDArray[np.bool_]
    trust: float


def divided(
    sam2: Sam2, features: ImageFeatures, prompts: Sequence[Prompt], heat: NDArray[np.float32]
) -> list[Prompt]:
    """`prompts`, those that stand for several objects replaced by one for each.

    Args:
        sam2: the model.
        features: of the image.
        prompts: in pixels of `heat`.
        heat: the map (h, w) that they were made of.
    """
    clicks = [prompt.points[prompt.labels == 1] for prompt in prompts]
    counts = [len(points) if len(points) > 1 else 0 for points in clicks]
    tried = np.concatenate([points[:count] for points, count in zip(clicks, counts, strict=True)])
    height, width = heat.shape
    scale = np.array([sam2.side / width, sam2.side / height])
    parts: list[_Part] = []
    for start in range(0, len(tried), _CLICKS_AT_ONCE):
        points = tried[start : start + _CLICKS_AT_ONCE]
        answers = sam2.click(features, (points + 0.5) * scale - 0.5)
        parts += [_part(*one, heat.shape) for one in zip(points, *answers, strict=True)]
    result: list[Prompt] = []
    start = 0
    for prompt, count in zip(prompts, counts, strict=True):
        apart = _apart(parts[start : start + count], prompt.region)
        start += count
        result += _prompts_of(apart, prompt, heat, sam2.grid) if len(apart) > 1 else [prompt]
    return result


def _part(
    point: NDArray[np.float64],
    logits: NDArray[np.float32],
    ious: NDArray[np.float32],
    shape: tuple[int, ...],
) -> _Part:
    """The most trusted of the masks (4, G, G) of a click, in the geometry of the map."""
    trust = [float(iou) * stability(mask) for iou, mask in zip(ious, logits, strict=True)]
    best = int(np.argmax(trust))
    return _Part(point, enlarged(cleaned(logits[best]), (shape[0], shape[1])), trust[best])


def _apart(parts: Sequence[_Part], region: NDArray[np.bool_]) -> list[_Part]:
    """The parts that are different objects inside `region`, the most trusted first."""
    kept: list[_Part] = []
    for part in sorted(parts, key=lambda one: -one.trust):
        inside = int((part.mask & region).sum()) > _HOT * int(part.mask.sum())
        new = not any(repeats(part.mask, other.mask) for other in kept)
        if inside and new and part.trust >= _TRUSTED:
            kept.append(part)
    return kept


def _prompts_of(
    parts: Sequence[_Part], prompt: Prompt, heat: NDArray[np.float32], grid: int
) -> list[Prompt]:
    """A prompt for each part: its point against those of the others, its box, its heat."""
    background = prompt.points[prompt.labels == 0]
    found = []
    for part in parts:
        others = [other.point for other in parts if other is not part]
        points = np.concatenate([part.point[None], np.array(others), background])
        found.append(
            Prompt(
                points=points,
                labels=np.repeat([1, 0], [1, len(points) - 1]),
                box=box_of(part.mask),
                mask_logits=mask_logits(heat, part.mask, grid),
                region=part.mask,
            )
        )
    return found
