from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import jaccard_score, matthews_corrcoef, roc_auc_score

from labkit.runtime import InputError
from labkit.segment.annotations import AnnotatedImage, Annotations, Target, load_annotations
from labkit.segment.bench import (
    PhotoRow,
    Row,
    measure_photos,
    measure_scenes,
    summarize,
    summarize_photos,
)
from labkit.segment.masks import encode_mask
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.presence import Evidence
from labkit.segment.results import Segmentation, SegmentedObject, SentenceResult

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


SIZE = (40, 60)
Masks = NDArray[np.bool_]


def photo_row(image: int, **changes: Any) -> PhotoRow:
    values: dict[str, Any] = {
        "image": image,
        "sentence": "dog",
        "is_thing": True,
        "is_true": True,
        "presence": 0.9,
        "present": True,
        "iou": 0.8,
        "boundary_iou": 0.5,
        "shared": 80,
        "union": 100,
        "clipseg_ious": np.linspace(0.1, 0.7, 19),
        "num_instances": 1,
        "num_hits": 1,
        "counts": np.array([1, 1, *[1] * 10]),
    }
    return PhotoRow(**{**values, **changes})


def absent_row(image: int, **changes: Any) -> PhotoRow:
    nothing = {"is_true": False, "presence": 0.1, "present": False, "iou": NOTHING}
    nothing |= {"boundary_iou": NOTHING, "shared": 0, "union": 0, "num_instances": 0}
    nothing |= {"num_hits": 0, "counts": np.zeros(12, dtype=int)}
    return photo_row(image, **{**nothing, **changes})


def test_things_and_stuff_are_summarised_apart_and_together() -> None:
    stuff = {"sentence": "sky", "is_thing": False, "num_instances": 0, "counts": None}
    first, second = np.zeros(19), np.zeros(19)
    first[3], second[12] = 0.6, 0.5
    rows = [
        photo_row(0, iou=0.9, clipseg_ious=first),
        photo_row(1, iou=0.5, shared=10, union=100, num_instances=3, num_hits=1),
        photo_row(1, iou=0.1, shared=300, union=400, clipseg_ious=second, **stuff),
        absent_row(0, sentence="sky", is_thing=False, counts=None),
        absent_row(1, sentence="cat", present=True, presence=0.7, union=50),
    ]
    figures = summarize_photos(rows)
    assert figures["miou"] == pytest.approx(0.5)
    assert figures["miou_things"] == pytest.approx(0.7)
    assert figures["miou_stuff"] == pytest.approx(0.1)
    assert figures["miou_stuff_clipseg_only"] == pytest.approx(0.5)
    assert figures["clipseg_only_threshold_stuff"] == 0.65
    assert figures["miou_stuff_gain"] == pytest.approx(0.1 - 0.5)
    assert figures["ciou"] == pytest.approx((80 + 10 + 300) / (100 + 100 + 400))
    assert figures["giou"] == pytest.approx((0.9 + 0.5 + 0.1 + 1 + 0) / 5)
    assert figures["miou_classes"] == pytest.approx((90 / 200 + 300 / 400) / 2)
    assert figures["instance_recall"] == pytest.approx(2 / 4)
    assert figures["n_instances"] == 4
    truth, present = [r.is_true for r in rows], [r.present for r in rows]
    scores = [r.presence for r in rows]
    assert figures["presence_mcc"] == pytest.approx(matthews_corrcoef(truth, present))
    assert figures["presence_auroc"] == pytest.approx(roc_auc_score(truth, scores))
    for name in ("miou", "miou_things", "ciou", "giou", "instance_recall"):
        low, high = figures[f"{name}_ci"]
        assert low <= figures[name] <= high


def test_what_is_undefined_is_none() -> None:
    figures = summarize_photos([photo_row(0)])
    assert figures["miou"] == 0.8 and figures["miou_ci"] is None
    for name in ("miou_stuff", "presence_auroc", "presence_mcc", "cgf1"):
        assert figures[name] is None and figures[f"{name}_ci"] is None


