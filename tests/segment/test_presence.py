from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit

from labkit.segment.checkpoints import PresenceModel, get_profile
from labkit.segment.presence import (
    Evidence,
    decide_after_refinement,
    decide_before_refinement,
    explain_absence,
    measure_evidence,
    score_presence,
)

MODEL = PresenceModel(peak=1.5, contrast=3.0, contrastive_margin=3.0, agreement=1.0, constant=-0.2)
MODELS = {"by hand": MODEL, "full": get_profile("full").presence}
TYPICAL = Evidence(peak=0.8, contrast=0.75, contrastive_margin=0.0, agreement=0.8)


def bump(x0: int, peak: float = 0.8, ground: float = 0.05) -> NDArray[np.float32]:
    """A map (40, 50) with one hot place around column `x0`."""
    y, x = np.mgrid[:40, :50]
    shape = np.exp(-((x - x0) ** 2 + (y - 20) ** 2) / 40)
    return (ground + (peak - ground) * shape).astype(np.float32)


def evidence_of(maps: NDArray[np.float32]) -> list[Evidence]:
    """Evidence for each of the maps (S, h, w), the others being its rivals."""
    return measure_evidence(maps, maps[:0], exclusive=True)


def test_evidence_of_hand_made_maps() -> None:
    maps = np.full((3, 40, 50), 0.1, np.float32)  # 0.2 % are 4 pixels
    maps[0, 3, 5:9] = [0.9, 0.7, 0.8, 0.6]
    maps[1, 3, 5:7] = [1.0, 0.5]
    maps[2] = 0.1
    first, second, flat = evidence_of(maps)
    assert first.peak == pytest.approx(0.75)
    assert first.contrast == pytest.approx(0.65)
    assert first.contrastive_margin == pytest.approx(-0.1 / 4)  # only where 0.9 meets 1.0
    assert second.peak == pytest.approx((1.0 + 0.5 + 0.1 + 0.1) / 4)
    assert second.contrastive_margin == pytest.approx(-0.2 / 2)
    assert (flat.peak, flat.contrast) == (pytest.approx(0.1), pytest.approx(0))
    assert flat.contrastive_margin == pytest.approx(-(0.9 + 0.6 + 0.7 + 0.5) / 2000, rel=0.03)
    assert {evidence.agreement for evidence in (first, second, flat)} == {1.0}


def test_stuff_that_fills_most_of_the_image_stands_out_from_the_rest() -> None:
    sky = np.full((1, 40, 50), 0.8, np.float32)
    sky[:, 36:] = 0.05
    assert evidence_of(sky)[0].contrast == pytest.approx(0.75)
    assert evidence_of(np.full((1, 40, 50), 0.8, np.float32))[0].contrast == pytest.approx(0)


def test_one_pixel_does_not_make_a_peak() -> None:
    spike = np.zeros((1, 100, 100), np.float32)
    spike[0, 50, 50] = 1
    assert evidence_of(spike)[0].peak == pytest.approx(1 / 20)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 4)])
def test_smallest_maps_have_evidence(shape: tuple[int, int]) -> None:
    (evidence,) = evidence_of(np.full((1, *shape), 0.3, np.float32))
    assert evidence.peak == pytest.approx(0.3)
    assert (evidence.contrast, evidence.contrastive_margin) == (0.0, 0.0)


def test_zero_maps_are_absent_and_rival_nothing() -> None:
    maps = np.stack([np.zeros((40, 50), np.float32), bump(20)])
    zero, there = evidence_of(maps)
    assert (zero.peak, zero.contrast, zero.contrastive_margin) == (0.0, 0.0, 0.0)
    assert there.contrastive_margin == 0
    assert score_presence(zero, MODEL) < 1e-4 < MODEL.threshold < score_presence(there, MODEL)


def test_rival_counts_only_where_the_sentence_is_hot() -> None:
    same, elsewhere = evidence_of(np.stack([bump(10, 0.4), bump(10, 0.8), bump(40, 0.9)]))[:2]
    assert same.contrastive_margin < -0.2
    assert elsewhere.contrastive_margin == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_score_is_the_logistic_function_of_weighted_evidence(model: PresenceModel) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        peak, contrast, margin, agreement = rng.uniform(0.001, 0.999, 4)
        evidence = Evidence(
            peak=peak, contrast=contrast, contrastive_margin=-margin, agreement=agreement
        )
        total = model.constant + model.peak * logit(peak) + model.contrast * contrast
        total += model.agreement * agreement - model.contrastive_margin * margin
        assert score_presence(evidence, model) == pytest.approx(expit(total), rel=1e-9)


