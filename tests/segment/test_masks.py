from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco
from sam2.utils.amg import calculate_stability_score
from skimage.morphology import area_closing, area_opening

from labkit.runtime import InputError
from labkit.segment import masks
from labkit.segment.masks import Candidate
from labkit.segment.prompts import Prompt

Mask = NDArray[np.bool_]
SHAPES = [(1, 1), (1, 9), (9, 1), (7, 13), (40, 25), (300, 200)]


def test_stability_is_that_of_sam2s_own_mask_generator() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (5, 20, 30)).astype(np.float32)
    expected = calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0)
    assert [masks.measure_stability(mask) for mask in logits] == pytest.approx(expected.tolist())
    assert masks.measure_stability(np.array([[2.0, 0.5, -0.5, -2.0]], np.float32)) == pytest.approx(
        1 / 3
    )
    assert masks.measure_stability(np.full((3, 3), -2, np.float32)) == 0


def test_agreement_is_intersection_over_union_of_hard_with_soft() -> None:
    mask = np.array([[True, True, False, False]])
    heat = np.array([[1.0, 0.5, 0.5, 0.0]], np.float32)
    assert masks.measure_agreement(mask, heat) == pytest.approx(1.5 / (2 + 2 - 1.5))
    assert masks.measure_agreement(mask, mask.astype(np.float32)) == 1
    assert masks.measure_agreement(mask, (~mask).astype(np.float32)) == 0
    assert masks.measure_agreement(mask & False, heat * 0) == 0


def square(low: int, high: int) -> Mask:
    mask = np.zeros((20, 20), dtype=bool)
    mask[low:high, low:high] = True
    return mask


def as_logits(mask: Mask, size: float = 5.0) -> NDArray[np.float32]:
    return np.where(mask, size, -size).astype(np.float32)


def candidate(mask: Mask, score: float = 1.0, agreement: float = 0.4) -> Candidate:
    """With this agreement, and a predicted IoU that makes its score `score` times that."""
    return Candidate(
        logits=as_logits(mask),
        predicted_iou=score,
        stability=1.0,
        agreement=agreement,
    )


def test_choice_is_the_best_product_of_the_three_scores() -> None:
    mask = square(5, 15)
    prompt = Prompt(
        points=np.array([[9.0, 9.0]]),
        labels=np.array([1]),
        box=np.array([5.0, 5.0, 15.0, 15.0]),
        mask_logits=np.where(mask, 10, -10).astype(np.float32),
        region=mask,
    )
    shaky = np.where(mask, 0.5, -5).astype(np.float32)
    elsewhere = as_logits(square(0, 5))
    logits = np.stack([shaky, elsewhere, as_logits(square(5, 14)), as_logits(mask)])
    best = masks.select_mask(prompt, logits, np.array([0.9, 1.2, 0.8, 0.6], np.float32))
    assert np.array_equal(best.logits, logits[2])
    assert best.predicted_iou == pytest.approx(0.8)
    assert (best.stability, best.agreement) == (1.0, pytest.approx(0.81))
    assert best.score == pytest.approx(0.8 * 0.81)
    only = masks.select_mask(prompt, logits[1:2], np.array([1.2], np.float32))
    assert (only.predicted_iou, only.agreement) == (1.0, 0.0)


def test_thin_mask_wins_over_a_blob_where_the_heat_is_a_blurred_pole() -> None:
    import cv2

    pole, blob = (np.zeros((64, 64), dtype=bool) for _ in range(2))
    pole[8:56, 31:33], blob[6:58, 26:38] = True, True
    heat = cv2.GaussianBlur(pole.astype(np.float32), (0, 0), 5)
    heat /= heat.max()
    prompt = Prompt(
        points=np.array([[31.0, 30.0]]),
        labels=np.array([1]),
        box=np.array([26.0, 6.0, 38.0, 58.0]),
        mask_logits=heat * 20 - 10,
        region=blob,
    )
    logits, ious = np.stack([as_logits(pole), as_logits(blob)]), np.full(2, 0.8, np.float32)
    assert np.array_equal(masks.select_mask(prompt, logits, ious).logits, logits[1])
    best = masks.select_mask(prompt, logits, ious, blur=(5.0, 5.0))
    assert np.array_equal(best.logits, logits[0]) and best.agreement > 0.95


def test_small_hole_is_filled_and_a_rings_stays() -> None:
    solid = square(2, 18)
    pierced = solid.copy()
    pierced[9, 9:11] = False  # 2 of 254 pixels
    ring = solid & ~square(8, 12)  # 16 of 240
    assert np.array_equal(masks.remove_small_regions(as_logits(pierced)) > 0, solid)
    assert np.array_equal(masks.remove_small_regions(as_logits(ring)) > 0, ring)


def test_gaps_at_the_border_stay() -> None:
    mask = np.ones((20, 20), dtype=bool)
    mask[0, 5] = mask[19, 7] = mask[3, 0] = mask[4, 19] = False
    assert np.array_equal(masks.remove_small_regions(as_logits(mask)) > 0, mask)


