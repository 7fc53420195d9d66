"""Augmented batches a second on a CPU: labkit against the usual torchvision pipeline.

Both give every image of one epoch, cropped with padding 4, mirrored at random and normalised, in
batches of 256. The pixels are random: neither side looks at them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import alternate, summary, write_result
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from labkit import AugmentConfig, Split, TrainConfig
from labkit.classify.augment import TrainLoader
from labkit.rng import permutation

BATCH = 256
CONFIG = TrainConfig(batch_size=BATCH, augment=AugmentConfig(pad=4, flip="random"))


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Images as torchvision's `CIFAR10` keeps and serves them: an array, a PIL image an item."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CONFIG.mean, CONFIG.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self._split.images[index])
        return self._transform(image), int(self._split.labels[index])


def main() -> None:
    """Measure, and write benchmarks/results/loader.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    count = arguments.images
    split = Split(
        rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count)
    )
    labkit_loader = TrainLoader(split, CONFIG, torch.device("cpu"))
    torch_loader = DataLoader(ImageDataset(split), BATCH, shuffle=True, num_workers=2)
    epochs = iter(range(1_000))

    def run_labkit() -> int:
        epoch = next(epochs)
        batches = torch.split(permutation(0, epoch, count), BATCH)
        return sum(len(labels) for _, labels in labkit_loader.batches(epoch, batches))

    def run_torchvision() -> int:
        return sum(len(images) for images, _ in torch_loader)

    rates = alternate({"labkit": run_labkit, "torchvision": run_torchvision}, arguments.rounds)
    ratios = [a / b for a, b in zip(rates["labkit"], rates["torchvision"], strict=True)]
    write_result(
        arguments.out,
        {
            "ratio": summary(ratios)["median"],
            "ratio_spread": summary(ratios),
            "images_per_second": {name: summary(rate) for name, rate in rates.items()},
            "images": count,
            "batch_size": BATCH,
            "torchvision_workers": 2,
        },
    )


if __name__ == "__main__":
    main()
