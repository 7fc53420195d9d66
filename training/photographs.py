"""Photographs with a label for each pixel, decoded once, and random crops of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from labkit.segment.annotations import load_annotations

UNLABELLED = 255
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
MIN_CROP, MAX_CROP = 128, 192
WHOLE_SHARE = 0.25  # of the crops show the whole photograph
SMALL_SHARE = 0.5  # are MIN_CROP to MAX_CROP pixels high; the rest are larger
RARE_SHARE = 0.6  # have a pixel of a rare class in them by design
MIN_REGION = 0.001  # share of an image that a region, or a class that is present, must cover


@dataclass(frozen=True, eq=False)
class Photographs:
    """Photographs and their label images.

    Attributes:
        images: N arrays (H, W, 3) uint8 RGB.
        labels: N arrays (H, W) uint8, an index of `names` for each pixel, or UNLABELLED.
        names: the names of C classes.
    """

    images: list[np.ndarray]
    labels: list[np.ndarray]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """The share (N, C) of each photograph's pixels that each class covers."""
        count = 1 + UNLABELLED
        rows = [np.bincount(x.ravel(), minlength=count) / x.size for x in self.labels]
        return np.stack(rows)[:, : len(self.names)]

    @functools.cached_property
    def rarity(self) -> np.ndarray:
        """Weights (C,) of the classes, the square root of how rare their pixels are; mean 1."""
        weights = self.shares.mean(axis=0).clip(1e-4) ** -0.5
        return weights / weights.mean()


def read_photographs(folder: Path) -> Photographs:
    """Read annotated images, of any kind that `load_annotations` knows, into memory.

    The classes are the sentences of the annotations. A pixel that no sentence names, or more than
    one, counts as unlabelled.
    """
    images, labels, names = [], [], {}
    for annotated in tqdm(load_annotations(folder), desc=folder.name, disable=None):
        label = np.full(annotated.image.shape[:2], UNLABELLED, dtype=np.uint8)
        count = np.zeros(label.shape, dtype=np.uint8)
        for target in annotated.targets:
            label[target.mask] = names.setdefault(target.sentence, len(names))
            count += target.mask
        label[count != 1] = UNLABELLED
        images.append(annotated.image)
        labels.append(label)
    return Photographs(images, labels, tuple(names))


@dataclass(frozen=True)
class Crop:
    """A part of a photograph.

    Attributes:
        index: the number of the photograph.
        rows: the first row and the one after the last.
        columns: the first column and the one after the last.
        is_mirrored: whether left and right change places.
    """

    index: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    is_mirrored: bool

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Cut the part out of an array (H, W, ...) of the photograph's size."""
        part = array[slice(*self.rows), slice(*self.columns)]
        return np.ascontiguousarray(part[:, ::-1] if self.is_mirrored else part)


def sample_crop(photographs: Photographs, rng: np.random.Generator) -> Crop:
    """Sample a crop of a random photograph, often one that holds a rare class.

    A class is drawn first, a rare one more often than a frequent one, then a photograph that shows
    it and one of its pixels, which comes to lie anywhere in the crop.
    """
    index, centre = int(rng.integers(len(photographs))), None
    if rng.random() < RARE_SHARE:
        shows = photographs.shares > MIN_REGION / 4  # (N, C)
        weights = photographs.rarity * shows.any(axis=0)
        label = int(rng.choice(len(weights), p=weights / weights.sum()))
        index = int(rng.choice(np.flatnonzero(shows[:, label])))
        pixels = np.flatnonzero(photographs.labels[index] == label)
        centre = divmod(int(rng.choice(pixels)), photographs.labels[index].shape[1])
    height, width = photographs.labels[index].shape
    kind = rng.random()
    if kind < WHOLE_SHARE:
        size = (height, width)
    else:
        low, high = MIN_CROP, MAX_CROP
        if kind > WHOLE_SHARE + SMALL_SHARE:
            low, high = MAX_CROP, max(MAX_CROP, height)
        side = np.exp(rng.uniform(np.log(low), np.log(high)))
        stretch = np.exp(rng.uniform(np.log(0.85), np.log(1.35)))
        size = (min(height, round(side)), min(width, round(side * stretch)))
    spans = []
    for axis, (full, length) in enumerate(zip((height, width), size, strict=True)):
        low, high = 0, full - length
        if centre is not None:
            low, high = max(low, centre[axis] - length + 1), min(high, centre[axis])
        start = int(rng.integers(low, high + 1))
        spans.append((start, start + length))
    return Crop(index, spans[0], spans[1], bool(rng.integers(2)))


