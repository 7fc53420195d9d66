from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier
from torch import nn

from labkit import drawing
from labkit.rng import Floats
from labkit.runtime import InputError, use_seed
from labkit.scenes import SCENE_CLASSES, make_classification_scenes


def test_images_and_labels_have_the_promised_form() -> None:
    images, labels = make_classification_scenes(130, seed=0)
    assert images.shape == (130, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (130,)
    assert labels.dtype == np.int64
    assert len(set(SCENE_CLASSES)) == 10
    assert images.min() < 30
    assert images.max() > 225


def test_an_image_depends_on_its_number_alone() -> None:
    images, labels = make_classification_scenes(300, seed=5)
    for start, count in ((0, 50), (50, 250), (127, 2), (299, 1)):
        part, part_labels = make_classification_scenes(count, seed=5, start=start)
        np.testing.assert_array_equal(part, images[start : start + count])
        np.testing.assert_array_equal(part_labels, labels[start : start + count])


def test_no_two_images_are_alike() -> None:
    images = np.concatenate([make_classification_scenes(500, seed=seed)[0] for seed in (-1, 0, 1)])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_seeds_give_other_orders_of_classes() -> None:
    orders = {tuple(make_classification_scenes(10, seed=seed)[1]) for seed in range(20)}
    assert len(orders) == 20


def test_every_ten_images_hold_each_class_once() -> None:
    _, labels = make_classification_scenes(200, seed=3, start=40)
    np.testing.assert_array_equal(np.sort(labels.reshape(-1, 10), axis=1), [np.arange(10)] * 20)
    assert len(np.unique(labels.reshape(-1, 10), axis=0)) == 20


@pytest.mark.parametrize(
    ("count", "start", "name"), [(0, 0, "count"), (-5, 0, "count"), (1, -1, "start")]
)
def test_impossible_ranges_are_refused(count: int, start: int, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least"):
        make_classification_scenes(count, seed=0, start=start)


def test_global_random_state_is_left_as_found() -> None:
    before = np.random.get_state(legacy=False)["state"]["key"].copy()
    make_classification_scenes(2, seed=0)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], before)


def plane(half_width: float, points: int) -> tuple[Floats, Floats]:
    axis = np.linspace(-half_width, half_width, points, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


@pytest.mark.parametrize("name", SCENE_CLASSES)
def test_distances_grow_by_at_most_one_per_unit(name: str) -> None:
    x, y = plane(1.5, 301)
    distance = drawing.SHAPES[name](x, y)
    for axis in (0, 1):
        assert np.abs(np.diff(distance, axis=axis)).max() <= 0.01 * 1.01
    assert distance[0].min() > 0.1
    assert distance.min() < -0.1


@pytest.mark.parametrize("name", SCENE_CLASSES)
def test_a_mirrored_shape_is_the_same_shape_turned(name: str) -> None:
    x, y = plane(1.5, 301)
    shape = drawing.SHAPES[name]
    distance = shape(x, y)
    mirrored = (shape(-x, y), shape(x, -y))
    assert any(np.allclose(distance, other, atol=1e-5) for other in mirrored)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("circle", math.pi * 0.85**2),
        ("ring", math.pi * (0.9**2 - 0.5**2)),
        ("square", 1.5**2),
        ("triangle", 0.55**2 * 3 * math.sqrt(3)),
        ("cross", 4 * 0.95 * 0.56 - 0.56**2),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_coverage_adds_up_to_the_area(name: str, area: float, shift: float) -> None:
    radius = 10
    x, y = drawing.make_pixel_grid(32)
    distance = drawing.SHAPES[name]((x + shift) / radius + 0 * y, (y - shift) / radius + 0 * x)
    covered = drawing.compute_coverage(distance * radius).sum() / radius**2
    assert covered == pytest.approx(area, rel=0.02)


def test_class_cannot_be_read_from_the_mean_colour() -> None:
    images, labels = make_classification_scenes(6000, seed=1)
    colours = images.mean(axis=(1, 2))
    model = RidgeClassifier().fit(colours[:4000], labels[:4000])
    assert model.score(colours[4000:], labels[4000:]) < 0.2


def small_network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in ((3, 24, 5, 2), (24, 48, 3, 2), (48, 64, 3, 1)):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def network_accuracy(images: drawing.Images, labels: NDArray[np.int64], train: int) -> float:
    """Test accuracy on all but the first `train` images, after four epochs of training."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels)
    network = small_network().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters())
    batches = [batch for _ in range(4) for batch in torch.randperm(train).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=len(batches))
    for batch in batches:
        loss = nn.functional.cross_entropy(network(pixels[batch]), targets[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        return float((network(pixels[train:]).argmax(1) == targets[train:]).float().mean())


@pytest.mark.slow
def test_a_small_network_learns_what_a_linear_classifier_cannot() -> None:
    train = 4000
    images, labels = make_classification_scenes(train + 1000, seed=2)
    pixels = images.reshape(len(images), -1).astype(np.float32) / 255 - 0.5
    linear = RidgeClassifier(alpha=1000).fit(pixels[:train], labels[:train])
    assert linear.score(pixels[train:], labels[train:]) < 0.4
    with use_seed(0):
        assert network_accuracy(images, labels, train) > 0.7
