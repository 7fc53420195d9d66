"""From the heat map of a sentence to the objects in it, called instances.

Whether the thing is there at all is decided before, in `labkit.segment.presence`. Here a map counts
only in relation to its own peak: a multiple of a map has the same instances, a map of zeros none.

Arrays are (H, W), masks are bool, points are pixels (x, y). Pixels that touch at a corner are
connected. Heat is finite and not negative.

Source: Soille, Morphological Image Analysis, 2003 (dynamics of peaks, watersheds of distances).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError

Mask = NDArray[np.bool_]
Heat = NDArray[np.float32]
Floats = NDArray[np.float64]
Labels = NDArray[np.int32]
Window = tuple[slice, slice]

_STEPS = 2**16  # of relative heat: coarser than the rounding errors of a multiple


@dataclass(frozen=True, eq=False, kw_only=True)
class Instance:
    """One object in a heat map.

    Attributes:
        region: (H, W) bool, the object: connected, around its hottest pixel.
        zone: (H, W) bool, the region and the cooler slopes around it; zones do not overlap.
        peak_xy: the hottest pixel (x, y).
        total_heat: sum of the relative heat in the region.
    """

    region: Mask
    zone: Mask
    peak_xy: tuple[int, int]
    total_heat: float


def scale_to_peak(heat: ArrayLike) -> Heat:
    """Divide heat (H, W) by its peak: shares in [0, 1], in steps of 2**-16; zeros stay zeros.

    Raises:
        InputError: `heat` is not (H, W), is empty, or holds a negative number or NaN.

    Example:
        >>> scale_to_peak([[0.0, 0.01, 0.02]])
        array([[0. , 0.5, 1. ]], dtype=float32)
    """
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
    """Find the objects in a heat map, the one with the most heat first.

    There is an object wherever the map reaches `threshold` of its peak. Connected objects are taken
    apart where distance from the edge times heat, smoothed, falls below `saddle` of the lower of
    two peaks on every way between them: at a waist, or in a valley. Each object is then outlined at
    `threshold` of its *own* peak, so that a faint object beside a bright one keeps its size.

    Args:
        heat: (H, W).
        threshold: share of a peak, between 0 and 1.
        min_area: smallest region, as a share of the map.
        saddle: between 0 and 1; the lower it is, the less is taken apart.
        max_instances: how many are returned at most.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> heat = np.zeros((20, 40))
        >>> heat[5:15, 5:15], heat[5:15, 25:35] = 0.9, 0.7
        >>> [instance.peak_xy for instance in find_instances(heat)]
        [(5, 5), (25, 5)]
    """
    check_shares(threshold=threshold, saddle=saddle)
    if max_instances < 1:
        raise InputError(f"max_instances must be 1 or more, got {max_instances}")
    shares = scale_to_peak(heat)
    min_pixels = min_area * shares.size
    cores = _find_cores(shares, threshold, saddle, min_pixels)
    zones = _flood(shares, cores, shares >= max(threshold**2, 1 / _STEPS))
    instances = list(_outline(shares, zones, threshold, min_pixels))
    return sorted(instances, key=lambda i: (-i.total_heat, i.peak_xy[::-1]))[:max_instances]


def check_shares(**shares: float) -> None:
    """Raise InputError for a share that does not lie between 0 and 1."""
    for name, share in shares.items():
        if not 0 < share < 1:
            raise InputError(f"{name} must lie between 0 and 1, such as 0.5, got {share}")


def label_components(mask: Mask, *, connectivity: int = 8) -> tuple[Labels, NDArray[np.int64]]:
    """Number the connected components of a mask (H, W).

    Returns:
        Labels (H, W) int32: 0 outside the mask, 1 to N on its components, in no certain order; and
        the area of each label (N + 1,), that of the outside first.
    """
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(mask).view(np.uint8), connectivity=connectivity
    )
    return labels.astype(np.int32, copy=False), stats[:, cv2.CC_STAT_AREA].astype(np.int64)


def measure_depth(mask: Mask) -> Floats:
    """Distance (H, W) of each pixel of a mask from the nearest pixel outside it, or off the map."""
    import cv2

    padded = np.pad(mask, 1).view(np.uint8)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    exact: Floats = np.sqrt(np.rint(depth.astype(np.float64) ** 2))  # squares are whole
    return exact


def find_window(mask: Mask) -> Window:
    """Rows and columns around the pixels of a mask (H, W), which has one at least."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _find_cores(shares: Heat, threshold: float, saddle: float, min_pixels: float) -> Labels:
    """Ground of at least `threshold`, (H, W): 1, 2, ... on separate objects, 0 elsewhere."""
    from scipy import ndimage

    pieces, areas = label_components(shares >= threshold)
    cores = np.zeros(shares.shape, dtype=np.int32)
    blur = max(1.0, 0.005 * max(shares.shape))
    for number, window in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[window] == number
        parts = piece.astype(np.int32)
        if areas[number] >= 2 * min_pixels:  # else too small for two
            rise = np.pad((measure_depth(piece) + 1) * shares[window], 1)  # one pixel is no waist
            padded = np.pad(piece, 1)
            rise = ndimage.gaussian_filter(rise, blur, mode="constant") * padded
            parts = _flood(rise, _mark_peaks(rise, saddle), padded)[1:-1, 1:-1]
        parts[piece] += cores.max()
        cores[window] += parts
    return cores


def _mark_peaks(rise: Floats, saddle: float) -> Labels:
    """1, 2, ... on peaks from which no higher one is reached above `saddle` of their height."""
    from skimage.morphology import local_maxima

    tops, _ = label_components(local_maxima(rise))  # type: ignore[no-untyped-call]
    height = rise.ravel()
    pixels = np.sort(np.unique(tops, return_index=True)[1][1:])  # the first of each top
    pixels = pixels[np.argsort(-height[pixels], kind="stable")]
    peaks = np.zeros(rise.size, dtype=np.int32)
    for rank, pixel in enumerate(pixels):
        reached = label_components(rise >= saddle * height[pixel])[0].ravel()
        if reached[pixel] not in reached[pixels[:rank]]:
            peaks[pixel] = peaks.max() + 1
    return peaks.reshape(rise.shape)


def _flood(heights: NDArray[Any], sources: Labels, ground: Mask) -> Labels:
    """The watershed: `ground` shared out among `sources`, from the highest pixel down."""
    from skimage import segmentation

    watershed: Any = segmentation.watershed
    labels: Labels = watershed(-heights, sources, connectivity=2, mask=ground)
    return labels


def _outline(
    shares: Heat, zones: Labels, threshold: float, min_pixels: float
) -> Iterator[Instance]:
    """The instances with a region of at least `min_pixels`, one in each of `zones`."""
    from scipy import ndimage

    for number, window in enumerate(ndimage.find_objects(zones), 1):
        heat = np.where(zones[window] == number, shares[window], 0)
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        parts, areas = label_components(heat >= threshold * heat[row, column])
        label = parts[row, column]
        if areas[label] >= min_pixels:
            region = np.zeros(zones.shape, dtype=bool)
            region[window] = parts == label
            yield Instance(
                region=region,
                zone=zones == number,
                peak_xy=(int(column) + window[1].start, int(row) + window[0].start),
                total_heat=float(heat[parts == label].sum(dtype=np.float64)),
            )
