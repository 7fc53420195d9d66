"""From the instances in a heat map to prompts for SAM-2.

A multiple of a map gives the same prompts, zeros give none, and no foreground point lies outside
of its instance.

Arrays are (H, W), masks bool; points are pixels (x, y), boxes XYXY, where pixel (x, y) covers
[x, x + 1) by [y, y + 1). `heat`, `threshold` and what is connected are as in
`labkit.segment.instances`. What breaks this raises InputError.

Source: Ravi et al., SAM 2, 2024 (the mask prompt, and its rule x20 - 10 for probabilities).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError
from labkit.segment.instances import (
    CORNERS,
    Floats,
    Heat,
    Mask,
    check_shares,
    find_instances,
    relative,
)

Points = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """What SAM-2 is told about one instance, whose `region` (H, W) stays as in the heat map.

    `points` (K, 2) have `labels` (K,): 1, foreground, then 0, background. `box` (4,) is tight.
    `mask_logits` (S, S) in [-10, 10] show the whole image, squashed.
    """

    points: Floats
    labels: Points
    box: Floats
    mask_logits: Heat
    region: Mask

    def scaled(self, sx: float, sy: float) -> Prompt:
        """The prompt with points and box for an image `sx` times as wide and `sy` as high.

        Points are centres of pixels, x -> (x + 0.5) * sx - 0.5; boxes have edges, x -> x * sx.
        """
        if not (0 < sx < np.inf and 0 < sy < np.inf):
            raise InputError(f"sx and sy must be positive and finite, got {sx} and {sy}")
        points = (self.points + 0.5) * (sx, sy) - 0.5
        return replace(self, points=points, box=self.box * (sx, sy, sx, sy))


def positive_points(region: Mask, heat: ArrayLike, count: int = 3) -> Points:
    """At most `count` foreground points (K, 2) in `region` (H, W), best first.

    The first is where distance from the edge times heat is greatest. Each further one is as far as
    can be from those before it, at least half as deep inside as `region` gets. K is 0 where
    `region` has no pixel with heat.
    """
    shares = relative(heat)
    return _clicks(_checked(region, shares.shape) & (shares > 0), shares, count)


def negative_points(
    region: Mask, competing: ArrayLike, count: int = 2, *, margin: float = 0.015, reach: float = 1.0
) -> Points:
    """At most `count` background points (K, 2) on what competes with `region` (H, W), best first.

    They are chosen as foreground points are, on the ground where `competing` (H, W), in [0, 1], is
    at least 0.5, clear of `region` by `margin` of the longer side of the map (2 pixels or more),
    and within `reach` diagonals of its box. Every connected piece of that ground has a depth of
    its own. K is 0 where there is no such ground, or no `region`.
    """
    from scipy import ndimage

    rivals = np.asarray(competing)
    inside = _checked(region, rivals.shape)
    if not ((rivals >= 0) & (rivals <= 1)).all():
        raise InputError("competing must lie in [0, 1]; use competing_ground() or relative()")
    ground = np.zeros_like(inside)
    if inside.any():
        rows, columns = _window(inside)
        far = round(reach * np.hypot(rows.stop - rows.start, columns.stop - columns.start))
        near = tuple(slice(max(s.start - far, 0), s.stop + far) for s in (rows, columns))
        width = 2 * max(2, round(margin * max(inside.shape))) + 1
        close = ndimage.maximum_filter(inside[near], width, mode="constant")
        ground[near] = (rivals[near] >= 0.5) & ~close
    return _clicks(ground, rivals, count)


def box_of(region: Mask, *, margin: float = 0.0) -> Floats:
    """The tight box (4,) of `region` (H, W), grown on each side by `margin` of its width or height.

    It is clipped to the map. A `region` without a pixel raises InputError.
    """
    if margin < 0 or not _checked(region, np.shape(region)).any():
        raise InputError(f"box_of needs a pixel in region and margin >= 0, got margin {margin}")
    rows, columns = _window(region)
    low, high = np.array([(columns.start, rows.start), (columns.stop, rows.stop)])
    grow = margin * (high - low)
    sides = np.maximum(low - grow, 0.0), np.minimum(high + grow, region.shape[::-1])
    return np.concatenate(sides)


def mask_logits(
    heat: ArrayLike, zone: Mask, size: int | tuple[int, int], *, threshold: float = 0.5
) -> Heat:
    """The heat in `zone` (H, W) as logits in [-10, 10]: `size` is S for (S, S), or (rows, columns).

    Shares of the peak in `zone` become logits along two straight lines, from 0 -> -10 through
    `threshold`, the outline of an instance, -> 0 to 1 -> 10: x20 - 10 if `threshold` is 0.5.
    Around `zone` it is -10. The map is squashed as SAM-2 squashes the image: bilinearly, by
    Pillow, which averages where it shrinks.
    """
    check_shares(threshold=threshold)
    shares = relative(heat)
    return _logits(np.where(_checked(zone, shares.shape), shares, 0), size, threshold)


def competing_ground(maps: ArrayLike, index: int) -> Heat:
    """Relative heat (H, W) of the other sentences where one is hotter than `index`, elsewhere 0.

    `maps` is (S, H, W), and all 0 comes out if S is 1. Leave out sentences that were found absent:
    relative to its own peak, even noise is hot.
    """
    stack = np.asarray(maps)
    if stack.ndim != 3 or not 0 <= index < len(stack):
        raise InputError(f"maps must be (S, H, W) and index in [0, S): {stack.shape}, {index}")
    shares = np.stack([relative(one) for one in stack])
    highest = shares.max(axis=0)
    return np.where(highest > shares[index], highest, np.float32(0))


def make_prompts(
    heat: ArrayLike,
    *,
    grid: int,
    competing: ArrayLike | None = None,
    positives: int = 3,
    negatives: int = 2,
    threshold: float = 0.5,
) -> list[Prompt]:
    """A prompt for each instance in `heat` (H, W), in the order of `find_instances`.

    `grid` is S, the side of SAM-2's mask prompts: 256 in the published models. `positives` and
    `negatives` say how many points there are at most. `competing` (H, W) in [0, 1] is as from
    `competing_ground`; other instances compete in any case, each relative to its own peak.
    """
    shares = relative(heat)
    if competing is not None and np.shape(competing) != shares.shape:
        raise InputError(f"competing must be like heat, {shares.shape}, got {np.shape(competing)}")
    found = find_instances(shares, threshold=threshold)
    own = np.zeros_like(shares)
    for one in found:
        own[one.zone] = shares[one.zone] / shares[one.peak_xy[::-1]]
    prompts = []
    for one in found:
        rivals = np.where(one.zone, 0, own)
        if competing is not None:
            rivals = np.maximum(rivals, competing)
        front = _clicks(one.region, shares, positives)
        back = negative_points(one.region, rivals, negatives)
        points = np.concatenate([front, back]).astype(np.float64)
        labels = np.repeat([1, 0], [len(front), len(back)])
        logits = _logits(np.where(one.zone, shares, 0), grid, threshold)
        box = box_of(one.region)
        prompts.append(
            Prompt(points=points, labels=labels, box=box, mask_logits=logits, region=one.region)
        )
    return prompts


def _clicks(ground: Mask, heat: NDArray[Any], count: int) -> Points:
    """Pixels (K, 2) of `ground`: the best one, then those far from all before; K <= `count`."""
    from scipy import ndimage

    if count < 1 or not ground.any():
        return np.zeros((0, 2), dtype=np.int64)
    rows, columns = window = _window(ground)
    inside = np.pad(ground[window], 1)  # the edge of the map is an edge
    depth = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
    pieces, number = ndimage.label(ground[window], CORNERS)
    deepest = np.ones(number + 1)
    np.maximum.at(deepest, pieces, depth)
    pixels = np.argwhere(depth >= np.maximum(deepest / 2, 1)[pieces])
    chosen = [np.array(np.unravel_index((depth * heat[window]).argmax(), depth.shape))]
    room = ((pixels - chosen[0]) ** 2).sum(axis=1)
    while len(chosen) < count and room.max() > 0:
        chosen.append(pixels[room.argmax()])
        room = np.minimum(room, ((pixels - chosen[-1]) ** 2).sum(axis=1))
    points: Points = np.array(chosen)[:, ::-1] + (columns.start, rows.start)
    return points


def _logits(heat: Heat, size: int | tuple[int, int], threshold: float) -> Heat:
    from PIL import Image

    rows, columns = (size, size) if isinstance(size, int) else size
    if min(rows, columns) < 1:
        raise InputError(f"size or grid must be 1 or more, got {size}")
    share = heat / (heat.max() or 1)
    above = 1 - (1 - share) * (0.5 / (1 - threshold))
    level = np.where(share < threshold, share * (0.5 / threshold), above).astype(np.float32)
    squashed = Image.fromarray(level).resize((columns, rows), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(squashed) * 20 - 10, -10, 10)


def _window(mask: Mask) -> tuple[slice, slice]:
    """Rows and columns around the pixels of `mask`, which has one at least."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _checked(mask: Mask, shape: tuple[int, ...]) -> Mask:
    if mask.dtype != bool or mask.ndim != 2 or mask.shape != shape:
        got = f"{mask.dtype} {mask.shape}"
        raise InputError(f"region and zone must be bool (H, W) like the map {shape}, got {got}")
    return mask
