from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import ImageData, Split
from tests.classify.small_cifar import HUB_FILES, TEST_PARQUET, TRAIN_PARQUET


def coloured_squares(count: int, seed: int) -> Split:
    """Three classes that differ in which channel is bright, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 140, (count, 16, 16, 3))
    images[np.arange(count), :, :, labels] += 60
    return Split(images.astype(np.uint8), labels.astype(np.int64), ("red", "green", "blue"))


@pytest.fixture(scope="session")
def squares() -> ImageData:
    return ImageData(
        train=coloured_squares(120, 0),
        test=coloured_squares(60, 1),
        source="squares",
        name="squares",
        fingerprint="squares-0",
    )


@pytest.fixture
def tiny_config() -> TrainConfig:
    """A small ViT with everything that carries state: EMA, dropout, drop-path, mixing."""
    return TrainConfig(
        preset="tiny",
        data="squares",
        image_size=16,
        model="vit",
        model_options={
            "patch_size": 4,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "drop_path_rate": 0.2,
            "head_dropout": 0.2,
        },
        epochs=3,
        batch_size=32,
        learning_rate=3e-3,
        schedule="one-cycle",
        warmup=1 / 3,
        clip_norm=1.0,
        ema_decay=0.9,
        augment=AugmentConfig(
            pad=2,
            flip="random",
            auto_augment="trivial",
            erase=0.2,
            mixup=0.2,
            cutmix=1.0,
            mix_until=0.7,
        ),
    )


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small-cifar"
    (folder / "plain_text").mkdir(parents=True)
    (folder / HUB_FILES["train"]).write_bytes(TRAIN_PARQUET)
    (folder / HUB_FILES["test"]).write_bytes(TEST_PARQUET)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes with two images each in train, one each in test."""
    folder = tmp_path / "animals"
    rng = np.random.default_rng(2)
    for split, count in (("train", 2), ("test", 1)):
        for name in ("cat", "ant"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder
