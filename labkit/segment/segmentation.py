"""What a segmenter returns: an answer to each sentence, and a mask with its scores per object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.files import atomic_file, write_json
from labkit.report import Cell, Table, write_report
from labkit.runtime import InputError
from labkit.segment.export import Rle, coco_document, decode_mask
from labkit.segment.presence import Evidence
from labkit.segment.prompts import Prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
class Segmentation:
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
        """The answer to `prompt`.

        Raises:
            InputError: it was not asked.
        """
        for answer in self.answers:
            if answer.prompt == prompt:
                return answer
        asked = ", ".join(repr(answer.prompt) for answer in self.answers)
        raise InputError(f"{prompt!r} was not asked; these were: {asked}")

    def mask_of(self, prompt: str) -> NDArray[np.bool_]:
        """(H, W) bool: everything that `prompt` names; empty if it is absent.

        Raises:
            InputError: it was not asked.
        """
        self.answer(prompt)
        mask = np.zeros(self.image.shape[:2], dtype=bool)
        for thing in self.objects:
            if thing.prompt == prompt:
                mask |= thing.mask
        return mask

    def to_coco(self, name: str = "image") -> dict[str, Any]:
        """A COCO document; see `labkit.segment.export.coco_document`."""
        return coco_document(self, name)

    def overlay(self) -> Figure:
        """The image with every mask in a colour of its own."""
        from labkit.segment.figures import overlay_figure

        return overlay_figure(self)

    def figure(self) -> Figure:
        """Every stage, a row for each sentence: heat map, prompts, masks."""
        from labkit.segment.figures import stages_figure

        return stages_figure(self)

    def tables(self) -> dict[str, Table]:
        """Answers and objects, for a report or a notebook."""
        answers: list[list[Cell]] = [
            [a.prompt, "yes" if a.present else "no", a.presence, a.evidence.strength, a.reason]
            for a in self.answers
        ]
        objects: list[list[Cell]] = [
            [t.prompt, t.presence, t.grounding, t.predicted_iou, t.agreement, str(t.box)]
            for t in self.objects
        ]
        scores = ("presence", "grounding", "predicted IoU", "agreement")
        return {
            "Answers": Table(("sentence", "present", "presence", "peak", "why not"), answers),
            "Objects": Table(("sentence", *scores, "box"), objects),
        }

    def save(self, folder: Path | str, name: str = "image") -> Path:
        """Write `masks.json`, `overlay.png` and `report.html` into `folder`; return it.

        Raises:
            SourceError: something could not be written.
        """
        folder = Path(folder)
        write_json(folder / "masks.json", self.to_coco(name))
        overlay = self.overlay()
        with atomic_file(folder / "overlay.png") as file:
            overlay.savefig(file, format="png")
        height, width = self.image.shape[:2]
        found = f"{len(self.objects)} in {sum(answer.present for answer in self.answers)} sentences"
        write_report(
            folder / "report.html",
            title=f"What the sentences name in {name}",
            note=self.note,
            facts={"image": f"{width} × {height}", "objects": found, **self.models},
            figures={"Overlay": overlay, "Stages": self.figure()},
            tables=self.tables(),
        )
        return folder
