"""The layers of a Vision Transformer, and initial values that suit small data."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = Literal["patch", "conv"]

STEM_CHANNELS = 32


class RelativeBias(nn.Module):
    """A learned bias of attention for every 2-D offset between patches (Liu et al. 2021, Swin)."""

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(heads, 2 * grid - 1, 2 * grid - 1))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, prefix: int) -> Tensor:
        """Bias (heads, T, T); the first `prefix` tokens, which have no position, get 0."""
        # Window (y, x) of the table, reversed, holds the offsets (y - y', x - x').
        windows = self.table.unfold(1, self.grid, 1).unfold(2, self.grid, 1).flip(3, 4)
        bias = windows.flatten(3, 4).flatten(1, 2)  # (heads, grid * grid, grid * grid)
        return F.pad(bias, (prefix, 0, prefix, 0))


class Attention(nn.Module):
    """Multi-head self-attention, with an optional relative position bias."""

    def __init__(self, width: int, heads: int, grid: int, relative_bias: bool) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_bias = RelativeBias(grid, heads) if relative_bias else None

    def forward(self, tokens: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Attend among tokens (B, T, C); the attention (B, heads, T, T) is appended to `maps`."""
        length = tokens.shape[1]
        qkv: Tensor = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # (B, T, 3, heads, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        bias = None
        if self.relative_bias is not None:
            bias = self.relative_bias(length - self.grid**2).to(query.dtype)
        if maps is None:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        else:
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
            maps.append((scores if bias is None else scores + bias).softmax(dim=-1))
            mixed = maps[-1] @ value
        output: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return output

    @torch.no_grad()
    def mimetic_(self) -> None:
        """Initialise in place as pretrained ViTs have it (Trockman & Kolter 2023).

        Per head W_q W_k^T is 0.7 Z + 0.7 I, cut to the rank of the head, and W_v W_proj is
        0.4 Z - 0.4 I, with the entries of Z drawn from N(0, 1/C).
        """
        width = self.proj.in_features
        rank = width // self.heads
        query, key = _factors(0.7, 0.7, self.heads, width)
        value, projection = _factors(0.4, -0.4, 1, width)
        rows = [part[:, :, :rank].mT.flatten(0, 1) for part in (query, key)]  # (heads * d, C)
        self.qkv.weight.copy_(torch.cat([*rows, value[0].mT]))
        self.proj.weight.copy_(projection[0])


class DropPath(nn.Module):
    """Stochastic depth: a branch is left out for an image with probability `rate`.

    What stays is scaled up, so that the expectation is unchanged (Huang et al. 2016).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Thin out a residual branch (B, T, C) in training; the identity otherwise."""
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return branch * kept / (1 - self.rate)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, branch: Tensor) -> Tensor:
        """Scale a residual branch (B, T, C)."""
        return branch * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, attention: Attention, width: int, hidden: int, rate: float, gain: float | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.ls1 = nn.Identity() if gain is None else LayerScale(width, gain)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        layers = {
            "fc1": nn.Linear(width, hidden),
            "act": nn.GELU(),
            "fc2": nn.Linear(hidden, width),
        }
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](layers))
        self.ls2 = nn.Identity() if gain is None else LayerScale(width, gain)
        self.drop_path = DropPath(rate)

    def forward(self, tokens: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Transform tokens (B, T, C); see `Attention.forward` for `maps`."""
        tokens = tokens + self.drop_path(self.ls1(self.attn(self.norm1(tokens), maps)))
        output: Tensor = tokens + self.drop_path(self.ls2(self.mlp(self.norm2(tokens))))
        return output


class PatchEmbedding(nn.Module):
    """Images (B, 3, H, W) to tokens (B, T, C), one per patch, row by row."""

    def __init__(self, patch: int, width: int, tokens: Tokens) -> None:
        super().__init__()
        conv = tokens == "conv"
        stem = nn.Sequential(nn.Conv2d(3, STEM_CHANNELS, 3, padding=1), nn.GELU())
        self.stem = stem if conv else nn.Identity()
        self.proj = nn.Conv2d(STEM_CHANNELS if conv else 3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Embed every patch."""
        tokens: Tensor = self.proj(self.stem(images))
        return tokens.flatten(2).transpose(1, 2)  # (B, T, C)


def _factors(noise: float, identity: float, count: int, width: int) -> tuple[Tensor, Tensor]:
    """`count` pairs L, R (C, C) with L R^T = noise Z + identity I, columns by singular value."""
    random = torch.randn(count, width, width) / math.sqrt(width)
    left, singular, right = torch.linalg.svd(noise * random + identity * torch.eye(width))
    root = singular.sqrt().unsqueeze(1)
    return left * root, right.mT * root


def sinusoids(grid: int, width: int) -> Tensor:
    """Fixed 2-D positions (grid * grid, C): sines and cosines of row and column.

    `width` C must be a multiple of 4; each of the four parts has C / 4 wavelengths.
    """
    quarter = width // 4
    wave = torch.arange(grid).unsqueeze(1) / 10_000 ** (torch.arange(quarter) / quarter)
    line = torch.cat([wave.sin(), wave.cos()], dim=1)  # (grid, C / 2)
    rows = line.unsqueeze(1).expand(grid, grid, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=2).flatten(0, 1)
