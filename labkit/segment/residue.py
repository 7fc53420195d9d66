"""Heat that no mask explains yet: where two like objects touch, the first mask covers but one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from labkit.segment.instances import relative

_HOT = 0.5  # share of the peak that unexplained ground must reach
_SLOPE = 0.25  # share of the peak down to which its slopes are kept
_FRINGE = 0.02  # of the longer side: around a mask, so much heat is its own
_LEAST = 0.1  # of the largest mask's area: less is a fringe, not an object


def unexplained(
    heat: NDArray[np.float32], masks: Sequence[NDArray[np.bool_]]
) -> NDArray[np.float32]:
    """The part of a heat map that calls for one more object.

    Args:
        heat: (h, w), not negative.
        masks: (h, w) each, of the objects found so far.

    Returns:
        (h, w): `heat` where it is hot, compact and clear of every mask, with its slopes; else 0.
    """
    from scipy import ndimage

    nothing = np.zeros_like(heat)
    if not masks:
        return nothing
    covered = np.any(masks, axis=0)
    reach = max(1, round(_FRINGE * max(heat.shape)))
    free = ~ndimage.binary_dilation(covered, iterations=reach)
    share = relative(heat)
    hot = ndimage.binary_opening(free & (share >= _HOT), iterations=reach)
    pieces, count = ndimage.label(free & (share >= _SLOPE))
    least = _LEAST * max(int(mask.sum()) for mask in masks)
    areas = ndimage.sum_labels(hot, pieces, index=np.arange(1, count + 1))
    kept = 1 + np.flatnonzero(areas >= max(least, 1))
    return np.where(np.isin(pieces, kept), heat, nothing)
