"""Train the tiny CLIPSeg: first what each patch shows, then the masks of sentences.

    python training/train_clipseg.py                                  # on procedural scenes
    python training/train_clipseg.py --data FOLDER --out runs/clipseg # on photographs, see below

After an interruption the same command resumes. Trained on scenes, the averaged weights are written
to `labkit/assets/clipseg-tiny` at the end. FOLDER holds `train` and `val`, each with photographs
`NAME.jpg` and label images `NAME_labels.png`; there the weights are written to the output folder
whenever figures are, and `labkit segment --clipseg` takes it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from loop import TrainingLoop, parse_options
from photo_clipseg import train_on_photographs
from scene_cache import SceneCache
from sklearn.metrics import roc_auc_score
from tiny_clipseg import ASSETS, MEAN, PATCH_SIZE, STD, CLIPSegNetwork
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer
from vocabulary import OTHER_NOUNS, TEMPLATES, create_tokenizer

from labkit.object_scenes import (
    CALIBRATION_SEED,
    SCENE_COLOURS,
    SCENE_PATTERNS,
    SCENE_SENTENCES,
    SCENE_SHAPES,
    TRAINING_SEED,
)

IMAGE_SIZE = 112
GRID = IMAGE_SIZE // PATCH_SIZE
ATTRIBUTES = (SCENE_SHAPES, tuple(SCENE_COLOURS), SCENE_PATTERNS)
WARM_UP = 0.25  # share of the steps that train the image encoder alone
NUM_FOREIGN = 12  # sentences in a step that name nothing that scenes show


def make_sentence_table() -> torch.Tensor:
    """Return the indices (S, 3) of shape, colour and pattern in each of SCENE_SENTENCES.

    An attribute that a sentence does not name has the index -1.
    """
    table = torch.full((len(SCENE_SENTENCES), 3), -1)
    for row, sentence in enumerate(SCENE_SENTENCES):
        for column, words in enumerate(ATTRIBUTES):
            for word in set(sentence.split()) & set(words):
                table[row, column] = words.index(word)
    return table


class CLIPSegWithHeads(CLIPSegNetwork):
    """CLIPSeg with auxiliary heads for each patch: attributes and offset to the object's centre."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__(tokenizer, IMAGE_SIZE)
        self.heads = nn.ModuleList([nn.Linear(self.embed_dim, len(a) + 1) for a in ATTRIBUTES])
        self.offset = nn.Linear(self.embed_dim, 2)


