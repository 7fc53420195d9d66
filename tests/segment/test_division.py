from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from labkit.segment import division
from labkit.segment.division import divided
from labkit.segment.prompts import Prompt, box_of, mask_logits
from tests.segment.heatmaps import Mask, disc, soft
from tests.segment.stubs import GRID, Knowing, Thing

Point = tuple[int, int]
LEFT, RIGHT = disc(15, 12, 9, GRID), disc(33, 12, 9, GRID)  # touching
LOWER, LONE = disc(15, 36, 9, GRID), disc(39, 36, 6, GRID)
HEAT = soft(LEFT | RIGHT | LOWER | LONE).astype(np.float32)
BEHIND = (3, 44)


def prompt(region: Mask, *points: Point, behind: tuple[Point, ...] = (BEHIND,)) -> Prompt:
    """With `points` in front, in `region`."""
    return Prompt(
        points=np.array([*points, *behind], dtype=np.float64).reshape(-1, 2),
        labels=np.repeat([1, 0], [len(points), len(behind)]),
        box=box_of(region),
        mask_logits=mask_logits(HEAT, region, GRID),
        region=region,
    )


def parts_of(sam2: Knowing, *prompts: Prompt) -> list[Prompt]:
    stub: Any = sam2
    features: Any = object()
    return divided(stub, features, prompts, HEAT)


BOTH = prompt(LEFT | RIGHT, (15, 12), (33, 12), (12, 9))


def test_touching_objects_get_a_prompt_each_against_the_point_of_the_other() -> None:
    found = parts_of(Knowing(Thing(LEFT, 0.8), Thing(RIGHT, 0.9)), BOTH)
    assert len(found) == 2  # the most trusted first
    for one, mask, points in zip(
        found, (RIGHT, LEFT), ([(33, 12), (15, 12)], [(15, 12), (33, 12)]), strict=True
    ):
        assert one.points.tolist() == [list(point) for point in (*points, BEHIND)]
        assert one.labels.tolist() == [1, 0, 0]
        assert np.array_equal(one.region, mask) and np.array_equal(one.box, box_of(mask))
        assert (one.mask_logits[~mask] == -10).all() and one.mask_logits[mask].max() == 10
        assert (one.mask_logits[mask] > 0).mean() > 0.9


def test_three_objects_have_two_others_behind() -> None:
    whole = prompt(LEFT | RIGHT | LONE, (15, 12), (33, 12), (39, 36), behind=())
    found = parts_of(Knowing(Thing(LEFT, 0.7), Thing(RIGHT, 0.9), Thing(LONE, 0.8)), whole)
    assert [one.points.tolist() for one in found] == [
        [[33, 12], [39, 36], [15, 12]],
        [[39, 36], [33, 12], [15, 12]],
        [[15, 12], [33, 12], [39, 36]],
    ]
    assert all(one.labels.tolist() == [1, 0, 0] for one in found)


@pytest.mark.parametrize("iou", [0.9, 0.5])
def test_one_object_keeps_its_prompt(iou: float) -> None:
    one = prompt(LEFT, (15, 12), (12, 9), (18, 14))
    sam2 = Knowing(Thing(LEFT, iou))
    assert parts_of(sam2, one) == [one] and sam2.clicked == [3]


def test_part_of_an_object_is_no_object_whichever_is_trusted_more() -> None:
    part = disc(33, 12, 5, GRID)
    for trust in (0.8, 0.95):
        sam2 = Knowing(Thing(part, trust), Thing(LEFT | RIGHT, 0.9))
        assert parts_of(sam2, BOTH) == [BOTH]


@pytest.mark.parametrize(
    "other",
    [
        Thing(RIGHT, 0.5),
        Thing(RIGHT, size=0.9),
        Thing(LOWER, ground=RIGHT),
        Thing(RIGHT[::-1] | RIGHT, ground=RIGHT),
        Thing(RIGHT & False, ground=RIGHT),
    ],
    ids=["unlikely", "shaky", "elsewhere", "half outside", "empty"],
)
def test_mask_that_is_not_trusted_or_not_of_the_region_is_no_object(other: Thing) -> None:
    sam2 = Knowing(Thing(LEFT), other)
    assert parts_of(sam2, BOTH) == [BOTH] and sam2.clicked == [3]


def test_mask_may_reach_out_of_the_region() -> None:
    wide = RIGHT | disc(38, 12, 9, GRID)
    found = parts_of(Knowing(Thing(LEFT, 0.95), Thing(wide)), BOTH)
    assert [one.region.sum() for one in found] == [LEFT.sum(), wide.sum()]


def test_single_points_are_not_clicked() -> None:
    sam2 = Knowing(Thing(LEFT), Thing(RIGHT))
    alone = prompt(LEFT | RIGHT, (15, 12)), prompt(LOWER, behind=((1, 1), BEHIND))
    assert parts_of(sam2, *alone) == list(alone) and sam2.clicked == []


@pytest.mark.parametrize("at_once", [1, 2, 5, 32])
def test_prompts_keep_their_order_and_their_own_clicks(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(division, "_CLICKS_AT_ONCE", at_once)
    lone, lower = prompt(LONE, (39, 36)), prompt(LOWER, (15, 36), (12, 33))
    column = prompt(LEFT | LOWER, (15, 36), (15, 12), behind=())
    sam2 = Knowing(Thing(LEFT, 0.9), Thing(RIGHT, 0.8), Thing(LOWER, 0.7), Thing(LONE))
    found = parts_of(sam2, lone, BOTH, lower, column, lone)
    assert len(found) == 7 and (found[0], found[3], found[6]) == (lone, lower, lone)
    for one, mask in zip(found[1:3] + found[4:6], (LEFT, RIGHT, LEFT, LOWER), strict=True):
        assert np.array_equal(one.region, mask)
    assert sum(sam2.clicked) == 7 and max(sam2.clicked) <= at_once


def test_clicks_are_in_the_pixels_of_sam2s_square_and_masks_in_those_of_the_map() -> None:
    low = slice(0, None, 2)  # a map (24, 48): half as high as wide
    left, right = LEFT[low], RIGHT[low]
    stub: Any = Knowing(Thing(left, 0.95), Thing(right))
    points = np.array([(15.0, 6.0), (33.0, 6.0)])
    wide = Prompt(
        points=points,
        labels=np.array([1, 1]),
        box=box_of(left | right),
        mask_logits=BOTH.mask_logits,
        region=left | right,
    )
    found = divided(stub, stub.encode(None), [wide], HEAT[low])
    assert [one.points.tolist() for one in found] == [points.tolist(), points[::-1].tolist()]
    for one, mask in zip(found, (left, right), strict=True):
        assert np.array_equal(one.region, mask) and np.array_equal(one.box, box_of(mask))
        assert one.mask_logits.shape == (GRID, GRID)
