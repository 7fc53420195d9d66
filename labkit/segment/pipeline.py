"""From sentences and an image to masks: presence, prompts, refinement, choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from labkit.images import ImageSource, load_image
from labkit.runtime import InputError, pick_device
from labkit.segment.checkpoints import PresencePin, Profile, check_installed, get_profile
from labkit.segment.clipseg import ClipSeg
from labkit.segment.generate import Inquiry, opened, pursued
from labkit.segment.presence import Evidence, gather, reason, score
from labkit.segment.prompts import box_of
from labkit.segment.results import Answer, FoundObject
from labkit.segment.rle import encode_mask
from labkit.segment.sam2 import Candidate, Sam2, enlarged
from labkit.segment.segmentation import Segmentation

Maps = NDArray[np.float32]

_TOO_SMALL = "its mask is smaller than a pixel of the image"


class TextSegmenter:
    """Segments in images what sentences name, or says that it is not there."""

    def __init__(
        self,
        clipseg: ClipSeg,
        sam2: Sam2,
        *,
        presence: PresencePin,
        templates: Sequence[str] = ("{}",),
        note: str = "",
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.clipseg, self.sam2 = clipseg, sam2
        self.presence, self.templates = presence, tuple(templates)
        self.note, self.models = note, dict(models or {})

    @classmethod
    def from_profile(
        cls, profile: str | Profile = "full", *, sam2: str | None = None, device: str = "auto"
    ) -> TextSegmenter:
        """A segmenter with the weights of a profile.

        Args:
            profile: "full", the published weights, downloaded once; or "demo", the tiny ones that
                come with the package; or a `Profile` of your own.
            sam2: the size of SAM-2, for "full" one of tiny, small, base-plus and large.
            device: auto, cpu, cuda or cuda:N.

        Raises:
            InputError: there is no such profile, size or device.
            SourceError: weights could not be had, or a library is missing.
        """
        check_installed()
        chosen = get_profile(profile) if isinstance(profile, str) else profile
        pin, where = chosen.sam2_pin(sam2), pick_device(device)
        return cls(
            ClipSeg.from_pin(chosen.clipseg, where),
            Sam2.from_pin(pin, where),
            presence=chosen.presence,
            templates=chosen.templates,
            note=chosen.note,
            models={"CLIPSeg": chosen.clipseg.name, "SAM-2": pin.name},
        )

    def __call__(
        self,
        image: ImageSource,
        prompts: Sequence[str],
        negatives: Sequence[str] = (),
        *,
        assume_present: bool = False,
    ) -> Segmentation:
        """Masks of what each of `prompts` names in `image`, and none where it names nothing.

        Args:
            image: path, address, bytes, PIL image or array; see `labkit.images.load_image`.
            prompts: one sentence or more, in a few words each.
            negatives: sentences for what is not meant; ground that fits one of them better than a
                prompt does not count for that prompt.
            assume_present: skip the question whether a thing is there; the presence score is
                reported all the same.

        Raises:
            InputError: a sentence is empty, too long, or both wanted and not; or no such image.
            SourceError: the image could not be read or fetched.
        """
        wanted, unwanted = checked_sentences(prompts, negatives)
        pixels = load_image(image)
        maps = self.clipseg.heat_maps(pixels, [*wanted, *unwanted], self.templates)
        return self.refine(pixels, wanted, maps, assume_present=assume_present)

    def refine(
        self, image: NDArray[np.uint8], wanted: Sequence[str], maps: Maps, *, assume_present: bool
    ) -> Segmentation:
        """The same, from heat maps (S, h, w) that are there already.

        The first of them belong to the sentences `wanted`, the others to what is not meant.
        """
        evidence = gather(maps)
        here = [assume_present or self._present(one) for one in evidence]
        inquiries = opened(
            wanted,
            maps,
            evidence,
            here,
            patch=self.clipseg.patch,
            grid=self.sam2.grid,
            absolute=not assume_present,
        )
        answers, objects = [], []
        for inquiry, heat in zip(pursued(self.sam2, image, inquiries), maps, strict=False):
            answer = self._answer(inquiry, heat, assume_present=assume_present)
            if answer.present:
                found = [_object(one, answer, image.shape) for one in inquiry.candidates]
                found = [thing for thing in found if thing.box[2] > thing.box[0]]
                if not found:
                    answer = replace(answer, present=False, reason=_TOO_SMALL)
                objects += found
            answers.append(answer)
        return Segmentation(
            image=image,
            answers=tuple(answers),
            objects=tuple(objects),
            note=self.note,
            models=self.models,
        )

    def _present(self, evidence: Evidence) -> bool:
        return score(evidence, self.presence) >= self.presence.cut

    def _answer(self, inquiry: Inquiry, heat: Maps, *, assume_present: bool) -> Answer:
        """Whether the thing is there, now that the masks, if any, can be held against the map."""
        agreement = max((one.agreement for one in inquiry.candidates), default=0.0)
        evidence = inquiry.evidence
        if inquiry.asked:
            evidence = replace(evidence, agreement=agreement)
        there = bool(inquiry.candidates) and (assume_present or self._present(evidence))
        return Answer(
            prompt=inquiry.sentence,
            present=there,
            presence=score(evidence, self.presence),
            reason="" if there else reason(evidence, self.presence),
            evidence=evidence,
            heat=heat,
            prompts=inquiry.asked,
        )


def checked_sentences(
    prompts: Sequence[str], negatives: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Both lists without surplus white space and without repetitions.

    Raises:
        InputError: there is nothing to look for, a sentence is empty, or it is in both lists.
    """
    if isinstance(prompts, str) or isinstance(negatives, str):
        raise InputError("prompts and negatives must be lists of sentences, got a single text")
    wanted, unwanted = (
        list(dict.fromkeys(" ".join(sentence.split()) for sentence in sentences))
        for sentences in (prompts, negatives)
    )
    if not wanted:
        raise InputError("prompts must name at least one thing to look for, got none")
    if "" in wanted or "" in unwanted:
        raise InputError("a sentence is empty; name a thing, such as 'red circle'")
    both = [sentence for sentence in wanted if sentence in unwanted]
    if both:
        raise InputError(f"{both[0]!r} is both wanted and not; take it out of one of the lists")
    return wanted, unwanted


def _object(candidate: Candidate, answer: Answer, shape: Sequence[int]) -> FoundObject:
    mask = enlarged(candidate.logits, (shape[0], shape[1]))
    coarse = enlarged(candidate.logits, (answer.heat.shape[0], answer.heat.shape[1]))
    box = box_of(mask) if mask.any() else np.zeros(4)
    left, top, right, bottom = (int(edge) for edge in box)
    return FoundObject(
        prompt=answer.prompt,
        rle=encode_mask(mask),
        box=(left, top, right, bottom),
        presence=answer.presence,
        grounding=float(answer.heat[coarse].mean()) if coarse.any() else 0.0,
        predicted_iou=candidate.predicted_iou,
        agreement=candidate.agreement,
    )
