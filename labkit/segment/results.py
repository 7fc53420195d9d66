"""What a segmenter returns: all of an image, each sentence, each object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.report import Cell, Table, write_report
from labkit.runtime import InputError, as_one_line
from labkit.segment.clipseg import normalize_sentence
from labkit.segment.export import to_coco, to_coco_results, to_supervision, write_formats
from labkit.segment.figures import draw_overlay, draw_stages
from labkit.segment.generate import Correction
from labkit.segment.masks import Rle, decode_mask
from labkit.segment.presence import Evidence
from labkit.segment.prompts import Prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_FORMATS = ("coco", "overlay", "report")


def _find_nothing() -> None:
    """In the place of a corrector, for a segmentation that no segmenter keeps anything of."""


class Corrector(Protocol):
    """What a segmenter keeps of an image, so that its masks can be corrected."""

    def correct(
        self, result: SentenceResult, segmented: SegmentedObject, correction: Correction
    ) -> SegmentedObject:
        """A new object in the place of one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentedObject:
    """One object. All four scores lie in [0, 1] and mean different things.

    Attributes:
        sentence: the sentence that names it.
        rle: its mask, as COCO's run lengths.
        box: the tight box of the mask, XYXY in pixels, right and bottom exclusive.
        presence: whether the sentence is true of the image at all.
        grounding: mean probability of CLIPSeg's map inside the mask.
        predicted_iou: SAM-2's own estimate of the IoU of the mask with the object it outlined.
        agreement: soft IoU of the mask with the heat of this object, relative to its peak.
    """

    sentence: str
    rle: Rle
    box: tuple[int, int, int, int]
    presence: float
    grounding: float
    predicted_iou: float
    agreement: float

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool, decoded from the run lengths at each call."""
        return decode_mask(self.rle)


@dataclass(frozen=True, eq=False, kw_only=True)
class SentenceResult:
    """What became of one sentence.

    Attributes:
        sentence: what was asked for.
        present: whether it counts as true of the image.
        presence: the score in [0, 1] behind that.
        reason: why it is absent; "" if it is present.
        evidence: what the score was made of.
        heat: CLIPSeg's map (h, w) in [0, 1], of the whole image in its own proportions.
        prompts: what SAM-2 was told, in pixels of `heat`; empty if it was told nothing.
        objects: what was found, the best first; empty if the sentence is absent.
        size: (H, W) of the image.
        suggestions: for an absent sentence, other forms of it that would be present, such as its
            plural or "ball" for "red ball", and their presence. It is measured without SAM-2, and
            no mask comes of it.
        assumed: whether presence was assumed (`assume_present`), so that `present` is no verdict
            and says only that there are masks.
        detector_score: the highest score in [0, 1] of the detector's boxes, 0 if it found none;
            None if there was no detector. It is evidence apart, and decides nothing.
    """

    sentence: str
    present: bool
    presence: float
    reason: str
    evidence: Evidence
    heat: NDArray[np.float32]
    prompts: tuple[Prompt, ...]
    objects: tuple[SegmentedObject, ...]
    size: tuple[int, int]
    suggestions: Mapping[str, float] = field(default_factory=dict)
    assumed: bool = False
    detector_score: float | None = None

    def list_suggestions(self) -> str:
        """The suggestions as text; "" for none."""
        return ", ".join(f"{form!r} ({score:.2f})" for form, score in self.suggestions.items())

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W) bool: everything that the sentence names; empty if it is absent."""
        mask = np.zeros(self.size, dtype=bool)
        for segmented in self.objects:
            mask |= segmented.mask
        return mask


