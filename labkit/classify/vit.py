"""A Vision Transformer to read (Dosovitskiy et al. 2021), and what its attention looked at.

Parameters bear the names of timm's `VisionTransformer`, so weights go back and forth unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard, get_args

import torch
from torch import Tensor, nn

from labkit.classify.layers import Attention, Block, PatchEmbedding, Tokens, make_sinusoids
from labkit.runtime import InputError

Pool = Literal["cls", "mean", "sequence"]


@dataclass(frozen=True)
class AttentionRecord:
    """What one forward pass attended to.

    Attributes:
        maps: one tensor (B, num_heads, T, T) per layer, first layer first; rows sum to 1.
        readout: (B, T), the weights with which the last tokens enter the classifier; rows sum to 1.
        grid: (h, w) of the patches, which are the last h*w of the T tokens, row by row.
    """

    maps: list[Tensor]
    readout: Tensor
    grid: tuple[int, int]


class Attentive(Protocol):
    """A network that can tell what it attends to."""

    def record_attention(self, images: Tensor) -> AttentionRecord:
        """The attention of an evaluation pass over normalised images (B, 3, H, W)."""


def has_attention(model: nn.Module) -> TypeGuard[Attentive]:
    """Whether `compute_attention_rollout` can be computed for `model`."""
    return hasattr(model, "record_attention")


@contextmanager
def use_eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every layer's own mode is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def roll_out(record: AttentionRecord) -> Tensor:
    """How much of each patch reaches the classifier (Abnar & Zuidema 2020).

    Heads are averaged, the residual connection counts as much as the attention, and the layers
    are multiplied. Returns (B, h, w), each image scaled to a maximum of 1.
    """
    flow = record.readout.float().unsqueeze(1)  # (B, 1, T)
    for attention in reversed(record.maps):
        flow = 0.5 * flow + 0.5 * flow @ attention.float().mean(dim=1)
    height, width = record.grid
    patches = flow[:, 0, -height * width :]
    return (patches / patches.amax(dim=1, keepdim=True)).reshape(-1, height, width)  # (B, h, w)


@torch.no_grad()
def compute_attention_rollout(model: nn.Module, images: Tensor) -> Tensor:
    """`roll_out` of what `model` attends to in normalised images (B, 3, H, W), as (B, h, w).

    Raises:
        InputError: the model has no attention to show (see `has_attention`).
    """
    if not has_attention(model):
        raise InputError(
            f"attention roll-out needs a model such as 'vit' or 'vit-finetune', "
            f"got {type(model).__name__}"
        )
    return roll_out(model.record_attention(images))


def _check_sizes(image_size: int, mlp_ratio: float, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} must be at least 1, got {size}")
    if image_size % sizes["patch_size"]:
        raise InputError(
            f"patch_size must divide image_size, got {sizes['patch_size']} and {image_size}; "
            "choose another patch_size, such as 2 or 4"
        )
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise InputError(
            f"num_heads must divide embed_dim, got {sizes['num_heads']} and {sizes['embed_dim']}; "
            "choose an embed_dim that is a multiple of num_heads"
        )
    if round(sizes["embed_dim"] * mlp_ratio) < 1:
        raise InputError(f"mlp_ratio must leave a hidden channel, got {mlp_ratio}; 4 is usual")


def _check_options(choices: Mapping[str, tuple[str, object]], rates: Mapping[str, float]) -> None:
    for name, (value, literal) in choices.items():
        if value not in get_args(literal):
            raise InputError(f"{name} must be one of {', '.join(get_args(literal))}, got {value!r}")
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise InputError(f"{name} must be at least 0 and below 1, got {rate}")


class VisionTransformer(nn.Module):
    """A Vision Transformer; the defaults are the textbook's, the options suit small data.

    Args:
        num_classes: number of classes, the length of the logits.
        image_size: height and width of the images in pixels.
        patch_size: height and width of a patch in pixels.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: attention heads, of C / num_heads channels each.
        mlp_ratio: hidden channels of an MLP as a multiple of C.
        tokens: how patches become tokens (see `labkit.classify.layers.PatchEmbedding`).
        pool: what is classified: a CLS token, the mean of the tokens, or their mean with learned
            weights, the sequence pooling of CCT (Hassani et al. 2021).
        relative_bias: add a 2-D relative position bias to the attention.
        mimetic: start from `Attention.init_mimetic_`, and from 2-D sinusoids as positions, which
            make that attention local; all stay learnable.
        drop_path_rate: rate of stochastic depth in the last block; it rises linearly from 0.
        head_dropout: dropout rate before the classifier.

    Raises:
        InputError: sizes do not divide, or an option is out of range.

    Example:
        >>> model = VisionTransformer(patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> model(torch.zeros(4, 3, 32, 32)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 192,
        depth: int = 9,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        tokens: Tokens = "patch",
        pool: Pool = "cls",
        relative_bias: bool = False,
        mimetic: bool = False,
        drop_path_rate: float = 0.0,
        head_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "num_classes": num_classes,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
        }
        _check_sizes(image_size, mlp_ratio, sizes)
        _check_options(
            {"tokens": (tokens, Tokens), "pool": (pool, Pool)},
            {"drop_path_rate": drop_path_rate, "head_dropout": head_dropout},
        )
        if tokens == "stem" and patch_size & (patch_size - 1):
            raise InputError(f"a stem needs a patch_size that is a power of 2, got {patch_size}")
        if mimetic and embed_dim % 4:
            raise InputError(f"mimetic needs an embed_dim that is a multiple of 4, got {embed_dim}")
        self.grid = image_size // patch_size
        self.pool = pool
        self.patch_embed = PatchEmbedding(patch_size, embed_dim, tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if pool == "cls" else None
        length = self.grid**2 + (pool == "cls")
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim))
        rates = [drop_path_rate * layer / max(depth - 1, 1) for layer in range(depth)]
        self.blocks = nn.ModuleList(
            Block(
                Attention(embed_dim, num_heads, self.grid, relative_bias),
                embed_dim,
                round(embed_dim * mlp_ratio),
                rate,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.token_score = nn.Linear(embed_dim, 1) if pool == "sequence" else None
        self.head_drop = nn.Dropout(head_dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        self._initialise(mimetic)

    @torch.no_grad()
    def _initialise(self, mimetic: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if mimetic:
            patches = self.pos_embed[:, -(self.grid**2) :]
            patches.copy_(make_sinusoids(self.grid, patches.shape[2]))
            for module in self.modules():
                if isinstance(module, Attention):
                    module.init_mimetic_()

    def _encode(self, images: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Normalised last tokens (B, T, C)."""
        tokens: Tensor = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, maps)
        normed: Tensor = self.norm(tokens)
        return normed

    def _weigh_tokens(self, tokens: Tensor) -> Tensor:
        """Weights (B, T) of the pooling; rows sum to 1."""
        if self.token_score is not None:
            scores: Tensor = self.token_score(tokens).squeeze(2)
            return scores.softmax(dim=1)
        weights = torch.zeros_like(tokens[:, :, 0])
        if self.pool == "cls":
            weights[:, 0] = 1
            return weights
        return weights + 1 / tokens.shape[1]

    def _pool_tokens(self, tokens: Tensor) -> Tensor:
        if self.pool == "cls":
            return tokens[:, 0]
        if self.pool == "mean":
            return tokens.mean(dim=1)
        return (self._weigh_tokens(tokens).unsqueeze(1) @ tokens).squeeze(1)  # (B, C)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, 3, H, W)."""
        logits: Tensor = self.head(self.head_drop(self._pool_tokens(self._encode(images))))
        return logits

    @torch.no_grad()
    def record_attention(self, images: Tensor) -> AttentionRecord:
        """The attention of an evaluation pass, computed without the fused kernel."""
        maps: list[Tensor] = []
        with use_eval_mode(self):
            tokens = self._encode(images, maps)
        return AttentionRecord(maps, self._weigh_tokens(tokens), (self.grid, self.grid))
