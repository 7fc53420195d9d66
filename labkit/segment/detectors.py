"""Sentences and an image to boxes, by open-vocabulary detectors; and boxes joined with prompts.

The box proposes, the map and the presence decide. A detector finds small and touching objects that
a heat map blurs together, but it finds something for nearly any sentence. So its boxes only say
where one object ends (`fuse_prompts`), and its scores are reported as evidence, no more.

Boxes are XYXY in pixels, where pixel (x, y) covers [x, x + 1) by [y, y + 1). Scores lie in [0, 1].

Sources: Zhao et al., An Open and Comprehensive Pipeline for Unified Object Grounding and Detection,
2024 (MM-GroundingDINO); Minderer et al., Scaling Open-Vocabulary Object Detection, 2023 (OWLv2).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from labkit.runtime import InputError, as_one_line
from labkit.segment.checkpoints import DetectorCheckpoint, find_detector
from labkit.segment.clipseg import (
    explain_load_failure,
    fill_template,
    load_quietly,
    normalize_sentence,
)
from labkit.segment.instances import Floats, Heat, Mask, scale_to_peak
from labkit.segment.prompts import Prompt, make_mask_logits, pick_points

_logger = logging.getLogger(__name__)

_SAME_OBJECT = 0.7  # IoU from which the less sure of two boxes repeats the other
_LEAST_HEAT = 0.1  # share of a box that must be hot: less is something smaller, or beside it
_HELD = 0.8  # share of an instance that a box must have inside to speak for all of it
_COVERED = 0.5  # share of an instance that boxes must claim for it to need no prompt of its own
_NUM_FOREGROUND = 3  # as many points as `make_prompts` gives
_LONGEST_SHAPE = 20  # longer side over shorter one: GroundingDINO has too few tokens beyond
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """The boxes that a detector proposes for one sentence.

    Attributes:
        boxes: (N, 4) XYXY; N may be 0.
        scores: (N,) in [0, 1].

    Raises:
        InputError: the arrays are of other shapes, or hold no boxes or no scores.

    Example:
        >>> found = Detections(boxes=np.array([[2.0, 3.0, 8.0, 9.0]]), scores=np.array([0.7]))
        >>> found.score, found.scale(0.5, 2.0).boxes
        (0.7, array([[ 1.,  6.,  4., 18.]]))
    """

    boxes: Floats
    scores: Floats

    def __post_init__(self) -> None:
        count = len(self.scores)
        if self.boxes.shape != (count, 4) or self.scores.shape != (count,):
            got = f"{self.boxes.shape} and {self.scores.shape}"
            raise InputError(f"boxes must be (N, 4) and scores (N,), got {got}")
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise InputError(f"scores of boxes must lie in [0, 1], got {self.scores}")
        is_box = np.isfinite(self.boxes).all(axis=1) & (self.boxes[:, :2] < self.boxes[:, 2:]).all(
            axis=1
        )
        if not is_box.all():
            wrong = self.boxes[~is_box][0].tolist()
            raise InputError(f"a box must be left, top, right, bottom in pixels, got {wrong}")

    @property
    def score(self) -> float:
        """The highest score; 0 if there is no box."""
        return float(self.scores.max(initial=0.0))

    def scale(self, sx: float, sy: float) -> Detections:
        """The same for an image `sx` times as wide and `sy` times as high."""
        return replace(self, boxes=self.boxes * (sx, sy, sx, sy))


class Detector(Protocol):
    """Finds boxes of what sentences name."""

    @property
    def name(self) -> str:
        """The weights, for reports."""

    def detect(self, image: NDArray[np.uint8], sentences: Sequence[str]) -> list[Detections]:
        """Find boxes for each sentence, none of which influences another.

        Args:
            image: (H, W, 3) uint8 RGB.
            sentences: S sentences of a few words each.

        Returns:
            S detections in pixels of the image, in the order of `sentences`.
        """


def detect_boxes(
    detector: Detector, image: NDArray[np.uint8], sentences: Sequence[str]
) -> list[Detections]:
    """Ask a detector, and clip its boxes to the image.

    Args:
        detector: any; it may be your own.
        image: (H, W, 3) uint8 RGB.
        sentences: S sentences.

    Returns:
        S detections in pixels of the image.

    Raises:
        InputError: a sentence is too long for the detector; or it gave no detections for one of
            them, or a box that lies outside the image.
    """
    answers = detector.detect(image, sentences)
    if len(answers) != len(sentences):
        raise InputError(
            f"{detector.name} must give detections for {len(sentences)} sentences, "
            f"got {len(answers)}"
        )
    height, width = image.shape[:2]
    clipped = []
    for sentence, detections in zip(sentences, answers, strict=True):
        boxes = _clip(detections.boxes, (height, width))
        outside = ~_has_area(boxes)
        if outside.any():
            raise InputError(
                f"{detector.name} gave a box outside the image for {as_one_line(repr(sentence))}: "
                f"{detections.boxes[outside][0].tolist()}; boxes are left, top, right, bottom in "
                f"pixels of the image, which has {width} × {height}"
            )
        clipped.append(replace(detections, boxes=boxes))
    return clipped


def select_boxes(
    boxes: ArrayLike, scores: ArrayLike, *, size: tuple[int, int], threshold: float
) -> Detections:
    """Keep the boxes that a detector is sure of, each object once, clipped to the image.

    Args:
        boxes: (N, 4) XYXY in pixels; they may reach over the edges.
        scores: (N,) in [0, 1].
        size: (H, W) of the image.
        threshold: score that a box must exceed.

    Returns:
        The boxes that are left, the surest first. Of two with an IoU of 0.7 or more, the surer one
        is kept. A box that lies wholly outside the image is left out.

    Example:
        >>> boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [90, -5, 120, 10], [100, 0, 120, 10]]
        >>> select_boxes(boxes, [0.6, 0.8, 0.7, 0.9], size=(50, 100), threshold=0.5).boxes
        array([[  0.,   0.,  10.,   9.],
               [ 90.,   0., 100.,  10.]])
    """
    scores = np.asarray(scores, dtype=np.float64).reshape(-1)
    clipped = _clip(np.asarray(boxes, dtype=np.float64).reshape(-1, 4), size)
    candidates = np.flatnonzero((scores > threshold) & _has_area(clipped))
    kept: list[int] = []
    for index in candidates[np.argsort(-scores[candidates], kind="stable")]:
        if not kept or _measure_ious(clipped[index], clipped[kept]).max() < _SAME_OBJECT:
            kept.append(index)
    return Detections(boxes=clipped[kept], scores=scores[kept])


def fuse_prompts(
    prompts: Sequence[Prompt],
    heat: ArrayLike,
    detections: Detections,
    *,
    low_res_size: int,
    box_threshold: float = 0.5,
) -> list[Prompt]:
    """Join the prompts of a heat map with the boxes of a detector for the same sentence.

    An instance of the map is held by the box that has four fifths of its region inside and is not
    more than ten times as large; of several, by the one most like the instance's own box. Then
    each box, the surest first, claims hot ground, which is where the map reaches `box_threshold`
    of its peak, and the regions:

    - a box that holds one instance replaces its box prompt, and nothing else;
    - one that holds several claims them all, for one prompt;
    - one that holds none claims the hot ground inside it that no other box holds or claimed. What
      it shares with a less sure one goes to the box in which it lies deeper, as a share of the
      box's size; unless that one lies within the surer, as a head does within a person.

    In the last two cases points and mask prompt are drawn anew from the map on the claimed ground.
    A box of which less than a tenth is such ground makes no prompt. An instance keeps its prompt
    as it was if less than half of its region was claimed.

    Whether the sentence is present is not decided here: call this only for those that are.

    Args:
        prompts: from `labkit.segment.prompts.make_prompts`.
        heat: (H, W), the map that they were made of.
        detections: in pixels of the map.
        low_res_size: width and height of SAM-2's mask prompts.
        box_threshold: that of `make_prompts`.

    Returns:
        The prompts with a box of the detector, the surest first; then those that were kept.

    Example:
        >>> from labkit.segment.prompts import make_prompts
        >>> heat = np.zeros((20, 40))
        >>> heat[5:15, 5:15], heat[5:15, 25:35] = 0.9, 0.9
        >>> boxes = np.array([[4.0, 3.0, 16.0, 15.0], [17.0, 0.0, 24.0, 20.0]])
        >>> detections = Detections(boxes=boxes, scores=np.array([0.8, 0.9]))
        >>> prompts = make_prompts(heat, low_res_size=64)
        >>> [p.box.tolist() for p in fuse_prompts(prompts, heat, detections, low_res_size=64)]
        [[4.0, 3.0, 16.0, 15.0], [25.0, 5.0, 35.0, 15.0]]
    """
    shares = scale_to_peak(heat)
    regions = np.array([prompt.region for prompt in prompts], bool).reshape(-1, *shares.shape)
    hot = (shares >= box_threshold) | regions.any(axis=0)
    holders = _find_holders(prompts, detections.boxes)
    claimed = np.zeros_like(hot)
    fused = []
    order = np.argsort(-detections.scores, kind="stable")
    for rank, index in enumerate(order):
        box, held = detections.boxes[index], holders == index
        inside = _fill_box(box, hot.shape)
        others = claimed | regions[(holders >= 0) & ~held].any(axis=0)
        if held.any():
            ground = regions[held].any(axis=0)
        else:
            ground = inside & hot & ~others
            depth = _measure_depth(box, hot.shape)
            for rival in detections.boxes[np.setdiff1d(order[rank + 1 :], holders)]:
                rival_inside = _fill_box(rival, hot.shape)
                shared = inside & rival_inside
                is_within = shared.sum() >= _HELD * rival_inside.sum()
                if not is_within and (shared & ground).any():
                    ground &= ~shared | (depth >= _measure_depth(rival, hot.shape))
        if not ground.any() or ground.sum() < _LEAST_HEAT * inside.sum():
            continue
        owners = [p for p in prompts if (p.region & ground).any()]
        if held.sum() == 1:
            fused.append(replace(prompts[int(held.argmax())], box=box))
        else:
            fused.append(
                Prompt(
                    **_pick_all_points(ground, shares, owners),
                    box=box,
                    mask_logits=make_mask_logits(
                        shares, inside & ~others, low_res_size, threshold=box_threshold
                    ),
                    region=ground,
                )
            )
        claimed |= ground
    return fused + [
        prompt
        for prompt in prompts
        if (prompt.region & claimed).sum() < _COVERED * prompt.region.sum()
    ]


def _find_holders(prompts: Sequence[Prompt], boxes: Floats) -> NDArray[np.int64]:
    """For each prompt the position of the box (N, 4) that holds its region; -1 if none does."""
    holders = np.full(len(prompts), -1)
    for number, prompt in enumerate(prompts):
        holding = []
        for index, box in enumerate(boxes):
            inside = _fill_box(box, prompt.region.shape)
            shared = (prompt.region & inside).sum()
            if shared >= _HELD * prompt.region.sum() and shared >= _LEAST_HEAT * inside.sum():
                holding.append(index)
        if holding:
            holders[number] = holding[int(_measure_ious(prompt.box, boxes[holding]).argmax())]
    return holders


def _pick_all_points(ground: Mask, shares: Heat, owners: Sequence[Prompt]) -> dict[str, Any]:
    """Points and labels of a prompt for `ground`; background points are those of the owners."""
    foreground = pick_points(ground, shares, _NUM_FOREGROUND).astype(np.float64)
    background = np.concatenate([foreground[:0], *(o.points[o.labels == 0] for o in owners)])
    columns, rows = background.astype(np.int64).T
    background = background[~ground[rows, columns]]
    return {
        "points": np.concatenate([foreground, background]),
        "labels": np.repeat([1, 0], [len(foreground), len(background)]),
    }


def _fill_box(box: Floats, shape: tuple[int, ...]) -> Mask:
    """The pixels (H, W) that a box touches."""
    left, top = np.floor(box[:2]).astype(np.int64).clip(0)
    right, bottom = np.ceil(box[2:]).astype(np.int64).clip(0)
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def _measure_depth(box: Floats, shape: tuple[int, ...]) -> Floats:
    """How deep each pixel (H, W) lies in a box: 0.5 in its middle, 0 on its edge, less outside."""
    middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    across = np.abs(np.arange(shape[1]) + 0.5 - middle[0]) / size[0]
    down = np.abs(np.arange(shape[0]) + 0.5 - middle[1]) / size[1]
    depth: Floats = 0.5 - np.maximum(across, down[:, None])
    return depth


def _clip(boxes: Floats, size: tuple[int, int]) -> Floats:
    height, width = size
    return np.clip(boxes, 0, (width, height, width, height))


def _has_area(boxes: Floats) -> Mask:
    """Whether each box (N, 4) is wider and higher than 0; False for NaN."""
    is_wide: Mask = (boxes[:, :2] < boxes[:, 2:]).all(axis=1)
    return is_wide


def _measure_ious(box: Floats, others: Floats) -> Floats:
    """IoU (N,) of a box (4,) with others (N, 4)."""
    corners = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    overlaps = corners.clip(0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    ious: Floats = overlaps / (areas - overlaps)
    return ious


class _BackboneOnce(nn.Module):
    """A backbone that looks at an image once, and gives its features again for each sentence."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixels: Tensor | None = None
        self.features: Any = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Any:
        if self.pixels is not pixel_values:
            self.pixels, self.features = pixel_values, self.backbone(pixel_values, pixel_mask)
        return self.features

    def forget(self) -> None:
        """Release the memory of the last image."""
        self.pixels = self.features = None


