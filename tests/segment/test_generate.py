from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from labkit.runtime import InputError
from labkit.segment import generate
from labkit.segment.generate import (
    Query,
    Thresholds,
    generate_masks,
    init_queries,
    uncovered_heat,
)
from labkit.segment.instances import scale_to_peak
from labkit.segment.prompts import Prompt, make_box, make_mask_logits
from tests.segment.heatmaps import Mask, disc, plane, soft
from tests.segment.stubs import LOW_RES, PATCH, KnowingSam2, KnownObject


def bar(left: int, right: int) -> Mask:
    """Rows 18 to 29 of columns `left` to `right`: next to each other, such bars have no waist."""
    mask = np.zeros((LOW_RES, LOW_RES), dtype=bool)
    mask[18:30, left:right] = True
    return mask


def make_queries(*maps: Any, present: bool = True, patch_size: int = PATCH) -> list[Query]:
    names = [f"object {index}" for index in range(len(maps))]
    stack = np.stack(maps).astype(np.float32)
    return init_queries(
        names,
        stack,
        stack[:0],
        [present] * len(maps),
        patch_size=patch_size,
        low_res_size=LOW_RES,
    )


def run_queries(sam2: KnowingSam2, *maps: Any, present: bool = True) -> list[Query]:
    stub: Any = sam2
    features: Any = object()
    queries = make_queries(*maps, present=present)
    return [generate_masks(stub, features, query) for query in queries]


def masks_of(query: Query) -> list[Mask]:
    return [candidate.logits > 0 for candidate in query.candidates]


def are_equal(found: list[Mask], expected: list[Mask]) -> bool:
    """In whatever order."""
    left = [mask.tobytes() for mask in found]
    return sorted(left) == sorted(mask.tobytes() for mask in expected)


