"""A finished training run: its measurements, its figures, its predictions, its files."""

from __future__ import annotations

import json
import logging
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
from labkit.classify.checkpoint import CONFIG, HISTORY
from labkit.classify.config import TrainConfig
from labkit.classify.data import ImageData, load_data
from labkit.classify.evaluate import evaluate, match_training, predict_logits
from labkit.classify.metrics import Metrics, compute_mcnemar, find_confident_mistakes
from labkit.classify.models import create_from_config
from labkit.classify.saliency import Method, choose_method, compute_saliency
from labkit.classify.sources import crop_square
from labkit.files import open_atomic, write_json
from labkit.images import ImageSource, load_image
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

logger = logging.getLogger(__name__)

MISTAKES = 18
ATTENDED = 8
SIGNIFICANT = 0.05  # a p-value below it tells two runs apart
COMPARED = (
    "run",
    "test accuracy",
    "95 % interval",
    "trained in",
    "against the first",
    "p (McNemar)",
    "so they",
)
WEIGHTS, METRICS, REPORT = "model.safetensors", "metrics.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What training gave.

    Attributes:
        config: the recipe.
        model: the trained network, in evaluation mode.
        data: the images it was trained and tested on.
        history: one row an epoch.
        metrics: measurements on the test split, which was read once.
        facts: what `metrics.json` says beside the metrics: time, speed, memory, device, versions.
        folder: where all of it was saved; None where nothing was.
    """

    config: TrainConfig
    model: nn.Module
    data: ImageData
    history: Sequence[Mapping[str, float]]
    metrics: Metrics
    facts: Mapping[str, Any]
    folder: Path | None

    @property
    def note(self) -> str:
        """What every figure must say on its face; empty for real data."""
        return self.data.note

    @property
    def has_attention(self) -> bool:
        """Whether `attention` has something to show: the model has attention or feature maps."""
        return self._choose_saliency() is not None

    def predict(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.str_]:
        """The most probable class of each image: (N,) names.

        Args:
            images: one image, or a list of images, as `labkit.load_image` takes them: paths,
                addresses, arrays, PIL images; or an array (N, H, W, 3) uint8. The central square
                of each is resized to `config.image_size`.

        Raises:
            InputError: an image cannot be used.
            SourceError: an image could not be read or fetched.
        """
        classes = np.array(self.data.classes)
        names: NDArray[np.str_] = classes[self.predict_proba(images).argmax(1)]
        return names

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """The probability of each class: (N, C) float32; see `predict` for `images`."""
        squares = self._load_squares(images)
        if not len(squares):
            return np.zeros((0, len(self.data.classes)), np.float32)
        device = next(self.model.parameters()).device
        logits = predict_logits(
            self.model,
            squares,
            mean=self.config.mean,
            std=self.config.std,
            device=device,
            precision=_resolve_for(self.config, device),
        )
        probabilities: NDArray[np.float32] = logits.softmax(1).numpy()
        return probabilities

    def _load_squares(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.uint8]:
        """(N, image_size, image_size, 3) of one image or of several."""
        is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        sources: Any = images if is_batch else [images]
        size = self.config.image_size
        squares = [crop_square(load_image(source), size) for source in sources]
        return np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8)

    def learning_curves(self) -> Figure:
        """Loss, accuracy and learning rate by epoch."""
        return viz.plot_learning_curves(self.history, self.note)

    def confusion_matrix(self) -> Figure:
        """How often each class of the test split was taken for each other one."""
        return viz.plot_confusion_matrix(self.metrics.confusion, self.metrics.classes, self.note)

    def calibration(self) -> Figure:
        """Accuracy on the test split against the confidence of the model."""
        return viz.plot_reliability(self.metrics.reliability, self.metrics.ece, self.note)

    def class_scores(self) -> Figure:
        """Recall and precision of each class on the test split."""
        return viz.plot_class_scores(self.metrics.per_class, self.note)

    def mistakes(self, count: int = MISTAKES) -> Figure:
        """The wrong predictions on the test split of which the model was most confident."""
        probabilities, test = self.metrics.probabilities, self.data.test
        wrong = find_confident_mistakes(probabilities, test.labels, count)
        return viz.plot_mistakes(
            test.images[wrong],
            test.labels[wrong],
            probabilities[wrong].argmax(1),
            probabilities[wrong].max(1),
            self.metrics.classes,
            self.note,
        )

    def predictions(self, images: ImageSource | Sequence[ImageSource]) -> Figure:
        """What the model takes images for: each beside its most probable classes.

        Args:
            images: as in `predict`; drawn as the model sees them.

        Raises:
            InputError: an image cannot be used.
            SourceError: an image could not be read or fetched.
        """
        pixels = self._load_squares(images)
        probabilities = self.predict_proba(pixels)
        return viz.plot_predictions(pixels, probabilities, self.data.classes, self.note)

    def attention(self, images: ImageSource | Sequence[ImageSource] | None = None) -> Figure:
        """Where the model looks, and which class it sees there.

        A Vision Transformer shows its attention roll-out (Abnar and Zuidema, 2020), another
        network what speaks for the predicted class: Grad-CAM (Selvaraju et al., 2017).

        Args:
            images: as in `predict`; by default the first 8 of the test split.

        Raises:
            InputError: the model has neither attention nor feature maps (see `has_attention`).
        """
        pixels = self._load_squares(self.data.test.images[:ATTENDED] if images is None else images)
        maps = compute_saliency(self.model, self._normalise(pixels)).cpu().numpy()
        method = self._choose_saliency() or ""
        return viz.plot_attention(pixels, maps, self.predict(pixels).tolist(), self.note, method)

    def _choose_saliency(self) -> Method | None:
        """The method by which `attention` shows where the model looks; None if there is none."""
        return choose_method(self.model, self._normalise(self.data.test.images[:2]))

    def _normalise(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Images (N, H, W, 3) as the model takes them: (N, 3, H, W), on its device."""
        device = next(self.model.parameters()).device
        batch = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).to(device)
        return normalise(batch, self.config.mean, self.config.std)

    def figures(self) -> dict[str, Figure]:
        """All figures of the run by title, as the report shows them."""
        figures = {
            "Learning curves": self.learning_curves(),
            "Confusion matrix": self.confusion_matrix(),
            "Calibration": self.calibration(),
            "Classes": self.class_scores(),
        }
        if self.metrics.accuracy < 1:
            figures["Most confident mistakes"] = self.mistakes()
        if method := self._choose_saliency():
            figures[method] = self.attention()
        return figures

    def to_json(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        return {**self.facts, **self.metrics.to_json()}

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
        """Write `report.html` to the run's folder.

        Raises:
            InputError: the run has no folder.
        """
        if self.folder is None:
            raise InputError("this run has no folder to write a report to; pass out= to fit")
        metrics = self.metrics
        low, high = metrics.accuracy_interval
        facts = {
            "Test accuracy": f"{metrics.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%})",
            "With mirrored view (TTA)": f"{metrics.accuracy_tta:.2%}",
            "Calibration error (ECE)": f"{metrics.ece:.3f}",
            **{key.replace("_", " ").capitalize(): _format(v) for key, v in self.facts.items()},
        }
        rows = [(s.name, s.precision, s.recall, s.f1, s.support) for s in metrics.per_class]
        write_report(
            self.folder / REPORT,
            title=f"{self.config.preset} on {self.data.name}",
            note=self.note,
            facts=facts,
            figures=self.figures(),
            tables={"Per class": Table(("class", "precision", "recall", "F1", "images"), rows)},
        )


def compare_runs(runs: Mapping[str, Run]) -> Figure:
    """Draw the curves of several runs, and whether their test accuracies can be told apart.

    Each run is held against the first one with McNemar's test on the same test images. The
    intervals and the test say what other test images could change, not what another random seed
    would.

    Args:
        runs: two runs or more on the same data, by the names that the figure shows.

    Raises:
        InputError: there are fewer than two runs, or they were measured on different test images.

    Example:
        >>> from labkit import TrainConfig, fit
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        >>> data = ImageData.from_splits((images, np.arange(8) % 2), (images, np.arange(8) % 2))
        >>> run = fit(
        ...     TrainConfig(epochs=1, batch_size=4),
        ...     model=nn.Sequential(nn.Flatten(), nn.Linear(192, 2)),
        ...     data=data,
        ... )
        >>> [axes.get_title(loc="left") for axes in compare_runs({"a": run, "b": run}).axes[:2]]
        ['Loss', 'Accuracy (%)']
    """
    if len(runs) < 2:
        raise InputError(f"compare_runs needs two runs or more, got {len(runs)}")
    first, *others = runs.values()
    names = list(runs)
    for name, run in zip(names[1:], others, strict=True):
        if run.data.fingerprint != first.data.fingerprint:
            raise InputError(
                f"{name!r} was measured on {run.data.name}, the first run on {first.data.name}: "
                "load both with the same data, labkit.load_run(folder, data=data)"
            )
    rows = [(*_describe_accuracy(names[0], first), "", "", "")]
    for name, run in zip(names[1:], others, strict=True):
        rows.append((*_describe_accuracy(name, run), *_describe_difference(run, first)))
    histories = {name: run.history for name, run in runs.items()}
    return viz.plot_comparison(histories, COMPARED, rows, first.note)


def _describe_accuracy(name: str, run: Run) -> tuple[str, str, str, str]:
    low, high = run.metrics.accuracy_interval
    return (
        name,
        f"{100 * run.metrics.accuracy:.2f} %",
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{run.facts['train_seconds']:,.0f} s",
    )


def _describe_difference(run: Run, first: Run) -> tuple[str, str, str]:
    p_value = compute_mcnemar(_find_correct(first), _find_correct(run))
    difference = 100 * (run.metrics.accuracy - first.metrics.accuracy)
    verdict = "can be told apart" if p_value < SIGNIFICANT else "cannot be told apart"
    return f"{difference:+.2f} points", f"{p_value:.2g}", verdict


def _find_correct(run: Run) -> NDArray[np.bool_]:
    """Which images of the test split `run` gets right: (N,)."""
    correct: NDArray[np.bool_] = run.metrics.probabilities.argmax(1) == run.data.test.labels
    return correct


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _resolve_for(config: TrainConfig, device: torch.device) -> Precision:
    """The precision of `config`; what `auto` means where fp16 is not possible, off the GPU."""
    if config.precision == "fp16" and device.type != "cuda":
        logger.warning("the run was trained in fp16, which needs a GPU: measured in fp32 here")
        return resolve_precision("auto", device)
    return resolve_precision(config.precision, device)


def collect_facts(
    config: TrainConfig,
    data: ImageData,
    model: nn.Module,
    history: Sequence[Mapping[str, float]],
    train_seconds: float,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """What `metrics.json` says of how a result was reached.

    `epochs` are also the true passes: every epoch shows each training image once.
    """
    training_images = len(data.train) - config.val_size
    remarks = {"data_remarks": list(data.remarks)} if data.remarks else {}
    return {
        "preset": config.preset,
        "data": data.source,
        "data_name": data.name,
        "data_fingerprint": data.fingerprint,
        **remarks,
        "seed": config.seed,
        "epochs": config.epochs,
        "passes": config.epochs,
        "training_images": training_images,
        "train_accuracy": history[-1]["train_accuracy"],
        "train_seconds": train_seconds,
        "images_per_second": training_images * len(history) / train_seconds,
        "peak_memory_gib": measure_peak_memory(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": describe_device(device),
        "precision": precision.name,
        "versions": get_versions(),
    }


def load_run(
    folder: Path | str,
    *,
    data: ImageData | str | Path | None = None,
    model: nn.Module | None = None,
    device: str = "auto",
) -> Run:
    """The finished run in `folder`, its model measured anew on the test split.

    The images must have the classes and the size that the model was trained on. Classes in
    another order are put into that of the model.

    Args:
        folder: what `out` was in `labkit.fit`.
        data: other images than those it was trained on: a source as `labkit.load_data` takes it,
            which is loaded at the size of the run, or data that is loaded already. It is needed
            for a run on data of your own, as `ImageData.from_splits(train, test)`.
        model: a network that takes the saved weights; needed for a run of a network of your own.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        InputError: there is no finished run in `folder`, it needs `data` or `model`, or `data` has
            other classes or images of another size.
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
    if data is None and config.data == "custom":
        raise InputError(
            f"{folder} was trained on data of your own: "
            "pass data=labkit.ImageData.from_splits(train, test)"
        )
    if model is None and config.model == "custom":
        raise InputError(f"{folder} was trained with a network of your own: pass model=")
    saved = json.loads((folder / METRICS).read_text())
    source = config.data if data is None else data
    if isinstance(source, str | Path):
        source = load_data(str(source), image_size=config.image_size)
    if not isinstance(source, ImageData):
        raise InputError(
            "data must be a source or labkit.ImageData.from_splits(train, test), "
            f"got {type(source).__name__}"
        )
    images = match_training(source, saved.get("classes"), config.image_size, str(folder))
    if saved.get("data_fingerprint", images.fingerprint) != images.fingerprint:
        if data is None:
            logger.warning(
                "%s has changed since %s was trained: the metrics are those of the images that "
                "are there now",
                images.source,
                folder,
            )
        saved["evaluated_on"] = images.name
        saved["evaluated_on_fingerprint"] = images.fingerprint
    target = pick_device(device)
    if model is None:
        model = create_from_config(config, len(images.classes), pretrained=False)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not fit the model: {error}") from error
    model.eval()
    metrics = evaluate(
        model,
        images.test,
        mean=config.mean,
        std=config.std,
        precision=_resolve_for(config, target),
        device=str(target),
    )
    return Run(
        config=config,
        model=model,
        data=images,
        history=[json.loads(line) for line in (folder / HISTORY).read_text().splitlines()],
        metrics=metrics,
        facts={key: value for key, value in saved.items() if key not in metrics.to_json()},
        folder=folder,
    )
