from __future__ import annotations

import json
import math
import warnings
from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import log_loss, precision_recall_fscore_support

from labkit.classify import metrics
from labkit.classify.metrics import Metrics
from labkit.runtime import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchmetrics.classification import MulticlassCalibrationError

Case = tuple[NDArray[np.float64], NDArray[np.int64]]
CLASSES = ("cat", "dog", "frog", "ship", "truck")


def random_case(seed: int, rows: int = 400) -> Case:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, len(CLASSES), rows)
    logits = draw.normal(size=(rows, len(CLASSES)))
    logits[np.arange(rows), labels] += 1.0
    table = np.exp(logits)
    return table / table.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("correct, total", [(0, 7), (7, 7), (1, 1), (3, 10), (9612, 10000)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_accuracy_interval_is_wilsons_formula(correct: int, total: int, level: float) -> None:
    z, share = NormalDist().inv_cdf(0.5 + level / 2), correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = metrics.compute_accuracy_interval(correct, total, level)
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert 0.0 <= low <= correct / total <= high <= 1.0


@pytest.mark.parametrize(
    "correct, total, level", [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 95.0)]
)
def test_accuracy_interval_rejects_impossible_counts(
    correct: int, total: int, level: float
) -> None:
    with pytest.raises(InputError):
        metrics.compute_accuracy_interval(correct, total, level)


@pytest.mark.parametrize("seed", range(3))
def test_confusion_and_class_scores_match_sklearn(seed: int) -> None:
    table, labels = random_case(seed, rows=60)
    table[:, 4] = 0.0  # a class that is never predicted
    labels[labels == 3] = 2  # and one that never occurs
    predicted = table.argmax(axis=1)
    confusion = metrics.compute_confusion_matrix(labels, predicted, 5)
    assert confusion.dtype == np.int64
    np.testing.assert_array_equal(confusion, sklearn_confusion(labels, predicted, labels=range(5)))
    rows = metrics.compute_class_scores(confusion, CLASSES)
    expected = precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    for row, (precision, recall, f1, support) in zip(rows, np.transpose(expected), strict=True):
        assert (row.precision, row.recall, row.f1) == pytest.approx((precision, recall, f1))
        assert row.support == support
    assert [row.name for row in rows] == list(CLASSES)


def test_confusion_rows_are_true_classes() -> None:
    assert metrics.compute_confusion_matrix([0, 0, 1], [1, 1, 1], 2).tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0], [0.0, 1.0], [0]])
def test_confusion_rejects_labels_outside_the_classes(labels: list[float]) -> None:
    with pytest.raises(InputError):
        metrics.compute_confusion_matrix(labels, [0, 1], 2)


