from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from labkit.runtime import InputError
from labkit.segment import prompts
from labkit.segment.instances import find_instances, scale_to_peak
from labkit.segment.prompts import Prompt
from tests.segment.heatmaps import SIDE, TWO, WHOLE, Floats, Mask, disc, plane, soft


@pytest.fixture
def busy() -> Floats:
    """A smooth map with seven bumps of different heights, two of them joined."""
    x, y = plane(60, 90)
    bumps = [(12, 12, 1.0), (40, 14, 0.8), (54, 16, 0.7), (76, 12, 0.61)]
    bumps += [(15, 45, 0.93), (45, 44, 0.55), (75, 46, 0.87)]
    heat = np.zeros_like(x)
    for number, (x0, y0, peak) in enumerate(bumps):
        distance = ((x - x0) ** 2 + 1.2 * (y - y0) ** 2) / (2 * (5 + number / 4) ** 2)
        heat = np.maximum(heat, peak * np.exp(-distance))
    return heat


def are_equal(prompts_a: list[Prompt], prompts_b: list[Prompt]) -> bool:
    names = ("points", "labels", "box", "mask_logits", "region")
    pairs = zip(prompts_a, prompts_b, strict=True)
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for a, b in pairs for n in names)


def background(region: Mask, competing: NDArray[Any], count: int = 2) -> NDArray[np.int64]:
    return prompts.pick_points(prompts.find_background(region, competing), competing, count)


def inside(points: NDArray[np.int64], mask: Mask) -> bool:
    return bool(mask[points[:, 1], points[:, 0]].all())


def test_zero_map_gives_nothing() -> None:
    zeros, nowhere = np.zeros((9, 9)), np.zeros((9, 9), dtype=bool)
    assert prompts.make_prompts(zeros, low_res_size=8) == []
    assert prompts.pick_points(~nowhere, zeros, 3).shape == (0, 2)
    assert prompts.pick_points(nowhere, zeros + 1, 3).shape == (0, 2)
    assert background(nowhere, zeros + 1).shape == (0, 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2)])
def test_smallest_maps_work(shape: tuple[int, int]) -> None:
    (prompt,) = prompts.make_prompts(np.full(shape, 0.3), low_res_size=4)
    assert prompt.region.all() and (prompt.mask_logits == 10).all()
    assert prompt.box.tolist() == [0, 0, shape[1], shape[0]]
    assert prompt.labels.tolist() == [1] * min(3, shape[0] * shape[1])


@pytest.mark.parametrize("factor", [2.0**-9, 2.0**-1, 2.0**5, 0.013, 1 / 3, 0.77])
def test_scaled_map_gives_the_same_prompts(busy: Floats, factor: float) -> None:
    expected = prompts.make_prompts(busy, low_res_size=32)
    assert len(expected) == 7
    assert are_equal(prompts.make_prompts(busy * factor, low_res_size=32), expected)


@pytest.mark.parametrize("factor", [2.0**-9, 0.013])
def test_scaled_single_precision_map_gives_the_same_points(busy: Floats, factor: float) -> None:
    heat = busy.astype(np.float32)
    expected = prompts.make_prompts(heat, low_res_size=32)
    scaled = prompts.make_prompts(heat * np.float32(factor), low_res_size=32)
    for prompt, other in zip(scaled, expected, strict=True):
        assert np.array_equal(prompt.points, other.points)
        assert np.array_equal(prompt.region, other.region)
        assert np.allclose(prompt.mask_logits, other.mask_logits, atol=1e-3)


@pytest.mark.parametrize("name", [*WHOLE, *TWO])
def test_foreground_points_lie_deep_inside_and_apart(name: str) -> None:
    mask = TWO[name] if name in TWO else WHOLE[name]()
    for instance in find_instances(soft(mask)):
        points = prompts.pick_points(instance.region, soft(mask), 4)
        depth = ndimage.distance_transform_edt(np.pad(instance.region, 1))[1:-1, 1:-1]
        assert points.shape == (4, 2) and len(np.unique(points, axis=0)) == 4
        assert inside(points, depth >= depth.max() / 2)


