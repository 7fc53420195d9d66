from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit

from labkit.segment.checkpoints import PresencePin, get_profile
from labkit.segment.presence import Evidence, gather, reason, score

PIN = PresencePin(strength=1.5, contrast=3.0, rivalry=-3.0, agreement=1.0, constant=-0.2)
PINS = {"by hand": PIN, "full": get_profile("full").presence}
THERE = Evidence(strength=0.8, contrast=0.75, rivalry=0.0, agreement=0.8)


def bump(x0: int, peak: float = 0.8, ground: float = 0.05) -> NDArray[np.float32]:
    """A map (40, 50) with one hot place around column `x0`."""
    y, x = np.mgrid[:40, :50]
    shape = np.exp(-((x - x0) ** 2 + (y - 20) ** 2) / 40)
    return (ground + (peak - ground) * shape).astype(np.float32)


def test_evidence_of_hand_made_maps() -> None:
    maps = np.full((3, 40, 50), 0.1, np.float32)  # 0.2 % are 4 pixels
    maps[0, 3, 5:9] = [0.9, 0.7, 0.8, 0.6]
    maps[1, 3, 5:7] = [1.0, 0.5]
    maps[2] = 0.1
    first, second, flat = gather(maps)
    assert first.strength == pytest.approx(0.75)
    assert first.contrast == pytest.approx(0.65)
    assert first.rivalry == pytest.approx((0.1 + 0 + 0 + 0) / 4)  # only where 0.9 meets 1.0
    assert second.strength == pytest.approx((1.0 + 0.5 + 0.1 + 0.1) / 4)
    assert second.rivalry == pytest.approx((0 + 0.2) / 2)
    assert (flat.strength, flat.contrast) == (pytest.approx(0.1), pytest.approx(0))
    assert flat.rivalry == pytest.approx((0.9 + 0.6 + 0.7 + 0.5) / 2000, rel=0.03)
    assert {one.agreement for one in (first, second, flat)} == {1.0}


def test_one_pixel_does_not_make_a_peak() -> None:
    spike = np.zeros((1, 100, 100), np.float32)
    spike[0, 50, 50] = 1
    assert gather(spike)[0].strength == pytest.approx(1 / 20)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 4)])
def test_smallest_maps_have_evidence(shape: tuple[int, int]) -> None:
    (one,) = gather(np.full((1, *shape), 0.3, np.float32))
    assert one.strength == pytest.approx(0.3)
    assert (one.contrast, one.rivalry) == (0.0, 0.0)


def test_zero_maps_are_absent_and_rival_nothing() -> None:
    maps = np.stack([np.zeros((40, 50), np.float32), bump(20)])
    zero, there = gather(maps)
    assert (zero.strength, zero.contrast, zero.rivalry) == (0.0, 0.0, 0.0)
    assert there.rivalry == 0
    assert score(zero, PIN) < 1e-4 < PIN.cut < score(there, PIN)


def test_rival_counts_only_where_the_sentence_is_hot() -> None:
    same, elsewhere = gather(np.stack([bump(10, 0.4), bump(10, 0.8), bump(40, 0.9)]))[:2]
    assert same.rivalry > 0.2
    assert elsewhere.rivalry == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("pin", PINS.values(), ids=PINS)
def test_score_is_the_logistic_function_of_weighted_evidence(pin: PresencePin) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        strength, contrast, rivalry, agreement = rng.uniform(0.001, 0.999, 4)
        one = Evidence(strength=strength, contrast=contrast, rivalry=rivalry, agreement=agreement)
        total = pin.constant + pin.strength * logit(strength) + pin.contrast * contrast
        total += pin.rivalry * rivalry + pin.agreement * agreement
        assert score(one, pin) == pytest.approx(expit(total), rel=1e-9)


def test_score_stays_in_its_range_at_the_extremes() -> None:
    steep = replace(PIN, strength=1e6)
    for strength in (0.0, 1.0):
        assert 0 <= score(replace(THERE, strength=strength), steep) <= 1
        assert 0 < score(replace(THERE, strength=strength), PIN) < 1


@pytest.mark.parametrize("pin", PINS.values(), ids=PINS)
@pytest.mark.parametrize("name", ["strength", "contrast", "rivalry", "agreement"])
def test_score_follows_the_sign_of_each_weight(pin: PresencePin, name: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        values = dict(zip(vars(THERE), rng.uniform(0.1, 0.8, 4).tolist(), strict=True))
        less, more = Evidence(**values), Evidence(**{**values, name: values[name] + 0.1})
        assert (score(more, pin) - score(less, pin)) * getattr(pin, name) > 0


def test_scaling_a_map_down_lowers_presence() -> None:
    other = bump(12, 0.3)
    factors = (1.0, 0.7, 0.4, 0.1, 0.013, 0.001)
    found = [score(gather(np.stack([f * bump(20), other]))[0], PIN) for f in factors]
    assert all(more > less for more, less in pairwise(found))
    assert found[0] > PIN.cut > found[-3]


CAUSES = {
    "highest probability is only 0.013": {"strength": 0.013, "contrast": 0.01},
    "hardly stands out from the ground, by 0.020": {"contrast": 0.02},
    "another sentence explains the same place better, by 0.70": {"rivalry": 0.7},
    "no mask there agrees with its map (agreement 0.05)": {"agreement": 0.05},
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("strength", [0.45, 0.8])
def test_reason_names_what_costs_most(cause: str, strength: float) -> None:
    """Also where the probability is middling: what is far from ordinary counts, not from ideal."""
    changes = {"strength": strength, "contrast": strength - 0.05, **CAUSES[cause]}
    assert cause in reason(replace(THERE, **changes), PIN)


def test_reason_does_not_blame_what_has_no_weight() -> None:
    pin = replace(PIN, contrast=0.0)
    assert "agreement" in reason(replace(THERE, contrast=0.0, agreement=0.3), pin)
