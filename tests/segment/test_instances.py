from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from labkit.runtime import InputError
from labkit.segment import instances
from tests.segment.heatmaps import SIDE, TWO, WHOLE, disc, plane, soft


def test_relative_heat_has_peak_one_and_zeros_stay() -> None:
    shares = instances.scale_to_peak([[0.0, 0.0065], [0.013, 0.00325]])
    assert shares.dtype == np.float32
    assert shares.tolist() == [[0.0, 0.5], [1.0, 0.25]]
    assert not instances.scale_to_peak(np.zeros((2, 3))).any()
    assert np.array_equal(instances.scale_to_peak(shares), shares)


@pytest.mark.parametrize(
    "heat", [[[np.nan, 1.0]], [[np.inf, 1.0]], [[-0.1, 1.0]], [1.0, 0.5], np.zeros((0, 4))]
)
def test_unusable_heat_is_refused(heat: object) -> None:
    for call in (instances.scale_to_peak, instances.find_instances):
        with pytest.raises(InputError, match="heat must be"):
            call(heat)  # type: ignore[operator]


def test_zero_map_has_no_instance() -> None:
    assert instances.find_instances(np.zeros((9, 9))) == []


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_one_object_is_never_taken_apart(name: str, sigma: float) -> None:
    (instance,) = instances.find_instances(soft(WHOLE[name](), sigma))
    assert not (instance.region & ~instance.zone).any()


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_two_discs_are_two_touching_or_not(name: str, sigma: float) -> None:
    heat = soft(TWO[name], sigma)
    first, second = instances.find_instances(heat)
    assert first.total_heat >= second.total_heat
    assert not (first.zone & second.zone).any()
    if sigma == 0:
        assert np.array_equal(first.region | second.region, TWO[name])


def test_valley_of_heat_takes_apart_what_has_no_waist() -> None:
    heat = np.zeros((40, 80))
    heat[10:30, 10:70] = 1
    heat[10:30, 38:42] = 0.6
    assert len(instances.find_instances(heat)) == 2
    assert len(instances.find_instances(heat, saddle=0.4)) == 1


def test_regions_are_scipys_components_where_nothing_touches() -> None:
    heat = soft(np.random.default_rng(3).random((SIDE, SIDE)) > 0.5, 5)
    heat = np.maximum(heat - heat.mean(), 0)
    heat = (heat > 0.5 * heat.max()) * heat.max()  # flat: every peak is that of the map
    labels, count = ndimage.label(heat > 0, np.ones((3, 3)))
    found = instances.find_instances(heat, min_area=0, saddle=0.01)
    assert len(found) == count > 3
    for instance in found:
        number = labels[instance.peak_xy[::-1]]
        assert np.array_equal(instance.region, labels == number)
    sizes = ndimage.sum_labels(heat > 0, labels, range(1, count + 1))
    assert [instance.total_heat for instance in found] == sorted(sizes, reverse=True)


def test_each_object_is_outlined_at_half_its_own_peak() -> None:
    x, y = plane(40, 120)
    bright, faint = (np.exp(-((x - x0) ** 2 + (y - 20) ** 2) / 128) for x0 in (30, 90))
    first, second = instances.find_instances(np.maximum(bright, 0.6 * faint))
    assert np.array_equal(first.region, bright >= 0.5)
    assert abs(int(second.region.sum()) - int(first.region.sum())) <= 4
    assert (first.peak_xy, second.peak_xy) == ((30, 20), (90, 20))
    assert len(instances.find_instances(np.maximum(bright, 0.4 * faint))) == 1


def test_specks_are_dropped_and_the_strongest_kept() -> None:
    heat = disc(50, 50, 20).astype(np.float64) + disc(15, 15, 6)
    heat[3, 90] = 1
    assert len(instances.find_instances(heat)) == 2
    assert len(instances.find_instances(heat, min_area=0)) == 3
    (kept,) = instances.find_instances(heat, max_instances=1)
    assert np.array_equal(kept.region, disc(50, 50, 20))


def test_equal_objects_come_in_reading_order() -> None:
    heat = np.zeros((30, 30))
    corners = [(2, 2), (20, 2), (2, 20), (20, 20)]
    for x, y in corners:
        heat[y : y + 5, x : x + 5] = 0.2
    assert [instance.peak_xy for instance in instances.find_instances(heat)] == corners


def test_arguments_that_make_no_sense_are_named() -> None:
    heat = np.ones((4, 4))
    for name in ("threshold", "saddle"):
        with pytest.raises(InputError, match=f"{name} must lie"):
            instances.find_instances(heat, **{name: 1.0})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_instances"):
        instances.find_instances(heat, max_instances=0)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (70, 50)])
def test_components_are_those_of_scipy(shape: tuple[int, int], connectivity: int) -> None:
    mask = np.random.default_rng(0).random(shape) > 0.6
    labels, areas = instances.label_components(mask, connectivity=connectivity)
    structure = np.ones((3, 3)) if connectivity == 8 else None
    reference, count = ndimage.label(mask, structure)
    assert len(areas) == count + 1 and np.array_equal(areas, np.bincount(labels.ravel()))
    pairs = set(zip(labels.ravel().tolist(), reference.ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(labels)) == len(np.unique(reference))
    assert np.array_equal(labels > 0, mask)


def test_depth_is_scipys_exact_distance_from_the_edge_of_mask_and_map() -> None:
    mask = soft(np.random.default_rng(1).random((90, 70)) > 0.5, 3) > 0.5
    reference = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    assert np.array_equal(instances.measure_depth(mask), reference)
