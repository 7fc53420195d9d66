"""What masks and presence scores are worth against the truth, on NumPy arrays.

A mask is bool (H, W), a stack of masks bool (N, H, W) with N = 0 allowed; masks that are compared
have the same H and W, both at least 1. `truth` and `predicted` are bool (N,), N at least 1. Arrays
that break this raise InputError.

Sources: Cheng et al., Boundary IoU, 2021; Carion et al., SAM 3: Segment Anything with Concepts,
2025, and its sam3/eval/cgf1_eval.py; Field and Welsh, Bootstrapping Clustered Data, 2007.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError

Interval = tuple[float, float]
Masks = NDArray[np.bool_]
Rows = NDArray[Any]

# Of COCO and SA-Co: 0.50, 0.55, … 0.95, each the float nearest to its decimal.
THRESHOLDS: tuple[float, ...] = tuple(percent / 100 for percent in range(50, 100, 5))

_PIXELS_AT_ONCE = 2**16


def iou(a: Masks, b: Masks) -> float:
    """Intersection over union of two masks (H, W); 1.0 if both are empty, 0.0 if one is.

    Example:
        >>> iou(np.array([[True, True, False]]), np.array([[False, True, True]]))
        0.3333333333333333
    """
    _check_masks(2, a=a, b=b)
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def pairwise_iou(a: Masks, b: Masks) -> NDArray[np.float64]:
    """IoU (N, M) of each of `a` (N, H, W) with each of `b` (M, H, W), as `iou` has it.

    Memory beyond the masks is bounded: pixels are multiplied in blocks.
    """
    _check_masks(3, a=a, b=b)
    pixels = math.prod(a.shape[1:])
    left, right = a.reshape(len(a), pixels), b.reshape(len(b), pixels)
    shared = np.zeros((len(a), len(b)))
    for start in range(0, pixels, _PIXELS_AT_ONCE):
        block = slice(start, start + _PIXELS_AT_ONCE)  # counts this small are exact in float32
        shared += left[:, block].astype(np.float32) @ right[:, block].astype(np.float32).T
    union = left.sum(axis=1)[:, None] + right.sum(axis=1)[None, :] - shared
    return np.divide(shared, union, out=np.ones_like(shared), where=union > 0)


def boundary_iou(a: Masks, b: Masks, *, dilation_ratio: float = 0.02) -> float:
    """IoU of two masks' inner boundary bands (Cheng et al., 2021), by the rules of `iou`.

    A band holds the mask's pixels at most d = max(1, round(`dilation_ratio` × image diagonal))
    steps, diagonal ones included, from the background, and beyond the image all is background.
    """
    _check_masks(2, a=a, b=b)
    if not 0.0 < dilation_ratio <= 1.0:
        raise InputError(f"dilation_ratio must lie in (0, 1], such as 0.02, got {dilation_ratio}")
    width = max(1, round(dilation_ratio * math.hypot(*a.shape)))
    return iou(_inner_band(a, width), _inner_band(b, width))


def match_instances(iou: ArrayLike, threshold: float = 0.5) -> list[tuple[int, int]]:
    """One-to-one pairs (true, predicted) of the largest total IoU, by true index.

    iou: (N true, M predicted) in [0, 1]. Only pairs at or above `threshold`, in [0, 1], count.
    """
    from scipy.optimize import linear_sum_assignment

    table = np.asarray(iou, dtype=np.float64)
    if table.ndim != 2 or not ((table >= 0) & (table <= 1)).all():
        raise InputError(f"iou must be (true, predicted) with values in [0, 1], got {table.shape}")
    if not 0.0 <= threshold <= 1.0:
        raise InputError(f"threshold must lie in [0, 1], such as 0.5, got {threshold}")
    enough = table >= threshold
    rows, columns = linear_sum_assignment(np.where(enough, table, 0.0), maximize=True)
    kept = enough[rows, columns]
    return list(zip(rows[kept].tolist(), columns[kept].tolist(), strict=True))


def instance_counts(true: Masks, predicted: Masks, threshold: float = 0.5) -> tuple[int, int, int]:
    """(true positives, false positives, false negatives) of `match_instances` at `threshold`.

    true: (N, H, W), none of them empty; predicted: (M, H, W), an empty one is a false positive.
    """
    hits = len(match_instances(_object_iou(true, predicted), threshold))
    return hits, len(predicted) - hits, len(true) - hits


def pair_counts(true: Masks, predicted: Masks) -> NDArray[np.int64]:
    """What `cgf1` needs of one image and one sentence: (12,).

    They are the number of true objects (N, H, W), of predicted ones (M, H, W), and of hits at each
    of THRESHOLDS. As in SAM 3, objects are matched once, by the largest total IoU over all pairs,
    so where masks overlap, hits can differ from those of `instance_counts`. No true one is empty.
    """
    table = _object_iou(true, predicted)
    matched = np.array([table[pair] for pair in match_instances(table, 0.0)])
    hits = (matched >= np.array(THRESHOLDS)[:, None]).sum(axis=1)
    return np.array([len(true), len(predicted), *hits], dtype=np.int64)


def mcc(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Matthews correlation of truth (N,) and prediction (N,), both bool, in [-1, 1].

    It is 0.0 where undefined: only one class is true, or only one was ever predicted.

    Example:
        >>> mcc([True, True, False, False], [True, False, False, False])
        0.5773502691896258
    """
    is_true, is_predicted = _check_flags("truth", truth), _check_flags("predicted", predicted)
    if is_true.shape != is_predicted.shape:
        lengths = f"{len(is_true)} and {len(is_predicted)}"
        raise InputError(f"truth and predicted differ in length: {lengths}")
    total, positives, claims = len(is_true), int(is_true.sum()), int(is_predicted.sum())
    hits = int((is_true & is_predicted).sum())
    margins = positives * (total - positives) * claims * (total - claims)
    return (total * hits - positives * claims) / math.sqrt(margins) if margins else 0.0