def test_islands_are_cleared_and_large_pieces_stay() -> None:
    main, island, second = square(1, 9), np.zeros((20, 20), bool), square(15, 18)
    island[1, 15:19] = True
    cleaned = masks.remove_small_regions(as_logits(main | island | second))
    assert np.array_equal(cleaned > 0, main | second)  # 64, 4 and 9 pixels


def test_pixels_that_touch_at_a_corner_belong_together() -> None:
    mask = square(2, 10)
    mask[10, 10] = mask[11, 11] = True
    assert np.array_equal(masks.remove_small_regions(as_logits(mask)) > 0, mask)


def test_cleaning_turns_signs_and_leaves_all_else() -> None:
    logits = np.full((20, 20), -3.0, np.float32)
    logits[2:12, 2:12] = 4.0
    logits[5, 5], logits[6, 8], logits[15, 15] = -2.0, 0.0, 1.5
    before = logits.copy()
    cleaned = masks.remove_small_regions(logits)
    assert np.array_equal(logits, before) and cleaned.dtype == np.float32
    assert (cleaned[5, 5], cleaned[15, 15]) == (2.0, -1.5) and 0 < cleaned[6, 8] < 0.01
    same = np.ones((20, 20), dtype=bool)
    same[[5, 6, 15], [5, 8, 15]] = False
    assert np.array_equal(cleaned[same], logits[same])


@pytest.mark.parametrize("value", [-3.0, 3.0, 0.0])
def test_cleaning_nothing_or_everything_changes_nothing(value: float) -> None:
    logits = np.full((6, 6), value, np.float32)
    assert np.array_equal(masks.remove_small_regions(logits), logits)


@pytest.mark.parametrize("seed", range(8))
def test_cleaned_masks_equal_those_of_skimage(seed: int) -> None:
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(60, 60)), 1.2)
    mask = np.pad(smooth > np.quantile(smooth, 0.35), 6)
    largest = max(ndimage.sum_labels(mask, *_pieces(mask)))
    opened = area_opening(mask, int(np.ceil(0.1 * largest)), connectivity=2)
    expected = area_closing(opened, max(2, int(np.ceil(0.01 * opened.sum()))), connectivity=1)
    cleaned = masks.remove_small_regions(as_logits(mask)) > 0
    assert np.array_equal(cleaned, expected) and not np.array_equal(opened, expected)


