"""Segmentations as other tools read them: documents, files, and the registry of their formats.

Every format keeps holes and separate parts of a mask to the pixel, and names the sentences, the
image file and the models. Coordinates are pixels (x, y), x to the right and y down, where pixel
(x, y) covers [x, x + 1) by [y, y + 1).
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.files import open_atomic, parse_json, write_json
from labkit.images import ImageSource
from labkit.runtime import InputError, SourceError
from labkit.segment.masks import join_rings, measure_area, trace_mask

if TYPE_CHECKING:
    from labkit.segment.results import Segmentation, SegmentedObject

SCORES = ("presence", "grounding", "predicted_iou", "agreement")
"""The scores of an object, by the names that every format gives them."""

_LABELME_VERSION = "5.5.0"


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


def to_coco(segmentation: Segmentation, name: str, *, polygons: bool = False) -> dict[str, Any]:
    """A COCO document of one image; its categories are the sentences, present or not.

    It serves as ground truth; `to_coco_results` gives results. Each annotation has its four scores
    apart, and none called `score`: a product of unlike things is no confidence. `sentences` says of
    each sentence whether it is present, why not, in `suggestions`, if there are any, which other
    forms of it would be, and in `detector_score`, if a detector was asked, how sure it is. Where
    presence was assumed, `assumed` is true and `present` is null, since nothing was judged.

    Args:
        segmentation: of one image.
        name: the file name of the image, which the document keeps as it is.
        polygons: masks as polygons along the edges of pixels, one for each part, and not as run
            lengths. A bridge of no width leads to each hole, since COCO's polygons have none.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((4, 6, 3), np.uint8), sentences=())
        >>> to_coco(nothing, "photo.jpg")["images"]
        [{'id': 1, 'file_name': 'photo.jpg', 'width': 6, 'height': 4}]
    """
    categories = _number_sentences(segmentation)
    height, width = segmentation.image.shape[:2]
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": categories[segmented.sentence],
            "segmentation": _trace_parts(segmented) if polygons else segmented.rle,
            "area": measure_area(segmented.rle),
            "bbox": _make_bbox(segmented),
            "iscrowd": 0,
            **_collect_scores(segmented),
        }
        for number, segmented in enumerate(segmentation, 1)
    ]
    return {
        "info": make_info(segmentation.note, segmentation.models, segmentation.settings),
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "categories": [{"id": id_, "name": text} for text, id_ in categories.items()],
        "annotations": annotations,
        "sentences": _describe_sentences(segmentation),
    }


def to_coco_results(
    segmentation: Segmentation,
    name: str,
    score: str = "presence",
    *,
    image_id: int = 1,
    category_ids: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """COCO's list of results, for `COCO.loadRes` and `COCOeval` against a ground truth.

    Args:
        segmentation: of one image.
        name: the file name of the image.
        score: which score ranks the objects, one of `SCORES`; each row names it.
        image_id: the id of the image in the ground truth.
        category_ids: the id of each sentence in the ground truth; None numbers them from 1, as
            `to_coco` does.

    Raises:
        InputError: there is no such score, or a sentence has no id.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((4, 6, 3), np.uint8), sentences=())
        >>> to_coco_results(nothing, "photo.jpg", "agreement")
        []
    """
    if score not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    categories = _number_sentences(segmentation) if category_ids is None else category_ids
    if missing := [o.sentence for o in segmentation if o.sentence not in categories]:
        raise InputError(f"category_ids has no id for {missing[0]!r}")
    return [
        {
            "image_id": image_id,
            "category_id": categories[segmented.sentence],
            "segmentation": segmented.rle,
            "bbox": _make_bbox(segmented),
            "score": getattr(segmented, score),
            "score_name": score,
            "sentence": segmented.sentence,
            "file_name": name,
            "models": dict(segmentation.models),
        }
        for segmented in segmentation
    ]


def merge_coco(documents: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the COCO documents of several images into one, with ids of its own.

    Args:
        documents: from `to_coco`, in the order that the images shall have.

    Returns:
        A document whose images and annotations are numbered from 1, and whose categories are all
        sentences in the order in which they first come. Its `info` is that of the first document.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((4, 6, 3), np.uint8), sentences=())
        >>> merged = merge_coco(to_coco(nothing, name) for name in ("a.jpg", "b.jpg"))
        >>> [(image["id"], image["file_name"]) for image in merged["images"]]
        [(1, 'a.jpg'), (2, 'b.jpg')]
    """
    merged: dict[str, Any] = {"info": {"description": "labkit"}}
    categories: dict[str, int] = {}
    images, annotations, sentences = list[Any](), list[Any](), list[Any]()
    for image_id, document in enumerate(documents, 1):
        if image_id == 1:
            merged["info"] = document["info"]
        names = {category["id"]: category["name"] for category in document["categories"]}
        for name in names.values():
            categories.setdefault(name, len(categories) + 1)
        images += [{**image, "id": image_id} for image in document["images"]]
        for row in document["annotations"]:
            ids = {"image_id": image_id, "category_id": categories[names[row["category_id"]]]}
            annotations.append({**row, "id": len(annotations) + 1, **ids})
        sentences += [{"image_id": image_id, **row} for row in document["sentences"]]
    return {
        **merged,
        "images": images,
        "categories": [{"id": id_, "name": name} for name, id_ in categories.items()],
        "annotations": annotations,
        "sentences": sentences,
    }


