from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from labkit.runtime import InputError, SourceError
from labkit.segment.export import (
    FORMATS,
    get_file_name,
    make_folder_name,
    merge_coco,
    to_coco,
    to_coco_results,
)
from labkit.segment.masks import encode_mask
from labkit.segment.results import Segmentation, SegmentedObject
from tests.segment.conftest import SCORES, SHAPE, noise, rectangle

Mask = NDArray[np.bool_]


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


@pytest.fixture
def ragged(segmentation: Segmentation) -> Segmentation:
    """A cat in two parts, one of them with two holes, and a dog in front of it."""
    cat = rectangle(2, 3, 22, 20) | rectangle(30, 5, 45, 25)
    cat &= ~rectangle(5, 6, 9, 10) & ~rectangle(9, 10, 12, 14)  # two holes that touch
    cat |= rectangle(22, 20, 23, 21)  # a pixel that touches by its corner
    dog = rectangle(14, 4, 34, 12)
    results = []
    for result, masks in zip(segmentation.sentences, ([cat], [], [dog]), strict=True):
        objects = tuple(make_object_of(result.sentence, mask) for mask in masks)
        results.append(replace(result, objects=objects))
    settings = {"negatives": ["toy"]}
    return replace(segmentation, sentences=tuple(results), file_name="photo.jpg", settings=settings)


def make_object_of(sentence: str, mask: Mask) -> SegmentedObject:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return SegmentedObject(sentence=sentence, rle=encode_mask(mask), box=box, **SCORES)


def fill(rings: list[Any], shape: tuple[int, int] = SHAPE) -> Mask:
    """OpenCV's filling of rings by the even-odd rule, looked at in the middle of each pixel."""
    fine = 8
    canvas = np.zeros((shape[0] * fine, shape[1] * fine), np.uint8)
    cv2.fillPoly(canvas, [np.rint(np.array(ring) * fine).astype(np.int32) for ring in rings], 1)
    return canvas[fine // 2 :: fine, fine // 2 :: fine] > 0


def check_origin(origin: dict[str, Any]) -> None:
    assert origin["file_name"] == "photo.jpg" and origin["models"] == {"SAM-2": "tiny (local)"}
    assert [row["sentence"] for row in origin["sentences"]] == ["cat", "horse", "dog"]
    assert origin["settings"] == {"negatives": ["toy"]}


def save(segmentation: Segmentation, folder: Path, name: str) -> Path:
    """Save in one format; the path of what was written, and nothing else was."""
    segmentation.save(folder, formats=[name])
    (path,) = folder.iterdir()
    assert path.name == FORMATS[name].path
    return path


@pytest.mark.parametrize("name", ["coco", "coco-polygons"])
def test_coco_is_ground_truth_with_holes_and_parts(
    name: str, ragged: Segmentation, tmp_path: Path
) -> None:
    document = json.loads(save(ragged, tmp_path, name).read_text())
    coco = load(document, tmp_path)
    rows = coco.loadAnns(coco.getAnnIds())
    assert [isinstance(row["segmentation"], list) for row in rows] == [name != "coco"] * 2
    for row, segmented in zip(rows, ragged, strict=True):
        assert np.array_equal(coco.annToMask(row).astype(bool), segmented.mask)
    assert coco.imgs[1]["file_name"] == "photo.jpg"
    assert document["info"]["SAM-2"] == "tiny (local)"
    assert document["info"]["settings"] == {"negatives": ["toy"]}


def test_coco_results_are_evaluated_against_the_ground_truth(
    ragged: Segmentation, tmp_path: Path
) -> None:
    truth = load(to_coco(ragged, "photo.jpg", polygons=True), tmp_path)
    rows = ragged.to_coco_results("agreement")
    assert [row["score"] for row in rows] == [SCORES["agreement"]] * 2
    assert {row["score_name"] for row in rows} == {"agreement"}
    assert {(row["file_name"], *row["models"]) for row in rows} == {("photo.jpg", "SAM-2")}
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_coco_results_take_the_ids_of_a_foreign_ground_truth(ragged: Segmentation) -> None:
    rows = ragged.to_coco_results(image_id=397133, category_ids={"cat": 17, "dog": 18})
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(397133, 17), (397133, 18)]
    assert [row["score_name"] for row in rows] == ["presence"] * 2
    with pytest.raises(InputError, match="category_ids has no id for 'dog'"):
        ragged.to_coco_results(category_ids={"cat": 17})
    with pytest.raises(InputError, match=r"score must be one of presence, .*, got 'confidence'"):
        to_coco_results(ragged, "photo.jpg", "confidence")


