"""Annotated photographs: folders of label images, and the JSON of COCO, RefCOCO and PhraseCut.

Each image comes with sentences, and each sentence with the true mask of what it names; a sentence
that names nothing has an empty one. Images and masks are read one at a time, when they are used.

Sources: Brostow et al., Semantic Object Classes in Video (CamVid), 2009; Lin et al., Microsoft
COCO, 2014; Kirillov et al., Panoptic Segmentation, 2019; Yu et al., Modeling Context in Referring
Expressions (RefCOCO), 2016; Liu et al., GRES (gRefCOCO), 2023; Wu et al., PhraseCut, 2020.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from labkit.files import describe_unreadable, parse_json
from labkit.images import list_images, load_image, open_image
from labkit.runtime import InputError, as_one_line
from labkit.segment.instances import label_components

Masks = NDArray[np.bool_]
Size = tuple[int, int]

MINIMUM_SHARE = 0.001
"""Share of an image from which a region of a label image is an instance."""


@dataclass(frozen=True, kw_only=True)
class LabelClass:
    """A class of a label image.

    Attributes:
        name: the sentence that names it.
        is_thing: whether it can be counted, as cars can and sky cannot.
        is_ignored: whether its pixels have no known class.
    """

    name: str
    is_thing: bool = True
    is_ignored: bool = False


CAMVID_CLASSES = (
    *(LabelClass(name=name, is_thing=False) for name in ("sky", "building")),
    LabelClass(name="pole"),
    *(LabelClass(name=name, is_thing=False) for name in ("road", "pavement", "tree")),
    LabelClass(name="sign"),
    LabelClass(name="fence", is_thing=False),
    *(LabelClass(name=name) for name in ("car", "pedestrian", "bicyclist")),
    LabelClass(name="unlabelled", is_ignored=True),
)
"""Of CamVid as in the SegNet tutorial, by label; what can be counted is a thing."""

_LABELS_SUFFIX = "_labels.png"
_IGNORED_NAMES = {"unlabelled", "unlabeled", "void", "ignore", "ignored"}
_IGNORED_LABEL = 255  # of many data sets, Pascal VOC the first


@dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """A sentence, and what it truly names in an image.

    Attributes:
        sentence: the sentence.
        mask: (H, W) bool, all that it names; empty if it names nothing.
        is_thing: whether it names things, which can be counted, or stuff, such as sky.
        instances: (N, H, W) bool. Stuff has one, which is its mask. Things in label images have
            those connected regions that cover at least `MINIMUM_SHARE` of the image.
        ignore: (H, W) bool, pixels that do not count: those without a label, and those of `crowd`.
            No pixel of `mask` is among them.
        crowd: (H, W) bool, what the sentence names too, but nobody took apart.
    """

    sentence: str
    mask: Masks
    is_thing: bool
    instances: Masks
    ignore: Masks
    crowd: Masks

    @property
    def is_present(self) -> bool:
        """Whether the sentence names anything in the image."""
        return bool(self.mask.any())


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotatedImage:
    """An image and what sentences name in it.

    Attributes:
        path: the file of the image.
        name: its name for reports; a crop says where it was.
        image: (H, W, 3) uint8 RGB.
        targets: for each sentence what it names. Sentences of which that is not known are left
            out: those of a crowd alone, and those whose pixels in a label image or a crop are
            together less than `MINIMUM_SHARE` of it.
    """

    path: Path
    name: str
    image: NDArray[np.uint8]
    targets: tuple[Target, ...]

    def crop(self, left: int, top: int, width: int, height: int) -> AnnotatedImage:
        """The part of the image whose upper left pixel is (`left`, `top`).

        Of instances and masks the part inside is kept, unless the crop left less than
        `MINIMUM_SHARE` of its own pixels of them.

        Raises:
            InputError: the part does not lie in the image.
        """
        size = self.image.shape[:2]
        if min(left, top) < 0 or min(width, height) < 1:
            raise InputError(f"a crop must lie in the image, got {(left, top, width, height)}")
        if top + height > size[0] or left + width > size[1]:
            raise InputError(f"a crop must lie in {size}, got {(left, top, width, height)}")
        rows, columns = slice(top, top + height), slice(left, left + width)
        targets = []
        for target in self.targets:
            cut = replace(
                target,
                mask=target.mask[rows, columns],
                instances=_cut_instances(target.instances, rows, columns),
                ignore=target.ignore[rows, columns],
                crowd=target.crowd[rows, columns],
            )
            is_sliver = _is_sliver(cut.mask, target.mask)
            if not is_sliver and (cut.is_present or not cut.crowd.any()):
                targets.append(cut)
        return replace(
            self,
            name=f"{self.name} at {left},{top}",
            image=np.ascontiguousarray(self.image[rows, columns]),
            targets=tuple(targets),
        )

    def split_into_crops(self) -> list[AnnotatedImage]:
        """Squares of half the shorter edge, evenly spread, that cover the image row by row."""
        height, width = self.image.shape[:2]
        edge = max(min(height, width) // 2, 1)
        return [
            self.crop(left, top, edge, edge)
            for top in _spread(height, edge)
            for left in _spread(width, edge)
        ]


def _is_sliver(part: Masks, whole: Masks) -> bool:
    """Whether a crop left little of a mask."""
    return 0 < part.mean() < MINIMUM_SHARE and np.count_nonzero(part) < np.count_nonzero(whole)


def _cut_instances(instances: Masks, rows: slice, columns: slice) -> Masks:
    parts = instances[:, rows, columns]
    kept = [p.any() and not _is_sliver(p, i) for p, i in zip(parts, instances, strict=True)]
    visible: Masks = parts[np.array(kept, dtype=bool)]
    return visible


def _spread(length: int, edge: int) -> list[int]:
    """Where pieces of `edge` pixels begin that cover `length` pixels evenly."""
    count = -(-length // edge)
    return [round(place) for place in np.linspace(0, length - edge, count)]


ReadTargets = Callable[[Size], list[Target]]


@dataclass(frozen=True, kw_only=True)
class _Record:
    """An image that was not read yet, and how its targets are read for its (H, W)."""

    path: Path
    read_targets: ReadTargets

    def load(self) -> AnnotatedImage:
        image = load_image(self.path)
        targets = tuple(self.read_targets((image.shape[0], image.shape[1])))
        return AnnotatedImage(path=self.path, name=self.path.name, image=image, targets=targets)


class Annotations(Sequence[AnnotatedImage]):
    """Annotated images that are read from disk, each time anew, when they are indexed.

    Attributes:
        name: of the data, for reports.
        is_exclusive: whether the sentences exclude each other, as classes do; phrases do not.
    """

    def __init__(self, name: str, records: Sequence[_Record], *, is_exclusive: bool) -> None:
        self.name, self.is_exclusive = name, is_exclusive
        self._records = tuple(records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> AnnotatedImage: ...

    @overload
    def __getitem__(self, index: slice) -> Annotations: ...

    def __getitem__(self, index: int | slice) -> AnnotatedImage | Annotations:
        if isinstance(index, slice):
            records = self._records[index]
            return Annotations(self.name, records, is_exclusive=self.is_exclusive)
        return self._records[index].load()

    def __iter__(self) -> Iterator[AnnotatedImage]:
        return (record.load() for record in self._records)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the images, in order."""
        return tuple(record.path for record in self._records)