def test_class_scores_rejects_a_matrix_of_another_size() -> None:
    with pytest.raises(InputError, match="2 × 2"):
        metrics.compute_class_scores(np.eye(3, dtype=np.int64), ("cat", "dog"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_matches_torchmetrics(seed: int, bins: int) -> None:
    table, labels = random_case(seed)
    reference = MulticlassCalibrationError(len(CLASSES), n_bins=bins, norm="l1")
    expected = reference(torch.from_numpy(table), torch.from_numpy(labels)).item()
    found = metrics.compute_calibration_error(metrics.compute_reliability(table, labels, bins))
    assert found == pytest.approx(expected, abs=1e-6)


def test_reliability_bins_are_closed_above_and_empty_ones_left_out() -> None:
    table = [[0.5, 0.5], [0.75, 0.25], [0.8, 0.2], [0.0, 1.0]]
    bins = metrics.compute_reliability(table, [0, 1, 0, 1], bins=4)
    assert [(row.low, row.high, row.count) for row in bins] == [
        (0.25, 0.5, 1),
        (0.5, 0.75, 1),
        (0.75, 1.0, 2),
    ]
    assert [row.accuracy for row in bins] == [1.0, 0.0, 1.0]
    assert [row.confidence for row in bins] == pytest.approx([0.5, 0.75, 0.9])
    assert metrics.compute_calibration_error(bins) == pytest.approx((0.5 + 0.75 + 2 * 0.1) / 4)


def test_confidence_rounded_above_one_falls_into_the_last_bin() -> None:
    (only,) = metrics.compute_reliability([[1.0000002, 0.0]], [0], bins=10)
    assert (only.high, only.count) == (1.0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_matches_sklearn(seed: int) -> None:
    table, labels = random_case(seed)
    likelihood = metrics.compute_nll(table, labels)
    assert likelihood == pytest.approx(log_loss(labels, table, labels=range(5)))


def test_likelihood_of_the_impossible_is_finite() -> None:
    assert math.isfinite(metrics.compute_nll([[1.0, 0.0]], [1]))


def test_confident_mistakes_come_most_confident_first() -> None:
    table = [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.05, 0.95], [0.6, 0.4]]
    labels = [0, 0, 0, 0, 1]
    assert metrics.find_confident_mistakes(table, labels, 2).tolist() == [3, 1]
    assert metrics.find_confident_mistakes(table, labels, 9).tolist() == [3, 1, 2, 4]
    assert metrics.find_confident_mistakes(table, [0, 1, 1, 1, 0], 9).tolist() == []
    with pytest.raises(InputError, match="count"):
        metrics.find_confident_mistakes(table, labels, 0)


@pytest.mark.parametrize(
    "table, labels, message",
    [
        ([[2.0, -1.0]], [0], "softmax"),
        ([[3.0, 1.0]], [0], "softmax"),
        ([[math.nan, 1.0]], [0], "softmax"),
        (np.zeros((0, 2)), [], "not empty"),
        ([0.5, 0.5], [0], "not empty"),
        ([[0.5, 0.5]], [0, 1], "2 labels"),
        ([[0.5, 0.5]], [2], "labels must lie"),
    ],
)
def test_what_is_no_probability_or_label_is_rejected(
    table: list[list[float]], labels: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metrics.compute_nll(table, np.array(labels, dtype=np.int64))


def test_metrics_hold_what_the_functions_say() -> None:
    table, labels = random_case(0)
    averaged, _ = random_case(1)
    found = Metrics.from_probabilities(table, labels, CLASSES, averaged)
    correct = int((table.argmax(axis=1) == labels).sum())
    assert found.accuracy == correct / 400
    assert found.accuracy_interval == metrics.compute_accuracy_interval(correct, 400)
    assert found.accuracy_tta == np.mean(averaged.argmax(axis=1) == labels)
    assert found.nll == metrics.compute_nll(table, labels)
    assert found.ece == metrics.compute_calibration_error(found.reliability)
    assert np.trace(found.confusion) == correct
    assert sum(row.support for row in found.per_class) == 400
    np.testing.assert_allclose(found.probabilities, table, rtol=1e-6)
    assert sum(row.count for row in found.reliability) == 400


def test_metrics_survive_json_unchanged() -> None:
    table, labels = random_case(0)
    for averaged in (None, table):
        stored = Metrics.from_probabilities(table, labels, CLASSES, averaged).to_json()
        assert json.loads(json.dumps(stored, allow_nan=False)) == stored
        assert (stored["test_accuracy_tta"] is None) == (averaged is None)
        assert (stored["test_accuracy_tta_interval"] is None) == (averaged is None)
        low, high = stored["test_accuracy_interval"]
        assert low < stored["test_accuracy"] < high
        assert stored["per_class"][2]["name"] == "frog"


def test_metrics_reject_arrays_that_do_not_fit() -> None:
    table, labels = random_case(0)
    with pytest.raises(InputError, match="class names"):
        Metrics.from_probabilities(table, labels, ("cat", "dog"))
    with pytest.raises(InputError):
        Metrics.from_probabilities(table, labels, CLASSES, table[:7])
    with pytest.raises(InputError, match="tta_probabilities"):
        wider = np.pad(table, ((0, 0), (0, 1)))
        Metrics.from_probabilities(table, labels, CLASSES, wider)


@pytest.mark.parametrize("won, lost", [(0, 0), (3, 3), (8, 2), (0, 5), (1, 30), (60, 41)])
def test_mcnemar_is_the_exact_test_of_a_fair_coin(won: int, lost: int) -> None:
    flips = won + lost
    tail = sum(math.comb(flips, heads) for heads in range(max(won, lost), flips + 1))
    expected = min(1.0, 2 * tail / 2**flips) if flips else 1.0
    both = [True] * 40 + [False] * 20  # images on which they agree tell nothing
    first = np.array(both + [True] * won + [False] * lost)
    second = np.array(both + [False] * won + [True] * lost)
    assert metrics.compute_mcnemar(first, second) == pytest.approx(expected, abs=1e-12)
    assert metrics.compute_mcnemar(second, first) == metrics.compute_mcnemar(first, second)


def test_mcnemar_refuses_what_is_not_right_or_wrong() -> None:
    with pytest.raises(InputError, match="bool of the same length"):
        metrics.compute_mcnemar([0.5, 0.2], [True, False])
    with pytest.raises(InputError, match="bool of the same length"):
        metrics.compute_mcnemar([True], [True, False])
