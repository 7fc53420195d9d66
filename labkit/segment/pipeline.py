"""From sentences and an image to masks: heat, presence, prompts, refinement."""

from __future__ import annotations

import contextlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from labkit.images import ImageSource, load_image
from labkit.runtime import InputError, as_one_line, pick_device
from labkit.segment.checkpoints import (
    Checkpoint,
    PresenceModel,
    Profile,
    Sam2Checkpoint,
    check_installed,
    get_profile,
)
from labkit.segment.clipseg import ClipSeg, EncodedImage, normalize_sentence, vary_sentence
from labkit.segment.detectors import Detector, detect_boxes, load_detector
from labkit.segment.export import get_file_name
from labkit.segment.generate import Thresholds, generate_masks, init_queries
from labkit.segment.masks import Candidate, encode_mask, upsample_mask
from labkit.segment.presence import (
    choose_rivals,
    decide_after_refinement,
    decide_before_refinement,
    measure_evidence,
)
from labkit.segment.prompts import make_box
from labkit.segment.results import Segmentation, SegmentedObject, SentenceResult
from labkit.segment.sam2 import Sam2

Maps = NDArray[np.float32]

_logger = logging.getLogger(__name__)
_TOO_SMALL = "its mask is smaller than a pixel of the image"
_SEPARATOR = re.compile(r"[,;](?!\d)|\.(?=\s)|[|。、]")  # between things in a list