def test_first_point_is_the_middle_and_more_than_there_are_pixels_are_not_given() -> None:
    assert prompts.pick_points(disc(40, 50, 20), disc(40, 50, 20), 3)[0].tolist() == [40, 50]
    hot = np.array([[0.1, 0.2, 0.4], [0.1, 0.2, 0.1]])
    region = np.array([[True, True, True], [False, False, False]])
    assert prompts.pick_points(region, hot, 9).tolist() == [[2, 0], [0, 0], [1, 0]]
    assert prompts.pick_points(region, hot, 0).shape == (0, 2)


def test_background_points_lie_on_competing_ground_near_and_clear_of_the_region() -> None:
    region = disc(30, 48, 14)
    competing = np.maximum(0.9 * disc(58, 48, 16), 0.4 * disc(30, 20, 12))
    competing[88:, 88:] = 1  # too far
    points = background(region, competing, 5)
    assert len(points) == 5
    assert inside(points, (competing >= 0.5) & ~ndimage.binary_dilation(region, iterations=2))
    assert points.max() < 88
    assert len(background(region, competing, 1)) == 1


@pytest.mark.parametrize("competing", [np.zeros((SIDE, SIDE)), np.full((SIDE, SIDE), 0.49)])
def test_without_competing_ground_there_are_no_background_points(competing: Floats) -> None:
    assert background(disc(30, 48, 14), competing).shape == (0, 2)
    assert background(np.ones((SIDE, SIDE), dtype=bool), competing + 0.5).size == 0


def test_small_rival_gets_a_background_point_beside_a_large_one() -> None:
    small = disc(75, 48, 4)
    points = background(disc(48, 48, 18), disc(14, 48, 11) | small, 2)
    assert points[0].tolist() == [14, 48] and inside(points[1:], small)


