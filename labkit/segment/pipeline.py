"""From sentences and an image to masks: heat, presence, prompts, refinement."""

from __future__ import annotations

import contextlib
import logging
import re
import unicodedata
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labkit.images import ImageSource, load_image
from labkit.runtime import InputError, LabkitError, as_one_line, pick_device
from labkit.segment.checkpoints import (
    Checkpoint,
    PresenceModel,
    Profile,
    Sam2Checkpoint,
    check_installed,
    get_profile,
)
from labkit.segment.clipseg import (
    ClipSeg,
    EncodedImage,
    normalize_sentence,
    shorten_sentence,
    vary_sentence,
)
from labkit.segment.detectors import Detections, Detector, detect_boxes, load_detector
from labkit.segment.export import get_file_name
from labkit.segment.generate import (
    Correction,
    Query,
    Thresholds,
    generate_masks,
    init_queries,
    refine_mask,
    scale_blur,
)
from labkit.segment.masks import Candidate, encode_mask, upsample_mask
from labkit.segment.presence import (
    Evidence,
    choose_rivals,
    decide_after_refinement,
    decide_before_refinement,
    measure_evidence,
)
from labkit.segment.prompts import make_box
from labkit.segment.results import Segmentation, SegmentedObject, SentenceResult
from labkit.segment.sam2 import ImageFeatures, Sam2

Maps = NDArray[np.float32]

