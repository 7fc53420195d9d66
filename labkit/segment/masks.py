"""Masks: choose the best of SAM-2's, clean it, suppress duplicates, upsample it, encode, trace it.

Masks are bool, (S, S) in SAM-2's low resolution, of the whole image squashed to a square, or (H, W)
in that of the image. Logits (S, S) are positive inside a mask.

Sources: Kirillov et al., Segment Anything, 2023 (stability); Lin et al., Microsoft COCO, 2014, as
pycocotools implements it (run lengths).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from labkit.runtime import InputError
from labkit.segment.instances import Mask, label_components
from labkit.segment.prompts import Prompt

Logits = NDArray[np.float32]
Ring = NDArray[np.int64]

OVERLAP_THRESHOLD = 0.7
"""IoU from which two masks are masks of one object."""

_STABILITY_OFFSET = 1.0  # logits, as in Meta's automatic mask generator
_CONTAINED = 0.9  # share of the smaller mask inside the larger from which it is a part of it
_OWN_HEAT = 0.5  # agreement from which a mask inside another is of an object of its own
_HOLE = 0.01  # share of a mask's area below which a hole is filled
_ISLAND = 0.1  # share of the largest piece's area below which another is cleared
_SPECK = 0.01  # share of the largest piece's area below which heat does not save an island
_HOT_ISLAND = 0.5  # mean relative heat that saves an island


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """A mask that was chosen for one prompt.

    Attributes:
        logits: (S, S).
        predicted_iou: SAM-2's own estimate of the mask's IoU, in [0, 1].
        stability: how little the mask depends on its threshold, in [0, 1].
        agreement: soft IoU of the mask with the heat of its instance, in [0, 1].
        prompt: what SAM-2 was told; None where that is not known.
    """

    logits: Logits
    predicted_iou: float
    stability: float
    agreement: float
    prompt: Prompt | None = None

    @property
    def score(self) -> float:
        """Product of the three."""
        return self.predicted_iou * self.stability * self.agreement


class Rle(TypedDict):
    """COCO's compressed run lengths of a mask: `size` is [H, W], `counts` is text."""

    size: list[int]
    counts: str


def select_mask(
    prompt: Prompt, logits: Logits, ious: Logits, blur: tuple[float, float] = (0.0, 0.0)
) -> Candidate:
    """Select the best of M masks for a prompt: predicted IoU × stability × agreement; clean it.

    Args:
        prompt: what SAM-2 was told.
        logits: (M, S, S).
        ious: predicted IoUs (M,).
        blur: of the heat that the prompt was made of; see `measure_agreement`.
    """
    heat = (prompt.mask_logits + 10) / 20  # relative heat, see make_mask_logits
    candidates = [
        Candidate(
            logits=mask,
            predicted_iou=float(np.clip(iou, 0, 1)),
            stability=measure_stability(mask),
            agreement=measure_agreement(mask > 0, heat, blur),
            prompt=prompt,
        )
        for mask, iou in zip(logits, ious, strict=True)
    ]
    best = max(candidates, key=lambda candidate: candidate.score)
    return replace(best, logits=remove_small_regions(best.logits, heat))


def measure_stability(logits: Logits) -> float:
    """IoU in [0, 1] of the masks at a threshold one logit higher and one lower; 0 for no mask."""
    area = int((logits > -_STABILITY_OFFSET).sum())
    return float((logits > _STABILITY_OFFSET).sum() / area) if area else 0.0


def measure_agreement(mask: Mask, heat: Logits, blur: tuple[float, float] = (0.0, 0.0)) -> float:
    """Soft IoU in [0, 1] of a mask (S, S) with relative heat (S, S) in [0, 1].

    A map shows a thin pole as a wide stripe. So that the pole agrees with it better than a mask as
    wide as the stripe, a mask is seen as the map would show it: blurred, relative to its peak.

    Args:
        mask: (S, S).
        heat: (S, S).
        blur: the spread (x, y), in pixels, of what the heat shows of a point; 0 is no blur.

    Example:
        >>> mask = np.array([[True, True, False]])
        >>> measure_agreement(mask, np.array([[1.0, 0.5, 0.5]], dtype=np.float32))
        0.6
    """
    import cv2

    seen: Logits = mask.astype(np.float32)
    if min(blur) > 0 and mask.any():
        blurred = cv2.GaussianBlur(seen, (0, 0), sigmaX=blur[0], sigmaY=blur[1])
        seen = (blurred / blurred.max()).astype(np.float32)
    union = float(np.maximum(seen, heat).sum())
    return float(np.minimum(seen, heat).sum()) / union if union else 0.0


