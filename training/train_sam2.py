"""Train the tiny SAM-2: a mask from points, a box and a rough mask, in any mixture.

    python training/train_sam2.py                               # on procedural scenes
    python training/train_sam2.py --data FOLDER --out runs/sam2 # on photographs, see below

After an interruption the same command resumes. Trained on scenes, the averaged weights are written
to `labkit/assets/sam2-tiny` at the end. FOLDER is that of train_clipseg.py; there the objects are
the connected regions of the label images, training begins with the weights for scenes, and the
weights are written to the output folder whenever figures are; `labkit segment --sam2` takes it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from loop import TrainingLoop, parse_options
from omegaconf import DictConfig, OmegaConf
from photographs import MEAN, STD, RegionBatches, read_photographs
from safetensors.torch import load_file, save_file
from scene_cache import SceneCache
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit.object_scenes import CALIBRATION_SEED, TRAINING_SEED

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets" / "sam2-tiny"
SCENE_SIZE, PHOTO_SIZE = 192, 256  # of the images that the models see
SCENE_GRID, PHOTO_GRID = 14, 22  # patches of the CLIPSegs whose heat maps the prompts resemble

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def read_config(image_size: int) -> DictConfig:
    """Read the configuration among the assets, and set the width and height of its images."""
    config = OmegaConf.load(ASSETS / "sam2.yaml")
    config.model.image_size = image_size
    return config


class Batches:
    """Batches of images, turned and mirrored at random, with P objects of each."""

    def __init__(self, cache: SceneCache, batch_size: int, prompts: int) -> None:
        self._cache, self._batch_size, self._prompts = cache, batch_size, prompts

    def __call__(self, step: int) -> Batch:
        """Return a batch.

        Returns:
            Images (B, 3, 192, 192), masks (B P, 128, 128) of the objects, and masks of the same
            shape that cover all other objects of the image.
        """
        rng = np.random.default_rng([step, 1])
        chosen = np.sort(rng.integers(len(self._cache), size=self._batch_size))
        images = torch.from_numpy(self._cache.images[chosen]).permute(0, 3, 1, 2).float() / 255
        index_maps = torch.from_numpy(self._cache.index_maps[chosen])
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        images, index_maps = (torch.rot90(x, turns, (-2, -1)) for x in (images, index_maps))
        if mirror:
            images, index_maps = images.flip(-1), index_maps.flip(-1)
        light = torch.from_numpy(rng.uniform(0.8, 1.2, (len(images), 3, 1, 1))).float()
        images = ((images * light).clamp(0, 1) - MEAN) / STD
        images = F.interpolate(images, size=SCENE_SIZE, mode="bilinear", antialias=True)
        counts = (self._cache.attributes[chosen, :, 0] != 255).sum(axis=1)
        picks = rng.integers(0, counts[:, None], (len(images), self._prompts))
        masks = index_maps[:, None] == torch.from_numpy(picks + 1)[..., None, None]
        others = (index_maps[:, None] > 0) & ~masks
        return images, masks.flatten(0, 1), others.flatten(0, 1)


class Prompts:
    """Random prompts for masks (N, H, W), similar to those from a heat map.

    Args:
        masks: bool, of the objects.
        others: bool, of the same shape, what the prompts may confuse with them.
        seed: of the random numbers.
        image_size: width and height of the images that the model sees.
        grid: width and height of the heat map.
    """

    def __init__(
        self, masks: torch.Tensor, others: torch.Tensor, seed: int, *, image_size: int, grid: int
    ) -> None:
        self._image_size, self._grid = image_size, grid
        self._rng = torch.Generator().manual_seed(seed)
        self.points, self.labels = self._make_points_and_box(masks, others)
        self.mask_logits = self._make_mask_logits(masks, others)
        self.has_mask = self._draw_flags(len(masks), 0.7)

    def _draw_flags(self, count: int, probability: float) -> torch.Tensor:
        return torch.rand(count, generator=self._rng) < probability

    def _sample_pixels(self, masks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample pixels (N, count, 2) of each mask as (x, y); return whether it has any, too."""
        weight = masks.flatten(1).float()
        has_pixels = weight.sum(1) > 0
        weight[~has_pixels] = 1
        index = torch.multinomial(weight, count, replacement=True, generator=self._rng)
        width = masks.shape[-1]
        return torch.stack([index % width, index // width], -1).float(), has_pixels

    def _make_points_and_box(
        self, masks: torch.Tensor, others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return points (N, 7, 2) in pixels of the model's images and labels (N, 7).

        The first two are the corners of a box. The label -1 means that there is no point.
        """
        count, scale = len(masks), self._image_size / masks.shape[-1]
        core = F.max_pool2d(1 - masks[:, None].float(), 7, 1, 3)[:, 0] < 0.5
        core = torch.where((core.sum((1, 2)) > 0)[:, None, None], core, masks)
        positive, _ = self._sample_pixels(core, 3)
        negative, has_others = self._sample_pixels(others, 2)
        corners, jitter = compute_boxes(masks), torch.randn((count, 2, 2), generator=self._rng)
        size = (corners[:, 1] - corners[:, 0])[:, None]
        box = corners + 0.08 * jitter * size
        keep_box = self._draw_flags(count, 0.85)
        positives = torch.randint(0, 4, (count,), generator=self._rng)
        positives = torch.where(keep_box, positives, positives.clamp(min=1))
        negatives = torch.randint(0, 3, (count,), generator=self._rng) * has_others
        labels = torch.cat(
            [
                torch.where(keep_box[:, None], torch.tensor([[2, 3]]), -1),
                torch.where(torch.arange(3) < positives[:, None], 1, -1),
                torch.where(torch.arange(2) < negatives[:, None], 0, -1),
            ],
            dim=1,
        )
        pixels = torch.cat([positive, negative], dim=1)
        points = torch.cat([box * scale, (pixels + 0.5) * scale - 0.5], dim=1)
        return points, labels

    def _make_mask_logits(self, masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Return logits (N, 1, h, w) in [-10, 10] of coarse, blurred and noisy masks."""
        count = len(masks)
        leak = (
            torch.rand((count, 1, 1), generator=self._rng)
            * 0.5
            * self._draw_flags(count, 0.3).view(-1, 1, 1)
        )
        heat = masks.float() + leak * others.float()
        heat = F.interpolate(heat[:, None], size=self._grid, mode="area")
        heat = heat + 0.12 * torch.randn(heat.shape, generator=self._rng) * (heat > 0.02)
        heat = F.interpolate(heat.clamp(0), size=self._image_size // 4, mode="bicubic").clamp(0)
        exponent = 0.5 + torch.rand((count, 1, 1, 1), generator=self._rng)
        heat = (heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-6)) ** exponent
        return 20 * heat - 10


def compute_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the corners (N, 2, 2) of tight boxes in pixels; the whole image for an empty mask."""
    size = masks.shape[-1]
    positions = torch.arange(size)
    corners = []
    for axis in (1, 2):
        covered = masks.any(dim=axis)
        low = torch.where(covered, positions, size).amin(1) % size
        high = torch.where(covered, positions, -1).amax(1) % size + 1
        corners.append(torch.stack([low, high], -1))
    return torch.stack(corners, -1).float()


def decode(
    model: nn.Module, images: torch.Tensor, prompts: Prompts, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, 4, h, w) and predicted IoU (N, 4), `count` prompts for each image.

    The first of the four masks is the single mask, the others are the three of the multimask
    output.
    """
    # On a CPU the backward pass of the fused attention is slow for heads as narrow as these.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        backbone = model.forward_image(images)
        fine, middle, coarse = backbone["backbone_fpn"]
        coarse = coarse + model.no_mem_embed.view(1, -1, 1, 1)
        encoder = model.sam_prompt_encoder
        sparse, no_mask = encoder(points=(prompts.points, prompts.labels), boxes=None, masks=None)
        dense = encoder.mask_downscaling(prompts.mask_logits)
        dense = torch.where(prompts.has_mask.view(-1, 1, 1, 1), dense.float(), no_mask)
        logits, iou, _, _ = model.sam_mask_decoder.predict_masks(
            image_embeddings=coarse.repeat_interleave(count, 0),
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[x.repeat_interleave(count, 0) for x in (fine, middle)],
        )
    return logits.float(), iou.float()


def compute_losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus Dice (N,) of logits (N, h, w) and target (N, h, w) in [0, 1]."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    probability = logits.sigmoid()
    overlap = (probability * target).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
    return 5 * entropy + dice


def resize(maps: torch.Tensor, size: int, mode: str) -> torch.Tensor:
    """Resize (N, h, w) to (N, size, size)."""
    antialias = mode == "bilinear"
    return F.interpolate(maps[:, None], size=size, mode=mode, antialias=antialias)[:, 0]


def compute_iou(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the IoU (N,) of masks (N, H, W) and logits (N, h, w), which are enlarged to them."""
    predicted = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear")[:, 0] > 0
    union = (predicted | masks).sum((1, 2)).clamp(min=1)
    return (predicted & masks).sum((1, 2)) / union


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a training on scenes and one on photographs do not have in common.

    Attributes:
        train: takes the number of a step; returns images (B, 3, image_size, image_size), masks
            (B P, H, W) of objects, and masks of the same shape of what is not to be taken for them.
        val: the same for validation.
        image_size: width and height of the images that the model sees.
        grid: width and height of the heat maps that the prompts resemble.
    """

    train: Callable[[int], Batch]
    val: Callable[[int], Batch]
    image_size: int
    grid: int


def create_task(arguments: argparse.Namespace) -> Task:
    """Create the task for scenes, or for the photographs of `--data`."""
    sizes = (arguments.images, arguments.prompts)
    if arguments.data:
        train, val = (
            RegionBatches(
                read_photographs(arguments.data / split),
                *sizes,
                image_size=PHOTO_SIZE,
                augment=split == "train",
            )
            for split in ("train", "val")
        )
        return Task(train=train, val=val, image_size=PHOTO_SIZE, grid=PHOTO_GRID)
    folder = arguments.out.parent
    return Task(
        train=Batches(SceneCache(folder, arguments.scenes, seed=TRAINING_SEED), *sizes),
        val=Batches(SceneCache(folder, 600, seed=CALIBRATION_SEED), *sizes),
        image_size=SCENE_SIZE,
        grid=SCENE_GRID,
    )


def train(arguments: argparse.Namespace) -> None:
    """Train to the end, and write the weights into the output folder at each validation."""
    task, config = create_task(arguments), read_config(PHOTO_SIZE if arguments.data else SCENE_SIZE)
    low_res_size, fine_size = task.image_size // 4, task.image_size // 2
    model = instantiate(config.model, _recursive_=True)
    if arguments.data:
        model.load_state_dict(load_file(ASSETS / "sam2.safetensors"))
    loop = TrainingLoop(model, arguments.out, steps=arguments.steps, lr=arguments.lr)

    def forward(
        model: nn.Module, batches: Callable[[int], Batch], step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits and predicted IoU, the true masks, and the true IoU (N, 4)."""
        images, masks, others = batches(step)
        prompts = Prompts(masks, others, step, image_size=task.image_size, grid=task.grid)
        logits, iou = decode(model, images, prompts, arguments.prompts)
        with torch.no_grad():
            true_iou = torch.stack([compute_iou(logits[:, k], masks) for k in range(4)], 1)
        return logits, iou, masks, true_iou

    def compute_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        logits, iou, masks, true_iou = forward(loop.model, task.train, step)
        low_res = resize(masks.float(), low_res_size, "area")
        with torch.no_grad():
            losses = torch.stack([compute_losses(logits[:, k], low_res) for k in (1, 2, 3)], 1)
            best = 1 + losses.argmin(1)
        chosen = torch.stack([logits[:, 0], logits[torch.arange(len(best)), best]], 1)
        fine = resize(masks.float(), fine_size, "area").repeat_interleave(2, 0)
        loss = compute_losses(resize(chosen.flatten(0, 1), fine_size, "bilinear"), fine).mean()
        return loss + F.mse_loss(iou, true_iou), {"train_iou": true_iou[:, 0].mean().item()}

    def validate(model: nn.Module) -> dict[str, float]:
        single, chosen, errors = [], [], []
        for step in range(12):
            _, iou, _, true_iou = forward(model, task.val, step)
            single.append(true_iou[:, 0].mean())
            chosen.append(true_iou.gather(1, iou.argmax(1, keepdim=True)).mean())
            errors.append((iou - true_iou).abs().mean())
        rows = {"val_iou_single": single, "val_iou_chosen": chosen, "val_iou_error": errors}
        return {name: torch.stack(values).mean().item() for name, values in rows.items()}

    def export(model: nn.Module) -> None:
        weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
        save_file(weights, arguments.out / "sam2.safetensors")
        OmegaConf.save(config, arguments.out / "sam2.yaml")

    loop.run(compute_loss, validate, interval=200, export=export)


def main() -> None:
    """Train on scenes, or on the photographs of `--data`."""
    arguments = parse_options(
        __doc__,
        out="sam2",
        prompts="prompts",
        on_scenes=(2_600, 16, 6),
        on_photographs=(4_000, 16, 6),
    )
    train(arguments)
    if not arguments.data:
        shutil.copy(arguments.out / "sam2.safetensors", ASSETS)


if __name__ == "__main__":
    main()