def test_smoothing_is_linear_keeps_zeros_and_mixes_no_sentences() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 40, 30), dtype=np.float32)
    maps = first, second, first / 4 + 2 * second, 0 * first
    a, b, both, none = (query.heat for query in make_queries(*maps, present=False))
    assert np.allclose(both, a / 4 + 2 * b, atol=1e-6) and not np.allclose(a, b, atol=0.1)
    assert none.shape == (40, 30) and none.dtype == np.float32 and not none.any()
    assert np.array_equal(make_queries(second, present=False)[0].heat, b)
    assert a.std() < 0.5 * first.std()
    (flat,) = make_queries(np.full((40, 30), 0.3), present=False)
    assert np.allclose(flat.heat, 0.3)  # to the edge


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_point_spreads_evenly_by_about_half_a_patch(patch_size: int) -> None:
    for height, width in ((120, 200), (200, 120)):
        point = np.zeros((height, width))
        point[height // 2, width // 2] = 1
        (query,) = make_queries(point, present=False, patch_size=patch_size)
        assert query.heat.sum() == pytest.approx(1, rel=1e-3)
        y, x = np.mgrid[:height, :width]
        for distance in (y - height // 2, x - width // 2):
            spread = np.sqrt((query.heat * distance**2).sum())
            assert 0.4 * patch_size < spread < 0.7 * patch_size


def test_masks_as_hot_as_the_best_stay_and_a_lukewarm_one_goes() -> None:
    hot, warm, lukewarm = (
        disc(10, 10, 7, LOW_RES),
        disc(37, 10, 7, LOW_RES),
        disc(24, 37, 7, LOW_RES),
    )
    objects = [KnownObject(mask) for mask in (hot, warm, lukewarm)]
    for heat, expected in ((0.55, [hot, warm]), (0.9, [hot, warm, lukewarm])):
        sam2 = KnowingSam2(*objects)
        (query,) = run_queries(sam2, 0.5 * (hot + 0.9 * warm + heat * lukewarm))
        assert len(query.prompts) == 3 and are_equal(masks_of(query), expected)


def test_a_fainter_second_object_stays_above_an_absolute_floor() -> None:
    hot, faint = disc(12, 24, 8, LOW_RES), disc(35, 24, 8, LOW_RES)
    for heat, expected in ((0.52, [hot, faint]), (0.43, [hot, faint]), (0.25, [hot])):
        sam2 = KnowingSam2(KnownObject(hot), KnownObject(faint))
        (query,) = run_queries(sam2, 0.9 * hot + heat * faint)
        assert are_equal(masks_of(query), expected), heat


def test_mask_much_larger_than_its_heat_goes() -> None:
    hot, small, wide = disc(12, 24, 8, LOW_RES), disc(35, 24, 5, LOW_RES), disc(35, 24, 11, LOW_RES)
    (query,) = run_queries(KnowingSam2(KnownObject(hot), KnownObject(wide)), hot | small)
    assert len(query.prompts) == 2 and are_equal(masks_of(query), [hot])


def test_second_of_two_touching_objects_is_prompted_for_in_a_second_round() -> None:
    left, right = bar(4, 24), bar(24, 44)
    sam2 = KnowingSam2(KnownObject(left, 0.55), KnownObject(right, 0.55))  # points are not trusted
    (query,) = run_queries(sam2, left | right)
    assert are_equal(masks_of(query), [left, right])
    assert [len(prompts) for prompts in sam2.prompt_calls] == [1, 1]
    first, second = query.prompts
    side = left if left[tuple(np.int64(second.points[0])[::-1])] else right
    assert not (second.region & ~side).any() and (first.region & ~side).any()
    behind = np.int64(second.points[second.labels == 0])
    assert len(behind) and not side[behind[:, 1], behind[:, 0]].any()
    assert query.pending == ()


def test_trusted_points_take_touching_objects_apart_in_the_first_round() -> None:
    left, right = bar(4, 24), bar(24, 44)
    sam2 = KnowingSam2(KnownObject(left), KnownObject(right))
    (query,) = run_queries(sam2, left | right)
    assert are_equal(masks_of(query), [left, right])
    assert [len(prompts) for prompts in sam2.prompt_calls] == [2] and len(query.prompts) == 2


def test_there_are_three_rounds_at_most() -> None:
    parts = [bar(1, 17), bar(17, 31), bar(31, 40)]
    sam2 = KnowingSam2(script=[*parts, bar(40, 47)])
    (query,) = run_queries(sam2, bar(1, 47))
    assert len(sam2.prompt_calls) == 3
    assert are_equal(masks_of(query), parts)
    assert len(query.prompts) == 3 and len(query.pending) == 1  # what is pending was not given


def test_poor_mask_counts_in_the_first_round_only_and_nothing_is_prompted_twice() -> None:
    poor = bar(24, 44) & (np.arange(LOW_RES) < 29)  # a quarter of what is left
    (query,) = run_queries(KnowingSam2(script=[poor] * 3), bar(24, 44))
    assert are_equal(masks_of(query), [poor])
    sam2 = KnowingSam2(script=[bar(4, 24), poor, poor])
    (query,) = run_queries(sam2, bar(4, 44))
    assert are_equal(masks_of(query), [bar(4, 24)])
    assert len(sam2.prompt_calls) == 2 and len(query.prompts) == 2


def test_sentences_go_on_by_themselves() -> None:
    left, right, high = bar(4, 24), bar(24, 44), disc(24, 8, 6, LOW_RES)
    objects = [KnownObject(mask, 0.55) for mask in (left, right, high)]
    sam2 = KnowingSam2(*objects)
    single, none, double = run_queries(sam2, high, np.zeros((LOW_RES, LOW_RES)), left | right)
    assert are_equal(masks_of(single), [high]) and are_equal(masks_of(double), [left, right])
    assert none.prompts == none.candidates == ()
    assert [len(prompts) for prompts in sam2.prompt_calls] == [1, 1, 1]
    assert (len(single.prompts), len(double.prompts)) == (1, 2)


@pytest.mark.parametrize(("heat", "present"), [(0, True), (1, False)])
def test_sam2_is_not_asked_where_nothing_is_pending(heat: float, present: bool) -> None:
    sam2 = KnowingSam2(KnownObject(bar(4, 24)))
    (query,) = run_queries(sam2, heat * bar(4, 24), present=present)
    assert query.pending == query.prompts == query.candidates == ()
    assert sam2.point_calls == sam2.prompt_calls == []


Point = tuple[int, int]
LEFT, RIGHT = disc(15, 12, 9, LOW_RES), disc(33, 12, 9, LOW_RES)  # touching
LOWER, LONE = disc(15, 36, 9, LOW_RES), disc(39, 36, 6, LOW_RES)
OBJECTS_HEAT = soft(LEFT | RIGHT | LOWER | LONE).astype(np.float32)
BEHIND = (3, 44)


def make_prompt(region: Mask, *points: Point, behind: tuple[Point, ...] = (BEHIND,)) -> Prompt:
    """With `points` in front, in `region`."""
    return Prompt(
        points=np.array([*points, *behind], dtype=np.float64).reshape(-1, 2),
        labels=np.repeat([1, 0], [len(points), len(behind)]),
        box=make_box(region),
        mask_logits=make_mask_logits(scale_to_peak(OBJECTS_HEAT), region, LOW_RES),
        region=region,
    )


def split(sam2: KnowingSam2, *prompts: Prompt, heat: Any = OBJECTS_HEAT) -> list[Prompt]:
    """The prompts of the first round, in which `prompts` are pending."""
    stub: Any = sam2
    features: Any = object()
    query = Query(sentence="object", heat=heat, pending=prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "_ROUNDS", 1)
        return list(generate_masks(stub, features, query).prompts)


BOTH = make_prompt(LEFT | RIGHT, (15, 12), (33, 12), (12, 9))


def test_touching_objects_get_a_prompt_each_against_the_point_of_the_other() -> None:
    prompts = split(KnowingSam2(KnownObject(LEFT, 0.8), KnownObject(RIGHT, 0.9)), BOTH)
    assert len(prompts) == 2  # the most trusted first
    for prompt, mask, points in zip(
        prompts, (RIGHT, LEFT), ([(33, 12), (15, 12)], [(15, 12), (33, 12)]), strict=True
    ):
        assert prompt.points.tolist() == [list(point) for point in (*points, BEHIND)]
        assert prompt.labels.tolist() == [1, 0, 0]
        assert np.array_equal(prompt.region, mask) and np.array_equal(prompt.box, make_box(mask))
        assert (prompt.mask_logits[~mask] == -10).all() and prompt.mask_logits[mask].max() == 10
        assert (prompt.mask_logits[mask] > 0).mean() > 0.9


class KnowingWhole(KnowingSam2):
    """Prompts with two or more foreground points yield `whole`."""

    def __init__(self, whole: KnownObject, *parts: KnownObject) -> None:
        super().__init__(*parts)
        self.whole = whole

    def predict(self, _: object, prompts: Sequence[Prompt]) -> Any:
        predictions = [
            self.whole.predict() if (p.labels == 1).sum() > 1 else self._predict_at(p.points[0])
            for p in prompts
        ]
        return tuple(np.stack(part) for part in zip(*predictions, strict=True))


PERSON = LEFT | RIGHT | LOWER | disc(33, 36, 9, LOW_RES)
HEAD, TORSO = disc(15, 12, 7, LOW_RES), disc(33, 12, 7, LOW_RES)


@pytest.mark.parametrize(
    ("whole", "count"),
    [
        (KnownObject(PERSON, 0.85), 1),
        (KnownObject(PERSON, 0.7), 2),  # a group, less trusted than each
        (KnownObject(HEAD, 0.95), 2),  # it is of one of them alone
        (KnownObject(PERSON | ~PERSON, 0.95), 2),  # the whole frame
    ],
    ids=["a person", "a group", "one of a pair", "everything"],
)
def test_parts_of_a_whole_that_is_trusted_as_much_stay_one_object(
    whole: KnownObject, count: int
) -> None:
    prompt = make_prompt(PERSON, (15, 12), (33, 12))
    parts = KnownObject(HEAD, 0.8), KnownObject(TORSO, 0.85)
    assert len(split(KnowingWhole(whole, *parts), prompt)) == count


def test_objects_that_cover_the_region_together_get_a_prompt_each_whatever_covers_both() -> None:
    group = KnownObject(LEFT | RIGHT, 0.95)
    sam2 = KnowingWhole(group, KnownObject(LEFT, 0.8), KnownObject(RIGHT, 0.8))
    assert len(split(sam2, BOTH)) == 2


def test_parts_that_are_unlike_in_size_or_heat_stay_one_object() -> None:
    nothing, small = KnownObject(LEFT & False), disc(33, 12, 3, LOW_RES)
    unlike = make_prompt(LEFT | small, (15, 12), (33, 12))
    assert split(KnowingWhole(nothing, KnownObject(LEFT), KnownObject(small)), unlike) == [unlike]
    sam2 = KnowingWhole(nothing, KnownObject(LEFT), KnownObject(RIGHT))
    faint = (OBJECTS_HEAT * np.where(RIGHT, 0.5, 1)).astype(np.float32)
    assert split(sam2, BOTH, heat=faint) == [BOTH] and len(split(sam2, BOTH)) == 2


def test_three_objects_have_two_others_behind() -> None:
    whole = make_prompt(LEFT | RIGHT | LONE, (15, 12), (33, 12), (39, 36), behind=())
    prompts = split(
        KnowingSam2(KnownObject(LEFT, 0.7), KnownObject(RIGHT, 0.9), KnownObject(LONE, 0.8)), whole
    )
    assert [prompt.points.tolist() for prompt in prompts] == [
        [[33, 12], [39, 36], [15, 12]],
        [[39, 36], [33, 12], [15, 12]],
        [[15, 12], [33, 12], [39, 36]],
    ]
    assert all(prompt.labels.tolist() == [1, 0, 0] for prompt in prompts)


@pytest.mark.parametrize("iou", [0.9, 0.5])
def test_one_object_keeps_its_prompt(iou: float) -> None:
    prompt = make_prompt(LEFT, (15, 12), (12, 9), (18, 14))
    sam2 = KnowingSam2(KnownObject(LEFT, iou))
    assert split(sam2, prompt) == [prompt] and sam2.point_calls == [3]


def test_part_of_an_object_is_no_object_whichever_is_trusted_more() -> None:
    part = disc(33, 12, 5, LOW_RES)
    for trust in (0.8, 0.95):
        sam2 = KnowingSam2(KnownObject(part, trust), KnownObject(LEFT | RIGHT, 0.9))
        assert split(sam2, BOTH) == [BOTH]


@pytest.mark.parametrize(
    "other",
    [
        KnownObject(RIGHT, 0.5),
        KnownObject(RIGHT, size=0.9),
        KnownObject(LOWER, ground=RIGHT),
        KnownObject(RIGHT[::-1] | RIGHT, ground=RIGHT),
        KnownObject(RIGHT & False, ground=RIGHT),
    ],
    ids=["unlikely", "shaky", "elsewhere", "half outside", "empty"],
)
def test_mask_that_is_not_trusted_or_not_of_the_region_is_no_object(other: KnownObject) -> None:
    sam2 = KnowingSam2(KnownObject(LEFT), other)
    assert split(sam2, BOTH) == [BOTH] and sam2.point_calls == [3]


def test_mask_may_reach_out_of_the_region() -> None:
    wide = RIGHT | disc(38, 12, 9, LOW_RES)
    prompts = split(KnowingSam2(KnownObject(LEFT, 0.95), KnownObject(wide)), BOTH)
    assert [prompt.region.sum() for prompt in prompts] == [LEFT.sum(), wide.sum()]


def test_single_points_are_not_tried() -> None:
    sam2 = KnowingSam2(KnownObject(LEFT), KnownObject(RIGHT))
    alone = make_prompt(LEFT | RIGHT, (15, 12)), make_prompt(LOWER, behind=((1, 1), BEHIND))
    assert split(sam2, *alone) == list(alone) and sam2.point_calls == []


@pytest.mark.parametrize("at_once", [1, 2, 5, 32])
def test_prompts_keep_their_order_and_their_own_points(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(generate, "_POINTS_AT_ONCE", at_once)
    lone, lower = make_prompt(LONE, (39, 36)), make_prompt(LOWER, (15, 36), (12, 33))
    column = make_prompt(LEFT | LOWER, (15, 36), (15, 12), behind=())
    sam2 = KnowingSam2(
        KnownObject(LEFT, 0.9), KnownObject(RIGHT, 0.8), KnownObject(LOWER, 0.7), KnownObject(LONE)
    )
    prompts = split(sam2, lone, BOTH, lower, column, lone)
    assert len(prompts) == 7 and (prompts[0], prompts[3], prompts[6]) == (lone, lower, lone)
    for prompt, mask in zip(prompts[1:3] + prompts[4:6], (LEFT, RIGHT, LEFT, LOWER), strict=True):
        assert np.array_equal(prompt.region, mask)
    assert sum(sam2.point_calls) == 7 and max(sam2.point_calls) <= at_once


def test_points_are_in_the_pixels_of_sam2s_square_and_masks_in_those_of_the_map() -> None:
    low = slice(0, None, 2)  # a map (24, 48): half as high as wide
    left, right = LEFT[low], RIGHT[low]
    stub: Any = KnowingSam2(KnownObject(left, 0.95), KnownObject(right))
    points = np.array([(15.0, 6.0), (33.0, 6.0)])
    wide = Prompt(
        points=points,
        labels=np.array([1, 1]),
        box=make_box(left | right),
        mask_logits=BOTH.mask_logits,
        region=left | right,
    )
    prompts = split(stub, wide, heat=OBJECTS_HEAT[low])
    assert [prompt.points.tolist() for prompt in prompts] == [
        points.tolist(),
        points[::-1].tolist(),
    ]
    for prompt, mask in zip(prompts, (left, right), strict=True):
        assert np.array_equal(prompt.region, mask) and np.array_equal(prompt.box, make_box(mask))
        assert prompt.mask_logits.shape == (LOW_RES, LOW_RES)


FIRST, SECOND = disc(28, 48, 14), disc(66, 48, 14)
PAIR_HEAT = soft(FIRST | SECOND).astype(np.float32)
SLOPES = PAIR_HEAT / PAIR_HEAT.max() >= 0.25


def test_nothing_is_left_where_masks_cover_the_heat() -> None:
    for masks in ([FIRST, SECOND], [FIRST | SECOND], [np.ones_like(FIRST)]):
        assert not uncovered_heat(PAIR_HEAT, masks).any()


def test_second_object_is_left_with_its_slopes_and_nothing_of_the_first() -> None:
    for mask, half in ((FIRST, plane()[0] >= 47), (SECOND, plane()[0] < 47)):
        rest = uncovered_heat(PAIR_HEAT, [mask])
        assert np.array_equal(rest, np.where(SLOPES & half, PAIR_HEAT, 0))
        assert (rest > 0).sum() > 1.1 * FIRST.sum()  # wider than the object


def test_second_object_that_touches_is_left_but_for_its_border_with_the_mask() -> None:
    near = disc(57, 48, 14)
    rest = uncovered_heat(soft(FIRST | near).astype(np.float32), [FIRST]) > 0
    border = ndimage.binary_dilation(FIRST, iterations=2) & near  # 2 % of the side
    assert border.any() and not (rest & (FIRST | border)).any()
    assert (rest & near).sum() > 0.8 * near.sum()


@pytest.mark.parametrize("missing", range(5))
def test_fringe_around_a_mask_is_no_object(missing: int) -> None:
    heat = soft(disc(48, 48, 30)).astype(np.float32)
    assert not uncovered_heat(heat, [disc(48, 48, 30 - missing)]).any()


def test_what_is_small_beside_the_largest_mask_is_no_object() -> None:
    def rest(radius: float, *masks: float) -> bool:
        """Whether a disc of `radius` is left beside discs, one above the other."""
        found = [disc(25, 25 + 50 * row, size) for row, size in enumerate(masks)]
        heat = np.any([*found, disc(80, 48, radius)], axis=0).astype(np.float32)
        return bool(uncovered_heat(heat, found).any())

    assert not rest(5, 22) and rest(10, 22)  # 5 % and 20 % of the area
    assert rest(5, 8) and not rest(5, 8, 22) and not rest(5, 22, 8)


def test_lukewarm_ground_is_no_object() -> None:
    for share, left in ((0.4, False), (0.6, True)):
        heat = np.where(SECOND, share, FIRST).astype(np.float32)
        assert uncovered_heat(heat, [FIRST]).any() == left


def test_without_masks_or_heat_there_is_nothing() -> None:
    for rest in (
        uncovered_heat(PAIR_HEAT, []),
        uncovered_heat(0 * PAIR_HEAT, []),
        uncovered_heat(0 * PAIR_HEAT, [FIRST]),
    ):
        assert rest.shape == PAIR_HEAT.shape and rest.dtype == np.float32 and not rest.any()


def test_empty_mask_covers_nothing() -> None:
    none = np.zeros_like(FIRST)
    assert np.array_equal(uncovered_heat(PAIR_HEAT, [none]) > 0, SLOPES)


@pytest.mark.parametrize("factor", [2**-10, 0.013, 300])
def test_multiple_of_a_map_leaves_the_same(factor: float) -> None:
    rest, weak = (
        uncovered_heat(PAIR_HEAT, [FIRST]),
        uncovered_heat(PAIR_HEAT * np.float32(factor), [FIRST]),
    )
    assert rest.any() and np.array_equal(weak, rest * np.float32(factor))


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (20, 90)])
def test_result_is_like_the_map_which_stays_as_it_was(shape: tuple[int, int]) -> None:
    heat = np.ones(shape, np.float32)
    mask = np.zeros(shape, dtype=bool)
    mask[:, : shape[1] // 2] = True
    rest = uncovered_heat(heat, [mask])
    assert rest.shape == shape and rest.dtype == np.float32
    assert heat.all() and mask.sum() == shape[0] * (shape[1] // 2)
    assert rest.any() == (shape == (20, 90)) and not rest[mask].any()


def test_thresholds_out_of_range_are_named() -> None:
    for name, value in (("box", 1.0), ("presence", 1.1), ("mask", 11.0), ("overlap", -0.1)):
        with pytest.raises(InputError, match=f"{name}_threshold must lie"):
            Thresholds(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("minimum_area", -0.1, r"minimum_area must lie in \[0, 1\], got -0.1"),
        ("minimum_area", math.nan, "minimum_area must lie"),
        ("maximum_objects", 0, "maximum_objects must be 1 or more, got 0"),
    ],
)
def test_limits_out_of_range_are_named(name: str, value: float, message: str) -> None:
    options: Any = {name: value}
    with pytest.raises(InputError, match=message):
        Thresholds(**options)


def test_higher_mask_threshold_gives_smaller_masks() -> None:
    hill = np.maximum(0, 10 - np.hypot(*(axis - 24 for axis in np.mgrid[:LOW_RES, :LOW_RES])))

    class Hill(KnowingSam2):
        def predict(self, _: object, prompts: Sequence[Prompt]) -> Any:
            logits = np.tile(np.float32(hill) - 3, (len(prompts), 4, 1, 1))
            return logits, np.full((len(prompts), 4), 0.9, np.float32)

    stub: Any = Hill()
    features: Any = object()
    areas = []
    for threshold in (-2.0, 0.0, 2.0):
        (query,) = make_queries(disc(24, 24, 8, LOW_RES))
        query = generate_masks(stub, features, query, Thresholds(mask=threshold))
        areas.append(int(masks_of(query)[0].sum()))
        assert areas[-1] == (hill > 3 + threshold).sum()
    assert areas[0] > areas[1] > areas[2]


def test_what_is_not_meant_competes_for_whole_masks() -> None:
    """A rim of the object's ground is the sentence's own; most of the object is not."""
    disc_mask = disc(24, 24, 12, LOW_RES)
    rim = disc_mask & ~disc(24, 24, 8, LOW_RES)
    wanted = np.where(rim, 0.6, np.where(disc_mask, 0.5, 0)).astype(np.float32)
    unwanted = np.where(disc(24, 24, 9, LOW_RES), 0.9, 0).astype(np.float32)
    stub: Any = KnowingSam2(KnownObject(disc_mask))
    features: Any = object()
    for others, count in ((wanted[None] * 0, 1), (unwanted[None], 0)):
        (query,) = init_queries(
            ["object"], wanted[None], others, [True], patch_size=PATCH, low_res_size=LOW_RES
        )
        assert len(query.pending) >= 1
        assert len(generate_masks(stub, features, query).candidates) == count
