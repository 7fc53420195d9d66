"""Is it there at all? Asked of absolute evidence, before any threshold relative to a map's peak.

A heat map has a brightest spot whether or not the thing is in the image; stretching it to [0, 1]
first would find anything anywhere. What counts is how probable the spot is, whether it stands out
from the ground, whether another sentence explains it better, and whether the mask that SAM-2 draws
there has the shape of the heat.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from labkit.segment.checkpoints import PresencePin

_TOP_SHARE = 0.002  # of all pixels: their mean stands for the peak, so that no single one decides
_LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What speaks for and against a sentence; all in [0, 1].

    Attributes:
        strength: mean probability of the hottest 0.2 % of the pixels.
        contrast: strength less the median of the map.
        rivalry: by how much the best other sentence exceeds this one where this one is hot.
        agreement: soft IoU of the refined masks with the heat; 1 as long as there are none.
    """

    strength: float
    contrast: float
    rivalry: float
    agreement: float = 1.0

    def features(self) -> tuple[float, float, float, float]:
        """What the score is linear in: the logit of strength, and the other three as they are."""
        strength = min(max(self.strength, _LEAST), 1 - _LEAST)
        logit = math.log(strength / (1 - strength))
        return logit, self.contrast, self.rivalry, self.agreement


_ORDINARY = Evidence(strength=0.5, contrast=0.45, rivalry=0.0, agreement=0.6)


def gather(maps: NDArray[np.float32]) -> list[Evidence]:
    """Evidence from probabilities (S, h, w), one entry for each sentence."""
    flat = maps.reshape(len(maps), -1)
    top = max(1, round(_TOP_SHARE * flat.shape[1]))
    strength = np.partition(flat, -top, axis=1)[:, -top:].mean(axis=1)
    ground = np.median(flat, axis=1)
    return [
        Evidence(
            strength=float(strength[index]),
            contrast=float(strength[index] - ground[index]),
            rivalry=_rivalry(flat, index),
        )
        for index in range(len(maps))
    ]


def score(evidence: Evidence, pin: PresencePin) -> float:
    """Presence in [0, 1]: the logistic function of the weighted evidence."""
    terms = zip(_weights(pin), evidence.features(), strict=True)
    total = pin.constant + sum(weight * feature for weight, feature in terms)
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, total))))


def reason(evidence: Evidence, pin: PresencePin) -> str:
    """Why a sentence counts as absent, in words: the evidence that costs it most.

    A cost is the distance from what is ordinary for a thing that is there. From the ideal, a logit
    without bound would outweigh all else.
    """
    causes = (
        f"its highest probability is only {evidence.strength:.3f}",
        f"its map hardly stands out from the ground, by {evidence.contrast:.3f}",
        f"another sentence explains the same place better, by {evidence.rivalry:.2f}",
        f"no mask there agrees with its map (agreement {evidence.agreement:.2f})",
    )
    terms = zip(_weights(pin), _ORDINARY.features(), evidence.features(), strict=True)
    costs = [weight * (ordinary - own) for weight, ordinary, own in terms]
    return causes[costs.index(max(costs))]


def _weights(pin: PresencePin) -> tuple[float, float, float, float]:
    """In the order of `Evidence.features`."""
    return pin.strength, pin.contrast, pin.rivalry, pin.agreement


def _rivalry(flat: NDArray[np.float32], index: int) -> float:
    """Mean excess of the best other map of (S, P) where map `index` is above half its peak."""
    others = np.delete(flat, index, axis=0)
    own = flat[index]
    if not len(others) or not own.max():
        return 0.0
    hot = own >= 0.5 * own.max()
    return float(np.maximum(others[:, hot].max(axis=0) - own[hot], 0).mean())
