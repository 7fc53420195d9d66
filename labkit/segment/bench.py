"""A segmenter measured on procedural scenes, and on photographs with true masks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.runtime import InputError, is_interactive
from labkit.segment.annotations import AnnotatedImage, Annotations, Target
from labkit.segment.clipseg import normalize_sentence
from labkit.segment.generate import Thresholds
from labkit.segment.metrics import (
    auroc,
    bootstrap_interval,
    boundary_iou,
    cgf1,
    instance_counts,
    iou,
    mcc,
    pair_counts,
)
from labkit.segment.pipeline import TextSegmenter, check_sentences
from labkit.segment.results import SentenceResult

WEAK_PEAK = 0.013  # the highest probability in the lab's own failed example
_THRESHOLDS = np.round(np.arange(0.05, 1.0, 0.05), 2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sentence asked of one scene.

    IoUs are of everything that the sentence names; they are NaN if it names nothing.

    Attributes:
        scene: number of the scene.
        is_true: whether the sentence names something in it.
        presence: the presence score.
        present: the verdict.
        weak_present: the verdict from weak maps.
        iou: of the masks; 0 if a true sentence was found absent.
        boundary_iou: of the same masks.
        assumed_iou: with presence assumed.
        weak_iou: with presence assumed, from weak maps.
        clipseg_ious: (19,) of the map alone, thresholded at 0.05, 0.10, ..., 0.95.
        num_objects: how many objects the sentence names.
        num_hits: how many of them have a mask of IoU 0.5 or more of their own.
        counts: (12,) see `labkit.segment.metrics.pair_counts`.
    """

    scene: int
    is_true: bool
    presence: float
    present: bool
    weak_present: bool
    iou: float
    boundary_iou: float
    assumed_iou: float
    weak_iou: float
    clipseg_ious: NDArray[np.float64]
    num_objects: int
    num_hits: int
    counts: NDArray[np.int64]


def measure_scenes(
    segmenter: TextSegmenter,
    count: int = 500,
    *,
    seed: int = EVALUATION_SEED,
    start: int = 0,
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """Measure quality on `count` scenes, asking each three sentences that are true and three not.

    Args:
        segmenter: of any profile; the result names its weights.
        count: at least 2, so that there is an interval.
        seed: of the scenes; that of evaluation is never trained, tuned or calibrated on.
        start: number of the first scene.
        thresholds: of the segmenter; None takes the usual ones.

    Returns:
        Figures in [0, 1] with 95 % intervals from resampled scenes; see `summarize`.

    Raises:
        InputError: `count` is below 2.
    """
    if count < 2:
        raise InputError(f"count must be at least 2, got {count}")
    numbers = tqdm(range(start, start + count), desc="scenes", disable=not is_interactive())
    rows = [row for number in numbers for row in measure_scene(segmenter, number, seed, thresholds)]
    return {"seed": seed, "start": start, "weights": segmenter.models, **summarize(rows)}


def measure_scene(
    segmenter: TextSegmenter, number: int, seed: int, thresholds: Thresholds | None = None
) -> list[Row]:
    """Measure one scene: a row for each sentence asked of it."""
    scene = make_object_scene(number, seed=seed)
    sentences = scene.sample_sentences(number)
    maps = segmenter.clipseg.predict_heat(scene.image, sentences, segmenter.templates)
    weak_maps = maps * (WEAK_PEAK / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12))
    is_true = [sentence in scene.present for sentence in sentences]
    true_sentences = [s for s, true in zip(sentences, is_true, strict=True) if true]
    gated, weak = (
        segmenter.segment_maps(
            scene.image, sentences, wanted=each, exclusive=True, thresholds=thresholds
        )
        for each in (maps, weak_maps)
    )
    assumed, weak_assumed = (
        segmenter.segment_maps(
            scene.image,
            true_sentences,
            wanted=each[is_true],
            assume_present=True,
            thresholds=thresholds,
        )
        for each in (maps, weak_maps)
    )
    rows = []
    for sentence in sentences:
        result, truth = gated[sentence], scene.masks_of(sentence)
        whole = truth.any(axis=0)
        masks = np.array([o.mask for o in result.objects], dtype=bool).reshape(-1, *whole.shape)
        true = len(truth) > 0
        rows.append(
            Row(
                scene=number,
                is_true=true,
                presence=result.presence,
                present=result.present,
                weak_present=weak[sentence].present,
                iou=iou(whole, result.mask) if true else math.nan,
                boundary_iou=boundary_iou(whole, result.mask) if true else math.nan,
                assumed_iou=iou(whole, assumed[sentence].mask) if true else math.nan,
                weak_iou=iou(whole, weak_assumed[sentence].mask) if true else math.nan,
                clipseg_ious=_threshold_ious(result.heat, whole),
                num_objects=len(truth),
                num_hits=instance_counts(truth, masks, 0.5)[0],
                counts=pair_counts(truth, masks),
            )
        )
    return rows


