from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.classify.speednet import SpeedNet, compute_patch_moments
from labkit.runtime import InputError, use_seed


@pytest.fixture
def images() -> Tensor:
    """Smooth noise with unequal channels: neighbouring pixels are correlated, as in photographs."""
    draw = torch.randn(40, 3, 13, 13, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(draw, 2, stride=1)
    return smooth * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1) + 0.3


@pytest.fixture
def net() -> SpeedNet:
    with use_seed(0):
        return SpeedNet(image_size=12, widths=(8, 16, 16), num_classes=5)


def numpy_patches(images: Tensor) -> np.ndarray:
    """All 2x2 patches as rows (P, 12), channel first."""
    windows = np.lib.stride_tricks.sliding_window_view(images.double().numpy(), (2, 2), axis=(2, 3))
    return windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 12)


def test_whitened_patches_have_identity_covariance(net: SpeedNet, images: Tensor) -> None:
    net.fit_whitening(images)
    with torch.no_grad():
        responses = net.whitening(images).double().transpose(0, 1).flatten(1).numpy()  # (24, P)
    eigenvalues = np.linalg.eigvalsh(np.cov(numpy_patches(images).T, bias=True))[::-1]
    covariance = np.cov(responses[:12], bias=True)
    np.testing.assert_allclose(covariance, np.diag(eigenvalues / (eigenvalues + 5e-4)), atol=1e-4)
    assert abs(covariance - np.eye(12)).max() < 0.05
    np.testing.assert_allclose(responses.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(responses[12:], -responses[:12], atol=1e-4)


def test_compute_patch_moments_equal_numpys_over_several_chunks() -> None:
    images = torch.randn(1101, 3, 3, 3, generator=torch.Generator().manual_seed(0)) + 5
    mean, covariance = compute_patch_moments(images)
    patches = numpy_patches(images)
    np.testing.assert_allclose(mean.numpy(), patches.mean(0))
    np.testing.assert_allclose(covariance.numpy(), np.cov(patches.T, bias=True), atol=1e-10)


def test_whitening_of_flat_images_stays_finite(net: SpeedNet) -> None:
    net.fit_whitening(torch.full((4, 3, 12, 12), 0.7))
    assert all(torch.isfinite(p).all() for p in net.whitening.parameters())
    assert torch.isfinite(net(torch.randn(2, 3, 12, 12))).all()


@pytest.mark.parametrize("shape", [(0, 3, 12, 12), (4, 1, 12, 12), (3, 12, 12)])
def test_whitening_refuses_other_than_colour_images(net: SpeedNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"needs normalised images \(N, 3, H, W\)"):
        net.fit_whitening(torch.zeros(shape))


def test_training_leaves_the_whitening_filters_and_moves_everything_else(
    net: SpeedNet, images: Tensor
) -> None:
    net.fit_whitening(images)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    labels = torch.arange(len(images)) % 5
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()
    fixed = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    scales = {f"groups.{group}.{layer}.weight" for group in range(3) for layer in (2, 5)}
    assert fixed == {"whitening.weight", *scales}


def test_a_fresh_convolution_passes_its_input_on(net: SpeedNet) -> None:
    convolution: Any = net.groups[1][0]  # type: ignore[index]
    features = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(convolution(features)[:, :8], features)
    assert convolution(features)[:, 8:].abs().min() > 0


def test_running_statistics_keep_six_tenths_of_their_past(net: SpeedNet) -> None:
    norm: Any = net.groups[0][2]  # type: ignore[index]
    features = torch.randn(16, 8, 4, 4) + 3
    norm.train()(features)
    torch.testing.assert_close(norm.running_mean, 0.4 * features.mean(dim=(0, 2, 3)))


def test_the_head_scale_multiplies_the_logits(images: Tensor) -> None:
    with use_seed(0):
        plain = SpeedNet(image_size=12, head_scale=1.0, widths=(8, 8, 8)).eval()
    with use_seed(0):
        scaled = SpeedNet(image_size=12, widths=(8, 8, 8)).eval()
    torch.testing.assert_close(scaled(images) * 9, plain(images))


@pytest.mark.parametrize("size", [9, 32, 45])
def test_any_size_from_the_smallest_on_gives_logits(size: int) -> None:
    net = SpeedNet(image_size=size, widths=(4, 4, 4), num_classes=6).eval()
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, "image_size must be at least 9, got 8"),
        ({"widths": (8, 8)}, "three positive numbers"),
        ({"widths": (8, 0, 8)}, "three positive numbers"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpeedNet(**options)