_logger = logging.getLogger(__name__)
_KEPT_IMAGES = 4  # whose masks can be corrected
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
        self._correctors: deque[ImageCorrector] = deque(maxlen=_KEPT_IMAGES)

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

        Of a sentence that is not true the result says whether its singular or plural would be, or a
        shorter form of it; see `SentenceResult.suggestions`.

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
        question = Question.check(
            sentences,
            negatives,
            exclusive=exclusive,
            assume_present=assume_present,
            presence_threshold=presence_threshold,
            box_threshold=box_threshold,
            mask_threshold=mask_threshold,
            overlap_threshold=overlap_threshold,
            minimum_area=minimum_area,
            maximum_objects=maximum_objects,
        )
        self._hint_at_lists([*question.sentences, *question.negatives])
        (draft,) = self._begin([load_image(image)], question)
        return replace(self._finish(draft, question), file_name=get_file_name(image))

    def stream(
        self,
        images: Iterable[ImageSource],
        sentences: Sequence[str],
        negatives: Sequence[str] = (),
        *,
        batch_size: int = 8,
        on_error: Callable[[ImageSource, LabkitError], None] | None = None,
        **options: Any,
    ) -> Iterator[Segmentation]:
        """Segment many images, one after another, faster than by single calls.

        The next images are read while the present ones are segmented, and a batch of them is
        encoded at once. At most three batches of images are in memory. Masks are those of single
        calls; on a GPU the last bits of an encoded image may depend on its batch.

        Args:
            images: any number of what `__call__` takes.
            sentences: see `__call__`.
            negatives: see `__call__`.
            batch_size: how many images are encoded at once, 1 or more.
            on_error: is called, in its turn, with an image that could not be segmented and the
                reason, and the image is left out. None raises the error in its turn.
            **options: the other parameters of `__call__`.

        Yields:
            A segmentation for each image, in the order of `images`.

        Raises:
            InputError: as `__call__`, or `batch_size` is below 1.
            SourceError: an image could not be read or fetched, and there is no `on_error`.

        Example:
            >>> from labkit import TextSegmenter, make_object_scene
            >>> segmenter = TextSegmenter.from_profile("demo")
            >>> images = [make_object_scene(number, seed=3).image for number in range(2)]
            >>> [found.image.shape for found in segmenter.stream(images, ["star"])]
            [(128, 128, 3), (128, 128, 3)]
        """
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, got {batch_size}")
        question = Question.check(sentences, negatives, **options)
        self._hint_at_lists([*question.sentences, *question.negatives])
        return self._stream(images, question, batch_size, on_error)

    def _stream(
        self,
        images: Iterable[ImageSource],
        question: Question,
        batch_size: int,
        on_error: Callable[[ImageSource, LabkitError], None] | None,
    ) -> Iterator[Segmentation]:
        """The generator behind `stream`, whose arguments are checked before its first step."""
        loaded = _load_ahead(images, 2 * batch_size)
        while batch := list(islice(loaded, batch_size)):
            pixels = [each for _, each in batch if not isinstance(each, LabkitError)]
            drafts = iter(self._begin_each(pixels, question))
            for source, each in batch:
                draft = each if isinstance(each, LabkitError) else next(drafts)
                try:
                    if isinstance(draft, LabkitError):
                        raise draft
                    found = self._finish(draft, question)
                except LabkitError as error:
                    if on_error is None:
                        raise
                    on_error(source, error)
                else:
                    yield replace(found, file_name=get_file_name(source))

    def _begin_each(
        self, images: Sequence[NDArray[np.uint8]], question: Question
    ) -> list[_Draft | LabkitError]:
        """Begin with images together; if that fails, with each alone, so that it fails alone."""
        try:
            return [*self._begin(images, question)] if images else []
        except LabkitError as error:
            if len(images) == 1:
                return [error]
        return [draft for image in images for draft in self._begin_each([image], question)]

    def _begin(self, images: Sequence[NDArray[np.uint8]], question: Question) -> list[_Draft]:
        """Encode images (H, W, 3) uint8 RGB together, and see what their maps say."""
        count, drafts = len(question.sentences), []
        for image, encoded in zip(images, _encode(self.clipseg, images), strict=True):
            maps = self.clipseg.predict_heat(encoded, question.spellings, self.templates)
            draft = self._ask(image, question, maps[:count], maps[count:])
            drafts.append(replace(draft, encoded=encoded))
        return self._encode_drafts(drafts, question.thresholds)

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
        variants = [*vary_sentence(result.sentence), *shorten_sentence(result.sentence)]
        forms = [form for form in dict.fromkeys(variants) if form not in spellings]
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
        question = Question(
            sentences=tuple(sentences),
            exclusive=exclusive,
            assume_present=assume_present,
            thresholds=thresholds or Thresholds(),
        )
        unwanted = wanted[:0] if unwanted is None else unwanted
        drafts = [self._ask(image, question, wanted, unwanted)]
        (draft,) = self._encode_drafts(drafts, question.thresholds)
        return self._finish(draft, question)

    def _ask(
        self, image: NDArray[np.uint8], question: Question, wanted: Maps, unwanted: Maps
    ) -> _Draft:
        """What the maps of an image say, before SAM-2 sees it; see `segment_maps`."""
        threshold = self._get_threshold(question.thresholds)
        assume_present = question.assume_present
        evidence = measure_evidence(wanted, unwanted, exclusive=question.exclusive)
        is_present, is_rival = (
            [
                assume_present
                or decide_before_refinement(each, self.presence, threshold=threshold).present
                for each in stack
            ]
            for stack in (evidence, measure_evidence(unwanted, wanted))
        )
        detections = (
            None
            if self.detector is None
            else detect_boxes(self.detector, image, question.sentences)
        )
        scale = (wanted.shape[2] / image.shape[1], wanted.shape[1] / image.shape[0])
        queries = init_queries(
            question.sentences,
            wanted,
            unwanted[is_rival],
            is_present,
            patch_size=self.clipseg.patch_size,
            low_res_size=self.sam2.low_res_size,
            absolute=not assume_present,
            box_threshold=question.thresholds.box,
            detections=detections and [each.scale(*scale) for each in detections],
        )
        return _Draft(
            image=image,
            wanted=wanted,
            unwanted=unwanted,
            evidence=evidence,
            queries=queries,
            detections=detections,
        )

    def _encode_drafts(self, drafts: Sequence[_Draft], thresholds: Thresholds) -> list[_Draft]:
        """The drafts, with features of those images that SAM-2 is needed for."""
        is_pending = [any(query.pending for query in draft.queries) for draft in drafts]
        images = [draft.image for draft, pending in zip(drafts, is_pending, strict=True) if pending]
        features = iter(_encode(self.sam2, images) if images else ())
        return [
            replace(
                draft,
                corrector=ImageCorrector(
                    sam2=self.sam2,
                    features=next(features),
                    size=draft.size,
                    mask_threshold=thresholds.mask,
                ),
            )
            if pending
            else draft
            for draft, pending in zip(drafts, is_pending, strict=True)
        ]

    def _finish(self, draft: _Draft, question: Question) -> Segmentation:
        """Masks, verdicts and objects of an image."""
        thresholds, corrector = question.thresholds, draft.corrector
        threshold = self._get_threshold(thresholds)
        results = []
        for index, query in enumerate(draft.queries):
            if query.pending and corrector is not None:
                query = generate_masks(self.sam2, corrector.features, query, thresholds)
            presence = decide_after_refinement(
                draft.evidence[index],
                [c.agreement for c in query.candidates] if query.prompts else None,
                self.presence,
                threshold=threshold,
                assume_present=question.assume_present,
            )
            result = SentenceResult(
                sentence=query.sentence,
                present=presence.present,
                presence=presence.score,
                reason=presence.reason,
                evidence=presence.evidence,
                heat=draft.wanted[index],
                prompts=query.prompts,
                objects=(),
                size=draft.size,
                assumed=presence.assumed,
                detector_score=draft.detections[index].score if draft.detections else None,
            )
            if result.present and corrector is not None:
                result = _add_objects(result, query, thresholds, corrector)
            if result.presence < threshold and draft.encoded is not None:
                rivals = choose_rivals(
                    draft.wanted, draft.unwanted, index, exclusive=question.exclusive
                )
                result = self._add_suggestions(
                    result, draft.encoded, question.spellings, rivals, threshold
                )
            results.append(result)
        segmentation = Segmentation(
            image=draft.image,
            sentences=tuple(results),
            note=self.note,
            models=self.models,
            settings=self.describe_settings(question),
        )
        if corrector is None:
            return segmentation
        self._correctors.append(corrector)
        return replace(segmentation, find_corrector=weakref.ref(corrector))

    def describe_settings(self, question: Question) -> dict[str, Any]:
        """What is not the default in a question, and the templates, for exports."""
        templates = {} if self.templates == ("{}",) else {"templates": list(self.templates)}
        return {**question.describe(), **templates}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of images; see `TextSegmenter.__call__`.

    Attributes:
        sentences: what is wanted.
        negatives: what is not meant.
        exclusive: whether the sentences exclude each other.
        assume_present: whether it is not asked if a thing is there.
        thresholds: of presence, boxes, masks and overlap, and limits.
    """

    sentences: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    exclusive: bool = False
    assume_present: bool = False
    thresholds: Thresholds = field(default_factory=Thresholds)

    @classmethod
    def check(
        cls,
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
    ) -> Question:
        """Make a question of the arguments of `TextSegmenter.__call__`.

        Raises:
            InputError: a sentence or a threshold cannot be used.

        Example:
            >>> Question.check(["red  ball"], box_threshold=0.4).describe()
            {'thresholds': {'box': 0.4}}
        """
        thresholds = Thresholds(
            presence=presence_threshold,
            box=box_threshold,
            mask=mask_threshold,
            overlap=overlap_threshold,
            minimum_area=minimum_area,
            maximum_objects=maximum_objects,
        )
        wanted, unwanted = check_sentences(sentences, negatives)
        return cls(
            sentences=tuple(wanted),
            negatives=tuple(unwanted),
            exclusive=exclusive,
            assume_present=assume_present,
            thresholds=thresholds,
        )

    @property
    def spellings(self) -> list[str]:
        """Sentences and negatives as CLIPSeg is asked them."""
        return [normalize_sentence(sentence) for sentence in (*self.sentences, *self.negatives)]

    def describe(self) -> dict[str, Any]:
        """All but the sentences, where it is not the default."""
        default = asdict(Thresholds())
        given = asdict(self.thresholds).items()
        values = {
            "negatives": list(self.negatives),
            "exclusive": self.exclusive,
            "assume_present": self.assume_present,
            "thresholds": {name: value for name, value in given if value != default[name]},
        }
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Draft:
    """An image on its way to a segmentation.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        wanted: maps (S, h, w) of the sentences.
        unwanted: maps (U, h, w) of what is not meant.
        evidence: of each sentence.
        queries: of each sentence, with its first prompts.
        detections: of each sentence; None where no detector was asked.
        encoded: the image for further sentences; None for no suggestions.
        corrector: holds SAM-2's features of the image; None where nothing is prompted.
    """

    image: NDArray[np.uint8]
    wanted: Maps
    unwanted: Maps
    evidence: Sequence[Evidence]
    queries: Sequence[Query]
    detections: Sequence[Detections] | None = None
    encoded: EncodedImage | None = None
    corrector: ImageCorrector | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptMask:
    """What an object's mask was made of.

    Attributes:
        candidate: its small logits, and what SAM-2 was told.
        blur: (x, y) of the heat that the prompt was made of, in pixels of the small logits.
        correction: all that a user said about it; None for nothing.
    """

    candidate: Candidate
    blur: tuple[float, float]
    correction: Correction | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageCorrector:
    """What a segmenter keeps of an image, so that its masks can be corrected.

    Attributes:
        sam2: the model.
        features: of the image.
        size: (H, W) of the image.
        mask_threshold: logit above which a pixel belongs to a mask.
        masks: what the mask of each object was made of, as long as the object is in use.
    """

    sam2: Sam2
    features: ImageFeatures
    size: tuple[int, int]
    mask_threshold: float
    masks: weakref.WeakKeyDictionary[SegmentedObject, KeptMask] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def correct(
        self, result: SentenceResult, segmented: SegmentedObject, correction: Correction
    ) -> SegmentedObject:
        """Make a new object in the place of one.

        Args:
            result: of the sentence of the object.
            segmented: the object.
            correction: what a user says about it.

        Raises:
            InputError: nothing is left of its mask.
        """
        kept = self.masks.get(segmented)
        if kept is None:
            raise InputError("this object was not made by a segmenter, and cannot be corrected")
        if kept.correction is not None:
            correction = kept.correction.add(correction)
        candidate = refine_mask(
            self.sam2,
            self.features,
            kept.candidate,
            correction,
            self.size,
            mask_threshold=self.mask_threshold,
            blur=kept.blur,
        )
        mask = upsample_mask(candidate.logits, self.size)
        if not mask.any():
            raise InputError("the correction leaves nothing of the mask; give another point or box")
        new = _make_object(result, candidate, mask)
        self.masks[new] = replace(kept, candidate=candidate, correction=correction)
        return new


def _encode(encoder: Any, images: Sequence[NDArray[np.uint8]]) -> list[Any]:
    """What an encoder makes of images; a single one takes the same way as ever."""
    if len(images) == 1:
        return [encoder.encode(images[0])]
    encoded: list[Any] = encoder.encode_batch(images)
    return encoded


def _load_ahead(
    sources: Iterable[ImageSource], count: int
) -> Iterator[tuple[ImageSource, NDArray[np.uint8] | LabkitError]]:
    """Load images in a thread, at most `count` ahead of the one that is needed, or say why not."""
    remaining = iter(sources)
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="labkit-images")
    try:
        pending = deque((s, pool.submit(load_image, s)) for s in islice(remaining, count))
        while pending:
            source, future = pending.popleft()
            pending.extend((s, pool.submit(load_image, s)) for s in islice(remaining, 1))
            try:
                loaded: NDArray[np.uint8] | LabkitError = future.result()
            except LabkitError as error:
                loaded = error
            yield source, loaded
    finally:
        pool.shutdown(cancel_futures=True)


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
    result: SentenceResult, query: Query, thresholds: Thresholds, corrector: ImageCorrector
) -> SentenceResult:
    """`result` with an object for each mask that is large enough; without one it is absent."""
    objects: list[SegmentedObject] = []
    too_small = _TOO_SMALL
    for candidate in query.candidates:
        mask = upsample_mask(candidate.logits, result.size)
        if not mask.any():
            continue
        if mask.mean() < thresholds.minimum_area:
            too_small = f"its masks cover less than {thresholds.minimum_area:g} of the image"
            continue
        if len(objects) == thresholds.maximum_objects:
            break
        segmented = _make_object(result, candidate, mask)
        blur = scale_blur(query, corrector.sam2.low_res_size)
        corrector.masks[segmented] = KeptMask(candidate=candidate, blur=blur)
        objects.append(segmented)
    if not objects:
        return replace(result, present=False, reason=too_small)
    return replace(result, objects=tuple(objects))


def _make_object(
    result: SentenceResult, candidate: Candidate, mask: NDArray[np.bool_]
) -> SegmentedObject:
    """The object of a candidate, whose mask at the size of the image is not empty."""
    in_heat = upsample_mask(candidate.logits, result.heat.shape)
    left, top, right, bottom = (int(edge) for edge in make_box(mask))
    return SegmentedObject(
        sentence=result.sentence,
        rle=encode_mask(mask),
        box=(left, top, right, bottom),
        presence=result.presence,
        grounding=float(result.heat[in_heat].mean()) if in_heat.any() else 0.0,
        predicted_iou=candidate.predicted_iou,
        agreement=candidate.agreement,
    )
