from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from labkit.runtime import InputError
from labkit.segment.export import coco_document
from labkit.segment.presence import Evidence
from labkit.segment.results import Answer, Findings, FoundObject
from labkit.segment.rle import encode_mask
from tests.segment.conftest import noise

SHAPE = (30, 50)
SCORES = {"presence": 0.9, "grounding": 0.6, "predicted_iou": 0.8, "agreement": 0.7}


def rectangle(left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def found(prompt: str, box: tuple[int, int, int, int]) -> FoundObject:
    return FoundObject(prompt=prompt, rle=encode_mask(rectangle(*box)), box=box, **SCORES)


def answer(prompt: str, *, present: bool) -> Answer:
    return Answer(
        prompt=prompt,
        present=present,
        presence=0.9 if present else 0.1,
        reason="" if present else "its highest probability is only 0.013",
        evidence=Evidence(strength=0.5, contrast=0.4, rivalry=0.0),
        heat=np.zeros((12, 20), np.float32),
        prompts=(),
    )


@pytest.fixture
def findings() -> Findings:
    boxes = {"cat": [(2, 3, 12, 9), (40, 20, 50, 30)], "dog": [(0, 0, 1, 1)]}
    return Findings(
        image=noise(*SHAPE),
        answers=(
            answer("cat", present=True),
            answer("horse", present=False),
            answer("dog", present=True),
        ),
        objects=tuple(found(prompt, box) for prompt in boxes for box in boxes[prompt]),
        note="random weights",
        models={"SAM-2": "tiny (local)"},
    )


def loaded(document: object, folder: Path) -> COCO:
    file = folder / "masks.json"
    file.write_text(json.dumps(document))
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(file))


def test_pycocotools_reads_the_document_and_its_masks(findings: Findings, tmp_path: Path) -> None:
    coco = loaded(coco_document(findings, "photo.jpg"), tmp_path)
    (image,) = coco.loadImgs(coco.getImgIds())
    assert (image["file_name"], image["height"], image["width"]) == ("photo.jpg", *SHAPE)
    rows = coco.loadAnns(coco.getAnnIds())
    assert len(rows) == len({row["id"] for row in rows}) == 3
    for row, thing in zip(rows, findings.objects, strict=True):
        assert np.array_equal(coco.annToMask(row).astype(bool), thing.mask)
        assert row["bbox"] == coco_mask.toBbox(coco.annToRLE(row)).tolist()
        assert row["area"] == thing.mask.sum() == coco_mask.area(coco.annToRLE(row))
        assert row["iscrowd"] == 0 and row["image_id"] == image["id"]
        assert coco.loadCats(row["category_id"])[0]["name"] == thing.prompt


def test_each_score_stands_apart_and_none_is_a_confidence(findings: Findings) -> None:
    for row in coco_document(findings, "photo.jpg")["annotations"]:
        assert {name: row[name] for name in SCORES} == SCORES
        assert "score" not in row


def test_sentences_without_objects_are_categories_too(findings: Findings, tmp_path: Path) -> None:
    document = coco_document(findings, "photo.jpg")
    coco = loaded(document, tmp_path)
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == ["cat", "horse", "dog"]
    assert coco.getAnnIds(catIds=coco.getCatIds(catNms=["horse"])) == []
    assert document["answers"][1] == {
        "prompt": "horse",
        "present": False,
        "presence": 0.1,
        "reason": "its highest probability is only 0.013",
    }


def test_document_says_what_made_it(findings: Findings) -> None:
    assert coco_document(findings, "x")["info"] == {
        "description": "random weights",
        "SAM-2": "tiny (local)",
    }
    assert coco_document(replace(findings, note=""), "x")["info"]["description"] == "labkit"


def test_document_of_nothing_is_valid(findings: Findings, tmp_path: Path) -> None:
    coco = loaded(coco_document(replace(findings, objects=()), "photo.jpg"), tmp_path)
    assert coco.getAnnIds() == [] and len(coco.getCatIds()) == 3


def test_masks_and_boxes_are_arrays_of_all_objects(findings: Findings) -> None:
    assert findings.masks.shape == (3, *SHAPE) and findings.masks.dtype == bool
    assert findings.boxes.tolist() == [[2, 3, 12, 9], [40, 20, 50, 30], [0, 0, 1, 1]]
    nothing = replace(findings, objects=())
    assert nothing.masks.shape == (0, *SHAPE) and nothing.boxes.shape == (0, 4)
    assert nothing.masks.dtype == bool and nothing.boxes.dtype == np.int64


def test_mask_of_a_sentence_is_all_that_it_names(findings: Findings) -> None:
    both = rectangle(2, 3, 12, 9) | rectangle(40, 20, 50, 30)
    assert np.array_equal(findings.mask_of("cat"), both)
    assert np.array_equal(findings.mask_of("  cat "), both)
    assert not findings.mask_of("horse").any()
    assert findings.answer("dog").present and not findings.answer("horse").present
    for ask in (findings.mask_of, findings.answer):
        with pytest.raises(InputError, match="'cow' was not asked; these were: 'cat', 'horse'"):
            ask("cow")
