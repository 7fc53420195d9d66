"""Counter-based random numbers: each is a pure function of a seed, a stream and an index.

A generator with a state hands out numbers in the order in which it is asked, so that batch size,
worker count or a resumed run change who gets which. Here number `index` of a stream is computed
from its index alone: it is output `index` of the SplitMix64 generator (Steele, Lea and Flood,
2014, "Fast splittable pseudorandom number generators") that a hash of seed and stream starts.

`uniform`, `integers` and `permutation` give one number for each (seed, epoch, index), on the
device of the indices. `make_keys` and the `draw_` functions give many numbers for each picture of
a procedural data set, as NumPy arrays.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from labkit.runtime import InputError

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Signed = TypeVar("Signed", Tensor, npt.NDArray[np.int64])
"""64 bits as int64, since torch knows hardly any arithmetic on unsigned numbers."""

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_HIGH_LIMIT = 2**31


def uniform(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2**-24.

    `uniform` and `integers` of one stream come from the same bits: give each use its own stream.

    Args:
        seed: any int; its lower 64 bits count.
        epoch: any int; its lower 64 bits count.
        indices: (B,) integers, in any order; on the CPU or a GPU.
        stream: a name for the use of the numbers; other names give independent numbers.

    Returns:
        (B,) float32 on the device of `indices`.

    Example:
        >>> numbers = uniform(0, 0, torch.arange(4), "flip")
        >>> torch.equal(numbers[2:], uniform(0, 0, torch.tensor([2, 3]), "flip"))
        True
    """
    return _shift_right(_bits(seed, epoch, indices, stream), 40).to(torch.float32) * 2.0**-24


def integers(seed: int, epoch: int, indices: Tensor, stream: str, high: int) -> Tensor:
    """Integers in [0, high), all equally likely to within one part in 2**32 / high.

    The arguments but `high` are those of `uniform`.

    Returns:
        (B,) int64 on the device of `indices`.

    Raises:
        InputError: `high` is not in 1 ... 2**31.
    """
    if not 1 <= high <= _HIGH_LIMIT:
        raise InputError(f"high must be from 1 to {_HIGH_LIMIT}, got {high}")
    return (_shift_right(_bits(seed, epoch, indices, stream), 32) * high) >> 32


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """An order of 0 ... count - 1, as (count,) int64 on the CPU."""
    return torch.argsort(_bits(seed, epoch, torch.arange(count), "permutation"), stable=True)


def make_keys(seed: int, stream: str, numbers: Keys) -> Keys:
    """A key (B,) for each of `numbers` (B,), from which the `draw_` functions draw."""
    start = np.array([_hash(f"{seed % 2**64} {stream}")])
    return _splitmix(start, numbers.view(np.int64) - 1).view(np.uint64)


def draw_bits(keys: Keys, stream: str, *shape: int) -> Keys:
    """64 random bits each: (B, *shape) for keys (B,)."""
    starts = _mix(keys.view(np.int64) ^ _hash(stream))
    numbers = _splitmix(starts[:, None], np.arange(math.prod(shape)))
    return numbers.view(np.uint64).reshape(-1, *shape)


def draw_uniform(keys: Keys, stream: str, *shape: int) -> Floats:
    """Numbers in [0, 1), multiples of 2**-24: (B, *shape) for keys (B,)."""
    whole = (draw_bits(keys, stream, *shape) >> np.uint64(40)).astype(np.float32)
    return whole * 2**-24


def draw_between(keys: Keys, stream: str, low: float, high: float) -> Floats:
    """One number in [low, high) for each key: (B, 1, 1, 1)."""
    return low + (high - low) * draw_uniform(keys, stream, 1, 1, 1)


def _bits(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """64 random bits for each of `indices`, as (B,) int64 of either sign."""
    start = torch.tensor(_hash(f"{seed % 2**64} {epoch % 2**64} {stream}"), device=indices.device)
    return _splitmix(start, indices.to(torch.int64))


def _splitmix(start: Signed, index: Signed) -> Signed:
    """Output `index`, counted from 0, of the generator that begins at `start`; they broadcast."""
    return _mix(start + (index + 1) * _as_signed(_GAMMA))


def _mix(state: Signed) -> Signed:
    """The output function of SplitMix64."""
    state = (state ^ _shift_right(state, _SHIFTS[0])) * _as_signed(_MULTIPLIERS[0])
    state = (state ^ _shift_right(state, _SHIFTS[1])) * _as_signed(_MULTIPLIERS[1])
    return state ^ _shift_right(state, _SHIFTS[2])


def _hash(text: str) -> int:
    """An int64 that is the same in every process and on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _as_signed(value: int) -> int:
    """The int64 that has the bits of `value`, which lies in [0, 2**64)."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: Signed, places: int) -> Signed:
    """Shift to the right and fill with zeros, where `>>` alone would repeat the sign."""
    return (value >> places) & ((1 << (64 - places)) - 1)