class TextSegmenter:
    """Segments in images what sentences name, or says that it is not there.

    Example:
        >>> from labkit import TextSegmenter, make_object_scene
        >>> segmenter = TextSegmenter.from_profile("demo")
        >>> scene = make_object_scene(1, seed=3)
        >>> found = segmenter(scene.image, ["star", "football player"])
        >>> found["football player"].present
        False
    """

    def __init__(
        self,
        clipseg: ClipSeg,
        sam2: Sam2,
        *,
        presence: PresenceModel,
        templates: Sequence[str] = ("{}",),
        note: str = "",
        models: Mapping[str, str] | None = None,
        detector: Detector | None = None,
    ) -> None:
        self.clipseg, self.sam2, self.detector = clipseg, sam2, detector
        self.presence, self.templates = presence, tuple(templates)
        self.note, self.models = note, dict(models or {})
        self._hinted: set[str] = set()  # sentences that a hint was given for

    @classmethod
    def from_profile(
        cls,
        profile: str | Profile = "full",
        *,
        clipseg: str | Checkpoint | None = None,
        sam2: str | Sam2Checkpoint | None = None,
        detector: str | Detector | None = None,
        device: str = "auto",
    ) -> TextSegmenter:
        """Load a segmenter with the weights of a profile.

        Args:
            profile: "full", the published weights, downloaded once; or "demo", the tiny ones that
                come with the package; or a `Profile` of your own.
            clipseg: a CLIPSeg of your own in its place: a folder, a repository of the Hugging Face
                hub, or a `Checkpoint`; see `labkit.segment.checkpoints.find_clipseg`.
            sam2: the size of SAM-2, for "full" one of tiny, small, base-plus and large; or a SAM-2
                of your own: a folder, a file, a repository of the hub, or a `Sam2Checkpoint`; see
                `labkit.segment.checkpoints.find_sam2`.
            detector: "mm-grounding-dino" or "owlv2", whose boxes join the prompts of the heat map,
                see `labkit.segment.detectors.fuse_prompts`; or a detector of your own, see
                `labkit.segment.detectors`. None or "none" for none: no figure here favours another.
            device: auto, cpu, cuda or cuda:N.

        Raises:
            InputError: there is no such profile, size or device, or a folder is no checkpoint.
            SourceError: weights could not be had, or a library is missing.
        """
        check_installed()
        weights = get_profile(profile) if isinstance(profile, str) else profile
        weights = weights.replace_weights(clipseg=clipseg, sam2=sam2)
        checkpoint, torch_device = weights.get_sam2(), pick_device(device)
        if isinstance(detector, str):
            detector = None if detector == "none" else load_detector(detector, torch_device)
        return cls(
            ClipSeg.from_checkpoint(weights.clipseg, torch_device),
            Sam2.from_checkpoint(checkpoint, torch_device),
            presence=weights.presence,
            templates=weights.templates,
            note=weights.note,
            models={
                "CLIPSeg": weights.clipseg.name,
                "SAM-2": checkpoint.name,
                **({"detector": detector.name} if detector else {}),
            },
            detector=detector,
        )

    def __call__(
        self,
        image: ImageSource,
        sentences: Sequence[str],
        negatives: Sequence[str] = (),
        *,
        exclusive: bool = False,
        assume_present: bool = False,
        presence_threshold: float | None = None,
        box_threshold: float = 0.5,
        mask_threshold: float = 0.0,
        overlap_threshold: float = 0.7,
        minimum_area: float = 0.0,
        maximum_objects: int | None = None,
    ) -> Segmentation:
        """Segment what each sentence names in an image; a sentence that is not true gets no mask.

        Of a sentence that is not true the result says whether its singular or plural would be; see
        `SentenceResult.suggestions`.

        Args:
            image: path, address, bytes, PIL image or array; see `labkit.load_image`.
            sentences: one or more, in a few words each. Case, white space, punctuation at the end
                and the Unicode form do not count: "Dog." is "dog", and the result has the first
                spelling. A sentence that reads like a list gives a hint in the log.
            negatives: sentences for what is not meant. Ground that fits one of them better than a
                sentence does not count for that sentence.
            exclusive: whether the sentences exclude each other, as "red ball" and "blue ball" do,
                but "dog" and "animal" do not. If so, a place counts for the sentence that explains
                it best; otherwise only `negatives` turn a sentence away.
            assume_present: skip the question whether a thing is there. The presence score is
                reported all the same, and results say that presence was assumed.
            presence_threshold: presence from which a sentence counts as true, in [0, 1]; higher
                finds less. None takes that of the profile.
            box_threshold: share of its own peak at which an object is outlined in the heat map,
                between 0 and 1; lower gives larger boxes.
            mask_threshold: logit above which a pixel belongs to a mask, in [-10, 10]; higher gives
                smaller masks.
            overlap_threshold: IoU from which two masks are masks of one object, in [0, 1]; lower
                keeps fewer.
            minimum_area: share of the image that the mask of an object must cover, in [0, 1].
            maximum_objects: how many objects of a sentence are kept, the best first, 1 or more;
                None keeps all.

        Raises:
            InputError: a sentence is empty, no clean text, too long, or both wanted and not; a
                threshold is out of its range; or there is no such image.
            SourceError: the image could not be read or fetched.
        """
        thresholds = Thresholds(
            presence=presence_threshold,
            box=box_threshold,
            mask=mask_threshold,
            overlap=overlap_threshold,
            minimum_area=minimum_area,
            maximum_objects=maximum_objects,
        )
        sentences, negatives = check_sentences(sentences, negatives)
        self._hint_at_lists([*sentences, *negatives])
        pixels = load_image(image)
        spellings = [normalize_sentence(sentence) for sentence in [*sentences, *negatives]]
        encoded = self.clipseg.encode(pixels)
        maps = self.clipseg.predict_heat(encoded, spellings, self.templates)
        wanted, unwanted = maps[: len(sentences)], maps[len(sentences) :]
        segmentation = self.segment_maps(
            pixels,
            sentences,
            wanted=wanted,
            unwanted=unwanted,
            exclusive=exclusive,
            assume_present=assume_present,
            thresholds=thresholds,
        )
        threshold = self._get_threshold(thresholds)
        results = []
        for index, result in enumerate(segmentation.sentences):
            if result.presence < threshold:
                rivals = choose_rivals(wanted, unwanted, index, exclusive=exclusive)
                result = self._add_suggestions(result, encoded, spellings, rivals, threshold)
            results.append(result)
        return replace(segmentation, sentences=tuple(results), file_name=get_file_name(image))

    def _get_threshold(self, thresholds: Thresholds) -> float:
        """Presence from which a sentence counts as true."""
        return self.presence.threshold if thresholds.presence is None else thresholds.presence

    def _add_suggestions(
        self,
        result: SentenceResult,
        encoded: EncodedImage,
        spellings: Sequence[str],
        rivals: Maps,
        threshold: float,
    ) -> SentenceResult:
        """`result` with other forms of its sentence that would be present in its place.

        Args:
            result: of one sentence, whose score is not enough.
            encoded: the image.
            spellings: all sentences that were asked, also those that are not meant.
            rivals: maps (R, h, w) of the sentences that this one is held against; R may be 0.
            threshold: presence from which a sentence counts as true.
        """
        forms = [form for form in vary_sentence(result.sentence) if form not in spellings]
        if not forms:
            return result
        suggestions = {}
        with contextlib.suppress(InputError):  # a form can be too long where the sentence is not
            form_maps = self.clipseg.predict_heat(encoded, forms, self.templates)
            for form, heat in zip(forms, form_maps, strict=True):
                (evidence,) = measure_evidence(heat[None], rivals)
                evidence = replace(evidence, agreement=result.evidence.agreement)
                presence = decide_before_refinement(evidence, self.presence, threshold=threshold)
                if presence.present:
                    suggestions[form] = presence.score
        return replace(result, suggestions=suggestions)

    def _hint_at_lists(self, sentences: Sequence[str]) -> None:
        """Say once of each sentence that reads like a list that each thing needs its own."""
        for sentence in sentences:
            parts = split_list(sentence)
            if len(parts) > 1 and sentence not in self._hinted:
                self._hinted.add(sentence)
                _logger.warning(
                    "%s is one sentence that reads like a list. To have each thing segmented "
                    "apart, give %d sentences: %s",
                    *(as_one_line(repr(sentence)), len(parts), as_one_line(repr(parts)[1:-1])),
                )

    def segment_maps(
        self,
        image: NDArray[np.uint8],
        sentences: Sequence[str],
        *,
        wanted: Maps,
        unwanted: Maps | None = None,
        exclusive: bool = False,
        assume_present: bool = False,
        thresholds: Thresholds | None = None,
    ) -> Segmentation:
        """Segment an image from heat maps that are there already.

        Args:
            image: (H, W, 3) uint8 RGB.
            sentences: S sentences.
            wanted: maps (S, h, w) in [0, 1] of these sentences.
            unwanted: maps (U, h, w) of what is not meant; None for none.
            exclusive: see `__call__`.
            assume_present: see `__call__`.
            thresholds: see `__call__`.
        """
        thresholds = thresholds or Thresholds()
        threshold = self._get_threshold(thresholds)
        unwanted = wanted[:0] if unwanted is None else unwanted
        evidence = measure_evidence(wanted, unwanted, exclusive=exclusive)
        is_present, is_rival = (
            [
                assume_present
                or decide_before_refinement(each, self.presence, threshold=threshold).present
                for each in stack
            ]
            for stack in (evidence, measure_evidence(unwanted, wanted))
        )
        detections = detect_boxes(self.detector, image, sentences) if self.detector else None
        scale = (wanted.shape[2] / image.shape[1], wanted.shape[1] / image.shape[0])
        queries = init_queries(
            sentences,
            wanted,
            unwanted[is_rival],
            is_present,
            patch_size=self.clipseg.patch_size,
            low_res_size=self.sam2.low_res_size,
            absolute=not assume_present,
            box_threshold=thresholds.box,
            detections=detections and [each.scale(*scale) for each in detections],
        )
        features = None
        results = []
        for index, (query, heat, query_evidence) in enumerate(
            zip(queries, wanted, evidence, strict=True)
        ):
            if query.pending:
                features = features or self.sam2.encode(image)
                query = generate_masks(self.sam2, features, query, thresholds)
            presence = decide_after_refinement(
                query_evidence,
                [c.agreement for c in query.candidates] if query.prompts else None,
                self.presence,
                threshold=threshold,
                assume_present=assume_present,
            )
            result = SentenceResult(
                sentence=query.sentence,
                present=presence.present,
                presence=presence.score,
                reason=presence.reason,
                evidence=presence.evidence,
                heat=heat,
                prompts=query.prompts,
                objects=(),
                size=(image.shape[0], image.shape[1]),
                assumed=presence.assumed,
                detector_score=detections[index].score if detections else None,
            )
            if result.present:
                result = _add_objects(result, query.candidates, thresholds)
            results.append(result)
        return Segmentation(
            image=image, sentences=tuple(results), note=self.note, models=self.models
        )


