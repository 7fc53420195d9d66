"""The training of the tiny CLIPSeg on photographs with a label for each pixel.

It begins with the weights for scenes: after 80 steps of 8 crops the loss of the names was 1.71 with
them and 2.02 without. At first the image encoder alone learns to name what each patch shows: the
embedding of the patch is compared with those of sentences, as CLIP compares images with sentences.
Then the decoder learns the masks of sentences that are true of a crop, and of others, while the
patches are still named.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from loop import TrainingLoop
from photographs import (
    MIN_REGION,
    Photographs,
    cut_cover,
    cut_image,
    read_photographs,
    sample_crop,
)
from sklearn.metrics import roc_auc_score
from tiny_clipseg import ASSETS, CLIPSegNetwork
from torch.nn.attention import SDPBackend, sdpa_kernel
from vocabulary import OTHER_NOUNS, STREET_NOUNS, TEMPLATES, create_tokenizer, name_classes

IMAGE_SIZE = 176  # 22 x 22 patches, as many as the published CLIPSeg has
NAMING_SHARE = 0.4  # of the steps train the image encoder alone
FOREIGN_SHARE = 0.25  # of the sentences that are not true are about none of the classes
NUM_FOREIGN = 12  # sentences in a step that name none of the classes
VAL_STEPS = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """Crops of photographs, and sentences for them.

    Attributes:
        images: (B, 3, H, W) normalised.
        cover: (B, C, H, W) in [0, 1], the share of each pixel that each of C classes covers.
        sentences: S sentences, the foreign ones last.
        names: for each class the index of a sentence that names it and no other class (C,).
        indices: (B, K) of the sentences for each image.
        targets: (B, K, H, W) in [0, 1], what each of them names.
    """

    images: torch.Tensor
    cover: torch.Tensor
    sentences: list[str]
    names: torch.Tensor
    indices: torch.Tensor
    targets: torch.Tensor


class Batches:
    """Batches of random crops; a batch is a function of the number of the step."""

    def __init__(
        self, photographs: Photographs, batch_size: int, sentences: int, *, augment: bool
    ) -> None:
        self._photographs, self._batch_size = photographs, batch_size
        self._count, self._augment = sentences, augment
        named = name_classes(photographs.names)
        self.sentences = list(named)
        self._table = np.zeros((len(named), len(photographs.names)), dtype=np.float32)
        for row, classes in enumerate(named.values()):
            self._table[row, list(classes)] = 1
        rarity = (self._table * photographs.rarity).max(axis=1)
        synonyms = (self._table @ self._table.T > 0).sum(axis=1)
        self._weights = rarity / synonyms  # (S,)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step."""
        rng = np.random.default_rng([step, 4])
        crops = [sample_crop(self._photographs, rng) for _ in range(self._batch_size)]
        light = rng if self._augment else None
        images = torch.stack([cut_image(self._photographs, c, IMAGE_SIZE, light) for c in crops])
        cover = torch.stack([cut_cover(self._photographs, c, IMAGE_SIZE) for c in crops])
        foreign = make_foreign_sentences(rng)
        shares = cover.mean((2, 3)).numpy() @ self._table.T  # (B, S)
        indices = torch.from_numpy(np.stack([self._sample_sentences(s, rng) for s in shares]))
        table = torch.from_numpy(np.pad(self._table, ((0, len(foreign)), (0, 0))))
        single = self._table * (self._table.sum(axis=1, keepdims=True) == 1)
        return Batch(
            images=images,
            cover=cover,
            sentences=[str(rng.choice(TEMPLATES)).format(s) for s in [*self.sentences, *foreign]],
            names=torch.tensor([int(rng.choice(np.flatnonzero(c))) for c in single.T]),
            indices=indices,
            targets=torch.einsum("bks,bshw->bkhw", table[indices], cover),
        )

    def _sample_sentences(self, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Sample K sentences for an image of which they name the shares (S,), half of them true.

        Where fewer are true, more of the others are taken. Sentences that name less than MIN_REGION
        of the image are neither.
        """
        foreign = len(shares) + rng.permutation(NUM_FOREIGN)
        true = _sample(self._weights * (shares >= MIN_REGION), (self._count + 1) // 2, rng)
        count = self._count - len(true)
        num_foreign = rng.binomial(count, FOREIGN_SHARE)
        false = _sample(self._weights * (shares == 0), count - num_foreign, rng)
        return np.concatenate([true, false, foreign])[: self._count]


def _sample(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample indices by weight without repetition, `count` or as many as have a weight."""
    count = min(count, int((weights > 0).sum()))
    if not count:
        return np.zeros(0, dtype=np.int64)
    return rng.choice(len(weights), size=count, replace=False, p=weights / weights.sum())


def make_foreign_sentences(rng: np.random.Generator) -> list[str]:
    """Return sentences of nouns that no street shows, and of random letters."""
    nouns = [noun for noun in OTHER_NOUNS if noun not in STREET_NOUNS]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    chosen = [str(noun) for noun in rng.choice(nouns, NUM_FOREIGN - 3, replace=False)]
    return chosen + ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(3)]


