"""What a classifier's probabilities are worth: accuracy, calibration and errors, on NumPy arrays.

Throughout, `probabilities` is (N, C) with rows that sum to 1, `labels` is (N,) in [0, C), N is at
least 1, and the predicted class is the most probable one (the first of equals). Arrays that break
this raise InputError.

Sources: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927;
McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages,
1947; Guo et al., On Calibration of Modern Neural Networks, 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError

Interval = tuple[float, float]


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of one class, in [0, 1]; `support` counts its true images."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions with a confidence in (low, high]: their mean confidence, accuracy and count."""

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


def compute_accuracy_interval(correct: int, total: int, level: float = 0.95) -> Interval:
    """Interval (Wilson, 1927) in which an accuracy lies, measured as `correct` out of `total`.

    It holds for new images drawn like these ones; what another training run would change is not
    in it.

    Raises:
        InputError: `total` is not positive, `correct` not in [0, total] or `level` not in (0, 1).
    """
    if total < 1 or not 0 <= correct <= total:
        raise InputError(f"correct must lie in [0, total] and total be positive: {correct}/{total}")
    if not 0.0 < level < 1.0:
        raise InputError(f"level must lie between 0 and 1, such as 0.95, got {level}")
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def compute_mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """How likely chance alone parts two classifiers so far on the same images (McNemar, 1947).

    Only the images that one of them gets right and the other one wrong count. If both classifiers
    were equally good, either would be the right one as often as a coin shows heads; the exact
    binomial test says how rare a split as uneven as this one would be then.

    Args:
        first: (N,) bool, which images the first classifier gets right.
        second: (N,) bool, likewise, in the same order.

    Returns:
        The p-value in [0, 1], two-sided; below 0.05 the two are usually told apart.

    Raises:
        InputError: the arrays are not bool, or not of the same length.

    Example:
        >>> compute_mcnemar([True, True, True, False], [True, False, False, True])
        1.0
    """
    one, other = np.asarray(first), np.asarray(second)
    if one.dtype != bool or other.dtype != bool or one.ndim != 1 or one.shape != other.shape:
        raise InputError(
            "first and second must be bool of the same length, one an image, "
            f"got {one.dtype} {one.shape} and {other.dtype} {other.shape}"
        )
    from scipy.stats import binomtest

    only_one, only_other = int((one & ~other).sum()), int((~one & other).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(binomtest(only_one, only_one + only_other).pvalue)


def compute_confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, num_classes: int
) -> NDArray[np.int64]:
    """Counts (C, C): row, the true class; column, the predicted one.

    Raises:
        InputError: the lengths differ, or a value is not an integer in [0, `num_classes`).
    """
    true = _check_indices("labels", labels, num_classes)
    predicted = _check_indices("predictions", predictions, num_classes)
    if true.shape != predicted.shape:
        raise InputError(
            f"labels and predictions differ in length: {len(true)} and {len(predicted)}"
        )
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def compute_class_scores(confusion: ArrayLike, classes: Sequence[str]) -> tuple[ClassScores, ...]:
    """Scores of each class from a confusion matrix (C, C); what would divide by zero is 0.

    Raises:
        InputError: `confusion` is not square with one row per name in `classes`.
    """
    matrix = np.asarray(confusion)
    if matrix.shape != (len(classes), len(classes)):
        raise InputError(f"confusion must be {len(classes)} × {len(classes)}, got {matrix.shape}")
    hits, predicted, true = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    precision, recall = hits / np.maximum(predicted, 1), hits / np.maximum(true, 1)
    f1 = 2 * hits / np.maximum(predicted + true, 1)
    rows = zip(classes, precision, recall, f1, true, strict=True)
    return tuple(ClassScores(n, float(p), float(r), float(f), int(s)) for n, p, r, f, s in rows)


def compute_reliability(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = 15
) -> tuple[ReliabilityBin, ...]:
    """Confidence against accuracy in `bins` equal steps of (0, 1] (Guo et al., 2017).

    Lowest first; a step without predictions is left out.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, got {bins}")
    table, true = _check_probabilities(probabilities, labels)
    confidence, correct = table.max(axis=1), table.argmax(axis=1) == true
    edges = np.linspace(0.0, 1.0, bins + 1)
    bin_of_each = np.searchsorted(edges[1:-1], confidence, side="left")
    members = ((index, bin_of_each == index) for index in np.unique(bin_of_each))
    return tuple(
        ReliabilityBin(
            low=float(edges[index]),
            high=float(edges[index + 1]),
            confidence=float(confidence[inside].mean()),
            accuracy=float(correct[inside].mean()),
            count=int(inside.sum()),
        )
        for index, inside in members
    )


def compute_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: the mean distance of confidence from accuracy (Guo et al., 2017).

    `bins` are those of `compute_reliability`.
    """
    gap = sum(row.count * abs(row.accuracy - row.confidence) for row in bins)
    return gap / sum(row.count for row in bins)


