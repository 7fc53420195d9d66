"""Prompts to masks, by SAM-2: the image is encoded once, prompts are decoded in parts.

Thresholds and choices are made on SAM-2's own low-resolution grid; only what is kept is ever drawn
at the size of the image. Source: Ravi et al., SAM 2: Segment Anything in Images and Videos, 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from labkit.runtime import (
    OutOfMemoryError,
    Precision,
    SourceError,
    as_one_line,
    is_out_of_memory,
    resolve_precision,
    run_in_parts,
    use_seed,
)
from labkit.segment.checkpoints import Sam2Pin
from labkit.segment.prompts import Prompt

Logits = NDArray[np.float32]
Masks = NDArray[np.bool_]

_PROMPTS_AT_ONCE = 16
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STABILITY_OFFSET = 1.0  # logits, as in Meta's automatic mask generator
_SAME = 0.7  # IoU from which two masks are one object
_INSIDE = 0.9  # share of the smaller mask inside the larger from which it is a part of it
_HOLE = 0.01  # share of a mask's area below which a hole is filled
_ISLAND = 0.1  # share of the largest piece's area below which another is cleared
_POST_PROCESSING = {  # what build_sam2 adds to every configuration
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """An encoded image: embedding (1, C, g, g), and finer maps of it, the finest first."""

    embedding: Tensor
    finer: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """A mask for one prompt, on SAM-2's grid.

    `logits` (G, G) are of the whole image, squashed. `predicted_iou`, `stability` and `agreement`
    lie in [0, 1].
    """

    prompt: Prompt
    logits: Logits
    predicted_iou: float
    stability: float
    agreement: float

    @property
    def score(self) -> float:
        """Product of the three."""
        return self.predicted_iou * self.stability * self.agreement


class Sam2:
    """A SAM-2, ready for inference on single images."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision) -> None:
        self.model: Any = model.to(device).eval()
        self.device, self.precision = device, precision

    @classmethod
    def from_pin(cls, pin: Sam2Pin, device: torch.device) -> Sam2:
        """The model that `pin` names, in fp32 on a CPU and in fp16 or bf16 on a GPU.

        Raises:
            SourceError: its files could not be had, or do not fit each other.
        """
        from safetensors.torch import load_file

        file = pin.file()
        with use_seed(0):
            model = build_sam2(pin)
        try:
            if file.suffix == ".safetensors":
                weights = load_file(file)
            else:
                weights = torch.load(file, map_location="cpu", weights_only=True)["model"]
            model.load_state_dict(weights)
        except Exception as error:  # safetensors', pickle's, zipfile's and torch's own
            cause = as_one_line(error)
            raise SourceError(f"{file} could not be loaded as {pin.config}: {cause}") from error
        return cls(model, device, resolve_precision("auto", device))

    @property
    def side(self) -> int:
        """Width and height in pixels of the square that the model sees."""
        return int(self.model.image_size)

    @property
    def grid(self) -> int:
        """Width and height of a mask prompt, and of the masks before they are enlarged."""
        return 4 * int(self.model.sam_image_embedding_size)

    @torch.inference_mode()
    def encode(self, image: NDArray[np.uint8]) -> ImageFeatures:
        """Encode an image (H, W, 3) uint8 RGB, whatever its size, once for all prompts.

        Raises:
            OutOfMemoryError: the device has no room for it.
        """
        try:
            pixels = self._pixels(image)
            with self.precision.autocast(self.device):
                *finer, coarse = self.model.forward_image(pixels)["backbone_fpn"]
                if self.model.directly_add_no_mem_embed:
                    coarse = coarse + self.model.no_mem_embed.view(1, -1, 1, 1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"no memory left to encode the image on {self.device}. "
                "Use a smaller SAM-2 checkpoint, or device='cpu'."
            ) from error
        return ImageFeatures(coarse, tuple(finer))

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        """The image (1, 3, side, side), squashed and normalised as in training."""
        pixels = torch.tensor(image).to(self.device).permute(2, 0, 1)[None].float()
        size = (self.side, self.side)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True) / 255
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (_MEAN, _STD))
        return (pixels - mean) / std

    def decode(self, features: ImageFeatures, prompts: Sequence[Prompt]) -> tuple[Logits, Logits]:
        """All four masks of SAM-2's decoder for each prompt: the single one, then the three.

        Prompts with as many points are decoded together: one that is filled up gets other masks.

        Args:
            features: of the image.
            prompts: with points and boxes in pixels of SAM-2's square.

        Returns:
            Logits (N, 4, G, G) and predicted IoUs (N, 4).
        """
        logits = np.zeros((len(prompts), 4, self.grid, self.grid), np.float32)
        ious = np.zeros((len(prompts), 4), np.float32)
        counts = np.array([len(prompt.points) for prompt in prompts])
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            logits[rows], ious[rows] = self._alike(features, [prompts[row] for row in rows])
        return logits, ious

    def _alike(self, features: ImageFeatures, prompts: Sequence[Prompt]) -> tuple[Logits, Logits]:
        """The same for one prompt or more, with as many points each."""
        return _joined(lambda part: self._decoded(features, prompts[part]), len(prompts))

    def click(self, features: ImageFeatures, points: NDArray[np.float64]) -> tuple[Logits, Logits]:
        """The same for one foreground point each, without box and mask.

        Args:
            features: of the image.
            points: (N, 2) in pixels of SAM-2's square.
        """
        if not len(points):
            return self.decode(features, [])
        places = torch.from_numpy(points).float()[:, None]
        labels = torch.ones(places.shape[:2], dtype=torch.int32)
        return _joined(
            lambda part: self._predicted(features, places[part], labels[part], None), len(points)
        )

    def _decoded(self, features: ImageFeatures, prompts: Sequence[Prompt]) -> tuple[Logits, Logits]:
        return self._predicted(features, *_as_tensors(prompts))

    @torch.inference_mode()
    def _predicted(
        self, features: ImageFeatures, points: Tensor, labels: Tensor, masks: Tensor | None
    ) -> tuple[Logits, Logits]:
        """Logits (N, 4, G, G) and IoUs (N, 4) for points (N, K, 2) and masks (N, 1, G, G)."""
        with self.precision.autocast(self.device):
            sparse, dense = self.model.sam_prompt_encoder(
                points=(points.to(self.device), labels.to(self.device)),
                boxes=None,
                masks=None if masks is None else masks.to(self.device),
            )
            logits, ious, _, _ = self.model.sam_mask_decoder.predict_masks(
                image_embeddings=features.embedding,
                image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                repeat_image=True,
                high_res_features=list(features.finer),
            )
        return logits.float().cpu().numpy(), ious.float().cpu().numpy()