def test_the_interval_is_over_images_not_sentences() -> None:
    rows = [photo_row(image, iou=image / 4) for image in range(5)]
    copies = [row for row in rows for _ in range(20)]
    assert summarize_photos(copies)["miou_ci"] == pytest.approx(summarize_photos(rows)["miou_ci"])


def rectangle(left: int, top: int, right: int, bottom: int) -> Masks:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def stub(answers: dict[str, list[Masks]], presence: dict[str, float] | None = None) -> Any:
    """A segmenter that gives these masks for a sentence, whatever the image."""
    scores = presence or {}

    def segment_maps(
        image: NDArray[np.uint8], sentences: list[str], *, wanted: Any, **_: Any
    ) -> Segmentation:
        results = []
        for sentence, heat in zip(sentences, wanted, strict=True):
            masks = answers.get(sentence, [])
            result = SentenceResult(
                sentence=sentence,
                present=bool(masks),
                presence=scores.get(sentence, 0.9 if masks else 0.1),
                reason="" if masks else "absent",
                evidence=Evidence(peak=0.5, contrast=0.4, contrastive_margin=0.0),
                heat=heat,
                prompts=(),
                objects=tuple(
                    SegmentedObject(
                        sentence=sentence,
                        rle=encode_mask(mask),
                        box=(0, 0, 1, 1),
                        presence=0.9,
                        grounding=0.5,
                        predicted_iou=0.5,
                        agreement=0.5,
                    )
                    for mask in masks
                ),
                size=image.shape[:2],
            )
            results.append(result)
        return Segmentation(image=image, sentences=tuple(results), note="", models={})

    def predict_heat(image: NDArray[np.uint8], sentences: list[str], _: Any) -> Any:
        maps = np.zeros((len(sentences), *image.shape[:2]), np.float32)
        for heat, sentence in zip(maps, sentences, strict=True):
            for mask in answers.get(sentence, []):
                heat[mask] = 0.7
        return maps

    clipseg = SimpleNamespace(predict_heat=predict_heat)
    return SimpleNamespace(
        clipseg=clipseg, segment_maps=segment_maps, templates=("{}",), models={}, note=""
    )


def save_photographs(folder: Path, truth: dict[str, list[list[Masks]]]) -> Path:
    """COCO instances: for each category the masks of each image."""
    count = len(next(iter(truth.values())))
    annotations = []
    for category, images in enumerate(truth.values(), 1):
        for image, masks in enumerate(images, 1):
            for mask in masks:
                rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "area": int(mask.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": 0,
                }
                annotations.append(annotation)
    for image in range(1, count + 1):
        Image.new("RGB", SIZE[::-1]).save(folder / f"{image}.png")
    images = [
        {"id": image, "file_name": f"{image}.png", "height": SIZE[0], "width": SIZE[1]}
        for image in range(1, count + 1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(truth, 1)]
    path = folder / "instances.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def test_recall_and_iou_of_photographs_match_pycocotools_and_sklearn(tmp_path: Path) -> None:
    dogs = [rectangle(0, 0, 20, 20), rectangle(30, 0, 50, 20), rectangle(0, 25, 12, 40)]
    path = save_photographs(tmp_path, {"dog": [dogs, dogs[:1], [rectangle(40, 25, 60, 40)]]})
    found = [rectangle(2, 0, 22, 20), rectangle(38, 0, 58, 20), rectangle(0, 25, 12, 38)]
    figures = measure_photos(stub({"dog": found}), load_annotations(path))

    truth = COCO(str(path))
    results = [
        {
            "image_id": image,
            "category_id": 1,
            "score": 0.9,
            "segmentation": coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)),
        }
        for image in (1, 2, 3)
        for mask in found
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][0, 0, 0, -1]
    assert 0 < recall < 1
    assert figures["instance_recall"] == pytest.approx(recall)

    mask = np.logical_or.reduce(found)
    wholes = [np.logical_or.reduce(dogs), dogs[0], rectangle(40, 25, 60, 40)]
    ious = [jaccard_score(whole.ravel(), mask.ravel()) for whole in wholes]
    assert figures["miou"] == figures["miou_things"] == pytest.approx(np.mean(ious))
    assert figures["miou_clipseg_only"] == pytest.approx(np.mean(ious))  # the heat is the mask
    assert figures["n"] == 3 and figures["n_sentences"] == 3
    assert figures["seconds_per_image"] > 0


