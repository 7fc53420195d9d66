"""Findings as other tools read them: a COCO document."""

from __future__ import annotations

from typing import Any

from labkit.segment.results import Findings
from labkit.segment.rle import area_of


def coco_document(findings: Findings, name: str) -> dict[str, Any]:
    """A COCO document of one image; `categories` are the sentences, found or not.

    Each annotation has its four scores apart, and none called `score`: a product of unlike things
    is no confidence. `answers` says of each sentence whether it is present, and why not.
    """
    prompts = [answer.prompt for answer in findings.answers]
    height, width = findings.image.shape[:2]
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1 + prompts.index(thing.prompt),
            "segmentation": thing.rle,
            "area": area_of(thing.rle),
            "bbox": _xywh(thing.box),
            "iscrowd": 0,
            "presence": thing.presence,
            "grounding": thing.grounding,
            "predicted_iou": thing.predicted_iou,
            "agreement": thing.agreement,
        }
        for number, thing in enumerate(findings.objects, 1)
    ]
    return {
        "info": {"description": findings.note or "labkit", **findings.models},
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "categories": [{"id": number, "name": p} for number, p in enumerate(prompts, 1)],
        "annotations": annotations,
        "answers": [
            {
                "prompt": answer.prompt,
                "present": answer.present,
                "presence": answer.presence,
                "reason": answer.reason,
            }
            for answer in findings.answers
        ],
    }


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
