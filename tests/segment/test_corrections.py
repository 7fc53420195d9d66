from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from labkit.object_scenes import CALIBRATION_SEED, make_object_scene
from labkit.runtime import InputError
from labkit.segment.checkpoints import Profile
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.results import Segmentation, SegmentedObject
from tests.segment.conftest import CallsOf, noise

Mask = NDArray[np.bool_]


@pytest.fixture(scope="module")
def demo() -> TextSegmenter:
    return TextSegmenter.from_profile("demo", device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_profile: Profile) -> TextSegmenter:
    return TextSegmenter.from_profile(tiny_profile, device="cpu")


def find_middle(mask: Mask) -> tuple[int, int]:
    """The pixel (x, y) that lies deepest in a mask."""
    import cv2

    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.fixture
def scene_and_found(demo: TextSegmenter) -> tuple[Any, Segmentation]:
    """A scene with two objects far from each other, both asked for."""
    scene = make_object_scene(2, seed=CALIBRATION_SEED)
    names = [each.sentences[-1] for each in scene.objects]
    return scene, demo(scene.image, names)


def test_a_click_on_another_object_moves_the_mask_there_and_encodes_nothing(
    scene_and_found: tuple[Any, Segmentation], demo: TextSegmenter, calls_of: CallsOf
) -> None:
    scene, found = scene_and_found
    assert len(found) >= 2
    encoder = calls_of(demo.sam2.model.image_encoder)
    tower = calls_of(demo.clipseg.model.clip.vision_model)
    old, truth = found[0], scene.masks[1]
    assert iou(old.mask, scene.masks[0]) > 0.7 and iou(old.mask, truth) < 0.1
    moved = found.refine(0, points=[find_middle(truth)])
    assert iou(moved[0].mask, truth) > 0.7
    assert encoder == tower == []
    assert found[0] is old and moved.objects[1:] == found.objects[1:]
    assert (moved[0].sentence, moved[0].presence) == (old.sentence, old.presence)
    left, top, right, bottom = moved[0].box
    assert moved[0].mask[top:bottom, left:right].sum() == moved[0].mask.sum()


def test_clicks_on_two_objects_hold_both(scene_and_found: tuple[Any, Segmentation]) -> None:
    scene, found = scene_and_found
    first, second = (find_middle(mask) for mask in scene.masks[:2])
    both = scene.masks[0] | scene.masks[1]
    joined = found.refine(0, points=[first, second])
    assert iou(joined[0].mask, both) > 0.7
    again = found.refine(0, points=[first]).refine(0, points=[second])  # they count together
    assert iou(again[0].mask, both) > 0.7


def test_a_click_on_what_is_not_meant_takes_it_away(
    scene_and_found: tuple[Any, Segmentation],
) -> None:
    scene, found = scene_and_found
    first, second = (find_middle(mask) for mask in scene.masks[:2])
    joined = found.refine(0, points=[first, second])
    apart = joined.refine(0, points=[second], labels=[0])
    assert iou(apart[0].mask, scene.masks[0]) > 0.7
    assert not apart[0].mask[second[1], second[0]]


def test_a_box_alone_corrects_too(scene_and_found: tuple[Any, Segmentation]) -> None:
    scene, found = scene_and_found
    rows, columns = (np.flatnonzero(scene.masks[1].any(axis=axis)) for axis in (1, 0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    boxed = found.refine(found[0], box=box)
    assert iou(found[0].mask, scene.masks[1]) < 0.1 and iou(boxed[0].mask, scene.masks[1]) > 0.9


def test_scores_are_those_of_the_new_mask(scene_and_found: tuple[Any, Segmentation]) -> None:
    scene, found = scene_and_found
    moved = found.refine(0, points=[find_middle(scene.masks[1])])
    assert moved[0].agreement < found[0].agreement  # the heat is elsewhere
    assert moved[0].grounding < found[0].grounding
    assert 0 <= moved[0].predicted_iou <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs points or a box, got neither"),
        ({"points": []}, "needs points or a box, got neither"),
        (
            {"points": [(60, 3)]},
            r"points must be pixels \(x, y\) of the image, 60 wide and 40 high",
        ),
        ({"points": [(-1, 3)]}, "got .*-1"),
        ({"points": [1, 2]}, r"points must be pairs \(x, y\), got \[1, 2\]"),
        ({"points": [(1, 2, 3)]}, "must be pairs"),
        ({"points": "here"}, "must be pairs"),
        ({"points": [(np.nan, 2)]}, "points must be finite"),
        ({"points": [(1, 2)], "labels": [1, 0]}, "for each of 1 points"),
        ({"points": [(1, 2)], "labels": [2]}, r"labels must be 1 \(object\) or 0"),
        ({"box": (5, 5, 61, 9)}, "box must be XYXY in the image, 60 wide and 40 high, got"),
        ({"box": (9, 5, 5, 9)}, "box must be XYXY"),
        ({"box": (1, 2, 3)}, r"box must be four numbers, got \(1, 2, 3\)"),
    ],
)
def test_unusable_corrections_are_refused_in_one_line(
    tiny: TextSegmenter, arguments: dict[str, Any], message: str
) -> None:
    found = tiny(noise(40, 60), ["cat"], assume_present=True)
    with pytest.raises(InputError, match=message) as error:
        found.refine(0, **arguments)
    assert "\n" not in str(error.value)


def test_objects_are_named_by_themselves_or_their_position(tiny: TextSegmenter) -> None:
    found = tiny(noise(40, 60), ["cat"], assume_present=True)
    stranger = tiny(noise(40, 60), ["cat"], assume_present=True)[0]
    for other in (len(found), -len(found) - 1, stranger):
        with pytest.raises(InputError, match=f"one of the {len(found)} objects"):
            found.refine(other, points=[(3, 3)])


def test_the_last_four_images_can_be_corrected_and_older_ones_say_so(
    tiny: TextSegmenter, segmentation: Segmentation
) -> None:
    found = [tiny(noise(40, 60, seed), ["cat"], assume_present=True) for seed in range(5)]
    gc.collect()
    with pytest.raises(
        InputError, match=r"image can no longer be corrected, .* last 4 images only"
    ):
        found[0].refine(0, points=[(30, 20)])
    assert len(tiny._correctors) == 4
    for each in found[1:]:
        each.refine(0, points=[(30, 20)])
    for each in (segmentation, copy.copy(found[4]), pickle.loads(pickle.dumps(found[4]))):
        assert isinstance(each[0], SegmentedObject)
        with pytest.raises(InputError, match="no longer"):
            each.refine(0, points=[(3, 3)])


def test_what_is_kept_of_an_object_goes_with_it(tiny: TextSegmenter) -> None:
    found = tiny(noise(40, 60), ["cat"], assume_present=True)
    kept: Any = found.find_corrector()
    count = len(kept.masks)
    corrected = found.refine(0, points=[(30, 20)])
    assert len(kept.masks) == count + 1
    del corrected
    gc.collect()
    assert len(kept.masks) == count