def cut_image(
    photographs: Photographs, crop: Crop, image_size: int, rng: np.random.Generator | None
) -> torch.Tensor:
    """Cut a crop out of its photograph, squashed to a square and normalised.

    Args:
        photographs: where the crop comes from.
        crop: the part.
        image_size: width and height of the result.
        rng: changes light, contrast, saturation and the balance of colours; None leaves them.

    Returns:
        (3, image_size, image_size) float32.
    """
    pixels = torch.from_numpy(crop.cut(photographs.images[crop.index])).permute(2, 0, 1)[None]
    size = (image_size, image_size)
    image = F.interpolate(pixels.float() / 255, size=size, mode="bilinear", antialias=True)[0]
    if rng is not None:
        light, contrast, saturation = rng.uniform((0.7, 0.75, 0.5), (1.3, 1.25, 1.4))
        balance = torch.from_numpy(rng.uniform(0.92, 1.08, (3, 1, 1))).float()
        image = image * light * balance
        image = image.mean() + contrast * (image - image.mean())
        grey = image.mean(0, keepdim=True)
        image = (grey + saturation * (image - grey)).clamp(0, 1)
    return (image - MEAN) / STD


def cut_cover(photographs: Photographs, crop: Crop, image_size: int) -> torch.Tensor:
    """Measure which share of each pixel of a squashed crop each class covers.

    Returns:
        (C, image_size, image_size) float32 in [0, 1]. Where nothing is labelled, the sum is 0.
    """
    labels = torch.from_numpy(crop.cut(photographs.labels[crop.index]))
    classes = torch.arange(len(photographs.names), dtype=torch.uint8).view(-1, 1, 1)
    one_hot = (labels == classes).float()
    return F.interpolate(one_hot[None], size=(image_size, image_size), mode="area")[0]


def split_regions(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Number the connected regions of a label image (H, W).

    Returns:
        (H, W) int32: 0 where nothing is labelled or the region is smaller than MIN_REGION of the
        image, else a number from 1 on for each region.
    """
    regions, last = np.zeros(labels.shape, dtype=np.int32), 0
    for label in range(num_classes):
        count, numbers, facts, _ = cv2.connectedComponentsWithStats(
            (labels == label).astype(np.uint8), connectivity=8
        )
        for number in range(1, count):
            if facts[number, cv2.CC_STAT_AREA] >= MIN_REGION * labels.size:
                last += 1
                regions[numbers == number] = last
    return regions


class RegionBatches:
    """Batches of random crops, with P connected regions of each; a function of the step."""

    def __init__(
        self,
        photographs: Photographs,
        batch_size: int,
        regions: int,
        *,
        image_size: int,
        augment: bool,
    ) -> None:
        self._photographs, self._batch_size = photographs, batch_size
        self._count, self._image_size, self._augment = regions, image_size, augment

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a batch, of which all parts are image_size wide and high.

        Returns:
            Images (B, 3, H, W), masks (B P, H, W) of regions, which may occur more than once, and
            masks of the same shape that cover the other regions of the image that are among the P.
        """
        rng = np.random.default_rng([step, 5])
        light = rng if self._augment else None
        images, masks, others = [], [], []
        while len(images) < self._batch_size:
            crop = sample_crop(self._photographs, rng)
            chosen = self._choose_regions(crop, rng)
            if len(chosen):
                images.append(cut_image(self._photographs, crop, self._image_size, light))
                masks.append(chosen)
                others.append(chosen.any(0) & ~chosen)
        return torch.stack(images), torch.cat(masks), torch.cat(others)

    def _choose_regions(self, crop: Crop, rng: np.random.Generator) -> torch.Tensor:
        """Choose P regions (P, H, W), or none if there is none: rare classes come more often."""
        labels = crop.cut(self._photographs.labels[crop.index])
        regions = split_regions(labels, len(self._photographs.names))
        size = (self._image_size, self._image_size)
        full = torch.from_numpy(regions.astype(np.float32))[None, None]
        small = F.interpolate(full, size=size, mode="nearest-exact")[0, 0].numpy()
        numbers, first = np.unique(regions, return_index=True)
        is_region = (numbers > 0) & np.isin(numbers, small)
        numbers, classes = numbers[is_region], labels.ravel()[first[is_region]]
        if not len(numbers):
            return torch.zeros((0, *size), dtype=torch.bool)
        weights = self._photographs.rarity[classes] / np.bincount(classes)[classes]
        picks = rng.choice(numbers, self._count, p=weights / weights.sum())
        return torch.from_numpy(small == picks[:, None, None])
