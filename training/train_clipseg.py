"""Train the tiny CLIPSeg on scenes: first what each patch shows, then what a sentence names.

    python training/train_clipseg.py --out runs/training/clipseg

Interrupted, the same command goes on. `labkit/assets/clipseg-tiny` then gets the averaged weights.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scene_cache import SceneCache
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer import Trainer, options
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    ViTImageProcessor,
)
from vocabulary import LONGEST, STRANGERS, TEMPLATES, tokenizer

from labkit.object_scenes import (
    CALIBRATION_SEED,
    SCENE_COLOURS,
    SCENE_PATTERNS,
    SCENE_SENTENCES,
    SCENE_SHAPES,
    TRAINING_SEED,
)

ASSETS = Path(__file__).resolve().parents[1] / "labkit" / "assets" / "clipseg-tiny"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, PATCH = 112, 8
GRID = SIDE // PATCH
KINDS = (SCENE_SHAPES, tuple(SCENE_COLOURS), SCENE_PATTERNS)
WARM_UP = 0.25  # share of the steps in which the tower alone is trained
STRANGE = 12  # sentences a step that name nothing of this world


def sentence_table() -> torch.Tensor:
    """Numbers (S, 3) of shape, colour and pattern in each of SCENE_SENTENCES; -1 where unsaid."""
    table = torch.full((len(SCENE_SENTENCES), 3), -1)
    for row, sentence in enumerate(SCENE_SENTENCES):
        for column, kind in enumerate(KINDS):
            for word in set(sentence.split()) & set(kind):
                table[row, column] = kind.index(word)
    return table


def configuration(vocabulary: int, end: int) -> CLIPSegConfig:
    """A CLIPSeg of about 1.7 million weights for 112-pixel pictures."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LONGEST,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=96,
        reduce_dim=64,
        extract_layers=[1, 3, 5],
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        use_complex_transposed_convolution=False,
    )