class Batches:
    """Batches of images, turned and mirrored at random, and sentences for them."""

    def __init__(self, cache: SceneCache, batch_size: int) -> None:
        self._cache, self._batch_size = cache, batch_size
        self._table = make_sentence_table()
        num_words = (self._table >= 0).sum(1)
        form = num_words * 2 + (self._table[:, 1] >= 0)
        self._form_weight = 1.0 / torch.bincount(form)[form]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images (B, 3, 112, 112), masks (B, 5, 128, 128) and attributes (B, 5, 3)."""
        rng = np.random.default_rng([step, 2])
        chosen = np.sort(rng.integers(len(self._cache), size=self._batch_size))
        images = torch.from_numpy(self._cache.images[chosen]).permute(0, 3, 1, 2).float() / 255
        index_maps = torch.from_numpy(self._cache.index_maps[chosen])
        attributes = torch.from_numpy(self._cache.attributes[chosen]).long()
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        images, index_maps = (torch.rot90(x, turns, (-2, -1)) for x in (images, index_maps))
        if mirror:
            images, index_maps = images.flip(-1), index_maps.flip(-1)
        light = torch.from_numpy(rng.uniform(0.85, 1.15, (len(images), 3, 1, 1))).float()
        images = (images * light).clamp(0, 1)
        images = F.interpolate(images, size=IMAGE_SIZE, mode="bilinear", antialias=True)
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        masks = index_maps[:, None] == torch.arange(1, 6, dtype=torch.uint8).view(1, 5, 1, 1)
        return images, masks.float(), attributes

    def sample_sentences(
        self, attributes: torch.Tensor, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample sentences for each image, half of them true.

        Returns:
            Indices (B, count) of sentences and the objects (B, count, 5) that each names. An index
            from len(SCENE_SENTENCES) on means a foreign sentence, which names nothing.
        """
        wanted = self._table[None, :, None]  # (1, S, 1, 3)
        actual = attributes[:, None]  # (B, 1, 5, 3)
        is_object = actual[..., 0] != 255
        fits = ((actual == wanted) | (wanted < 0)).all(-1) & is_object  # (B, S, 5)
        differences = ((actual != wanted) & (wanted >= 0)).sum(-1)
        near = ((differences == 1) & is_object).any(-1)
        true = fits.any(-1)
        half = count // 2
        positive = torch.multinomial(true.float(), half, generator=generator)
        weight = (~true).float() * self._form_weight * (1 + 2 * near)
        negative = torch.multinomial(weight, count - half, generator=generator)
        is_foreign = torch.rand(negative.shape, generator=generator) < 0.1
        foreign = torch.randint(0, NUM_FOREIGN, negative.shape, generator=generator)
        foreign = foreign + len(SCENE_SENTENCES)
        indices = torch.cat([positive, torch.where(is_foreign, foreign, negative)], 1)
        known = indices.clamp(max=len(SCENE_SENTENCES) - 1)
        objects = fits[torch.arange(len(attributes))[:, None], known]
        return indices, objects & (indices < len(SCENE_SENTENCES))[..., None]


def make_foreign_sentences(rng: np.random.Generator) -> list[str]:
    """Return sentences of other nouns or random letters, some of them with known adjectives."""
    sentences = []
    for _ in range(NUM_FOREIGN):
        if rng.random() < 0.6:
            noun = str(rng.choice(OTHER_NOUNS))
        else:
            noun = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 10)))
        adjectives = [str(rng.choice(ATTRIBUTES[1])), str(rng.choice(ATTRIBUTES[2]))]
        sentences.append(" ".join([*(a for a in adjectives if rng.random() < 0.25), noun]))
    return sentences


def compute_patch_loss(
    network: CLIPSegWithHeads, tokens: torch.Tensor, masks: torch.Tensor, attributes: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """Return the loss of the auxiliary heads on tokens (B, T, embed_dim), and their accuracies.

    Each accuracy, of shape, colour and pattern, is that of the patches inside objects.
    """
    cover = F.adaptive_avg_pool2d(masks, GRID).flatten(2).transpose(1, 2)  # (B, T, 5)
    ground = 1 - cover.sum(-1, keepdim=True)
    inside = ground[..., 0] < 0.3
    loss, accuracies = torch.zeros(()), []
    for head, words, index in zip(network.heads, ATTRIBUTES, attributes.unbind(-1), strict=True):
        one_hot = F.one_hot(index.clamp(max=len(words)), len(words) + 1)[..., : len(words)].float()
        target = torch.cat([cover @ one_hot, ground], -1)
        logits = head(tokens).float()
        loss = loss - (target * logits.log_softmax(-1)).sum(-1).mean()
        correct = (logits.argmax(-1) == target.argmax(-1))[inside]
        accuracies.append(correct.float().mean().item())
    steps = (torch.arange(GRID) + 0.5) / GRID
    positions = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(-1, 2)
    centres = torch.einsum("btn,tc->bnc", cover, positions)
    centres = centres / cover.sum(1)[..., None].clamp(min=1e-6)
    offsets = torch.einsum("btn,bntc->btc", cover, centres[:, :, None] - positions[None, None])
    offsets = offsets / cover.sum(-1, keepdim=True).clamp(min=1e-6)
    error = (network.offset(tokens).float() - 5 * offsets).abs().sum(-1)
    return loss + 0.5 * error[inside].mean(), accuracies


def compute_mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus Dice, the latter for sentences that name something.

    Both arguments are (B, K, h, w).
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target)
    probability, present = logits.sigmoid(), target.sum((2, 3)) > 0
    overlap = (probability * target).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (probability + target).sum((2, 3)).add(1)
    return 4 * entropy + 0.5 * dice[present].mean()


