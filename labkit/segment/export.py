"""Segmentations as other tools read them: a COCO document, supervision's detections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.runtime import SourceError
from labkit.segment.masks import measure_area

if TYPE_CHECKING:
    from labkit.segment.results import Segmentation


def to_coco(segmentation: Segmentation, name: str) -> dict[str, Any]:
    """A COCO document of one image; its categories are the sentences, present or not.

    Each annotation has its four scores apart, and none called `score`: a product of unlike things
    is no confidence. `sentences` says of each sentence whether it is present, and why not.
    """
    sentences = [result.sentence for result in segmentation.sentences]
    height, width = segmentation.image.shape[:2]
    annotations = []
    for number, segmented in enumerate(segmentation, 1):
        left, top, right, bottom = segmented.box
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": 1 + sentences.index(segmented.sentence),
                "segmentation": segmented.rle,
                "area": measure_area(segmented.rle),
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
                "presence": segmented.presence,
                "grounding": segmented.grounding,
                "predicted_iou": segmented.predicted_iou,
                "agreement": segmented.agreement,
            }
        )
    return {
        "info": {"description": segmentation.note or "labkit", **segmentation.models},
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "categories": [{"id": id_, "name": text} for id_, text in enumerate(sentences, 1)],
        "annotations": annotations,
        "sentences": [
            {
                "sentence": result.sentence,
                "present": result.present,
                "presence": result.presence,
                "reason": result.reason,
            }
            for result in segmentation.sentences
        ],
    }


def to_supervision(segmentation: Segmentation) -> Any:
    """`supervision.Detections` of all objects, for its annotators, trackers and metrics.

    `class_id` is the position of the sentence, `confidence` is presence, that is whether the
    sentence is true of the image; `data` holds the sentence as `class_name` and the other scores.

    Raises:
        SourceError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise SourceError("to_supervision needs supervision: pip install supervision") from error
    objects = segmentation.objects
    names = [result.sentence for result in segmentation.sentences]
    scores = ("grounding", "predicted_iou", "agreement")
    return supervision.Detections(
        xyxy=segmentation.boxes.astype(np.float32),
        mask=segmentation.masks,
        confidence=np.array([o.presence for o in objects], np.float32),
        class_id=np.array([names.index(o.sentence) for o in objects], int),
        data={
            "class_name": np.array([o.sentence for o in objects], str),
            **{score: np.array([getattr(o, score) for o in objects], float) for score in scores},
        },
    )
