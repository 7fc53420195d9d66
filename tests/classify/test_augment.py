from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms.v2 import functional as TF

from labkit.classify import augment
from labkit.classify.augment import TrainLoader, draw_flips, erase_boxes, mirror, mixup
from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import Split
from labkit.runtime import InputError

CPU = torch.device("cpu")
EVERYTHING = AugmentConfig(
    pad=2,
    pad_mode="reflect",
    flip="random",
    auto_augment="rand",
    erase=0.5,
    cutout=4,
    mixup=0.4,
    cutmix=0.7,
)


def noise(count: int = 40) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    return Split(images, rng.integers(0, 4, count), tuple("abcd"))


def make_loader(settings: AugmentConfig, **changes: object) -> TrainLoader:
    config = TrainConfig(augment=settings, image_size=12, seed=3, **changes)  # type: ignore[arg-type]
    return TrainLoader(noise(), config, CPU)


def test_without_augmentation_a_batch_is_torchvisions_normalised_tensor() -> None:
    split = noise()
    config = TrainConfig(image_size=12)
    images, labels = TrainLoader(split, config, CPU).batch(0, torch.tensor([5, 0, 7]))
    for row, index in enumerate([5, 0, 7]):
        plain = TF.to_dtype(torch.from_numpy(split.images[index]).permute(2, 0, 1), scale=True)
        expected = TF.normalize(plain, list(config.mean), list(config.std))
        torch.testing.assert_close(images[row], expected, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == split.labels[[5, 0, 7]].tolist()
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
def test_every_crop_is_a_window_of_the_padded_image(pad_mode: str) -> None:
    settings = AugmentConfig(pad=2, pad_mode=pad_mode)  # type: ignore[arg-type]
    shown = make_loader(settings).pixels(0, torch.arange(40))
    mode = "constant" if pad_mode == "zero" else "reflect"
    padded = TF.pad(torch.from_numpy(noise().images).permute(0, 3, 1, 2), [2], padding_mode=mode)
    places = set()
    for image, original in zip(shown, padded, strict=True):
        windows = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(image, original[:, y : y + 12, x : x + 12])
        ]
        assert len(windows) == 1
        places.update(windows)
    assert len(places) > 10


def test_reflection_wider_than_the_image_is_an_error() -> None:
    with pytest.raises(InputError, match="smaller than the image"):
        make_loader(AugmentConfig(pad=12, pad_mode="reflect"))


def test_a_view_depends_on_nothing_but_seed_epoch_and_index() -> None:
    unmixed = dataclasses.replace(EVERYTHING, mixup=0, cutmix=0)
    images = make_loader(unmixed)
    whole, targets = images.batch(4, torch.arange(40))
    some = torch.tensor([31, 2, 2, 17])
    part, part_targets = images.batch(4, some)
    assert torch.equal(part, whole[some]) and torch.equal(part_targets, targets[some])
    assert not torch.equal(images.batch(5, some)[0], part)
    other = TrainLoader(noise(), TrainConfig(augment=unmixed, image_size=12), CPU)
    assert not torch.equal(other.batch(4, some)[0], part)


def test_neighbours_of_a_batch_are_mixed_as_their_indices_draw() -> None:
    unmixed = dataclasses.replace(EVERYTHING, mixup=0, cutmix=0)
    indices = torch.arange(40).flip(0)[:7]
    mixed, targets = make_loader(EVERYTHING).batch(4, indices)
    plain, labels = make_loader(unmixed).batch(4, indices)
    drawn = augment.draw_mix(EVERYTHING, 3, 4, indices, 12, 12)
    blended = 0
    for row, partner in enumerate([1, 0, 3, 2, 5, 4, 6]):
        left, top, right, bottom = drawn["box"][row].tolist()
        share, expected = float(drawn["share"][row]), plain[row].clone()
        if drawn["weight"][row] < 1:
            blended += 1
            expected = share * plain[row] + (1 - share) * plain[partner]
            assert left == right and top == bottom
        expected[:, top:bottom, left:right] = plain[partner][:, top:bottom, left:right]
        torch.testing.assert_close(mixed[row], expected)
        wanted = torch.zeros(4)
        wanted[labels[row]] += share
        wanted[labels[partner]] += 1 - share
        torch.testing.assert_close(targets[row], wanted)
    assert 0 < blended < 7


def test_a_batch_does_not_depend_on_those_drawn_with_it() -> None:
    loader = make_loader(EVERYTHING)
    batches = torch.arange(40).flip(0).split(9)
    together = list(loader.batches(2, batches))
    assert len(together) == 5
    for indices, (images, targets) in zip(batches, together, strict=True):
        alone, alone_targets = loader.batch(2, indices)
        assert torch.equal(images, alone) and torch.equal(targets, alone_targets)
    assert list(loader.batches(2, [])) == []


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs() -> None:
    indices = torch.arange(1000)
    even, odd = (draw_flips("alternating", 1, epoch, indices) for epoch in (6, 7))
    assert torch.equal(even, ~odd)
    assert 400 < even.sum() < 600


def test_random_flip_mirrors_about_half_and_anew_each_epoch() -> None:
    indices = torch.arange(10_000)
    first, second = (draw_flips("random", 1, epoch, indices) for epoch in (0, 1))
    for mask in (first, first ^ second):
        assert abs(mask.double().mean() - 0.5) < 0.02


def test_mirroring_equals_torchvisions_flip() -> None:
    images = torch.rand(4, 3, 5, 6)
    mask = torch.tensor([True, False, True, False])
    expected = torch.stack(
        [TF.horizontal_flip(x) if m else x for x, m in zip(images, mask, strict=True)]
    )
    assert torch.equal(mirror(images, mask), expected)


