"""Findings that draw, tabulate and save themselves: what a segmenter returns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.files import open_atomic, write_json
from labkit.report import Cell, Table, write_report
from labkit.segment.export import coco_document
from labkit.segment.figures import overlay_figure, stages_figure
from labkit.segment.results import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Segmentation(Findings):
    """The answers to all sentences about one image."""

    def to_coco(self, name: str = "image") -> dict[str, Any]:
        """A COCO document; see `labkit.segment.export.coco_document`."""
        return coco_document(self, name)

    def overlay(self) -> Figure:
        """The image with every mask in a colour of its own."""
        return overlay_figure(self)

    def figure(self, *stages: str) -> Figure:
        """A row for each sentence, with its heat map, prompts and masks; or `stages` of these.

        Raises:
            InputError: a stage is not heat, prompts or masks.
        """
        return stages_figure(self, *stages)

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
        with open_atomic(folder / "overlay.png") as file:
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
