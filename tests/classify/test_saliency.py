from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.classify.models import create_model
from labkit.classify.saliency import choose_method, compute_grad_cam, compute_saliency
from labkit.classify.vit import compute_attention_rollout
from labkit.runtime import InputError


def make_images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def create_pooling_net() -> nn.Sequential:
    """A 1 x 1 convolution to 4 channels, ReLU, mean over all places, 5 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def test_after_mean_pooling_grad_cam_is_the_class_activation_map() -> None:
    """There the mean gradient of a channel is its weight in the classifier, over the places."""
    net, images = create_pooling_net(), make_images(6)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    convolution, classifier = (
        net[index].weight.detach().numpy().reshape(rows, -1) for index, rows in ((0, 4), (4, 5))
    )
    features = np.einsum("kc,bchw->bkhw", convolution, images.numpy())
    features = np.maximum(features + net[0].bias.detach().numpy()[:, None, None], 0)  # type: ignore[union-attr, operator]
    expected = np.maximum(np.einsum("bk,bkhw->bhw", classifier[labels], features), 0)
    expected /= np.maximum(expected.max(axis=(1, 2), keepdims=True), 1e-12)
    np.testing.assert_allclose(compute_grad_cam(net, images, labels).numpy(), expected, atol=1e-5)


class TwoStages(nn.Module):
    """Its head is no pooling, so that every place of the feature map has a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.hidden, self.head = nn.Linear(64, 7), nn.Linear(7, 3)

    def classify(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(features.flatten(1))))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))


def test_gradients_are_those_of_finite_differences() -> None:
    net, images = TwoStages().double(), make_images(2).double()
    with torch.no_grad():
        features = net.features(images)
        chosen = net.classify(features).argmax(1)
        gradient = torch.zeros_like(features)
        for place in np.ndindex(features.shape):
            moved = features[None].repeat(2, 1, 1, 1, 1)
            moved[0][place] += 1e-5
            moved[1][place] -= 1e-5
            high, low = (net.classify(part)[place[0], chosen[place[0]]] for part in moved)
            gradient[place] = (high - low) / 2e-5
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        expected = (weights * features).sum(1).clamp(min=0)
        expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    actual = compute_grad_cam(net, images)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-5)


def test_an_image_is_explained_alike_alone_and_among_others() -> None:
    net, images = create_model("resnet18", num_classes=4), make_images(5, 32)
    together = compute_grad_cam(net, images)
    alone = torch.cat([compute_grad_cam(net, image[None]) for image in images])
    np.testing.assert_allclose(together.numpy(), alone.numpy(), atol=1e-4)


def test_the_map_is_bright_where_the_evidence_is() -> None:
    """A trained network says which colour a small square has; only the square knows."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(400, 3, 32, 32, generator=generator)
    labels = torch.arange(400) % 3
    corners = torch.randint(0, 24, (400, 2), generator=generator)
    for image, label, (top, left) in zip(images, labels, corners.tolist(), strict=True):
        image[label, top : top + 8, left : left + 8] += 3
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.arange(step * 50, step * 50 + 50) % 300
        F.cross_entropy(net(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    test = slice(300, 400)
    assert (net(images[test]).argmax(1) == labels[test]).float().mean() > 0.95
    maps = F.interpolate(compute_grad_cam(net, images[test])[:, None], 32, mode="bilinear")
    peaks = (
        torch.stack(torch.unravel_index(maps.flatten(1).argmax(1), (32, 32)), dim=1) - corners[test]
    )
    assert ((peaks >= -1) & (peaks < 9)).all(dim=1).float().mean() > 0.95


class FrozenStem(nn.Module):
    """Has a branch that the logits do not depend on, frozen weights, and changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True))
        self.stem.requires_grad_(False)
        self.branch = nn.Conv2d(4, 2, 3, padding=1)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 2)
        self.branch.eval()

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images.mul_(2))
        self.branch(features)
        logits: Tensor = self.head(self.drop(features.mean(dim=(2, 3))))
        return logits


def test_the_model_is_left_as_it_was() -> None:
    net, images = FrozenStem(), make_images(3)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    given = images.clone()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        first = compute_grad_cam(net, images)
    torch.testing.assert_close(compute_grad_cam(net, images), first)  # no dropout
    assert not first.requires_grad and not images.requires_grad
    torch.testing.assert_close(images, given, rtol=0, atol=0)
    assert net.training and net.drop.training and not net.branch.training
    assert [p.requires_grad for p in net.parameters()] == 4 * [False] + 4 * [True]
    assert all((parameter.grad == 0.5).all() for parameter in net.parameters())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("create", "image_size", "map_size"),
    [
        (lambda: create_model("resnet18"), 32, 4),  # its last stages give 2 x 2 and 1 x 1
        (lambda: create_model("resnet18"), 224, 7),
        (lambda: create_model("resnet18-3x3"), 32, 4),
        (lambda: create_model("speed", widths=(8, 8, 8)), 32, 3),
        (lambda: create_model("convnext_atto"), 64, 4),  # inside, channels are last
        (create_pooling_net, 2, 2),
        (FrozenStem, 8, 8),
    ],
)
def test_the_last_feature_map_that_tells_places_apart_is_found(
    create: Callable[[], nn.Module], image_size: int, map_size: int
) -> None:
    net, images = create(), make_images(2, image_size)
    assert choose_method(net, images) == "Grad-CAM"
    maps = compute_saliency(net, images)
    assert maps.shape == (2, map_size, map_size)
    assert maps.min() >= 0 and maps.max() <= 1


def test_nothing_that_speaks_for_the_predicted_class_gives_a_dark_map() -> None:
    net = create_pooling_net()
    torch.nn.init.constant_(net[4].weight, -1.0)  # type: ignore[arg-type]
    assert (compute_grad_cam(net, make_images(2)) == 0).all()


def test_a_vision_transformer_shows_its_attention() -> None:
    net = create_model("vit", embed_dim=16, depth=2, num_heads=2).eval()
    images = make_images(2, 32)
    assert choose_method(net, images) == "Attention roll-out"
    torch.testing.assert_close(
        compute_saliency(net, images), compute_attention_rollout(net, images)
    )


def test_a_network_without_feature_maps_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert choose_method(flat, make_images(1)) is None
    with pytest.raises(InputError, match="got Sequential"):
        compute_saliency(flat, make_images(1))
