"""Images of several objects: what is drawn, held against polygons, colour names and the words."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ImageColor
from scipy import ndimage
from skimage.draw import polygon
from skimage.measure import regionprops

from labkit import object_scenes
from labkit.object_scenes import (
    CALIBRATION_SEED,
    EVALUATION_SEED,
    SCENE_COLOURS,
    SCENE_PATTERNS,
    SCENE_SENTENCES,
    SCENE_SHAPES,
    TRAINING_SEED,
    Clip,
    Scene,
    SceneObject,
    make_object_clip,
    make_object_scene,
)
from labkit.runtime import InputError

IMAGE_SIZE = 128
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]

draw = partial(make_object_scene, seed=EVALUATION_SEED)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw(number) for number in range(150)]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_object_clip(number, seed=EVALUATION_SEED) for number in range(24)]


def list_objects(scenes: list[Scene]) -> list[tuple[NDArray[np.uint8], Mask, SceneObject]]:
    """Image, mask and attributes of every object."""
    return [
        (scene.image, mask, scene_object)
        for scene in scenes
        for mask, scene_object in zip(scene.masks, scene.objects, strict=True)
    ]


def corners(shape: str) -> tuple[Floats, Floats]:
    """Corners of a shape of radius 1, x to the right and y upwards."""
    count, radii = {
        "circle": (720, (0.85,)),
        "square": (4, (0.75 * math.sqrt(2),)),
        "triangle": (3, (1.1,)),
        "star": (10, (1.1, 0.4374)),
    }[shape]
    first = math.pi / 4 if shape == "square" else math.pi / 2
    angle = first + np.arange(count) * 2 * math.pi / count
    radius = np.resize(radii, count)
    return radius * np.cos(angle), radius * np.sin(angle)


def full_areas(number: int, seed: int) -> list[Mask]:
    """Each object of a scene as if alone, filled by scikit-image from its corners."""
    key = object_scenes._make_scene_key(number, seed, IMAGE_SIZE)
    areas = []
    for placed in object_scenes._place_objects(key, IMAGE_SIZE):
        x, y = corners(placed.scene_object.shape)
        cosine, sine = math.cos(placed.angle), math.sin(placed.angle)
        columns = (IMAGE_SIZE - 1) / 2 + placed.x + placed.radius * (x * cosine - y * sine)
        rows = (IMAGE_SIZE - 1) / 2 - placed.y - placed.radius * (x * sine + y * cosine)
        area = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        area[polygon(rows, columns, area.shape)] = True
        areas.append(area)
    return areas


@pytest.fixture(scope="module")
def areas(scenes: list[Scene]) -> list[list[Mask]]:
    return [full_areas(number, EVALUATION_SEED) for number in range(len(scenes))]


def is_whole(mask: Mask) -> bool:
    """Whether `mask` does not touch the border."""
    return not (mask[[0, -1]].any() or mask[:, [0, -1]].any())


@pytest.mark.parametrize("image_size", [64, 128, 200])
def test_scenes_have_the_promised_form(image_size: int) -> None:
    scene = draw(7, image_size=image_size)
    count = len(scene.objects)
    assert scene.image.shape == (image_size, image_size, 3) and scene.image.dtype == np.uint8
    assert scene.masks.shape == (count, image_size, image_size) and scene.masks.dtype == np.bool_
    assert scene.image.min() < 60 and scene.image.max() > 190


def test_a_scene_depends_on_seed_and_number_alone(scenes: list[Scene]) -> None:
    for number in (149, 3, 70):
        again = draw(number)
        np.testing.assert_array_equal(again.image, scenes[number].image)
        np.testing.assert_array_equal(again.masks, scenes[number].masks)
        assert again.objects == scenes[number].objects
    wrapped = make_object_scene(3, seed=EVALUATION_SEED + 2**64)
    np.testing.assert_array_equal(wrapped.image, scenes[3].image)


def test_no_two_scenes_are_alike_whatever_the_purpose() -> None:
    seeds = (TRAINING_SEED, CALIBRATION_SEED, EVALUATION_SEED)
    assert len(set(seeds)) == 3
    drawn = [make_object_scene(number, seed=seed) for seed in seeds for number in range(60)]
    pixels = np.stack([scene.image for scene in drawn]).reshape(len(drawn), -1)
    assert len(np.unique(pixels, axis=0)) == len(drawn)
    shown = np.stack([scene.masks.any(axis=0) for scene in drawn]).reshape(len(drawn), -1)
    assert len(np.unique(shown, axis=0)) == len(drawn)


def test_evaluation_scenes_stay_what_they_were(scenes: list[Scene]) -> None:
    # Models were trained and measured on such scenes; other random numbers would make it all new.
    assert [scene_object.sentences[-1] for scene_object in scenes[0].objects] == [
        "red striped star",
        "green dotted square",
        "green dotted triangle",
    ]
    assert scenes[0].masks.sum(axis=(1, 2)).tolist() == pytest.approx([1127, 948, 977], abs=3)
    assert scenes[0].image.mean() == pytest.approx(116.96, abs=0.1)
    assert scenes[1].image.mean() == pytest.approx(100.44, abs=0.1)


def test_attributes_and_numbers_of_objects_are_about_equally_frequent(
    scenes: list[Scene],
) -> None:
    objects = [scene_object for scene in scenes for scene_object in scene.objects]
    for words, choices in (
        ([scene_object.shape for scene_object in objects], SCENE_SHAPES),
        ([scene_object.colour for scene_object in objects], tuple(SCENE_COLOURS)),
        ([scene_object.pattern for scene_object in objects], SCENE_PATTERNS),
        ([str(len(scene.objects)) for scene in scenes], ("2", "3", "4", "5")),
    ):
        counts = Counter(words)
        assert set(counts) == set(choices)
        expected = len(words) / len(choices)
        assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in counts.values())


def test_masks_are_what_later_polygons_leave_of_each_polygon(
    scenes: list[Scene], areas: list[list[Mask]]
) -> None:
    for scene, alone in zip(scenes, areas, strict=True):
        assert scene.masks.sum(axis=0).max() == 1
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for mask, area in zip(scene.masks[::-1], alone[::-1], strict=True):
            assert (mask ^ (area & ~covered)).sum() <= 0.02 * area.sum()
            covered |= area


def test_two_thirds_of_each_object_are_visible(
    scenes: list[Scene], areas: list[list[Mask]]
) -> None:
    shares = np.array(
        [
            mask.sum() / area.sum()
            for scene, alone in zip(scenes, areas, strict=True)
            for mask, area in zip(scene.masks, alone, strict=True)
        ]
    )
    assert shares.min() >= 0.64  # 0.65 by its own count, a few pixels from that of a polygon
    assert (shares < 0.95).mean() > 0.1  # some do lie behind others


def test_shapes_have_the_moments_of_their_names_and_only_stars_are_hollow(
    scenes: list[Scene],
) -> None:
    moments = {"circle": 1 / (2 * math.pi), "square": 1 / 6, "triangle": math.sqrt(3) / 9}
    seen = Counter[str]()
    for scene in scenes:
        mask, shape = scene.masks[-1], scene.objects[-1].shape  # nothing is before it
        if not is_whole(mask):
            continue
        seen[shape] += 1
        (region,) = regionprops(mask.astype(np.int32))
        if shape == "star":
            assert region.solidity < 0.6
        else:
            assert region.solidity > 0.9
            moment = np.trace(region.inertia_tensor) / region.area  # whatever size and angle
            assert moment == pytest.approx(moments[shape], rel=0.015)
    assert min(seen[shape] for shape in SCENE_SHAPES) >= 10


def test_plain_objects_have_the_colour_of_their_name(scenes: list[Scene]) -> None:
    named = np.array([ImageColor.getrgb(name) for name in SCENE_COLOURS], dtype=float)
    named /= np.linalg.norm(named, axis=1, keepdims=True)  # hue and saturation, not brightness
    plain = [row for row in list_objects(scenes) if row[2].pattern == "plain"]
    assert len(plain) > 100
    for image, mask, scene_object in plain:
        nearest = (named @ np.median(image[mask], axis=0)).argmax()
        assert tuple(SCENE_COLOURS)[nearest] == scene_object.colour


def test_only_plain_objects_are_of_one_colour(scenes: list[Scene]) -> None:
    for image, mask, scene_object in list_objects(scenes):
        inside = image[ndimage.binary_erosion(mask, iterations=2)].astype(float)
        darkest, brightest = np.percentile(inside, (5, 95), axis=0)
        assert ((brightest - darkest).max() < 60) == (scene_object.pattern == "plain")


def test_an_object_is_named_by_four_sentences() -> None:
    assert SceneObject("star", "red", "dotted").sentences == (
        "star",
        "red star",
        "dotted star",
        "red dotted star",
    )


def test_the_vocabulary_is_every_way_to_name_an_object() -> None:
    lengths = Counter(len(sentence.split()) for sentence in SCENE_SENTENCES)
    assert lengths == {1: 4, 2: 24 + 12, 3: 72}
    assert len(set(SCENE_SENTENCES)) == len(SCENE_SENTENCES) == 112
    assert list(SCENE_SENTENCES) == sorted(SCENE_SENTENCES)


def test_every_sentence_is_either_present_or_absent(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert sorted(scene.present + scene.absent) == list(SCENE_SENTENCES)
        assert scene.present and scene.absent


def test_a_sentence_names_the_objects_that_have_all_its_words(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        attributes = [set(scene_object.sentences[-1].split()) for scene_object in scene.objects]
        for sentence in SCENE_SENTENCES:
            right = [n for n, words in enumerate(attributes) if set(sentence.split()) <= words]
            np.testing.assert_array_equal(scene.masks_of(sentence), scene.masks[right])
            assert (sentence in scene.present) == bool(right)
    assert scenes[0].masks_of("elephant").shape == (0, IMAGE_SIZE, IMAGE_SIZE)


def gaps(sentence: str) -> set[tuple[str, ...]]:
    """The sentence with one word left open, in every way."""
    words = sentence.split()
    return {(*words[:index], "", *words[index + 1 :]) for index in range(len(words))}


def test_sampled_sentences_are_true_ones_then_near_misses_then_other_false_ones(
    scenes: list[Scene],
) -> None:
    for number, scene in enumerate(scenes):
        asked = scene.sample_sentences(number)
        assert asked == draw(number).sample_sentences(number)
        assert len(set(asked)) == 6
        assert set(asked[:3]) <= set(scene.present) and set(asked[3:]) <= set(scene.absent)
        true = {gap for sentence in scene.present for gap in gaps(sentence)}
        assert all(gaps(sentence) & true for sentence in asked[3:5])
    assert len({scenes[0].sample_sentences(seed) for seed in range(20)}) > 15


def test_sentences_come_in_the_numbers_asked_for_while_there_are_any(scenes: list[Scene]) -> None:
    scene = scenes[0]
    assert scene.sample_sentences(0, present=0, absent=0) == ()
    assert len(scene.sample_sentences(0, present=1, absent=5)) == 6
    everything = scene.sample_sentences(0, present=200, absent=200)
    count = len(scene.present)
    assert sorted(everything[:count]) == list(scene.present)
    assert sorted(everything[count:]) == list(scene.absent)


def test_all_kinds_of_sentences_are_asked_for(scenes: list[Scene]) -> None:
    asked = [scene.sample_sentences(number) for number, scene in enumerate(scenes)]
    for part in (slice(0, 3), slice(3, 5), slice(5, 6)):
        lengths = Counter(len(text.split()) for sentences in asked for text in sentences[part])
        assert set(lengths) == {1, 2, 3}


def test_clips_have_the_promised_form() -> None:
    clip = make_object_clip(2, seed=0, frames=3, image_size=64)
    count = len(clip.objects)
    assert clip.frames.shape == (3, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert clip.masks.shape == (3, count, 64, 64) and clip.masks.dtype == np.bool_


def test_a_clip_begins_with_the_scene_of_its_number(clips: list[Clip], scenes: list[Scene]) -> None:
    for clip, scene in zip(clips, scenes, strict=False):
        assert clip.objects == scene.objects
        np.testing.assert_array_equal(clip.frames[0], scene.image)
        np.testing.assert_array_equal(clip.masks[0], scene.masks)


def test_a_frame_depends_on_its_time_alone(clips: list[Clip]) -> None:
    for number in (5, 0):
        short = make_object_clip(number, seed=EVALUATION_SEED, frames=4)
        np.testing.assert_array_equal(short.frames, clips[number].frames[:4])
        np.testing.assert_array_equal(short.masks, clips[number].masks[:4])


def test_objects_move_steadily_anywhere_and_stay_in_the_image(clips: list[Clip]) -> None:
    quadrants = set()
    for clip in clips:
        front = clip.masks[:, -1]  # nothing is before it
        centres = np.array([np.argwhere(mask).mean(axis=0) for mask in front])
        steps = np.diff(centres, axis=0)
        speeds = np.linalg.norm(steps, axis=1)
        assert 0.009 * IMAGE_SIZE < np.median(speeds) < 0.036 * IMAGE_SIZE
        quadrants.add(tuple(np.median(steps, axis=0) > 0))
        turns = np.linalg.norm(np.diff(steps, axis=0), axis=1)
        assert np.median(turns) < 0.4  # straight on, but for reflections
        areas = front.sum(axis=(1, 2))
        assert areas.min() > 0.9 * areas.max()
    assert len(quadrants) == 4


def test_moving_objects_share_no_pixel(clips: list[Clip]) -> None:
    assert all(clip.masks.sum(axis=1).max() == 1 for clip in clips)


def test_objects_pass_behind_others_and_come_back(clips: list[Clip]) -> None:
    returned = 0
    for clip in clips:
        areas = clip.masks.sum(axis=(2, 3))  # (T, N)
        for shares in (areas / areas.max(axis=0)).T:
            least = shares.argmin()
            before, after = shares[: least + 1].max(), shares[least:].max()
            returned += shares[least] < 0.6 and before > 0.75 and after > 0.75
    assert returned >= 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"number": -1}, "number must be at least 0, got -1"),
        ({"number": 0, "image_size": 63}, "image_size must be at least 64 pixels, got 63"),
    ],
)
def test_impossible_scenes_are_refused(options: dict[str, int], words: str) -> None:
    for make in (make_object_scene, make_object_clip):
        with pytest.raises(InputError, match=words):
            make(**options, seed=0)


def test_a_clip_has_a_frame_at_least() -> None:
    assert len(make_object_clip(0, seed=0, frames=1, image_size=64).frames) == 1
    with pytest.raises(InputError, match="frames must be at least 1, got 0"):
        make_object_clip(0, seed=0, frames=0)


def test_global_random_state_is_left_as_found() -> None:
    python, numpy = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()
    draw(0).sample_sentences(0)
    make_object_clip(0, seed=0, frames=2, image_size=64)
    assert random.getstate() == python
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy)
