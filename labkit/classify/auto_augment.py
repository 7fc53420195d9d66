"""TrivialAugmentWide and RandAugment for a whole batch, another operation for every image.

The operations, their ranges, signs, nearest-neighbour sampling and black fill are those of
torchvision's `TrivialAugmentWide` and `RandAugment` on uint8 tensors. Images are sorted by
operation, so that each operation runs once on a slice of the batch and one gather serves all
geometric ones. Operations are drawn and sorted on the CPU, for all batches of an epoch at once
(`plan_operations`), so that no batch makes the device wait for the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from labkit.rng import integers
from labkit.runtime import InputError

BINS = 31
"""Number of magnitudes of every operation, the first the mildest."""

_LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class OperationPlan:
    """Which operation each image of a batch undergoes, ready for `apply_operations`.

    Attributes:
        order: (B,) int64, positions in the batch, sorted by operation.
        inverse: (B,) int64, where each image of the batch lies in `order`.
        counts: how many images undergo each operation of `NAMES`.
        magnitudes: (B, 1, 1, 1) float32 in the order of `order`, in the units of
            `make_trivial_space`, with their signs.
        matrices: (G, 2, 3, 1, 1) float32: for the geometric operations, in the order of `order`,
            the maps from where a pixel goes to where it comes from, both from the centre.
    """

    order: Tensor
    inverse: Tensor
    counts: list[int]
    magnitudes: Tensor
    matrices: Tensor


Drawn = tuple[Tensor, Tensor]
"""For each image its operation, (N,) int64, and its magnitude, (N,) float32, on the CPU."""


def draw_trivial(seed: int, epoch: int, indices: Tensor) -> list[Drawn]:
    """Draw the one operation of `trivial_augment` for each of `indices` (N,) on the CPU."""
    bins = integers(seed, epoch, indices, "policy.magnitude", BINS)
    return [_draw_operations(bins, make_trivial_space(), (seed, epoch, indices), step=0)]


def draw_rand(
    seed: int,
    epoch: int,
    indices: Tensor,
    height: int,
    width: int,
    *,
    operations: int = 2,
    magnitude: int = 9,
) -> list[Drawn]:
    """Draw the operations of `rand_augment`, in turn, for each of `indices` (N,) on the CPU.

    Raises:
        InputError: `operations` or `magnitude` is out of range.
    """
    if operations < 1:
        raise InputError(f"operations must be at least 1, got {operations}")
    if not 0 <= magnitude < BINS:
        raise InputError(f"magnitude must be from 0 to {BINS - 1}, got {magnitude}")
    bins, space = torch.full(indices.shape, magnitude), make_rand_space(height, width)
    return [
        _draw_operations(bins, space, (seed, epoch, indices), step) for step in range(operations)
    ]


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
    return _apply_in_turn(images, draw_trivial(seed, epoch, indices.cpu()))


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
    strength = {"operations": operations, "magnitude": magnitude}
    drawn = draw_rand(seed, epoch, indices.cpu(), *images.shape[2:], **strength)
    return _apply_in_turn(images, drawn)


def _apply_in_turn(images: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    batch_sizes, size = [len(images)], (images.shape[2], images.shape[3])
    for operations, magnitudes in drawn:
        (plan,) = plan_operations(operations, magnitudes, batch_sizes, *size, images.device)
        images = apply_operations(images, plan)
    return images


def plan_operations(
    operations: Tensor,
    magnitudes: Tensor,
    batch_sizes: Sequence[int],
    height: int,
    width: int,
    device: torch.device,
) -> list[OperationPlan]:
    """Sort the images of each batch by operation, on the CPU, and move the result to `device`.

    Args:
        operations: (N,) int64 on the CPU, positions in `NAMES`, batch after batch.
        magnitudes: (N,) float32 on the CPU, in the units of `make_trivial_space`, with signs.
        batch_sizes: how many images each batch has; together N.
        height: height of the images in pixels.
        width: width of the images in pixels.
        device: where the images will be.

    Returns:
        One plan a batch; their tensors are views of a few that hold all batches.
    """
    sizes = list(batch_sizes)
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    first = (torch.tensor(sizes).cumsum(0) - torch.tensor(sizes))[batch]
    groups = batch * len(NAMES) + operations
    order = torch.argsort(groups, stable=True)  # batches stay where they are
    counts = torch.bincount(groups, minlength=len(sizes) * len(NAMES)).view(-1, len(NAMES))
    magnitudes, operations = magnitudes[order], operations[order]
    if min(height, width) < 3:  # too small for a blur
        magnitudes = torch.where(operations == NAMES.index("Sharpness"), 0.0, magnitudes)
    is_warped = _IS_GEOMETRIC[operations]
    matrices = _make_inverse_matrices(operations[is_warped], magnitudes[is_warped], height, width)
    parts = zip(
        torch.split((order - first).to(device), sizes),
        torch.split((torch.argsort(order) - first).to(device), sizes),
        counts.tolist(),
        torch.split(magnitudes.view(-1, 1, 1, 1).to(device), sizes),
        torch.split(matrices[..., None, None].to(device), counts[:, _IS_GEOMETRIC].sum(1).tolist()),
        strict=True,
    )
    return [OperationPlan(*part) for part in parts]


def apply_operations(images: Tensor, plan: OperationPlan) -> Tensor:
    """Apply to each of `images` (B, 3, H, W) uint8 its own operation; contiguous."""
    batch = images.index_select(0, plan.order).contiguous()
    runs = dict(zip(NAMES, torch.split(batch, plan.counts), strict=True))
    magnitudes = dict(zip(NAMES, torch.split(plan.magnitudes, plan.counts), strict=True))
    start = plan.counts[0]  # of the geometric operations, which follow Identity
    stop = start + len(plan.matrices)
    if stop > start:
        batch[start:stop] = _warp(batch[start:stop], plan.matrices)
    counts = plan.counts[len(_GEOMETRIC) + 1 :][: len(_BLENDED)]
    start, stop = stop, stop + sum(counts)
    if stop > start:
        batch[start:stop] = _blend(batch[start:stop], plan.magnitudes[start:stop], counts)
    for name, operation in _PHOTOMETRIC.items():
        if len(runs[name]):
            runs[name].copy_(operation(runs[name], magnitudes[name]))
    return batch.index_select(0, plan.inverse)


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


def _draw_operations(
    bins: Tensor, space: Tensor, counter: tuple[int, int, Tensor], step: int
) -> Drawn:
    operations = integers(*counter, f"policy.operation.{step}", len(NAMES))
    negative = integers(*counter, f"policy.sign.{step}", 2).bool() & _IS_SIGNED[operations]
    magnitudes = space[operations, bins]
    return operations, torch.where(negative, -magnitudes, magnitudes)


def _make_inverse_matrices(
    operations: Tensor, magnitudes: Tensor, height: int, width: int
) -> Tensor:
    """The matrices (G, 2, 3) float32 of `OperationPlan`, for (x, y, 1), of geometric operations.

    Shears hold the first row or column of pixel corners in place, as in torchvision.
    """
    matrices = torch.eye(2, 3, dtype=torch.float64).repeat(len(operations), 1, 1)
    sizes = magnitudes.double()
    for number, name in enumerate(_GEOMETRIC, start=1):
        chosen = operations == number
        size, part = sizes[chosen], matrices[chosen]
        if name == "Rotate":
            angle = size.deg2rad()
            part[:, 0, 0] = part[:, 1, 1] = angle.cos()
            part[:, 0, 1], part[:, 1, 0] = -angle.sin(), angle.sin()
        elif name == "ShearX":
            part[:, 0, 1], part[:, 0, 2] = size, size * height / 2
        elif name == "ShearY":
            part[:, 1, 0], part[:, 1, 2] = size, size * width / 2
        else:
            part[:, int(name == "TranslateY"), 2] = -size.trunc()
        matrices[chosen] = part
    return matrices.float()


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Fetch each pixel from the one nearest to where its matrix points, black from outside.

    Matrices (n, 2, 3, 1, 1) are those of `OperationPlan`.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    factor_x, factor_y, shift = matrices.unbind(2)  # (n, 2, 1, 1) each
    source = factor_x * x + (factor_y * y + shift)  # (n, 2, H, W)
    column = source[:, 0].add_((width - 1) / 2).round_()
    row = source[:, 1].add_((height - 1) / 2).round_()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = torch.where(inside, row * width + column, 0.0).long().flatten(1)[:, None]
    fetched = images.flatten(2).gather(2, pixel.expand(-1, 3, -1)).view_as(images)
    return fetched * inside[:, None]


def _blend(images: Tensor, magnitudes: Tensor, counts: list[int]) -> Tensor:
    """Move away from what an operation degrades to (magnitude above 0) or towards it.

    Args:
        images: (n, 3, H, W) uint8, sorted by operation.
        magnitudes: (n, 1, 1, 1).
        counts: how many images undergo each operation of `_BLENDED`.
    """
    degraded = torch.empty_like(images, dtype=torch.float32)
    parts = torch.split(degraded, counts), torch.split(images, counts)
    for degrade, result, part in zip(_BLENDED.values(), *parts, strict=True):
        if len(part):
            degrade(part, result)
    mixed = (1 + magnitudes) * images - degraded.mul_(magnitudes)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _convert_to_grey(images: Tensor) -> Tensor:
    """Luma without its fraction: (n, 1, H, W) float32."""
    red, green, blue = (weight * images[:, i : i + 1] for i, weight in enumerate(_LUMA))
    return (red + green + blue).trunc()


def _fill_black(images: Tensor, out: Tensor) -> None:
    out.zero_()


def _fill_grey(images: Tensor, out: Tensor) -> None:
    out.copy_(_convert_to_grey(images))


def _fill_mean_grey(images: Tensor, out: Tensor) -> None:
    out.copy_(_convert_to_grey(images).mean((1, 2, 3), keepdim=True))


def _blur(images: Tensor, out: Tensor) -> None:
    """A 3 x 3 blur of centre weight 5; the border has none and stays, as does a tiny image."""
    out.copy_(images)
    if min(images.shape[2:]) >= 3:
        inner = out[:, :, 1:-1, 1:-1]
        inner.copy_((avg_pool2d(out, 3, 1, divisor_override=1) + 4 * inner).div_(13).round_())


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
    counts = values.new_zeros((*values.shape[:2], 256))
    counts.scatter_add_(2, values, torch.ones_like(values))
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalised = table.gather(2, values).to(torch.uint8).view_as(images)
    return torch.where(step[..., None] > 0, equalised, images)


_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_BLENDED: dict[str, Callable[[Tensor, Tensor], None]] = {
    "Brightness": _fill_black,
    "Color": _fill_grey,
    "Contrast": _fill_mean_grey,
    "Sharpness": _blur,
}
"""What writes the float32 pixels, (n, 3, H, W), to which an operation degrades images."""

_PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
NAMES = ("Identity", *_GEOMETRIC, *_BLENDED, *_PHOTOMETRIC)
"""The operations, all equally likely; positions in it are what `plan_operations` takes."""

_IS_GEOMETRIC = torch.tensor([name in _GEOMETRIC for name in NAMES])
_IS_SIGNED = torch.tensor([name in (*_GEOMETRIC, *_BLENDED) for name in NAMES])
