"""What a trained network says of images: logits, and `Metrics` of a labelled split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from labkit.classify.augment import normalise
from labkit.classify.config import CIFAR10_MEAN, CIFAR10_STD
from labkit.classify.data import ImageData, Split
from labkit.classify.metrics import Metrics
from labkit.classify.vit import use_eval_mode
from labkit.runtime import (
    InputError,
    Precision,
    PrecisionName,
    as_one_line,
    is_out_of_memory,
    pick_device,
    resolve_precision,
)

TestTimeAugmentation = Literal["none", "flip", "flip-shift"]


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: NDArray[np.uint8],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: Precision,
    flip: bool = False,
    shift: int = 0,
    batch_size: int = 500,
) -> Tensor:
    """Logits of images, batch by batch.

    Args:
        model: takes normalised images (B, 3, H, W), gives logits (B, C).
        images: (N, H, W, 3) uint8, N at least 1.
        mean: channel means that the model was trained with, in [0, 1].
        std: channel deviations that the model was trained with.
        device: where the model is.
        precision: arithmetic of the forward passes.
        flip: show the model the mirror images.
        shift: pixels by which to move the images to the left and up before that; negative for
            right and down. The border is mirrored.
        batch_size: images per forward pass.

    Returns:
        (N, C) float32 on the CPU.
    """
    logits: list[Tensor] = []
    with use_eval_mode(model):
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
            batch = normalise(pixels.permute(0, 3, 1, 2), mean, std)
            with precision.autocast(device):
                view = _shift(batch, shift)
                logits.append(model(view.flip(3) if flip else view).float().cpu())
    return torch.cat(logits)


def _shift(images: Tensor, shift: int) -> Tensor:
    """Images (B, C, H, W) moved by `shift` pixels to the left and up."""
    if shift == 0:
        return images
    width = abs(shift)
    padded = F.pad(images, (width, width, width, width), mode="reflect")
    start = width + shift
    return padded[..., start : start + images.shape[2], start : start + images.shape[3]]


def match_training(
    data: ImageData, classes: Sequence[str] | None, image_size: int, label: str
) -> ImageData:
    """Check that a trained model can be used on `data`, and number its classes as in training.

    Args:
        data: the images.
        classes: the class names in the order of the logits of the model; None if they were not
            saved.
        image_size: height and width in pixels of the images that it was trained on.
        label: what the run is called in messages.

    Returns:
        `data` with its classes in the order of `classes`.

    Raises:
        InputError: the class names are other ones, or the images have another size.

    Example:
        >>> split = Split(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ("cat", "dog"))
        >>> data = ImageData.from_splits(split, split)
        >>> match_training(data, ("dog", "cat"), 8, "the run").test.labels.tolist()
        [1, 0]
    """
    height, width = data.test.images.shape[1:3]
    if (height, width) != (image_size, image_size):
        raise InputError(
            f"{label} was trained on images of {image_size} x {image_size} pixels, but those of "
            f"{data.name} are {height} x {width}; load them with "
            f"labkit.load_data(..., image_size={image_size})"
        )
    if classes is None:
        return data
    try:
        return data.reorder_classes(classes)
    except InputError as error:
        raise InputError(
            f"{label} cannot be used on {data.name}: {error}. Give the data the class names of "
            "the run: labkit.Split(images, labels, classes)"
        ) from error


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    precision: PrecisionName | Precision = "auto",
    device: str = "auto",
    tta: TestTimeAugmentation = "flip",
) -> Metrics:
    """Measure `model` on a labelled split, without and with test-time augmentation.

    Args:
        model: takes normalised images (B, 3, H, W), gives logits (B, C). It is moved to `device`
            and left in the mode (training or evaluation) in which it came.
        split: the images; its class names go into the metrics.
        mean: channel means that the model was trained with, in [0, 1].
        std: channel deviations that the model was trained with.
        precision: arithmetic of the forward passes, as in `TrainConfig`.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        tta: views whose logits are averaged: image and mirror image (`flip`), which takes as long
            again; both also shifted by a pixel either way (`flip-shift`, six views; the shifted
            ones together count half, as in Jordan 2024, arXiv 2404.00498); or none of it.

    Raises:
        InputError: the split is empty, the model cannot classify images of this size, or it gives
            another number of classes.

    Example:
        >>> from labkit.classify.models import create_model
        >>> model = create_model("vit", num_classes=2, embed_dim=16, depth=1, num_heads=2)
        >>> split = Split(np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 0, 1]))
        >>> evaluate(model, split, device="cpu").accuracy
        0.5
    """
    target = pick_device(device)
    model.to(target)
    resolved = (
        precision if isinstance(precision, Precision) else resolve_precision(precision, target)
    )
    options: dict[str, Any] = {"mean": mean, "std": std, "device": target, "precision": resolved}
    try:
        plain = predict_logits(model, split.images, **options)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        height, width = split.images.shape[1:3]
        raise InputError(
            f"model cannot classify images of {height} x {width} pixels: {as_one_line(error)}; "
            "give it images of the size that it was trained on"
        ) from error
    averaged = None
    if tta != "none":
        logits = (plain + predict_logits(model, split.images, **options, flip=True)) / 2
        if tta == "flip-shift":
            shifted = [
                predict_logits(model, split.images, **options, flip=flip, shift=shift)
                for flip in (False, True)
                for shift in (1, -1)
            ]
            logits = (logits + torch.stack(shifted).mean(0)) / 2
        averaged = logits.softmax(1).numpy()
    return Metrics.from_probabilities(
        plain.softmax(1).numpy(), split.labels, split.classes, averaged
    )
