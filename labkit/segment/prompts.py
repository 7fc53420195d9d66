"""From the heat map of a sentence to its instances, and from each to prompts for SAM-2.

Whether the thing is there at all is decided elsewhere, before. Here a map counts only in relation
to its own peak: a multiple of it gives the same prompts, zeros give none, and no foreground point
lies outside of its instance.

Arrays are (H, W), masks bool; points are pixels (x, y), boxes XYXY, where pixel (x, y) covers
[x, x + 1) by [y, y + 1). Pixels that touch at a corner are connected. `heat` is finite and not
negative; `threshold`, a share of a peak, lies in (0, 1). What breaks this raises InputError.

Sources: Soille, Morphological Image Analysis, 2003 (dynamics of peaks, watersheds of distances);
Ravi et al., SAM 2, 2024 (the mask prompt, and its rule x20 - 10 for probabilities).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError

Mask = NDArray[np.bool_]
Heat = NDArray[np.float32]
Floats = NDArray[np.float64]
Points = NDArray[np.int64]
Labels = NDArray[np.int32]

_STEPS = 2**16  # of relative heat: coarser than the rounding errors of a multiple
_CORNERS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True, eq=False, kw_only=True)
class Instance:
    """One object in a heat map.

    `region` (H, W) is the object: connected, around its hottest pixel `peak_xy`. `zone` (H, W) is
    `region` and the cooler slopes that rise to it; zones do not overlap. `strength` is the sum of
    relative heat in `region`.
    """

    region: Mask
    zone: Mask
    peak_xy: tuple[int, int]
    strength: float


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


def relative(heat: ArrayLike) -> Heat:
    """`heat` (H, W) as shares of its peak, in [0, 1] and steps of 2**-16; of zeros, zeros."""
    values = np.asarray(heat, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"heat must be (H, W) and not empty, got {values.shape}")
    peak = values.max()
    if not (np.isfinite(peak) and values.min() >= 0):
        raise InputError("heat must be finite and not negative; give probabilities, not logits")
    shares: Heat = (np.rint(values / (peak or 1) * _STEPS) / _STEPS).astype(np.float32)
    return shares


def find_instances(
    heat: ArrayLike,
    *,
    threshold: float = 0.5,
    min_area: float = 0.0005,
    saddle: float = 0.75,
    max_instances: int = 100,
) -> list[Instance]:
    """The objects in `heat` (H, W), strongest first; of equals, the one whose peak is higher up.

    There is one wherever the map reaches `threshold` of its peak. Connected ones are taken apart
    where distance from the edge times heat, smoothed, falls below `saddle` of the lower of two
    peaks on every way between them: at a waist, or in a valley. Each is then outlined at
    `threshold` of its *own* peak, so that a faint object beside a bright one keeps its size.

    A region covers `min_area` of the map or more; `saddle` lies in (0, 1).
    """
    _check_shares(threshold=threshold, saddle=saddle)
    if max_instances < 1:
        raise InputError(f"max_instances must be 1 or more, got {max_instances}")
    shares = relative(heat)
    least = min_area * shares.size
    cores = _cores(shares, threshold, saddle, least)
    zones = _flood(shares, cores, shares >= max(threshold**2, 1 / _STEPS))
    found = list(_outlined(shares, zones, threshold, least))
    return sorted(found, key=lambda one: (-one.strength, one.peak_xy[::-1]))[:max_instances]


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
    _check_shares(threshold=threshold)
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


def _cores(shares: Heat, threshold: float, saddle: float, least: float) -> Labels:
    """Ground of at least `threshold`, (H, W): 1, 2, ... on separate objects, 0 elsewhere."""
    from scipy import ndimage

    pieces, _ = ndimage.label(shares >= threshold, _CORNERS)
    cores = np.zeros(shares.shape, dtype=np.int32)
    blur = max(1.0, 0.005 * max(shares.shape))
    for number, window in enumerate(ndimage.find_objects(pieces), 1):
        piece = np.pad(pieces[window] == number, 1)
        parts = piece.astype(np.int32)
        if parts.sum() >= 2 * least:  # else too small for two
            depth = ndimage.distance_transform_edt(piece) + 1  # so that one pixel is no waist
            rise = depth * np.pad(shares[window], 1)
            rise = ndimage.gaussian_filter(rise, blur, mode="constant") * piece
            parts = _flood(rise, _peaks(rise, saddle), piece)
        parts[piece] += cores.max()
        cores[window] += parts[1:-1, 1:-1]
    return cores


def _peaks(rise: Floats, saddle: float) -> Labels:
    """1, 2, ... on peaks from which no higher one is reached above `saddle` of their height."""
    from scipy import ndimage
    from skimage.morphology import local_maxima

    tops, _ = ndimage.label(local_maxima(rise), _CORNERS)  # type: ignore[no-untyped-call]
    height = rise.ravel()
    places = np.unique(tops, return_index=True)[1][1:]  # a pixel of each
    places = places[np.argsort(-height[places], kind="stable")]
    peaks = np.zeros(rise.size, dtype=np.int32)
    for rank, place in enumerate(places):
        reached = ndimage.label(rise >= saddle * height[place], _CORNERS)[0].ravel()
        if reached[place] not in reached[places[:rank]]:
            peaks[place] = peaks.max() + 1
    return peaks.reshape(rise.shape)


def _flood(heights: NDArray[Any], sources: Labels, ground: Mask) -> Labels:
    """The watershed: `ground` shared out among `sources`, from the highest pixel down."""
    from skimage import segmentation

    watershed: Any = segmentation.watershed
    labels: Labels = watershed(-heights, sources, connectivity=2, mask=ground)
    return labels


def _outlined(shares: Heat, zones: Labels, threshold: float, least: float) -> Iterator[Instance]:
    """The instances with a region of at least `least` pixels, one in each of `zones`."""
    from scipy import ndimage

    for number, window in enumerate(ndimage.find_objects(zones), 1):
        heat = np.where(zones[window] == number, shares[window], 0)
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        parts, _ = ndimage.label(heat >= threshold * heat[row, column], _CORNERS)
        part = parts == parts[row, column]
        if part.sum() >= least:
            region = np.zeros(zones.shape, dtype=bool)
            region[window] = part
            peak_xy = (int(column) + window[1].start, int(row) + window[0].start)
            strength = float(heat[part].sum(dtype=np.float64))
            zone = zones == number
            yield Instance(region=region, zone=zone, peak_xy=peak_xy, strength=strength)


def _clicks(ground: Mask, heat: NDArray[Any], count: int) -> Points:
    """Pixels (K, 2) of `ground`: the best one, then those far from all before; K <= `count`."""
    from scipy import ndimage

    if count < 1 or not ground.any():
        return np.zeros((0, 2), dtype=np.int64)
    rows, columns = window = _window(ground)
    inside = np.pad(ground[window], 1)  # the edge of the map is an edge
    depth = ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
    pieces, number = ndimage.label(ground[window], _CORNERS)
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


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 < share < 1:
            raise InputError(f"{name} must lie between 0 and 1, such as 0.5, got {share}")