def build_sam2(pin: Sam2Pin) -> nn.Module:
    """The network of `pin`'s configuration, with sam2's own post-processing and random weights."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(pin.config_file())
    OmegaConf.update(config, "model.sam_mask_decoder_extra_args", _POST_PROCESSING)
    model: nn.Module = instantiate(config.model, _recursive_=True)
    return model


def choose(prompt: Prompt, logits: Logits, ious: Logits) -> Candidate:
    """The best of the masks (M, G, G) for a prompt: predicted IoU × stability × agreement."""
    heat = (prompt.mask_logits + 10) / 20  # relative heat of the instance, see prompts.mask_logits
    candidates = [
        Candidate(
            prompt=prompt,
            logits=mask,
            predicted_iou=float(np.clip(iou, 0, 1)),
            stability=stability(mask),
            agreement=agreement(mask > 0, heat),
        )
        for mask, iou in zip(logits, ious, strict=True)
    ]
    return max(candidates, key=lambda candidate: candidate.score)


def stability(logits: Logits) -> float:
    """IoU in [0, 1] of the masks at a threshold one logit higher and one lower; 0 for no mask."""
    wide = int((logits > -_STABILITY_OFFSET).sum())
    return float((logits > _STABILITY_OFFSET).sum() / wide) if wide else 0.0


def agreement(mask: Masks, heat: Logits) -> float:
    """Soft IoU in [0, 1] of a mask (G, G) with relative heat (G, G) in [0, 1]."""
    common = float(heat[mask].sum())
    union = float(mask.sum() + heat.sum() - common)
    return common / union if union else 0.0


def cleaned(logits: Logits) -> Logits:
    """Logits (G, G) with small holes filled and small islands cleared, by turning their sign.

    A hole does not touch the border and is a single pixel, or has less than 1 % of the mask's area;
    an island has less than 10 % of that of the largest piece.
    """
    from scipy import ndimage

    result = logits.copy()
    pieces, count = ndimage.label(result > 0, structure=np.ones((3, 3)))
    if count > 1:
        areas = np.bincount(pieces.ravel())[1:]
        small = 1 + np.flatnonzero(areas < _ISLAND * areas.max())
        result = np.where(np.isin(pieces, small), -np.abs(result), result)
    gaps, count = ndimage.label(result <= 0)
    edge = np.unique(np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]]))
    areas = np.bincount(gaps.ravel(), minlength=count + 1)
    small = np.flatnonzero(areas < max(_HOLE * (result > 0).sum(), 2))
    holes = np.setdiff1d(small, [0, *edge])
    return np.where(np.isin(gaps, holes), np.maximum(np.abs(result), 1e-3), result)


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those with a mask, best first, less what repeats, or is a part of, a better one."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: -one.score):
        mask = candidate.logits > 0
        if mask.any() and not any(repeats(mask, other.logits > 0) for other in kept):
            kept.append(candidate)
    return kept


def enlarged(logits: Logits, size: tuple[int, int]) -> Masks:
    """The mask (H, W) that logits (G, G) of the squashed image give at its own size."""
    grid = torch.from_numpy(logits)[None, None]
    return (F.interpolate(grid, size=size, mode="bilinear")[0, 0] > 0).numpy()


def repeats(a: Masks, b: Masks) -> bool:
    """Whether two masks are of one object, or one is a part of the other."""
    common = int((a & b).sum())
    smaller, union = min(int(a.sum()), int(b.sum())), int((a | b).sum())
    return common > _SAME * union or common > _INSIDE * smaller


def _joined(predict: Callable[[slice], tuple[Logits, Logits]], count: int) -> tuple[Logits, Logits]:
    """Logits (N, 4, G, G) and IoUs (N, 4) of `count` prompts, predicted in parts that fit."""
    parts = run_in_parts(predict, count, size=_PROMPTS_AT_ONCE, what="prompts")
    logits, ious = zip(*parts, strict=True)
    return np.concatenate(logits), np.concatenate(ious)


def _as_tensors(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N, 2 + K, 2), labels (N, 2 + K) and mask logits (N, 1, G, G) of N prompts.

    Each has K points; its box is two more, with labels 2 and 3.
    """
    points = np.stack([[*prompt.box.reshape(2, 2), *prompt.points] for prompt in prompts])
    labels = np.stack([[2, 3, *prompt.labels] for prompt in prompts])
    masks = np.stack([prompt.mask_logits for prompt in prompts])[:, None]
    return (
        torch.from_numpy(points).float(),
        torch.from_numpy(labels).int(),
        torch.from_numpy(masks),
    )
