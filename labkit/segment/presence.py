"""Is it there at all? Decided on absolute evidence, before any threshold relative to a map's peak.

A heat map has a brightest spot whether or not the thing is in the image; stretching it to [0, 1]
first would find anything anywhere. What counts is how probable the spot is, whether it stands out
from the ground, whether another sentence explains it better, and whether the mask that SAM-2 draws
there has the shape of the heat.

The decision has two stages. `decide_before_refinement` looks at the heat alone and spares SAM-2 the
sentences that are clearly not true. `decide_after_refinement` also holds the masks against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from labkit.segment.checkpoints import PresenceModel

Maps = NDArray[np.float32]

_PEAK_SHARE = 0.002  # of all pixels: their mean is the peak, so that no single one decides
_GROUND = 0.05  # share of the pixels, the coolest ones, that are ground in any case
_SMALLEST = 1e-4
_AGREES = 0.1  # agreement of the best mask below which presence fades, to 0 where none agrees


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What speaks for and against a sentence.

    Attributes:
        peak: mean probability of the hottest 0.2 % of the pixels, in [0, 1].
        contrast: peak less the ground, which is the coolest twentieth of the map, in [0, 1]; sky or
            a road may fill most of an image.
        contrastive_margin: this map less the best of its rivals, where this one is hot and the
            rival is hotter, in [-1, 0]; 0 if no rival explains the place better.
        agreement: soft IoU of the best mask with the heat, in [0, 1]; 1 as long as there are none.
    """

    peak: float
    contrast: float
    contrastive_margin: float
    agreement: float = 1.0

    def to_features(self) -> tuple[float, float, float, float]:
        """What the score is linear in: the logit of the peak, and the other three as they are."""
        peak = min(max(self.peak, _SMALLEST), 1 - _SMALLEST)
        return math.log(peak / (1 - peak)), self.contrast, self.contrastive_margin, self.agreement


@dataclass(frozen=True, kw_only=True)
class Presence:
    """The verdict on one sentence.

    Attributes:
        present: whether the sentence counts as true of the image.
        score: the presence in [0, 1] behind that.
        reason: why it is absent; "" if it is present.
        evidence: what the score was made of.
        assumed: whether `present` was assumed, and not judged by the score.
    """

    present: bool
    score: float
    reason: str
    evidence: Evidence
    assumed: bool = False


_TYPICAL = Evidence(peak=0.5, contrast=0.45, contrastive_margin=0.0, agreement=0.6)


def choose_rivals(maps: Maps, others: Maps, index: int, *, exclusive: bool) -> Maps:
    """The maps that may explain the place of sentence `index` better.

    Args:
        maps: one map for each sentence, (S, ...).
        others: maps (R, ...) of what is not meant.
        index: the sentence.
        exclusive: whether the other sentences are rivals too.
    """
    return np.concatenate([np.delete(maps, index, axis=0), others]) if exclusive else others


def measure_evidence(maps: Maps, others: Maps, *, exclusive: bool = False) -> list[Evidence]:
    """Evidence for each of S sentences, before there are masks.

    Args:
        maps: probabilities (S, h, w), one map for each sentence.
        others: maps (R, h, w) of further sentences that may explain a place better; R may be 0.
        exclusive: whether the S sentences exclude each other, so that each is a rival of the
            others too: a red ball is no blue ball, but a dog is also an animal.
    """
    pixels = math.prod(maps.shape[1:])
    flat = maps.reshape(len(maps), pixels)
    outside = others.reshape(len(others), pixels)
    count = max(1, round(_PEAK_SHARE * pixels))
    peaks = np.partition(flat, -count, axis=1)[:, -count:].mean(axis=1)
    grounds = np.quantile(flat, _GROUND, axis=1)
    return [
        Evidence(
            peak=float(peaks[index]),
            contrast=float(peaks[index] - grounds[index]),
            contrastive_margin=_measure_margin(
                flat[index], choose_rivals(flat, outside, index, exclusive=exclusive)
            ),
        )
        for index in range(len(maps))
    ]


