"""Class probabilities of a trained model, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from labkit.classify.augment import normalise
from labkit.runtime import Precision


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: NDArray[np.uint8],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: Precision,
    batch_size: int = 500,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Class probabilities without and with test-time augmentation.

    The augmentation is the mirror image: the logits of both views are averaged before softmax.
    The model is left in the mode (training or evaluation) in which it came.

    Args:
        model: takes normalised images (B, 3, H, W), gives logits (B, C).
        images: (N, H, W, 3) uint8.
        mean: channel means that the model was trained with, in [0, 1].
        std: channel deviations that the model was trained with.
        device: where the model is.
        precision: arithmetic of the forward passes.
        batch_size: pictures per forward pass.

    Returns:
        Two arrays (N, C) float32 of probabilities: of the plain view, and of both views.
    """
    was_training = model.training
    model.eval()
    plain: list[Tensor] = []
    both: list[Tensor] = []
    try:
        for start in range(0, len(images), batch_size):
            chunk = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
            batch = normalise(chunk.permute(0, 3, 1, 2), mean, std)
            with precision.autocast(device):
                logits, mirrored_logits = model(batch), model(batch.flip(3))
            plain.append(logits.float().softmax(1).cpu())
            both.append(((logits.float() + mirrored_logits.float()) / 2).softmax(1).cpu())
    finally:
        model.train(was_training)
    return torch.cat(plain).numpy(), torch.cat(both).numpy()
