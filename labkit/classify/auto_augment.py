"""TrivialAugmentWide and RandAugment for a whole batch, another operation for every image.

The operations, their ranges, signs, nearest-neighbour sampling and black fill are those of
torchvision's `TrivialAugmentWide` and `RandAugment` on uint8 tensors. Images are sorted by
operation, so that each operation runs once on a slice of the batch and one gather serves all
geometric ones. What is drawn is drawn on the CPU: the device waits once, where `indices` lie on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from labkit.rng import integers
from labkit.runtime import InputError

BINS = 31
"""Number of magnitudes of every operation, the first the mildest."""

_LUMA = (0.2989, 0.587, 0.114)


def trivial_augment(images: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Apply one random operation at a random magnitude to each image.

    TrivialAugmentWide of Müller and Hutter, 2021, "TrivialAugment: Tuning-free Yet
    State-of-the-Art Data Augmentation", arXiv 2103.10158.

    Args:
        images: (B, 3, H, W) uint8, of any memory format; left as it is.
        seed: any int.
        epoch: any int.
        indices: (B,) integers, one per image. With `seed` and `epoch`, an image's index alone
            decides what happens to it.

    Returns:
        (B, 3, H, W) uint8, contiguous, on the device of `images`.

    Raises:
        InputError: `images` or `indices` are not as described.
    """
    _check(images, indices)
    indices = indices.cpu()
    bins = integers(seed, epoch, indices, "policy.magnitude", BINS)
    return _apply_random_operation(
        images, bins, make_trivial_space(), (seed, epoch, indices), step=0
    )


def rand_augment(
    images: Tensor,
    seed: int,
    epoch: int,
    indices: Tensor,
    *,
    operations: int = 2,
    magnitude: int = 9,
) -> Tensor:
    """Apply `operations` random operations in turn, all at one magnitude, to each image.

    RandAugment of Cubuk et al., 2019, "RandAugment: Practical automated data augmentation with a
    reduced search space", arXiv 1909.13719. The first four arguments and what is returned are
    those of `trivial_augment`; `operations` is 1 or more, and one may be drawn twice; `magnitude`
    is a bin from 0, the mildest, to 30.

    Raises:
        InputError: an argument is not as described.
    """
    _check(images, indices)
    if operations < 1:
        raise InputError(f"operations must be at least 1, got {operations}")
    if not 0 <= magnitude < BINS:
        raise InputError(f"magnitude must be from 0 to {BINS - 1}, got {magnitude}")
    indices = indices.cpu()
    bins = torch.full(indices.shape, magnitude)
    space = make_rand_space(*images.shape[2:])
    for step in range(operations):
        images = _apply_random_operation(images, bins, space, (seed, epoch, indices), step)
    return images