def train_on_scenes(arguments: argparse.Namespace) -> None:
    """Train to the end, then write the assets."""
    network = CLIPSegWithHeads(create_tokenizer())
    loop = TrainingLoop(network, arguments.out, steps=arguments.steps, lr=arguments.lr)
    folder = arguments.out.parent
    train = Batches(SceneCache(folder, arguments.scenes, seed=TRAINING_SEED), arguments.images)
    val = Batches(SceneCache(folder, 600, seed=CALIBRATION_SEED), arguments.images)

    def forward(
        network: CLIPSegWithHeads, batches: Batches, step: int, *, decode: bool
    ) -> tuple[torch.Tensor, list[float], torch.Tensor | None, torch.Tensor | None]:
        """Return the loss and accuracies of the patches, then logits and target of the masks."""
        images, masks, attributes = batches(step)
        rng, generator = np.random.default_rng([step, 3]), torch.Generator().manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with sdpa_kernel(SDPBackend.MATH):  # backwards faster on a CPU than the fused kernel
                layers = network.encode_images(images)
            loss, accuracies = compute_patch_loss(network, layers[-1][:, 1:], masks, attributes)
            if not decode:
                return loss, accuracies, None, None
            template = str(rng.choice(TEMPLATES))
            sentences = [template.format(s) for s in SCENE_SENTENCES]
            embedded = network.encode_sentences(sentences + make_foreign_sentences(rng))
            indices, objects = batches.sample_sentences(attributes, arguments.sentences, generator)
            logits = network.decode(layers, embedded[indices]).float()
        target = torch.einsum("bkn,bnhw->bkhw", objects.float(), masks)
        target = F.interpolate(target, size=IMAGE_SIZE, mode="area")
        return loss, accuracies, logits, target

    def compute_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        decode = step >= WARM_UP * arguments.steps
        loss, accuracies, logits, target = forward(loop.model, train, step, decode=decode)
        if logits is not None:
            loss = 0.5 * loss + compute_mask_loss(logits, target)
        return loss, dict(zip(("shape", "colour", "pattern"), accuracies, strict=True))

    def validate(network: CLIPSegWithHeads) -> dict[str, float]:
        ious, present, peaks, accuracies = [], [], [], []
        for step in range(12):
            _, accuracy, logits, target = forward(network, val, step, decode=True)
            predicted, true = logits > 0, target > 0.5
            union = (predicted | true).sum((2, 3)).clamp(min=1)
            ious.append(((predicted & true).sum((2, 3)) / union)[true.any(-1).any(-1)])
            present.append(true.any(-1).any(-1).flatten())
            peaks.append(logits.flatten(2).topk(50, -1).values.mean(-1).flatten())
            accuracies.append(accuracy)
        shape, colour, pattern = np.mean(accuracies, axis=0)
        return {
            "val_shape": shape,
            "val_colour": colour,
            "val_pattern": pattern,
            "val_iou": torch.cat(ious).mean().item(),
            "val_auroc": roc_auc_score(torch.cat(present), torch.cat(peaks)),
        }

    loop.run(compute_loss, validate, interval=250)
    loop.averaged.module.write(ASSETS)


def main() -> None:
    """Train on scenes, or on the photographs of `--data`."""
    arguments = parse_options(
        __doc__,
        out="clipseg",
        prompts="sentences",
        on_scenes=(3_200, 32, 4),
        on_photographs=(3_500, 16, 4),
    )
    if arguments.data:
        train_on_photographs(arguments)
    else:
        train_on_scenes(arguments)


if __name__ == "__main__":
    main()
