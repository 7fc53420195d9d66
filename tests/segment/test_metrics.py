from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import jaccard_score, matthews_corrcoef, roc_auc_score

from labkit.runtime import InputError
from labkit.segment import metrics

Masks = NDArray[np.bool_]
Overlap = Callable[[Masks, Masks], float]
MEASURES = [metrics.iou, metrics.boundary_iou]


def random_masks(seed: int, count: int, height: int = 13, width: int = 17) -> Masks:
    draw = np.random.default_rng(seed)
    share = draw.uniform(0.1, 0.9, (count, 1, 1))
    return draw.random((count, height, width)) < share


def rectangle(height: int, width: int, rows: slice, columns: slice) -> Masks:
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = True
    return mask


def strips(*lengths: int, total: int = 20) -> Masks:
    """One row of pixels for each object, of which the first `length` belong to it."""
    masks = np.zeros((len(lengths), len(lengths), total), dtype=bool)
    for index, length in enumerate(lengths):
        masks[index, index, :length] = True
    return masks


@pytest.mark.parametrize("seed", range(5))
def test_overlaps_match_sklearn(seed: int) -> None:
    a, b = random_masks(seed, 2)
    assert metrics.iou(a, b) == pytest.approx(jaccard_score(a.ravel(), b.ravel()))


def test_overlaps_of_a_tiny_case_are_exact() -> None:
    a, b = np.array([[True, True, False]]), np.array([[False, True, True]])
    assert metrics.iou(a, b) == 1 / 3


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 7)])
def test_overlap_is_one_of_two_empty_masks_and_zero_of_one(
    measure: Overlap, shape: tuple[int, int]
) -> None:
    empty, full = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
    assert measure(empty, empty) == 1.0
    assert measure(full, full) == 1.0
    assert measure(empty, full) == measure(full, empty) == 0.0


@pytest.mark.parametrize("measure", [*MEASURES, metrics.pairwise_iou, metrics.pair_counts])
def test_masks_that_cannot_be_compared_are_rejected(measure: Any) -> None:
    shape = (2, 3) if measure in MEASURES else (1, 2, 3)
    good = np.zeros(shape, dtype=bool)
    wrong = [good.astype(np.uint8), good.tolist(), good[..., :2], good[None], good[..., :0]]
    for other in wrong:
        with pytest.raises(InputError, match=r"bool array|one height and width"):
            measure(good, other)
        with pytest.raises(InputError, match=r"bool array|one height and width"):
            measure(other, good)


@pytest.mark.parametrize("seed", range(3))
def test_pairwise_iou_is_iou_of_each_pair(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PIXELS_AT_ONCE", 50)  # several blocks, the last one shorter
    a, b = random_masks(seed, 4), random_masks(seed + 100, 3)
    a[0], b[0] = False, False
    found = metrics.pairwise_iou(a, b)
    expected = [[metrics.iou(one, other) for other in b] for one in a]
    np.testing.assert_array_equal(found, expected)
    assert found[0].tolist() == [1.0, 0.0, 0.0]


def test_pairwise_iou_matches_pycocotools() -> None:
    mask_api = pytest.importorskip("pycocotools.mask")
    a, b = random_masks(0, 6), random_masks(1, 5)
    codes = [mask_api.encode(np.asfortranarray(m.transpose(1, 2, 0), np.uint8)) for m in (a, b)]
    expected = mask_api.iou(*codes, [0] * len(b))
    np.testing.assert_allclose(metrics.pairwise_iou(a, b), expected, rtol=1e-12)


def test_pairwise_iou_of_no_masks_has_no_rows_or_columns() -> None:
    some, none = random_masks(0, 3), random_masks(0, 0)
    assert metrics.pairwise_iou(some, none).shape == (3, 0)
    assert metrics.pairwise_iou(none, some).shape == (0, 3)
    assert metrics.pairwise_iou(none, none).shape == (0, 0)


def test_pairwise_iou_counts_every_pixel_of_large_masks() -> None:
    a, b = np.ones((1, 4100, 4100), dtype=bool), np.ones((1, 4100, 4100), dtype=bool)
    b[0, 0, 0] = False  # one among more pixels than float32 can count
    assert metrics.pairwise_iou(a, b)[0, 0] == (4100**2 - 1) / 4100**2


def eroded_band(mask: Masks, ratio: float) -> Masks:
    """The band as the paper describes it: pad by one, erode by 3 × 3 d times, subtract."""
    cv2 = pytest.importorskip("cv2")
    steps = max(1, round(ratio * float(np.linalg.norm(mask.shape))))
    padded = np.pad(mask, 1).astype(np.uint8)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=steps)[1:-1, 1:-1]
    return mask & ~inner.astype(bool)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.1, 1.0])
