"""Batched augmentation on the device, and the loader that makes training batches.

Every random number is a function of (seed, epoch, index of the image), so that neither order,
nor the number of processes, nor resumption in mid-epoch can change what the model sees. Only whom
an image is mixed with depends on the order too: mixup and CutMix mix neighbours in the batch of all
processes, and processes share a batch in pairs of neighbours.

All that is random is drawn on the CPU and moved to the device once an epoch, so that no batch makes
the device wait for the host.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.classify.auto_augment import (
    OperationPlan,
    apply_operations,
    draw_rand,
    draw_trivial,
    plan_operations,
)
from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import Split, as_pixels, check_unit_range
from labkit.images import scale_to_uint8
from labkit.rng import integers, uniform
from labkit.runtime import InputError, use_seed

Transform = Callable[[Any], Any]
"""A PIL image to a PIL image, or to a tensor (3, H, W), uint8 or floats in [0, 1]."""


def draw_flips(flip: str, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Draw which images are mirrored: (B,) bool.

    `alternating` mirrors a random half in even epochs and the other half in odd ones, so that
    two epochs show every image both ways (Jordan 2024, arXiv 2404.00498, section 3.6).
    """
    if flip == "none":
        return torch.zeros_like(indices, dtype=torch.bool)
    if flip == "random":
        return uniform(seed, epoch, indices, "flip") < 0.5
    return (uniform(seed, 0, indices, "flip") < 0.5) ^ (epoch % 2 == 1)