def test_score_stays_in_its_range_at_the_extremes() -> None:
    steep = replace(MODEL, peak=1e6)
    for peak in (0.0, 1.0):
        assert 0 <= score_presence(replace(TYPICAL, peak=peak), steep) <= 1
        assert 0 < score_presence(replace(TYPICAL, peak=peak), MODEL) < 1


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", ["peak", "contrast", "contrastive_margin", "agreement"])
def test_score_follows_the_sign_of_each_weight(model: PresenceModel, name: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        values = dict(zip(vars(TYPICAL), rng.uniform(0.1, 0.8, 4).tolist(), strict=True))
        less, more = Evidence(**values), Evidence(**{**values, name: values[name] + 0.1})
        assert (score_presence(more, model) - score_presence(less, model)) * getattr(
            model, name
        ) > 0


def test_scaling_a_map_down_lowers_presence() -> None:
    other = bump(12, 0.3)
    factors = (1.0, 0.7, 0.4, 0.1, 0.013, 0.001)
    stacks = [np.stack([factor * bump(20), other]) for factor in factors]
    scores = [score_presence(evidence_of(stack)[0], MODEL) for stack in stacks]
    assert all(more > less for more, less in pairwise(scores))
    assert scores[0] > MODEL.threshold > scores[-3]


CAUSES = {
    "highest probability is only 0.013": {"peak": 0.013, "contrast": 0.01},
    "hardly stands out from the ground, by 0.020": {"contrast": 0.02},
    "another sentence explains the same place better, by 0.70": {"contrastive_margin": -0.7},
    "no mask there agrees with its map (agreement 0.05)": {"agreement": 0.05},
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("peak", [0.45, 0.8])
def test_reason_names_what_costs_most(cause: str, peak: float) -> None:
    """Also where the probability is middling: what is far from typical counts, not from ideal."""
    changes = {"peak": peak, "contrast": peak - 0.05, **CAUSES[cause]}
    assert cause in explain_absence(replace(TYPICAL, **changes), MODEL)


def test_reason_does_not_blame_what_has_no_weight() -> None:
    model = replace(MODEL, contrast=0.0)
    assert "agreement" in explain_absence(replace(TYPICAL, contrast=0.0, agreement=0.3), model)


def test_reason_names_the_peak_where_nothing_falls_short_of_the_typical() -> None:
    """A demanding threshold turns away what no cause in particular speaks against."""
    reason = explain_absence(replace(TYPICAL, peak=0.67, contrast=0.6, agreement=0.6), MODEL)
    assert reason == "its highest probability is only 0.670"


def test_maps_of_unwanted_sentences_are_rivals_without_evidence_of_their_own() -> None:
    (evidence,) = measure_evidence(bump(10, 0.4)[None], bump(10, 0.8)[None])
    both = evidence_of(np.stack([bump(10, 0.4), bump(10, 0.8)]))
    assert evidence == both[0]


def test_wanted_sentences_are_no_rivals_unless_they_exclude_each_other() -> None:
    animal_and_dog = np.stack([bump(20, 0.5), bump(20, 0.9)])
    animal, dog = measure_evidence(animal_and_dog, animal_and_dog[:0])
    assert animal.contrastive_margin == dog.contrastive_margin == 0
    animal, dog = measure_evidence(animal_and_dog, animal_and_dog[:0], exclusive=True)
    assert animal.contrastive_margin < -0.2 and dog.contrastive_margin == 0


def test_heat_alone_decides_before_refinement() -> None:
    weak = replace(TYPICAL, peak=0.013)
    for evidence, present in ((TYPICAL, True), (weak, False)):
        presence = decide_before_refinement(evidence, MODEL, threshold=0.5)
        assert presence.present == present and (presence.reason == "") == present
        assert presence.score == score_presence(evidence, MODEL)
    assert decide_before_refinement(weak, MODEL, threshold=0.0).present
    assert not decide_before_refinement(TYPICAL, MODEL, threshold=1.0).present


def test_masks_decide_after_refinement() -> None:
    model = replace(MODEL, agreement=6.0, constant=-6.0)

    def decide(agreements: list[float] | None, **options: bool) -> tuple[bool, float]:
        presence = decide_after_refinement(TYPICAL, agreements, model, threshold=0.5, **options)
        assert (presence.reason == "") == presence.present
        return presence.present, presence.evidence.agreement

    assert decide([0.3, 0.8]) == (True, 0.8)  # the best mask counts
    assert decide([0.0]) == (False, 0.0)
    assert decide([0.0], assume_present=True) == (True, 0.0)
    assert decide([], assume_present=True) == (False, 0.0)  # asked, and no mask was kept
    assert decide(None, assume_present=True) == (False, TYPICAL.agreement)  # not asked


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_mask_that_agrees_with_nothing_outweighs_any_heat(model: PresenceModel) -> None:
    """Such as a mask of the whole frame for a small hot spot."""
    hot = Evidence(peak=0.99, contrast=0.98, contrastive_margin=0.0)
    scores = []
    for agreement in (0.01, 0.04, 0.1, 0.6):
        presence = decide_after_refinement(hot, [agreement], model, threshold=0.5)
        assert presence.present == (agreement >= 0.1)
        assert ("agreement 0." in presence.reason) == (not presence.present)
        scores.append(presence.score)
    assert scores == sorted(scores) and scores[0] <= 0.1
    assert scores[2] == score_presence(replace(hot, agreement=0.1), model)