def to_labelme(segmentation: Segmentation, name: str) -> dict[str, Any]:
    """A LabelMe document: a polygon for each part of an object, all with its number as `group_id`.

    A bridge of no width leads to each hole. LabelMe opens the image called `name` beside the file.

    Args:
        segmentation: of one image.
        name: the file name of the image.
    """
    height, width = segmentation.image.shape[:2]
    shapes = [
        {
            "label": segmented.sentence,
            "points": join_rings(piece).astype(float).tolist(),
            "group_id": number,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
            **_collect_scores(segmented),
        }
        for number, segmented in enumerate(segmentation, 1)
        for piece in trace_mask(segmented.mask)
    ]
    return {
        "version": _LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": name,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
        "labkit": describe_origin(segmentation, name),
    }


def to_geojson(segmentation: Segmentation, name: str) -> dict[str, Any]:
    """A GeoJSON collection with a feature for each object, in pixels and not in degrees.

    The geometry is a MultiPolygon: a polygon for each part, its outer ring first, then its holes.

    Args:
        segmentation: of one image.
        name: the file name of the image.
    """
    features = [
        {
            "type": "Feature",
            "id": number,
            "geometry": {
                "type": "MultiPolygon",
                "coordinates": [
                    [[*ring.tolist(), ring[0].tolist()] for ring in piece]
                    for piece in trace_mask(segmented.mask)
                ],
            },
            "properties": {"sentence": segmented.sentence, **_collect_scores(segmented)},
        }
        for number, segmented in enumerate(segmentation, 1)
    ]
    origin = describe_origin(segmentation, name)
    return {"type": "FeatureCollection", "features": features, "labkit": origin}


def to_yolo(segmentation: Segmentation) -> str:
    """YOLO's text of an image for segmentation: a line for each object, "" for none.

    A line is the position of the sentence, from 0, and a polygon x1 y1 x2 y2 ... in shares of width
    and height. Bridges of no width join the parts of an object and its holes.
    """
    height, width = segmentation.image.shape[:2]
    positions = _number_sentences(segmentation)
    lines = []
    for segmented in segmentation:
        ring = join_rings([ring for piece in trace_mask(segmented.mask) for ring in piece])
        shares = " ".join(f"{share:.8g}" for share in (ring / (width, height)).ravel())
        lines.append(f"{positions[segmented.sentence] - 1} {shares}\n")
    return "".join(lines)


def to_labels(segmentation: Segmentation) -> NDArray[np.uint16]:
    """Number the objects in an image (H, W) uint16: 0 is ground, k the k-th object, from 1.

    Where masks overlap, the smallest object is on top, so that none of it is lost.

    Raises:
        InputError: there are more objects than 16 bits can number.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((1, 3, 3), np.uint8), sentences=())
        >>> to_labels(nothing).tolist()
        [[0, 0, 0]]
    """
    if len(segmentation) > np.iinfo(np.uint16).max:
        raise InputError(f"16 bits number at most 65535 objects, got {len(segmentation)}")
    labels = np.zeros(segmentation.image.shape[:2], np.uint16)
    numbered = list(enumerate(segmentation, 1))
    for number, segmented in sorted(numbered, key=lambda pair: -measure_area(pair[1].rle)):
        labels[segmented.mask] = number
    return labels


def to_cutout(segmentation: Segmentation, segmented: SegmentedObject) -> NDArray[np.uint8]:
    """Cut an object out of its image: (h, w, 4) uint8 RGBA, as large as its box.

    Alpha is 255 on the object and 0 elsewhere; the colours under it are those of the image.
    """
    left, top, right, bottom = segmented.box
    window = slice(top, bottom), slice(left, right)
    alpha = segmented.mask[window].astype(np.uint8) * np.uint8(255)
    return np.dstack([segmentation.image[window], alpha])