def photograph(*targets: Target) -> Annotations:
    image = AnnotatedImage(
        path=Path("a.png"),
        name="a.png",
        image=np.zeros((*SIZE, 3), dtype=np.uint8),
        targets=targets,
    )
    record: Any = SimpleNamespace(path=image.path, load=lambda: image)
    return Annotations("made", [record], is_exclusive=True)


def make_target(sentence: str, *masks: Masks, ignore: Masks | None = None) -> Target:
    nothing = np.zeros(SIZE, dtype=bool)
    return Target(
        sentence=sentence,
        mask=np.logical_or.reduce([nothing, *masks]),
        is_thing=True,
        instances=np.array(masks, dtype=bool).reshape(-1, *SIZE),
        ignore=nothing if ignore is None else ignore,
        crowd=nothing,
    )


def test_pixels_to_ignore_count_neither_for_nor_against() -> None:
    dog, crowd = rectangle(0, 0, 20, 20), rectangle(30, 0, 60, 40)
    answers = {"dog": [dog, rectangle(32, 2, 50, 30)], "cat": [rectangle(35, 5, 50, 30)]}
    targets = make_target("dog", dog, ignore=crowd), make_target("cat", ignore=crowd)
    figures = measure_photos(stub(answers), photograph(*targets))
    assert figures["miou"] == figures["ciou"] == figures["boundary_miou"] == 1.0
    assert figures["miou_clipseg_only"] == 1.0 and figures["giou"] == 1.0
    counted = measure_photos(stub(answers), photograph(make_target("dog", dog), targets[1]))
    assert counted["miou"] == pytest.approx(400 / (400 + 18 * 28))
    assert figures["cgf1"] == 100.0  # masks in what is ignored are no false positives
    apart = measure_photos(stub(answers), photograph(targets[0], make_target("cat")))
    assert apart["cgf1"] == 0.0 and apart["giou"] == 0.5


def test_stuff_and_things_without_a_known_instance_are_left_out_of_cgf1() -> None:
    dog, cat, sky = rectangle(0, 0, 20, 20), rectangle(30, 0, 50, 20), rectangle(0, 25, 60, 40)
    stuff = replace(make_target("sky", sky), is_thing=False)
    uncertain = replace(make_target("cat", cat), instances=np.zeros((0, *SIZE), dtype=bool))
    targets = [make_target("dog", dog), stuff, uncertain, make_target("zebra")]
    figures = measure_photos(stub({"dog": [dog]}), photograph(*targets))
    assert figures["cgf1"] == 100.0 and figures["n_instances"] == 1
    assert figures["miou"] == pytest.approx(1 / 3)


def test_crops_of_one_photograph_are_one_piece_of_evidence(tmp_path: Path) -> None:
    dogs = [rectangle(0, 0, 20, 20), rectangle(30, 0, 50, 20)]
    annotations = load_annotations(save_photographs(tmp_path, {"dog": [dogs, dogs]}))
    segmenter = stub({"dog": [rectangle(0, 0, 20, 20)[:20, :20]]})
    one = measure_photos(segmenter, annotations[:1], crops=True)
    assert one["n"] == 6 and one["miou"] > 0 and one["miou_ci"] is None
    two = measure_photos(segmenter, annotations, crops=True)
    assert two["n"] == 12 and two["miou_ci"] == pytest.approx([two["miou"]] * 2)


