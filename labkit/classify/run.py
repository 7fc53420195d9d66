"""A finished training run: its measurements, its figures, its predictions, its files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from labkit import viz
from labkit.classify.augment import normalise
from labkit.classify.checkpoint import CONFIG, HISTORY, METRICS
from labkit.classify.config import TrainConfig
from labkit.classify.data import ImageData, load_data
from labkit.classify.evaluate import evaluate, match_training, predict_logits
from labkit.classify.metrics import Metrics, compute_mcnemar, find_confident_mistakes
from labkit.classify.models import create_from_config
from labkit.classify.saliency import Method, choose_method, compute_saliency
from labkit.classify.sources import crop_square
from labkit.classify.trainer import TrainState
from labkit.files import (
    compute_checksum,
    describe_unreadable,
    open_atomic,
    parse_json,
    write_json,
    write_json_lines,
)
from labkit.images import ImageSource, load_image
from labkit.report import Table, write_report
from labkit.runtime import (
    InputError,
    LabkitError,
    Precision,
    as_one_line,
    describe_device,
    get_versions,
    measure_peak_memory,
    pick_device,
    resolve_precision,
    use_seed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

T = TypeVar("T")

MISTAKES = 18
ATTENDED = 8
TIMED = "steps, loading, augmentation and callbacks; not validation, checkpoints or start-up"
GPU_MEMORY = "of tensors on the GPU, since this run was started or resumed"
PROCESS_MEMORY = "of the whole process with its libraries and data, since it was started"
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
WEIGHTS, REPORT = "model.safetensors", "report.html"


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained network that names what images show; it needs no data.

    Attributes:
        config: the recipe that it was trained by.
        model: the network, in evaluation mode.
        classes: class names in the order of its logits.
        note: what every figure must say on its face; empty for a network trained on real data.
    """

    config: TrainConfig
    model: nn.Module
    classes: Sequence[str]
    note: str = ""

    def predict(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.str_]:
        """The most probable class of each image: (N,) names; see `Run.predict`."""
        names: NDArray[np.str_] = np.array(self.classes)[self.predict_proba(images).argmax(1)]
        return names

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """The probability of each class: (N, C) float32; see `Run.predict`."""
        squares = self.load_squares(images)
        if not len(squares):
            return np.zeros((0, len(self.classes)), np.float32)
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

    def load_squares(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.uint8]:
        """What the network sees of each image: (N, image_size, image_size, 3) uint8."""
        is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        sources: Any = images if is_batch else [images]
        size = self.config.image_size
        squares = [crop_square(load_image(source), size) for source in sources]
        return np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8)


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
    def is_on_other_data(self) -> bool:
        """Whether it was measured on other images than those of the run in its folder."""
        return "evaluated_on" in self.facts

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
        return self.classifier.predict(images)

    def predict_proba(self, images: ImageSource | Sequence[ImageSource]) -> NDArray[np.float32]:
        """The probability of each class: (N, C) float32; see `predict` for `images`."""
        return self.classifier.predict_proba(images)

    @property
    def classifier(self) -> Classifier:
        """The network with what it needs to name images, without the data."""
        return Classifier(
            config=self.config, model=self.model, classes=self.data.classes, note=self.note
        )

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
        pixels = self.classifier.load_squares(images)
        probabilities = self.predict_proba(pixels)
        return viz.plot_predictions(pixels, probabilities, self.data.classes, note=self.note)

    def attention(self, images: ImageSource | Sequence[ImageSource] | None = None) -> Figure:
        """Where the model looks, and which class it sees there.

        A Vision Transformer shows its attention roll-out (Abnar and Zuidema, 2020), another
        network what speaks for the predicted class: Grad-CAM (Selvaraju et al., 2017).

        Args:
            images: as in `predict`; by default the first 8 of the test split.

        Raises:
            InputError: the model has neither attention nor feature maps (see `has_attention`).
        """
        shown = self.data.test.images[:ATTENDED] if images is None else images
        pixels = self.classifier.load_squares(shown)
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

    def save(self, folder: Path | str | None = None) -> None:
        """Write `metrics.json`, weights and `report.html` to a folder.

        Args:
            folder: None takes that of the run, and writes nothing if it has none. A folder of
                its own gets the recipe and the history too, so that `load_run` can read it.

        Raises:
            InputError: the run was measured on other data than those it was trained on, and
                `folder` is that of the original.
            SourceError: something could not be written.
        """
        if folder is None and self.folder is None:
            return
        from safetensors.torch import save

        target = self._choose_folder(folder)
        state = {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        with open_atomic(target / WEIGHTS) as file:
            file.write(save(state))
        if target != self.folder:
            write_json(target / CONFIG, self.config.to_json())
            write_json_lines(target / HISTORY, [dict(row) for row in self.history])
        digest = compute_checksum(target / WEIGHTS)
        write_json(target / METRICS, {**self.to_json(), "weights_sha256": digest})
        self.report(target)

    def _choose_folder(self, folder: Path | str | None) -> Path:
        """`folder`, or that of the run; never that of a run whose files would be overwritten."""
        own = self.folder
        target = own if folder is None else Path(folder)
        if target is None:
            raise InputError("this run has no folder to write to; pass out= to fit, or name one")
        if self.is_on_other_data and own is not None and target.resolve() == own.resolve():
            raise InputError(
                f"this run was measured on {self.facts['evaluated_on']}, and {own} holds what was "
                "measured on its own data; name another folder: run.save(FOLDER)"
            )
        return target

    def report(self, folder: Path | str | None = None) -> None:
        """Write `report.html` to a folder.

        Args:
            folder: None takes that of the run.

        Raises:
            InputError: the run has no folder, or was measured on other data than those it was
                trained on, and `folder` is that of the original.
        """
        target = self._choose_folder(folder)
        metrics = self.metrics
        low, high = metrics.accuracy_interval
        facts = {
            "Test accuracy": f"{metrics.accuracy:.2%} (95 % interval {low:.2%} to {high:.2%})",
            f"With test-time augmentation ({self.config.tta})": f"{metrics.accuracy_tta:.2%}",
            "Calibration error (ECE)": f"{metrics.ece:.3f}",
            **{key.replace("_", " ").capitalize(): _format(v) for key, v in self.facts.items()},
        }
        rows = [(s.name, s.precision, s.recall, s.f1, s.support) for s in metrics.per_class]
        write_report(
            target / REPORT,
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
    state: TrainState,
    device: torch.device,
    precision: Precision,
) -> dict[str, Any]:
    """What `metrics.json` says of how a result was reached.

    `epochs` are also the true passes: every epoch shows each training image once. `chosen_epoch`
    is the one whose weights count: of the best validation accuracy, or the last. Of time and of
    memory it says what they include.
    """
    training_images = len(data.train) - config.val_size
    remarks = {"data_remarks": list(data.remarks)} if data.remarks else {}
    on_gpu = device.type == "cuda"
    return {
        "preset": config.preset,
        "data": data.source,
        "data_name": data.name,
        "data_fingerprint": data.fingerprint,
        **remarks,
        "seed": config.seed,
        "epochs": config.epochs,
        "passes": config.epochs,
        "chosen_epoch": state.best.get("epoch", config.epochs),
        "training_images": training_images,
        "train_accuracy": state.history[-1]["train_accuracy"],
        "train_seconds": state.seconds,
        "train_seconds_include": TIMED,
        "images_per_second": training_images * len(state.history) / state.seconds,
        "peak_memory_gib": measure_peak_memory(device),
        "peak_memory_is": GPU_MEMORY if on_gpu else PROCESS_MEMORY,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "device": describe_device(device),
        "precision": precision.name,
        "versions": get_versions(),
    }


def _read(path: Path, parse: Callable[[str], T]) -> T:
    """What `parse` makes of the text of a file of the run."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except LabkitError:
        raise
    except OSError as error:
        raise describe_unreadable(path, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise _describe_damage(path, error) from error


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of the history of the run in `folder`, one an epoch.

    Raises:
        InputError: the file is damaged.
        SourceError: it cannot be read.
    """
    return _read(
        folder / HISTORY, lambda text: [dict(parse_json(line)) for line in text.splitlines()]
    )


def _describe_damage(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is damaged ({as_one_line(error)}); copy it anew, or train the run again"
    )


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
            for a run on data of your own, as `ImageData.from_splits(train, test)`. A run that was
            measured on other data never overwrites the files in `folder`.
        model: a network that takes the saved weights; needed for a run of a network of your own.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        InputError: there is no finished run in `folder`, a file of it is damaged, it needs `data`
            or `model`, or `data` has other classes or images of another size.
        SourceError: the data it was trained on could not be had.
    """
    folder = Path(folder)
    config, saved = _load_description(folder)
    if data is None and config.data == "custom":
        raise InputError(
            f"{folder} was trained on data of your own: "
            "pass data=labkit.ImageData.from_splits(train, test)"
        )
    if model is None and config.model == "custom":
        raise InputError(f"{folder} was trained with a network of your own: pass model=")
    for key in ("evaluated_on", "evaluated_on_fingerprint"):
        saved.pop(key, None)
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
    digest = saved.pop("weights_sha256", None)
    model = _load_weights(folder, config, len(images.classes), model, digest)
    history = read_history(folder)
    metrics = evaluate(
        model,
        images.test,
        mean=config.mean,
        std=config.std,
        precision=_resolve_for(config, target),
        device=str(target),
        tta=config.tta,
    )
    return Run(
        config=config,
        model=model,
        data=images,
        history=history[: config.epochs],  # the file has more, while the run gets more epochs
        metrics=metrics,
        facts={key: value for key, value in saved.items() if key not in metrics.to_json()},
        folder=folder,
    )


def load_classifier(folder: Path | str, *, device: str = "auto") -> Classifier:
    """The network of the finished run in `folder`, to name images with; its data are not needed.

    Args:
        folder: what `out` was in `labkit.fit`.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.

    Raises:
        InputError: there is no finished run in `folder`, or its network is one of your own, which
            `load_run` takes.
    """
    folder = Path(folder)
    target = pick_device(device)
    config, saved = _load_description(folder)
    if config.model == "custom":
        raise InputError(
            f"{folder} was trained with a network of your own: use labkit.load_run with model="
        )
    digest = saved.pop("weights_sha256", None)
    model = _load_weights(folder, config, len(saved["classes"]), None, digest).to(target)
    note = "demo: trained on procedural scenes" if saved.get("data") == "scenes" else ""
    return Classifier(config=config, model=model, classes=saved["classes"], note=note)


def _load_description(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration, and the content of `metrics.json`, of a finished run."""
    names = (CONFIG, HISTORY, METRICS, WEIGHTS)
    missing = [name for name in names if not os.path.exists(folder / name)]  # false for any name
    if missing:
        raise InputError(
            f"{folder} holds no finished run ({', '.join(missing)} missing); "
            "train one with: labkit train --out FOLDER"
        )
    config = _read(folder / CONFIG, lambda text: TrainConfig.from_json(dict(parse_json(text))))
    saved = _read(folder / METRICS, lambda text: dict(parse_json(text)))
    return config, saved


def _load_weights(
    folder: Path,
    config: TrainConfig,
    num_classes: int,
    model: nn.Module | None,
    digest: str | None,
) -> nn.Module:
    """The network of a run, or `model`, with the weights in `folder`, in evaluation mode.

    `digest` is the SHA-256 of the weights; runs of earlier versions have none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if digest is not None and compute_checksum(folder / WEIGHTS) != digest:
        raise _describe_damage(folder / WEIGHTS, ValueError("it is not what metrics.json names"))
    if model is None:
        with use_seed(config.seed):  # its first weights are drawn, and then replaced
            model = create_from_config(config, num_classes, pretrained=False)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except SafetensorError as error:
        raise _describe_damage(folder / WEIGHTS, error) from error
    except RuntimeError as error:
        raise InputError(
            f"the weights in {folder} do not fit the model: {as_one_line(error)}"
        ) from error
    return model.eval()