def test_documents_of_several_images_become_one(
    ragged: Segmentation, empty_segmentation: Segmentation, tmp_path: Path
) -> None:
    other = replace(ragged, sentences=ragged.sentences[::-1], image=noise(*SHAPE))
    found = {"b.jpg": ragged, "a.jpg": empty_segmentation, "c.jpg": other}
    merged = merge_coco(to_coco(each, name) for name, each in found.items())
    coco = load(merged, tmp_path)
    assert {image["file_name"]: image["id"] for image in coco.imgs.values()} == {
        "b.jpg": 1,
        "a.jpg": 2,
        "c.jpg": 3,
    }
    assert [category["name"] for category in coco.cats.values()] == ["cat", "horse", "dog"]
    assert sorted(coco.anns) == [1, 2, 3, 4]
    for image_id, each in ((1, ragged), (2, empty_segmentation), (3, other)):
        rows = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        names = [coco.cats[row["category_id"]]["name"] for row in rows]
        assert names == [segmented.sentence for segmented in each]
        for row, segmented in zip(rows, each, strict=True):
            assert np.array_equal(coco.annToMask(row).astype(bool), segmented.mask)
    assert [row["image_id"] for row in merged["sentences"]] == [1] * 3 + [2] * 3 + [3] * 3
    assert merge_coco([])["images"] == []


def test_labelme_has_a_polygon_for_each_part(ragged: Segmentation, tmp_path: Path) -> None:
    document = json.loads(save(ragged, tmp_path, "labelme").read_text())
    assert document["imagePath"] == "photo.jpg" and document["imageData"] is None
    assert (document["imageHeight"], document["imageWidth"]) == SHAPE
    assert [shape["group_id"] for shape in document["shapes"]] == [1, 1, 1, 2]
    for number, segmented in enumerate(ragged, 1):
        shapes = [shape for shape in document["shapes"] if shape["group_id"] == number]
        assert {shape["label"] for shape in shapes} == {segmented.sentence}
        assert all(shape["shape_type"] == "polygon" for shape in shapes)
        assert {name: shapes[0][name] for name in SCORES} == SCORES
        assert np.array_equal(fill([shape["points"] for shape in shapes]), segmented.mask)
    check_origin(document["labkit"])


def test_yolo_has_a_line_for_each_object(ragged: Segmentation, tmp_path: Path) -> None:
    folder = save(ragged, tmp_path, "yolo")
    lines = (folder / "labels" / "photo.txt").read_text().splitlines()
    data = yaml.safe_load((folder / "data.yaml").read_text(encoding="utf-8"))
    for line, segmented in zip(lines, ragged, strict=True):
        number, *shares = map(float, line.split())
        assert data["names"][str(int(number))] == segmented.sentence
        assert all(0 <= share <= 1 for share in shares)
        ring = np.reshape(shares, (-1, 2)) * SHAPE[::-1]
        assert np.array_equal(fill([ring]), segmented.mask)
    check_origin(data["labkit"])


def test_yolo_keeps_sentences_of_any_script(ragged: Segmentation, tmp_path: Path) -> None:
    results = tuple(
        replace(result, sentence=f"{result.sentence} 猫🦖") for result in ragged.sentences
    )
    other = replace(ragged, sentences=tuple(replace(r, objects=()) for r in results))
    other.save(tmp_path, os.fsdecode(b"caf\xe9.png"), formats=["yolo"])
    data = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text(encoding="utf-8"))
    assert list(data["names"].values()) == ["cat 猫🦖", "horse 猫🦖", "dog 猫🦖"]
    assert os.fsencode(data["labkit"]["file_name"]) == b"caf\xe9.png"


