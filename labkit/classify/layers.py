"""The layers of a Vision Transformer, and initial values that suit small data."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = Literal["patch", "conv", "stem"]

STEM_CHANNELS = 32


class RelativeBias(nn.Module):
    """A learned bias of attention for every 2-D offset between patches (Liu et al. 2021, Swin)."""

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(num_heads, 2 * grid - 1, 2 * grid - 1))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, prefix: int) -> Tensor:
        """Bias (num_heads, T, T); the first `prefix` tokens, which have no position, get 0."""
        # Window (y, x) of the table, reversed, holds the offsets (y - y', x - x').
        windows = self.table.unfold(1, self.grid, 1).unfold(2, self.grid, 1).flip(3, 4)
        bias = windows.flatten(3, 4).flatten(1, 2)  # (num_heads, grid * grid, grid * grid)
        return F.pad(bias, (prefix, 0, prefix, 0))


class Attention(nn.Module):
    """Multi-head self-attention, with an optional relative position bias."""

    def __init__(self, embed_dim: int, num_heads: int, grid: int, relative_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.grid = num_heads, grid
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.relative_bias = RelativeBias(grid, num_heads) if relative_bias else None

    def forward(self, tokens: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Attend among tokens (B, T, C).

        The attention (B, num_heads, T, T) is appended to `maps` if it is given.
        """
        length = tokens.shape[1]
        projected = self.qkv(tokens)
        qkv: Tensor = projected.unflatten(2, (3, self.num_heads, -1))  # (B, T, 3, num_heads, d)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, num_heads, T, d)
        bias = None
        if self.relative_bias is not None:
            bias = self.relative_bias(length - self.grid**2).to(query.dtype)
        if maps is None and tokens.is_cuda:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        else:  # which on a CPU is faster, too
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
            attention = (scores if bias is None else scores + bias).softmax(dim=-1)
            mixed = attention @ value
            if maps is not None:
                maps.append(attention)
        output: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return output

    @torch.no_grad()
    def init_mimetic_(self) -> None:
        """Initialise in place as pretrained ViTs have it (Trockman & Kolter 2023).

        Per head W_q W_k^T is 0.7 Z + 0.7 I, cut to the rank of the head, and W_v W_proj is
        0.4 Z - 0.4 I, with the entries of Z drawn from N(0, 1/C).
        """
        embed_dim = self.proj.in_features
        rank = embed_dim // self.num_heads
        query, key = _draw_factors(0.7, 0.7, self.num_heads, embed_dim)
        value, projection = _draw_factors(0.4, -0.4, 1, embed_dim)
        rows = [part[:, :, :rank].mT.flatten(0, 1) for part in (query, key)]  # (num_heads * d, C)
        self.qkv.weight.copy_(torch.cat([*rows, value[0].mT]))
        self.proj.weight.copy_(projection[0])


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        attention: its self-attention.
        embed_dim: channels C of a token.
        hidden_dim: channels inside the MLP.
        drop_path_rate: probability with which an image skips a branch in training, stochastic
            depth (Huang et al. 2016).
    """

    def __init__(
        self, attention: Attention, embed_dim: int, hidden_dim: int, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        layers = {
            "fc1": nn.Linear(embed_dim, hidden_dim),
            "act": nn.GELU(),
            "fc2": nn.Linear(hidden_dim, embed_dim),
        }
        self.mlp = nn.Sequential(OrderedDict[str, nn.Module](layers))
        self.drop_path: nn.Module = nn.Identity()
        if drop_path_rate > 0:
            from timm.layers.drop import DropPath

            self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Transform tokens (B, T, C); see `Attention.forward` for `maps`."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), maps))
        output: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return output


def _create_stem(patch_size: int, embed_dim: int) -> nn.Sequential:
    """Convolutions that halve the resolution until a patch is one pixel (Xiao et al. 2021).

    Each is followed by BatchNorm; all but the last, which gives the tokens, by GELU too.
    """
    halvings = patch_size.bit_length() - 1
    widths = [3, *(STEM_CHANNELS * 2**level for level in range(halvings)), embed_dim]
    layers: list[nn.Module] = []
    for level, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        stride = 2 if level else 1
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.GELU(),
        ]
    return nn.Sequential(*layers[:-1])


class PatchEmbedding(nn.Module):
    """Images (B, 3, H, W) to tokens (B, T, C), one per patch, row by row.

    Args:
        patch_size: height and width of a patch in pixels; a power of 2 for `stem`.
        embed_dim: channels C of a token.
        tokens: patches embedded directly (`patch`), after a 3x3 convolution and GELU (`conv`), or
            by a stack of convolutions that see beyond their patch (`stem`; Xiao et al. 2021,
            arXiv 2106.14881).
    """

    def __init__(self, patch_size: int, embed_dim: int, tokens: Tokens) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Identity()
        self.proj: nn.Module = nn.Identity()
        if tokens == "stem":
            self.stem = _create_stem(patch_size, embed_dim)
            return
        channels = 3
        if tokens == "conv":
            channels = STEM_CHANNELS
            self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GELU())
        self.proj = nn.Conv2d(channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed every patch."""
        tokens: Tensor = self.proj(self.stem(images))
        return tokens.flatten(2).transpose(1, 2)  # (B, T, C)


def _draw_factors(
    noise: float, identity: float, count: int, embed_dim: int
) -> tuple[Tensor, Tensor]:
    """Draw `count` pairs L, R (C, C) with L R^T = noise Z + identity I.

    Their columns are in falling order of singular value.
    """
    random = torch.randn(count, embed_dim, embed_dim) / math.sqrt(embed_dim)
    left, singular, right = torch.linalg.svd(noise * random + identity * torch.eye(embed_dim))
    root = singular.sqrt().unsqueeze(1)
    return left * root, right.mT * root


def make_sinusoids(grid: int, embed_dim: int) -> Tensor:
    """Fixed 2-D positions (grid * grid, C): sines and cosines of row and column.

    `embed_dim` C must be a multiple of 4; each of the four parts has C / 4 wavelengths.
    """
    quarter = embed_dim // 4
    wave = torch.arange(grid).unsqueeze(1) / 10_000 ** (torch.arange(quarter) / quarter)
    line = torch.cat([wave.sin(), wave.cos()], dim=1)  # (grid, C / 2)
    rows = line.unsqueeze(1).expand(grid, grid, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=2).flatten(0, 1)