def test_boundary_iou_matches_iterated_erosion(seed: int, ratio: float) -> None:
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:71, :90]
    pair = []
    for _ in range(2):  # discs that may leave the image, with a few holes
        y, x = draw.uniform((0, 0), (71, 90))
        disc = np.hypot(rows - y, columns - x) < draw.uniform(15, 60)
        pair.append(disc & (draw.random(disc.shape) > 0.002))
    expected = metrics.iou(*(eroded_band(mask, ratio) for mask in pair))
    assert metrics.boundary_iou(*pair, dilation_ratio=ratio) == expected


def test_boundary_iou_of_nested_squares_is_exact() -> None:
    big = rectangle(10, 10, slice(1, 9), slice(1, 9))
    small = rectangle(10, 10, slice(2, 8), slice(2, 8))
    assert metrics.boundary_iou(big, big) == 1.0
    assert metrics.boundary_iou(big, small) == 0.0  # bands one pixel wide do not meet
    assert metrics.boundary_iou(big, small, dilation_ratio=0.14) == 20 / (48 + 32 - 20)


def test_image_border_belongs_to_the_boundary() -> None:
    full = np.ones((5, 5), dtype=bool)
    ring = full & ~rectangle(5, 5, slice(1, 4), slice(1, 4))
    assert metrics.boundary_iou(full, ring) == 1.0


@pytest.mark.parametrize("ratio", [0.0, -0.02, 1.5, math.nan])
def test_boundary_iou_rejects_a_ratio_that_is_no_share(ratio: float) -> None:
    mask = np.ones((5, 5), dtype=bool)
    with pytest.raises(InputError, match="dilation_ratio"):
        metrics.boundary_iou(mask, mask, dilation_ratio=ratio)


def best_total(table: NDArray[np.float64]) -> float:
    """The largest sum over one-to-one pairs, by trying them all."""
    if table.shape[0] > table.shape[1]:
        table = table.T
    choices = itertools.permutations(range(table.shape[1]), table.shape[0])
    return max(sum(table[row, column] for row, column in enumerate(c)) for c in choices)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_matches_have_the_largest_total_of_all_choices(seed: int, shape: tuple[int, int]) -> None:
    table = np.random.default_rng(seed).random(shape)
    for threshold in (0.0, 0.3, 0.5, 0.9):
        pairs = metrics.match_instances(table, threshold)
        assert pairs == sorted(pairs)
        assert len({t for t, _ in pairs}) == len({p for _, p in pairs}) == len(pairs)
        assert all(table[pair] >= threshold for pair in pairs)
        total = sum(table[pair] for pair in pairs)
        assert total == pytest.approx(best_total(np.where(table >= threshold, table, 0.0)))


def test_matching_prefers_two_good_pairs_to_one_better() -> None:
    assert metrics.match_instances([[0.9, 0.6], [0.7, 0.1]]) == [(0, 1), (1, 0)]
    assert metrics.match_instances([[0.9, 0.6], [0.7, 0.1]], 0.65) == [(0, 0)]


def test_a_pair_at_the_threshold_counts() -> None:
    assert metrics.match_instances([[0.5]]) == [(0, 0)]
    assert metrics.match_instances([[np.nextafter(0.5, 0)]]) == []
    assert metrics.match_instances(np.zeros((0, 3))) == metrics.match_instances([[], []]) == []


