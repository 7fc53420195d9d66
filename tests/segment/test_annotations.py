from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from labkit.runtime import InputError
from labkit.segment.annotations import (
    CAMVID_CLASSES,
    AnnotatedImage,
    Target,
    decode_segmentation,
    load_annotations,
)

HEIGHT, WIDTH = 40, 60
SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]  # 20 x 20 pixels
LABEL = {each.name: number for number, each in enumerate(CAMVID_CLASSES)}


def save_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)


def save_labels(folder: Path, labels: NDArray[np.integer[Any]], name: str = "street") -> None:
    save_image(folder / f"{name}.jpg", labels.shape[::-1])
    Image.fromarray(labels.astype(np.uint8)).save(folder / f"{name}_labels.png")


def save_coco(folder: Path, *annotations: dict[str, Any], **changes: Any) -> Path:
    """An annotation file of one image, `photo.jpg`."""
    image = {"id": 7, "file_name": "photo.jpg", "height": HEIGHT, "width": WIDTH}
    document: dict[str, Any] = {
        "images": [image],
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "sports ball"}],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(document | changes))
    if not (folder / "photo.jpg").exists():
        save_image(folder / "photo.jpg")
    return path


def instance(number: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": 7,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": crowd,
    }


def get_targets(image: AnnotatedImage) -> dict[str, Target]:
    return {target.sentence: target for target in image.targets}


def street() -> NDArray[np.int64]:
    """Sky above road, two cars, a speck of a pedestrian, and a column without a label."""
    labels = np.full((HEIGHT, WIDTH), LABEL["road"])
    labels[:10] = LABEL["sky"]
    labels[20:30, 5:15] = LABEL["car"]
    labels[20:30, 30:50] = LABEL["car"]
    labels[35, 40] = LABEL["pedestrian"]  # 1 of 2400 pixels
    labels[:, -1] = LABEL["unlabelled"]
    return labels


def test_label_images_are_those_of_camvid_unless_their_classes_are_named(tmp_path: Path) -> None:
    save_labels(tmp_path, street())
    (image,) = load_annotations(tmp_path)
    targets = get_targets(image)
    assert image.name == "street.jpg" and image.image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(targets["road"].mask, street() == LABEL["road"])
    np.testing.assert_array_equal(targets["road"].ignore, street() == LABEL["unlabelled"])
    assert not targets["road"].is_thing and targets["road"].instances.shape[0] == 1
    assert targets["car"].is_thing and len(targets["car"].instances) == 2
    assert not targets["tree"].is_present and len(targets["tree"].instances) == 0
    assert "unlabelled" not in targets
    assert "pedestrian" not in targets  # too few pixels to say that there is one


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "ground, stuff\ndog\nvoid\n"),
        ("classes.json", '[{"name": "ground", "isthing": 0}, {"name": "dog"}, "void"]'),
    ],
)
def test_classes_of_other_label_images_are_named_beside_them(
    name: str, text: str, tmp_path: Path
) -> None:
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    labels[:20, :20], labels[:, 40:], labels[:, 50:] = 1, 2, 255
    save_labels(tmp_path, labels)
    (tmp_path / name).write_text(text)
    (image,) = load_annotations(tmp_path)
    ground, dog = image.targets
    assert (ground.sentence, ground.is_thing, dog.sentence, dog.is_thing) == (
        *("ground", False),
        *("dog", True),
    )
    np.testing.assert_array_equal(dog.mask, labels == 1)
    np.testing.assert_array_equal(dog.ignore, labels >= 2)