def mirror(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror images (B, C, H, W) left-right where `mask` (B,) is true."""
    return torch.where(mask.view(-1, 1, 1, 1), images.flip(3), images)


def find_inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Find the pixels of each box: (B, 1, height, width) bool.

    Boxes (B, 4) are XYXY in pixels, the last two beyond the box; they may overhang.
    """
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (B, 1) each
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    in_rows = (rows >= top) & (rows < bottom)  # (B, H)
    in_columns = (columns >= left) & (columns < right)  # (B, W)
    return (in_rows[:, :, None] & in_columns[:, None]).unsqueeze(1)


def erase_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Set one box of each image (B, C, H, W) to 0; boxes (B, 4) as in `find_inside`."""
    return images.masked_fill(find_inside(boxes, *images.shape[2:]), 0)


def paste_boxes(images: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
    """Paste a box of its partner into each image (B, C, H, W); boxes (B, 4) as in `find_inside`."""
    return torch.where(find_inside(boxes, *images.shape[2:]), partners, images)


def draw_cutout_boxes(
    size: int, seed: int, epoch: int, indices: Tensor, height: int, width: int
) -> Tensor:
    """Draw a square of `size` pixels around a random pixel of each image.

    Returns (B, 4) int64 boxes as in `find_inside` (Cutout; DeVries 2017, 1708.04552).
    """
    top = integers(seed, epoch, indices, "cutout.top", height) - size // 2
    left = integers(seed, epoch, indices, "cutout.left", width) - size // 2
    return torch.stack([left, top, left + size, top + size], 1)


def draw_erased_boxes(
    probability: float, seed: int, epoch: int, indices: Tensor, height: int, width: int
) -> Tensor:
    """Draw for some images a box of 2 to 33 % of their area.

    Returns (B, 4) int64 boxes as in `find_inside`, of which those of other images are empty
    (random erasing; Zhong 2017, 1708.04896).
    """

    def draw(stream: str) -> Tensor:
        return uniform(seed, epoch, indices, f"erase.{stream}")

    area = height * width * (0.02 + 0.31 * draw("area"))
    aspect = torch.exp(math.log(0.3) * (1 - 2 * draw("aspect")))
    box_height = (area * aspect).sqrt().round().clamp(max=height)
    box_width = (area / aspect).sqrt().round().clamp(max=width)
    top = (draw("top") * (height - box_height + 1)).floor()
    left = (draw("left") * (width - box_width + 1)).floor()
    bottom = top + box_height * (draw("chosen") < probability)
    return torch.stack([left, top, left + box_width, bottom], 1).long()


def draw_beta(alpha: float, seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """Draw from Beta(alpha, alpha), one number an image: (B,) floats in [0, 1].

    The distribution function is inverted; for alpha = 1 it is the identity.
    """
    draws = uniform(seed, epoch, indices, stream)
    if alpha == 1.0:
        return draws
    from scipy.special import betaincinv

    quantiles = betaincinv(alpha, alpha, draws.cpu().double().numpy())
    return torch.from_numpy(quantiles).to(draws)


def draw_mix(
    augment: AugmentConfig, seed: int, epoch: int, indices: Tensor, height: int, width: int
) -> dict[str, Tensor]:
    """Draw how each image is mixed with its partner; a coin decides where both ways are on.

    Args:
        augment: its `mixup` or `cutmix` is above 0.
        seed: any int.
        epoch: any int.
        indices: (B,) integers, one an image.
        height: height of the images in pixels.
        width: width of the images in pixels.

    Returns:
        `share`, what the label of the image keeps, (B,) in [0, 1]; with mixup `weight` (B,), the
        share of the image in the blend; with CutMix `box` (B, 4), what is pasted. Images blended
        have an empty box, others weight 1.
    """
    drawn: dict[str, Tensor] = {}
    if augment.mixup:
        weight = draw_beta(augment.mixup, seed, epoch, indices, "mixup.weight")
        drawn["weight"] = drawn["share"] = weight
    if augment.cutmix:
        kept = draw_beta(augment.cutmix, seed, epoch, indices, "cutmix.weight")
        centre_y = uniform(seed, epoch, indices, "cutmix.y")
        centre_x = uniform(seed, epoch, indices, "cutmix.x")
        drawn["box"], drawn["share"] = place_boxes(kept, centre_y, centre_x, height, width)
    if augment.mixup and augment.cutmix:
        is_blended = uniform(seed, epoch, indices, "mix.kind") < 0.5
        drawn["share"] = torch.where(is_blended, weight, drawn["share"])
        drawn["weight"] = torch.where(is_blended, weight, 1.0)
        drawn["box"] = drawn["box"] * ~is_blended[:, None]
    return drawn


def place_boxes(
    kept: Tensor, centre_y: Tensor, centre_x: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Place the boxes of CutMix (Yun 2019, 1905.04899).

    Args:
        kept: (B,) wanted share of the original area.
        centre_y: (B,) centre of the box in [0, 1] of the height.
        centre_x: (B,) likewise of the width.
        height: height of the images in pixels.
        width: width of the images in pixels.

    Returns:
        (B, 4) int64 boxes as in `find_inside`, clipped at the edges, and the share (B,) of the
        original area outside them.
    """
    extent = (1 - kept).sqrt()
    top = ((centre_y * height) - extent * height / 2).round().clamp(0, height)
    bottom = ((centre_y * height) + extent * height / 2).round().clamp(0, height)
    left = ((centre_x * width) - extent * width / 2).round().clamp(0, width)
    right = ((centre_x * width) + extent * width / 2).round().clamp(0, width)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.stack([left, top, right, bottom], 1).long(), share


def find_partners(batch_sizes: Sequence[int]) -> Tensor:
    """Find whom each image of each batch is mixed with, as positions in its batch.

    The images of a pair of neighbours are partners of each other; where their number is odd, the
    last one is its own. A batch is in random order, so that neighbours are random partners.

    Returns:
        (N,) int64, batch after batch.

    Example:
        >>> find_partners([4, 3]).tolist()
        [1, 0, 3, 2, 1, 0, 2]
    """
    return torch.cat([(torch.arange(size) ^ 1).clamp_(max=size - 1) for size in batch_sizes])


def mixup(images: Tensor, partners: Tensor, weight: Tensor) -> Tensor:
    """Blend `weight` (B,) of each image with the rest of its partner (Zhang 2018, 1710.09412)."""
    return torch.lerp(partners, images, weight.view(-1, 1, 1, 1))


def make_scaling(
    mean: Sequence[float], std: Sequence[float], height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `scale_pixels` subtracts and multiplies by, each (height * width * 3,) float32.

    `mean` and `std` hold one number a channel, of pixels in [0, 1].
    """
    # Over flat rows of H * W * 3 the arithmetic is vectorised, over three channels it is not.
    offset = 255 * torch.tensor(mean, device=device).repeat(height * width)
    scale = 1 / (255 * torch.tensor(std, device=device).repeat(height * width))
    return offset, scale


def scale_pixels(images: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """`normalise` images (B, 3, H, W) by what `make_scaling` made once for many batches."""
    pixels = images.permute(0, 2, 3, 1).to(
        torch.float32, memory_format=torch.contiguous_format, copy=True
    )
    rows = pixels.view(len(images), len(offset))
    return rows.sub_(offset).mul_(scale).view(pixels.shape).permute(0, 3, 1, 2)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W) from [0, 255] to mean 0 and deviation 1: float32 in channels_last.

    `mean` and `std` hold one number a channel, of pixels in [0, 1].
    """
    height, width = images.shape[2:]
    return scale_pixels(images, *make_scaling(mean, std, height, width, images.device))


def pad(images: Tensor, width: int, mode: str) -> Tensor:
    """Add `width` pixels on every side of images (B, H, W, C), black or mirrored (`reflect`)."""
    if width == 0:
        return images
    if mode == "zero":
        return F.pad(images, (0, 0, width, width, width, width))
    for axis in (1, 2):
        size = images.shape[axis]
        before = images.narrow(axis, 1, width).flip(axis)
        after = images.narrow(axis, size - width - 1, width).flip(axis)
        images = torch.cat([before, images, after], axis)
    return images


def crop(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Cut a window (B, C, height, width) out of images (B, H, W, C) at `top` and `left` (B,)."""
    windows = images.unfold(1, height, 1).unfold(2, width, 1)  # (B, rows, columns, C, h, w)
    return windows[torch.arange(len(images), device=images.device), top, left]


@dataclass(frozen=True)
class _BatchPlan:
    """All that is random in a batch: on the device, but for the indices, which are on the CPU."""

    epoch: int
    indices: Tensor
    drawn: Mapping[str, Tensor]
    operations: Sequence[OperationPlan]


class TrainLoader:
    """A training split on the device, from which augmented batches are made.

    On a CPU the images stay where they are, memory-mapped: only batches are padded.

    Args:
        split: the training images.
        config: says how they are augmented and normalised.
        device: where batches are made.
        transform: replaces labkit's augmentation: gets each image as a PIL image and gives a
            tensor (3, H, W), uint8 or floats in [0, 1], or a PIL image of the same size. What it
            draws from Python's, NumPy's and torch's generators depends on (seed, epoch, index)
            alone. It runs on the host, so that a GPU waits for each batch.

    Raises:
        InputError: the padding is too wide to be mirrored.

    Example:
        >>> split = Split(np.zeros((10, 32, 32, 3), np.uint8), np.arange(10))
        >>> loader = TrainLoader(split, TrainConfig(), torch.device("cpu"))
        >>> for images, labels in loader.batches(0, [torch.tensor([3, 7]), torch.tensor([1])]):
        ...     print(images.shape, labels.tolist())
        torch.Size([2, 3, 32, 32]) [3, 7]
        torch.Size([1, 3, 32, 32]) [1]
    """

    def __init__(
        self,
        split: Split,
        config: TrainConfig,
        device: torch.device,
        transform: Transform | None = None,
    ) -> None:
        self._split, self._config, self._device = split, config, device
        self._transform = transform
        self._labels = torch.from_numpy(split.labels).to(device)
        if transform is None:
            self._images = torch.from_numpy(split.images).to(device)
        self._size = height, width = split.images.shape[1], split.images.shape[2]
        self._scaling = make_scaling(config.mean, config.std, height, width, device)
        self._mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        if self._mixes:
            self._one_hot = torch.eye(len(split.classes), device=device)
        size, border = min(height, width), config.augment.pad
        if config.augment.pad_mode == "reflect" and border >= size:
            raise InputError(
                f"pad must be smaller than the image ({size} pixels) where it mirrors, got {border}"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def batches(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Make the batches of `epoch`, or those that are left of it.

        All that is random in them is drawn, and moved to the device, before the first.

        Args:
            epoch: counted from 0.
            batches: for each the positions (B,) int64 of its images in the split, on the CPU. With
                mixup and CutMix, neighbours are mixed (see `find_partners`).

        Yields:
            Normalised images (B, 3, H, W) float32 in channels_last, and their labels as (B,)
            int64, or as (B, C) float probabilities in an epoch that mixes images.
        """
        for plan in self._plan(epoch, batches):
            yield self._make_batch(plan)

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Make the one batch of images `indices` (B,), as `batches` does."""
        return next(self.batches(epoch, [indices.cpu()]))

    def pixels(self, epoch: int, indices: Tensor) -> Tensor:
        """Images `indices` (B,) as `epoch` shows them, before normalisation: (B, 3, H, W).

        They are uint8, or with `transform` float32, in [0, 255].
        """
        return self._make_pixels(next(self._plan(epoch, [indices.cpu()])))

    def _plan(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[_BatchPlan]:
        if not batches:
            return
        batch_sizes = [len(batch) for batch in batches]
        indices = torch.cat(list(batches))
        drawn = self._draw(epoch, indices)
        if self._is_mixing(epoch):
            drawn["partner"] = find_partners(batch_sizes)
        parts = {
            name: torch.split(draws.to(self._device), batch_sizes) for name, draws in drawn.items()
        }
        operations = [
            plan_operations(*step, batch_sizes, *self._size, self._device)
            for step in self._draw_policy(epoch, indices)
        ]
        for number, batch in enumerate(batches):
            yield _BatchPlan(
                epoch,
                batch,
                {name: part[number] for name, part in parts.items()},
                [plans[number] for plans in operations],
            )

    def _is_mixing(self, epoch: int) -> bool:
        return self._mixes and epoch < self._config.augment.mix_until * self._config.epochs

    def _draw(self, epoch: int, indices: Tensor) -> dict[str, Tensor]:
        """Draw all but the operations of `auto_augment`: by name, one row an image, on the CPU."""
        augment, counter = self._config.augment, (self._config.seed, epoch, indices)
        drawn = {"index": indices}
        if augment.pad:
            offsets = 2 * augment.pad + 1
            drawn["top"] = integers(*counter, "crop.top", offsets)
            drawn["left"] = integers(*counter, "crop.left", offsets)
        if augment.flip != "none":
            drawn["is_mirrored"] = draw_flips(augment.flip, *counter)
        if augment.cutout:
            drawn["cutout"] = draw_cutout_boxes(augment.cutout, *counter, *self._size)
        if augment.erase:
            drawn["erased"] = draw_erased_boxes(augment.erase, *counter, *self._size)
        if self._is_mixing(epoch):
            drawn |= draw_mix(augment, *counter, *self._size)
        return drawn

    def _draw_policy(self, epoch: int, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
        counter = (self._config.seed, epoch, indices)
        if self._config.augment.auto_augment == "trivial":
            return draw_trivial(*counter)
        if self._config.augment.auto_augment == "rand":
            return draw_rand(*counter, *self._size)
        return []

    def _make_batch(self, plan: _BatchPlan) -> tuple[Tensor, Tensor]:
        drawn = plan.drawn
        images = scale_pixels(self._make_pixels(plan), *self._scaling)
        if "cutout" in drawn:
            images = erase_boxes(images, drawn["cutout"])
        if "erased" in drawn:
            images = erase_boxes(images, drawn["erased"])
        labels = self._labels.index_select(0, drawn["index"])
        if "partner" not in drawn:
            return images, labels
        rows = images.permute(0, 2, 3, 1)  # contiguous
        partners = rows.index_select(0, drawn["partner"]).permute(0, 3, 1, 2)
        if "weight" in drawn:
            images = mixup(images, partners, drawn["weight"])
        if "box" in drawn:
            images = paste_boxes(images, partners, drawn["box"])
        own = self._one_hot.index_select(0, labels)
        other = own.index_select(0, drawn["partner"])
        return images, torch.lerp(other, own, drawn["share"][:, None])

    def _make_pixels(self, plan: _BatchPlan) -> Tensor:
        if self._transform is not None:
            return self._transform_images(self._transform, plan.epoch, plan.indices)
        augment, drawn = self._config.augment, plan.drawn
        images = self._images.index_select(0, drawn["index"])
        if augment.pad:
            wide = pad(images, augment.pad, augment.pad_mode)
            images = crop(wide, drawn["top"], drawn["left"], *self._size)
        else:
            images = images.permute(0, 3, 1, 2)
        if "is_mirrored" in drawn:
            images = mirror(images, drawn["is_mirrored"])
        for operations in plan.operations:
            images = apply_operations(images, operations)
        return images

    def _transform_images(self, transform: Transform, epoch: int, indices: Tensor) -> Tensor:
        from PIL import Image

        seeds = integers(self._config.seed, epoch, indices, "transform", 2**31)
        height, width = self._size
        images = torch.empty(len(indices), 3, height, width)
        with use_seed(0):  # restores all generators at the end
            for row, (index, seed) in enumerate(zip(indices.tolist(), seeds.tolist(), strict=True)):
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)  # 100 times as fast as torch.manual_seed
                if self._device.type == "cuda":
                    torch.cuda.manual_seed_all(seed)
                image = transform(Image.fromarray(self._split.images[index]))
                if not isinstance(image, Tensor):
                    image = torch.from_numpy(as_pixels(image, "transform")).permute(2, 0, 1)
                if image.shape != images.shape[1:]:
                    raise InputError(
                        f"transform must give (3, {height}, {width}), the size of the images, "
                        f"got {tuple(image.shape)}"
                    )
                if image.is_floating_point():
                    check_unit_range(image, "the image that transform gave")
                    image = image * 255
                elif image.dtype != torch.uint8:
                    array = scale_to_uint8(image.cpu().numpy(), "the image that transform gave")
                    image = torch.from_numpy(array)
                images[row] = image
        return images.to(self._device)