@dataclass(frozen=True, eq=False, kw_only=True)
class Segmentation:
    """Everything that was found in one image.

    It is a sequence of objects: it has a length, can be iterated over, and `found[0]` is an object;
    `found["dog"]` is the `SentenceResult` of a sentence, in any spelling of it (`found["Dog."]`).

    Attributes:
        image: (H, W, 3) uint8 RGB.
        sentences: a result for each sentence, in the order in which they were asked.
        note: stands on the face of every figure and report; "" for none.
        models: the weights that were used.
        file_name: the real name of the image file; "image" where there is none.
        settings: what else was asked for, such as negatives and thresholds; only what is not the
            default.
        find_corrector: gives what the segmenter keeps of this image for `refine`; None once it
            keeps it no longer.

    Example:
        >>> image = np.zeros((4, 6, 3), np.uint8)
        >>> found = Segmentation(image=image, sentences=(), file_name="photo.jpg")
        >>> len(found), found.masks.shape, found.to_coco()["images"][0]["file_name"]
        (0, (0, 4, 6), 'photo.jpg')
    """

    image: NDArray[np.uint8]
    sentences: tuple[SentenceResult, ...]
    note: str = ""
    models: Mapping[str, str] = field(default_factory=dict)
    file_name: str = "image"
    settings: Mapping[str, Any] = field(default_factory=dict)
    find_corrector: Callable[[], Corrector | None] = field(default=_find_nothing, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or saved: all but the way back to the segmenter."""
        return {**self.__dict__, "find_corrector": _find_nothing}

    @cached_property
    def objects(self) -> tuple[SegmentedObject, ...]:
        """All objects, in the order of the sentences, the best of each first."""
        return tuple(segmented for result in self.sentences for segmented in result.objects)

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W) bool, a mask for each of `objects`, decoded once; N may be 0."""
        masks = np.zeros((len(self), *self.image.shape[:2]), dtype=bool)
        for mask, segmented in zip(masks, self.objects, strict=True):
            mask[:] = segmented.mask
        return masks

    @property
    def boxes(self) -> NDArray[np.int64]:
        """(N, 4) XYXY in pixels, a box for each of `objects`."""
        boxes = [segmented.box for segmented in self.objects]
        return np.array(boxes, dtype=np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[SegmentedObject]:
        return iter(self.objects)

    @overload
    def __getitem__(self, key: int) -> SegmentedObject: ...

    @overload
    def __getitem__(self, key: str) -> SentenceResult: ...

    def __getitem__(self, key: int | str) -> SegmentedObject | SentenceResult:
        if isinstance(key, int):
            return self.objects[key]
        for result in self.sentences:
            if normalize_sentence(result.sentence) == normalize_sentence(key):
                return result
        asked = ", ".join(repr(result.sentence) for result in self.sentences)
        raise InputError(f"{key!r} was not asked for; these sentences were: {asked}")

    def refine(
        self,
        segmented: SegmentedObject | int,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
    ) -> Segmentation:
        """Correct the mask of one object by clicks or a box; the image is not encoded again.

        SAM-2 starts from the mask as it is. Later corrections of the new object count together with
        those before. The segmenter that made this segmentation keeps what this needs, the features
        of the image and the small logits of its objects, for its last four images (about 17 MB each
        with published weights), and as long as it lives itself; a saved or copied segmentation has
        no way back to it.

        Args:
            segmented: one of `objects`, or its position.
            points: (K, 2) pixels (x, y) of the image.
            labels: (K,) 1 for a point on the object, 0 for one that is not; None means all 1.
            box: (4,) XYXY around the object, in pixels.

        Returns:
            A new segmentation with the corrected object in the place of the old one. Presence stays
            as it is, the other scores are those of the new mask.

        Raises:
            InputError: there is no such object; points or box have the wrong form or lie outside of
                the image; nothing is left of the mask; or the segmenter keeps the image no longer.
        """
        position = self._find_position(segmented)
        old = self.objects[position]
        correction = Correction.check(points, labels, box, self.image.shape[:2])
        corrector = self.find_corrector()
        if corrector is None:
            raise InputError(
                f"{as_one_line(self.file_name)} can no longer be corrected, since a segmenter "
                "keeps its last 4 images only; segment it again"
            )
        results = []
        for result in self.sentences:
            if any(each is old for each in result.objects):
                new = corrector.correct(result, old, correction)
                objects = tuple(new if each is old else each for each in result.objects)
                result = replace(result, objects=objects)
            results.append(result)
        return replace(self, sentences=tuple(results))

    def _find_position(self, segmented: SegmentedObject | int) -> int:
        """The position in `objects` of one of them."""
        if isinstance(segmented, SegmentedObject):
            positions = [i for i, each in enumerate(self.objects) if each is segmented]
        else:
            positions = [i for i in range(len(self)) if segmented in (i, i - len(self))]
        if not positions:
            raise InputError(
                f"segmented must be one of the {len(self)} objects of this segmentation, or its "
                f"position, got {as_one_line(repr(segmented))}"
            )
        return positions[0]

    def to_coco(self, name: str | None = None, *, polygons: bool = False) -> dict[str, Any]:
        """The objects as a COCO document; see `labkit.segment.export.to_coco`.

        Args:
            name: the file name in the document; None for `file_name`.
            polygons: masks as polygons, and not as run lengths.
        """
        return to_coco(self, self.file_name if name is None else name, polygons=polygons)

    def to_coco_results(
        self,
        score: str = "presence",
        *,
        image_id: int = 1,
        category_ids: Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """The objects as COCO's list of results; see `labkit.segment.export.to_coco_results`.

        Args:
            score: which of the four scores ranks the objects.
            image_id: the id of the image in the ground truth.
            category_ids: the id of each sentence in the ground truth; None numbers them from 1.

        Raises:
            InputError: there is no such score, or a sentence has no id.
        """
        return to_coco_results(
            self, self.file_name, score, image_id=image_id, category_ids=category_ids
        )

    def to_supervision(self) -> Any:
        """The objects as `supervision.Detections`; see `labkit.segment.export.to_supervision`."""
        return to_supervision(self)

    def overlay(self) -> Figure:
        """Draw the image with every mask in a colour of its own."""
        return draw_overlay(self)

    def figure(self, *stages: str, sentences: Sequence[str] = ()) -> Figure:
        """Draw a row for each sentence, with its heat map, prompts and masks; or only `stages`.

        Args:
            stages: heat, prompts or masks; by default all.
            sentences: those of which a row is drawn; by default all.

        Raises:
            InputError: a stage is another, or a sentence was not asked for.
        """
        return draw_stages(self, *stages, sentences=sentences)

    def tables(self) -> dict[str, Table]:
        """Sentences and objects as tables, for a report or a notebook."""
        sentences: list[list[Cell]] = [
            [
                r.sentence,
                "assumed" if r.assumed else "yes" if r.present else "no",
                r.presence,
                r.evidence.peak,
                r.reason,
                r.list_suggestions(),
            ]
            for r in self.sentences
        ]
        objects: list[list[Cell]] = [
            [o.sentence, o.presence, o.grounding, o.predicted_iou, o.agreement, str(o.box)]
            for o in self.objects
        ]
        columns = ("sentence", "present", "presence", "peak", "why not", "rather ask for")
        scores = ("presence", "grounding", "predicted IoU", "agreement")
        return {
            "Sentences": Table(columns, sentences),
            "Objects": Table(("sentence", *scores, "box"), objects),
        }

    def save(
        self,
        folder: Path | str,
        name: str | None = None,
        *,
        formats: Sequence[str] = DEFAULT_FORMATS,
    ) -> Path:
        """Write the result into a folder; return its path.

        Args:
            folder: is created if it is missing.
            name: the file name of the image; None for `file_name`. The files keep it as it is, the
                title of the report cleaned and shortened.
            formats: what to write. By default it is "coco" (`masks.json`), "overlay"
                (`overlay.png`) and "report" (`report.html`); there are also "coco-polygons",
                "coco-results", "labelme", "yolo", "geojson", "labels" (a PNG of 16 bits) and
                "cutouts" (a PNG with alpha for each object); see `labkit.segment.export.FORMATS`.

        Raises:
            InputError: there is no such format.
            SourceError: something could not be written.
        """
        folder = Path(folder)
        write_formats(self, folder, self.file_name if name is None else name, formats)
        return folder

    def write_report(self, path: Path, name: str | None = None) -> None:
        """Write one self-contained page with the figures and tables.

        Args:
            path: of the HTML file.
            name: the file name of the image; None for `file_name`. The title has it cleaned and
                shortened.

        Raises:
            SourceError: the file could not be written.
        """
        name = self.file_name if name is None else name
        height, width = self.image.shape[:2]
        present = sum(result.present for result in self.sentences)
        write_report(
            path,
            title=f"What the sentences name in {as_one_line(name)}",
            note=self.note,
            facts={
                "image": f"{width} × {height}",
                "objects": f"{len(self)} in {present} sentences",
                **self.models,
            },
            figures={"Overlay": self.overlay(), "Stages": self.figure()},
            tables=self.tables(),
        )
