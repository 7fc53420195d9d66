from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from labkit.runtime import InputError
from labkit.segment.bench import Row, measure_scenes, summarize

NOTHING = float("nan")


def row(scene: int, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "scene": scene,
        "is_true": True,
        "presence": 0.9,
        "present": True,
        "weak_present": False,
        "iou": 0.8,
        "boundary_iou": 0.5,
        "assumed_iou": 0.85,
        "weak_iou": 0.84,
        "clipseg_ious": np.linspace(0.1, 0.7, 19),
        "num_objects": 1,
        "num_hits": 1,
        "counts": np.array([1, 1, *[1] * 10]),
    }
    return Row(**{**values, **changes})


def absent(scene: int, **changes: Any) -> Row:
    changed = {"is_true": False, "presence": 0.1, "present": False, "iou": NOTHING}
    changed |= {"boundary_iou": NOTHING, "assumed_iou": NOTHING, "weak_iou": NOTHING}
    changed |= {"num_objects": 0, "num_hits": 0, "counts": np.zeros(12, dtype=int)}
    return row(scene, **{**changed, **changes})


def test_summary_keeps_true_sentences_and_verdicts_apart() -> None:
    rows = [
        row(0, iou=0.9),
        row(0, iou=0.0, present=False, presence=0.4),
        absent(0),
        row(1, iou=0.6, num_objects=3, num_hits=2),
        absent(1, present=True, presence=0.7),
        absent(2),
    ]
    figures = summarize(rows)
    assert figures["n_scenes"] == 3 and figures["n_sentences"] == 6 and figures["n_present"] == 3
    assert figures["miou"] == pytest.approx(0.5)
    assert figures["miou_clipseg_only"] == pytest.approx(0.7)
    assert figures["clipseg_only_threshold"] == 0.95
    assert figures["miou_gain"] == pytest.approx(-0.2)
    assert figures["instance_recall"] == pytest.approx(2 / 3)
    assert figures["n_sentences_of_several"] == 1
    truth, present = [r.is_true for r in rows], [r.present for r in rows]
    assert figures["presence_mcc"] == pytest.approx(matthews_corrcoef(truth, present))
    scores = [r.presence for r in rows]
    assert figures["presence_auroc"] == pytest.approx(roc_auc_score(truth, scores))
    low, high = figures["miou_ci"]
    assert low <= figures["miou"] <= high


def test_one_threshold_serves_all_sentences_of_clipseg_alone() -> None:
    first, second = np.zeros(19), np.zeros(19)
    first[3], second[12] = 1.0, 0.8
    figures = summarize([row(0, clipseg_ious=first), row(1, clipseg_ious=second), absent(1)])
    assert figures["miou_clipseg_only"] == pytest.approx(0.5)


def test_without_sentences_of_several_objects_there_is_no_recall() -> None:
    figures = summarize([row(0), absent(0), row(1), absent(1)])
    assert figures["instance_recall"] is None and figures["instance_recall_ci"] is None


def test_one_scene_is_too_few() -> None:
    with pytest.raises(InputError, match="at least 2"):
        measure_scenes(None, 1)  # type: ignore[arg-type]