def compute_nll(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Negative log-likelihood, the mean of -log p(true class) in nats.

    A probability below 2.2e-16 counts as that.
    """
    table, true = _check_probabilities(probabilities, labels)
    likely = table[np.arange(len(true)), true]
    return float(-np.log(np.clip(likely, np.finfo(np.float64).eps, 1.0)).mean())


def find_confident_mistakes(
    probabilities: ArrayLike, labels: ArrayLike, count: int
) -> NDArray[np.int64]:
    """Indices of at most `count` wrong predictions, most confident first."""
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    table, true = _check_probabilities(probabilities, labels)
    wrong = np.flatnonzero(table.argmax(axis=1) != true)
    order = np.argsort(-table.max(axis=1)[wrong], kind="stable")
    return wrong[order][:count].astype(np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Metrics:
    """One evaluation on one labelled set; shares lie in [0, 1], intervals are 95 % Wilson.

    Attributes:
        classes: class names in the order of the labels.
        accuracy: share of images whose most probable class is the true one.
        accuracy_interval: its interval for new images drawn like these ones.
        accuracy_tta: accuracy with test-time augmentation, the average over an image and its
            mirror image; None where there was none. All else is without it.
        accuracy_tta_interval: its interval.
        nll: negative log-likelihood in nats.
        ece: expected calibration error over 15 bins.
        confusion: counts (C, C) with the true classes as rows.
        per_class: scores of each class.
        reliability: confidence against accuracy.
        probabilities: (N, C) float32, what all of it was measured on.
    """

    classes: tuple[str, ...]
    accuracy: float
    accuracy_interval: Interval
    accuracy_tta: float | None
    accuracy_tta_interval: Interval | None
    nll: float
    ece: float
    confusion: NDArray[np.int64]
    per_class: tuple[ClassScores, ...]
    reliability: tuple[ReliabilityBin, ...]
    probabilities: NDArray[np.float32]

    @classmethod
    def from_probabilities(
        cls,
        probabilities: ArrayLike,
        labels: ArrayLike,
        classes: Sequence[str],
        tta_probabilities: ArrayLike | None = None,
    ) -> Metrics:
        """Measure `probabilities` (N, C) and, for the accuracy alone, `tta_probabilities` (N, C).

        Raises:
            InputError: the arrays do not fit each other or `classes`, or are no probabilities.

        Example:
            >>> probabilities = [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]
            >>> metrics = Metrics.from_probabilities(probabilities, [0, 1, 1, 1], ("cat", "dog"))
            >>> metrics.accuracy, metrics.confusion.tolist()
            (0.75, [[1, 0], [1, 2]])
        """
        table, true = _check_probabilities(probabilities, labels)
        if table.shape[1] != len(classes):
            raise InputError(f"{len(classes)} class names for {table.shape[1]} probabilities each")
        confusion = compute_confusion_matrix(true, table.argmax(axis=1), len(classes))
        bins = compute_reliability(table, true)
        accuracy, interval = _measure_accuracy(table, true)
        accuracy_tta, interval_tta = None, None
        if tta_probabilities is not None:
            averaged, _ = _check_probabilities(tta_probabilities, true)
            if averaged.shape != table.shape:
                raise InputError(f"tta_probabilities are {averaged.shape}, not {table.shape}")
            accuracy_tta, interval_tta = _measure_accuracy(averaged, true)
        return cls(
            classes=tuple(classes),
            accuracy=accuracy,
            accuracy_interval=interval,
            accuracy_tta=accuracy_tta,
            accuracy_tta_interval=interval_tta,
            nll=compute_nll(table, true),
            ece=compute_calibration_error(bins),
            confusion=confusion,
            per_class=compute_class_scores(confusion, classes),
            reliability=bins,
            probabilities=np.asarray(probabilities, np.float32),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for `metrics.json`."""
        tta = self.accuracy_tta_interval
        return {
            "test_accuracy": self.accuracy,
            "test_accuracy_interval": list(self.accuracy_interval),
            "test_accuracy_tta": self.accuracy_tta,
            "test_accuracy_tta_interval": None if tta is None else list(tta),
            "nll": self.nll,
            "ece": self.ece,
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
            "per_class": [asdict(row) for row in self.per_class],
            "reliability": [asdict(row) for row in self.reliability],
        }


def _measure_accuracy(
    table: NDArray[np.float64], true: NDArray[np.int64]
) -> tuple[float, Interval]:
    correct = int((table.argmax(axis=1) == true).sum())
    return correct / len(true), compute_accuracy_interval(correct, len(true))


def _check_indices(name: str, values: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be (N,) integers, got {array.dtype} of {array.shape}")
    if array.size and not 0 <= array.min() <= array.max() < num_classes:
        span = f"{array.min()} to {array.max()}"
        raise InputError(f"{name} must lie in [0, {num_classes}), one index per class; got {span}")
    return array.astype(np.int64)


def _check_probabilities(
    probabilities: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    table = np.asarray(probabilities, dtype=np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"probabilities must be (N, C) and not empty, got {table.shape}")
    likely = (table >= 0).all() and np.allclose(table.sum(axis=1), 1.0, atol=0.01)
    if not likely:
        raise InputError("probabilities must be rows that sum to 1; apply softmax to logits first")
    true = _check_indices("labels", labels, table.shape[1])
    if len(true) != len(table):
        raise InputError(f"{len(true)} labels for {len(table)} rows of probabilities")
    return table, true