def test_erased_boxes_are_zero_and_the_rest_is_untouched() -> None:
    images = torch.ones(2, 1, 4, 5)
    top, left = torch.tensor([1, -1]), torch.tensor([2, 3])
    height, width = torch.tensor([2, 3]), torch.tensor([2, 9])
    erased = erase_boxes(images, torch.stack([left, top, left + width, top + height], 1))
    expected = np.ones((2, 1, 4, 5))
    expected[0, 0, 1:3, 2:4] = 0
    expected[1, 0, 0:2, 3:] = 0
    np.testing.assert_array_equal(erased.numpy(), expected)


def test_random_erasing_keeps_to_its_probability_and_area() -> None:
    indices = torch.arange(4000)
    boxes = augment.draw_erased_boxes(0.25, 0, 0, indices, 32, 32)
    erased = erase_boxes(torch.ones(4000, 1, 32, 32), boxes)
    share = 1 - erased.mean(dim=(1, 2, 3))
    hit = share > 0
    assert abs(hit.double().mean() - 0.25) < 0.03
    assert share[hit].min() > 0.01 and share[hit].max() < 0.36


def test_cutout_blanks_a_square_around_a_pixel_of_the_image() -> None:
    boxes = augment.draw_cutout_boxes(6, 0, 0, torch.arange(500), 16, 16)
    blanked = erase_boxes(torch.ones(500, 1, 16, 16), boxes) == 0
    counts = blanked.sum(dim=(1, 2, 3))
    assert counts.max() == 36 and counts.min() >= 9


def test_mixup_of_extreme_weights_is_one_of_the_images() -> None:
    own, other = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    mixed = mixup(own, other, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(mixed[0], own[0])
    torch.testing.assert_close(mixed[1], other[1])


def test_cutmix_reports_the_area_it_really_kept() -> None:
    own, other = torch.zeros(300, 1, 20, 20), torch.ones(300, 1, 20, 20)
    draws = torch.rand(3, 300, generator=torch.Generator().manual_seed(0))
    boxes, share = augment.place_boxes(*draws, 20, 20)
    mixed = augment.paste_boxes(own, other, boxes)
    torch.testing.assert_close(1 - mixed.mean(dim=(1, 2, 3)), share)


def test_mixed_targets_are_distributions_over_both_classes() -> None:
    images = make_loader(dataclasses.replace(EVERYTHING, auto_augment="none"))
    _, targets = images.batch(0, torch.arange(40))
    assert targets.shape == (40, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    own = targets[torch.arange(40), torch.from_numpy(noise().labels)]
    assert (own > 0).float().mean() > 0.9 and ((targets > 0).sum(1) <= 2).all()


def test_mixing_stops_when_it_was_told_to() -> None:
    settings = AugmentConfig(cutmix=1.0, mix_until=0.5)
    images = make_loader(settings, epochs=10)
    assert images.batch(4, torch.arange(4))[1].is_floating_point()
    assert not images.batch(5, torch.arange(4))[1].is_floating_point()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixing_weights_follow_the_beta_distribution(alpha: float) -> None:
    drawn = augment.draw_beta(alpha, 0, 0, torch.arange(5000), "weights").double().numpy()
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def draw_from_every_generator(image: Image.Image) -> torch.Tensor:
    shift = random.random() * np.random.rand() * torch.rand(())
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 + shift) / 2


def test_a_transforms_view_depends_on_nothing_but_seed_epoch_and_index() -> None:
    loader = TrainLoader(noise(), TrainConfig(), CPU, draw_from_every_generator)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = loader.pixels(4, torch.arange(40))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert np.array_equal(np.random.get_state()[1], states[1])
    some = torch.tensor([31, 2, 2, 17])
    assert torch.equal(loader.pixels(4, some), whole[some])
    assert not torch.equal(loader.pixels(5, some), whole[some])
    other = TrainLoader(noise(), TrainConfig(seed=1), CPU, draw_from_every_generator)
    assert not torch.equal(other.pixels(4, some), whole[some])


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image,
        TF.to_image,
        lambda image: TF.to_image(image).float() / 255,
        lambda image: TF.to_image(image).to(torch.int32) * 257,
        lambda image: (TF.to_image(image).to(torch.int32) * 257).to(torch.uint16),
        lambda image: np.asarray(image).astype(np.uint16) * 257,
    ],
    ids=["pil", "tensor", "floats", "int32", "uint16", "uint16 array"],
)
def test_a_transform_that_changes_nothing_gives_the_plain_batch(convert: Any) -> None:
    config, indices = TrainConfig(), torch.tensor([5, 0, 7])
    images, labels = TrainLoader(noise(), config, CPU, convert).batch(0, indices)
    expected, expected_labels = TrainLoader(noise(), config, CPU).batch(0, indices)
    torch.testing.assert_close(images, expected)
    assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("factor", [1, 257])
def test_a_transform_of_integers_without_a_known_depth_is_refused(factor: int) -> None:
    def to_int64(image: Image.Image) -> torch.Tensor:
        return TF.to_image(image).to(torch.int64) * factor

    loader = TrainLoader(noise(), TrainConfig(), CPU, to_int64)
    with pytest.raises(InputError, match=r"the image that transform gave must hold .* got int64"):
        loader.pixels(0, torch.arange(2))


def test_a_transform_of_integers_below_256_is_not_taken_for_16_bits() -> None:
    def to_int32(image: Image.Image) -> torch.Tensor:
        return TF.to_image(image).to(torch.int32)

    loader = TrainLoader(noise(), TrainConfig(), CPU, to_int32)
    with pytest.raises(InputError, match="the image that transform gave"):
        loader.pixels(0, torch.arange(2))