def check_sentences(
    sentences: Sequence[str], negatives: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Strip both lists of surplus white space and of repetitions, however they are spelt.

    Args:
        sentences: what is wanted.
        negatives: what is not meant.

    Returns:
        Both lists; of several spellings of a sentence the first is kept.

    Raises:
        InputError: there is nothing to look for; a sentence is empty, no str, or no clean text;
            or it is in both lists.

    Example:
        >>> check_sentences(["red  ball", "Red ball."], ["cat"])
        (['red ball'], ['cat'])
    """
    wanted, unwanted = (_map_spellings(texts) for texts in (sentences, negatives))
    if not wanted:
        raise InputError("sentences must name at least one thing to look for, got none")
    for spelling, sentence in wanted.items():
        if spelling in unwanted:
            raise InputError(
                f"{sentence!r} is both wanted and not; take it out of one of the lists"
            )
    return list(wanted.values()), list(unwanted.values())


def _map_spellings(sentences: Sequence[str]) -> dict[str, str]:
    """Map the normal spelling of each sentence to the first one given, in the given order."""
    if isinstance(sentences, str | bytes):
        raise InputError("sentences and negatives must be lists of sentences, got a single text")
    if not isinstance(sentences, Iterable):
        raise InputError(
            f"sentences and negatives must be lists of sentences, got {type(sentences).__name__}"
        )
    spellings: dict[str, str] = {}
    for sentence in sentences:
        _check_sentence(sentence)
        spellings.setdefault(normalize_sentence(sentence), " ".join(sentence.split()))
    return spellings


def _check_sentence(sentence: object) -> None:
    """Raise an InputError if `sentence` is no clean text that names something."""
    if not isinstance(sentence, str):
        raise InputError(f"a sentence must be a str, got {as_one_line(repr(sentence))}")
    if not sentence.strip():
        raise InputError("a sentence is empty; name a thing, such as 'red circle'")
    categories = {unicodedata.category(letter) for letter in re.sub(r"[\t\n\v\f\r]", "", sentence)}
    shown = as_one_line(repr(sentence))
    if categories & {"Cc", "Cs"}:
        raise InputError(
            f"a sentence holds control characters or broken text, got {shown}; type it anew"
        )
    if not any(category[0] in "LN" or category == "So" for category in categories):
        raise InputError(
            f"a sentence has no word in it, got {shown}; name a thing, such as 'red circle'"
        )


def split_list(sentence: str) -> list[str]:
    """Split a sentence that reads like a list, such as "dog, cat" or "dog. cat.", into its parts.

    Example:
        >>> split_list("dog. red ball."), split_list("red ball")
        (['dog', 'red ball'], ['red ball'])
    """
    texts = _SEPARATOR.split(unicodedata.normalize("NFKC", sentence))
    parts = (normalize_sentence(text) for text in texts)
    return [part for part in parts if part]


def _add_objects(
    result: SentenceResult, candidates: Sequence[Candidate], thresholds: Thresholds
) -> SentenceResult:
    """`result` with an object for each mask that is large enough; without one it is absent."""
    objects: list[SegmentedObject] = []
    too_small = _TOO_SMALL
    for candidate in candidates:
        mask = upsample_mask(candidate.logits, result.size)
        if not mask.any():
            continue
        if mask.mean() < thresholds.minimum_area:
            too_small = f"its masks cover less than {thresholds.minimum_area:g} of the image"
            continue
        if len(objects) == thresholds.maximum_objects:
            break
        in_heat = upsample_mask(candidate.logits, result.heat.shape)
        left, top, right, bottom = (int(edge) for edge in make_box(mask))
        objects.append(
            SegmentedObject(
                sentence=result.sentence,
                rle=encode_mask(mask),
                box=(left, top, right, bottom),
                presence=result.presence,
                grounding=float(result.heat[in_heat].mean()) if in_heat.any() else 0.0,
                predicted_iou=candidate.predicted_iou,
                agreement=candidate.agreement,
            )
        )
    if not objects:
        return replace(result, present=False, reason=too_small)
    return replace(result, objects=tuple(objects))
