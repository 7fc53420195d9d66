"""Prompts, gate, choice and clean-up judged on photographs with true masks, without any weights.

The heat of a sentence is made from true masks as CLIPSeg makes it: on a grid of 22 × 22 patches,
upsampled, blobby, weaker where the object is small, uneven within it, with spurious ground. The
stand-in for SAM-2 knows the true objects, their parts and their groups, and answers a prompt with
the ambiguity of the real one: a part, the whole, several together. Everything is a function of the
seed, so the same data give the same figures.

    python benchmarks/photo_battery.py --data FOLDER

Figures by kind: `iou` is the mean over true objects of the IoU with the mask that is matched to
each (0 where none is); `recall` the share of objects with a mask of IoU 0.5 or more; `precision`
the share of masks that have such an object, among masks that overlap an object of this kind most.
Stuff is one object, and all masks of its sentence are one mask.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from labkit.segment.annotations import AnnotatedImage, load_annotations
from labkit.segment.checkpoints import get_profile
from labkit.segment.instances import label_components, measure_depth
from labkit.segment.metrics import auroc, bootstrap_interval, match_instances, mcc, pairwise_iou
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.prompts import Prompt, make_box

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

GRID, LONGEST, LOW_RES, SMALL_RES = 22, 352, 256, 64
KINDS = ("articulated", "thin", "contained", "disconnected", "crowd", "stuff", "small", "all")
PEOPLE = {"person", "pedestrian", "bicyclist"}
ABSENT = ("horse", "boat", "elephant")


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph, as far as the battery needs it: its true masks.

    Attributes:
        name: of the file and the draw.
        size: (H, W).
        masks: for each class, its objects (N, H, W).
        stuff: the classes that cannot be counted.
    """

    name: str
    size: tuple[int, int]
    masks: dict[str, NDArray[np.bool_]]
    stuff: frozenset[str]

    @property
    def number(self) -> int:
        """A number for the random generators, from the name."""
        return zlib.crc32(self.name.encode())


