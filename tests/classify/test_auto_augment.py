from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment, TrivialAugmentWide
from torchvision.transforms.autoaugment import _apply_op

from labkit.classify import auto_augment
from labkit.rng import integers
from labkit.runtime import InputError

Space = dict[str, tuple[Tensor, bool]]
SIZES = [(32, 32), (24, 40), (2, 7)]
POLICIES = [
    auto_augment.trivial_augment,
    auto_augment.rand_augment,
    partial(auto_augment.rand_augment, operations=3, magnitude=30),
]


def reference_space(policy: str, height: int, width: int) -> Space:
    space: Space
    if policy == "trivial":
        space = TrivialAugmentWide()._augmentation_space(auto_augment.BINS)
    else:
        space = RandAugment()._augmentation_space(auto_augment.BINS, (height, width))
    return space


def labkit_space(policy: str, height: int, width: int) -> Tensor:
    if policy == "trivial":
        return auto_augment.make_trivial_space()
    return auto_augment.make_rand_space(height, width)


def reference(image: Tensor, name: str, magnitude: float) -> Tensor:
    result: Tensor = _apply_op(image, name, magnitude, InterpolationMode.NEAREST, None)
    return result


def noise(count: int, height: int = 32, width: int = 32, *, high: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, high, (count, 3, height, width), generator=generator).to(torch.uint8)


