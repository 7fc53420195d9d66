"""Masks as other tools read them: COCO's run lengths and annotations.

Source of the format: Lin et al., Microsoft COCO, 2014, as pycocotools implements it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError

if TYPE_CHECKING:
    from labkit.segment.segmentation import Segmentation


class Rle(TypedDict):
    """COCO's compressed run lengths of a mask: `size` is [H, W], `counts` is text."""

    size: list[int]
    counts: str


def encode_mask(mask: NDArray[np.bool_]) -> Rle:
    """The run lengths of a mask (H, W) bool.

    Raises:
        InputError: `mask` is no such array.
    """
    from pycocotools import mask as coco

    if mask.dtype != bool or mask.ndim != 2:
        raise InputError(f"mask must be bool (H, W), got {mask.dtype} {mask.shape}")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def decode_mask(rle: Rle) -> NDArray[np.bool_]:
    """The mask (H, W) bool of run lengths."""
    from pycocotools import mask as coco

    mask: NDArray[np.bool_] = coco.decode(_in_bytes(rle)).astype(bool)
    return mask


def area_of(rle: Rle) -> int:
    """Pixels of the mask."""
    from pycocotools import mask as coco

    return int(coco.area(_in_bytes(rle)))


def coco_document(segmentation: Segmentation, name: str) -> dict[str, Any]:
    """A COCO document of one image; `categories` are the sentences, found or not.

    Each annotation has its four scores apart, and none called `score`: a product of unlike things
    is no confidence. `answers` says of each sentence whether it is present, and why not.
    """
    prompts = [answer.prompt for answer in segmentation.answers]
    height, width = segmentation.image.shape[:2]
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
        for number, thing in enumerate(segmentation.objects, 1)
    ]
    return {
        "info": {"description": segmentation.note or "labkit", **segmentation.models},
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
            for answer in segmentation.answers
        ],
    }


def _in_bytes(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode()}


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
