from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from labkit.segment.generate import Inquiry, opened, pursued
from labkit.segment.presence import Evidence
from tests.segment.heatmaps import Mask, disc
from tests.segment.stubs import GRID, PATCH, Knowing, Thing

EVIDENCE = Evidence(strength=0.7, contrast=0.7, rivalry=0.0)


def bar(left: int, right: int) -> Mask:
    """Rows 18 to 29 of columns `left` to `right`: next to each other, such bars have no waist."""
    mask = np.zeros((GRID, GRID), dtype=bool)
    mask[18:30, left:right] = True
    return mask


def opened_for(*maps: Any, here: bool = True, patch: int = PATCH) -> list[Inquiry]:
    names = [f"thing {index}" for index in range(len(maps))]
    stack = np.stack(maps).astype(np.float32)
    evidence, present = [EVIDENCE] * len(maps), [here] * len(maps)
    return opened(names, stack, evidence, present, patch=patch, grid=GRID, absolute=True)


def answered(sam2: Knowing, *maps: Any, here: bool = True) -> list[Inquiry]:
    stub: Any = sam2
    return pursued(stub, np.zeros((9, 9, 3), np.uint8), opened_for(*maps, here=here))


def masks_of(inquiry: Inquiry) -> list[Mask]:
    return [one.logits > 0 for one in inquiry.candidates]


def same(found: list[Mask], expected: list[Mask]) -> bool:
    """In whatever order."""
    left = [mask.tobytes() for mask in found]
    return sorted(left) == sorted(mask.tobytes() for mask in expected)


def test_smoothing_is_linear_keeps_zeros_and_mixes_no_sentences() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 40, 30), dtype=np.float32)
    a, b, both, none = (
        one.heat for one in opened_for(first, second, first / 4 + 2 * second, 0 * first, here=False)
    )
    assert np.allclose(both, a / 4 + 2 * b, atol=1e-6) and not np.allclose(a, b, atol=0.1)
    assert none.shape == (40, 30) and none.dtype == np.float32 and not none.any()
    assert np.array_equal(opened_for(second, here=False)[0].heat, b)
    assert a.std() < 0.5 * first.std()
    (flat,) = opened_for(np.full((40, 30), 0.3), here=False)
    assert np.allclose(flat.heat, 0.3)  # to the edge


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_point_spreads_evenly_by_about_half_a_patch(patch: int) -> None:
    for height, width in ((120, 200), (200, 120)):
        point = np.zeros((height, width))
        point[height // 2, width // 2] = 1
        (inquiry,) = opened_for(point, here=False, patch=patch)
        assert inquiry.heat.sum() == pytest.approx(1, rel=1e-3)
        y, x = np.mgrid[:height, :width]
        for distance in (y - height // 2, x - width // 2):
            spread = np.sqrt((inquiry.heat * distance**2).sum())
            assert 0.4 * patch < spread < 0.7 * patch


def test_masks_as_hot_as_the_best_stay_and_a_lukewarm_one_goes() -> None:
    hot, warm, lukewarm = disc(10, 10, 7, GRID), disc(37, 10, 7, GRID), disc(24, 37, 7, GRID)
    things = [Thing(mask) for mask in (hot, warm, lukewarm)]
    for heat, expected in ((0.55, [hot, warm]), (0.9, [hot, warm, lukewarm])):
        sam2 = Knowing(*things)
        (inquiry,) = answered(sam2, 0.5 * (hot + 0.9 * warm + heat * lukewarm))
        assert len(inquiry.asked) == 3 and same(masks_of(inquiry), expected)


def test_mask_much_larger_than_its_heat_goes() -> None:
    hot, small, wide = disc(12, 24, 8, GRID), disc(35, 24, 5, GRID), disc(35, 24, 11, GRID)
    (inquiry,) = answered(Knowing(Thing(hot), Thing(wide)), hot | small)
    assert len(inquiry.asked) == 2 and same(masks_of(inquiry), [hot])


def test_second_of_two_touching_objects_is_asked_for_in_a_second_round() -> None:
    left, right = bar(4, 24), bar(24, 44)
    sam2 = Knowing(Thing(left, 0.55), Thing(right, 0.55))  # clicks are not trusted
    (inquiry,) = answered(sam2, left | right)
    assert same(masks_of(inquiry), [left, right])
    assert [len(prompts) for prompts in sam2.told] == [1, 1] and sam2.encoded == 1
    first, second = inquiry.asked
    side = left if left[tuple(np.int64(second.points[0])[::-1])] else right
    assert not (second.region & ~side).any() and (first.region & ~side).any()
    behind = np.int64(second.points[second.labels == 0])
    assert len(behind) and not side[behind[:, 1], behind[:, 0]].any()
    assert inquiry.pending == ()


def test_trusted_clicks_take_touching_objects_apart_in_the_first_round() -> None:
    left, right = bar(4, 24), bar(24, 44)
    sam2 = Knowing(Thing(left), Thing(right))
    (inquiry,) = answered(sam2, left | right)
    assert same(masks_of(inquiry), [left, right])
    assert [len(prompts) for prompts in sam2.told] == [2] and len(inquiry.asked) == 2


def test_there_are_three_rounds_at_most() -> None:
    parts = [bar(1, 17), bar(17, 31), bar(31, 40)]
    sam2 = Knowing(script=[*parts, bar(40, 47)])
    (inquiry,) = answered(sam2, bar(1, 47))
    assert len(sam2.told) == 3 and sam2.encoded == 1
    assert same(masks_of(inquiry), parts)
    assert len(inquiry.asked) == 3 and len(inquiry.pending) == 1  # asked means put to SAM-2


def test_poor_answer_counts_in_the_first_round_only_and_nothing_is_asked_twice() -> None:
    poor = bar(24, 44) & (np.arange(GRID) < 29)  # a quarter of what is left
    (inquiry,) = answered(Knowing(script=[poor] * 3), bar(24, 44))
    assert same(masks_of(inquiry), [poor])
    sam2 = Knowing(script=[bar(4, 24), poor, poor])
    (inquiry,) = answered(sam2, bar(4, 44))
    assert same(masks_of(inquiry), [bar(4, 24)])
    assert len(sam2.told) == 2 and len(inquiry.asked) == 2


def test_sentences_go_on_by_themselves() -> None:
    left, right, high = bar(4, 24), bar(24, 44), disc(24, 8, 6, GRID)
    things = [Thing(mask, 0.55) for mask in (left, right, high)]
    sam2 = Knowing(*things)
    one, none, two = answered(sam2, high, np.zeros((GRID, GRID)), left | right)
    assert same(masks_of(one), [high]) and same(masks_of(two), [left, right])
    assert none.asked == none.candidates == ()
    assert [len(prompts) for prompts in sam2.told] == [2, 1] and sam2.encoded == 1
    assert (len(one.asked), len(two.asked)) == (1, 2)


@pytest.mark.parametrize(("heat", "here"), [(0, True), (1, False)])
def test_nothing_is_encoded_where_nothing_is_pending(heat: float, here: bool) -> None:
    sam2 = Knowing(Thing(bar(4, 24)))
    (inquiry,) = answered(sam2, heat * bar(4, 24), here=here)
    assert inquiry.pending == inquiry.asked == inquiry.candidates == ()
    assert (sam2.encoded, sam2.clicked, sam2.told) == (0, [], [])