def _pieces(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    return labels, np.arange(1, count + 1)


def test_nms_drops_repetitions_parts_and_empty_masks() -> None:
    best = candidate(square(2, 12), 0.9)
    again = candidate(square(2, 11), 0.8)  # IoU 0.81
    part = candidate(square(3, 6), 0.7)
    apart = candidate(square(13, 19), 0.6)
    overlapping = candidate(square(9, 16), 0.5)  # shares 9 of 49 pixels with each
    empty = candidate(square(0, 0), 0.95)
    kept = masks.mask_nms([overlapping, empty, part, again, apart, best])
    assert kept == [best, apart, overlapping]
    assert masks.mask_nms([]) == [] and masks.mask_nms([empty]) == []


def test_a_whole_is_dropped_for_its_better_part() -> None:
    part, whole = candidate(square(3, 6), 0.9), candidate(square(2, 12), 0.8)
    assert masks.mask_nms([whole, part]) == [part]


def test_a_mask_inside_another_stays_if_it_has_heat_of_its_own() -> None:
    adult, child = candidate(square(2, 18), 0.9), candidate(square(11, 16), 0.8, agreement=0.6)
    assert masks.mask_nms([child, adult]) == [child, adult]  # the best score first
    again = candidate(square(11, 15), 0.7, agreement=0.6)  # IoU 0.64 with the child
    assert masks.mask_nms([again, adult], overlap_threshold=0.6) == [again, adult]
    assert masks.mask_nms([again, child], overlap_threshold=0.6) == [child]


def test_hot_island_stays_and_a_cold_one_or_a_speck_goes() -> None:
    body, foot, noise = square(0, 14), np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    foot[16:18, 3:7], noise[2, 18] = True, True  # 196, 8 and 1 pixels
    logits = as_logits(body | foot | noise)
    hot = np.ones((20, 20), np.float32)
    assert np.array_equal(masks.remove_small_regions(logits, hot) > 0, body | foot)
    assert np.array_equal(masks.remove_small_regions(logits, hot * 0.4) > 0, body)
    assert np.array_equal(masks.remove_small_regions(logits) > 0, body)


def test_upsampled_mask_has_the_shape_and_proportions_of_the_image() -> None:
    left = np.zeros((4, 4), dtype=bool)
    left[:, :2] = True
    mask = masks.upsample_mask(as_logits(left), (6, 20))
    assert mask.dtype == bool and mask.shape == (6, 20)
    assert mask[:, :10].all() and not mask[:, 10:].any()
    assert np.array_equal(masks.upsample_mask(as_logits(left), (4, 4)), left)
    assert masks.upsample_mask(as_logits(left | True), (1, 1)).all()


def test_lower_overlap_threshold_keeps_fewer() -> None:
    first, second = candidate(square(2, 12), 0.9), candidate(square(5, 15), 0.8)  # IoU 49 / 151
    assert masks.mask_nms([first, second]) == [first, second]
    assert masks.mask_nms([first, second], overlap_threshold=0.3) == [first]


def noisy_masks(shape: tuple[int, int]) -> list[NDArray[np.bool_]]:
    rng = np.random.default_rng(shape[0] + 1000 * shape[1])
    shares = (0.02, 0.5, 0.98)
    noisy = [rng.random(shape) < share for share in shares]
    return [np.zeros(shape, bool), np.ones(shape, bool), *noisy]


@pytest.mark.parametrize("shape", SHAPES)
def test_run_lengths_are_those_of_pycocotools_in_both_directions(shape: tuple[int, int]) -> None:
    for mask in noisy_masks(shape):
        rle = masks.encode_mask(mask)
        assert rle["size"] == list(shape)
        in_bytes = {"size": rle["size"], "counts": rle["counts"].encode()}
        assert np.array_equal(coco.decode(in_bytes), mask)
        reference = coco.encode(np.asfortranarray(mask, np.uint8))
        assert rle["counts"].encode() == reference["counts"]
        back = masks.decode_mask({"size": list(shape), "counts": reference["counts"].decode()})
        assert back.dtype == bool and np.array_equal(back, mask)
        assert masks.measure_area(rle) == mask.sum() == coco.area(in_bytes)
        assert json.loads(json.dumps(rle)) == rle


@pytest.mark.parametrize("order", ["C", "F"])
def test_layout_in_memory_does_not_matter(order: str) -> None:
    mask = noisy_masks((30, 20))[3]
    views = [np.array(mask, order=order), mask[::-1][::-1], np.repeat(mask, 2, axis=1)[:, ::2]]
    assert all(np.array_equal(masks.decode_mask(masks.encode_mask(view)), mask) for view in views)


@pytest.mark.parametrize("mask", [np.ones((3, 3)), np.ones((1, 3, 3), bool), np.ones(3, bool)])
def test_only_a_boolean_mask_of_two_axes_is_encoded(mask: NDArray[np.bool_]) -> None:
    with pytest.raises(InputError, match=r"mask must be bool \(H, W\)"):
        masks.encode_mask(mask)


def make_masks() -> list[NDArray[np.bool_]]:
    """Noise and blobs of many sizes, among them one pixel, nothing and everything."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    made = [np.ones((1, 1), bool), np.zeros((3, 4), bool), np.ones((5, 7), bool)]
    for number in range(60):
        field = rng.random(rng.integers(1, 40, 2))
        field = ndimage.gaussian_filter(field, 2) if number % 2 else field
        made.append(field > np.quantile(field, rng.uniform(0.1, 0.9)))
    return made


def decode_polygons(polygons: list[list[float]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """What pycocotools makes of polygons."""
    if not polygons:
        return np.zeros(shape, bool)
    rles = coco.frPyObjects(polygons, *shape)
    filled: NDArray[np.bool_] = coco.decode(coco.merge(rles)).astype(bool)
    return filled


def test_outlines_give_the_mask_back_to_the_pixel() -> None:
    for mask in make_masks():
        pieces = masks.trace_mask(mask)
        apart = [masks.join_rings(piece).astype(float).ravel().tolist() for piece in pieces]
        assert np.array_equal(decode_polygons(apart, mask.shape), mask)
        if pieces:
            ring = masks.join_rings([ring for piece in pieces for ring in piece])
            together = decode_polygons([ring.astype(float).ravel().tolist()], mask.shape)
            assert np.array_equal(together, mask)


def test_each_piece_has_an_outer_ring_and_its_holes_and_no_ring_touches_itself() -> None:
    from scipy import ndimage

    for mask in make_masks():
        pieces = masks.trace_mask(mask)
        assert len(pieces) == ndimage.label(mask)[1]
        for outer, *holes in pieces:
            areas = [
                cv2.contourArea(ring.astype(np.float32), oriented=True) for ring in (outer, *holes)
            ]
            assert areas[0] > 0 and all(area < 0 for area in areas[1:])
            for ring in (outer, *holes):
                assert len({tuple(point) for point in ring.tolist()}) == len(ring) >= 4
                steps = np.abs(np.roll(ring, -1, axis=0) - ring)
                assert (np.sort(steps, axis=1)[:, 0] == 0).all()  # along the edges of pixels


def test_a_ring_around_a_hole_has_two_outlines() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:18, 3:17] = True
    mask[8:10, 8:12] = False
    [[outer, hole]] = masks.trace_mask(mask)
    assert sorted(outer.tolist()) == [[3, 2], [3, 18], [17, 2], [17, 18]]
    assert sorted(hole.tolist()) == [[8, 8], [8, 10], [12, 8], [12, 10]]
