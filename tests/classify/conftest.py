from __future__ import annotations

import numpy as np
import pytest

from labkit.classify.config import AugmentConfig, TrainConfig
from labkit.classify.data import ImageData, Split


def coloured_squares(count: int, seed: int) -> Split:
    """Three classes that differ in which channel is bright, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 140, (count, 16, 16, 3))
    images[np.arange(count), :, :, labels] += 60
    return Split(images.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="session")
def squares() -> ImageData:
    return ImageData(
        train=coloured_squares(120, 0),
        test=coloured_squares(60, 1),
        classes=("red", "green", "blue"),
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
            "patch": 4,
            "width": 16,
            "depth": 2,
            "heads": 2,
            "drop_path": 0.2,
            "head_dropout": 0.2,
        },
        epochs=3,
        batch_size=32,
        learning_rate=3e-3,
        schedule="one-cycle",
        warmup_epochs=1,
        clip_norm=1.0,
        ema_decay=0.9,
        augment=AugmentConfig(
            pad=2, flip="random", policy="trivial", erase=0.2, mixup=0.2, cutmix=1.0, mix_until=0.7
        ),
    )
