"""From the instances in a heat map to prompts for SAM-2.

A multiple of a map gives the same prompts, a map of zeros gives none, and no foreground point lies
outside of its instance.

Arrays are (H, W), masks are bool, points are pixels (x, y), boxes XYXY, where pixel (x, y) covers
[x, x + 1) by [y, y + 1). Heat and instances are as in `labkit.segment.instances`.

Source: Ravi et al., SAM 2, 2024 (the mask prompt, and its rule x20 - 10 for probabilities).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError
from labkit.segment.instances import (
    Floats,
    Heat,
    Mask,
    check_shares,
    find_instances,
    find_window,
    label_components,
    measure_depth,
    scale_to_peak,
)

Points = NDArray[np.int64]

_COMPETES = 0.5  # relative heat from which ground competes
_MARGIN = 0.015  # of the map's longer side: background points keep so far from the instance


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompt:
    """What SAM-2 is told about one instance.

    Attributes:
        points: (K, 2) pixels (x, y).
        labels: (K,) 1 for foreground, 0 for background; the foreground comes first.
        box: (4,) XYXY, tight around the region.
        mask_logits: (S, S) in [-10, 10], of the whole image squashed to a square.
        region: (H, W) bool, the instance in pixels of the heat map.
    """

    points: Floats
    labels: Points
    box: Floats
    mask_logits: Heat
    region: Mask

    def scale(self, sx: float, sy: float) -> Prompt:
        """The prompt for an image `sx` times as wide and `sy` times as high; region stays.

        Points are centres of pixels, x -> (x + 0.5) * sx - 0.5; boxes have edges, x -> x * sx.
        """
        if not (0 < sx < np.inf and 0 < sy < np.inf):
            raise InputError(f"sx and sy must be positive and finite, got {sx} and {sy}")
        points = (self.points + 0.5) * (sx, sy) - 0.5
        return replace(self, points=points, box=self.box * (sx, sy, sx, sy))


def make_prompts(
    heat: ArrayLike,
    *,
    low_res_size: int,
    competing: ArrayLike | None = None,
    num_foreground: int = 3,
    num_background: int = 2,
    box_threshold: float = 0.5,
) -> list[Prompt]:
    """Make a prompt for each instance in a heat map, in the order of `find_instances`.

    Args:
        heat: (H, W).
        low_res_size: width and height of SAM-2's mask prompts, 256 in the published models.
        competing: (H, W) in [0, 1], heat of other sentences as from `find_competing_heat`. Other
            instances compete in any case, each relative to its own peak.
        num_foreground: how many foreground points there are at most.
        num_background: how many background points there are at most.
        box_threshold: share of its own peak at which an instance is outlined, between 0 and 1.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> heat = np.zeros((20, 40))
        >>> heat[5:15, 5:15] = 0.9
        >>> [prompt] = make_prompts(heat, low_res_size=256)
        >>> prompt.box
        array([ 5.,  5., 15., 15.])
    """
    shares = scale_to_peak(heat)
    if competing is not None and np.shape(competing) != shares.shape:
        raise InputError(f"competing must be like heat, {shares.shape}, got {np.shape(competing)}")
    instances = find_instances(shares, threshold=box_threshold)
    own_shares = np.zeros_like(shares)
    for instance in instances:
        zone = instance.zone
        own_shares[zone] = shares[zone] / shares[instance.peak_xy[::-1]]
    prompts = []
    for instance in instances:
        rivals = np.where(instance.zone, 0, own_shares)
        if competing is not None:
            rivals = np.maximum(rivals, competing)
        foreground = pick_points(instance.region, shares, num_foreground)
        background = pick_points(find_background(instance.region, rivals), rivals, num_background)
        prompts.append(
            Prompt(
                points=np.concatenate([foreground, background]).astype(np.float64),
                labels=np.repeat([1, 0], [len(foreground), len(background)]),
                box=make_box(instance.region),
                mask_logits=make_mask_logits(
                    shares, instance.zone, low_res_size, threshold=box_threshold
                ),
                region=instance.region,
            )
        )
    return prompts


def pick_points(ground: Mask, heat: NDArray[Any], count: int) -> Points:
    """Pick at most `count` points (K, 2) on some ground (H, W), best first.

    The first is where distance from the edge of the ground times heat (H, W) is greatest. Each
    further one is as far as can be from those before it, at least half as deep inside as its
    connected piece of the ground gets. K is 0 where no pixel of the ground has heat.

    Example:
        >>> ground = np.zeros((9, 9), dtype=bool)
        >>> ground[2:7, 2:7] = True
        >>> pick_points(ground, np.ones((9, 9)), 1)
        array([[4, 4]])
    """
    _check_mask(ground, heat.shape)
    ground = ground & (heat > 0)
    if count < 1 or not ground.any():
        return np.zeros((0, 2), dtype=np.int64)
    rows, columns = window = find_window(ground)
    depth = measure_depth(ground[window])
    pieces, areas = label_components(ground[window])
    deepest = np.ones(len(areas))
    np.maximum.at(deepest, pieces, depth)
    pixels = np.argwhere(depth >= np.maximum(deepest / 2, 1)[pieces])
    picked = [np.array(np.unravel_index((depth * heat[window]).argmax(), depth.shape))]
    distance = ((pixels - picked[0]) ** 2).sum(axis=1)
    while len(picked) < count and distance.max() > 0:
        picked.append(pixels[distance.argmax()])
        distance = np.minimum(distance, ((pixels - picked[-1]) ** 2).sum(axis=1))
    points: Points = np.array(picked)[:, ::-1] + (columns.start, rows.start)
    return points


def find_background(region: Mask, competing: ArrayLike) -> Mask:
    """The ground (H, W) around a region (H, W) on which background points may lie.

    It is where `competing` (H, W) in [0, 1] is at least 0.5, clear of the region by 1.5 % of the
    longer side of the map (2 pixels or more), and no farther from the region's box than that is
    long from corner to corner. Where there is no region, there is no such ground.
    """
    import cv2

    rivals = np.asarray(competing)
    _check_mask(region, rivals.shape)
    if not ((rivals >= 0) & (rivals <= 1)).all():
        raise InputError("competing must lie in [0, 1]; see find_competing_heat, scale_to_peak")
    ground = np.zeros_like(region)
    if region.any():
        rows, columns = find_window(region)
        reach = round(np.hypot(rows.stop - rows.start, columns.stop - columns.start))
        near = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in (rows, columns))
        width = 2 * max(2, round(_MARGIN * max(region.shape))) + 1
        close = cv2.dilate(region[near].astype(np.uint8), np.ones((width, width), np.uint8))
        ground[near] = (rivals[near] >= _COMPETES) & (close == 0)
    return ground


def make_box(region: Mask) -> Floats:
    """The tight box (4,) XYXY of a region (H, W).

    Raises:
        InputError: the region has no pixel.
    """
    if not region.any():
        raise InputError("a box needs at least one pixel in its region")
    rows, columns = find_window(region)
    return np.array([columns.start, rows.start, columns.stop, rows.stop], dtype=np.float64)


def make_mask_logits(shares: Heat, zone: Mask, size: int, *, threshold: float = 0.5) -> Heat:
    """Turn relative heat (H, W) in a zone (H, W) into a mask prompt (size, size) of logits.

    Shares of the peak in the zone become logits along two straight lines, from 0 -> -10 through
    `threshold`, the outline of an instance, -> 0 to 1 -> 10: x20 - 10 if `threshold` is 0.5.
    Around the zone it is -10. The map is squashed as SAM-2 squashes the image: bilinearly, by
    Pillow, which averages where it shrinks.
    """
    from PIL import Image

    check_shares(threshold=threshold)
    if size < 1:
        raise InputError(f"size must be 1 or more, got {size}")
    _check_mask(zone, shares.shape)
    shares = np.where(zone, shares, 0)
    shares = shares / (shares.max() or 1)
    above = 1 - (1 - shares) * (0.5 / (1 - threshold))
    level = np.where(shares < threshold, shares * (0.5 / threshold), above).astype(np.float32)
    squashed = Image.fromarray(level).resize((size, size), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(squashed) * 20 - 10, -10, 10)


def find_competing_heat(shares: Heat, rivals: Heat) -> Heat:
    """Relative heat (H, W) of other sentences where one of them is hotter, elsewhere 0.

    Leave out sentences that were found absent: relative to its own peak, even noise is hot.

    Args:
        shares: relative heat (H, W) of the sentence, as from `scale_to_peak`.
        rivals: relative heat (R, H, W) of the others; R may be 0.
    """
    hottest = rivals.max(axis=0, initial=0)
    return np.where(hottest > shares, hottest, np.float32(0))


def _check_mask(mask: Mask, shape: tuple[int, ...]) -> None:
    if mask.dtype != bool or mask.ndim != 2 or mask.shape != shape:
        got = f"{mask.dtype} {mask.shape}"
        raise InputError(f"region and zone must be bool (H, W) like the map {shape}, got {got}")