def test_images_are_read_when_they_are_used(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_labels(tmp_path, street(), name)
    annotations = load_annotations(tmp_path)
    (tmp_path / "c.jpg").write_bytes(b"")
    assert [image.name for image in annotations[:2]] == ["a.jpg", "b.jpg"]
    assert [path.name for path in annotations.paths] == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(InputError, match=r"c\.jpg is empty"):
        _ = annotations[2]


def test_crops_cover_the_image_and_keep_what_lies_in_them(tmp_path: Path) -> None:
    save_labels(tmp_path, street())
    (image,) = load_annotations(tmp_path)
    crops = image.split_into_crops()
    assert [crop.name.split(" at ")[1] for crop in crops] == [
        *("0,0", "20,0", "40,0"),
        *("0,20", "20,20", "40,20"),
    ]
    sky, cars = get_targets(crops[0]), get_targets(crops[3])
    assert sky["sky"].is_present and not sky["car"].is_present
    assert not cars["sky"].is_present and len(cars["car"].instances) == 1
    for crop in crops:
        assert crop.image.shape == (20, 20, 3)
        assert all(target.mask.shape == (20, 20) for target in crop.targets)
    seen = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for crop, (top, left) in zip(
        crops, [(y, x) for y in (0, 20) for x in (0, 20, 40)], strict=True
    ):
        seen[top : top + 20, left : left + 20] |= get_targets(crop)["road"].mask
    np.testing.assert_array_equal(seen, street() == LABEL["road"])


def test_a_crop_that_shows_a_sliver_or_a_crowd_alone_says_nothing_of_the_sentence() -> None:
    nothing = np.zeros((100, 100), dtype=bool)
    mask, crowd = nothing.copy(), nothing.copy()
    mask[10:30, 10:51], crowd[60:, :50] = True, True
    person = Target(
        sentence="person",
        mask=mask,
        is_thing=True,
        instances=mask[None],
        ignore=crowd,
        crowd=crowd,
    )
    image = AnnotatedImage(
        path=Path("a.jpg"),
        name="a.jpg",
        image=np.zeros((100, 100, 3), dtype=np.uint8),
        targets=(person,),
    )
    assert image.crop(50, 0, 50, 50).targets[0].mask.sum() == 20
    assert image.crop(50, 29, 50, 50).targets == ()  # 1 of 2500 pixels
    assert image.crop(0, 50, 50, 50).targets == ()
    assert not image.crop(50, 50, 50, 50).targets[0].is_present
    with pytest.raises(InputError, match="must lie in"):
        image.crop(60, 0, 50, 50)


def test_segmentations_of_coco_are_decoded_like_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = np.asfortranarray(rng.random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
    compressed = coco_mask.encode(noise)
    flat = noise.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    text = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    forms = [
        [[5, 5, 20.5, 6, 18, 30], [30, 10, 50, 10, 40, 38]],
        text,
        {"size": [HEIGHT, WIDTH], "counts": counts},
    ]
    path = save_coco(tmp_path, *(instance(n, 1, form) for n, form in enumerate(forms)))
    reference = COCO(str(path))
    for number, form in enumerate(forms):
        decoded = decode_segmentation(instance(number, 1, form), (HEIGHT, WIDTH))
        np.testing.assert_array_equal(decoded, reference.annToMask(reference.anns[number]) > 0)


def test_coco_instances_name_what_is_there_what_is_absent_and_the_crowd(tmp_path: Path) -> None:
    crowd = coco_mask.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))
    crowd["counts"] = crowd["counts"].decode()
    small = [[40, 30, 50, 30, 50, 38, 40, 38]]
    path = save_coco(
        tmp_path, instance(1, 1, SQUARE), instance(2, 1, small), instance(3, 1, crowd, crowd=1)
    )
    (image,) = load_annotations(path)
    person, ball = image.targets
    assert person.sentence == "person" and len(person.instances) == 2
    assert person.mask.sum() == 400 + 80
    assert person.crowd.sum() == person.ignore.sum() > 0
    assert not (person.ignore & person.mask).any()
    assert ball.sentence == "sports ball" and not ball.is_present
    assert load_annotations(tmp_path)[0].name == "photo.jpg"  # the folder is enough
    assert load_annotations(path)[:1].is_exclusive


