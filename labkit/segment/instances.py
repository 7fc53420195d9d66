"""From the heat map of a sentence to the things in it: its instances.

Whether the thing is there at all is decided elsewhere, before. Here a map counts only in relation
to its own peak: a multiple of it has the same instances, zeros have none.

Arrays are (H, W), masks bool; points are pixels (x, y). Pixels that touch at a corner are
connected. `heat` is finite and not negative; `threshold`, a share of a peak, lies in (0, 1). What
breaks this raises InputError.

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

CORNERS = np.ones((3, 3), dtype=bool)
_STEPS = 2**16  # of relative heat: coarser than the rounding errors of a multiple


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
    check_shares(threshold=threshold, saddle=saddle)
    if max_instances < 1:
        raise InputError(f"max_instances must be 1 or more, got {max_instances}")
    shares = relative(heat)
    least = min_area * shares.size
    cores = _cores(shares, threshold, saddle, least)
    zones = _flood(shares, cores, shares >= max(threshold**2, 1 / _STEPS))
    found = list(_outlined(shares, zones, threshold, least))
    return sorted(found, key=lambda one: (-one.strength, one.peak_xy[::-1]))[:max_instances]


def check_shares(**shares: float) -> None:
    """Raise InputError for one that is not in (0, 1)."""
    for name, share in shares.items():
        if not 0 < share < 1:
            raise InputError(f"{name} must lie between 0 and 1, such as 0.5, got {share}")


def _cores(shares: Heat, threshold: float, saddle: float, least: float) -> Labels:
    """Ground of at least `threshold`, (H, W): 1, 2, ... on separate objects, 0 elsewhere."""
    from scipy import ndimage

    pieces, _ = ndimage.label(shares >= threshold, CORNERS)
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

    tops, _ = ndimage.label(local_maxima(rise), CORNERS)  # type: ignore[no-untyped-call]
    height = rise.ravel()
    places = np.unique(tops, return_index=True)[1][1:]  # a pixel of each
    places = places[np.argsort(-height[places], kind="stable")]
    peaks = np.zeros(rise.size, dtype=np.int32)
    for rank, place in enumerate(places):
        reached = ndimage.label(rise >= saddle * height[place], CORNERS)[0].ravel()
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
        parts, _ = ndimage.label(heat >= threshold * heat[row, column], CORNERS)
        part = parts == parts[row, column]
        if part.sum() >= least:
            region = np.zeros(zones.shape, dtype=bool)
            region[window] = part
            peak_xy = (int(column) + window[1].start, int(row) + window[0].start)
            strength = float(heat[part].sum(dtype=np.float64))
            zone = zones == number
            yield Instance(region=region, zone=zone, peak_xy=peak_xy, strength=strength)