def apply_operations(images: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Apply to each image its own operation.

    Args:
        images: (B, 3, H, W) uint8.
        operations: (B,) int64 on the CPU, positions in `NAMES`.
        magnitudes: (B,) float32 on the CPU, in the units of `make_trivial_space`, with their signs.

    Returns:
        (B, 3, H, W) uint8, contiguous.
    """
    order = torch.argsort(operations, stable=True)
    runs = _find_runs(operations)
    magnitudes = magnitudes[order]
    batch = images.index_select(0, order.to(images.device)).contiguous()
    _warp_runs(batch, magnitudes, runs)
    on_device = magnitudes.to(images.device)[:, None, None, None]
    for name, operation in _PHOTOMETRIC.items():
        if runs[name].stop > runs[name].start:
            batch[runs[name]] = operation(batch[runs[name]], on_device[runs[name]])
    return batch.index_select(0, torch.argsort(order).to(images.device))


@functools.cache
def make_trivial_space() -> Tensor:
    """Magnitudes of TrivialAugmentWide: (operations, bins) float32, rows in the order of `NAMES`.

    Shears are slopes, translations pixels, rotations degrees; brightness, colour, contrast and
    sharpness are blended by 1 + magnitude; posterising keeps so many bits; solarising inverts
    from that grey level on. Rows of operations without a magnitude are zero.
    """
    return _make_space(shear=0.99, shift=(32.0, 32.0), angle=135.0, blend=0.99, bits_lost=6)


@functools.cache
def make_rand_space(height: int, width: int) -> Tensor:
    """Magnitudes of RandAugment for images of this size, in the layout of `make_trivial_space`."""
    shift = (150.0 / 331.0 * width, 150.0 / 331.0 * height)
    return _make_space(shear=0.3, shift=shift, angle=30.0, blend=0.9, bits_lost=4)


def _make_space(
    *, shear: float, shift: tuple[float, float], angle: float, blend: float, bits_lost: int
) -> Tensor:
    largest = {"ShearX": shear, "ShearY": shear, "TranslateX": shift[0], "TranslateY": shift[1]}
    largest |= {"Rotate": angle} | dict.fromkeys(_BLENDED, blend)
    rows = {name: torch.linspace(0.0, end, BINS) for name, end in largest.items()}
    rows["Posterize"] = 8 - (torch.arange(BINS) / ((BINS - 1) / bits_lost)).round()
    rows["Solarize"] = torch.linspace(255.0, 0.0, BINS)
    return torch.stack([rows.get(name, torch.zeros(BINS)) for name in NAMES])


def _check(images: Tensor, indices: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise InputError(f"images must be uint8 of shape (B, 3, H, W), got {got}")
    if indices.shape != images.shape[:1]:
        got = f"shape {tuple(indices.shape)} for {len(images)} images"
        raise InputError(f"indices must hold one number per image, got {got}")


def _apply_random_operation(
    images: Tensor, bins: Tensor, space: Tensor, counter: tuple[int, int, Tensor], step: int
) -> Tensor:
    operations = integers(*counter, f"policy.operation.{step}", len(NAMES))
    negative = integers(*counter, f"policy.sign.{step}", 2).bool() & _IS_SIGNED[operations]
    magnitudes = space[operations, bins]
    return apply_operations(images, operations, torch.where(negative, -magnitudes, magnitudes))


def _find_runs(operations: Tensor) -> dict[str, slice]:
    """Where the images of each operation lie, once the batch is sorted by operation."""
    stops = torch.bincount(operations, minlength=len(NAMES)).cumsum(0).tolist()
    return {
        name: slice(start, stop)
        for name, start, stop in zip(NAMES, [0, *stops[:-1]], stops, strict=True)
    }


def _warp_runs(batch: Tensor, magnitudes: Tensor, runs: dict[str, slice]) -> None:
    """Shear, translate and rotate, in place, the images whose turn it is."""
    warped = slice(runs["ShearX"].start, runs["Rotate"].stop)
    if warped.stop > warped.start:
        matrices = _make_inverse_matrices(magnitudes, runs, *batch.shape[2:])[warped]
        batch[warped] = _warp(batch[warped], matrices.to(batch.device))


def _make_inverse_matrices(
    magnitudes: Tensor, runs: dict[str, slice], height: int, width: int
) -> Tensor:
    """Maps from where a pixel goes to where it comes from, both from the centre of the image.

    Shears hold the first row or column of pixel corners in place, as in torchvision.

    Returns:
        (B, 2, 3) float32 for (x, y, 1); the identity for operations that are not geometric.
    """
    matrices = torch.eye(2, 3, dtype=torch.float64).repeat(len(magnitudes), 1, 1)
    part = {name: matrices[run] for name, run in runs.items()}
    size = {name: magnitudes[run].double() for name, run in runs.items()}
    part["ShearX"][:, 0, 1] = size["ShearX"]
    part["ShearX"][:, 0, 2] = size["ShearX"] * height / 2
    part["ShearY"][:, 1, 0] = size["ShearY"]
    part["ShearY"][:, 1, 2] = size["ShearY"] * width / 2
    part["TranslateX"][:, 0, 2] = -size["TranslateX"].trunc()
    part["TranslateY"][:, 1, 2] = -size["TranslateY"].trunc()
    angle = size["Rotate"].deg2rad()
    part["Rotate"][:, 0, 0] = part["Rotate"][:, 1, 1] = angle.cos()
    part["Rotate"][:, 0, 1] = -angle.sin()
    part["Rotate"][:, 1, 0] = angle.sin()
    return matrices.float()


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Fetch each pixel from the one nearest to where its matrix points, black from outside."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    entries = matrices[..., None, None]  # (n, 2, 3, 1, 1)
    source = entries[:, :, 0] * x + (entries[:, :, 1] * y + entries[:, :, 2])  # (n, 2, H, W)
    column = source[:, 0].add_((width - 1) / 2).round_()
    row = source[:, 1].add_((height - 1) / 2).round_()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = torch.where(inside, row * width + column, 0.0).long().flatten(1)[:, None]
    fetched = images.flatten(2).gather(2, pixel.expand(-1, 3, -1)).view_as(images)
    return fetched * inside[:, None]


def _blend(images: Tensor, degenerate: Tensor, magnitude: Tensor) -> Tensor:
    """Move away from `degenerate` (magnitude above 0) or towards it, and drop fractions."""
    mixed = (1 + magnitude) * images - magnitude * degenerate
    return mixed.clamp_(0, 255).to(torch.uint8)


def _convert_to_grey(images: Tensor) -> Tensor:
    """Luma without its fraction: (n, 1, H, W) float32."""
    red, green, blue = (weight * images[:, i : i + 1] for i, weight in enumerate(_LUMA))
    return (red + green + blue).trunc()


def _adjust_brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(magnitude), magnitude)


def _adjust_colour(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, _convert_to_grey(images), magnitude)


def _adjust_contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, _convert_to_grey(images).mean((1, 2, 3), keepdim=True), magnitude)


def _adjust_sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with a 3 x 3 blur of centre weight 5; the border has no blur and stays."""
    if min(images.shape[2:]) < 3:
        return images
    blurred = images.float()
    inner = blurred[:, :, 1:-1, 1:-1]
    inner.copy_((avg_pool2d(blurred, 3, 1, divisor_override=1) + 4 * inner).div_(13).round_())
    return _blend(images, blurred, magnitude)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & torch.bitwise_left_shift(255, 8 - bits.long()).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= threshold, 255 - images, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0 ... 255; a flat channel stays."""
    low = images.amin((2, 3), keepdim=True).float()
    span = images.amax((2, 3), keepdim=True).float() - low
    stretched = (images - low) * (255 / span.clamp(min=1))
    return torch.where(span > 0, stretched, images).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Flatten each channel's histogram as Pillow does; a channel of too few levels stays."""
    values = images.flatten(2).long()  # (n, 3, H * W)
    ones = values.new_ones(()).expand_as(values)
    counts = values.new_zeros((*values.shape[:2], 256)).scatter_add_(2, values, ones)
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalised = table.gather(2, values).to(torch.uint8).view_as(images)
    return torch.where(step[..., None] > 0, equalised, images)


_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_BLENDED = ("Brightness", "Color", "Contrast", "Sharpness")
_PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _adjust_brightness,
    "Color": _adjust_colour,
    "Contrast": _adjust_contrast,
    "Sharpness": _adjust_sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
NAMES = ("Identity", *_GEOMETRIC, *_PHOTOMETRIC)
"""The operations, all equally likely; positions in it are what `apply_operations` takes."""

_IS_SIGNED = torch.tensor([name in _GEOMETRIC + _BLENDED for name in NAMES])