def read_photos(folder: Path, limit: int, draws: int) -> Iterator[Photo]:
    """Read `limit` photographs of CamVid, and `draws` of each of COCO and VOC, which are few."""
    camvid = load_annotations(folder / "camvid" / "val")
    for image in camvid[:: max(1, len(camvid) // limit)][:limit]:
        yield make_photo(image)
    for path in (folder / "photos" / "coco", folder / "photos" / "voc"):
        for image in load_annotations(path):
            photo = make_photo(image)
            for draw in range(draws):
                yield replace(photo, name=f"{photo.name} {draw}")


def make_photo(image: AnnotatedImage) -> Photo:
    """The true masks of an annotated image: its things, and what stuff is not small."""
    present = [target for target in image.targets if target.is_present]
    masks = {
        target.sentence: target.instances
        for target in present
        if len(target.instances) and (target.is_thing or target.mask.mean() >= 0.01)
    }
    stuff = frozenset(target.sentence for target in present if not target.is_thing)
    return Photo(image.name, image.image.shape[:2], masks, stuff)


def stage_photo(photo: Photo) -> Photo:
    """Put a post in front of each third large thing, and a child in front of each second adult.

    What is behind the post or the child is no longer seen: it is cut from the mask.
    """
    masks = {}
    for number, (name, objects) in enumerate(photo.masks.items()):
        objects, children = objects.copy(), []
        for index, mask in enumerate(objects):
            if name in photo.stuff or mask.mean() <= 0.005:
                continue
            left, top, right, bottom = make_box(mask).astype(int)
            if (index + number) % 3 == 0:
                at = left + int((0.3 + 0.1 * (index % 3)) * (right - left))
                mask[:, at : at + max(4, (right - left) // 12)] = False
            elif name in PEOPLE and (index + number) % 3 == 1:
                adult = mask[top:bottom, left:right].astype(np.uint8)
                child = np.zeros_like(mask)
                small = cv2.resize(adult, None, fx=0.5, fy=0.45) > 0
                x, y = left + (right - left) // 4, bottom - len(small)
                child[y:bottom, x : x + small.shape[1]] = small
                mask &= ~child
                children.append(child)
        masks[name] = np.stack([*objects, *children])
    return replace(photo, masks=masks)


def list_kinds(photo: Photo, name: str, index: int) -> set[str]:
    """The kinds of object `index` of a class."""
    objects = photo.masks[name]
    mask = objects[index]
    if name in photo.stuff:
        return {"stuff", "all"}
    kinds, area = {"all"}, mask.mean()
    left, top, right, bottom = make_box(mask)
    if 2 * measure_depth(mask).max() * 6 <= max(right - left, bottom - top):
        kinds.add("thin")
    if name in PEOPLE and area >= 0.005:
        kinds.add("articulated")
    if area < 0.005:
        kinds.add("small")
    _, areas = label_components(mask)
    if len(areas) > 2 and np.sort(areas[1:])[-2] >= 0.03 * areas[1:].sum():
        kinds.add("disconnected")
    if len(objects) >= 5:
        kinds.add("crowd")
    for other in np.delete(objects, index, axis=0):
        x0, y0, x1, y1 = make_box(other)
        overlap = max(0, min(x1, right) - max(x0, left)) * max(0, min(y1, bottom) - max(y0, top))
        larger = other.sum() > 1.5 * mask.sum()
        if larger and overlap >= 0.8 * (right - left) * (bottom - top):
            kinds.add("contained")
    return kinds


def make_heat(
    photo: Photo, sentence: str, spill: str | None = None, *, strength: float = 1.0, seed: int = 0
) -> Floats:
    """Make the map (h, w) of a sentence as CLIPSeg would, from true masks.

    Args:
        photo: with its masks.
        sentence: a class of the photo; of any other the map is spurious.
        spill: a class that looks alike and is warm too.
        strength: of the true heat.
        seed: of the random numbers, together with photo and sentence.
    """
    rng = np.random.default_rng([seed, photo.number, zlib.crc32(sentence.encode())])
    grid = np.zeros((GRID, GRID), np.float32)

    def add(objects: NDArray[np.bool_], gain: float) -> None:
        for mask in objects:
            cover = cv2.resize(mask.astype(np.float32), (GRID * 16, GRID * 16))
            cover = cv2.resize(cover, (GRID, GRID), interpolation=cv2.INTER_AREA)
            cover = cv2.GaussianBlur(cover, (0, 0), 0.6)
            texture = cv2.resize(rng.uniform(0.65, 1, (7, 7)).astype(np.float32), (GRID, GRID))
            sure = np.clip(1.05 + 0.2 * np.log10(max(mask.mean(), 1e-4)), 0.35, 0.95)
            sure *= gain * rng.uniform(0.85, 1)
            shape = np.minimum(cover / max(float(cover.max()), 0.3), 1)
            np.maximum(grid, sure * shape * texture, out=grid)

    for mask in photo.masks.values():  # what is there looks a little like anything
        add(mask[rng.random(len(mask)) < 0.3], rng.uniform(0.05, 0.25))
    if spill is not None:
        add(photo.masks[spill], 0.7)
    if sentence in photo.masks:
        add(photo.masks[sentence], strength)
    grid = np.clip(grid + np.abs(rng.normal(0, 0.015, grid.shape)) + 0.01, 0, 0.99)
    scale = LONGEST / max(photo.size)
    height, width = (max(1, round(side * scale)) for side in photo.size)
    large = cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(large, 0, 1)


@dataclass(frozen=True, eq=False)
class Region:
    """Something that SAM-2 may take for an object.

    Attributes:
        mask: (S, S) in its low resolution.
        level: 0 for a part, 1 for a whole, 2 for several.
        quality: the IoU that it predicts for this mask, in [0, 1], where the prompt fits.
    """

    mask: Mask
    level: int
    quality: float

    @cached_property
    def small(self) -> Floats:
        """(s * s,) the mask at a lower resolution still."""
        size = (SMALL_RES, SMALL_RES)
        small = cv2.resize(self.mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        return small.ravel()

    @cached_property
    def depth(self) -> Floats:
        """(S, S) distance from the outline, positive inside."""
        depth = measure_depth(self.mask) - measure_depth(~self.mask)
        return depth.astype(np.float32)

    @cached_property
    def box(self) -> NDArray[np.float64]:
        """(4,) XYXY in pixels of the low resolution."""
        return make_box(self.mask)


def list_regions(photo: Photo, seed: int) -> list[Region]:
    """Each object, its parts, and itself with what it touches; and the whole frame."""
    rng = np.random.default_rng([seed, photo.number])
    size = (LOW_RES, LOW_RES)
    objects = []
    for name, masks in photo.masks.items():
        for mask in masks:
            low = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
            if low.any():
                objects.append((name, low))
    regions = [Region(np.ones(size, dtype=bool), 2, 0.7)]
    for name, mask in objects:
        thin = measure_depth(mask).max() < 3
        regions.append(Region(mask, 1, rng.uniform(0.82, 0.95) - 0.15 * thin))
        rows, columns = np.nonzero(mask)
        if name in photo.stuff:
            seeds = rng.integers(0, len(rows), 4)
            far = (rows[:, None] - rows[seeds]) ** 2 + (columns[:, None] - columns[seeds]) ** 2
            part_of = far.argmin(axis=1)
        else:
            edges = (0.18, 0.55) if name in PEOPLE else (0.45,)
            part_of = np.searchsorted(edges, (rows - rows.min()) / max(np.ptp(rows), 1))
        for part in np.unique(part_of):
            piece = np.zeros_like(mask)
            piece[rows[part_of == part], columns[part_of == part]] = True
            regions.append(Region(piece, 0, rng.uniform(0.75, 0.93)))
        near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        same = [m for n, m in objects if n == name and m is not mask and (m & near).any()]
        other = [m for n, m in objects if n != name and n not in photo.stuff and (m & near).any()]
        for group in (same, other[:1]):
            if group:
                together = np.any([mask, *group], axis=0)
                regions.append(Region(together, 2, rng.uniform(0.6, 0.85)))
        if name not in photo.stuff:  # the whole and the ground around it: a blob
            blob = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
            regions.append(Region(blob, 2, rng.uniform(0.5, 0.75)))
    return regions


@dataclass(eq=False)
class KnowingSam2:
    """In the place of SAM-2: it answers from true masks, with the ambiguity of the real one.

    Attributes:
        use: which of points, box and mask of a prompt it looks at; "true box" is the box of the
            object that the prompt means most.
    """

    seed: int = 0
    use: tuple[str, ...] = ("points", "box", "mask")
    image_size: int = 4 * LOW_RES
    low_res_size: int = LOW_RES
    regions: list[Region] = field(default_factory=list)
    _texture: Floats = field(default_factory=lambda: np.zeros((LOW_RES, LOW_RES), np.float32))

    def look_at(self, photo: Photo) -> None:
        """Set the photograph that is asked about next."""
        self.regions = list_regions(photo, self.seed)
        rng = np.random.default_rng([self.seed, photo.number, 1])
        rough = rng.normal(0, 1, (LOW_RES // 8, LOW_RES // 8)).astype(np.float32)
        self._texture = cv2.resize(rough, (LOW_RES, LOW_RES), interpolation=cv2.INTER_CUBIC)
        self._small = np.stack([region.small for region in self.regions])
        self._boxes = np.stack([region.box for region in self.regions])
        self._levels = np.array([region.level for region in self.regions])

    def encode(self, _: object) -> object:
        """Nothing has to be encoded."""
        return object()

    def predict_points(self, _: object, points: NDArray[np.float64]) -> tuple[Floats, Floats]:
        """Answer single points; see `Sam2.predict_points`."""
        answers = [self._answer(point[None], np.ones(1), None, None) for point in points]
        return _stack(answers)

    def predict(self, _: object, prompts: Sequence[Prompt]) -> tuple[Floats, Floats]:
        """Answer prompts; see `Sam2.predict`."""
        return _stack(
            [
                self._answer(
                    prompt.points if "points" in self.use else prompt.points[:0],
                    prompt.labels if "points" in self.use else prompt.labels[:0],
                    self._find_box(prompt),
                    prompt.mask_logits if "mask" in self.use else None,
                )
                for prompt in prompts
            ]
        )

    def _find_box(self, prompt: Prompt) -> NDArray[np.float64] | None:
        """The box (4,) of a prompt in pixels of the low resolution, if boxes are looked at."""
        if "true box" in self.use:
            size = (SMALL_RES, SMALL_RES)
            region = cv2.resize(prompt.region.astype(np.float32), size).ravel()
            shared = np.minimum(self._small, region).sum(axis=1)
            ious = shared / np.maximum(self._small, region).sum(axis=1)
            box: NDArray[np.float64] = self._boxes[np.where(self._levels == 1, ious, -1).argmax()]
            return box
        return prompt.box / 4 if "box" in self.use else None

    def _answer(
        self,
        points: NDArray[np.float64],
        labels: NDArray[Any],
        box: NDArray[np.float64] | None,
        mask_logits: Floats | None,
    ) -> tuple[Floats, Floats]:
        """Four masks (4, S, S): the best of all, the best part, whole and several."""
        logits = np.full((4, LOW_RES, LOW_RES), -8, np.float32)
        ious = np.full(4, 0.1, np.float32)
        pixels = np.clip(points / 4, 0, LOW_RES - 1).astype(int)
        inside = np.array([r.mask[pixels[:, 1], pixels[:, 0]] for r in self.regions], float)
        inside = inside.reshape(len(self.regions), len(pixels))
        fits, front = [], labels == 1
        if front.any():
            fits.append(inside[:, front].mean(axis=1))
        if (~front).any():
            fits.append(1 - inside[:, ~front].mean(axis=1))
        if box is not None:
            fits.append(_box_ious(self._boxes, box))
        if mask_logits is not None:
            size = (SMALL_RES, SMALL_RES)
            soft = cv2.resize((mask_logits + 10) / 20, size, interpolation=cv2.INTER_AREA).ravel()
            shared = np.minimum(self._small, soft).sum(axis=1)
            fits.append(shared / np.maximum(self._small, soft).sum(axis=1))
        fit = np.mean(fits, axis=0) + 0.02 * (self._levels == 1)
        chosen = [int(fit.argmax())]
        for level in range(3):
            of_level = np.where(self._levels == level, fit, -1)
            chosen.append(int(of_level.argmax()))
        for place, index in enumerate(chosen):
            if fit[index] < 0.05:
                continue
            logits[place] = np.clip(2 * self.regions[index].depth + self._texture, -12, 12)
            if box is not None:
                logits[place][~_inside_box(box)] = -12
            ious[place] = self.regions[index].quality * (0.55 + 0.45 * min(1, 1.4 * fit[index]))
        return logits, ious


def _inside_box(box: NDArray[np.float64]) -> Mask:
    """A mask (S, S) of a box and a margin around it, beyond which SAM-2 does not look."""
    left, top, right, bottom = box
    x, y = 2 + 0.12 * (right - left), 2 + 0.12 * (bottom - top)
    mask = np.zeros((LOW_RES, LOW_RES), dtype=bool)
    rows = slice(max(0, int(top - y)), int(bottom + y) + 1)
    mask[rows, max(0, int(left - x)) : int(right + x) + 1] = True
    return mask


def _box_ious(boxes: NDArray[np.float64], box: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU (R,) of boxes (R, 4) with one box (4,)."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return shared / np.maximum(areas - shared, 1e-9)


def _stack(answers: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    if not answers:
        return np.zeros((0, 4, LOW_RES, LOW_RES), np.float32), np.zeros((0, 4), np.float32)
    return np.stack([a[0] for a in answers]), np.stack([a[1] for a in answers])


@dataclass(frozen=True, kw_only=True)
class ObjectRow:
    """One true object, or one mask: `kinds`, whether it is `true`, its IoU with its partner."""

    photo: int
    kinds: frozenset[str]
    true: bool
    iou: float


@dataclass(frozen=True, kw_only=True)
class SentenceRow:
    """One sentence: `case` is plain, synonym or negative."""

    photo: int
    case: str
    is_true: bool
    presence: float
    present: bool


@dataclass(eq=False)
class GivenMaps:
    """In the place of CLIPSeg: only its grain is asked for."""

    patch_size: int = LONGEST // GRID


def measure_photo(
    segmenter: TextSegmenter, sam2: KnowingSam2, photo: Photo, number: int, seed: int
) -> Iterator[ObjectRow | SentenceRow]:
    """Ask for every class, a synonym and what is absent; and for a class beside a like one."""
    names = list(photo.masks)
    things = [name for name in names if name not in photo.stuff]
    if not names:
        return
    sam2.look_at(photo)
    synonym = (things or names)[number % len(things or names)]
    sentences = [*names, f"another word for {synonym}", *ABSENT]
    wanted = [make_heat(photo, name, seed=seed) for name in names]
    again = make_heat(photo, synonym, strength=0.8, seed=seed + 1)
    absent = [make_heat(photo, name, seed=seed) for name in ABSENT]
    truths = {**photo.masks, sentences[len(names)]: photo.masks[synonym]}
    maps = np.stack([*wanted, again, *absent])
    yield from _ask(segmenter, photo, number, sentences, truths, maps, "plain")
    if len(things) >= 2:
        first, second = (things[(number + shift) % len(things)] for shift in (0, 1))
        heat = make_heat(photo, first, spill=second, seed=seed + 2)[None]
        other = make_heat(photo, second, seed=seed + 2)[None]
        truths = {first: photo.masks[first]}
        yield from _ask(segmenter, photo, number, [first], truths, heat, "negative", other)


def _ask(
    segmenter: TextSegmenter,
    photo: Photo,
    number: int,
    sentences: Sequence[str],
    truths: dict[str, NDArray[np.bool_]],
    wanted: Floats,
    case: str,
    unwanted: Floats | None = None,
) -> Iterator[ObjectRow | SentenceRow]:
    image = np.zeros((*photo.size, 3), np.uint8)
    found = segmenter.segment_maps(image, sentences, wanted=wanted, unwanted=unwanted)
    for result in found.sentences:
        name = result.sentence
        true = name in truths
        extra = {"synonym"} if name.startswith("another") else {case} - {"plain"}
        yield SentenceRow(
            photo=number,
            case=next(iter(extra), case),
            is_true=true,
            presence=result.presence,
            present=result.present,
        )
        if not true:
            continue
        objects, masks = truths[name], np.zeros((0, *photo.size), dtype=bool)
        if result.objects:
            masks = np.stack([o.mask for o in result.objects])
        class_name = name.removeprefix("another word for ")
        if class_name in photo.stuff:
            masks = masks.any(axis=0, keepdims=True)[: len(masks)]
        kinds = [
            frozenset(extra or list_kinds(photo, class_name, index))
            for index in range(len(objects))
        ]
        table = pairwise_iou(objects, masks)
        pairs = dict(match_instances(table, 0.0)) if masks.size else {}
        for index in range(len(objects)):
            iou = float(table[index, pairs[index]]) if index in pairs else 0.0
            yield ObjectRow(photo=number, kinds=kinds[index], true=True, iou=iou)
        partners = {mask: index for index, mask in pairs.items()}
        for mask in range(len(masks)):
            nearest = int(table[:, mask].argmax())
            iou = float(table[partners[mask], mask]) if mask in partners else 0.0
            of = kinds[nearest] if table[nearest, mask] else frozenset(extra or {"all"})
            yield ObjectRow(photo=number, kinds=of, true=False, iou=iou)


def summarize(rows: Sequence[ObjectRow | SentenceRow]) -> dict[str, Any]:
    """Figures by kind with 95 % intervals from resampled photographs, and those of presence."""
    objects = [row for row in rows if isinstance(row, ObjectRow)]
    sentences = [row for row in rows if isinstance(row, SentenceRow)]
    kinds = {}
    for kind in (*KINDS, "synonym", "negative"):
        true = [row for row in objects if kind in row.kinds and row.true]
        masks = [row for row in objects if kind in row.kinds and not row.true]
        kinds[kind] = {"n_objects": len(true), "n_masks": len(masks)}
        for name, part, values in (
            ("iou", true, [row.iou for row in true]),
            ("recall", true, [float(row.iou >= 0.5) for row in true]),
            ("precision", masks, [float(row.iou >= 0.5) for row in masks]),
        ):
            groups = [row.photo for row in part]
            kinds[kind][name] = round(float(np.mean(values)), 4) if values else None
            kinds[kind][f"{name}_ci"] = (
                [round(float(x), 4) for x in bootstrap_interval(np.array(values), groups=groups)]
                if len(set(groups)) > 1
                else None
            )
    truth = np.array([row.is_true for row in sentences])
    presence = np.array([row.presence for row in sentences])
    present = np.array([row.present for row in sentences])
    synonyms = [row.present for row in sentences if row.case == "synonym"]
    return {
        "kinds": kinds,
        "presence": {
            "n": len(sentences),
            "auroc": round(auroc(truth, presence), 4),
            "mcc": round(mcc(truth, present), 4),
            "recall": round(float(present[truth].mean()), 4),
            "false_alarms": round(float(present[~truth].mean()), 4),
            "recall_synonyms": round(float(np.mean(synonyms)), 4),
        },
    }


def main() -> None:
    """Measure, and write benchmarks/results/photo-battery.json."""
    from common import write_result  # beside this script

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=40, help="photographs of CamVid")
    parser.add_argument("--draws", type=int, default=4, help="of the heat of COCO's and VOC's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/photo-battery.json"))
    arguments = parser.parse_args()
    photos = [
        stage_photo(photo)
        for photo in read_photos(arguments.data, arguments.limit, arguments.draws)
    ]
    sam2 = KnowingSam2(arguments.seed)
    stand_ins: Any = GivenMaps(), sam2
    segmenter = TextSegmenter(*stand_ins, presence=get_profile("full").presence)
    rows = [
        row
        for number, photo in enumerate(tqdm(photos))
        for row in measure_photo(segmenter, sam2, photo, number, arguments.seed)
    ]
    settings = {"n_photos": len(photos), "seed": arguments.seed, "draws": arguments.draws}
    write_result(arguments.out, {**settings, **summarize(rows)})


if __name__ == "__main__":
    main()