def decide_before_refinement(
    evidence: Evidence, model: PresenceModel, *, threshold: float
) -> Presence:
    """Whether the heat alone speaks for the sentence: if not, SAM-2 need not be asked.

    Args:
        evidence: from `measure_evidence`.
        model: the weights of the evidence.
        threshold: presence in [0, 1] from which the sentence counts as true.
    """
    score = score_presence(evidence, model)
    present = score >= threshold
    reason = "" if present else explain_absence(evidence, model)
    return Presence(present=present, score=score, reason=reason, evidence=evidence)


def decide_after_refinement(
    evidence: Evidence,
    agreements: Sequence[float] | None,
    model: PresenceModel,
    *,
    threshold: float,
    assume_present: bool = False,
) -> Presence:
    """Whether the sentence is true, now that its masks can be held against its heat.

    A sentence none of whose masks agrees with its heat is not present, however hot its map is: the
    score is multiplied by agreement / 0.1 where that is below 1.

    Args:
        evidence: from `measure_evidence`.
        agreements: of each mask with the heat, in [0, 1]; None if SAM-2 was not asked.
        model: the weights of the evidence.
        threshold: presence in [0, 1] from which the sentence counts as true.
        assume_present: a mask is enough, whatever the score.
    """
    if agreements is not None:
        evidence = replace(evidence, agreement=max(agreements, default=0.0))
    presence = decide_before_refinement(evidence, model, threshold=threshold)
    score = presence.score * min(1.0, evidence.agreement / _AGREES)
    present = bool(agreements) and (assume_present or score >= threshold)
    reason = "" if present else explain_absence(evidence, model)
    if (
        agreements is not None and not present and presence.present
    ):  # all that speaks against it is the masks
        reason = _describe_agreement(evidence)
    return replace(presence, present=present, score=score, reason=reason, assumed=assume_present)


def score_presence(evidence: Evidence, model: PresenceModel) -> float:
    """Presence in [0, 1]: the logistic function of the weighted evidence.

    Example:
        >>> model = PresenceModel(
        ...     peak=1.0, contrast=0.0, contrastive_margin=0.0, agreement=0.0, constant=0.0
        ... )
        >>> evidence = Evidence(peak=0.8, contrast=0.7, contrastive_margin=0.0)
        >>> round(score_presence(evidence, model), 3)
        0.8
    """
    terms = zip(_weights(model), evidence.to_features(), strict=True)
    total = model.constant + sum(weight * feature for weight, feature in terms)
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, total))))


def explain_absence(evidence: Evidence, model: PresenceModel) -> str:
    """Why a sentence counts as absent, in words: the evidence that costs it most.

    A cost is the distance from what is typical of a thing that is there. From the ideal, a logit
    without bound would outweigh all else. Where nothing is short of that, the peak is named.
    """
    causes = (
        f"its highest probability is only {evidence.peak:.3f}",
        f"its map hardly stands out from the ground, by {evidence.contrast:.3f}",
        f"another sentence explains the same place better, by {-evidence.contrastive_margin:.2f}",
        _describe_agreement(evidence),
    )
    terms = zip(_weights(model), _TYPICAL.to_features(), evidence.to_features(), strict=True)
    costs = [weight * (typical - measured) for weight, typical, measured in terms]
    return causes[costs.index(max(costs)) if max(costs) > 0 else 0]


def _describe_agreement(evidence: Evidence) -> str:
    return f"no mask there agrees with its map (agreement {evidence.agreement:.2f})"


def _weights(model: PresenceModel) -> tuple[float, float, float, float]:
    """In the order of `Evidence.to_features`."""
    return model.peak, model.contrast, model.contrastive_margin, model.agreement


def _measure_margin(heat: Maps, rivals: Maps) -> float:
    """Mean lead of heat (P,) over the best of `rivals` (R, P) where heat is above half its peak."""
    if not len(rivals) or not heat.max():
        return 0.0
    hot = heat >= 0.5 * heat.max()
    return float(np.minimum(heat[hot] - rivals[:, hot].max(axis=0), 0).mean())