def varied_images(height: int, width: int) -> Tensor:
    """Noise, low contrast, ramps, and an image of which two channels are flat."""
    x, y = torch.arange(width), torch.arange(height)[:, None]
    ramps = torch.stack([x * 7 + 0 * y, 255 - y * 5 + 0 * x, (x + y) * 3]) % 256
    flat = torch.tensor([3, 255])[:, None, None].expand(2, height, width)
    flat = torch.cat([flat, (x > width // 2).expand(1, height, width) * 90])
    drawn = torch.stack([ramps, flat]).to(torch.uint8)
    return torch.cat([noise(1, height, width), noise(1, height, width, high=9) + 100, drawn])


def half_way(name: str, magnitude: float, height: int, width: int) -> Tensor:
    """Pixels that a shear takes from exactly between two others, so that either is right."""
    line = torch.arange(height)[:, None] if name == "ShearX" else torch.arange(width)
    if name not in ("ShearX", "ShearY"):
        return torch.zeros(height, width, dtype=torch.bool)
    fraction = (magnitude * (line.double() + 0.5)) % 1
    return ((fraction - 0.5).abs() < 1e-5).expand(height, width)


@pytest.mark.parametrize("policy", ["trivial", "rand"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_magnitudes_and_signs_are_torchvisions(policy: str, height: int, width: int) -> None:
    expected = reference_space(policy, height, width)
    augmented = labkit_space(policy, height, width)
    assert tuple(expected) == auto_augment.NAMES
    for row, signed, (name, (magnitudes, expected_signed)) in zip(
        augmented, auto_augment._IS_SIGNED, expected.items(), strict=True
    ):
        assert torch.equal(row, magnitudes.float().expand(auto_augment.BINS)), name
        assert bool(signed) == expected_signed, name


@pytest.mark.parametrize("policy", ["trivial", "rand"])
@pytest.mark.parametrize("name", auto_augment.NAMES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_each_operation_equals_torchvisions(
    name: str, policy: str, height: int, width: int
) -> None:
    magnitudes, signed = reference_space(policy, height, width)[name]
    values = magnitudes.reshape(-1).float()
    values = torch.cat([values, -values]) if signed else values
    for image in varied_images(height, width):
        operations = torch.full(values.shape, auto_augment.NAMES.index(name))
        (plan,) = auto_augment.plan_operations(
            operations, values, [len(values)], height, width, image.device
        )
        augmented = auto_augment.apply_operations(image.expand(len(values), -1, -1, -1), plan)
        for result, magnitude in zip(augmented, values.tolist(), strict=True):
            decided = ~half_way(name, magnitude, height, width)
            expected = reference(image, name, magnitude)
            assert torch.equal(result[:, decided], expected[:, decided]), magnitude


def test_trivial_shears_of_small_images_leave_no_pixel_undecided() -> None:
    # So that the test above compares every pixel of a 32 x 32 image.
    for magnitude in auto_augment.make_trivial_space()[auto_augment.NAMES.index("ShearX")].tolist():
        assert not half_way("ShearX", magnitude, 32, 32).any()


def drawn_operation(
    policy: str, size: tuple[int, int], index: int, step: int, bin_: int
) -> tuple[str, float]:
    """What the image at `index` undergoes with seed 3 in epoch 4."""
    counter = (3, 4, torch.tensor([index]))
    operation = int(integers(*counter, f"policy.operation.{step}", len(auto_augment.NAMES)))
    negative = bool(integers(*counter, f"policy.sign.{step}", 2))
    name = auto_augment.NAMES[operation]
    magnitudes, signed = reference_space(policy, *size)[name]
    magnitude = float(magnitudes.expand(auto_augment.BINS)[bin_])
    return name, -magnitude if signed and negative else magnitude


def test_trivial_augment_applies_to_each_image_what_its_index_draws() -> None:
    images, indices = noise(150), torch.arange(1000, 1150)
    drawn = set()
    for image, index, result in zip(
        images, indices.tolist(), auto_augment.trivial_augment(images, 3, 4, indices), strict=True
    ):
        bin_ = int(integers(3, 4, torch.tensor([index]), "policy.magnitude", auto_augment.BINS))
        name, magnitude = drawn_operation("trivial", (32, 32), index, 0, bin_)
        assert torch.equal(result, reference(image, name, magnitude)), name
        drawn.add((name, magnitude < 0))
    assert len(drawn) == 14 + 9


@pytest.mark.parametrize("operations", [1, 3])
def test_rand_augment_applies_its_operations_in_turn(operations: int) -> None:
    images, indices = noise(60), torch.arange(60)
    augmented = auto_augment.rand_augment(
        images, 3, 4, indices, operations=operations, magnitude=19
    )
    sequences = set()
    for image, index, result in zip(images, indices.tolist(), augmented, strict=True):
        steps = [drawn_operation("rand", (32, 32), index, step, 19) for step in range(operations)]
        for name, magnitude in steps:
            assert not half_way(name, magnitude, 32, 32).any()
            image = reference(image, name, magnitude)
        assert torch.equal(result, image), steps
        sequences.add(tuple(name for name, _ in steps))
    assert len(sequences) > (10 if operations == 1 else 50)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_changes_by_its_index_alone(policy: Callable[..., Tensor]) -> None:
    images, indices = noise(64), torch.arange(64)
    whole = policy(images, 1, 2, indices)
    for chosen in (torch.arange(63, -1, -1), torch.tensor([5, 5, 41]), torch.tensor([17])):
        assert torch.equal(policy(images[chosen], 1, 2, chosen), whole[chosen])


@pytest.mark.parametrize("policy", POLICIES)
def test_seed_and_epoch_change_what_is_done(policy: Callable[..., Tensor]) -> None:
    images, indices = noise(32), torch.arange(32)
    results = [policy(images, *pair, indices) for pair in [(0, 0), (0, 1), (1, 0)]]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        changed = (results[one] != results[other]).flatten(1).any(1)
        assert changed.float().mean() > 0.7


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_format_does_not_matter_and_input_is_left_as_found(
    policy: Callable[..., Tensor],
) -> None:
    images, indices = noise(32, 8, 12), torch.arange(32)
    before = images.clone()
    state = torch.get_rng_state()
    result = policy(images, 0, 0, indices)
    permuted = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(policy(permuted, 0, 0, indices), result)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_batch_stays_empty(policy: Callable[..., Tensor]) -> None:
    assert policy(noise(0), 0, 0, torch.arange(0)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("policy", [auto_augment.trivial_augment, auto_augment.rand_augment])
@pytest.mark.parametrize(
    ("images", "count", "word"),
    [
        (noise(2).float(), 2, "float32"),
        (noise(2)[0], 3, r"\(3, 32, 32\)"),
        (noise(2).permute(0, 2, 3, 1), 2, r"\(2, 32, 32, 3\)"),
        (noise(2), 3, "indices"),
    ],
)
def test_images_and_indices_that_do_not_fit_are_refused(
    policy: Callable[..., Tensor], images: Tensor, count: int, word: str
) -> None:
    with pytest.raises(InputError, match=word):
        policy(images, 0, 0, torch.arange(count))


@pytest.mark.parametrize("setting", [{"operations": 0}, {"magnitude": 31}, {"magnitude": -1}])
def test_settings_out_of_range_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        auto_augment.rand_augment(noise(2), 0, 0, torch.arange(2), **setting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpu_gives_what_the_cpu_gives(policy: Callable[..., Tensor], device: str) -> None:
    images, indices = noise(256), torch.arange(256)
    on_gpu = policy(images.cuda(), 0, 0, indices.to(device))
    assert on_gpu.is_cuda
    same = (on_gpu.cpu() == policy(images, 0, 0, indices)).flatten(1).all(1)
    assert same.float().mean() > 0.98  # the last bit of a mean may decide a grey level
