"""A finished training run: its measurements, its figures, and its folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from labkit import viz
from labkit.classify.augment import normalise
from labkit.classify.config import CIFAR10_MEAN, CIFAR10_STD, TrainConfig
from labkit.classify.data import ImageData, load_data
from labkit.classify.evaluate import predict
from labkit.classify.keeper import CONFIG, HISTORY
from labkit.classify.metrics import Metrics, confident_mistakes
from labkit.classify.models import attention_rollout, has_attention, model_for
from labkit.files import open_atomic, write_json
from labkit.report import Table, write_report
from labkit.runtime import (
    InputError,
    Precision,
    describe_device,
    get_versions,
    measure_peak_memory,
    pick_device,
    resolve_precision,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISTAKES = 18
ATTENDED = 8
WEIGHTS, METRICS, REPORT = "model.safetensors", "metrics.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What training gave.

    Attributes:
        config: the recipe.
        model: trained, in evaluation mode.
        data: the pictures it was trained and tested on.
        history: one row an epoch.
        metrics: of the test split, read once.
        probabilities: (N, C) of the test split, without test-time augmentation.
        facts: what `metrics.json` says beside the metrics: time, speed, memory, device, versions.
        folder: where all of it was saved; None where nothing was.
    """

    config: TrainConfig
    model: nn.Module
    data: ImageData
    history: Sequence[Mapping[str, float]]
    metrics: Metrics
    probabilities: NDArray[np.float32]
    facts: Mapping[str, Any]
    folder: Path | None

    @property
    def note(self) -> str:
        """What every figure must say on its face; empty for real data."""
        return self.data.note

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        return {**self.facts, **self.metrics.to_json()}

    def figures(self) -> dict[str, Figure]:
        """The pictures of the run by title: curves, confusion, calibration, classes, mistakes."""
        metrics, test = self.metrics, self.data.test
        wrong = confident_mistakes(self.probabilities, test.labels, MISTAKES)
        found = {
            "Learning curves": viz.plot_learning_curves(self.history, self.note),
            "Confusion matrix": viz.plot_confusion_matrix(
                metrics.confusion, metrics.classes, self.note
            ),
            "Calibration": viz.plot_reliability(metrics.reliability, metrics.ece, self.note),
            "Classes": viz.plot_class_scores(metrics.per_class, self.note),
        }
        if len(wrong):
            found["Most confident mistakes"] = viz.plot_mistakes(
                test.images[wrong],
                test.labels[wrong],
                self.probabilities[wrong].argmax(1),
                self.probabilities[wrong].max(1),
                metrics.classes,
                self.note,
            )
        if has_attention(self.model):
            found["Attention roll-out"] = self.attention(test.images[:ATTENDED])
        return found

    def attention(self, images: NDArray[np.uint8]) -> Figure:
        """Attention roll-out over `images` (N, H, W, 3) uint8, for a Vision Transformer."""
        device = next(self.model.parameters()).device
        batch = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).to(device)
        maps = attention_rollout(self.model, normalise(batch, self.config.mean, self.config.std))
        return viz.plot_attention(images, maps.cpu().numpy(), note=self.note)

    def save(self) -> None:
        """Write `metrics.json`, weights and `report.html` to the run's folder, if it has one."""
        if self.folder is None:
            return
        from safetensors.torch import save

        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        with open_atomic(self.folder / WEIGHTS) as file:
            file.write(save(state))
        write_json(self.folder / METRICS, self.to_json())
        self.report()

    def report(self) -> None:
        """Write `report.html` to the run's folder."""
        if self.folder is None:
            raise InputError("this run has no folder to write a report to; pass out= to fit")
        metrics = self.metrics
        low, high = metrics.accuracy_interval
        facts = {
            "Test accuracy": f"{metrics.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%})",
            "With mirrored view (TTA)": f"{metrics.accuracy_tta:.2%}",
            "Calibration error (ECE)": f"{metrics.ece:.3f}",
            **{key.replace("_", " ").capitalize(): _readable(v) for key, v in self.facts.items()},
        }
        rows = [(s.name, s.precision, s.recall, s.f1, s.support) for s in metrics.per_class]
        table = Table(("class", "precision", "recall", "F1", "pictures"), rows)
        write_report(
            self.folder / REPORT,
            title=f"{self.config.preset} on {self.data.name}",
            note=self.note,
            facts=facts,
            figures=self.figures(),
            tables={"Per class": table},
        )


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def evaluate(
    model: nn.Module,
    data: ImageData,
    *,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    precision: Precision | None = None,
) -> tuple[Metrics, NDArray[np.float32]]:
    """Measure `model`, where it is, on the test split of `data`.

    Args:
        model: takes normalised images (B, 3, H, W), gives logits (B, C).
        data: its test split is read once.
        mean: channel means that the model was trained with.
        std: channel deviations that the model was trained with.
        precision: arithmetic of the forward passes; None is what `auto` means on the device.

    Returns:
        The metrics, and the class probabilities (N, C) they were taken from.
    """
    device = next(model.parameters()).device
    plain, both = predict(
        model,
        data.test.images,
        mean=mean,
        std=std,
        device=device,
        precision=precision or resolve_precision("auto", device),
    )
    return Metrics.from_probabilities(plain, data.test.labels, data.classes, both), plain


def training_facts(
    config: TrainConfig,
    data: ImageData,
    model: nn.Module,
    history: Sequence[Mapping[str, float]],
    train_seconds: float,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """What `metrics.json` says of how a result was reached.

    `epochs` are also the true passes: every epoch shows each training picture once.
    """
    trained_on = len(data.train) - config.hold_out
    return {
        "preset": config.preset,
        "data": data.source,
        "data_name": data.name,
        "seed": config.seed,
        "epochs": config.epochs,
        "passes": config.epochs,
        "training_pictures": trained_on,
        "train_accuracy": history[-1]["train_accuracy"],
        "train_seconds": train_seconds,
        "images_per_second": trained_on * len(history) / train_seconds,
        "peak_memory_gib": measure_peak_memory(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": describe_device(device),
        "precision": precision.name,
        "versions": get_versions(),
    }


def load_run(folder: Path | str, *, data: ImageData | None = None, device: str = "auto") -> Run:
    """The finished run in `folder`, its model evaluated anew.

    Raises:
        InputError: there is no finished run in `folder`.
        SourceError: the data it was trained on could not be had.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    missing = [name for name in (CONFIG, HISTORY, METRICS, WEIGHTS) if not (folder / name).exists()]
    if missing:
        raise InputError(
            f"{folder} holds no finished run ({', '.join(missing)} missing); "
            "train one with: labkit train --out FOLDER"
        )
    config = TrainConfig.from_json(json.loads((folder / CONFIG).read_text()))
    data = load_data(config.data, image_size=config.image_size) if data is None else data
    place = pick_device(device)
    model = model_for(config, len(data.classes), pretrained=False)
    model.load_state_dict(load_file(folder / WEIGHTS))
    model.to(place).eval()
    metrics, probabilities = evaluate(model, data, mean=config.mean, std=config.std)
    saved = json.loads((folder / METRICS).read_text())
    return Run(
        config=config,
        model=model,
        data=data,
        history=[json.loads(line) for line in (folder / HISTORY).read_text().splitlines()],
        metrics=metrics,
        probabilities=probabilities,
        facts={key: value for key, value in saved.items() if key not in metrics.to_json()},
        folder=folder,
    )
