"""Batched augmentation on the device, and the loader that cuts training batches.

Every random number is a function of (seed, epoch, index of the image), so that neither order,
nor the number of processes, nor resumption in mid-epoch can change what the model sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.classify.auto_augment import rand_augment, trivial_augment
from labkit.classify.config import TrainConfig
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
    return torch.where(mask[:, None, None, None], images.flip(3), images)


def erase_boxes(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Set one box of each image (B, C, H, W) to 0; boxes are (B,) pixels and may overhang."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])  # (B, H)
    in_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])  # (B, W)
    return images.masked_fill(in_rows[:, None, :, None] & in_columns[:, None, None, :], 0)


def cut_out(images: Tensor, size: int, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Set a square of `size` pixels around a random pixel to 0 (DeVries 2017, 1708.04552)."""
    height, width = images.shape[2:]
    top = integers(seed, epoch, indices, "cutout.top", height) - size // 2
    left = integers(seed, epoch, indices, "cutout.left", width) - size // 2
    sizes = torch.full_like(top, size)
    return erase_boxes(images, top, left, sizes, sizes)


def erase_randomly(
    images: Tensor, probability: float, seed: int, epoch: int, indices: Tensor
) -> Tensor:
    """Set 2 to 33 % of the area of some images to 0 (random erasing; Zhong 2017, 1708.04896)."""

    def draw(stream: str) -> Tensor:
        return uniform(seed, epoch, indices, f"erase.{stream}")

    height, width = images.shape[2:]
    area = height * width * (0.02 + 0.31 * draw("area"))
    aspect = torch.exp(np.log(0.3) * (1 - 2 * draw("aspect")))
    box_height = (area * aspect).sqrt().round().clamp(max=height)
    box_width = (area / aspect).sqrt().round().clamp(max=width)
    top = (draw("top") * (height - box_height + 1)).floor()
    left = (draw("left") * (width - box_width + 1)).floor()
    is_erased = draw("chosen") < probability
    return erase_boxes(images, top, left, box_height * is_erased, box_width)


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


def mixup(images: Tensor, partners: Tensor, weight: Tensor) -> Tensor:
    """Blend `weight` (B,) of each image with the rest of its partner (Zhang 2018, 1710.09412)."""
    return partners + weight[:, None, None, None] * (images - partners)


def cutmix(
    images: Tensor, partners: Tensor, weight: Tensor, centre_y: Tensor, centre_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Paste a box of the partner into each image (Yun 2019, 1905.04899).

    Args:
        images: (B, C, H, W).
        partners: (B, C, H, W).
        weight: (B,) wanted share of the original area.
        centre_y: (B,) centre of the box in [0, 1] of the height.
        centre_x: (B,) likewise of the width.

    Returns:
        The mixed images, and the share (B,) of original area after clipping at the edges.
    """
    height, width = images.shape[2:]
    extent = (1 - weight).sqrt()
    top = ((centre_y * height) - extent * height / 2).round().clamp(0, height)
    bottom = ((centre_y * height) + extent * height / 2).round().clamp(0, height)
    left = ((centre_x * width) - extent * width / 2).round().clamp(0, width)
    right = ((centre_x * width) + extent * width / 2).round().clamp(0, width)
    hole = erase_boxes(torch.ones_like(images[:, :1]), top, left, bottom - top, right - left)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return torch.where(hole.bool(), images, partners), share


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W) from [0, 255] to mean 0 and deviation 1: float32 in channels_last.

    `mean` and `std` hold one number a channel, of pixels in [0, 1].
    """
    _, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1).to(
        torch.float32, memory_format=torch.contiguous_format, copy=True
    )
    # Over flat rows of H * W * 3 the arithmetic is vectorised, over three channels it is not.
    rows = pixels.view(len(images), height * width * channels)
    offset = 255 * torch.tensor(mean, device=images.device).repeat(height * width)
    scale = 1 / (255 * torch.tensor(std, device=images.device).repeat(height * width))
    return rows.sub_(offset).mul_(scale).view(pixels.shape).permute(0, 3, 1, 2)


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


