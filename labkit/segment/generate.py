"""From the heat of each sentence to masks, in rounds: ask SAM-2, see what is left, ask again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from labkit.segment.division import divided
from labkit.segment.instances import relative
from labkit.segment.presence import Evidence
from labkit.segment.prompts import Prompt, competing_ground, make_prompts
from labkit.segment.residue import unexplained
from labkit.segment.sam2 import (
    Candidate,
    ImageFeatures,
    Sam2,
    choose,
    cleaned,
    distinct,
    enlarged,
)

Maps = NDArray[np.float32]

_ROUNDS = 3
_BLUR = 0.56  # of a patch: the spread that takes the grain of the vision tower out of a map
_SUPPORT = 0.65  # share of the hottest mask's mean heat that the mean heat of another must reach
_FAINT = 0.25  # of the peak: what is not meant may take the peak, and leave no more than its foot
_LEAST_AGREEMENT = 0.35  # of a mask with what was left for it, from the second round on


@dataclass(frozen=True, eq=False, kw_only=True)
class Inquiry:
    """A sentence on its way to masks.

    Attributes:
        sentence: what is looked for.
        evidence: for and against its being there.
        heat: its map (h, w), smoothed, less the ground of what is not meant.
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
    sentences: Sequence[str],
    maps: Maps,
    evidence: Sequence[Evidence],
    here: Sequence[bool],
    *,
    patch: int,
    grid: int,
    absolute: bool,
) -> list[Inquiry]:
    """An inquiry for each of W sentences, with its first prompts if the thing counts as there.

    Args:
        sentences: what is looked for.
        maps: (S, h, w), the first W of `sentences`, the others of what is not meant.
        evidence: one for each map.
        here: whether what each map is of counts as there; only what is competes.
        patch: grain of the maps in pixels.
        grid: side of SAM-2's mask prompts.
        absolute: whether what is not meant takes the ground where its probability is higher, or
            where it is higher in relation to the peak of its map.
    """
    rest = np.arange(len(maps)) >= len(sentences)
    present = np.asarray(here)
    maps = _smoothed(maps, _BLUR * patch)
    levels = maps if absolute else np.stack([relative(one) for one in maps])
    unwanted = levels[rest & present].max(axis=0, initial=0.0)
    found = []
    for index, sentence in enumerate(sentences):
        inquiry = Inquiry(sentence=sentence, evidence=evidence[index], heat=maps[index])
        if present[index]:
            heat = _less(maps[index], levels[index], unwanted)
            rivals = maps[present & (np.arange(len(maps)) != index)]
            competing = competing_ground(np.concatenate([heat[None], rivals]), 0)
            prompts = tuple(make_prompts(heat, grid=grid, competing=competing))
            inquiry = replace(inquiry, heat=heat, pending=prompts)
        found.append(inquiry)
    return found


def pursued(sam2: Sam2, image: NDArray[np.uint8], inquiries: Sequence[Inquiry]) -> list[Inquiry]:
    """Each inquiry with its masks; the image is encoded once, or not at all if nothing is pending.

    Where like objects touch, one prompt may stand for several of them and yield the mask of one.
    What that leaves unexplained of the heat is asked for again.
    """
    current, features = list(inquiries), None
    for _ in range(_ROUNDS):
        if not any(inquiry.pending for inquiry in current):
            break
        features = features or sam2.encode(image)
        current = [_divided(inquiry, sam2, features) for inquiry in current]
        prompts = [prompt for inquiry in current for prompt in inquiry.pending]
        chosen = iter(_chosen(sam2, features, prompts))
        current = [
            _continued(inquiry, list(islice(chosen, len(inquiry.pending))), sam2.grid)
            for inquiry in current
        ]
    return [replace(one, candidates=_supported(one.candidates, one.heat)) for one in current]


def _less(heat: Maps, level: Maps, unwanted: Maps) -> Maps:
    """`heat` less ground where `unwanted` is above `level`, and less a foot without its peak."""
    taken = unwanted > level
    if taken.any():
        taken |= level < _FAINT * level.max()
    return np.where(taken, np.float32(0), heat)


def _divided(inquiry: Inquiry, sam2: Sam2, features: ImageFeatures) -> Inquiry:
    """`inquiry` with what is pending taken apart into single objects."""
    if not inquiry.pending:
        return inquiry
    pending = tuple(divided(sam2, features, inquiry.pending, inquiry.heat))
    return replace(inquiry, pending=pending, asked=(*inquiry.asked, *pending))


def _smoothed(maps: Maps, blur: float) -> Maps:
    """Maps (S, h, w) in which a patch of the vision tower no longer stands out by itself."""
    from scipy import ndimage

    smooth: Maps = ndimage.gaussian_filter(maps, (0, blur, blur), mode="nearest")
    return smooth


def _supported(candidates: Sequence[Candidate], heat: Maps) -> tuple[Candidate, ...]:
    """The masks that the map (h, w) really means: hot all over, as hot as the others."""
    height, width = heat.shape
    masks = [enlarged(one.logits, (height, width)) for one in candidates]
    means = [float(heat[mask].mean()) if mask.any() else 0.0 for mask in masks]
    least = _SUPPORT * max(means, default=0.0)
    return tuple(one for one, mean in zip(candidates, means, strict=True) if mean >= least)


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
    if kept == list(inquiry.candidates):  # the same would be left, and asked again
        return replace(inquiry, pending=())
    height, width = inquiry.heat.shape
    masks = [enlarged(one.logits, (height, width)) for one in kept]
    rest = unexplained(inquiry.heat, masks)
    explained = relative(np.where(rest > 0, np.float32(0), inquiry.heat))
    pending = tuple(make_prompts(rest, grid=grid, competing=explained))
    return replace(
        inquiry,
        candidates=tuple(kept),
        pending=pending,
    )
