from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from labkit.segment.residue import unexplained
from tests.segment.heatmaps import disc, plane, soft

LEFT, RIGHT = disc(28, 48, 14), disc(66, 48, 14)
HEAT = soft(LEFT | RIGHT).astype(np.float32)
SLOPES = HEAT / HEAT.max() >= 0.25


def test_nothing_is_left_where_masks_cover_the_heat() -> None:
    for masks in ([LEFT, RIGHT], [LEFT | RIGHT], [np.ones_like(LEFT)]):
        assert not unexplained(HEAT, masks).any()


def test_second_object_is_left_with_its_slopes_and_nothing_of_the_first() -> None:
    for mask, half in ((LEFT, plane()[0] >= 47), (RIGHT, plane()[0] < 47)):
        rest = unexplained(HEAT, [mask])
        assert np.array_equal(rest, np.where(SLOPES & half, HEAT, 0))
        assert (rest > 0).sum() > 1.1 * LEFT.sum()  # wider than the object


def test_second_object_that_touches_is_left_but_for_its_border_with_the_mask() -> None:
    near = disc(57, 48, 14)
    rest = unexplained(soft(LEFT | near).astype(np.float32), [LEFT]) > 0
    border = ndimage.binary_dilation(LEFT, iterations=2) & near  # 2 % of the side
    assert border.any() and not (rest & (LEFT | border)).any()
    assert (rest & near).sum() > 0.8 * near.sum()


@pytest.mark.parametrize("missing", range(5))
def test_fringe_around_a_mask_is_no_object(missing: int) -> None:
    heat = soft(disc(48, 48, 30)).astype(np.float32)
    assert not unexplained(heat, [disc(48, 48, 30 - missing)]).any()


def test_what_is_small_beside_the_largest_mask_is_no_object() -> None:
    def rest(radius: float, *masks: float) -> bool:
        """Whether a disc of `radius` is left beside discs, one above the other."""
        found = [disc(25, 25 + 50 * row, size) for row, size in enumerate(masks)]
        heat = np.any([*found, disc(80, 48, radius)], axis=0).astype(np.float32)
        return bool(unexplained(heat, found).any())

    assert not rest(5, 22) and rest(10, 22)  # 5 % and 20 % of the area
    assert rest(5, 8) and not rest(5, 8, 22) and not rest(5, 22, 8)


def test_lukewarm_ground_is_no_object() -> None:
    for share, left in ((0.4, False), (0.6, True)):
        heat = np.where(RIGHT, share, LEFT).astype(np.float32)
        assert unexplained(heat, [LEFT]).any() == left


def test_without_masks_or_heat_there_is_nothing() -> None:
    for rest in (unexplained(HEAT, []), unexplained(0 * HEAT, []), unexplained(0 * HEAT, [LEFT])):
        assert rest.shape == HEAT.shape and rest.dtype == np.float32 and not rest.any()


def test_empty_mask_explains_nothing() -> None:
    none = np.zeros_like(LEFT)
    assert np.array_equal(unexplained(HEAT, [none]) > 0, SLOPES)


@pytest.mark.parametrize("factor", [2**-10, 0.013, 300])
def test_multiple_of_a_map_leaves_the_same(factor: float) -> None:
    rest, weak = unexplained(HEAT, [LEFT]), unexplained(HEAT * np.float32(factor), [LEFT])
    assert rest.any() and np.array_equal(weak, rest * np.float32(factor))


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (20, 90)])
def test_result_is_like_the_map_which_stays_as_it_was(shape: tuple[int, int]) -> None:
    heat = np.ones(shape, np.float32)
    mask = np.zeros(shape, dtype=bool)
    mask[:, : shape[1] // 2] = True
    rest = unexplained(heat, [mask])
    assert rest.shape == shape and rest.dtype == np.float32
    assert heat.all() and mask.sum() == shape[0] * (shape[1] // 2)
    assert rest.any() == (shape == (20, 90)) and not rest[mask].any()
