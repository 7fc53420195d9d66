"""From the heat of a sentence to masks, in rounds: prompt SAM-2, then prompt for the heat left.

Where like objects touch, their heat is one region, and two things take them apart. A point in one
of them means that one, so each foreground point is tried alone, and `split_instances` looks at the
masks. And what the masks leave of the heat, `uncovered_heat`, is prompted for in the next round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError, as_one_line
from labkit.segment.detectors import Detections, fuse_prompts
from labkit.segment.instances import (
    Floats,
    Heat,
    Mask,
    check_shares,
    label_components,
    measure_depth,
    scale_to_peak,
)
from labkit.segment.masks import (
    OVERLAP_THRESHOLD,
    Candidate,
    Logits,
    is_duplicate,
    is_part,
    mask_nms,
    measure_agreement,
    measure_stability,
    remove_small_regions,
    select_mask,
    upsample_mask,
)
from labkit.segment.prompts import (
    Points,
    Prompt,
    find_competing_heat,
    make_box,
    make_mask_logits,
    make_prompts,
)
from labkit.segment.sam2 import ImageFeatures, Sam2

Size = tuple[int, int]

_ROUNDS = 3
_BLUR = 0.56  # of a patch: the spread that takes the grain of the vision tower out of a map
_FAINT = 0.25  # of the peak: unwanted heat may take the peak, and leave no more than its foot
_SUPPORT = 0.65  # share of the hottest mask's mean heat that the mean heat of another must reach
_FLOOR = 0.35  # probability that is enough, whatever that of the hottest mask
_MIN_AGREEMENT = 0.35  # of a mask with the uncovered heat, from the second round on

_TRUSTED = 0.6  # predicted IoU × stability from which the mask of a point counts
_POINTS_AT_ONCE = 32  # of which only the best masks are kept, small
_INSIDE = 0.5  # share of a point's mask that must lie in the region of its prompt
_ALIKE = 0.2  # of the largest mask's area: a smaller one is a part of something
_TOGETHER = 0.6  # share of a region from which the masks in it cover it together
_AS_SURE = 0.95  # of the trust in the best part, from which the whole is trusted as much
_CONTAINS = 0.85  # share of the parts that the mask of the whole must cover

_HOT = 0.5  # share of the peak that uncovered ground must reach
_SLOPE = 0.25  # share of the peak down to which its slopes are kept
_FRINGE = 0.02  # of the longer side: around a mask, so much heat is its own
_FAR_ON, _FAR_OFF = 0.5, 0.25  # of the root of a mask's area: clicks so far from its outline
_TOUCHES = 0.1  # share of what lies at a click: so much of it in the mask makes both one

_MIN_AREA = 0.1  # of the largest mask's area: less is a fringe, not an object


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds that a user may tune; see `labkit.TextSegmenter` for what they do.

    Raises:
        InputError: a threshold is out of its range.
    """

    presence: float | None = None
    box: float = 0.5
    mask: float = 0.0
    overlap: float = OVERLAP_THRESHOLD
    minimum_area: float = 0.0
    maximum_objects: int | None = None

    def __post_init__(self) -> None:
        check_shares(box_threshold=self.box)
        ranges = {
            "presence_threshold": (self.presence, 0, 1),
            "mask_threshold": (self.mask, -10, 10),
            "overlap_threshold": (self.overlap, 0, 1),
            "minimum_area": (self.minimum_area, 0, 1),
        }
        for name, (value, low, high) in ranges.items():
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} must lie in [{low}, {high}], got {value}")
        if self.maximum_objects is not None and self.maximum_objects < 1:
            raise InputError(f"maximum_objects must be 1 or more, got {self.maximum_objects}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Query:
    """A sentence on its way to masks.

    Attributes:
        sentence: what is looked for.
        heat: its map (h, w), smoothed, without ground that an unwanted sentence explains better.
        pending: prompts that SAM-2 has not been given yet, in pixels of `heat`.
        prompts: prompts that SAM-2 was given.
        candidates: the masks so far, best first.
        blur: by how many pixels the map was smoothed.
        lead: (h, w), by how much an unwanted sentence explains each pixel better than this one, or
            less than 0; None where nothing is unwanted.
        floor: probability from which an object counts, however hot another one is; infinite where
            maps are only relative.
    """

    sentence: str
    heat: Heat
    pending: tuple[Prompt, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    blur: float = 0.0
    lead: Heat | None = None
    floor: float = math.inf


def init_queries(
    sentences: Sequence[str],
    wanted: Heat,
    unwanted: Heat,
    is_present: Sequence[bool],
    *,
    patch_size: int,
    low_res_size: int,
    absolute: bool = True,
    box_threshold: float = 0.5,
    detections: Sequence[Detections] | None = None,
) -> list[Query]:
    """Make a query for each of W sentences, with its first prompts if the sentence counts as true.

    Args:
        sentences: what is looked for.
        wanted: maps (W, h, w) of these sentences.
        unwanted: maps (U, h, w) of sentences that are not meant and count as true; U may be 0.
        is_present: for each of W sentences, whether it counts as true. Only those get prompts, and
            only those compete for ground.
        patch_size: grain of the maps in pixels.
        low_res_size: width and height of SAM-2's mask prompts.
        absolute: whether an unwanted sentence takes the ground where its probability is higher, or
            where it is higher in relation to the peak of its map.
        box_threshold: see `labkit.segment.prompts.make_prompts`.
        detections: for each of W sentences, boxes of a detector in pixels of the maps; see
            `labkit.segment.detectors.fuse_prompts`. None if none was asked.
    """
    blur = _BLUR * patch_size
    wanted, unwanted = (_smooth(maps, blur) for maps in (wanted, unwanted))
    wanted_shares, unwanted_shares = (
        np.array([scale_to_peak(heat) for heat in maps], np.float32).reshape(maps.shape)
        for maps in (wanted, unwanted)
    )
    levels = wanted if absolute else wanted_shares
    unwanted_level = (unwanted if absolute else unwanted_shares).max(axis=0, initial=0.0)
    present = np.asarray(is_present, dtype=bool)
    queries = []
    for index, sentence in enumerate(sentences):
        floor = _FLOOR if absolute else math.inf
        query = Query(sentence=sentence, heat=wanted[index], blur=blur, floor=floor)
        if present[index]:
            heat = _remove_unwanted(wanted[index], levels[index], unwanted_level)
            others = present & (np.arange(len(wanted)) != index)
            rivals = np.concatenate([wanted_shares[others], unwanted_shares])
            prompts = make_prompts(
                heat,
                low_res_size=low_res_size,
                competing=find_competing_heat(scale_to_peak(heat), rivals),
                box_threshold=box_threshold,
            )
            if detections is not None:
                prompts = fuse_prompts(
                    prompts,
                    heat,
                    detections[index],
                    low_res_size=low_res_size,
                    box_threshold=box_threshold,
                )
            lead = unwanted_level - levels[index] if len(unwanted) else None
            query = replace(query, heat=heat, pending=tuple(prompts), lead=lead)
        queries.append(query)
    return queries


def generate_masks(
    sam2: Sam2, features: ImageFeatures, query: Query, thresholds: Thresholds | None = None
) -> Query:
    """Prompt SAM-2 for the objects of a sentence, in at most three rounds.

    Args:
        sam2: the model.
        features: of the image, from `Sam2.encode`.
        query: from `init_queries`.
        thresholds: of boxes, masks and overlap.

    Returns:
        The query with its prompts and its masks.
    """
    thresholds = thresholds or Thresholds()
    height, width = size = query.heat.shape
    scale = np.array([sam2.image_size / width, sam2.image_size / height])
    blur = scale_blur(query, sam2.low_res_size)

    def predict_whole(prompt: Prompt) -> list[PointMask]:
        (logits,), (ious,) = sam2.predict(features, [prompt.scale(*scale)])
        return [
            _select_point_mask(prompt.points[0], mask[None] - thresholds.mask, iou[None], size)
            for mask, iou in zip(logits, ious, strict=True)
        ]

    for _ in range(_ROUNDS):
        if not query.pending:
            break
        points = _list_points(query.pending)
        attempts: list[PointMask] = []
        for start in range(0, len(points), _POINTS_AT_ONCE):
            part = points[start : start + _POINTS_AT_ONCE]
            predictions = sam2.predict_points(features, (part + 0.5) * scale - 0.5)
            attempts += [
                _select_point_mask(point, logits - thresholds.mask, ious, size)
                for point, logits, ious in zip(part, *predictions, strict=True)
            ]
        prompts = split_instances(
            query.pending,
            attempts,
            query.heat,
            sam2.low_res_size,
            thresholds.overlap,
            predict_whole=predict_whole,
        )
        predictions = sam2.predict(features, [prompt.scale(*scale) for prompt in prompts])
        candidates = [
            select_mask(prompt, logits - thresholds.mask, ious, blur)
            for prompt, logits, ious in zip(prompts, *predictions, strict=True)
        ]
        del predictions  # four masks a prompt, of which one is kept
        query = _update(query, prompts, candidates, sam2.low_res_size, thresholds)
    return replace(query, candidates=_keep_supported(query))


def scale_blur(query: Query, low_res_size: int) -> tuple[float, float]:
    """By how many pixels (x, y) the map of a query is smoothed, in SAM-2's low resolution."""
    height, width = query.heat.shape
    return query.blur * low_res_size / width, query.blur * low_res_size / height


@dataclass(frozen=True, eq=False)
class PointMask:
    """What SAM-2 made of one point alone.

    Attributes:
        point: (2,) pixel (x, y) of the heat map.
        mask: (h, w) bool, in pixels of the heat map.
        trust: predicted IoU × stability of the mask, in [0, 1].
    """

    point: NDArray[np.float64]
    mask: Mask
    trust: float


def split_instances(
    prompts: Sequence[Prompt],
    attempts: Sequence[PointMask],
    heat: Heat,
    low_res_size: int,
    overlap_threshold: float = OVERLAP_THRESHOLD,
    *,
    predict_whole: Callable[[Prompt], list[PointMask]],
) -> list[Prompt]:
    """Replace each prompt that stands for several objects by one prompt for each of them.

    If the masks of a prompt's foreground points are of different objects, each object gets a prompt
    of its own: its point against those of the others, its box, its heat. The masks may also be of
    the head, the torso and the legs of one person. So they count as objects only if they are alike
    in size and heat, and either cover the region together, or the whole prompt yields no mask of
    them all that SAM-2 trusts as much.

    Args:
        prompts: in pixels of `heat`.
        attempts: for each prompt with two or more foreground points, in order, what SAM-2 made of
            each of these points.
        heat: the map (h, w) that the prompts were made of.
        low_res_size: width and height of SAM-2's mask prompts.
        overlap_threshold: IoU from which two masks are masks of one object.
        predict_whole: gives the masks that SAM-2 makes of a prompt.
    """
    shares = scale_to_peak(heat)
    remaining = iter(attempts)
    split: list[Prompt] = []
    for prompt in prompts:
        count = _count_points(prompt)
        distinct = _keep_distinct(
            [next(remaining) for _ in range(count)], prompt.region, overlap_threshold
        )
        if len(distinct) < 2 or is_one_object(prompt, distinct, shares, predict_whole):
            split.append(prompt)
            continue
        background = prompt.points[prompt.labels == 0]
        for current in distinct:
            others = np.array([other.point for other in distinct if other is not current])
            points = np.concatenate([current.point[None], others, background])
            split.append(
                Prompt(
                    points=points,
                    labels=np.repeat([1, 0], [1, len(points) - 1]),
                    box=make_box(current.mask),
                    mask_logits=make_mask_logits(shares, current.mask, low_res_size),
                    region=current.mask,
                )
            )
    return split


def is_one_object(
    prompt: Prompt,
    parts: Sequence[PointMask],
    shares: Heat,
    predict_whole: Callable[[Prompt], list[PointMask]],
) -> bool:
    """Whether masks of points are parts of one object, rather than objects; see `split_instances`.

    Args:
        prompt: in whose region the points lie.
        parts: two or more masks that do not repeat each other.
        shares: (h, w) relative heat.
        predict_whole: gives the masks that SAM-2 makes of a prompt.
    """
    areas = [int(part.mask.sum()) for part in parts]
    means = [float(shares[part.mask].mean()) for part in parts]
    if min(areas) < _ALIKE * max(areas) or min(means) < _SUPPORT * max(means):
        return True
    region, together = prompt.region, np.any([part.mask for part in parts], axis=0)
    if int((together & region).sum()) >= _TOGETHER * int(region.sum()):
        return False
    trust = _AS_SURE * max(part.trust for part in parts)
    return any(
        whole.trust >= trust
        and int((whole.mask & together).sum()) >= _CONTAINS * int(together.sum())
        and int((whole.mask & region).sum()) > _INSIDE * int(whole.mask.sum())
        for whole in predict_whole(prompt)
    )


def uncovered_heat(heat: Heat, masks: Sequence[Mask], floor: float = math.inf) -> Heat:
    """The part of a heat map that calls for one more object.

    Args:
        heat: (h, w), not negative.
        masks: (h, w) each, of the objects so far.
        floor: heat that is hot in any case; otherwise half the peak is.

    Returns:
        (h, w): `heat` where it is hot, compact and clear of every mask, with its slopes; else 0.
    """
    import cv2

    nothing = np.zeros_like(heat)
    if not masks:
        return nothing
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    reach = max(1, round(_FRINGE * max(heat.shape)))
    covered = np.any(masks, axis=0).astype(np.uint8)
    free = cv2.dilate(covered, cross, iterations=reach) == 0
    shares = scale_to_peak(heat)
    hot = (free & ((shares >= _HOT) | (heat >= floor))).astype(np.uint8)
    core = cv2.erode(hot, cross, iterations=reach, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    compact = cv2.dilate(core, cross, iterations=reach) > 0
    pieces, areas = label_components(free & (shares >= _SLOPE), connectivity=4)
    hot_areas = np.bincount(pieces[compact], minlength=len(areas))
    hot_areas[0] = 0
    min_area = max(_MIN_AREA * max(int(mask.sum()) for mask in masks), 1)
    return np.where(np.isin(pieces, np.flatnonzero(hot_areas >= min_area)), heat, nothing)


@dataclass(frozen=True, eq=False, kw_only=True)
class Correction:
    """What a user says about the mask of one object, in pixels of the image.

    Attributes:
        points: (K, 2) pixels (x, y).
        labels: (K,) 1 for a point on the object, 0 for a point that is not.
        box: (4,) XYXY around the object; None for none.
    """

    points: NDArray[np.float64]
    labels: NDArray[np.int64]
    box: NDArray[np.float64] | None = None

    @classmethod
    def check(
        cls, points: ArrayLike | None, labels: ArrayLike | None, box: ArrayLike | None, size: Size
    ) -> Correction:
        """Make a correction of what a user gave, for an image of `size` (H, W).

        Raises:
            InputError: there is neither point nor box, or one has the wrong form or lies outside of
                the image.

        Example:
            >>> Correction.check([(3, 2)], None, None, (4, 6)).labels
            array([1])
        """
        height, width = size
        if points is None and box is None:
            raise InputError("a correction needs points or a box, got neither")
        clicks = _to_floats("points", [] if points is None else points, (-1, 2))
        if not (np.all(clicks >= 0) and np.all(clicks < (width, height))):
            raise InputError(
                f"points must be pixels (x, y) of the image, {width} wide and {height} high, got "
                f"{as_one_line(clicks.tolist())}"
            )
        kinds = np.ones(len(clicks)) if labels is None else _to_floats("labels", labels, (-1,))
        if len(kinds) != len(clicks) or not np.isin(kinds, (0, 1)).all():
            raise InputError(
                f"labels must be 1 (object) or 0 (not) for each of {len(clicks)} points, got "
                f"{as_one_line(kinds.tolist())}"
            )
        edges = None if box is None else _to_floats("box", box, (4,))
        if edges is not None:
            left, top, right, bottom = edges
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                raise InputError(
                    f"box must be XYXY in the image, {width} wide and {height} high, got "
                    f"{as_one_line(edges.tolist())}"
                )
        if not len(clicks) and edges is None:
            raise InputError("a correction needs points or a box, got neither")
        return cls(points=clicks, labels=kinds.astype(np.int64), box=edges)

    def add(self, later: Correction) -> Correction:
        """This correction and a later one, whose box, if it has one, takes the place of this."""
        return Correction(
            points=np.concatenate([self.points, later.points]),
            labels=np.concatenate([self.labels, later.labels]),
            box=self.box if later.box is None else later.box,
        )


def _to_floats(name: str, values: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Finite numbers in a shape."""
    try:
        array = np.asarray(values, dtype=np.float64)
        if not array.size and shape[0] < 0:
            array = array.reshape(0, *shape[1:])
        if array.ndim != len(shape) or array.shape != array.reshape(shape).shape:
            raise ValueError
    except (TypeError, ValueError) as error:
        wanted = {"points": "pairs (x, y)", "labels": "a list of 0 and 1", "box": "four numbers"}
        raise InputError(
            f"{name} must be {wanted[name]}, got {as_one_line(repr(values))}"
        ) from error
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite, got {as_one_line(array.tolist())}")
    return array


def refine_mask(
    sam2: Sam2,
    features: ImageFeatures,
    candidate: Candidate,
    correction: Correction,
    size: Size,
    *,
    mask_threshold: float = 0.0,
    blur: tuple[float, float] = (0.0, 0.0),
) -> Candidate:
    """Correct a mask by clicks and a box, without encoding the image again.

    A click near the outline of the mask moves the outline: SAM-2 is asked with the logits of the
    mask, and again with its box and a point of its own, and the mean of both counts if it does what
    the clicks say. A click far from the outline means more, and SAM-2 is first asked what lies
    there. If it is not the object, it is taken away. If it is, it is added, or the mask moves there
    if the two do not touch and no other click holds the mask where it was. A box counts more than
    the mask: nothing outside of it is left, and SAM-2 is asked without the logits first.

    Args:
        sam2: the model.
        features: of the image, from `Sam2.encode`.
        candidate: the mask.
        correction: all that was said about it so far.
        size: (H, W) of the image.
        mask_threshold: logit above which a pixel belongs to a mask.
        blur: see `labkit.segment.masks.measure_agreement`.

    Returns:
        A candidate with the new logits; its mask may be empty.
    """
    scale = np.array([sam2.image_size / size[1], sam2.image_size / size[0]])
    shrink = sam2.low_res_size / sam2.image_size
    clicks, labels = (correction.points + 0.5) * scale - 0.5, correction.labels
    pixels = ((clicks + 0.5) * shrink).astype(np.int64).clip(0, sam2.low_res_size - 1)

    def ask(points: Floats, kinds: Points, prompt: Logits | None = None) -> tuple[Logits, Logits]:
        prompt = None if prompt is None else (prompt + mask_threshold).clip(-32, 32)
        logits, ious = sam2.predict_clicks(features, points, kinds, prompt)
        return logits - mask_threshold, ious

    def ask_at(click: Floats) -> Logits:
        logits, ious = ask(click[None], np.ones(1, np.int64))
        best: Logits = logits[_find_most_trusted(logits, ious)]
        return best

    box = None if correction.box is None else correction.box.reshape(2, 2) * scale
    start = candidate.logits if box is None else _clear_outside(candidate.logits, box * shrink)
    base = _follow_far_clicks(start, pixels, labels, [*clicks], ask_at)
    corners = _find_corners(base > 0) / shrink if box is None else box
    boxed, kinds = np.concatenate([corners, clicks]), np.concatenate([[2, 3], labels])
    if box is not None:
        options = [ask(boxed, kinds), ask(boxed, kinds, base)]
    elif base is not start:
        known = np.array([candidate.predicted_iou], np.float32)
        options = [ask(boxed, kinds, base), (base[None], known)]
    else:
        own = _find_own_point(candidate, sam2.image_size)
        first = ask(clicks, labels, base)
        second = ask(np.concatenate([boxed, own]), np.append(kinds, np.ones(len(own), int)))
        mean = (first[0] + second[0]) / 2, (first[1] + second[1]) / 2
        options = [mean, second, first]

    def count_obeyed(logits: Logits) -> int:
        return int(((logits[pixels[:, 1], pixels[:, 0]] > 0) == labels).sum())

    logits, ious = max(options, key=lambda option: count_obeyed(option[0][0]))
    cleaned = remove_small_regions(logits[0])
    if count_obeyed(cleaned) < count_obeyed(logits[0]):
        cleaned = logits[0]
    agreement = candidate.agreement
    if candidate.prompt is not None:
        heat = (candidate.prompt.mask_logits + 10) / 20
        agreement = measure_agreement(cleaned > 0, heat, blur)
    return replace(
        candidate,
        logits=cleaned.astype(np.float32),
        predicted_iou=float(np.clip(ious[0], 0, 1)),
        stability=measure_stability(cleaned),
        agreement=agreement,
    )


def _follow_far_clicks(
    logits: Logits,
    pixels: Points,
    labels: Points,
    clicks: Sequence[Floats],
    ask_at: Callable[[Floats], Logits],
) -> Logits:
    """Logits (S, S) after the clicks that are far from the outline; the same array if none is.

    Args:
        logits: of the mask.
        pixels: (K, 2) the clicks in pixels of the logits.
        labels: (K,) 1 or 0.
        clicks: the K clicks as `ask_at` takes them.
        ask_at: gives the logits (S, S) of what lies at a click.
    """
    for pixel, label, click in zip(pixels, labels, clicks, strict=True):
        mask = logits > 0
        x, y = pixel
        is_on_object = label == 1
        side: Mask = mask if mask[y, x] else ~mask
        share = float(measure_depth(side)[y, x]) / max(math.sqrt(mask.sum()), 1)
        if mask[y, x] == is_on_object or share < (_FAR_ON if is_on_object else _FAR_OFF):
            continue
        there = ask_at(click)
        if is_on_object:
            others = pixels[(labels == 1) & (pixels != pixel).any(axis=1)]
            is_held = bool(mask[others[:, 1], others[:, 0]].any())
            touches = int((mask & (there > 0)).sum()) > _TOUCHES * int((there > 0).sum())
            logits = np.maximum(logits, there) if touches or is_held else there
        elif ((logits > 0) & (there <= 0)).any():
            logits = np.minimum(logits, -there)
    return logits


def _find_most_trusted(logits: Logits, ious: Logits) -> int:
    """Which of M masks (M, S, S) has the highest predicted IoU × stability."""
    trust = [float(iou) * measure_stability(mask) for iou, mask in zip(ious, logits, strict=True)]
    return int(np.argmax(trust))


def _clear_outside(logits: Logits, box: Floats) -> Logits:
    """Logits (S, S) of a mask without what lies outside of a box, its corners (2, 2) in pixels."""
    (left, top), (right, bottom) = np.rint(box).astype(int)
    cleared = -np.abs(logits)
    cleared[top:bottom, left:right] = logits[top:bottom, left:right]
    return cleared


def _find_corners(mask: Mask) -> Floats:
    """The corners (2, 2) of the box around a mask; of an empty one, those of everything."""
    if not mask.any():
        return np.array([[0, 0], mask.shape[::-1]], dtype=np.float64)
    return make_box(mask).reshape(2, 2)


def _find_own_point(candidate: Candidate, image_size: int) -> Floats:
    """The first foreground point of a prompt (1, 2), in pixels of SAM-2's square.

    There is none, (0, 2), where the prompt is not known or the mask has left the point.
    """
    prompt = candidate.prompt
    if prompt is None or not (prompt.labels == 1).any():
        return np.zeros((0, 2))
    height, width = prompt.region.shape
    own = prompt.scale(image_size / width, image_size / height).points[:1]
    low_res = candidate.logits.shape[0]
    x, y = ((own[0] + 0.5) * low_res / image_size).astype(np.int64).clip(0, low_res - 1)
    return own if candidate.logits[y, x] > 0 else own[:0]


def _count_points(prompt: Prompt) -> int:
    """How many foreground points are worth trying alone: none if there is only one."""
    count = int((prompt.labels == 1).sum())
    return count if count > 1 else 0


def _list_points(prompts: Sequence[Prompt]) -> NDArray[np.float64]:
    """The foreground points (N, 2) of all prompts that have two or more."""
    return np.concatenate([prompt.points[: _count_points(prompt)] for prompt in prompts])


def _select_point_mask(
    point: NDArray[np.float64], logits: NDArray[np.float32], ious: Heat, size: tuple[int, int]
) -> PointMask:
    """The most trusted of the four masks (4, S, S) of a point, at the size (h, w) of the map."""
    best = _find_most_trusted(logits, ious)
    trust = float(ious[best]) * measure_stability(logits[best])
    return PointMask(point, upsample_mask(remove_small_regions(logits[best]), size), trust)


def _keep_distinct(
    attempts: Sequence[PointMask], region: Mask, overlap_threshold: float
) -> list[PointMask]:
    """The trusted masks inside `region` that are of different objects, best first."""
    kept: list[PointMask] = []
    for attempt in sorted(attempts, key=lambda attempt: -attempt.trust):
        mask = attempt.mask
        inside = int((mask & region).sum()) > _INSIDE * int(mask.sum())
        new = not any(
            is_part(mask, other.mask) or is_duplicate(mask, other.mask, overlap_threshold)
            for other in kept
        )
        if inside and new and attempt.trust >= _TRUSTED:
            kept.append(attempt)
    return kept


def _update(
    query: Query,
    prompts: Sequence[Prompt],
    candidates: Sequence[Candidate],
    low_res_size: int,
    thresholds: Thresholds,
) -> Query:
    """`query` after a round that gave a candidate for each prompt, with what is left to prompt."""
    if query.candidates:
        candidates = [c for c in candidates if c.agreement >= _MIN_AGREEMENT]
    kept = mask_nms([*query.candidates, *candidates], thresholds.overlap)
    given = (*query.prompts, *prompts)
    if kept == list(query.candidates):  # the same heat would be left, and prompted for again
        return replace(query, prompts=given, pending=())
    masks = [upsample_mask(candidate.logits, query.heat.shape) for candidate in kept]
    rest = uncovered_heat(query.heat, masks, query.floor)
    pending = make_prompts(
        rest,
        low_res_size=low_res_size,
        competing=scale_to_peak(np.where(rest > 0, np.float32(0), query.heat)),
        box_threshold=thresholds.box,
    )
    return replace(query, prompts=given, pending=tuple(pending), candidates=tuple(kept))


def _keep_supported(query: Query) -> tuple[Candidate, ...]:
    """The masks that the map really means: hot all over, or about as hot as the hottest.

    A mask inside which an unwanted sentence is hotter, on average, is not meant.
    """
    meant: list[tuple[Candidate, float]] = []
    for candidate in query.candidates:
        mask = upsample_mask(candidate.logits, query.heat.shape)
        lead = query.lead[mask].sum() if query.lead is not None else 0.0
        if lead <= 0:
            meant.append((candidate, float(query.heat[mask].mean()) if mask.any() else 0.0))
    lowest = min(_SUPPORT * max((mean for _, mean in meant), default=0.0), query.floor)
    return tuple(candidate for candidate, mean in meant if mean >= lowest)


def _remove_unwanted(heat: Heat, level: Heat, unwanted: Heat) -> Heat:
    """`heat` less ground where `unwanted` is above `level`, and less a foot that lost its peak."""
    taken = unwanted > level
    if taken.any():
        taken |= level < _FAINT * level.max()
    return np.where(taken, np.float32(0), heat)


def _smooth(maps: Heat, sigma: float) -> Heat:
    """Maps (S, h, w) in which a patch of the vision tower no longer stands out by itself."""
    from scipy import ndimage

    smooth: Heat = ndimage.gaussian_filter(maps, (0, sigma, sigma), mode="nearest")
    return smooth
