"""A small convolutional net that trains in seconds, after airbench (Jordan 2024, 2404.00498)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.runtime import InputError

PATCH_SIZE = 2
SMALLEST_IMAGE = 9
_CHUNK = 500


def compute_patch_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (12,) and covariance (12, 12), in float64, of all 2x2 patches of images (N, 3, H, W)."""
    total = torch.zeros(12, dtype=torch.float64)
    products = torch.zeros(12, 12, dtype=torch.float64)
    count = 0
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].to("cpu", torch.float64)
        patches = F.unfold(chunk, PATCH_SIZE).transpose(0, 1).flatten(1)  # (12, patches)
        total += patches.sum(dim=1)
        products += patches @ patches.T
        count += patches.shape[1]
    mean = total / count
    return mean, products / count - torch.outer(mean, mean)


def init_whitening(conv: nn.Conv2d, images: Tensor, epsilon: float = 5e-4) -> None:
    """Make the 24 filters of `conv` whiten the patches of `images`, in place.

    Filters are eigenvectors of the patches' covariance over the square root of eigenvalue plus
    `epsilon`, in falling order of eigenvalue, followed by their negatives; biases subtract the
    mean patch. The first 12 responses then have mean 0 and covariance near the identity.

    Args:
        conv: a convolution of 3 to 24 channels with 2x2 kernels and biases.
        images: normalised images (N, 3, H, W); a few thousand are enough.
        epsilon: keeps directions that hardly vary from being blown up.

    Raises:
        InputError: no images, or images of another shape, or `conv` has no bias.
    """
    if images.dim() != 4 or images.shape[1] != 3 or min(images.shape) == 0:
        raise InputError(
            f"whitening needs normalised images (N, 3, H, W), got {tuple(images.shape)}"
        )
    if conv.bias is None:
        raise InputError("whitening needs a convolution with a bias")
    mean, covariance = compute_patch_moments(images)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    filters = (eigenvectors / (eigenvalues.clamp(min=0) + epsilon).sqrt()).T.flip(0)  # (12, 12)
    offsets = -(filters @ mean)
    with torch.no_grad():
        conv.weight.copy_(torch.cat([filters, -filters]).view_as(conv.weight))
        conv.bias.copy_(torch.cat([offsets, -offsets]))


def _create_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that passes on as many channels as it can (dirac initialisation)."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight.detach()[:inputs])
    return conv


def _create_batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with a bias only; its running statistics keep 0.6 of their past per step."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=1 - 0.6)
    norm.weight.requires_grad_(False)
    return norm


def _create_group(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, halving the resolution after the first."""
    return nn.Sequential(
        _create_convolution(inputs, outputs),
        nn.MaxPool2d(2),
        _create_batch_norm(outputs),
        nn.GELU(),
        _create_convolution(outputs, outputs),
        _create_batch_norm(outputs),
        nn.GELU(),
    )


class SpeedNet(nn.Module):
    """Frozen whitening convolution, three groups of convolutions, maximum, scaled linear head.

    Args:
        num_classes: number of classes, the length of the logits.
        image_size: height and width of the images in pixels, at least 9.
        widths: channels of the groups.
        head_scale: factor on the logits.

    Raises:
        InputError: a size is out of range.

    Example:
        >>> SpeedNet(widths=(8, 16, 16))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        widths: Sequence[int] = (64, 256, 256),
        head_scale: float = 1 / 9,
    ) -> None:
        super().__init__()
        if image_size < SMALLEST_IMAGE:
            raise InputError(f"image_size must be at least {SMALLEST_IMAGE}, got {image_size}")
        if len(widths) != 3 or min(widths) < 1:
            raise InputError(f"widths must be three positive numbers, got {list(widths)}")
        self.head_scale = head_scale
        self.whitening = nn.Conv2d(3, 2 * 3 * PATCH_SIZE**2, PATCH_SIZE)
        self.whitening.weight.requires_grad_(False)
        inputs = [self.whitening.out_channels, *widths[:2]]
        self.groups = nn.Sequential(
            *(_create_group(*channels) for channels in zip(inputs, widths, strict=True))
        )
        self.head = nn.Linear(widths[2], num_classes, bias=False)

    def fit_whitening(self, images: Tensor) -> None:
        """Fit the frozen first layer to normalised training images, before training begins.

        images: (N, 3, H, W); see `init_whitening`. The layer's bias stays learnable.
        """
        init_whitening(self.whitening, images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, 3, H, W)."""
        features = self.groups(F.gelu(self.whitening(images))).amax(dim=(2, 3))  # (B, C)
        logits: Tensor = self.head(features) * self.head_scale
        return logits