class PatchNamer(CLIPSegNetwork):
    """CLIPSeg whose patches can be compared with sentences, by the parts of CLIP itself."""

    def name_patches(self, tokens: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, S) for patches as tokens (B, T, embed_dim) and S sentences."""
        clip = self.clipseg.clip
        patches = clip.visual_projection(clip.vision_model.post_layernorm(tokens))
        similarity = F.normalize(patches.float(), dim=-1) @ F.normalize(embedded.float(), dim=-1).T
        return clip.logit_scale.exp() * similarity


def compute_naming_loss(
    logits: torch.Tensor, cover: torch.Tensor, rarity: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of the names of patches, and which patches are named rightly.

    Args:
        logits: (B, T, N) for N >= C sentences, of which the first C name the classes.
        cover: (B, C, H, W), see Batch.
        rarity: weights (C,) of the classes.

    Returns:
        The loss, and (2, C): how many patches each class has, and how many are named rightly.
    """
    grid, count = int(logits.shape[1] ** 0.5), cover.shape[1]
    target = F.adaptive_avg_pool2d(cover, grid).flatten(2).transpose(1, 2)  # (B, T, C)
    weight = target * rarity
    entropy = -(weight * logits.log_softmax(-1)[..., :count]).sum() / weight.sum().clamp(min=1e-6)
    with torch.no_grad():
        most, true = target.max(-1)
        true, named = true[most > 0.5], logits.argmax(-1)[most > 0.5]
        hits = [torch.bincount(x, minlength=count) for x in (true, true[named == true])]
    return entropy, torch.stack(hits)


def compute_sentence_loss(
    logits: torch.Tensor, target: torch.Tensor, labelled: torch.Tensor
) -> torch.Tensor:
    """Return weighted cross-entropy plus Dice, for things large and small alike.

    The cross-entropy of a sentence is divided by the square root of the share of the image that it
    names, so that a pedestrian of a few pixels counts. Dice is that of sentences that name
    something.

    Args:
        logits: (B, K, H, W).
        target: (B, K, H, W) in [0, 1].
        labelled: (B, 1, H, W) in [0, 1], the weight of each pixel.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = (entropy * labelled).mean((2, 3))
    share = target.mean((2, 3))
    present = share > 0
    balance = torch.where(present, share.clamp(min=0.01) ** -0.5, 2)
    probability = logits.sigmoid() * labelled
    overlap = (probability * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability + target).sum((2, 3)).add(1)
    return (balance * entropy).mean() + (dice * present).sum() / present.sum().clamp(min=1)


def train_on_photographs(arguments: argparse.Namespace) -> None:
    """Train to the end; write the averaged weights into the output folder at each validation."""
    photographs = read_photographs(arguments.data / "train")
    sizes = (arguments.images, arguments.sentences)
    train = Batches(photographs, *sizes, augment=True)
    val = Batches(read_photographs(arguments.data / "val"), *sizes, augment=False)
    rarity = torch.from_numpy(photographs.rarity).float()
    network = PatchNamer(create_tokenizer(train.sentences), IMAGE_SIZE)
    network.read(ASSETS)
    loop = TrainingLoop(network, arguments.out, steps=arguments.steps, lr=arguments.lr)

    def forward(
        network: PatchNamer, batch: Batch, *, decode: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the loss of the names, the patches named rightly, and logits of the masks."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with sdpa_kernel(SDPBackend.MATH):  # backwards faster on a CPU than the fused kernel
                layers = network.encode_images(batch.images)
            embedded = network.encode_sentences(batch.sentences)
            foreign = torch.arange(len(embedded) - NUM_FOREIGN, len(embedded))
            names = embedded[torch.cat([batch.names, foreign])]
            named = network.name_patches(layers[-1][:, 1:], names)
            decoded = network.decode(layers, embedded[batch.indices]).float() if decode else None
        loss, hits = compute_naming_loss(named, batch.cover, rarity)
        return loss, hits, decoded

    def compute_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = train(step)
        loss, hits, logits = forward(
            loop.model, batch, decode=step >= NAMING_SHARE * arguments.steps
        )
        if logits is not None:
            labelled = batch.cover.sum(1, keepdim=True)
            loss = 0.3 * loss + compute_sentence_loss(logits, batch.targets, labelled)
        return loss, {"named": (hits[1].sum() / hits[0].sum()).item()}

    def validate(network: PatchNamer) -> dict[str, float]:
        """Figures of fixed crops: recall of named patches, IoU of true sentences, AUROC of all."""
        hits, ious, present, peaks = [], [], [], []
        for step in range(VAL_STEPS):
            batch = val(step)
            _, hit, logits = forward(network, batch, decode=True)
            labelled = batch.cover.sum(1, keepdim=True) > 0.5
            predicted, true = (logits > 0) & labelled, batch.targets > 0.5
            union = (predicted | true).sum((2, 3)).clamp(min=1)
            is_true = batch.targets.sum((2, 3)) > 0
            ious.append(((predicted & true).sum((2, 3)) / union)[is_true])
            present.append(is_true.flatten())
            peaks.append(logits.flatten(2).topk(50, -1).values.mean(-1).flatten())
            hits.append(hit)
        total, right = torch.stack(hits).sum(0)
        return {
            "val_recall": (right / total)[total > 0].mean().item(),
            "val_iou": torch.cat(ious).mean().item(),
            "val_auroc": roc_auc_score(torch.cat(present), torch.cat(peaks)),
        }

    loop.run(
        compute_loss, validate, interval=100, export=lambda network: network.write(arguments.out)
    )
