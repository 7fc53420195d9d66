"""Counter-based random numbers: each is a pure function of a seed, a stream and an index.

A generator with a state gives numbers in the order of the calls, so that another batch size,
another number of workers or a resumed run gives other numbers to an image. Here number `index` of
a stream depends on its index alone: it is output `index` of the SplitMix64 generator (Steele, Lea
and Flood, 2014, "Fast splittable pseudorandom number generators"), which starts from a hash of
seed and stream.

`uniform`, `integers` and `permutation` give one number for each (seed, epoch, index), on the
device of the indices. `make_keys` and the `draw_` functions give many numbers for each image of a
procedural data set, as NumPy arrays.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labkit.runtime import InputError

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Words = TypeVar("Words", Tensor, npt.NDArray[np.uint64])
"""64 random bits each: int64 in torch, which knows hardly any unsigned arithmetic, else uint64."""

_HIGH_LIMIT = 2**31
_FACTORS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_FACTORS_OF: dict[type, Any] = {
    Tensor: [factor - 2**64 for factor in _FACTORS],
    np.ndarray: [np.array(factor, dtype=np.uint64) for factor in _FACTORS],  # faster than scalars
}


def uniform(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """Return uniform numbers in [0, 1), multiples of 2**-24.

    `uniform` and `integers` of one stream use the same bits: give each use its own stream.

    Args:
        seed: any int; its lower 64 bits count.
        epoch: any int; its lower 64 bits count.
        indices: (B,) integers in any order, on the CPU or a GPU.
        stream: a name for the use of the numbers; another name gives independent numbers.

    Returns:
        (B,) float32 on the device of `indices`.

    Example:
        >>> numbers = uniform(0, 0, torch.arange(4), "flip")
        >>> torch.equal(numbers[2:], uniform(0, 0, torch.tensor([2, 3]), "flip"))
        True
    """
    return _shift_right(_bits(seed, epoch, indices, stream), 40).to(torch.float32) * 2.0**-24


def integers(seed: int, epoch: int, indices: Tensor, stream: str, high: int) -> Tensor:
    """Return integers in [0, high), equally likely up to one part in 2**32 / high.

    Args:
        seed: as in `uniform`.
        epoch: as in `uniform`.
        indices: as in `uniform`.
        stream: as in `uniform`.
        high: from 1 to 2**31.

    Returns:
        (B,) int64 on the device of `indices`.

    Raises:
        InputError: `high` is out of range.

    Example:
        >>> integers(0, 0, torch.arange(1000), "crop", 9).unique().tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """
    if not 1 <= high <= _HIGH_LIMIT:
        raise InputError(f"high must be from 1 to {_HIGH_LIMIT}, got {high}")
    return (_shift_right(_bits(seed, epoch, indices, stream), 32) * high) >> 32


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """Return 0 ... count - 1 in random order, as (count,) int64 on the CPU.

    Example:
        >>> permutation(0, 0, 4).sort().values.tolist()
        [0, 1, 2, 3]
    """
    return torch.argsort(_bits(seed, epoch, torch.arange(count), "permutation"), stable=True)


def make_keys(seed: int, stream: str, numbers: Keys) -> Keys:
    """Return a key (B,) for each of `numbers` (B,), from which the `draw_` functions draw.

    Example:
        >>> keys = make_keys(0, "image", np.arange(3, dtype=np.uint64))
        >>> draw_uniform(keys, "noise", 4, 4).shape
        (3, 4, 4)
    """
    start = np.array([_hash(f"{seed % 2**64} {stream}")], dtype=np.uint64)
    return _splitmix(start, numbers - np.uint64(1))


def draw_bits(keys: Keys, stream: str, *shape: int) -> Keys:
    """Draw 64 random bits each: (B, *shape) for keys (B,)."""
    starts = _mix(keys ^ np.uint64(_hash(stream)))
    steps = np.arange(math.prod(shape), dtype=np.uint64)
    return _splitmix(starts[:, None], steps).reshape(-1, *shape)


def draw_uniform(keys: Keys, stream: str, *shape: int) -> Floats:
    """Draw numbers in [0, 1), multiples of 2**-24: (B, *shape) for keys (B,)."""
    whole = (draw_bits(keys, stream, *shape) >> np.uint64(40)).astype(np.float32)
    return whole * 2**-24


def draw_between(keys: Keys, stream: str, low: float, high: float) -> Floats:
    """Draw one number in [low, high) for each key: (B, 1, 1, 1)."""
    return low + (high - low) * draw_uniform(keys, stream, 1, 1, 1)


def _bits(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """Return 64 random bits for each of `indices`, as (B,) int64 of either sign."""
    start = np.uint64(_hash(f"{seed % 2**64} {epoch % 2**64} {stream}")).view(np.int64)
    return _splitmix(torch.tensor(start, device=indices.device), indices.to(torch.int64))


def _splitmix(start: Words, index: Words) -> Words:
    """Return output `index`, counted from 0, of the generator that begins at `start`."""
    state: Words = start + (index + 1) * _FACTORS_OF[type(index)][0]
    return _mix(state)


def _mix(state: Words) -> Words:
    """Apply the output function of SplitMix64."""
    _, first, second = _FACTORS_OF[type(state)]
    state = (state ^ _shift_right(state, 30)) * first
    state = (state ^ _shift_right(state, 27)) * second
    return state ^ _shift_right(state, 31)


def _shift_right(words: Words, places: int) -> Words:
    """Shift to the right and fill with zeros, where signed numbers would repeat the sign."""
    if isinstance(words, Tensor):
        return (words >> places) & ((1 << (64 - places)) - 1)
    return np.right_shift(words, places, dtype=np.uint64)


def _hash(text: str) -> int:
    """Return 64 bits that are the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