def to_supervision(segmentation: Segmentation) -> Any:
    """`supervision.Detections` of all objects, for its annotators, trackers and metrics.

    `class_id` is the position of the sentence, `confidence` is presence, that is whether the
    sentence is true of the image; `data` holds the sentence as `class_name`, the other scores, the
    `file_name` of the image, the `models`, and in `assumed` whether presence was assumed and not
    judged.

    Raises:
        SourceError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise SourceError("to_supervision needs supervision: pip install supervision") from error
    objects = segmentation.objects
    names = [result.sentence for result in segmentation.sentences]
    models = ", ".join(f"{key}: {value}" for key, value in segmentation.models.items())
    return supervision.Detections(
        xyxy=segmentation.boxes.astype(np.float32),
        mask=segmentation.masks,
        confidence=np.array([o.presence for o in objects], np.float32),
        class_id=np.array([names.index(o.sentence) for o in objects], int),
        data={
            "class_name": np.array([o.sentence for o in objects], str),
            "assumed": np.array([segmentation[o.sentence].assumed for o in objects], bool),
            **{
                score: np.array([getattr(o, score) for o in objects], float) for score in SCORES[1:]
            },
            "file_name": np.array([segmentation.file_name] * len(objects), str),
            "models": np.array([models] * len(objects), str),
        },
    )


def describe_origin(segmentation: Segmentation, name: str) -> dict[str, Any]:
    """What a segmentation was made of: image file, sentences with their verdicts, models, settings.

    Args:
        segmentation: of one image.
        name: the file name of the image.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((4, 6, 3), np.uint8), sentences=())
        >>> describe_origin(nothing, "photo.jpg")["file_name"]
        'photo.jpg'
    """
    return {
        "file_name": name,
        "sentences": _describe_sentences(segmentation),
        "models": dict(segmentation.models),
        "settings": dict(segmentation.settings),
        "note": segmentation.note,
    }


@dataclass(frozen=True)
class Format:
    """A format that segmentations are saved in.

    Attributes:
        path: the file, or the folder, that it writes in the folder of an image.
        write: writes it; takes the segmentation, that path and the file name of the image.
    """

    path: str
    write: Callable[[Segmentation, Path, str], None]


def write_formats(
    segmentation: Segmentation, folder: Path, name: str, formats: Sequence[str]
) -> None:
    """Write a segmentation into a folder in several formats; COCO's masks.json comes last.

    So where there is a masks.json, all else that was asked for is there too.

    Args:
        segmentation: of one image.
        folder: is created if it is missing.
        name: the file name of the image.
        formats: names in `FORMATS`.

    Raises:
        InputError: there is no such format.
        SourceError: something could not be written.
    """
    check_formats(formats)
    for format_name in sorted(set(formats), key=lambda each: each == "coco"):
        chosen = FORMATS[format_name]
        chosen.write(segmentation, folder / chosen.path, name)


def make_info(note: str, models: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """COCO's `info`: the note or the name of the program, the models, and settings if any.

    Example:
        >>> make_info("", {"SAM-2": "tiny"}, {})
        {'description': 'labkit', 'SAM-2': 'tiny'}
    """
    return {
        "description": note or "labkit",
        **models,
        **({"settings": dict(settings)} if settings else {}),
    }


def read_saved(
    folder: Path,
    file_name: str,
    sentences: Sequence[str],
    info: Mapping[str, Any],
    formats: Sequence[str],
) -> dict[str, Any] | None:
    """Read the COCO document of an image that was saved before; None if that is to be done again.

    Args:
        folder: of the image.
        file_name: of the image.
        sentences: what was asked for.
        info: what `make_info` would give now.
        formats: what must be there.

    Example:
        >>> read_saved(Path("no such folder"), "photo.jpg", ["dog"], {}, ["coco"]) is None
        True
    """
    try:
        document: dict[str, Any] = parse_json((folder / FORMATS["coco"].path).read_bytes())
        (image,) = document["images"]
        is_same = (
            image["file_name"] == file_name
            and [row["name"] for row in document["categories"]] == list(sentences)
            and document["info"] == info
        )
    except (OSError, ValueError, KeyError, TypeError):  # missing, or no document of ours
        return None
    is_whole = all((folder / FORMATS[name].path).exists() for name in formats)
    return document if is_same and is_whole else None


def check_formats(formats: Sequence[str]) -> None:
    """Make sure that `formats` is a list of names in `FORMATS`.

    Raises:
        InputError: it is not so.

    Example:
        >>> check_formats(["coco", "labelme"])
    """
    if isinstance(formats, str):
        raise InputError(f"formats must be a list of names, got a single text {formats!r}")
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"formats must be of {', '.join(FORMATS)}, got {unknown[0]!r}")


def _write_yolo(segmentation: Segmentation, folder: Path, name: str) -> None:
    """Write the labels of an image, and a data.yaml, which as JSON is YAML too."""
    stem = PurePath(PurePath(name).name).stem or "image"
    sentences = [result.sentence for result in segmentation.sentences]
    data = {
        "path": ".",
        "train": "images",
        "val": "images",
        "names": dict(enumerate(sentences)),
        "labkit": describe_origin(segmentation, name),
    }
    with open_atomic(folder / "labels" / f"{stem}.txt") as file:
        file.write(to_yolo(segmentation).encode())
    with open_atomic(folder / "data.yaml") as file:  # lone surrogates stay escapes
        text = json.dumps(data, indent=2, ensure_ascii=False)
        file.write(text.encode("utf-8", "backslashreplace"))


def _write_labels(segmentation: Segmentation, path: Path, name: str) -> None:
    numbers = {number: each.sentence for number, each in enumerate(segmentation, 1)}
    about = {**describe_origin(segmentation, name), "objects": numbers}
    _write_png(path, to_labels(segmentation), about)


def _write_cutouts(segmentation: Segmentation, folder: Path, name: str) -> None:
    """Write a PNG for each object, and remove those of an earlier run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"could not write {folder}: {error.strerror or error}") from error
    written = set()
    for number, segmented in enumerate(segmentation, 1):
        path = folder / f"{make_folder_name(number, segmented.sentence + '.png')}.png"
        about = {
            **describe_origin(segmentation, name),
            "sentence": segmented.sentence,
            "box": segmented.box,
            **_collect_scores(segmented),
        }
        _write_png(path, to_cutout(segmentation, segmented), about)
        written.add(path)
    for path in set(folder.glob("[0-9][0-9][0-9][0-9]*.png")) - written:
        path.unlink(missing_ok=True)


