"""The battery's stand-ins on a made-up photograph, and the battery on the real ones."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.photo_battery import (
    KnowingSam2,
    ObjectRow,
    Photo,
    SentenceRow,
    list_kinds,
    make_heat,
    stage_photo,
    summarize,
)
from labkit.segment.prompts import Prompt, make_box, make_prompts
from labkit.segment.sam2 import Sam2

ROOT = Path(__file__).resolve().parents[2]
Mask = NDArray[np.bool_]


def block(top: int, left: int, height: int, width: int) -> Mask:
    mask = np.zeros((240, 320), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


PERSON, POLE, FAR = block(60, 40, 120, 40), block(20, 200, 180, 6), block(100, 280, 12, 8)
SKY = block(0, 0, 16, 320)
PHOTO = Photo(
    "made up",
    (240, 320),
    {"person": np.stack([PERSON, FAR]), "pole": POLE[None], "sky": SKY[None]},
    frozenset({"sky"}),
)


def test_heat_is_a_function_of_its_seed_and_weaker_where_the_object_is_small() -> None:
    heat = make_heat(PHOTO, "person", seed=3)
    assert heat.shape == (264, 352) and heat.min() >= 0 and heat.max() < 1
    assert np.array_equal(heat, make_heat(PHOTO, "person", seed=3))
    assert not np.array_equal(heat, make_heat(PHOTO, "person", seed=4))
    near, far = heat[66:198, 44:88], heat[104:126, 300:320]
    assert near.max() > 0.6 and 0.2 < far.max() < 0.6 * near.max()
    assert make_heat(PHOTO, "horse", seed=3).max() < 0.3


def test_kinds_are_those_of_the_shape_and_the_neighbours() -> None:
    assert list_kinds(PHOTO, "person", 0) == {"all", "articulated"}
    assert list_kinds(PHOTO, "person", 1) == {"all", "small"}
    assert list_kinds(PHOTO, "pole", 0) == {"all", "thin"}
    assert list_kinds(PHOTO, "sky", 0) == {"all", "stuff"}


def test_post_and_child_make_disconnected_and_contained_objects() -> None:
    people = np.stack([PERSON, PERSON.copy()])
    staged = stage_photo(Photo("made up", (240, 320), {"person": people}, frozenset()))
    assert len(staged.masks["person"]) == 3
    assert "disconnected" in list_kinds(staged, "person", 0)
    assert "contained" in list_kinds(staged, "person", 2)
    _, adult, child = staged.masks["person"]
    assert not (adult & child).any() and np.array_equal(adult | child, PERSON)


def test_stand_in_answers_a_point_with_part_whole_and_several() -> None:
    sam2 = KnowingSam2()
    sam2.look_at(PHOTO)
    logits, ious = sam2.predict_points(None, np.array([[60 * 3.2, 80 * 1024 / 240]]))
    assert logits.shape == (1, 4, 256, 256) and ious.shape == (1, 4)
    areas = (logits[0] > 0).mean(axis=(1, 2)) * PERSON.size / PERSON.sum()
    assert areas[1] < 0.6 and areas[2] == pytest.approx(1, abs=0.1) and areas[3] > 1.1


def test_stand_in_finds_the_object_of_a_true_box() -> None:
    sam2 = KnowingSam2(use=("box",))
    sam2.look_at(PHOTO)
    prompt = Prompt(
        points=np.zeros((0, 2)),
        labels=np.zeros(0, dtype=np.int64),
        box=make_box(PERSON),
        mask_logits=np.zeros((256, 256), np.float32),
        region=PERSON,
    )
    logits, _ = sam2.predict(None, [prompt.scale(1024 / 320, 1024 / 240)])
    mask = (logits[0, 0] > 0).repeat(5, axis=1)[:, ::4]  # (256, 320)
    assert (mask[::16] == PERSON[::15]).mean() > 0.99


def test_summary_counts_objects_and_masks_of_a_kind_apart() -> None:
    small, both = frozenset({"small", "all"}), {"is_true": True, "presence": 0.9, "present": True}
    rows = [
        ObjectRow(photo=0, kinds=small, true=True, iou=0.8),
        ObjectRow(photo=1, kinds=small, true=True, iou=0.0),
        ObjectRow(photo=0, kinds=small, true=False, iou=0.8),
        SentenceRow(photo=0, case="synonym", **both),
        SentenceRow(photo=1, case="plain", is_true=False, presence=0.1, present=False),
    ]
    result = summarize(rows)
    assert result["kinds"]["small"]["recall"] == 0.5 and result["kinds"]["small"]["iou"] == 0.4
    assert result["kinds"]["small"]["precision"] == 1.0 and result["presence"]["mcc"] == 1.0


def test_battery_runs_on_the_real_photographs(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "battery.json"
    command = [sys.executable, "benchmarks/photo_battery.py", "--data", str(photographs)]
    command += ["--limit", "2", "--draws", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    result = json.loads(out.read_text())
    assert result["n_photos"] == 5 and result["kinds"]["stuff"]["recall"] > 0.8


def test_a_sam2_told_all_parts_of_a_prompt_is_the_usual_one(
    sam2: Sam2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each part alone makes a difference; a true box is that of the object that is meant."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ablation: Any = importlib.import_module("prompt_ablation")
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    features = sam2.encode(image)
    scale = sam2.image_size / np.array([320, 240])
    heat = make_heat(PHOTO, "person", seed=3)
    prompts = make_prompts(heat, low_res_size=sam2.low_res_size)
    prompts = [p.scale(*(sam2.image_size / np.array(heat.shape[::-1]))) for p in prompts]
    truth = np.stack([FAR, POLE, PERSON])
    answers = {
        way: ablation.PartialSam2(sam2, use, truth).predict(features, prompts)
        for way, use in ablation.WAYS.items()
    }
    for usual, partial in zip(
        sam2.predict(features, prompts), answers["points, box and mask"], strict=True
    ):
        np.testing.assert_allclose(partial, usual, atol=1e-4)
    logits = [answer[0] for answer in answers.values()]
    assert not any(np.allclose(a, b) for i, a in enumerate(logits) for b in logits[:i])
    true_box = ablation.PartialSam2(sam2, ("true box",), truth)._find_true_box(prompts[0])
    np.testing.assert_allclose(true_box, make_box(PERSON) * np.tile(scale, 2))