def _threshold_ious(
    heat: NDArray[np.float32], truth: NDArray[np.bool_], ignore: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """IoU (19,) of the map, brought to the size of the image, at each threshold."""
    from PIL import Image

    size = (truth.shape[1], truth.shape[0])
    large = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
    if ignore is not None:
        large = np.where(ignore, -1.0, large)
    return np.array([iou(truth, large >= threshold) for threshold in _THRESHOLDS])


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Summarise the rows of all sentences as figures.

    `miou` and the other mean IoUs are over true sentences. `miou_clipseg_only` is at the one
    threshold that is best for it on these very scenes, which favours it. `instance_recall` is over
    the objects of sentences that name two or more.
    """
    true = [row for row in rows if row.is_true]
    several = [row for row in true if row.num_objects > 1]
    scenes = np.array([row.scene for row in rows])
    true_scenes = np.array([row.scene for row in true])
    truth = np.array([row.is_true for row in rows])
    presence = np.array([row.presence for row in rows])
    present = np.array([row.present for row in rows])
    by_threshold = np.array([row.clipseg_ious for row in true]).mean(axis=0)
    best = int(by_threshold.argmax())

    def mean(values: Sequence[float]) -> dict[str, Any]:
        array = np.array(values)
        return {"mean": float(array.mean()), "ci": _interval(array, true_scenes)}

    ious, alone = mean([r.iou for r in true]), mean([r.clipseg_ious[best] for r in true])
    gain = mean([row.iou - row.clipseg_ious[best] for row in true])
    assumed, weak = mean([r.assumed_iou for r in true]), mean([r.weak_iou for r in true])
    recall = np.array([(row.num_hits, row.num_objects) for row in several], dtype=float)
    concept = cgf1(np.stack([row.counts for row in rows]))
    verdicts = np.column_stack([truth, present, presence]).astype(float)
    return {
        "n_scenes": len(set(scenes.tolist())),
        "n_sentences": len(rows),
        "n_present": len(true),
        "miou": ious["mean"],
        "miou_ci": ious["ci"],
        "miou_clipseg_only": alone["mean"],
        "miou_clipseg_only_ci": alone["ci"],
        "clipseg_only_threshold": float(_THRESHOLDS[best]),
        "miou_gain": gain["mean"],
        "miou_gain_ci": gain["ci"],
        "boundary_miou": float(np.mean([row.boundary_iou for row in true])),
        "miou_assumed": assumed["mean"],
        "miou_assumed_ci": assumed["ci"],
        "miou_peak_0013": weak["mean"],
        "miou_peak_0013_ci": weak["ci"],
        "presence_auroc": auroc(truth, presence),
        "presence_auroc_ci": _interval(verdicts, scenes, lambda r: auroc(r[:, 0] > 0, r[:, 2])),
        "presence_mcc": mcc(truth, present),
        "presence_mcc_ci": _interval(verdicts, scenes, lambda r: mcc(r[:, 0] > 0, r[:, 1] > 0)),
        "presence_mcc_peak_0013": mcc(truth, np.array([row.weak_present for row in rows])),
        "n_sentences_of_several": len(several),
        "n_objects_of_several": int(recall[:, 1].sum()) if several else 0,
        "instance_recall": float(recall[:, 0].sum() / recall[:, 1].sum()) if several else None,
        "instance_recall_ci": _interval(
            recall,
            np.array([row.scene for row in several]),
            lambda r: float(r[:, 0].sum() / r[:, 1].sum()),
        ),
        "cgf1": concept.cgf1,
    }


def _interval(values: Any, groups: Any, statistic: Any = np.mean) -> list[float] | None:
    """The 95 % interval over resampled scenes or images; None where there are fewer than two."""
    if len(set(groups)) < 2:
        return None
    low, high = bootstrap_interval(values, statistic, groups=groups)
    return [float(low), float(high)]


@dataclass(frozen=True, kw_only=True)
class PhotoRow:
    """One sentence asked of one photograph or crop. Pixels to ignore are left out of everything.

    Attributes:
        image: number of the photograph; its crops have the same.
        sentence: what was asked.
        is_thing: whether it names things, which can be counted.
        is_true: whether it names something in the image.
        presence: the presence score.
        present: the verdict.
        iou: of all it names; NaN if it names nothing, 0 if it was found absent all the same.
        boundary_iou: of the same masks.
        shared: pixels of the true mask that were found.
        union: pixels of the true mask and of the found one together.
        clipseg_ious: (19,) of the map alone, thresholded at 0.05, 0.10, ..., 0.95; NaN if it names
            nothing.
        num_instances: how many true instances there are, of a thing.
        num_hits: how many of them have a mask of IoU 0.5 or more of their own.
        counts: (12,) see `labkit.segment.metrics.pair_counts`; None of stuff, and of a thing of
            which no instance is known.
    """

    image: int
    sentence: str
    is_thing: bool
    is_true: bool
    presence: float
    present: bool
    iou: float
    boundary_iou: float
    shared: int
    union: int
    clipseg_ious: NDArray[np.float64]
    num_instances: int
    num_hits: int
    counts: NDArray[np.int64] | None


def measure_photos(
    segmenter: TextSegmenter,
    annotations: Annotations,
    *,
    crops: bool = False,
    max_absent: int | None = 10,
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """Measure quality on annotated photographs.

    Every sentence that is true of an image is asked, and of those that are not `max_absent`.

    Args:
        segmenter: of any weights; the result names them.
        annotations: from `labkit.segment.annotations.load_annotations`.
        crops: measure on the squares of `AnnotatedImage.split_into_crops` instead of on whole
            images; there many sentences are absent.
        max_absent: the most absent sentences of an image or crop, drawn by its number; None asks
            all.
        thresholds: of the segmenter; None takes the usual ones.

    Returns:
        Figures with 95 % intervals from resampled photographs; see `summarize_photos`. Frames of
        one drive resemble each other, so that the true uncertainty of films is larger.

    Raises:
        InputError: there are no photographs, or nothing is known of what they show; or
            `max_absent` is below 0.
    """
    if not len(annotations):
        raise InputError("annotations must have at least one image, got none")
    if max_absent is not None and max_absent < 0:
        raise InputError(f"max_absent must be at least 0, got {max_absent}")
    rows: list[PhotoRow] = []
    seconds: list[float] = []
    count = 0
    progress = tqdm(annotations, desc="photographs", disable=not is_interactive())
    for number, photograph in enumerate(progress):
        for part in photograph.split_into_crops() if crops else [photograph]:
            targets = _choose_targets(part, max_absent, seed=count)
            count += 1
            if targets:
                started = time.perf_counter()
                results = _segment(
                    segmenter, part, targets, thresholds, exclusive=annotations.is_exclusive
                )
                seconds.append(time.perf_counter() - started)
                rows += [
                    _measure_target(number, *pair) for pair in zip(targets, results, strict=True)
                ]
    if not any(row.is_true for row in rows):
        raise InputError(f"no sentence is true of any image of {annotations.name}")
    latency = np.array(seconds)
    return {
        "weights": segmenter.models,
        "n": count,
        "n_images": len(annotations),
        **summarize_photos(rows),
        "seconds_per_image": float(np.median(latency)),
        "seconds_per_image_ci": _interval(latency, range(len(latency)), np.median),
    }


def _choose_targets(part: AnnotatedImage, max_absent: int | None, *, seed: int) -> list[Target]:
    """All targets that are present, and at most `max_absent` others, in their order."""
    absent = [index for index, target in enumerate(part.targets) if not target.is_present]
    if max_absent is not None and len(absent) > max_absent:
        left_out = np.random.default_rng(seed).permutation(absent)[max_absent:]
    else:
        left_out = np.array([], dtype=int)
    return [target for index, target in enumerate(part.targets) if index not in left_out]


def _segment(
    segmenter: TextSegmenter,
    part: AnnotatedImage,
    targets: Sequence[Target],
    thresholds: Thresholds | None,
    *,
    exclusive: bool,
) -> list[SentenceResult]:
    """The result for each target; sentences that are spelt alike are asked once."""
    sentences, _ = check_sentences([target.sentence for target in targets], ())
    spellings = [normalize_sentence(sentence) for sentence in sentences]
    maps = segmenter.clipseg.predict_heat(part.image, spellings, segmenter.templates)
    found = segmenter.segment_maps(
        part.image, sentences, wanted=maps, exclusive=exclusive, thresholds=thresholds
    )
    results = dict(zip(spellings, found.sentences, strict=True))
    return [results[normalize_sentence(target.sentence)] for target in targets]


def _measure_target(number: int, target: Target, result: SentenceResult) -> PhotoRow:
    mask = result.mask & ~target.ignore
    objects = np.array([o.mask for o in result.objects], bool).reshape(-1, *mask.shape)
    visible = objects & ~target.ignore
    judged = visible[2 * visible.sum(axis=(1, 2)) >= objects.sum(axis=(1, 2))]
    true, countable = target.is_present, target.is_thing
    is_known = countable and (len(target.instances) > 0 or not true)
    return PhotoRow(
        image=number,
        sentence=target.sentence,
        is_thing=countable,
        is_true=true,
        presence=result.presence,
        present=result.present,
        iou=iou(target.mask, mask) if true else math.nan,
        boundary_iou=boundary_iou(target.mask, mask) if true else math.nan,
        shared=int(np.count_nonzero(target.mask & mask)),
        union=int(np.count_nonzero(target.mask | mask)),
        clipseg_ious=_threshold_ious(result.heat, target.mask, target.ignore)
        if true
        else np.full(len(_THRESHOLDS), math.nan),
        num_instances=len(target.instances) if countable else 0,
        num_hits=instance_counts(target.instances, judged, 0.5)[0] if countable else 0,
        counts=pair_counts(target.instances, judged) if is_known else None,
    )


def summarize_photos(rows: Sequence[PhotoRow]) -> dict[str, Any]:
    """Summarise rows as figures in [0, 1], but `cgf1` in [-100, 100]; None where undefined.

    - `miou`: mean IoU over true sentences; `miou_things` and `miou_stuff` over those of a kind.
    - `miou_classes`: the mean over sentences of their IoU over all images together, absent ones
      included. For label images this is the mIoU of semantic segmentation.
    - `miou_clipseg_only`: of the map alone, at the one threshold that is best for it on these very
      images, which favours it; with `_things` and `_stuff` at the best one of that kind.
      `miou_gain` and the like are the difference, sentence by sentence.
    - `ciou`: pixels shared over pixels of the union, over true sentences together.
    - `giou`: mean IoU over all sentences; an absent one has 1 if nothing was found, else 0 (Liu et
      al., GRES, 2023).
    - `boundary_miou`: mean boundary IoU over true sentences (Cheng et al., 2021).
    - `presence_auroc`, `presence_mcc`: of the score and of the verdict; None if no sentence is
      absent.
    - `instance_recall`: share of the true instances of things that have a mask of IoU 0.5.
    - `cgf1`: SA-Co's, 100 × F1 over true sentences × MCC over all. It is read here as: of things
      alone, F1 from hits of all images together, the mean over IoU 0.50, 0.55, ..., 0.95.
    """
    figures: dict[str, Any] = {
        "n_sentences": len(rows),
        "n_present": sum(row.is_true for row in rows),
    }

    def add(
        name: str, chosen: Sequence[PhotoRow], values: Sequence[Any], statistic: Any = np.mean
    ) -> None:
        value, interval = _estimate(values, [row.image for row in chosen], statistic)
        figures[name], figures[f"{name}_ci"] = value, interval

    true = [row for row in rows if row.is_true]
    for kind, chosen in {
        "": true,
        "_things": [row for row in true if row.is_thing],
        "_stuff": [row for row in true if not row.is_thing],
    }.items():
        add(f"miou{kind}", chosen, [row.iou for row in chosen])
        alone = np.array([row.clipseg_ious for row in chosen]).reshape(-1, len(_THRESHOLDS))
        best = int(alone.mean(axis=0).argmax()) if chosen else 0
        add(f"miou{kind}_clipseg_only", chosen, list(alone[:, best]))
        figures[f"clipseg_only_threshold{kind}"] = float(_THRESHOLDS[best]) if chosen else None
        gains = [row.iou - own for row, own in zip(chosen, alone[:, best], strict=True)]
        add(f"miou{kind}_gain", chosen, gains)
    numbers = {
        sentence: number for number, sentence in enumerate(dict.fromkeys(r.sentence for r in true))
    }
    classes = [row for row in rows if row.sentence in numbers]
    pixels = [(numbers[row.sentence], row.shared, row.union) for row in classes]
    add("miou_classes", classes, pixels, _average_classes)
    add("ciou", true, [(row.shared, row.union) for row in true], _divide_sums)
    add("giou", rows, [row.iou if row.is_true else float(row.union == 0) for row in rows])
    add("boundary_miou", true, [row.boundary_iou for row in true])
    verdicts = [(row.is_true, row.present, row.presence) for row in rows]
    is_mixed = 0 < len(true) < len(rows)
    mixed = rows if is_mixed else []
    verdicts = verdicts if is_mixed else []
    add("presence_auroc", mixed, verdicts, lambda r: auroc(r[:, 0] > 0, r[:, 2]))
    add("presence_mcc", mixed, verdicts, lambda r: mcc(r[:, 0] > 0, r[:, 1] > 0))
    things = [row for row in rows if row.num_instances]
    figures["n_instances"] = sum(row.num_instances for row in things)
    hits = [(row.num_hits, row.num_instances) for row in things]
    add("instance_recall", things, hits, _divide_sums)
    counted = [row for row in rows if row.counts is not None]
    counts = [row.counts for row in counted]
    add("cgf1", counted, counts, lambda r: cgf1(r.astype(np.int64)).cgf1)
    return figures


def _estimate(
    values: Sequence[Any], groups: Sequence[int], statistic: Callable[[Any], Any]
) -> tuple[float | None, list[float] | None]:
    """A statistic of values (N,) or rows (N, k) and its interval; None where it is undefined."""
    if not len(values):
        return None, None
    array = np.array(values, dtype=float)
    try:
        value = float(statistic(array))
    except InputError:
        return None, None
    try:
        return value, _interval(array, groups, statistic)
    except InputError:
        return value, None


def _divide_sums(rows: NDArray[np.float64]) -> float:
    """The sum of the first column over that of the second."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def _average_classes(rows: NDArray[np.float64]) -> float:
    """The mean IoU of classes from rows (class number, shared pixels, pixels of the union)."""
    numbers = rows[:, 0].astype(np.int64)
    shared, union = (np.bincount(numbers, weights=rows[:, column]) for column in (1, 2))
    return float((shared[union > 0] / union[union > 0]).mean())