def load_annotations(
    path: str | Path, *, images: str | Path | None = None, split: str | None = None
) -> Annotations:
    """Open annotated images, and recognise by their content what they are.

    - A folder of label images: NAME.jpg beside NAME_labels.png, whose pixels are labels. Without
      more they are the classes of CamVid. `classes.txt` names others, one a line in order of label
      from 0, "road, stuff" if they cannot be counted; `classes.json` is a list of
      {"name": …, "isthing": 0 or 1}, or of names. The label 255 and a class called "unlabelled",
      "void" or "ignore" do not count.
    - COCO instances: a JSON file. A category without an object is absent.
    - COCO panoptic: a JSON file and a folder of PNG files, id = R + 256 G + 65536 B.
    - RefCOCO and gRefCOCO: `refs(unc).json` or another name that begins with "refs" or "grefs",
      beside `instances.json`; also the one file of MDETR, such as `finetune_refcoco_val.json`,
      whose images have captions. `refs(unc).p` is a pickle, which could run any code: it is not
      read.
    - PhraseCut: `refer_val.json`, whose images are IMAGE_ID.jpg.

    Sentences that are absent are known from label images, COCO and gRefCOCO alone.

    Args:
        path: the folder or the JSON file. Of a folder, its one JSON file is taken.
        images: the folder of the images; None looks beside the JSON file.
        split: of RefCOCO, such as "val" or "testA"; None takes all.

    Raises:
        InputError: there is nothing of this kind, an image is missing, or a class is unknown.
        SourceError: a file could not be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (4, 2)).save(folder / "street.jpg")
        >>> Image.new("L", (4, 2), 3).save(folder / "street_labels.png")
        >>> (street,) = load_annotations(folder)
        >>> [target.sentence for target in street.targets if target.is_present]
        ['road']
    """
    path = Path(path)
    folder = None if images is None else Path(images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"images must be a folder, got {folder}")
    if path.is_dir() and next(path.glob(f"*{_LABELS_SUFFIX}"), None):
        return _open_label_images(path)
    file = _find_json(path)
    document = _read_json(file)
    first = document[0] if isinstance(document, list) and document else document
    keys = set(first) if isinstance(first, dict) else set()
    if "Polygons" in keys and "phrase" in keys:
        return _open_phrasecut(file, document, folder)
    if {"sentences", "ann_id", "image_id"} <= keys:
        return _open_refcoco(file, document, folder, split)
    if {"images", "annotations"} <= keys:
        return _open_coco(file, document, folder)
    raise InputError(
        f"{file} is no annotation of COCO, RefCOCO or PhraseCut; see load_annotations for the forms"
    )


