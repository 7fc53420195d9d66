"""Where a network looks: attention roll-out for a Vision Transformer, Grad-CAM for the others.

Sources: Abnar and Zuidema, Quantifying Attention Flow in Transformers, 2020; Selvaraju et al.,
Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, 2017
(arXiv 1610.02391).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from labkit.classify.vit import compute_attention_rollout, has_attention, use_eval_mode
from labkit.runtime import InputError

Method = Literal["Attention roll-out", "Grad-CAM"]

SMALLEST_MAP = 3  # positions in height and width; a smaller map hardly tells places apart


def choose_method(model: nn.Module, images: Tensor) -> Method | None:
    """The method that can show where `model` looks in normalised images (B, 3, H, W).

    Returns:
        `Attention roll-out` for a Vision Transformer that records its attention, `Grad-CAM` for
        another network with feature maps, None for a network with neither.

    Example:
        >>> images = torch.zeros(1, 3, 8, 8)
        >>> choose_method(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), images)
        'Grad-CAM'
        >>> choose_method(nn.Flatten(), images) is None
        True
    """
    if has_attention(model):
        return "Attention roll-out"
    maps, _ = _record_feature_maps(model, images[:2])
    return "Grad-CAM" if maps else None


def compute_saliency(model: nn.Module, images: Tensor) -> Tensor:
    """Where `model` looks in normalised images (B, 3, H, W), by the method that it allows.

    Returns:
        (B, h, w) float32 in [0, 1]; 1 where the model looks most.

    Raises:
        InputError: the model has neither attention nor feature maps (see `choose_method`).
    """
    compute = compute_attention_rollout if has_attention(model) else compute_grad_cam
    return compute(model, images)


@torch.enable_grad()
def compute_grad_cam(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Which places of the last feature map speak for a class (Grad-CAM, Selvaraju et al. 2017).

    Each channel of the map is weighted by the mean gradient of the logit of the class, and only
    what speaks for the class is kept. The last feature map is found by a forward pass: it is the
    last output of a module with shape (B, C, h, w), the proportions of the image and at least
    3 x 3 positions; if all are smaller, it is the last one of the largest. The mode of the model,
    its gradients and its `requires_grad` stay as they are.

    Args:
        model: takes normalised images (B, 3, H, W), gives logits (B, num_classes).
        images: (B, 3, H, W), normalised, on the device of the model.
        labels: (B,) int64, the classes to explain; by default those that the model predicts.

    Returns:
        (B, h, w) float32 in [0, 1], each image scaled to a maximum of 1; all 0 where nothing
        speaks for the class.

    Raises:
        InputError: no module of the model gives a feature map of more than one position.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> compute_grad_cam(model, torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 8, 8])
    """
    maps, logits = _record_feature_maps(model, images)
    if not maps:
        raise InputError(
            f"Grad-CAM needs a network with a feature map (B, C, h, w), such as 'resnet18' or "
            f"'speed', got {type(model).__name__}"
        )
    size = min(SMALLEST_MAP, max(min(features.shape[2:]) for features in maps))
    features = [features for features in maps if min(features.shape[2:]) >= size][-1]
    chosen = logits.argmax(1) if labels is None else labels
    # In evaluation mode no image has an influence on another one: the sum keeps them apart.
    score = logits.gather(1, chosen[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    heat = (weights * features.detach()).sum(dim=1).relu().float()  # (B, h, w)
    peak = heat.amax(dim=(1, 2), keepdim=True)
    return torch.where(peak > 0, heat / peak, 0.0)


@torch.enable_grad()
def _record_feature_maps(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The feature maps (B, C, h, w) of a pass in evaluation mode, the last one last; the logits.

    Only maps that the logits depend on count. Their gradient can be computed whether or not the
    parameters of the model require one.
    """
    maps: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if _is_feature_map(output, images):
            maps.append(output)

    with use_eval_mode(model), _use_hooks(model, record):
        # No leaf, so that a network may change its input in place.
        logits: Tensor = model(images.detach().requires_grad_().clone())
    if not maps or not logits.requires_grad:
        return [], logits
    gradients = torch.autograd.grad(logits.sum(), maps, retain_graph=True, allow_unused=True)
    used = [
        features for features, gradient in zip(maps, gradients, strict=True) if gradient is not None
    ]
    return used, logits


def _is_feature_map(output: Any, images: Tensor) -> bool:
    """Whether `output` is a map (B, C, h, w) of more than one position, in shape like `images`."""
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.requires_grad:
        return False
    height, width = output.shape[2:]
    is_in_proportion = abs(height * images.shape[3] - width * images.shape[2]) < max(
        images.shape[2:]
    )
    is_map = 1 < height <= images.shape[2] and 1 < width <= images.shape[3] and is_in_proportion
    return is_map and len(output) == len(images)


@contextmanager
def _use_hooks(model: nn.Module, record: Any) -> Iterator[None]:
    """Call `record` with every output of every module inside the block."""
    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
