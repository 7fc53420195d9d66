"""Segmentations as other tools read them: a COCO document, supervision's detections."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.images import ImageSource
from labkit.runtime import SourceError
from labkit.segment.masks import measure_area

if TYPE_CHECKING:
    from labkit.segment.results import Segmentation


def get_file_name(source: ImageSource) -> str:
    """Return the real file name of an image source, for files that programs read.

    `labkit.images.describe` returns a cleaned and shortened name, for messages.

    Args:
        source: what `labkit.load_image` takes.

    Returns:
        The last part of a path, character by character; `os.fsencode` gives its bytes, also where
        they are no text. The last part of the path of an address, without its query. "image" for
        everything that has no name.

    Example:
        >>> get_file_name("photos/my  cat.png")
        'my  cat.png'
        >>> get_file_name("https://me:secret@host.org/photos/cat.png?token=secret")
        'cat.png'
        >>> get_file_name(np.zeros((4, 6), np.uint8))
        'image'
    """
    if not isinstance(source, str | os.PathLike):
        return "image"
    name = os.fsdecode(source)
    if match := re.match(r"[a-z][a-z0-9+.-]*://[^/?#]*([^?#]*)", name, re.IGNORECASE):
        return match[1].rstrip("/").rpartition("/")[2] or "image"
    return os.path.basename(name) or "image"


def make_folder_name(number: int, file_name: str) -> str:
    """Make the name of the folder for image `number` out of several.

    The name has at most 70 characters, all of them ASCII letters, digits, dots, dashes and
    underscores, so that every system can store it. Different numbers give different names.

    Args:
        number: from 1.
        file_name: the name of the image file.

    Example:
        >>> make_folder_name(7, "Müller: Café?.png")
        '0007-Muller_Cafe'
        >>> make_folder_name(8, "???.png")
        '0008'
    """
    stem = unicodedata.normalize("NFKD", PurePath(file_name).stem)
    ascii_stem = stem.encode("ascii", "ignore").decode("ascii")
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", ascii_stem)[:60].strip("._-")
    return f"{number:04d}-{safe}".rstrip("-")


def to_coco(segmentation: Segmentation, name: str) -> dict[str, Any]:
    """A COCO document of one image; its categories are the sentences, present or not.

    Each annotation has its four scores apart, and none called `score`: a product of unlike things
    is no confidence. `sentences` says of each sentence whether it is present, why not, and in
    `suggestions`, if there are any, which other forms of it would be; in `detector_score`, if a
    detector was asked, how sure it is. Where presence was assumed,
    `assumed` is true and `present` is null, since nothing was judged.

    Args:
        segmentation: of one image.
        name: the file name of the image, which the document keeps as it is.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((4, 6, 3), np.uint8), sentences=())
        >>> to_coco(nothing, "photo.jpg")["images"]
        [{'id': 1, 'file_name': 'photo.jpg', 'width': 6, 'height': 4}]
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
                "present": None if result.assumed else result.present,
                **({"assumed": True} if result.assumed else {}),
                "presence": result.presence,
                "reason": result.reason,
                **(
                    {}
                    if result.detector_score is None
                    else {"detector_score": result.detector_score}
                ),
                **({"suggestions": dict(result.suggestions)} if result.suggestions else {}),
            }
            for result in segmentation.sentences
        ],
    }


def to_supervision(segmentation: Segmentation) -> Any:
    """`supervision.Detections` of all objects, for its annotators, trackers and metrics.

    `class_id` is the position of the sentence, `confidence` is presence, that is whether the
    sentence is true of the image; `data` holds the sentence as `class_name`, the other scores, and
    in `assumed` whether presence was assumed and not judged.

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
            "assumed": np.array([segmentation[o.sentence].assumed for o in objects], bool),
            **{score: np.array([getattr(o, score) for o in objects], float) for score in scores},
        },
    )