class GroundingDino:
    """An MM-GroundingDINO. Its backbone sees an image once; the fusion with text runs per sentence.

    All of it runs in fp32, on a GPU too.
    """

    kind = "an MM-GroundingDINO"
    model_class, processor_class = "MMGroundingDinoForObjectDetection", "GroundingDinoProcessor"
    threshold = 0.25  # transformers' own default for this model

    def __init__(self, model: Any, processor: Any, device: torch.device, name: str) -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device, self.name = device, name
        backbone = self.model.model.backbone
        backbone.conv_encoder = self._backbone = _BackboneOnce(backbone.conv_encoder)

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8], sentences: Sequence[str]) -> list[Detections]:
        """Find boxes for each sentence; see `Detector`.

        Each sentence is asked alone, in lower case with a full stop after it. Full stops and
        question marks inside it are left out, since the model reads them as the ends of phrases.

        Raises:
            InputError: a sentence is too long.
        """
        texts = [_make_phrase(sentence) for sentence in sentences]
        tokens = [self.processor.tokenizer(text, return_tensors="pt") for text in texts]
        config = self.model.config
        limit = min(config.max_text_len, config.text_config.max_position_embeddings)
        for sentence, each in zip(sentences, tokens, strict=True):
            _check_length(sentence, each["input_ids"].shape[1], limit, self.name)
        if max(image.shape[:2]) > _LONGEST_SHAPE * min(image.shape[:2]):
            _logger.warning("%s: the image is too long and narrow to find boxes in", self.name)
            return [select_boxes([], [], size=(1, 1), threshold=1.0) for _ in sentences]
        inputs = self.processor.image_processor(
            images=image, input_data_format="channels_last", return_tensors="pt"
        ).to(self.device)
        detections = []
        for each in tokens:
            outputs = self.model(**inputs, **each.to(self.device))
            height, width = image.shape[:2]
            boxes = _to_corners(outputs.pred_boxes[0]) * (width, height, width, height)
            scores = outputs.logits[0].max(dim=-1).values.sigmoid()
            detections.append(
                select_boxes(
                    boxes, scores.cpu().numpy(), size=(height, width), threshold=self.threshold
                )
            )
        self._backbone.forget()
        return detections


