"""Counter-based random numbers: each is a pure function of (seed, epoch, index, stream).

A generator with a state hands out numbers in the order in which it is asked, so that batch size,
worker count or a resumed run change who gets which. Here number `index` of a stream is computed
from its index alone: output `index` of the SplitMix64 generator (Steele, Lea and Flood, 2014,
"Fast splittable pseudorandom number generators") whose start is a hash of the other three.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from labkit.runtime import InputError

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
    """
    return _logical_shift(_bits(seed, epoch, indices, stream), 40).to(torch.float32) * 2.0**-24


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
    return (_logical_shift(_bits(seed, epoch, indices, stream), 32) * high) >> 32


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """An order of 0 ... count - 1, as (count,) int64 on the CPU."""
    return torch.argsort(_bits(seed, epoch, torch.arange(count), "permutation"), stable=True)


def _bits(seed: int, epoch: int, indices: Tensor, stream: str) -> Tensor:
    """64 random bits for each of `indices`, as (B,) int64 of either sign."""
    state = (indices.to(torch.int64) + 1) * _signed(_GAMMA) + _signed(_key(seed, epoch, stream))
    state = (state ^ _logical_shift(state, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    state = (state ^ _logical_shift(state, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return state ^ _logical_shift(state, _SHIFTS[2])


def _key(seed: int, epoch: int, stream: str) -> int:
    """The start of a stream, in [0, 2**64): the same in every process and on every machine."""
    text = f"{seed % 2**64} {epoch % 2**64} {stream}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _signed(value: int) -> int:
    """The int64 that has the bits of `value`, which lies in [0, 2**64)."""
    return value - 2**64 if value >= 2**63 else value


def _logical_shift(value: Tensor, places: int) -> Tensor:
    """Shift int64 to the right and fill with zeros, where `>>` alone would repeat the sign."""
    return (value >> places) & ((1 << (64 - places)) - 1)