class Network(nn.Module):
    """CLIPSeg with auxiliary heads: what each patch shows, and where its object's middle is."""

    def __init__(self, config: CLIPSegConfig) -> None:
        super().__init__()
        self.clipseg = CLIPSegForImageSegmentation(config)
        width = config.vision_config.hidden_size
        self.heads = nn.ModuleList([nn.Linear(width, len(kind) + 1) for kind in KINDS])
        self.offset = nn.Linear(width, 2)
        _start_near(self.clipseg)

    def vision(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs (B, 1 + T, width) of the layers that the decoder reads."""
        outputs = self.clipseg.clip.vision_model(images, output_hidden_states=True)
        return tuple(outputs.hidden_states[i + 1] for i in self.clipseg.extract_layers)

    def sentences(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings (S, projection) of token numbers (S, L)."""
        return self.clipseg.clip.get_text_features(ids, attention_mask=mask).pooler_output

    def decode(self, layers: tuple[torch.Tensor, ...], condition: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, 112, 112) for K embedded sentences (B, K, projection) an image."""
        each = condition.shape[1]
        expanded = tuple(layer.repeat_interleave(each, 0) for layer in layers)
        logits = self.clipseg.decoder(expanded, condition.flatten(0, 1)).logits
        return logits.view(-1, each, SIDE, SIDE)


@torch.no_grad()
def _start_near(clipseg: nn.Module) -> None:
    """Begin with attention to near patches: sine positions, and queries equal to keys.

    After Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2023.
    """
    tower = clipseg.clip.vision_model
    width = tower.embeddings.position_embedding.weight.shape[1]
    rates = math.pi / 2 * torch.logspace(0, -3, width // 4, base=2)
    place = torch.arange(GRID)[:, None] * rates
    waves = torch.cat([place.sin(), place.cos()], 1)  # (grid, width / 2)
    rows = waves[:, None].expand(GRID, GRID, -1)
    both = torch.cat([rows, rows.transpose(0, 1)], -1).reshape(GRID * GRID, width)
    tower.embeddings.position_embedding.weight[1:] = 0.5 * both
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        size = width // attention.num_heads
        for head in range(attention.num_heads):
            rows_ = slice(head * size, (head + 1) * size)
            basis = torch.linalg.qr(torch.randn(width, size)).Q.T
            attention.q_proj.weight[rows_] = basis + 0.02 * torch.randn_like(basis)
            attention.k_proj.weight[rows_] = basis + 0.02 * torch.randn_like(basis)


class Batches:
    """Pictures turned and mirrored at random, with sentences and what each names."""

    def __init__(self, cache: SceneCache, pictures: int) -> None:
        self._cache, self._pictures = cache, pictures
        self._table = sentence_table()
        said = (self._table >= 0).sum(1)
        form = said * 2 + (self._table[:, 1] >= 0)
        self._form_weight = 1.0 / torch.bincount(form)[form]

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, 3, 112, 112), coverage (B, 5, 128, 128) and looks (B, 5, 3) of objects."""
        rng = np.random.default_rng([step, 2])
        chosen = np.sort(rng.integers(len(self._cache), size=self._pictures))
        images = torch.from_numpy(self._cache.images[chosen]).permute(0, 3, 1, 2).float() / 255
        owners = torch.from_numpy(self._cache.owners[chosen])
        looks = torch.from_numpy(self._cache.looks[chosen]).long()
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        images, owners = (torch.rot90(x, turns, (-2, -1)) for x in (images, owners))
        if mirror:
            images, owners = images.flip(-1), owners.flip(-1)
        light = torch.from_numpy(rng.uniform(0.85, 1.15, (len(images), 3, 1, 1))).float()
        images = (images * light).clamp(0, 1)
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        masks = owners[:, None] == torch.arange(1, 6, dtype=torch.uint8).view(1, 5, 1, 1)
        return images, masks.float(), looks

    def questions(
        self, looks: torch.Tensor, each: int, rng: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers (B, each) of sentences, half of them true; and which objects (B, each, 5) fit.

        A number from len(SCENE_SENTENCES) on is a stranger's.
        """
        fits = (looks[:, None] == self._table[None, :, None]) | (self._table < 0)[None, :, None]
        fits = fits.all(-1) & (looks[:, None, :, 0] != 255)  # (B, S, 5)
        apart = (looks[:, None] != self._table[None, :, None]) & (self._table >= 0)[None, :, None]
        near = ((apart.sum(-1) == 1) & (looks[:, None, :, 0] != 255)).any(-1)
        true = fits.any(-1)
        half = each // 2
        yes = torch.multinomial(true.float(), half, generator=rng)
        weight = (~true).float() * self._form_weight * (1 + 2 * near)
        no = torch.multinomial(weight, each - half, generator=rng)
        strange = torch.rand(no.shape, generator=rng) < 0.1
        stranger = torch.randint(0, STRANGE, no.shape, generator=rng) + len(SCENE_SENTENCES)
        numbers = torch.cat([yes, torch.where(strange, stranger, no)], 1)
        known = numbers.clamp(max=len(SCENE_SENTENCES) - 1)
        objects = fits[torch.arange(len(looks))[:, None], known]
        return numbers, objects & (numbers < len(SCENE_SENTENCES))[..., None]


def strange_sentences(rng: np.random.Generator) -> list[str]:
    """Sentences that name nothing in a scene: other things, other letters, with known words too."""
    found = []
    for _ in range(STRANGE):
        if rng.random() < 0.6:
            thing = str(rng.choice(STRANGERS))
        else:
            thing = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 10)))
        known = [str(rng.choice(KINDS[1])), str(rng.choice(KINDS[2]))]
        found.append(" ".join([*(w for w in known if rng.random() < 0.25), thing]))
    return found


def patch_loss(
    network: Network, tokens: torch.Tensor, masks: torch.Tensor, looks: torch.Tensor
) -> tuple[torch.Tensor, list[float]]:
    """Loss of the auxiliary heads on tokens (B, T, width), and their accuracy inside objects."""
    cover = F.adaptive_avg_pool2d(masks, GRID).flatten(2).transpose(1, 2)  # (B, T, 5)
    ground = 1 - cover.sum(-1, keepdim=True)
    inside = ground[..., 0] < 0.3
    total, right = torch.zeros(()), []
    for head, kind, look in zip(network.heads, KINDS, looks.unbind(-1), strict=True):
        one_hot = F.one_hot(look.clamp(max=len(kind)), len(kind) + 1)[..., : len(kind)].float()
        target = torch.cat([cover @ one_hot, ground], -1)
        logits = head(tokens).float()
        total = total - (target * logits.log_softmax(-1)).sum(-1).mean()
        right.append((logits.argmax(-1) == target.argmax(-1))[inside].float().mean().item())
    place = (torch.arange(GRID) + 0.5) / GRID
    where = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1).view(-1, 2)
    middle = torch.einsum("btn,tc->bnc", cover, where) / cover.sum(1)[..., None].clamp(min=1e-6)
    away = torch.einsum("btn,bntc->btc", cover, middle[:, :, None] - where[None, None])
    away = away / cover.sum(-1, keepdim=True).clamp(min=1e-6)
    error = (network.offset(tokens).float() - 5 * away).abs().sum(-1)
    return total + 0.5 * error[inside].mean(), right


def mask_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus, where something is named, Dice; both (B, K, h, w)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    share, named = logits.sigmoid(), truth.sum((2, 3)) > 0
    dice = 1 - (2 * (share * truth).sum((2, 3)) + 1) / (share + truth).sum((2, 3)).add(1)
    return 4 * entropy + 0.5 * dice[named].mean()


def main() -> None:
    """Train to the end, then write the assets."""
    arguments = options(__doc__, out="clipseg", steps=3_200, pictures=32, each="questions", count=4)
    tokens = tokenizer()
    config = configuration(len(tokens), tokens.eos_token_id)
    trainer = Trainer(Network(config), arguments.out, steps=arguments.steps, rate=arguments.rate)
    folder, pictures = arguments.out.parent, arguments.pictures
    batches = Batches(SceneCache(folder, arguments.scenes, seed=TRAINING_SEED), pictures)
    held_out = Batches(SceneCache(folder, 600, seed=CALIBRATION_SEED), pictures)

    def embed(network: Network, sentences: list[str]) -> torch.Tensor:
        encoded = tokens(sentences, padding=True, truncation=True, return_tensors="pt")
        return network.sentences(encoded["input_ids"], encoded["attention_mask"])

    def answers(
        network: Network, source: Batches, step: int, *, decoded: bool
    ) -> tuple[torch.Tensor, list[float], torch.Tensor | None, torch.Tensor | None]:
        images, masks, looks = source(step)
        rng, draw = np.random.default_rng([step, 3]), torch.Generator().manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with sdpa_kernel(SDPBackend.MATH):  # on a CPU faster than the fused one, backwards
                layers = network.vision(images)
            loss, right = patch_loss(network, layers[-1][:, 1:], masks, looks)
            if not decoded:
                return loss, right, None, None
            template = str(rng.choice(TEMPLATES))
            sentences = [template.format(s) for s in SCENE_SENTENCES]
            embedded = embed(network, sentences + strange_sentences(rng))
            numbers, objects = source.questions(looks, arguments.questions, draw)
            logits = network.decode(layers, embedded[numbers]).float()
        truth = torch.einsum("bkn,bnhw->bkhw", objects.float(), masks)
        truth = F.interpolate(truth, size=(SIDE, SIDE), mode="area")
        return loss, right, logits, truth

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        decoded = step >= WARM_UP * arguments.steps
        loss, right, logits, truth = answers(trainer.model, batches, step, decoded=decoded)
        row = dict(zip(("shape", "colour", "pattern"), right, strict=True))
        if logits is not None:
            loss = 0.5 * loss + mask_loss(logits, truth)
        return loss, row

    def measure(network: Network) -> dict[str, float]:
        ious, named, peaks, rights = [], [], [], []
        for step in range(12):
            _, right, logits, truth = answers(network, held_out, step, decoded=True)
            found, real = logits > 0, truth > 0.5
            union = (found | real).sum((2, 3)).clamp(min=1)
            ious.append(((found & real).sum((2, 3)) / union)[real.any(-1).any(-1)])
            named.append(real.any(-1).any(-1).flatten())
            peaks.append(logits.flatten(2).topk(50, -1).values.mean(-1).flatten())
            rights.append(right)
        shape, colour, pattern = np.mean(rights, axis=0)
        return {
            "held_out_shape": shape,
            "held_out_colour": colour,
            "held_out_pattern": pattern,
            "held_out_iou": torch.cat(ious).mean().item(),
            "held_out_auroc": roc_auc_score(torch.cat(named), torch.cat(peaks)),
        }

    trainer.run(loss_of, measure, every=250)
    clipseg = trainer.averaged.module.clipseg.half()
    clipseg.save_pretrained(ASSETS)
    size = {"height": SIDE, "width": SIDE}
    images = ViTImageProcessor(size=size, resample=2, image_mean=MEAN, image_std=STD)
    CLIPSegProcessor(images, tokens).save_pretrained(ASSETS)


if __name__ == "__main__":
    main()