class Owlv2:
    """An OWLv2. It sees an image once, for all sentences together; none influences another.

    All of it runs in fp32, on a GPU too.
    """

    kind = "an OWLv2"
    model_class, processor_class = "Owlv2ForObjectDetection", "Owlv2Processor"
    threshold = 0.1  # transformers' own default for this model
    template = "a photo of a {}"

    def __init__(self, model: Any, processor: Any, device: torch.device, name: str) -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device, self.name = device, name

    @torch.inference_mode()
    def detect(self, image: NDArray[np.uint8], sentences: Sequence[str]) -> list[Detections]:
        """Find boxes for each sentence; see `Detector`.

        Raises:
            InputError: a sentence is too long.
        """
        limit = self.model.config.text_config.max_position_embeddings
        tokenizer = self.processor.tokenizer
        texts = [fill_template(self.template, normalize_sentence(each)) for each in sentences]
        for sentence, text in zip(sentences, texts, strict=True):
            _check_length(sentence, len(tokenizer(text)["input_ids"]), limit, self.name)
        tokens = tokenizer(texts, padding="max_length", max_length=limit, return_tensors="pt")
        inputs = self.processor.image_processor(
            images=image, input_data_format="channels_last", return_tensors="pt"
        )
        outputs = self.model(**inputs.to(self.device), **tokens.to(self.device))
        size = (image.shape[0], image.shape[1])
        boxes = _to_corners(outputs.pred_boxes[0]) * max(size)  # of the image padded to a square
        scores = outputs.logits[0].sigmoid().cpu().numpy()  # (N, S)
        return [
            select_boxes(boxes, scores[:, index], size=size, threshold=self.threshold)
            for index in range(len(sentences))
        ]