@pytest.mark.parametrize(
    "table, threshold, message",
    [
        ([0.5], 0.5, "iou"),
        ([[1.5]], 0.5, "iou"),
        ([[math.nan]], 0.5, "iou"),
        ([[0.5]], 50, "threshold"),
        ([[0.5]], math.nan, "threshold"),
    ],
)
def test_matching_rejects_what_is_no_iou(table: Any, threshold: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics.match_instances(table, threshold)


def test_instance_counts_of_a_tiny_case() -> None:
    true = strips(20, 20, 20)
    predicted = strips(20, 10, 5)  # IoU 1, 1/2 and 1/4
    assert metrics.instance_counts(true, predicted) == (2, 1, 1)
    assert metrics.instance_counts(true, predicted, 0.6) == (1, 2, 2)
    assert metrics.instance_counts(true, predicted[1:], 0.2) == (2, 0, 1)
    assert metrics.instance_counts(true, predicted[:0]) == (0, 0, 3)
    assert metrics.instance_counts(true[:0], predicted) == (0, 3, 0)


def test_a_duplicate_and_an_empty_prediction_are_false_positives() -> None:
    true = strips(20)
    predicted = np.concatenate([true, true, np.zeros_like(true)])
    assert metrics.instance_counts(true, predicted) == (1, 2, 0)


@pytest.mark.parametrize("count", [metrics.instance_counts, metrics.pair_counts])
def test_an_empty_true_object_is_rejected(count: Any) -> None:
    with pytest.raises(InputError, match="true mask 1 is empty"):
        count(strips(20, 0), strips(20, 20))


def test_pair_counts_hold_hits_at_each_threshold() -> None:
    assert metrics.THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    row = metrics.pair_counts(strips(20, 20, 20, 20), strips(20, 18, 13, 9))  # 1, 0.9, 0.65, 0.45
    assert row.tolist() == [4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1]
    assert metrics.pair_counts(strips(20)[:0], strips(9)).tolist() == [0, 1] + [0] * 10
    assert metrics.pair_counts(strips(20), strips(9)[:0]).tolist() == [1, 0] + [0] * 10


@pytest.mark.parametrize("seed", range(5))
def test_pair_counts_agree_with_instance_counts_where_masks_are_apart(seed: int) -> None:
    draw = np.random.default_rng(seed)
    true, predicted = (strips(*draw.integers(1, 21, 5)) for _ in range(2))
    row = metrics.pair_counts(true, predicted[::-1])
    for hits, threshold in zip(row[2:], metrics.THRESHOLDS, strict=True):
        assert hits == metrics.instance_counts(true, predicted, threshold)[0]


def test_pair_counts_match_before_any_threshold_as_sam3_does() -> None:
    places = np.arange(10)[None, :]
    true = np.stack([places < 6, places >= 6])
    predicted = np.stack([places >= 0, places < 2])  # IoU 0.6 and 1/3 with one, 0.4 and 0
    assert metrics.instance_counts(true, predicted) == (1, 1, 1)
    assert metrics.pair_counts(true, predicted).tolist() == [2, 2] + [0] * 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_mcc_matches_sklearn(seed: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    truth, predicted = draw.random(40) < share, draw.random(40) < 0.4
    predicted |= truth & (draw.random(40) < 0.5)
    assert metrics.mcc(truth, predicted) == pytest.approx(matthews_corrcoef(truth, predicted))


def test_mcc_is_zero_where_undefined_and_exact_at_its_ends() -> None:
    truth = np.array([True, True, False])
    assert metrics.mcc(truth, truth) == 1.0
    assert metrics.mcc(truth, ~truth) == -1.0
    for constant in (np.zeros(3, dtype=bool), np.ones(3, dtype=bool)):
        assert metrics.mcc(truth, constant) == metrics.mcc(constant, truth) == 0.0
    assert metrics.mcc([True], [True]) == 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_auroc_matches_sklearn_with_and_without_ties(seed: int, levels: int) -> None:
    draw = np.random.default_rng(seed)
    truth = draw.random(60) < 0.3
    truth[:2] = True, False
    score = draw.integers(0, levels, 60) + truth
    assert metrics.auroc(truth, score) == pytest.approx(roc_auc_score(truth, score))


def test_auroc_of_tiny_cases_is_exact() -> None:
    assert metrics.auroc([False, True], [0.1, 0.2]) == 1.0
    assert metrics.auroc([False, True], [0.2, 0.1]) == 0.0
    assert metrics.auroc([False, True, True], [1.0, 1.0, 2.0]) == 0.75
    assert metrics.auroc([False, True], [-math.inf, math.inf]) == 1.0


def test_presence_scores_reject_what_they_cannot_judge() -> None:
    for truth in ([True, True], [False]):
        with pytest.raises(InputError, match="both classes"):
            metrics.auroc(truth, [0.5] * len(truth))
    for score in ([0.5], [[0.5, 0.1]], [0.5, math.nan]):
        with pytest.raises(InputError, match="score"):
            metrics.auroc([True, False], score)
    for wrong in ([1, 0], [0.9, 0.1], [[True, False]], []):
        with pytest.raises(InputError, match="bools"):
            metrics.auroc(wrong, [0.5, 0.1])
        with pytest.raises(InputError, match="bools"):
            metrics.mcc([True, False], wrong)
    with pytest.raises(InputError, match="length"):
        metrics.mcc([True], [True, False])


def random_pairs(seed: int, count: int = 30) -> list[tuple[Masks, Masks]]:
    """Pairs of true and predicted objects; both lack some of up to four, and strips are apart."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        true, predicted = (strips(*draw.integers(8, 21, 4)) for _ in range(2))
        kept = [draw.random(4) < draw.choice([0.0, 0.8]) for _ in range(2)]
        pairs.append((true[kept[0]], predicted[kept[1]]))
    return pairs


@pytest.mark.parametrize("seed", range(3))
def test_cgf1_follows_its_definition(seed: int) -> None:
    pairs = random_pairs(seed)
    f1s = []
    for threshold in np.arange(0.5, 0.96, 0.05).round(2):
        counts = [metrics.instance_counts(*pair, threshold) for pair in pairs if len(pair[0])]
        hits, false, missed = np.sum(counts, axis=0)
        precision, recall = hits / (hits + false), hits / (hits + missed)
        f1s.append(2 * precision * recall / (precision + recall))
    gate = matthews_corrcoef([len(t) > 0 for t, _ in pairs], [len(p) > 0 for _, p in pairs])
    found = metrics.cgf1([metrics.pair_counts(*pair) for pair in pairs])
    assert found.positive_micro_f1 == pytest.approx(np.mean(f1s))
    assert found.presence_mcc == pytest.approx(gate)
    assert found.cgf1 == pytest.approx(100 * np.mean(f1s) * gate)


def test_cgf1_of_tiny_cases_is_exact() -> None:
    hit, miss = [1, 1] + [1] * 10, [1, 0] + [0] * 10
    quiet, invented = [0, 0] + [0] * 10, [0, 3] + [0] * 10
    assert metrics.cgf1([hit, quiet]).cgf1 == 100.0
    assert metrics.cgf1([hit, invented]).cgf1 == 0.0  # it never says "absent"
    assert metrics.cgf1([miss, invented]).cgf1 == 0.0
    assert metrics.cgf1([miss, invented]).presence_mcc == -1.0
    found = metrics.cgf1([hit, miss, quiet, invented, quiet])
    assert found.positive_micro_f1 == pytest.approx(2 / 3)  # what is invented counts in the gate
    assert found.presence_mcc == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "counts, message",
    [
        ([[1, 1] + [1] * 10], "1 of 1 pairs"),
        ([[0, 1] + [0] * 10], "0 of 1 pairs"),
        (np.zeros((0, 12), dtype=int), "0 of 0 pairs"),
        ([[1, 1] + [2] * 10], "more hits"),
        ([[1, 1] + [-1] * 10], "more hits"),
        ([[1.0, 1.0] + [1.0] * 10], "float64"),
        ([[1, 1, 1]], r"\(N, 12\)"),
        ([1] * 12, r"\(N, 12\)"),
    ],
)
def test_cgf1_rejects_what_it_cannot_judge(counts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metrics.cgf1(counts)


@pytest.mark.parametrize("level, z", [(0.8, 1.2816), (0.95, 1.96)])
def test_bootstrap_of_a_mean_matches_the_normal_interval(level: float, z: float) -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    half = z * values.std() / math.sqrt(500)
    found = metrics.bootstrap_interval(values, level=level, n=4000)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_bootstrap_is_a_function_of_its_seed_alone() -> None:
    values = np.random.default_rng(0).random(50)
    before = np.random.get_state()[1].tolist()
    first = metrics.bootstrap_interval(values, n=100)
    assert first == metrics.bootstrap_interval(values, n=100)
    assert first != metrics.bootstrap_interval(values, n=100, seed=1)
    assert np.random.get_state()[1].tolist() == before


def test_copies_of_a_value_add_no_precision_when_grouped() -> None:
    scenes = np.random.default_rng(0).random(30)
    values, groups = np.repeat(scenes, 8), np.repeat(np.arange(30), 8)
    shuffled = np.random.default_rng(1).permutation(240)
    low, high = metrics.bootstrap_interval(values[shuffled], groups=groups[shuffled])
    assert (low, high) == pytest.approx(metrics.bootstrap_interval(scenes))
    naive = metrics.bootstrap_interval(values)
    assert high - low == pytest.approx(math.sqrt(8) * (naive[1] - naive[0]), rel=0.1)


def test_grouped_interval_covers_the_truth_where_the_naive_one_does_not() -> None:
    covered = np.zeros(2)
    for seed in range(100):
        draw = np.random.default_rng(seed)
        values = np.repeat(draw.normal(size=40), 5) + draw.normal(0, 0.3, 200)
        for place, groups in enumerate([np.repeat(np.arange(40), 5), None]):
            low, high = metrics.bootstrap_interval(values, groups=groups, n=200)
            covered[place] += low <= 0.0 <= high
    assert covered[0] >= 88
    assert covered[1] <= 75


def test_groups_are_drawn_whole() -> None:
    groups = np.array(["b", "a", "c", "b", "b", "c"])
    values = np.arange(6)
    seen: list[NDArray[Any]] = []
    metrics.bootstrap_interval(values, lambda v: float(seen.append(v) or 0), groups=groups, n=200)
    for sample in seen:
        counts = np.bincount(sample, minlength=6)
        assert counts[0] == counts[3] == counts[4]
        assert counts[2] == counts[5]
        assert counts[0] + counts[1] + counts[2] == 3
    assert len({tuple(np.bincount(sample, minlength=6)) for sample in seen}) == 10


def test_bootstrap_works_on_rows_for_any_statistic() -> None:
    draw = np.random.default_rng(0)
    truth = draw.random(80) < 0.5
    table = np.column_stack([truth, truth + draw.normal(0, 1.0, 80)])
    low, high = metrics.bootstrap_interval(
        table, lambda rows: metrics.auroc(rows[:, 0] > 0, rows[:, 1]), n=300
    )
    assert 0.5 < low < metrics.auroc(truth, table[:, 1]) < high < 1.0
    counts = [metrics.pair_counts(*pair) for pair in random_pairs(0)]
    low, high = metrics.bootstrap_interval(counts, lambda rows: metrics.cgf1(rows).cgf1, n=300)
    assert low < metrics.cgf1(counts).cgf1 < high


def test_resamples_without_a_defined_statistic_are_left_out() -> None:
    table = np.array([[1, 0.9], [0, 0.1], [0, 0.2], [0, 0.3]])  # a third of draws lack the true one

    def area(rows: NDArray[np.float64]) -> float:
        return metrics.auroc(rows[:, 0] > 0, rows[:, 1])

    assert metrics.bootstrap_interval(table, area) == (1.0, 1.0)
    with pytest.raises(InputError, match="both classes"):
        metrics.bootstrap_interval(table[1:], area)
    with pytest.raises(InputError, match="undefined on"):
        metrics.bootstrap_interval([1, 2, 3], lambda v: 0 if len(set(v)) == 3 else math.nan)


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([1.0], {}, "at least 2"),
        ([], {}, "at least 2"),
        ([1.0, 2.0], {"groups": [7, 7]}, "at least 2"),
        ([1.0, 2.0], {"groups": [7]}, "one per value"),
        (np.zeros((2, 2, 2)), {}, "values must"),
        (1.0, {}, "values must"),
        ([1.0, math.nan], {}, "not finite"),
        ([1.0, 2.0], {"n": 0}, "n must"),
        ([1.0, 2.0], {"level": 95}, "level"),
    ],
)
def test_bootstrap_rejects_what_says_nothing(
    values: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        metrics.bootstrap_interval(values, **options)