def _find_json(path: Path) -> Path:
    """The JSON file of annotations that `path` is or holds."""
    pickles = [path] if path.suffix == ".p" else sorted(path.glob("*refs(*).p"))
    if path.is_file() and not pickles:
        return path
    if not path.exists():
        raise InputError(f"there is no {path}; give a folder of label images or a JSON file")
    files = [file for file in sorted(path.glob("*.json")) if file.name != "classes.json"]
    references = [file for file in files if re.match(r"g?refs\b", file.name)]
    if pickles and not references:
        raise InputError(
            f"{pickles[0]} is a pickle, which could run any code; if you trust it, convert it once "
            "with json.dump(pickle.load(...), ...), and give the JSON file"
        )
    if len(references or files) == 1:
        return (references or files)[0]
    if files:
        names = ", ".join(file.name for file in files[:5])
        raise InputError(f"{path} holds several annotations; give one of {names}")
    raise InputError(f"{path} holds neither NAME{_LABELS_SUFFIX} beside NAME.jpg nor a JSON file")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise describe_unreadable(path, error) from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {as_one_line(error)}") from error


def _check_images(file: Path, paths: Iterable[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{file.name} names {len(missing)} images that are not there, such as {missing[0]}; "
            "give their folder as images, or download them"
        )


def _find_images(file: Path, names: Sequence[str], images: Path | None) -> Path:
    """The folder in which most of the first `names` lie: `images`, or one beside `file`."""
    if images is not None:
        return images
    beside = [*sorted(file.parent.iterdir()), *sorted(file.parent.parent.iterdir())]
    folders = [file.parent, *(path for path in beside if path.is_dir())]
    return max(folders, key=lambda folder: sum((folder / name).is_file() for name in names[:20]))


# Label images


def _open_label_images(folder: Path) -> Annotations:
    classes = _load_classes(folder)
    listed = {path.name: path for path in list_images(folder, recursive=False)[0]}
    labels = [name for name in listed if name.endswith(_LABELS_SUFFIX)]
    by_stem = {path.stem: path for name, path in listed.items() if name not in set(labels)}
    stems = [name.removesuffix(_LABELS_SUFFIX) for name in labels]
    alone = [stem for stem in stems if stem not in by_stem]
    if alone:
        raise InputError(
            f"{folder} has no image for {len(alone)} label images, such as {alone[0]}.jpg for "
            f"{alone[0]}{_LABELS_SUFFIX}"
        )
    records = [
        _Record(
            path=by_stem[stem],
            read_targets=partial(_read_label_image, listed[name], classes),
        )
        for stem, name in zip(stems, labels, strict=True)
    ]
    return Annotations(f"label images in {folder.name}", records, is_exclusive=True)


def _load_classes(folder: Path) -> tuple[LabelClass, ...]:
    """The classes by label that the folder, or else CamVid, has."""
    text, document = folder / "classes.txt", folder / "classes.json"
    if document.is_file():
        entries = _read_json(document)
        is_list = isinstance(entries, list) and entries
        if not is_list or not all(isinstance(e, str | dict) and _get_name(e) for e in entries):
            raise InputError(
                f'{document} must be a list of names or of {{"name": …, "isthing": …}}'
            )
        things = [bool(e.get("isthing", 1)) if isinstance(e, dict) else True for e in entries]
        names = [_get_name(entry) for entry in entries]
    elif text.is_file():
        lines = text.read_text(encoding="utf-8").strip().splitlines()
        things = [not re.search(r",\s*stuff\s*$", line) for line in lines]
        names = [re.sub(r",\s*(stuff|thing)\s*$", "", line).strip() for line in lines]
        if not all(names):
            raise InputError(f"{text} must name a class in each line; line {names.index('') + 1}")
    else:
        return CAMVID_CLASSES
    return tuple(
        LabelClass(name=name, is_thing=thing, is_ignored=name.lower() in _IGNORED_NAMES)
        for name, thing in zip(names, things, strict=True)
    )


def _get_name(entry: str | Mapping[str, Any]) -> str:
    return str(entry if isinstance(entry, str) else entry.get("name") or "").strip()


def _read_label_image(path: Path, classes: Sequence[LabelClass], size: Size) -> list[Target]:
    labels = _read_labels(path, size)
    unknown = set(np.unique(labels).tolist()) - set(range(len(classes))) - {_IGNORED_LABEL}
    if unknown:
        raise InputError(
            f"{path} has the label {min(unknown)}, but there are {len(classes)} classes, from 0; "
            "name them all in classes.txt"
        )
    ignored = [number for number, each in enumerate(classes) if each.is_ignored]
    ignore = np.isin(labels, [*ignored, *([_IGNORED_LABEL] if len(classes) < 256 else [])])
    absent = np.zeros(size, dtype=bool)
    targets = []
    for number, label_class in enumerate(classes):
        mask = labels == number
        share = float(mask.mean())
        if label_class.is_ignored or 0 < share < MINIMUM_SHARE:
            continue
        targets.append(
            Target(
                sentence=label_class.name,
                mask=mask if share else absent,
                is_thing=label_class.is_thing,
                instances=_split_regions(mask) if label_class.is_thing else mask[None][: share > 0],
                ignore=ignore,
                crowd=absent,
            )
        )
    return targets


def _read_labels(path: Path, size: Size) -> NDArray[np.int64]:
    """The labels (H, W) of a grey or palette PNG."""
    try:
        with open_image(path, path.name) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise InputError(f"{path} must have one label a pixel, got colours ({image.mode})")
            labels = np.asarray(image).astype(np.int64)
    except InputError:
        raise
    except Exception as error:  # the decoders' errors have no common base
        raise InputError(f"{path} is damaged or cut short ({as_one_line(error)})") from error
    _check_size(path.name, (labels.shape[0], labels.shape[1]), size)
    return labels


def _check_size(name: str, size: Size, image_size: Size) -> None:
    if size != image_size:
        (height, width), (image_height, image_width) = size, image_size
        raise InputError(
            f"{name} is of {width} x {height} pixels, its image of {image_width} x {image_height}; "
            "they must be of one size"
        )


def _split_regions(mask: Masks) -> Masks:
    """Connected regions (N, H, W) of a mask that cover at least `MINIMUM_SHARE` of the image."""
    labels, areas = label_components(mask)
    numbers = [n for n in range(1, len(areas)) if areas[n] >= MINIMUM_SHARE * mask.size]
    regions: Masks = labels == np.array(numbers, dtype=labels.dtype).reshape(-1, 1, 1)
    return regions


# JSON of COCO


def _open_coco(file: Path, document: Mapping[str, Any], images: Path | None) -> Annotations:
    try:
        records = list(document["images"])
        names = [str(record["file_name"]) for record in records]
        folder = _find_images(file, names, images)
        by_image: dict[Any, list[Any]] = defaultdict(list)
        for annotation in document["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        paths = [folder / name for name in names]
        _check_images(file, paths)
        if records and "caption" in records[0]:
            return _open_captions(file, records, by_image, paths)
        categories = {each["id"]: each for each in document.get("categories", ())}
        _check_categories(file, by_image, categories)
        is_panoptic = any("segments_info" in each for each in document["annotations"])
        plan = _plan_panoptic if is_panoptic else _plan_instances
        return Annotations(
            file.name,
            [
                _Record(path=path, read_targets=plan(file, by_image[r["id"]], categories, r))
                for path, r in zip(paths, records, strict=True)
                if r["id"] in by_image or not is_panoptic
            ],
            is_exclusive=True,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no complete COCO annotation: {as_one_line(error)}") from error


def _check_categories(
    file: Path, by_image: Mapping[Any, Sequence[Any]], categories: Mapping[Any, Any]
) -> None:
    for category in categories.values():
        _name_category(category)
    for annotation in itertools.chain.from_iterable(by_image.values()):
        segments = annotation.get("segments_info")
        for segment in [annotation] if segments is None else segments:
            if segment["category_id"] not in categories:
                raise InputError(
                    f"{file.name} uses the category {segment['category_id']}, "
                    "which is not among its categories"
                )
            if segments is not None and not isinstance(segment["id"], int):
                raise TypeError(f"a segment has the id {segment['id']!r}")


def _plan_instances(
    file: Path,
    annotations: Sequence[Any],
    categories: Mapping[Any, Any],
    record: Mapping[str, Any],
) -> ReadTargets:
    return partial(_read_instances, str(record["file_name"]), record, annotations, categories)


def _plan_panoptic(
    file: Path,
    annotations: Sequence[Any],
    categories: Mapping[Any, Any],
    record: Mapping[str, Any],
) -> ReadTargets:
    path = _find_panoptic(file, str(annotations[0]["file_name"]))
    return partial(_read_panoptic, path, annotations[0]["segments_info"], categories)


def _find_panoptic(file: Path, name: str) -> Path:
    """The panoptic PNG, in the folder named like the JSON file or beside it."""
    stem = Path(name).stem
    folders = (file.with_suffix(""), file.parent)
    found = (
        folder / each
        for folder in folders
        for each in (name, f"{stem}_panoptic.png")
        if (folder / each).is_file()
    )
    path = next(found, None)
    if path is None:
        raise InputError(f"{file.name} names {name}, which is neither in {folders[0]} nor beside")
    return path


def _name_category(category: Mapping[str, Any]) -> str:
    """The sentence for a category: COCO's "sky-other-merged" is "sky"."""
    name = re.sub(r"(-other|-merged|-stuff)+$", "", str(category["name"]))
    return re.sub(r"[-_]+", " ", name).strip()


def _gather_targets(
    objects: Sequence[tuple[Any, bool, Masks]],
    categories: Mapping[Any, Any],
    unlabelled: Masks,
) -> list[Target]:
    """Targets of all categories from objects: (category id, whether a crowd, mask)."""
    members: dict[str, list[Any]] = defaultdict(list)
    for number, category in categories.items():
        members[_name_category(category)].append(number)
    nothing = np.zeros_like(unlabelled)
    targets = []
    for sentence, numbers in members.items():
        masks = [m for number, crowd, m in objects if number in numbers and not crowd and m.any()]
        crowds = [m for number, crowd, m in objects if number in numbers and crowd and m.any()]
        is_thing = any(categories[number].get("isthing", 1) for number in numbers)
        if crowds and not masks:
            continue
        mask = np.logical_or.reduce(masks) if masks else nothing
        instances = np.stack(masks) if masks else nothing[None][:0]
        crowd = np.logical_or.reduce(crowds) & ~mask if crowds else nothing
        targets.append(
            Target(
                sentence=sentence,
                mask=mask,
                is_thing=is_thing,
                instances=instances if is_thing or not masks else mask[None],
                ignore=(unlabelled & ~mask) | crowd if crowds else unlabelled,
                crowd=crowd,
            )
        )
    return targets


def _get_size(record: Mapping[str, Any], default: Size) -> Size:
    """The (H, W) that a record of an image states."""
    return record.get("height", default[0]), record.get("width", default[1])


def _read_instances(
    name: str,
    record: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    categories: Mapping[Any, Any],
    size: Size,
) -> list[Target]:
    _check_size(f"the annotation of {name}", _get_size(record, size), size)
    objects = [
        (each["category_id"], bool(each.get("iscrowd")), decode_segmentation(each, size))
        for each in annotations
    ]
    return _gather_targets(objects, categories, np.zeros(size, dtype=bool))


def decode_segmentation(annotation: Mapping[str, Any], size: Size) -> Masks:
    """Decode the `segmentation` of a COCO annotation, polygons or run lengths, to (H, W) bool.

    Raises:
        InputError: there is none, or it is none for an image of this height and width.

    Example:
        >>> square = {"segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}
        >>> int(decode_segmentation(square, (4, 4)).sum())
        4
    """
    from pycocotools import mask as coco

    segmentation = annotation.get("segmentation")
    what = f"annotation {annotation.get('id', '')}".rstrip()
    if not segmentation:
        raise InputError(f"{what} has no segmentation, which is needed; a box is not enough")
    try:
        if isinstance(segmentation, list):
            polygons = [np.asarray(polygon, dtype=float) for polygon in segmentation]
            if any(not (np.abs(polygon) <= 2 * max(size)).all() for polygon in polygons):
                raise ValueError("a corner lies far outside the image")
            corners = [polygon.tolist() for polygon in polygons if polygon.size >= 6]
            return _decode_rle(coco.merge(coco.frPyObjects(corners, *size)))
        _check_size(f"the segmentation of {what}", tuple(segmentation["size"]), size)
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if min(counts) < 0 or sum(counts) != size[0] * size[1]:
                raise ValueError("its run lengths do not fill the image")
            segmentation = coco.frPyObjects(segmentation, *size)
        return _decode_rle(segmentation)
    except InputError:
        raise
    except Exception as error:  # pycocotools raises whatever comes
        raise InputError(f"{what} has a damaged segmentation: {as_one_line(error)}") from error


def _decode_rle(rle: Any) -> Masks:
    from pycocotools import mask as coco

    mask: Masks = coco.decode(rle).astype(bool)
    return mask


def _read_panoptic(
    path: Path,
    segments: Sequence[Mapping[str, Any]],
    categories: Mapping[Any, Any],
    size: Size,
) -> list[Target]:
    colours = load_image(path).astype(np.int64)
    _check_size(path.name, (colours.shape[0], colours.shape[1]), size)
    ids = colours @ np.array([1, 256, 65536])
    unknown = set(np.unique(ids).tolist()) - {0, *(segment["id"] for segment in segments)}
    if unknown:
        raise InputError(
            f"{path} has the segment {min(unknown)}, which its JSON file does not name"
        )
    objects = [
        (segment["category_id"], bool(segment.get("iscrowd")), ids == segment["id"])
        for segment in segments
    ]
    return _gather_targets(objects, categories, ids == 0)


# Phrases


def _read_phrases(
    name: str,
    record: Mapping[str, Any] | None,
    phrases: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    size: Size,
) -> list[Target]:
    """Targets of phrases, each with the annotations of what it names; none means absent."""
    if record is not None:
        _check_size(f"the annotation of {name}", _get_size(record, size), size)
    nothing = np.zeros(size, dtype=bool)
    targets = []
    for sentence, named in phrases:
        masks = [decode_segmentation(annotation, size) for annotation in named]
        masks = [mask for mask in masks if mask.any()]
        if named and not masks:
            continue
        targets.append(
            Target(
                sentence=sentence,
                mask=np.logical_or.reduce(masks) if masks else nothing,
                is_thing=True,
                instances=np.stack(masks) if masks else nothing[None][:0],
                ignore=nothing,
                crowd=nothing,
            )
        )
    return targets


def _has_words(sentence: str) -> bool:
    return any(letter.isalnum() for letter in sentence)


def _open_refcoco(
    file: Path, references: Sequence[Any], images: Path | None, split: str | None
) -> Annotations:
    instances = file.parent / "instances.json"
    if not instances.is_file():
        raise InputError(f"{file} needs the masks, which are in {instances}: it is missing")
    document = _read_json(instances)
    try:
        masks = {annotation["id"]: annotation for annotation in document["annotations"]}
        records = {record["id"]: record for record in document["images"]}
        splits = sorted({str(reference["split"]) for reference in references})
        if split is not None and split not in splits:
            raise InputError(f"split must be of {', '.join(splits)}, got {split!r}")
        phrases: dict[Any, list[Any]] = defaultdict(list)
        for reference in references:
            if split in (None, reference["split"]):
                numbers = reference["ann_id"]
                numbers = numbers if isinstance(numbers, list) else [numbers]
                named = [masks[number] for number in numbers if number != -1]  # -1: gRefCOCO's none
                texts = [str(each["sent"]) for each in reference["sentences"]]
                phrases[reference["image_id"]] += [(t, named) for t in texts if _has_words(t)]
        names = [str(records[number]["file_name"]) for number in phrases]
        folder = _find_images(file, names, images)
        return _collect(
            file,
            [(folder / str(records[n]["file_name"]), records[n], ps) for n, ps in phrases.items()],
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file} does not fit {instances}: {as_one_line(repr(error))}") from error


def _open_captions(
    file: Path,
    records: Sequence[Mapping[str, Any]],
    by_image: Mapping[Any, Sequence[Any]],
    paths: Sequence[Path],
) -> Annotations:
    """The file of MDETR: an image occurs once for each phrase, which is its caption."""
    phrases: dict[Path, list[Any]] = defaultdict(list)
    sizes = dict(zip(paths, records, strict=True))
    for path, record in zip(paths, records, strict=True):
        caption = str(record["caption"])
        if _has_words(caption):
            phrases[path].append((caption, by_image[record["id"]]))
    return _collect(file, [(path, sizes[path], named) for path, named in phrases.items()])


def _open_phrasecut(file: Path, tasks: Sequence[Any], images: Path | None) -> Annotations:
    try:
        phrases: dict[str, list[Any]] = defaultdict(list)
        for task in tasks:
            named = [
                {"segmentation": [np.ravel(polygon).tolist() for polygon in polygons]}
                for polygons in task["Polygons"]
            ]
            if _has_words(str(task["phrase"])):
                phrases[f"{task['image_id']}.jpg"].append((str(task["phrase"]), named))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is no complete PhraseCut: {as_one_line(repr(error))}") from error
    folder = _find_images(file, list(phrases), images)
    return _collect(file, [(folder / name, None, named) for name, named in phrases.items()])


def _collect(file: Path, entries: Sequence[tuple[Path, Any, Any]]) -> Annotations:
    """Annotations from (path, the record with the size or None, phrases) of each image."""
    _check_images(file, [path for path, _, _ in entries])
    return Annotations(
        file.name,
        [
            _Record(path=path, read_targets=partial(_read_phrases, path.name, record, phrases))
            for path, record, phrases in entries
        ],
        is_exclusive=False,
    )