_CLASSES: dict[str, type[GroundingDino] | type[Owlv2]] = {
    "mm-grounding-dino": GroundingDino,
    "owlv2": Owlv2,
}
"""By `model_type` in the configuration that transformers writes."""


def load_detector(source: str | DetectorCheckpoint, device: torch.device) -> Detector:
    """Load a detector.

    Args:
        source: "mm-grounding-dino" or "owlv2", the published weights, downloaded once; or a
            detector of your own of one of these architectures, see
            `labkit.segment.checkpoints.find_detector`.
        device: where it runs.

    Raises:
        InputError: `source` is none of these.
        SourceError: the files could not be had, or are not those of such a detector.
    """
    import transformers

    checkpoint = find_detector(source) if isinstance(source, str) else source
    folder = checkpoint.fetch_folder()
    with explain_load_failure(checkpoint, folder, "a detector"):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in _CLASSES:
            raise ValueError(f"its model_type is {kind!r}, not one of {', '.join(_CLASSES)}")
        detector_class = _CLASSES[kind]
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(f"it has no tokenizer, none of {', '.join(_TOKENIZER_FILES)}")
    with explain_load_failure(checkpoint, folder, detector_class.kind):
        processor_class = getattr(transformers, detector_class.processor_class)
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        model = load_quietly(getattr(transformers, detector_class.model_class), folder)
        known, room = len(processor.tokenizer), model.config.text_config.vocab_size
        if known > room:
            raise ValueError(f"its tokenizer has {known} tokens, its model {room}")
    if not checkpoint.digest:
        _logger.info("%s: give a digest to have it checked", checkpoint.name)
    return detector_class(model, processor, device, checkpoint.name)


def _make_phrase(sentence: str) -> str:
    """The sentence as GroundingDINO reads one phrase: in lower case, with a full stop at its end.

    Example:
        >>> _make_phrase("A St. Bernard")
        'a st bernard.'
    """
    return " ".join(re.sub(r"[.?]", " ", normalize_sentence(sentence)).split()) + "."


def _check_length(sentence: str, length: int, limit: int, name: str) -> None:
    if length > limit:
        raise InputError(
            f"{name}: a sentence must fit into {limit} tokens, got {as_one_line(sentence)[:60]!r} "
            f"... of {length}; name the thing in fewer words, or choose detector='none'"
        )


def _to_corners(boxes: Tensor) -> Floats:
    """Boxes (N, 4), centre x, centre y, width, height, as XYXY in the same unit."""
    centers, half = boxes[:, :2].double(), boxes[:, 2:].double() / 2
    corners: Floats = torch.cat([centers - half, centers + half], dim=1).cpu().numpy()
    return corners