def remove_small_regions(logits: Logits, heat: Logits | None = None) -> Logits:
    """Fill small holes and clear small islands of a mask (S, S), by turning the sign of its logits.

    A hole does not touch the border and is a single pixel, or has less than 1 % of the mask's area;
    an island has less than 10 % of that of the largest piece. A hot island of 1 % or more stays: it
    may be a foot that something in front of the object cuts off.

    Args:
        logits: (S, S).
        heat: (S, S) relative heat in [0, 1] of the object; None where islands have none.
    """
    cleaned = logits.copy()
    pieces, areas = label_components(cleaned > 0)
    if len(areas) > 2:
        is_island = areas < _ISLAND * areas[1:].max()
        if heat is not None:
            means = np.bincount(pieces.ravel(), heat.ravel()) / areas
            is_island &= (means < _HOT_ISLAND) | (areas < _SPECK * areas[1:].max())
        islands = 1 + np.flatnonzero(is_island[1:])
        cleaned = np.where(np.isin(pieces, islands), -np.abs(cleaned), cleaned)
    gaps, areas = label_components(cleaned <= 0, connectivity=4)
    border = np.unique(np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]]))
    small = np.flatnonzero(areas < max(_HOLE * (cleaned > 0).sum(), 2))
    holes = np.setdiff1d(small, [0, *border])
    return np.where(np.isin(gaps, holes), np.maximum(np.abs(cleaned), 1e-3), cleaned)


def mask_nms(
    candidates: Sequence[Candidate], overlap_threshold: float = OVERLAP_THRESHOLD
) -> list[Candidate]:
    """Non-maximum suppression: drop empty masks, and masks that repeat a better one.

    Of a mask inside another, both stay where the smaller has heat of its own, with which it agrees:
    it may be a child in front of an adult. Otherwise it is a part, and the better of the two stays.

    Returns the rest, the best score first.
    """
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: -candidate.score):
        mask = candidate.logits > 0
        if mask.any() and not any(
            _is_repetition(candidate, other, overlap_threshold) for other in kept
        ):
            kept.append(candidate)
    return kept


def _is_repetition(candidate: Candidate, other: Candidate, overlap_threshold: float) -> bool:
    """Whether two candidates are masks of one object, or one is of a part of the other."""
    mask, other_mask = candidate.logits > 0, other.logits > 0
    smaller = candidate if mask.sum() < other_mask.sum() else other
    return is_duplicate(mask, other_mask, overlap_threshold) or (
        is_part(mask, other_mask) and smaller.agreement < _OWN_HEAT
    )


def is_duplicate(a: Mask, b: Mask, overlap_threshold: float = OVERLAP_THRESHOLD) -> bool:
    """Whether two masks are of one object: their IoU is above a threshold."""
    return int((a & b).sum()) > overlap_threshold * int((a | b).sum())


def is_part(a: Mask, b: Mask) -> bool:
    """Whether nine tenths of the smaller of two masks lie inside the larger."""
    return int((a & b).sum()) > _CONTAINED * min(int(a.sum()), int(b.sum()))


def upsample_mask(logits: Logits, size: tuple[int, int]) -> Mask:
    """The mask (H, W) that low-resolution logits (S, S) give at `size` (H, W), bilinearly."""
    square = torch.from_numpy(logits)[None, None]
    return (F.interpolate(square, size=size, mode="bilinear")[0, 0] > 0).numpy()


def encode_mask(mask: Mask) -> Rle:
    """The run lengths of a mask (H, W) bool.

    Raises:
        InputError: `mask` is no such array.

    Example:
        >>> encode_mask(np.ones((2, 3), dtype=bool))["size"]
        [2, 3]
    """
    from pycocotools import mask as coco

    if mask.dtype != bool or mask.ndim != 2:
        raise InputError(f"mask must be bool (H, W), got {mask.dtype} {mask.shape}")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def decode_mask(rle: Rle) -> Mask:
    """The mask (H, W) bool of run lengths."""
    from pycocotools import mask as coco

    mask: Mask = coco.decode(_to_bytes(rle)).astype(bool)
    return mask


def measure_area(rle: Rle) -> int:
    """The number of pixels of a mask, from its run lengths."""
    from pycocotools import mask as coco

    return int(coco.area(_to_bytes(rle)))


