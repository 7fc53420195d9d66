from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from labkit.runtime import InputError
from labkit.segment.bench import Row, measure_scenes, summary

NOTHING = float("nan")


def row(scene: int, **changes: Any) -> Row:
    there: dict[str, Any] = {
        "scene": scene,
        "present": True,
        "presence": 0.9,
        "said": True,
        "weak_said": False,
        "iou": 0.8,
        "boundary_iou": 0.5,
        "assumed_iou": 0.85,
        "weak_iou": 0.84,
        "clipseg_ious": np.linspace(0.1, 0.7, 19),
        "objects": 1,
        "found": 1,
        "counts": np.array([1, 1, *[1] * 10]),
    }
    return Row(**{**there, **changes})


def absent(scene: int, **changes: Any) -> Row:
    gone = {"present": False, "presence": 0.1, "said": False, "iou": NOTHING}
    gone |= {"boundary_iou": NOTHING, "assumed_iou": NOTHING, "weak_iou": NOTHING}
    gone |= {"objects": 0, "found": 0, "counts": np.zeros(12, dtype=int)}
    return row(scene, **{**gone, **changes})


def test_summary_keeps_true_sentences_and_verdicts_apart() -> None:
    rows = [
        row(0, iou=0.9),
        row(0, iou=0.0, said=False, presence=0.4),
        absent(0),
        row(1, iou=0.6, objects=3, found=2),
        absent(1, said=True, presence=0.7),
        absent(2),
    ]
    figures = summary(rows)
    assert figures["n_scenes"] == 3 and figures["n_sentences"] == 6 and figures["n_present"] == 3
    assert figures["miou"] == pytest.approx(0.5)
    assert figures["miou_clipseg_only"] == pytest.approx(0.7)
    assert figures["clipseg_only_threshold"] == 0.95
    assert figures["miou_gain"] == pytest.approx(-0.2)
    assert figures["instance_recall"] == pytest.approx(2 / 3)
    assert figures["n_sentences_of_several"] == 1
    truth, said = [r.present for r in rows], [r.said for r in rows]
    assert figures["presence_mcc"] == pytest.approx(matthews_corrcoef(truth, said))
    scores = [r.presence for r in rows]
    assert figures["presence_auroc"] == pytest.approx(roc_auc_score(truth, scores))
    low, high = figures["miou_ci"]
    assert low <= figures["miou"] <= high


def test_one_threshold_serves_all_sentences_of_clipseg_alone() -> None:
    first, second = np.zeros(19), np.zeros(19)
    first[3], second[12] = 1.0, 0.8
    figures = summary([row(0, clipseg_ious=first), row(1, clipseg_ious=second), absent(1)])
    assert figures["miou_clipseg_only"] == pytest.approx(0.5)


def test_without_sentences_of_several_objects_there_is_no_recall() -> None:
    figures = summary([row(0), absent(0), row(1), absent(1)])
    assert figures["instance_recall"] is None and figures["instance_recall_ci"] is None


def test_one_scene_is_too_few() -> None:
    with pytest.raises(InputError, match="at least 2"):
        measure_scenes(None, 1)  # type: ignore[arg-type]