def _write_png(path: Path, pixels: NDArray[Any], about: Mapping[str, Any]) -> None:
    """Write a PNG, with what it is about as JSON in its text chunk `labkit`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("labkit", json.dumps(about))
    with open_atomic(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)


def _write_overlay(segmentation: Segmentation, path: Path, name: str) -> None:
    with open_atomic(path) as file:
        segmentation.overlay().savefig(file, format="png")


FORMATS: Mapping[str, Format] = {
    "coco": Format("masks.json", lambda found, path, name: write_json(path, to_coco(found, name))),
    "coco-polygons": Format(
        "polygons.json",
        lambda found, path, name: write_json(path, to_coco(found, name, polygons=True)),
    ),
    "coco-results": Format(
        "results.json", lambda found, path, name: write_json(path, to_coco_results(found, name))
    ),
    "labelme": Format(
        "labelme.json", lambda found, path, name: write_json(path, to_labelme(found, name))
    ),
    "yolo": Format("yolo", _write_yolo),
    "geojson": Format(
        "masks.geojson", lambda found, path, name: write_json(path, to_geojson(found, name))
    ),
    "labels": Format("labels.png", _write_labels),
    "cutouts": Format("cutouts", _write_cutouts),
    "overlay": Format("overlay.png", _write_overlay),
    "report": Format("report.html", lambda found, path, name: found.write_report(path, name)),
}
"""Every format, by the name that `Segmentation.save` and `labkit segment --format` give it."""


def _number_sentences(segmentation: Segmentation) -> dict[str, int]:
    """The sentences in their order, numbered from 1."""
    return {result.sentence: number for number, result in enumerate(segmentation.sentences, 1)}


def _describe_sentences(segmentation: Segmentation) -> list[dict[str, Any]]:
    return [
        {
            "sentence": result.sentence,
            "present": None if result.assumed else result.present,
            **({"assumed": True} if result.assumed else {}),
            "presence": result.presence,
            "reason": result.reason,
            **({} if result.detector_score is None else {"detector_score": result.detector_score}),
            **({"suggestions": dict(result.suggestions)} if result.suggestions else {}),
        }
        for result in segmentation.sentences
    ]


def _collect_scores(segmented: SegmentedObject) -> dict[str, float]:
    return {score: getattr(segmented, score) for score in SCORES}


def _make_bbox(segmented: SegmentedObject) -> list[int]:
    """COCO's box: left, top, width, height."""
    left, top, right, bottom = segmented.box
    return [left, top, right - left, bottom - top]


def _trace_parts(segmented: SegmentedObject) -> list[list[float]]:
    """COCO's polygons: x1, y1, x2, y2, ... of each part."""
    return [
        join_rings(piece).astype(float).ravel().tolist() for piece in trace_mask(segmented.mask)
    ]
