"""Prompts to masks, by SAM-2: the image is encoded once, prompts are decoded in parts.

Masks stay in SAM-2's own low resolution; `labkit.segment.masks` chooses among them there, and only
what is kept is ever drawn at the size of the image.

Source: Ravi et al., SAM 2: Segment Anything in Images and Videos, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
from labkit.segment.checkpoints import Sam2Checkpoint
from labkit.segment.prompts import Prompt

Logits = NDArray[np.float32]

_PROMPTS_AT_ONCE = 16
_PIXELS_AT_ONCE = {"cpu": 2**20, "cuda": 2**22}  # of images that are encoded together
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """An encoded image.

    Attributes:
        embedding: (1, C, h, w).
        high_res: finer maps of the same image, the finest first.
    """

    embedding: Tensor
    high_res: tuple[Tensor, ...]


class Sam2:
    """A SAM-2, ready for inference on single images."""

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision) -> None:
        self.model: Any = model.to(device).eval()
        self.device, self.precision = device, precision

    @classmethod
    def from_checkpoint(cls, checkpoint: Sam2Checkpoint, device: torch.device) -> Sam2:
        """Load a SAM-2: in fp32 on a CPU, in fp16 or bf16 on a GPU.

        Raises:
            SourceError: its files could not be had, or do not fit each other.
        """
        from safetensors.torch import load_file

        path = checkpoint.fetch()
        with use_seed(0):
            model = build_sam2(checkpoint)
        try:
            if path.suffix == ".safetensors":
                weights = load_file(path)
            else:
                weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
            model.load_state_dict(weights)
        except Exception as error:  # safetensors', pickle's, zipfile's and torch's own
            cause = as_one_line(error)
            raise SourceError(
                f"{path} could not be loaded as {checkpoint.config}: {cause}"
            ) from error
        return cls(model, device, resolve_precision("auto", device))

    @property
    def image_size(self) -> int:
        """Width and height in pixels of the square that the model sees."""
        return int(self.model.image_size)

    @property
    def low_res_size(self) -> int:
        """Width and height of a mask prompt, and of the masks before they are upsampled."""
        return 4 * int(self.model.sam_image_embedding_size)

    def encode(self, image: NDArray[np.uint8]) -> ImageFeatures:
        """Encode an image (H, W, 3) uint8 RGB of any size, once for all prompts.

        Raises:
            OutOfMemoryError: the device has no room for it.
        """
        return self.encode_batch([image])[0]

    def encode_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[ImageFeatures]:
        """Encode images (H, W, 3) uint8 RGB of any sizes together, which is faster for many.

        Raises:
            OutOfMemoryError: the device has no room for a single one.
        """
        pixels = _PIXELS_AT_ONCE.get(self.device.type, 2**20)
        size = max(1, pixels // self.image_size**2)
        features: list[ImageFeatures] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            try:
                features += self._encode(part)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise OutOfMemoryError(
                        f"no memory left to encode the image on {self.device}. "
                        "Use a smaller SAM-2 checkpoint, or device='cpu'."
                    ) from error
            features += [each for image in part for each in self.encode_batch([image])]
        return features

    def _encode(self, images: Sequence[NDArray[np.uint8]]) -> list[ImageFeatures]:
        """Encode images at once; the features of each are a part of those of all."""
        with torch.inference_mode(), self.precision.autocast(self.device):
            pixels = torch.cat([self._preprocess(image) for image in images])
            *high_res, embedding = self.model.forward_image(pixels)["backbone_fpn"]
            if self.model.directly_add_no_mem_embed:
                embedding = embedding + self.model.no_mem_embed.view(1, -1, 1, 1)
        return [
            ImageFeatures(
                embedding[i : i + 1].clone(), tuple(each[i : i + 1].clone() for each in high_res)
            )
            for i in range(len(images))
        ]

    def _preprocess(self, image: NDArray[np.uint8]) -> Tensor:
        """The image (1, 3, image_size, image_size), squashed and normalised as in training."""
        pixels = torch.tensor(image).to(self.device).permute(2, 0, 1)[None].float()
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True) / 255
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (_MEAN, _STD))
        return (pixels - mean) / std

    def predict(self, features: ImageFeatures, prompts: Sequence[Prompt]) -> tuple[Logits, Logits]:
        """Predict the four masks of SAM-2's decoder for each of N prompts.

        The first is the mask it gives when asked for one, the others are those it gives when asked
        for three. Prompts with as many points are decoded together: a prompt that is filled up with
        padding gets other masks.

        Args:
            features: from `encode`.
            prompts: with points and boxes in pixels of SAM-2's square.

        Returns:
            Logits (N, 4, S, S) and predicted IoUs (N, 4), where S is `low_res_size`.
        """
        logits = np.zeros((len(prompts), 4, self.low_res_size, self.low_res_size), np.float32)
        ious = np.zeros((len(prompts), 4), np.float32)
        counts = np.array([len(prompt.points) for prompt in prompts])
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            decode = partial(self._decode, features, *_to_tensors([prompts[row] for row in rows]))
            start = 0
            for masks, estimates in run_in_parts(
                decode, len(rows), size=_PROMPTS_AT_ONCE, what="prompts"
            ):
                part = rows[start : start + len(masks)]
                logits[part], ious[part] = masks, estimates
                start += len(masks)
        return logits, ious

    def predict_points(
        self, features: ImageFeatures, points: NDArray[np.float64]
    ) -> tuple[Logits, Logits]:
        """Predict the four masks for each of N foreground points (N, 2), without box and mask.

        Points are pixels (x, y) of SAM-2's square. What is returned is as from `predict`.
        """
        if not len(points):
            return self.predict(features, [])
        coordinates = torch.from_numpy(points).float()[:, None]  # (N, 1, 2)
        labels = torch.ones(coordinates.shape[:2], dtype=torch.int32)
        decode = partial(self._decode, features, coordinates, labels, None)
        parts = run_in_parts(decode, len(points), size=_PROMPTS_AT_ONCE, what="points")
        logits, ious = map(np.concatenate, zip(*parts, strict=True))
        return logits, ious

    def predict_clicks(
        self,
        features: ImageFeatures,
        points: NDArray[np.float64],
        labels: NDArray[np.int64],
        mask_logits: Logits | None = None,
    ) -> tuple[Logits, Logits]:
        """Predict the four masks for one object that K clicks (K, 2) mean together.

        Args:
            features: from `encode`.
            points: pixels (x, y) of SAM-2's square.
            labels: (K,) 1 for the object, 0 for ground, 2 and 3 for the upper left and lower right
                corner of a box around it.
            mask_logits: (S, S), what the mask was before; None for nothing.

        Returns:
            Logits (4, S, S) and predicted IoUs (4,).
        """
        masks = None if mask_logits is None else torch.from_numpy(mask_logits)[None, None]
        logits, ious = self._decode(
            features,
            torch.from_numpy(points).float()[None],
            torch.from_numpy(labels).int()[None],
            masks,
            slice(0, 1),
        )
        return logits[0], ious[0]

    def _decode(
        self,
        features: ImageFeatures,
        points: Tensor,
        labels: Tensor,
        masks: Tensor | None,
        part: slice,
    ) -> tuple[Logits, Logits]:
        """A part of N prompts: points (N, K, 2), labels (N, K) and masks (N, 1, S, S)."""
        with torch.inference_mode(), self.precision.autocast(self.device):
            sparse, dense = self.model.sam_prompt_encoder(
                points=(points[part].to(self.device), labels[part].to(self.device)),
                boxes=None,
                masks=None if masks is None else masks[part].to(self.device),
            )
            logits, ious, _, _ = self.model.sam_mask_decoder.predict_masks(
                image_embeddings=features.embedding,
                image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                repeat_image=True,
                high_res_features=list(features.high_res),
            )
        return logits.float().cpu().numpy(), ious.float().cpu().numpy()


def build_sam2(checkpoint: Sam2Checkpoint) -> nn.Module:
    """Build the network that a checkpoint's configuration describes, with random weights."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(checkpoint.find_config())
    model: nn.Module = instantiate(config.model, _recursive_=True)
    return model


def _to_tensors(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N, 2 + K, 2), labels (N, 2 + K) and masks (N, 1, S, S) of N prompts of K points.

    The corners of a box are two more points, with labels 2 and 3.
    """
    points = np.stack([[*prompt.box.reshape(2, 2), *prompt.points] for prompt in prompts])
    labels = np.stack([[2, 3, *prompt.labels] for prompt in prompts])
    masks = np.stack([prompt.mask_logits for prompt in prompts])[:, None]
    return (
        torch.from_numpy(points).float(),
        torch.from_numpy(labels).int(),
        torch.from_numpy(masks),
    )
