"""What points, box and mask of a prompt are worth: each alone, together, and against true boxes.

Twice, with presence assumed, so that only the masks differ:

- on scenes, by the tiny SAM-2 of the profile `demo` (or the SAM-2 of `--profile full`);
- on photographs, by the stand-in of `photo_battery.py`, whose heat and answers are made from true
  masks; it says nothing about published weights.

Heat, instances, choice and clean-up are the same in every row. A true box is that of the object
which the region of a prompt means most: what better boxes could bring at most.

    python benchmarks/prompt_ablation.py --data FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_result
from numpy.typing import NDArray
from photo_battery import (
    GivenMaps,
    KnowingSam2,
    measure_photo,
    read_photos,
    stage_photo,
    summarize,
)
from tqdm import tqdm

from labkit.object_scenes import EVALUATION_SEED, make_object_scene
from labkit.segment.checkpoints import get_profile
from labkit.segment.metrics import bootstrap_interval, instance_counts, iou, pairwise_iou
from labkit.segment.pipeline import TextSegmenter
from labkit.segment.prompts import Prompt, make_box
from labkit.segment.sam2 import ImageFeatures, Sam2

Logits = NDArray[np.float32]
WAYS = {
    "points": ("points",),
    "box": ("box",),
    "mask": ("mask",),
    "points and box": ("points", "box"),
    "points, box and mask": ("points", "box", "mask"),
    "true box": ("true box",),
}


@dataclass(eq=False)
class PartialSam2:
    """A SAM-2 that is told only a part of each prompt.

    Attributes:
        sam2: the model.
        use: which of points, box, mask and "true box".
        truth: (N, H, W) bool, the objects of the image, for true boxes.
    """

    sam2: Sam2
    use: tuple[str, ...]
    truth: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 1, 1), dtype=bool))

    @property
    def image_size(self) -> int:
        """See `Sam2.image_size`."""
        return self.sam2.image_size

    @property
    def low_res_size(self) -> int:
        """See `Sam2.low_res_size`."""
        return self.sam2.low_res_size

    def encode(self, image: NDArray[np.uint8]) -> ImageFeatures:
        """See `Sam2.encode`."""
        return self.sam2.encode(image)

    def predict_points(
        self, features: ImageFeatures, points: NDArray[np.float64]
    ) -> tuple[Logits, Logits]:
        """See `Sam2.predict_points`."""
        return self.sam2.predict_points(features, points)

    def predict(self, features: ImageFeatures, prompts: Sequence[Prompt]) -> tuple[Logits, Logits]:
        """Answer the part that counts of each prompt; see `Sam2.predict`."""
        size = self.low_res_size
        logits = np.zeros((len(prompts), 4, size, size), np.float32)
        ious = np.zeros((len(prompts), 4), np.float32)
        for index, prompt in enumerate(prompts):
            logits[index], ious[index] = self._decode(features, prompt)
        return logits, ious

    @torch.inference_mode()
    def _decode(self, features: ImageFeatures, prompt: Prompt) -> tuple[Logits, Logits]:
        points, labels = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
        if "box" in self.use or "true box" in self.use:
            box = prompt.box if "box" in self.use else self._find_true_box(prompt)
            points, labels = box.reshape(2, 2), np.array([2, 3])
        if "points" in self.use:
            points = np.concatenate([points, prompt.points])
            labels = np.concatenate([labels, prompt.labels])
        given = torch.from_numpy(points)[None].float(), torch.from_numpy(labels)[None].int()
        model: Any = self.sam2.model
        sparse, dense = model.sam_prompt_encoder(
            points=given if len(points) else None,
            boxes=None,
            masks=torch.from_numpy(prompt.mask_logits)[None, None] if "mask" in self.use else None,
        )
        logits, ious, _, _ = model.sam_mask_decoder.predict_masks(
            image_embeddings=features.embedding,
            image_pe=model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=True,
            high_res_features=list(features.high_res),
        )
        return logits[0].numpy(), ious[0].numpy()

    def _find_true_box(self, prompt: Prompt) -> NDArray[np.float64]:
        height, width = self.truth.shape[1:]
        rows, columns = (
            (np.arange(side) * have // side)
            for side, have in zip((height, width), prompt.region.shape, strict=True)
        )
        region = prompt.region[np.ix_(rows, columns)]
        best = self.truth[pairwise_iou(self.truth, region[None])[:, 0].argmax()]
        scale = np.array([self.image_size / width, self.image_size / height])
        return make_box(best) * np.tile(scale, 2)


def measure_scenes(segmenter: TextSegmenter, sam2: PartialSam2, count: int) -> dict[str, Any]:
    """Mean IoU of true sentences and recall of their objects, over `count` scenes."""
    ious, recalls, groups = [], [], []
    for number in tqdm(range(count)):
        scene = make_object_scene(number, seed=EVALUATION_SEED)
        sentences = [s for s in scene.sample_sentences(number) if s in scene.present]
        sam2.truth = scene.masks
        found = segmenter(scene.image, sentences, assume_present=True)
        for result in found.sentences:
            truth = scene.masks_of(result.sentence)
            masks = np.array([o.mask for o in result.objects], dtype=bool)
            hits, _, _ = instance_counts(truth, masks.reshape(-1, *truth.shape[1:]))
            ious.append(iou(truth.any(axis=0), result.mask))
            recalls.append(hits / len(truth))
            groups.append(number)
    row: dict[str, Any] = {"n_sentences": len(ious)}
    for name, values in (("iou", ious), ("recall", recalls)):
        interval = bootstrap_interval(np.array(values), groups=groups)
        row[name], row[f"{name}_ci"] = float(np.mean(values)), [float(x) for x in interval]
    return row


def measure_photos(photos: Sequence[Any], use: tuple[str, ...], seed: int) -> dict[str, Any]:
    """The battery's figures by kind, where the stand-in looks at a part of each prompt."""
    sam2 = KnowingSam2(seed, use)
    stand_ins: Any = GivenMaps(), sam2
    segmenter = TextSegmenter(*stand_ins, presence=get_profile("full").presence)
    rows = [
        row
        for number, photo in enumerate(tqdm(photos))
        for row in measure_photo(segmenter, sam2, photo, number, seed)
    ]
    kinds: dict[str, Any] = summarize(rows)["kinds"]
    return kinds


def main() -> None:
    """Measure, and write benchmarks/results/prompt-ablation.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--data", type=Path, help="photographs, as for photo_battery.py")
    parser.add_argument("--limit", type=int, default=20, help="photographs of CamVid")
    parser.add_argument("--draws", type=int, default=2, help="of the heat of COCO's and VOC's")
    parser.add_argument("--seed", type=int, default=0, help="of the heat")
    out = Path(__file__).parent / "results" / "prompt-ablation.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    real = TextSegmenter.from_profile(arguments.profile, device="cpu")
    result: dict[str, Any] = {"weights": real.models, "n_scenes": arguments.scenes}
    result["scenes"] = {}
    for way, use in WAYS.items():
        partial = PartialSam2(real.sam2, use)
        stand_in: Any = partial
        segmenter = TextSegmenter(
            real.clipseg, stand_in, presence=real.presence, templates=real.templates
        )
        result["scenes"][way] = measure_scenes(segmenter, partial, arguments.scenes)
    if arguments.data:
        photos = [
            stage_photo(photo)
            for photo in read_photos(arguments.data, arguments.limit, arguments.draws)
        ]
        result["n_photos"] = len(photos)
        result["photographs"] = {
            way: measure_photos(photos, use, arguments.seed) for way, use in WAYS.items()
        }
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