def test_geojson_has_holes_as_rings(ragged: Segmentation, tmp_path: Path) -> None:
    document = json.loads(save(ragged, tmp_path, "geojson").read_text())
    assert document["type"] == "FeatureCollection"
    for feature, segmented in zip(document["features"], ragged, strict=True):
        assert feature["properties"] == {"sentence": segmented.sentence, **SCORES}
        assert feature["geometry"]["type"] == "MultiPolygon"
        polygons = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] for polygon in polygons for ring in polygon)
        assert np.array_equal(fill([r for polygon in polygons for r in polygon]), segmented.mask)
        for outer, *holes in polygons:
            assert all((fill([outer]) & fill([hole])).sum() == fill([hole]).sum() for hole in holes)
    cat = document["features"][0]["geometry"]["coordinates"]
    assert [len(polygon) for polygon in cat] == [3, 1, 1]
    check_origin(document["labkit"])


def test_label_image_has_16_bits_and_the_smallest_object_on_top(
    ragged: Segmentation, tmp_path: Path
) -> None:
    path = save(ragged, tmp_path, "labels")
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cat, dog = ragged.masks
    assert labels.dtype == np.uint16 and labels.shape == SHAPE
    assert np.array_equal(labels == 2, dog) and (cat & dog).any()
    assert np.array_equal(labels == 1, cat & ~dog)
    with Image.open(path) as image:
        about = json.loads(image.info["labkit"])
    assert about["objects"] == {"1": "cat", "2": "dog"}
    check_origin(about)


def test_cutouts_have_alpha_and_an_earlier_run_leaves_none(
    ragged: Segmentation, tmp_path: Path
) -> None:
    folder = save(ragged, tmp_path, "cutouts")
    assert [path.name for path in sorted(folder.iterdir())] == ["0001-cat.png", "0002-dog.png"]
    for path, segmented in zip(sorted(folder.iterdir()), ragged, strict=True):
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        left, top, right, bottom = segmented.box
        window = slice(top, bottom), slice(left, right)
        assert np.array_equal(pixels[..., 3] == 255, segmented.mask[window])
        assert set(np.unique(pixels[..., 3])) <= {0, 255}
        assert np.array_equal(pixels[..., 2::-1], ragged.image[window])
        with Image.open(path) as image:
            about = json.loads(image.info["labkit"])
        assert about["sentence"] == segmented.sentence and about["box"] == list(segmented.box)
        check_origin(about)
    empty = replace(ragged, sentences=ragged.sentences[1:2])
    assert list(save(empty, tmp_path, "cutouts").iterdir()) == []


def test_supervision_gets_the_file_and_the_models(ragged: Segmentation) -> None:
    data = ragged.to_supervision().data
    assert data["file_name"].tolist() == ["photo.jpg"] * 2
    assert data["models"].tolist() == ["SAM-2: tiny (local)"] * 2


def test_every_format_can_be_saved_of_something_and_of_nothing(
    ragged: Segmentation, empty_segmentation: Segmentation, tmp_path: Path
) -> None:
    for number, each in enumerate((ragged, empty_segmentation)):
        folder = each.save(tmp_path / str(number), formats=list(FORMATS))
        assert {path.name for path in folder.iterdir()} == {f.path for f in FORMATS.values()}
    with pytest.raises(InputError, match=r"formats must be of coco, .*report, got 'pascal'"):
        ragged.save(tmp_path / "none", formats=["coco", "pascal"])
    with pytest.raises(InputError, match="must be a list of names, got a single text 'coco'"):
        ragged.save(tmp_path / "none", formats="coco")
    assert not (tmp_path / "none").exists()


def test_masks_json_is_written_last(
    ragged: Segmentation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SourceError("the disk is full")

    broken = {**FORMATS, "labelme": replace(FORMATS["labelme"], write=fail)}
    monkeypatch.setattr("labkit.segment.export.FORMATS", broken)
    with pytest.raises(SourceError, match="full"):
        ragged.save(tmp_path, formats=["coco", "labelme", "geojson"])
    assert not (tmp_path / "masks.json").exists()
