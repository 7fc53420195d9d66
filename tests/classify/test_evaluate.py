from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from labkit.classify import evaluate as evaluate_module
from labkit.classify.data import ImageData, Split
from labkit.classify.evaluate import evaluate, predict_logits
from labkit.classify.models import create_model
from labkit.runtime import InputError, Precision

FP32 = Precision(autocast_dtype=None, scale_loss=False)


class Brightness(nn.Module):
    """Logits are the mean red, green and blue of the left half: mirroring changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)
        self.seen: list[torch.dtype] = []
        self.devices: list[torch.device] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images @ images.transpose(2, 3)).dtype)
        return self.dropout(self.scale * images[..., : images.shape[3] // 2].mean((2, 3)))

    def to(self, device: torch.device) -> Brightness:  # type: ignore[override]
        self.devices.append(device)
        return super().to(device)


def expected_logits(images: np.ndarray) -> np.ndarray:
    half = images[:, :, : images.shape[2] // 2].astype(np.float64) / 255
    return (half.mean((1, 2)) - 0.5) / 0.25


def test_metrics_are_those_of_the_plain_and_of_the_averaged_view(squares: ImageData) -> None:
    images, labels = squares.test.images, squares.test.labels
    metrics = evaluate(Brightness(), squares.test, mean=[0.5] * 3, std=[0.25] * 3, device="cpu")
    plain, mirrored = expected_logits(images), expected_logits(images[:, :, ::-1])
    exponentials = np.exp(plain)
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(metrics.probabilities, probabilities, atol=1e-5)
    assert metrics.accuracy == np.mean(plain.argmax(1) == labels)
    assert metrics.accuracy_tta == np.mean((plain + mirrored).argmax(1) == labels)
    assert metrics.classes == squares.classes


def test_shifted_views_count_half_as_in_airbench(squares: ImageData) -> None:
    images, labels = squares.test.images, squares.test.labels
    options: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "device": "cpu"}
    metrics = evaluate(Brightness(), squares.test, tta="flip-shift", **options)

    def measure_both(images: np.ndarray) -> np.ndarray:
        return (expected_logits(images) + expected_logits(images[:, :, ::-1])) / 2

    wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [measure_both(wide[:, :-2, :-2]), measure_both(wide[:, 2:, 2:])]
    averaged = (measure_both(images) + np.mean(shifted, axis=0)) / 2
    assert metrics.accuracy_tta == np.mean(averaged.argmax(1) == labels)
    model = Brightness()
    evaluate(model, squares.test, tta="flip-shift", **options)
    assert len(model.seen) == 6


def test_a_shift_moves_left_and_up_and_mirrors_the_border(squares: ImageData) -> None:
    options: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "precision": FP32}
    images = squares.test.images[:3]
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    for shift, view in ((1, wide[:, 2:, 2:]), (-1, wide[:, :-2, :-2])):
        logits = predict_logits(
            Brightness(), images, device=torch.device("cpu"), shift=shift, **options
        )
        np.testing.assert_allclose(logits, expected_logits(view), atol=1e-5)


def test_without_tta_each_image_is_seen_once(squares: ImageData) -> None:
    twice, once = Brightness(), Brightness()
    both = evaluate(twice, squares.test, device="cpu")
    plain = evaluate(once, squares.test, device="cpu", tta="none")
    assert (len(twice.seen), len(once.seen)) == (2, 1)
    assert plain.accuracy == both.accuracy
    assert plain.accuracy_tta is None and plain.accuracy_tta_interval is None


def test_batch_size_changes_nothing_and_modes_are_left_as_found(squares: ImageData) -> None:
    model = Brightness().train()
    model.dropout.eval()
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3, "device": torch.device("cpu")}
    whole, parts = (
        predict_logits(model, squares.test.images, precision=FP32, batch_size=size, **settings)  # type: ignore[arg-type]
        for size in (60, 7)
    )
    torch.testing.assert_close(whole, parts)
    assert model.training and not model.dropout.training


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_the_forward_pass_has_the_precision_that_was_asked_for(
    squares: ImageData, precision: str, dtype: torch.dtype
) -> None:
    model = Brightness()
    evaluate(model, squares.test, precision=precision, device="cpu")  # type: ignore[arg-type]
    assert set(model.seen) == {dtype}


def test_the_model_is_moved_to_the_device_that_auto_means(
    squares: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def pick(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu", 0)

    monkeypatch.setattr(evaluate_module, "pick_device", pick)
    model = Brightness()
    evaluate(model, squares.test)
    assert asked == ["auto"] and model.devices == [torch.device("cpu", 0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_model_on_the_cpu_is_measured_on_the_gpu(squares: ImageData) -> None:
    model = Brightness()
    evaluate(model, squares.test)
    assert model.scale.is_cuda


def test_a_model_of_another_number_of_classes_is_refused(squares: ImageData) -> None:
    split = Split(squares.test.images, squares.test.labels, tuple("abcd"))
    with pytest.raises(InputError, match="4 class names for 3 probabilities"):
        evaluate(Brightness(), split, device="cpu")


def test_images_of_another_size_than_the_model_takes_are_one_clear_error() -> None:
    model = create_model("vit", num_classes=2, embed_dim=16, depth=1, num_heads=2)
    split = Split(np.zeros((4, 48, 48, 3), np.uint8), np.array([0, 1, 0, 1]))
    with pytest.raises(InputError, match=r"cannot classify images of 48 x 48 pixels: .*trained on"):
        evaluate(model, split, device="cpu")
