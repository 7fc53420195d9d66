"""What was found: an answer to each sentence, and a mask with its scores for each object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError
from labkit.segment.presence import Evidence
from labkit.segment.prompts import Prompt
from labkit.segment.rle import Rle, decode_mask


@dataclass(frozen=True, eq=False, kw_only=True)
class FoundObject:
    """One object. All four scores lie in [0, 1] and mean different things.

    Attributes:
        prompt: the sentence that names it.
        rle: its mask, as COCO's run lengths.
        box: the tight box of the mask, XYXY in pixels, right and bottom exclusive.
        presence: that the sentence is true of the image at all.
        grounding: mean probability of CLIPSeg's map inside the mask.
        predicted_iou: SAM-2's own estimate of the IoU of the mask with the object it outlined.
        agreement: soft IoU of the mask with the heat of this object, relative to its peak.
    """

    prompt: str
    rle: Rle
    box: tuple[int, int, int, int]
    presence: float
    grounding: float
    predicted_iou: float
    agreement: float

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool, decoded anew at each call."""
        return decode_mask(self.rle)


@dataclass(frozen=True, eq=False, kw_only=True)
class Answer:
    """What became of one sentence.

    Attributes:
        prompt: the sentence.
        present: whether it counts as true of the image.
        presence: the score in [0, 1] behind that.
        reason: why it is absent; "" if it is present.
        evidence: what the score was made of.
        heat: CLIPSeg's map (h, w) in [0, 1], of the whole image in its own proportions.
        prompts: what SAM-2 was told, in pixels of `heat`; empty if it was told nothing.
    """

    prompt: str
    present: bool
    presence: float
    reason: str
    evidence: Evidence
    heat: NDArray[np.float32]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """All answers for one image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        answers: one for each sentence, in the order asked.
        objects: in the order of the sentences, the best of each first.
        note: stands on the face of every figure and report; "" for none.
        models: which weights gave the answers.
    """

    image: NDArray[np.uint8]
    answers: tuple[Answer, ...]
    objects: tuple[FoundObject, ...]
    note: str = ""
    models: Mapping[str, str] = field(default_factory=dict)

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W) bool, one mask for each of `objects`; N is 0 if nothing was found."""
        empty = np.zeros((0, *self.image.shape[:2]), dtype=bool)
        return np.stack([thing.mask for thing in self.objects]) if self.objects else empty

    @property
    def boxes(self) -> NDArray[np.int64]:
        """(N, 4) XYXY in pixels."""
        return np.array([thing.box for thing in self.objects], dtype=np.int64).reshape(-1, 4)

    def answer(self, prompt: str) -> Answer:
        """The answer to `prompt`, whatever its white space.

        Raises:
            InputError: it was not asked.
        """
        for answer in self.answers:
            if answer.prompt == " ".join(prompt.split()):
                return answer
        asked = ", ".join(repr(answer.prompt) for answer in self.answers)
        raise InputError(f"{prompt!r} was not asked; these were: {asked}")

    def objects_of(self, prompt: str) -> tuple[FoundObject, ...]:
        """What was found for `prompt`, the best first; empty if it is absent.

        Raises:
            InputError: it was not asked.
        """
        asked = self.answer(prompt).prompt
        return tuple(thing for thing in self.objects if thing.prompt == asked)

    def mask_of(self, prompt: str) -> NDArray[np.bool_]:
        """(H, W) bool: everything that `prompt` names; empty if it is absent.

        Raises:
            InputError: it was not asked.
        """
        mask = np.zeros(self.image.shape[:2], dtype=bool)
        for thing in self.objects_of(prompt):
            mask |= thing.mask
        return mask
