from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from labkit.runtime import SourceError
from labkit.segment.export import get_file_name, make_folder_name, to_coco
from labkit.segment.results import Segmentation
from tests.segment.conftest import SCORES, SHAPE


def load(document: object, folder: Path) -> COCO:
    file = folder / "masks.json"
    file.write_text(json.dumps(document))
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))


def test_pycocotools_reads_the_document_and_its_masks(
    segmentation: Segmentation, tmp_path: Path
) -> None:
    coco = load(to_coco(segmentation, "photo.jpg"), tmp_path)
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["height"], image["width"]) == ("photo.jpg", *SHAPE)
    rows = coco.loadAnns(coco.getAnnIds())
    assert len(rows) == len({row["id"] for row in rows}) == 3
    for row, segmented in zip(rows, segmentation.objects, strict=True):
        assert np.array_equal(coco.annToMask(row).astype(bool), segmented.mask)
        assert row["bbox"] == coco_mask.toBbox(coco.annToRLE(row)).tolist()
        assert row["area"] == segmented.mask.sum() == coco_mask.area(coco.annToRLE(row))
        assert row["iscrowd"] == 0 and row["image_id"] == image["id"]
        assert coco.loadCats(row["category_id"])[0]["name"] == segmented.sentence


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos/cat.png", "cat.png"),
        (Path("photos") / "a  b.png", "a  b.png"),
        (os.fsdecode(b"caf\xe9.png"), "caf\udce9.png"),
        ("two\nlines.png", "two\nlines.png"),
        ("x" * 200 + ".png", "x" * 200 + ".png"),
        ("https://me:secret@host.org/a/cat.png?token=secret#top", "cat.png"),
        ("HTTP://host.org/a%20cat.png", "a%20cat.png"),
        ("https://host.org/photos/", "photos"),
        ("https://host.org", "image"),
        (np.zeros((2, 2), np.uint8), "image"),
        (b"bytes", "image"),
    ],
)
def test_file_name_is_the_real_one(source: str | Path | bytes, name: str) -> None:
    assert get_file_name(source) == name


def test_file_name_survives_the_document_byte_for_byte(
    segmentation: Segmentation, tmp_path: Path
) -> None:
    coco = load(to_coco(segmentation, os.fsdecode(b"caf\xe9 \xff.png")), tmp_path)
    assert os.fsencode(coco.imgs[1]["file_name"]) == b"caf\xe9 \xff.png"


def test_folders_of_several_images_are_apart_and_safe_on_every_system() -> None:
    names = ["a.png", "A.png", "a.jpg", "..", "con.png", 'a:b*?"<>|.png', "a\\b.png", "猫.png"]
    names += ["caf\udce9.png", "x" * 251 + ".png", "two\nlines.png", "dot. .png", ".png", ""]
    folders = [make_folder_name(number, name) for number, name in enumerate(names, 1)]
    assert len({folder.casefold() for folder in folders}) == len(names)
    for folder in folders:
        assert re.fullmatch(r"[0-9]{4}(-[A-Za-z0-9._-]*[A-Za-z0-9])?", folder) and len(folder) <= 70
    assert folders[:2] == ["0001-a", "0002-A"] and folders[7] == "0008"
    assert make_folder_name(12345, "a.png") == "12345-a"


def test_each_score_stands_apart_and_none_is_a_confidence(segmentation: Segmentation) -> None:
    for row in to_coco(segmentation, "photo.jpg")["annotations"]:
        assert {name: row[name] for name in SCORES} == SCORES
        assert "score" not in row


def test_sentences_without_objects_are_categories_too(
    segmentation: Segmentation, tmp_path: Path
) -> None:
    document = to_coco(segmentation, "photo.jpg")
    coco = load(document, tmp_path)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [
        "cat",
        "horse",
        "dog",
    ]
    assert coco.getAnnIds(catIds=coco.getCatIds(catNms=["horse"])) == []
    assert document["sentences"][1] == {
        "sentence": "horse",
        "present": False,
        "presence": 0.1,
        "reason": "its highest probability is only 0.013",
    }


def test_assumed_presence_is_exported_as_assumed_and_as_no_verdict(
    segmentation: Segmentation,
) -> None:
    cat, *others = segmentation.sentences
    assumed = replace(segmentation, sentences=(replace(cat, assumed=True), *others))
    rows = to_coco(assumed, "photo.jpg")["sentences"]
    assert [row["present"] for row in rows] == [None, False, True]
    assert [row.get("assumed") for row in rows] == [True, None, None]
    assert rows[0]["presence"] == cat.presence
    assert assumed.to_supervision().data["assumed"].tolist() == [True, True, False]
    verdicts = [row[1] for row in assumed.tables()["Sentences"].rows]
    assert verdicts == ["assumed", "no", "yes"]


def test_document_says_what_made_it(segmentation: Segmentation) -> None:
    assert to_coco(segmentation, "x")["info"] == {
        "description": "random weights",
        "SAM-2": "tiny (local)",
    }
    assert to_coco(replace(segmentation, note=""), "x")["info"]["description"] == "labkit"


def test_document_of_nothing_is_valid(empty_segmentation: Segmentation, tmp_path: Path) -> None:
    coco = load(to_coco(empty_segmentation, "photo.jpg"), tmp_path)
    assert coco.getAnnIds() == [] and len(coco.getCatIds()) == 3


def test_supervision_gets_boxes_masks_and_scores_apart(segmentation: Segmentation) -> None:
    detections = segmentation.to_supervision()
    assert len(detections) == 3
    assert np.array_equal(detections.mask, segmentation.masks)
    assert detections.xyxy.tolist() == segmentation.boxes.tolist()
    assert detections.class_id.tolist() == [0, 0, 2]
    assert detections.data["class_name"].tolist() == ["cat", "cat", "dog"]
    assert detections.confidence.tolist() == pytest.approx([SCORES["presence"]] * 3)
    for name in ("grounding", "predicted_iou", "agreement"):
        assert detections.data[name].tolist() == [SCORES[name]] * 3
    assert detections[detections.class_id == 2].area.tolist() == [1]


def test_supervision_gets_nothing_where_nothing_was_found(empty_segmentation: Segmentation) -> None:
    assert len(empty_segmentation.to_supervision()) == 0


def test_missing_supervision_is_named_with_its_remedy(
    segmentation: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(SourceError, match="pip install supervision"):
        segmentation.to_supervision()
