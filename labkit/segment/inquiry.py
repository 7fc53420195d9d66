"""From the heat of each sentence to masks, in rounds: ask SAM-2, see what is left, ask again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from labkit.segment.instances import relative
from labkit.segment.presence import Evidence
from labkit.segment.prompts import Prompt, competing_ground, make_prompts
from labkit.segment.refine import (
    Candidate,
    ImageFeatures,
    Sam2,
    choose,
    cleaned,
    distinct,
    enlarged,
)
from labkit.segment.residue import unexplained

Maps = NDArray[np.float32]

_ROUNDS = 3
_LEAST_AGREEMENT = 0.35  # of a mask with what was left for it, from the second round on


@dataclass(frozen=True, eq=False, kw_only=True)
class Inquiry:
    """A sentence on its way to masks.

    Attributes:
        sentence: what is looked for.
        evidence: for and against its being there.
        heat: its map (h, w), less the ground of what is not meant.
        pending: what SAM-2 is still to be asked, in pixels of `heat`.
        asked: all that it was asked.
        candidates: the masks so far, best first.
    """

    sentence: str
    evidence: Evidence
    heat: Maps
    pending: tuple[Prompt, ...] = ()
    asked: tuple[Prompt, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def opened(
    sentence: str, evidence: Evidence, heat: Maps, rivals: Maps, unwanted: Maps, *, grid: int
) -> Inquiry:
    """An inquiry with its first prompts.

    Args:
        sentence: what is looked for; it counts as there.
        evidence: for and against that.
        heat: its map (h, w).
        rivals: maps (R, h, w) of the other sentences that count as there.
        unwanted: those of them (U, h, w) that are not meant: where one is hotter than `heat`, each
            in relation to its peak, the heat does not count.
        grid: side of SAM-2's mask prompts.
    """
    if len(unwanted):
        highest = np.max([relative(one) for one in unwanted], axis=0)
        heat = np.where(highest > relative(heat), np.float32(0), heat)
    competing = competing_ground(np.stack([heat, *rivals]), 0)
    prompts = tuple(make_prompts(heat, grid=grid, competing=competing))
    return Inquiry(sentence=sentence, evidence=evidence, heat=heat, pending=prompts, asked=prompts)


def pursued(sam2: Sam2, image: NDArray[np.uint8], inquiries: Sequence[Inquiry]) -> list[Inquiry]:
    """Each inquiry with its masks; the image is encoded once, or not at all if nothing is pending.

    Where like objects touch, one prompt may stand for several of them and yield the mask of one.
    What that leaves unexplained of the heat is asked for again.
    """
    current, features = list(inquiries), None
    for _ in range(_ROUNDS):
        prompts = [prompt for inquiry in current for prompt in inquiry.pending]
        if not prompts:
            break
        features = features or sam2.encode(image)
        chosen = iter(_chosen(sam2, features, prompts))
        current = [
            _continued(inquiry, list(islice(chosen, len(inquiry.pending))), sam2.grid)
            for inquiry in current
        ]
    return current


def _chosen(sam2: Sam2, features: ImageFeatures, prompts: Sequence[Prompt]) -> list[Candidate]:
    """The best mask for each of `prompts`, which are in pixels of a heat map."""
    height, width = prompts[0].region.shape
    scaled = [prompt.scaled(sam2.side / width, sam2.side / height) for prompt in prompts]
    found = map(choose, prompts, *sam2.decode(features, scaled))
    return [replace(candidate, logits=cleaned(candidate.logits)) for candidate in found]


def _continued(inquiry: Inquiry, answers: Sequence[Candidate], grid: int) -> Inquiry:
    """`inquiry` with these answers to what was pending, and with what they leave to ask."""
    if not answers:
        return inquiry
    if inquiry.candidates:
        answers = [one for one in answers if one.agreement >= _LEAST_AGREEMENT]
    kept = distinct([*inquiry.candidates, *answers])
    height, width = inquiry.heat.shape
    masks = [enlarged(one.logits, (height, width)) for one in kept]
    rest = unexplained(inquiry.heat, masks)
    explained = relative(np.where(rest > 0, np.float32(0), inquiry.heat))
    pending = tuple(make_prompts(rest, grid=grid, competing=explained))
    return replace(
        inquiry,
        candidates=tuple(kept),
        pending=pending,
        asked=(*inquiry.asked, *pending),
    )