def test_of_a_category_with_a_crowd_alone_nothing_is_known(tmp_path: Path) -> None:
    crowd = instance(1, 1, {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, crowd=1)
    (image,) = load_annotations(save_coco(tmp_path, crowd))
    assert [target.sentence for target in image.targets] == ["sports ball"]


def save_panoptic(folder: Path) -> Path:
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    ids[:20], ids[25:, :10], ids[25:, 20:40] = 256 * 3 + 5, 65536 + 7, 2
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    save_image(folder / "val" / "photo.jpg")
    (folder / "panoptic_val").mkdir()
    Image.fromarray(colours).save(folder / "panoptic_val" / "photo.png")
    segments = [
        {"id": 256 * 3 + 5, "category_id": 187, "iscrowd": 0},
        {"id": 65536 + 7, "category_id": 1, "iscrowd": 0},
        {"id": 2, "category_id": 1, "iscrowd": 1},
    ]
    document = {
        "images": [{"id": 7, "file_name": "photo.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 7, "file_name": "photo.png", "segments_info": segments}],
        "categories": [
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 187, "name": "sky-other-merged", "isthing": 0},
            {"id": 190, "name": "floor-wood", "isthing": 0},
        ],
    }
    path = folder / "panoptic_val.json"
    path.write_text(json.dumps(document))
    return path


def test_panoptic_colours_are_numbers_of_segments(tmp_path: Path) -> None:
    (image,) = load_annotations(save_panoptic(tmp_path))
    person, sky, floor = image.targets
    assert (sky.sentence, sky.is_thing, sky.mask.sum()) == ("sky", False, 20 * WIDTH)
    assert person.is_thing and person.mask.sum() == 15 * 10 and len(person.instances) == 1
    assert person.crowd.sum() == 15 * 20
    assert floor.sentence == "floor wood" and not floor.is_present
    unlabelled = HEIGHT * WIDTH - 20 * WIDTH - 15 * 30
    assert sky.ignore.sum() == unlabelled and person.ignore.sum() == unlabelled + 15 * 20


def test_an_image_without_a_panoptic_annotation_is_left_out(tmp_path: Path) -> None:
    path = save_panoptic(tmp_path)
    document = json.loads(path.read_text())
    document["images"].append({"id": 8, "file_name": "8.jpg", "height": HEIGHT, "width": WIDTH})
    path.write_text(json.dumps(document))
    save_image(tmp_path / "val" / "8.jpg")
    assert [image.name for image in load_annotations(path)] == ["photo.jpg"]


def save_refcoco(folder: Path, name: str = "refs(unc).json", **changes: Any) -> Path:
    save_coco(folder, instance(11, 1, SQUARE), instance(12, 1, [[40, 5, 50, 5, 50, 25, 40, 25]]))
    reference = {
        "ref_id": 0,
        "ann_id": 11,
        "image_id": 7,
        "category_id": 1,
        "split": "val",
        "file_name": "photo_11.jpg",  # RefCOCO's own, which names no file
        "sent_ids": [0, 1],
        "sentences": [
            {"sent_id": 0, "sent": "left man", "raw": "Left man", "tokens": ["left", "man"]},
            {"sent_id": 1, "sent": "?", "raw": "?", "tokens": []},
        ],
    }
    other = reference | {"ann_id": 12, "split": "testA", "sentences": [{"sent": "right man"}]}
    path = folder / name
    path.write_text(json.dumps([reference | changes, other]))
    return path


def test_refcoco_names_one_object_by_several_sentences(tmp_path: Path) -> None:
    save_refcoco(tmp_path)
    (image,) = load_annotations(tmp_path)
    assert [target.sentence for target in image.targets] == ["left man", "right man"]
    left, right = image.targets
    assert left.mask.sum() == 400 and right.mask.sum() == 200 and len(left.instances) == 1
    (image,) = load_annotations(tmp_path, split="testA")
    assert [target.sentence for target in image.targets] == ["right man"]
    with pytest.raises(InputError, match="split must be of testA, val, got 'dev'"):
        load_annotations(tmp_path, split="dev")


def test_grefcoco_names_several_objects_or_none(tmp_path: Path) -> None:
    save_refcoco(tmp_path, "grefs(unc).json", ann_id=[11, 12])
    assert load_annotations(tmp_path)[0].targets[0].mask.sum() == 600
    save_refcoco(tmp_path, "grefs(unc).json", ann_id=[-1], no_target=True)
    assert not load_annotations(tmp_path)[0].targets[0].is_present


def test_the_file_of_mdetr_repeats_an_image_for_each_caption(tmp_path: Path) -> None:
    image = {"file_name": "photo.jpg", "height": HEIGHT, "width": WIDTH, "original_id": 7}
    images = [image | {"id": 0, "caption": "left man"}, image | {"id": 1, "caption": "the ball"}]
    annotations = [
        instance(1, 1, SQUARE) | {"image_id": 0},
        instance(2, 1, [[0, 0, 2, 0, 2, 2, 0, 2]]) | {"image_id": 1},
    ]
    (photo,) = load_annotations(save_coco(tmp_path, *annotations, images=images))
    assert [(t.sentence, int(t.mask.sum())) for t in photo.targets] == [
        *(("left man", 400), ("the ball", 4)),
    ]


def test_phrasecut_has_polygons_of_points(tmp_path: Path) -> None:
    points = [[10, 5], [30, 5], [30, 25], [10, 25]]
    tasks = [
        {
            "task_id": "4__1",
            "image_id": 4,
            "phrase": "black shirt",
            "instance_boxes": [[10, 5, 20, 20], [40, 5, 10, 20]],
            "Polygons": [[points], [[[40, 5], [50, 5], [50, 25], [40, 25]], [[0, 0], [1, 1]]]],
        }
    ]
    (tmp_path / "refer_val.json").write_text(json.dumps(tasks))
    save_image(tmp_path / "images" / "4.jpg")
    (image,) = load_annotations(tmp_path)
    (target,) = image.targets
    assert target.sentence == "black shirt" and target.mask.sum() == 600
    assert not load_annotations(tmp_path)[:1].is_exclusive
    assert [int(each.sum()) for each in target.instances] == [400, 200]


def damage_size(folder: Path) -> None:
    save_labels(folder, street())
    save_image(folder / "street.jpg", (WIDTH // 2, HEIGHT))


def damage_label(folder: Path) -> None:
    save_labels(folder, np.full((HEIGHT, WIDTH), 12))


def damage_mode(folder: Path) -> None:
    save_labels(folder, street())
    save_image(folder / "street_labels.png")


def damage_png(folder: Path) -> None:
    save_labels(folder, street())
    path = folder / "street_labels.png"
    path.write_bytes(path.read_bytes()[:60])


def remove_photograph(folder: Path) -> None:
    save_labels(folder, street())
    (folder / "street.jpg").unlink()


def name_missing_image(folder: Path) -> None:
    save_coco(folder, instance(1, 1, SQUARE))
    (folder / "photo.jpg").unlink()


def name_other_size(folder: Path) -> None:
    save_coco(folder)
    save_image(folder / "photo.jpg", (WIDTH, HEIGHT + 1))


def name_missing_category(folder: Path) -> None:
    save_coco(folder, instance(1, 3, SQUARE))


def name_no_mask(folder: Path) -> None:
    save_coco(folder, instance(1, 1, None))


def name_damaged_mask(folder: Path) -> None:
    save_coco(folder, instance(1, 1, {"size": [HEIGHT, WIDTH]}))


def name_far_corner(folder: Path) -> None:
    save_coco(folder, instance(1, 1, [[0, 0, 10**12, 0, 10**12, 9]]))


def name_short_runs(folder: Path) -> None:
    save_coco(folder, instance(1, 1, {"size": [HEIGHT, WIDTH], "counts": [10, 10**12]}))


def name_no_number(folder: Path) -> None:
    path = save_panoptic(folder)
    document = json.loads(path.read_text())
    document["annotations"][0]["segments_info"][0]["id"] = None
    path.write_text(json.dumps(document))


def remove_panoptic(folder: Path) -> None:
    save_panoptic(folder)
    (folder / "panoptic_val" / "photo.png").unlink()


def add_segment(folder: Path) -> None:
    path = save_panoptic(folder)
    document = json.loads(path.read_text())
    document["annotations"][0]["segments_info"].pop()
    path.write_text(json.dumps(document))


def leave_pickle(folder: Path) -> None:
    save_refcoco(folder).unlink()
    (folder / "refs(unc).p").write_bytes(b"cposix\nsystem\n")


def remove_instances(folder: Path) -> None:
    save_refcoco(folder)
    (folder / "instances.json").unlink()


def write_twice(folder: Path) -> None:
    save_coco(folder)
    (folder / "other.json").write_text("{}")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (damage_size, "street_labels.png is of 60 x 40 pixels, its image of 30 x 40"),
        (damage_label, "has the label 12, but there are 12 classes"),
        (damage_mode, "must have one label a pixel, got colours"),
        (damage_png, "street_labels.png is damaged or cut short"),
        (remove_photograph, "has no image for 1 label images, such as street.jpg"),
        (name_missing_image, "names 1 images that are not there, such as .*photo.jpg"),
        (name_other_size, "the annotation of photo.jpg is of 60 x 40 pixels, its image of 60 x 41"),
        (name_missing_category, "uses the category 3, which is not among its categories"),
        (name_no_mask, "annotation 1 has no segmentation"),
        (name_damaged_mask, "annotation 1 has a damaged segmentation"),
        (name_far_corner, "annotation 1 has a damaged segmentation: a corner lies far outside"),
        (name_short_runs, "annotation 1 has a damaged segmentation: its run lengths do not fill"),
        (name_no_number, "is no complete COCO annotation: a segment has the id None"),
        (remove_panoptic, "names photo.png, which is neither in .*panoptic_val nor beside"),
        (add_segment, "has the segment 2, which its JSON file does not name"),
        (leave_pickle, "is a pickle, which could run any code"),
        (remove_instances, "needs the masks, which are in .*instances.json: it is missing"),
        (write_twice, "holds several annotations; give one of instances.json, other.json"),
        (lambda folder: (folder / "a.json").write_text("{"), "a.json is no JSON"),
        (lambda folder: (folder / "a.json").write_text("[1]"), "is no annotation of COCO"),
        (lambda folder: (folder / "a.txt").write_text(""), "holds neither NAME_labels.png"),
        (lambda folder: folder.rmdir(), "there is no"),
        (
            lambda folder: (folder / "a.json").write_text('{"images": [{}], "annotations": []}'),
            "is no complete COCO annotation: 'file_name'",
        ),
    ],
)
def test_bad_annotations_are_one_line(prepare: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(InputError, match=message) as error:
        for _ in load_annotations(folder):
            pass
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.data
def test_regions_of_camvid_are_those_of_scipy(photographs: Path) -> None:
    annotations = load_annotations(photographs / "camvid" / "val")
    assert len(annotations) == 101
    (photograph,) = annotations[:1]
    labels = np.asarray(Image.open(photograph.path.with_name(f"{photograph.path.stem}_labels.png")))
    for target in photograph.targets:
        mask = labels == LABEL[target.sentence]
        np.testing.assert_array_equal(target.mask, mask)
        if target.is_thing:
            regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
            areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
            large = np.sort(areas[areas >= 0.001 * mask.size])
            found = np.sort(target.instances.sum(axis=(1, 2)))
            np.testing.assert_array_equal(found, large)


@pytest.mark.data
def test_photographs_of_coco_and_voc_have_the_areas_of_their_files(photographs: Path) -> None:
    folder = photographs / "photos"
    (match,) = load_annotations(folder / "coco")
    document = json.loads((folder / "coco" / "000000142238_panoptic.json").read_text())
    segments = document["annotations"][0]["segments_info"]
    targets = get_targets(match)
    people = [s["area"] for s in segments if s["category_id"] == 1 and not s["iscrowd"]]
    assert sorted(targets["person"].instances.sum(axis=(1, 2))) == sorted(people)
    assert targets["sky"].mask.sum() == 8204 and not targets["sky"].is_thing
    reference = COCO(str(folder / "voc" / "instances.json"))
    for image in load_annotations(folder / "voc"):
        number = next(n for n, each in reference.imgs.items() if each["file_name"] == image.name)
        masks = [
            reference.annToMask(annotation) > 0
            for annotation in reference.loadAnns(reference.getAnnIds(imgIds=number, catIds=15))
            if not annotation["iscrowd"]
        ]
        np.testing.assert_array_equal(get_targets(image)["person"].instances, np.stack(masks))
