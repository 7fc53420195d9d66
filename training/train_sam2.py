"""Train the tiny SAM-2 on scenes: one mask for points, a box and a rough mask, in any mixture.

    python training/train_sam2.py --out runs/training/sam2

Interrupted, the same command goes on. `labkit/assets/sam2-tiny` then gets the averaged weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from scene_cache import SceneCache
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer import Trainer, options

from labkit.object_scenes import CALIBRATION_SEED, TRAINING_SEED

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets" / "sam2-tiny"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
SIDE, COARSE = 192, 14
LOW, FINE = SIDE // 4, SIDE // 2


def build() -> nn.Module:
    """The network that the configuration among the assets describes."""
    config = OmegaConf.load(ASSETS / "sam2.yaml")
    return instantiate(config.model, _recursive_=True)


class Batches:
    """Pictures turned and mirrored at random, each with prompts for some of its objects."""

    def __init__(self, cache: SceneCache, pictures: int, prompts: int) -> None:
        self._cache, self._pictures, self._prompts = cache, pictures, prompts

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, 3, 192, 192), and masks (B P, 128, 128) with those of all others."""
        rng = np.random.default_rng([step, 1])
        chosen = np.sort(rng.integers(len(self._cache), size=self._pictures))
        images = torch.from_numpy(self._cache.images[chosen]).permute(0, 3, 1, 2).float() / 255
        owners = torch.from_numpy(self._cache.owners[chosen])
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        images, owners = (torch.rot90(x, turns, (-2, -1)) for x in (images, owners))
        if mirror:
            images, owners = images.flip(-1), owners.flip(-1)
        light = torch.from_numpy(rng.uniform(0.8, 1.2, (len(images), 3, 1, 1))).float()
        images = ((images * light).clamp(0, 1) - MEAN) / STD
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        counts = (self._cache.looks[chosen, :, 0] != 255).sum(axis=1)
        picks = rng.integers(0, counts[:, None], (len(images), self._prompts))
        masks = owners[:, None] == torch.from_numpy(picks + 1)[..., None, None]
        others = (owners[:, None] > 0) & ~masks
        return images, masks.flatten(0, 1), others.flatten(0, 1)