def test_boxes_are_exact() -> None:
    region = np.zeros((5, 6), dtype=bool)
    region[2, 3] = True
    assert prompts.make_box(region).tolist() == [3, 2, 4, 3]
    region[1, 1] = True
    assert prompts.make_box(region).tolist() == [1, 1, 4, 3]
    assert prompts.make_box(~region).tolist() == [0, 0, 6, 5]
    with pytest.raises(InputError, match="at least one pixel"):
        prompts.make_box(region & False)


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (300, 200)])
def test_left_half_of_the_map_is_the_left_half_of_the_logits(shape: tuple[int, int]) -> None:
    heat = np.zeros(shape)
    heat[:, : shape[1] // 2] = 0.02
    logits = prompts.make_mask_logits(scale_to_peak(heat), heat > 0, 64)
    assert logits.shape == (64, 64) and logits.dtype == np.float32
    assert (logits[:, :30] == 10).all() and (logits[:, 34:] == -10).all()
    assert (logits[:, :32] > 0).all() and (logits[:, 32:] < 0).all()


def test_mask_logits_resize_as_torch_does(busy: Floats) -> None:
    shares = torch.from_numpy(scale_to_peak(busy))[None, None]
    everywhere = np.ones(busy.shape, dtype=bool)
    for size in (32, 256):
        expected = torch.nn.functional.interpolate(
            shares, (size, size), mode="bilinear", antialias=True
        )
        logits = prompts.make_mask_logits(scale_to_peak(busy), everywhere, size)
        assert np.allclose(logits, expected[0, 0] * 20 - 10, atol=1e-4)


def test_outline_is_logit_zero_at_any_threshold_and_peak() -> None:
    heat = np.array([0.0, 0.03, 0.06, 0.1, 0.2] * 5).reshape(5, 5)
    shares, zone = scale_to_peak(heat), heat <= 0.1
    for row in prompts.make_mask_logits(shares, zone, 5, threshold=0.3):
        assert row.tolist() == pytest.approx([-10, 0, 10 * 3 / 7, 10, -10], abs=1e-3)
    assert (prompts.make_mask_logits(shares, zone & False, 4) == -10).all()


def test_other_sentences_compete_where_they_are_relatively_hotter() -> None:
    maps = np.array([[[0.4, 0.2, 0.0]], [[0.0, 0.01, 0.0025]], [[0.9, 0.0, 0.0]]])
    shares = np.stack([scale_to_peak(heat) for heat in maps])
    assert prompts.find_competing_heat(shares[0], shares[1:]).tolist() == [[0.0, 1.0, 0.25]]
    assert prompts.find_competing_heat(shares[2], shares[:2]).tolist() == [[0.0, 1.0, 0.25]]
    assert not prompts.find_competing_heat(shares[0], shares[:0]).any()


def test_prompts_put_points_on_their_own_object_and_off_the_others() -> None:
    left, right = disc(28, 48, 16), disc(64, 48, 16)
    competing = disc(28, 80, 8).astype(np.float64)
    made = prompts.make_prompts(
        soft(left | right), low_res_size=64, competing=competing, num_background=4
    )
    assert [bool(prompt.region[48, 28]) for prompt in made] == [True, False]
    for prompt, other in zip(made, made[::-1], strict=True):
        points, front = prompt.points.astype(np.int64), prompt.labels == 1
        assert front[:3].all() and not front[3:].any() and (~front).sum() == 4
        assert inside(points[front], prompt.region)
        assert inside(points[~front], ~prompt.region)
        assert np.array_equal(prompt.box, prompts.make_box(prompt.region))
        back = points[~front]
        assert inside(back, (soft(left | right) > 0.2) | (competing > 0))
        assert other.region[back[:, 1], back[:, 0]].any()
        assert prompt.mask_logits.shape == (64, 64) and np.abs(prompt.mask_logits).max() <= 10
    assert competing[tuple(made[0].points[3:].astype(int).T[::-1])].any()


def test_scaling_a_prompt_keeps_pixel_centres_and_edges_and_can_be_undone(busy: Floats) -> None:
    prompt = prompts.make_prompts(busy, low_res_size=8)[0]
    twice = prompt.scale(2, 3)
    assert np.array_equal(twice.points, prompt.points * (2, 3) + (0.5, 1))
    assert np.array_equal(twice.box, prompt.box * (2, 3, 2, 3))
    assert twice.mask_logits is prompt.mask_logits and twice.region is prompt.region
    back = twice.scale(1 / 2, 1 / 3)
    assert np.allclose(back.points, prompt.points) and np.allclose(back.box, prompt.box)
    with pytest.raises(InputError, match="sx and sy"):
        prompt.scale(0, 1)


def test_arguments_that_make_no_sense_are_named() -> None:
    heat, region = np.ones((4, 4), np.float32), np.ones((4, 4), dtype=bool)
    with pytest.raises(InputError, match="threshold must lie"):
        prompts.make_mask_logits(heat, region, 4, threshold=1.0)
    with pytest.raises(InputError, match="threshold must lie"):
        prompts.make_prompts(heat, low_res_size=4, box_threshold=0.0)
    with pytest.raises(InputError, match="size"):
        prompts.make_prompts(heat, low_res_size=0)
    with pytest.raises(InputError, match="competing must be like heat"):
        prompts.make_prompts(heat, low_res_size=4, competing=heat[:1])
    with pytest.raises(InputError, match="bool"):
        prompts.pick_points(heat, heat, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"like the map \(4, 3\)"):
        prompts.find_background(region, heat[:, :3])
    with pytest.raises(InputError, match="competing must lie"):
        prompts.find_background(region, heat * 2)


def test_ten_objects_take_little_time() -> None:
    x, y = plane(352, 352)
    heat = np.zeros_like(x)
    for number in range(10):
        x0, y0 = 45 + number % 4 * 88, 60 + number // 4 * 115
        heat = np.maximum(heat, np.exp(-(((x - x0) / 25) ** 2) - ((y - y0) / 30) ** 2))
    times = []
    for _ in range(3):
        start = time.process_time()
        assert len(prompts.make_prompts(heat, low_res_size=256)) == 10
        times.append(time.process_time() - start)
    assert min(times) < 0.25  # about 0.05 on an idle core