def test_sentences_that_are_spelt_alike_are_asked_once() -> None:
    dog, cat = rectangle(0, 0, 20, 20), rectangle(30, 0, 60, 40)
    targets = [make_target("Dog.", dog), make_target("dog", cat), make_target("zebra")]
    segmenter = stub({"Dog.": [dog], "dog": [dog]})
    asked: list[list[str]] = []
    segment = segmenter.segment_maps

    def listen(image: Any, sentences: list[str], **options: Any) -> Segmentation:
        asked.append(sentences)
        return segment(image, sentences, **options)

    segmenter.segment_maps = listen
    figures = measure_photos(segmenter, photograph(*targets))
    assert asked == [["Dog.", "zebra"]]
    assert figures["miou"] == pytest.approx(0.5)


@pytest.mark.parametrize(("most", "expected"), [(0, 1), (2, 3), (None, 6), (9, 6)])
def test_absent_sentences_are_drawn_and_true_ones_all_asked(most: Any, expected: int) -> None:
    absent = [make_target(name) for name in "abcde"]
    annotations = photograph(*absent[:2], make_target("dog", rectangle(0, 0, 9, 9)), *absent[2:])
    first, second = (
        measure_photos(stub({}, {"c": 0.5}), annotations, max_absent=most) for _ in range(2)
    )
    assert first["n_sentences"] == expected and first["n_present"] == 1
    assert first["presence_auroc"] == second["presence_auroc"]


def test_photographs_that_say_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="at least one image"):
        measure_photos(stub({}), photograph()[:0])
    with pytest.raises(InputError, match="no sentence is true"):
        measure_photos(stub({}), photograph(make_target("dog")))
    with pytest.raises(InputError, match="max_absent must be at least 0, got -1"):
        measure_photos(stub({}), photograph(), max_absent=-1)


@pytest.mark.data
def test_true_masks_as_answers_score_one_on_camvid_frames_and_crops(photographs: Path) -> None:
    annotations = load_annotations(photographs / "camvid" / "val")[::40]

    class Oracle:
        """Knows the true instances by the pixels of the image."""

        def __init__(self) -> None:
            parts = [part for image in annotations for part in (image, *image.split_into_crops())]
            self.targets = {part.image.tobytes(): part.targets for part in parts}
            self.clipseg = SimpleNamespace(predict_heat=self.predict_heat)
            self.templates, self.models = ("{}",), {}

        def predict_heat(self, image: NDArray[np.uint8], sentences: list[str], _: Any) -> Any:
            targets = {t.sentence: t for t in self.targets[image.tobytes()]}
            return np.stack([targets[s].mask for s in sentences]).astype(np.float32)

        def segment_maps(
            self, image: NDArray[np.uint8], sentences: list[str], **options: Any
        ) -> Segmentation:
            targets = {t.sentence: t for t in self.targets[image.tobytes()]}
            answers = {}
            for sentence in sentences:
                target = targets[sentence]
                rest = target.mask & ~target.instances.any(axis=0)
                answers[sentence] = [*target.instances, *([rest] if rest.any() else [])]
            return stub(answers).segment_maps(image, sentences, **options)

    oracle: Any = Oracle()
    for crops, count in ((False, 3), (True, 18)):
        figures = measure_photos(oracle, annotations, crops=crops)
        assert figures["n"] == count
        for name in ("miou", "miou_things", "miou_stuff", "ciou", "giou", "instance_recall"):
            assert figures[name] == 1.0
        assert figures["miou_classes"] == figures["miou_clipseg_only"] == 1.0
    assert figures["presence_mcc"] == figures["presence_auroc"] == 1.0


def test_the_tiny_models_are_measured_end_to_end(tiny_profile: Any, tmp_path: Path) -> None:
    path = save_photographs(tmp_path, {"a": [[rectangle(0, 0, 20, 20)]] * 2, "b": [[], []]})
    segmenter = TextSegmenter.from_profile(replace(tiny_profile), device="cpu")
    figures = measure_photos(segmenter, load_annotations(path), crops=True)
    assert figures["n"] == 2 * 6 and figures["n_images"] == 2
    assert figures["weights"] == segmenter.models
    assert 0 <= figures["presence_auroc"] <= 1 and 0 <= figures["miou"] <= 1