class Prompts:
    """Random prompts for masks (N, 128, 128), of the kind that a heat map gives."""

    def __init__(self, masks: torch.Tensor, others: torch.Tensor, seed: int) -> None:
        self._rng = torch.Generator().manual_seed(seed)
        self.points, self.labels = self._points_and_box(masks, others)
        self.mask_logits = self._rough(masks, others)
        self.has_mask = self._chance(len(masks), 0.7)

    def _chance(self, count: int, share: float) -> torch.Tensor:
        return torch.rand(count, generator=self._rng) < share

    def _inside(self, region: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` random pixels (N, count, 2) as (x, y) of each region, and whether it has any."""
        weight = region.flatten(1).float()
        some = weight.sum(1) > 0
        weight[~some] = 1
        index = torch.multinomial(weight, count, replacement=True, generator=self._rng)
        side = region.shape[-1]
        return torch.stack([index % side, index // side], -1).float(), some

    def _points_and_box(
        self, masks: torch.Tensor, others: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Points (N, 7, 2) in 192-pixel coordinates and labels; -1 stands for no point."""
        count, scale = len(masks), SIDE / masks.shape[-1]
        core = F.max_pool2d(1 - masks[:, None].float(), 7, 1, 3)[:, 0] < 0.5
        core = torch.where((core.sum((1, 2)) > 0)[:, None, None], core, masks)
        positive, _ = self._inside(core, 3)
        negative, some = self._inside(others, 2)
        corners, jitter = _boxes(masks), torch.randn((count, 2, 2), generator=self._rng)
        size = (corners[:, 1] - corners[:, 0])[:, None]
        box = corners + 0.08 * jitter * size
        keep_box = self._chance(count, 0.85)
        positives = torch.randint(0, 4, (count,), generator=self._rng)
        positives = torch.where(keep_box, positives, positives.clamp(min=1))
        negatives = torch.randint(0, 3, (count,), generator=self._rng) * some
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

    def _rough(self, masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1, 48, 48) of a coarse, smeared and noisy copy, as x 20 - 10."""
        count = len(masks)
        leak = (
            torch.rand((count, 1, 1), generator=self._rng)
            * 0.5
            * self._chance(count, 0.3).view(-1, 1, 1)
        )
        heat = masks.float() + leak * others.float()
        heat = F.interpolate(heat[:, None], size=(COARSE, COARSE), mode="area")
        heat = heat + 0.12 * torch.randn(heat.shape, generator=self._rng) * (heat > 0.02)
        heat = F.interpolate(heat.clamp(0), size=(LOW, LOW), mode="bicubic").clamp(0)
        sharp = 0.5 + torch.rand((count, 1, 1, 1), generator=self._rng)
        heat = (heat / heat.amax((2, 3), keepdim=True).clamp(min=1e-6)) ** sharp
        return 20 * heat - 10


def _boxes(masks: torch.Tensor) -> torch.Tensor:
    """Corners (N, 2, 2) of tight boxes in pixels; the whole picture where a mask is empty."""
    side = masks.shape[-1]
    place = torch.arange(side)
    corners = []
    for axis in (1, 2):
        seen = masks.any(dim=axis)
        low = torch.where(seen, place, side).amin(1) % side
        high = torch.where(seen, place, -1).amax(1) % side + 1
        corners.append(torch.stack([low, high], -1))
    return torch.stack(corners, -1).float()


def decode(
    model: nn.Module, images: torch.Tensor, prompts: Prompts, each: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, 4, 48, 48) and predicted IoU (N, 4) of the single and the three masks."""
    # The fused attention of a CPU is slow backwards where heads are as narrow as here.
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        backbone = model.forward_image(images)
        fine, middle, coarse = backbone["backbone_fpn"]
        coarse = coarse + model.no_mem_embed.view(1, -1, 1, 1)
        encoder = model.sam_prompt_encoder
        sparse, nothing = encoder(points=(prompts.points, prompts.labels), boxes=None, masks=None)
        dense = encoder.mask_downscaling(prompts.mask_logits)
        dense = torch.where(prompts.has_mask.view(-1, 1, 1, 1), dense.float(), nothing)
        logits, iou, _, _ = model.sam_mask_decoder.predict_masks(
            image_embeddings=coarse.repeat_interleave(each, 0),
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[x.repeat_interleave(each, 0) for x in (fine, middle)],
        )
    return logits.float(), iou.float()


def losses(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus Dice (N,) of logits (N, h, w) against coverage (N, h, w)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    share = logits.sigmoid()
    overlap = (share * truth).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (share.sum((1, 2)) + truth.sum((1, 2)) + 1)
    return 5 * entropy + dice


def resized(x: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """(N, h, w) to (N, side, side)."""
    return F.interpolate(x[:, None], size=(side, side), mode=mode, antialias=mode == "bilinear")[
        :, 0
    ]


def true_iou(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """IoU (N,) of the masks that logits (N, h, w) give at the size of `masks`."""
    found = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear")[:, 0] > 0
    union = (found | masks).sum((1, 2)).clamp(min=1)
    return (found & masks).sum((1, 2)) / union


def main() -> None:
    """Train to the end, then write the assets."""
    arguments = options(__doc__, out="sam2", steps=2_600, pictures=16, each="prompts", count=6)
    pictures, prompts = arguments.pictures, arguments.prompts
    batches = Batches(
        SceneCache(arguments.out.parent, arguments.scenes, seed=TRAINING_SEED), pictures, prompts
    )
    held_out = Batches(
        SceneCache(arguments.out.parent, 600, seed=CALIBRATION_SEED), pictures, prompts
    )
    trainer = Trainer(build(), arguments.out, steps=arguments.steps, rate=arguments.rate)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        images, masks, others = batches(step)
        logits, iou = decode(trainer.model, images, Prompts(masks, others, step), prompts)
        low = resized(masks.float(), LOW, "area")
        with torch.no_grad():
            each = torch.stack([losses(logits[:, k], low) for k in (1, 2, 3)], 1)
            best = 1 + each.argmin(1)
        chosen = torch.stack([logits[:, 0], logits[torch.arange(len(best)), best]], 1)
        fine = resized(masks.float(), FINE, "area").repeat_interleave(2, 0)
        loss = losses(resized(chosen.flatten(0, 1), FINE, "bilinear"), fine).mean()
        with torch.no_grad():
            reached = torch.stack([true_iou(logits[:, k], masks) for k in range(4)], 1)
        return loss + F.mse_loss(iou, reached), {"train_iou": reached[:, 0].mean().item()}

    def measure(model: nn.Module) -> dict[str, float]:
        single, chosen, errors = [], [], []
        for step in range(12):
            images, masks, others = held_out(step)
            logits, iou = decode(model, images, Prompts(masks, others, step), prompts)
            reached = torch.stack([true_iou(logits[:, k], masks) for k in range(4)], 1)
            pick = iou.argmax(1, keepdim=True)
            single.append(reached[:, 0].mean())
            chosen.append(reached.gather(1, pick).mean())
            errors.append((iou - reached).abs().mean())
        rows = {"iou_single": single, "iou_chosen": chosen, "iou_error": errors}
        return {name: torch.stack(values).mean().item() for name, values in rows.items()}

    trainer.run(loss_of, measure, every=250)
    weights = {k: v.half().contiguous() for k, v in trainer.averaged.module.state_dict().items()}
    save_file(weights, ASSETS / "sam2.safetensors")


if __name__ == "__main__":
    main()