def _to_bytes(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode()}


def trace_mask(mask: Mask) -> list[list[Ring]]:
    """Trace the outlines of a mask along the edges of its pixels, so that nothing is lost.

    Args:
        mask: (H, W).

    Returns:
        The pieces of the mask, whose pixels hang together by their sides, each as its rings: the
        outer one, then one for each hole. A ring is (K, 2) int corners (x, y), the first of which
        is not repeated; pixel (x, y) covers [x, x + 1) by [y, y + 1). On the screen outer rings run
        clockwise and holes the other way. No ring touches itself.

    Example:
        >>> [[ring]] = trace_mask(np.ones((2, 3), dtype=bool))
        >>> ring.tolist()
        [[0, 0], [3, 0], [3, 2], [0, 2]]
    """
    from scipy import ndimage

    labels, _ = label_components(mask, connectivity=4)
    pieces = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        rings = _trace_piece(labels[rows, columns] == number)
        pieces.append([np.add(ring, (columns.start, rows.start)) for ring in rings])
    return pieces


def _trace_piece(piece: Mask) -> list[Ring]:
    """The rings of a mask in one piece, the outer one first.

    On each line of the grid the corners of the outline are by turns the start and the end of an
    edge, so that sorting pairs them. Where two pixels of the mask touch at a corner only, there are
    two corners, each of which turns around one of these pixels.
    """
    padded = np.pad(piece, 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    falling, rising = nw & se & ~ne & ~sw, ne & sw & ~nw & ~se
    y, x = np.nonzero((nw ^ ne ^ sw ^ se) | falling | rising)
    is_double = (falling | rising)[y, x]
    is_second = np.repeat([False, True], [len(x), int(is_double.sum())])
    x, y = np.concatenate([x, x[is_double]]), np.concatenate([y, y[is_double]])
    is_upper = is_second ^ rising[y, x]
    across, along = np.empty_like(x), np.empty_like(x)  # the corner at the other end of the edge
    for partner, order in (
        (across, np.lexsort((is_second, x, y))),
        (along, np.lexsort((is_upper, y, x))),
    ):
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    rings = [np.array(ring, dtype=np.int64) for ring in _walk(x, y, across, along)]
    areas = [_measure_ring(ring) for ring in rings]
    outer = int(np.argmax(np.abs(areas)))
    turned = [
        ring if (area > 0) == (index == outer) else ring[::-1]
        for index, (ring, area) in enumerate(zip(rings, areas, strict=True))
    ]
    return [turned[outer], *turned[:outer], *turned[outer + 1 :]]


def _walk(x: Ring, y: Ring, across: Ring, along: Ring) -> Iterator[list[tuple[int, int]]]:
    """Follow edges from corner to corner, (N,) each, and cut off a ring wherever one closes."""
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    is_unseen = np.ones(len(points), dtype=bool)
    for first in range(len(points)):
        if not is_unseen[first]:
            continue
        path: list[tuple[int, int]] = []
        places: dict[tuple[int, int], int] = {}
        corner = first
        for partner in cycle((across, along)):
            is_unseen[corner] = False
            point = points[corner]
            if point in places:
                start = places[point]
                yield path[start:]
                for passed in path[start:]:
                    del places[passed]
                del path[start:]
            places[point] = len(path)
            path.append(point)
            corner = int(partner[corner])
            if corner == first:
                break
        yield path


def _measure_ring(ring: Ring) -> int:
    """Twice the area inside a ring, positive if it runs clockwise on the screen."""
    x, y = ring.T
    return int((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())


def join_rings(rings: Sequence[Ring]) -> Ring:
    """Join rings into one, for formats in which a shape has a single ring.

    From ring to ring leads a bridge along the edges of pixels, there and back, so that it encloses
    nothing: filled by the even-odd rule, or by winding numbers, the ring gives the same mask.

    Args:
        rings: one or more of `trace_mask`, of one piece or of several.

    Returns:
        (K, 2) int corners (x, y).
    """
    from scipy.spatial import cKDTree

    joined = rings[0]
    for ring in rings[1:]:
        distances, nearest = cKDTree(joined).query(ring, p=1)
        there = int(np.argmin(distances))
        here = int(nearest[there])
        start, end = joined[here], ring[there]
        corner = [end[0], start[1]]
        detour = [[corner], np.roll(ring, -there, axis=0), [end, corner]]
        joined = np.concatenate([joined[: here + 1], *detour, joined[here:]])
    return joined