def auroc(truth: ArrayLike, score: ArrayLike) -> float:
    """Chance that a true one scores above a false one, a tie counting half, in [0, 1].

    Raises:
        InputError: only one class is there, or `score` is not (N,) or has a NaN.
    """
    is_true, scores = _check_flags("truth", truth), np.asarray(score, dtype=np.float64)
    if scores.shape != is_true.shape or np.isnan(scores).any():
        raise InputError(f"score must be {is_true.shape} without NaN, got {scores.shape}")
    positives, negatives = int(is_true.sum()), int((~is_true).sum())
    if not positives or not negatives:
        raise InputError(f"AUROC needs both classes, got {positives} true, {negatives} false")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, from 1
    above = ranks[place][is_true].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


@dataclass(frozen=True, kw_only=True)
class ConceptScores:
    """SAM 3's measure of "find all that the sentence names, and say so if nothing is there".

    `positive_micro_f1` in [0, 1] counts only pairs with a true object, `presence_mcc` in [-1, 1]
    is the correlation of "some true" with "some predicted" over all pairs, and `cgf1` is 100 times
    their product.
    """

    cgf1: float
    positive_micro_f1: float
    presence_mcc: float


def cgf1(counts: ArrayLike) -> ConceptScores:
    """Classification-gated F1 as in SA-Co (Carion et al., 2025) from rows of `pair_counts`.

    counts: (N, 12) integers, a row for each pair of an image and a sentence. F1 pools the pairs at
    each of THRESHOLDS and is then averaged. The reference's epsilons, worth less than 0.01
    points unless objects are few, are left out; one kind of pair alone, to it 0, is an error here.

    Raises:
        InputError: `counts` is no such table, or all pairs have a true object, or none has.
    """
    table = np.asarray(counts)
    columns = 2 + len(THRESHOLDS)
    if table.ndim != 2 or table.shape[1] != columns or not np.issubdtype(table.dtype, np.integer):
        found = f"{table.dtype} of {table.shape}"
        raise InputError(f"counts must be (N, {columns}) integers of pair_counts, got {found}")
    true, predicted, hits = table[:, 0], table[:, 1], table[:, 2:]
    if (hits < 0).any() or (hits > np.minimum(true, predicted)[:, None]).any():
        raise InputError("counts must hold no more hits than objects; take rows of pair_counts")
    has_objects = true > 0
    if has_objects.all() or not has_objects.any():
        share = f"{np.count_nonzero(has_objects)} of {len(has_objects)} pairs have a true object"
        raise InputError(f"cgF1 needs sentences that name something and some that don't: {share}")
    objects = true[has_objects].sum() + predicted[has_objects].sum()
    f1 = float((2 * hits[has_objects].sum(axis=0) / objects).mean())
    gate = mcc(has_objects, predicted > 0)
    return ConceptScores(cgf1=100 * f1 * gate, positive_micro_f1=f1, presence_mcc=gate)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[Rows], Any] = np.mean,
    *,
    groups: ArrayLike | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap (low, high) of `statistic` of `values` (N,) or rows (N, k).

    With `groups` (N,), such as the scene of each sentence, whole groups are drawn, so that values
    that depend on each other don't count as independent evidence. `statistic` gets an array like
    `values` and returns a number, for instance `lambda rows: cgf1(rows).cgf1`. Resamples where it
    raises InputError or is not finite, such as an AUROC of one class, are left out: the interval
    is then conditional on a defined value.

    Raises:
        InputError: the arrays or settings do not fit, there are fewer than two groups, or
            `statistic` is undefined on `values` or on more than half of the resamples.
    """
    rows = np.asarray(values)
    if rows.ndim not in (1, 2):
        raise InputError(f"values must be (N,) or (N, k), got {rows.shape}")
    labels = np.asarray(range(len(rows)) if groups is None else groups)
    if labels.shape != (len(rows),):
        raise InputError(f"groups must be one per value, ({len(rows)},), got {labels.shape}")
    if n < 1 or not 0.0 < level < 1.0:
        raise InputError(f"n must be positive and level in (0, 1), got n={n}, level={level}")
    if len(np.unique(labels)) < 2:
        raise InputError("a bootstrap needs at least 2 values, or groups where given; add data")
    if not math.isfinite(statistic(rows)):
        raise InputError("statistic is not finite on values; look for NaN or infinity in them")
    values_drawn = []
    for resample in _resample(rows, labels, n, seed):
        with contextlib.suppress(InputError):
            values_drawn.append(float(statistic(resample)))
    defined = [value for value in values_drawn if math.isfinite(value)]
    if 2 * len(defined) < n:
        raise InputError(f"statistic is undefined on {n - len(defined)} of {n} resamples; add data")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resample(rows: Rows, groups: Rows, n: int, seed: int) -> Iterator[Rows]:
    """`n` draws, with replacement, of as many whole groups of rows as there are."""
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows = rows[np.argsort(place, kind="stable")]  # members of a group side by side
    starts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)
    for _ in range(n):
        picked = generator.integers(0, len(sizes), len(sizes))
        lengths = sizes[picked]
        shift = starts[picked] - (np.cumsum(lengths) - lengths)
        yield rows[np.repeat(shift, lengths) + np.arange(lengths.sum())]


def _inner_band(mask: Masks, width: int) -> Masks:
    import cv2

    # `width` erosions by 3 × 3 are one by a square of this size.
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    pixels = np.ascontiguousarray(mask).view(np.uint8)
    core = cv2.erode(pixels, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return np.logical_and(mask, core == 0)


def _object_iou(true: Masks, predicted: Masks) -> NDArray[np.float64]:
    _check_masks(3, true=true, predicted=predicted)
    empty = np.flatnonzero(~true.any(axis=(1, 2)))
    if empty.size:
        raise InputError(f"true mask {empty[0]} is empty; leave out objects that can't be seen")
    return pairwise_iou(true, predicted)


def _check_masks(ndim: int, **masks: Masks) -> None:
    for name, mask in masks.items():
        array, shape = np.asarray(mask), "(H, W)" if ndim == 2 else "(N, H, W)"
        fits = array is mask and array.dtype == np.bool_ and array.ndim == ndim
        if not fits or 0 in array.shape[-2:]:
            found = f"{type(mask).__name__} of {array.dtype} {array.shape}"
            raise InputError(f"{name} must be a bool array {shape}, H and W > 0, got {found}")
    sizes = {name: mask.shape[-2:] for name, mask in masks.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"masks must be of one height and width, got {sizes}; resize one")


def _check_flags(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype != np.bool_ or not array.size:
        raise InputError(f"{name} must be (N,) bools, N > 0, got {array.dtype} of {array.shape}")
    return array