class TrainLoader:
    """A training split on the device, from which augmented batches are cut.

    On a CPU the images stay where they are, memory-mapped: only batches are padded.

    Args:
        split: the training images.
        config: says how they are augmented and normalised.
        device: where batches are made.
        transform: replaces labkit's augmentation: gets each image as a PIL image and gives a
            tensor (3, H, W), uint8 or floats in [0, 1], or a PIL image of the same size. What it
            draws from Python's, NumPy's and torch's generators depends on (seed, epoch, index)
            alone.

    Raises:
        InputError: the padding is too wide to be mirrored.

    Example:
        >>> split = Split(np.zeros((10, 32, 32, 3), np.uint8), np.arange(10))
        >>> loader = TrainLoader(split, TrainConfig(), torch.device("cpu"))
        >>> images, labels = loader.batch(0, torch.tensor([3, 7]))
        >>> images.shape, labels.tolist()
        (torch.Size([2, 3, 32, 32]), [3, 7])
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
        size, width = min(split.images.shape[1:3]), config.augment.pad
        if config.augment.pad_mode == "reflect" and width >= size:
            raise InputError(
                f"pad must be smaller than the image ({size} pixels) where it mirrors, got {width}"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def pixels(self, epoch: int, indices: Tensor) -> Tensor:
        """Images `indices` (B,) as `epoch` shows them, before normalisation: (B, 3, H, W).

        They are uint8, or with `transform` float32, in [0, 255].
        """
        if self._transform is not None:
            return self._transform_images(self._transform, epoch, indices)
        augment, seed = self._config.augment, self._config.seed
        offsets = 2 * augment.pad + 1
        top = integers(seed, epoch, indices, "crop.top", offsets)
        left = integers(seed, epoch, indices, "crop.left", offsets)
        height, width = self._images.shape[1:3]
        wide = pad(self._images.index_select(0, indices), augment.pad, augment.pad_mode)
        images = crop(wide, top, left, height, width)
        if augment.flip != "none":
            images = mirror(images, draw_flips(augment.flip, seed, epoch, indices))
        if augment.auto_augment == "trivial":
            images = trivial_augment(images, seed, epoch, indices)
        elif augment.auto_augment == "rand":
            images = rand_augment(images, seed, epoch, indices)
        return images

    def _transform_images(self, transform: Transform, epoch: int, indices: Tensor) -> Tensor:
        from PIL import Image

        indices = indices.cpu()
        seeds = integers(self._config.seed, epoch, indices, "transform", 2**31)
        height, width = self._split.images.shape[1:3]
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

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of images `indices` as `epoch` shows them.

        Args:
            epoch: counted from 0.
            indices: (B,) int64 positions in the split, on the device.

        Returns:
            Normalised images (B, 3, H, W) float32 in channels_last, and their labels as (B,)
            int64, or as (B, C) float probabilities in an epoch that mixes images.
        """
        images, labels = self._augment(epoch, indices), self._labels[indices]
        augment = self._config.augment
        mixes = augment.mixup > 0 or augment.cutmix > 0
        if not mixes or epoch >= augment.mix_until * self._config.epochs:
            return images, labels
        partners = integers(self._config.seed, epoch, indices, "mix.partner", len(self))
        images, share = self._mix(epoch, indices, images, self._augment(epoch, partners))
        num_classes = len(self._split.classes)
        own = F.one_hot(labels, num_classes)
        other = F.one_hot(self._labels[partners], num_classes)
        return images, share[:, None] * own + (1 - share)[:, None] * other

    def _augment(self, epoch: int, indices: Tensor) -> Tensor:
        augment, seed = self._config.augment, self._config.seed
        images = normalise(self.pixels(epoch, indices), self._config.mean, self._config.std)
        if augment.cutout:
            images = cut_out(images, augment.cutout, seed, epoch, indices)
        if augment.erase:
            images = erase_randomly(images, augment.erase, seed, epoch, indices)
        return images

    def _mix(
        self, epoch: int, indices: Tensor, images: Tensor, partners: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images mixed by mixup or CutMix (a coin decides where both are on), and own shares."""
        augment, seed = self._config.augment, self._config.seed
        if augment.mixup > 0:
            share = draw_beta(augment.mixup, seed, epoch, indices, "mixup.weight")
            blended = mixup(images, partners, share)
            if augment.cutmix == 0:
                return blended, share
        weight = draw_beta(augment.cutmix, seed, epoch, indices, "cutmix.weight")
        centre_y = uniform(seed, epoch, indices, "cutmix.y")
        centre_x = uniform(seed, epoch, indices, "cutmix.x")
        pasted, area = cutmix(images, partners, weight, centre_y, centre_x)
        if augment.mixup == 0:
            return pasted, area
        coin = uniform(seed, epoch, indices, "mix.kind") < 0.5
        return torch.where(coin[:, None, None, None], blended, pasted), torch.where(
            coin, share, area
        )
