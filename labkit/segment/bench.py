"""A segmenter measured on procedural scenes, whose masks are known to the pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.runtime import InputError, is_interactive
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
from labkit.segment.pipeline import TextSegmenter

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
    segmenter: TextSegmenter, count: int = 500, *, seed: int = EVALUATION_SEED, start: int = 0
) -> dict[str, Any]:
    """Measure quality on `count` scenes, asking each three sentences that are true and three not.

    Args:
        segmenter: of any profile; the result names its weights.
        count: at least 2, so that there is an interval.
        seed: of the scenes; that of evaluation is never trained, tuned or calibrated on.
        start: number of the first scene.

    Returns:
        Figures in [0, 1] with 95 % intervals from resampled scenes; see `summarize`.

    Raises:
        InputError: `count` is below 2.
    """
    if count < 2:
        raise InputError(f"count must be at least 2, got {count}")
    numbers = tqdm(range(start, start + count), desc="scenes", disable=not is_interactive())
    rows = [row for number in numbers for row in measure_scene(segmenter, number, seed)]
    return {"seed": seed, "start": start, "weights": segmenter.models, **summarize(rows)}


def measure_scene(segmenter: TextSegmenter, number: int, seed: int) -> list[Row]:
    """Measure one scene: a row for each sentence asked of it."""
    scene = make_object_scene(number, seed=seed)
    sentences = scene.sample_sentences(number)
    maps = segmenter.clipseg.predict_heat(scene.image, sentences, segmenter.templates)
    weak_maps = maps * (WEAK_PEAK / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12))
    is_true = [sentence in scene.present for sentence in sentences]
    true_sentences = [s for s, true in zip(sentences, is_true, strict=True) if true]
    gated, weak = (
        segmenter.segment_maps(scene.image, sentences, wanted=each, exclusive=True)
        for each in (maps, weak_maps)
    )
    assumed, weak_assumed = (
        segmenter.segment_maps(
            scene.image, true_sentences, wanted=each[is_true], assume_present=True
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


def _threshold_ious(heat: NDArray[np.float32], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """IoU (19,) of the map, brought to the size of the image, at each threshold."""
    from PIL import Image

    size = (truth.shape[1], truth.shape[0])
    large = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
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
    """The 95 % interval over resampled scenes; None where there are fewer than two."""
    if len(set(groups)) < 2:
        return None
    low, high = bootstrap_interval(values, statistic, groups=groups)
    return [float(low), float(high)]
