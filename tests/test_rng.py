from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from labkit import rng
from labkit.runtime import InputError

COUNT = 20_000
MASK = 2**64 - 1


def splitmix64_outputs(state: int, count: int) -> list[int]:
    """The first outputs of SplitMix64 as its authors define it: a state that is stepped."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_reference_gives_the_published_first_outputs() -> None:
    # Seed 1234567: the test vector of the Rosetta Code entry and of several libraries.
    assert splitmix64_outputs(1234567, 2) == [6457827717110365317, 3203168211198807973]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (-1, 40), (2**63 + 5, 0)])
def test_numbers_equal_a_plain_integer_splitmix64(seed: int, epoch: int) -> None:
    reference = splitmix64_outputs(rng._hash(f"{seed % 2**64} {epoch % 2**64} crop"), 200)
    indices = torch.arange(200)
    assert rng.uniform(seed, epoch, indices, "crop").tolist() == [
        (value >> 40) / 2**24 for value in reference
    ]
    assert rng.integers(seed, epoch, indices, "crop", 31).tolist() == [
        ((value >> 32) * 31) >> 32 for value in reference
    ]


DRAWS: list[Callable[[Tensor], Tensor]] = [
    lambda indices: rng.uniform(1, 2, indices, "flip"),
    lambda indices: rng.integers(1, 2, indices, "flip", 1000),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_number_depends_on_its_index_alone(draw: Callable[[Tensor], Tensor]) -> None:
    whole = draw(torch.arange(100))
    chosen = torch.tensor([99, 3, 3, 42, 0])
    assert torch.equal(draw(chosen), whole[chosen])
    assert torch.equal(draw(chosen.to(torch.int32)), whole[chosen])
    assert draw(torch.arange(0)).shape == (0,)


def test_seed_epoch_stream_and_index_each_change_the_numbers() -> None:
    indices = torch.arange(1000)
    variants = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 1, "a"), (1, 0, "b")]
    drawn = [rng.uniform(seed, epoch, indices, name) for seed, epoch, name in variants]
    for first, second in itertools.combinations(drawn, 2):
        assert (first == second).float().mean() < 0.01
    assert len(set(drawn[0].tolist())) > 990


def test_streams_are_uncorrelated() -> None:
    indices = torch.arange(COUNT)
    arguments = [(seed, epoch, name) for seed in (0, 1) for epoch in (0, 1) for name in ("a", "b")]
    drawn = [rng.uniform(seed, epoch, indices, name) for seed, epoch, name in arguments]
    correlations = torch.corrcoef(torch.stack([*drawn, drawn[0].roll(1), drawn[0].roll(2)]))
    off_diagonal = correlations[~torch.eye(len(correlations), dtype=torch.bool)].abs()
    assert off_diagonal.max() < 4.5 / COUNT**0.5


@pytest.mark.parametrize("step", [1, 2, 256, 2**40])
def test_uniform_numbers_are_uniform_and_below_one(step: int) -> None:
    drawn = rng.uniform(11, 5, torch.arange(COUNT) * step, "uniformity")
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.double().numpy(), "uniform").pvalue > 0.001


@pytest.mark.parametrize("high", [1, 2, 14, 31, 1000])
def test_integers_are_equally_likely(high: int) -> None:
    drawn = rng.integers(11, 5, torch.arange(COUNT), "counts", high)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=high)
    assert counts.numel() == high
    if high > 1:
        assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_integers_reach_the_top_of_the_largest_range() -> None:
    drawn = rng.integers(0, 0, torch.arange(COUNT), "large", 2**31)
    assert drawn.min() >= 0
    assert 0.999 * 2**31 < drawn.max() < 2**31


@pytest.mark.parametrize("high", [0, -3, 2**31 + 1])
def test_a_range_that_cannot_be_drawn_from_is_refused(high: int) -> None:
    with pytest.raises(InputError, match=str(high)):
        rng.integers(0, 0, torch.arange(2), "refused", high)


def test_permutation_holds_every_index_once_and_changes_with_seed_and_epoch() -> None:
    orders = [rng.permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).sum() < 20
    assert torch.equal(orders[0], rng.permutation(0, 0, 1000))
    assert rng.permutation(0, 0, 0).shape == (0,)


def test_permutations_of_three_are_equally_likely() -> None:
    drawn = torch.stack([rng.permutation(3, epoch, 3) for epoch in range(1200)])
    counts = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27)
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 0.001
    assert (counts > 0).sum() == 6


def test_numbers_are_the_same_in_another_process() -> None:
    program = (
        "import torch; from labkit import rng; "
        "print(rng.integers(5, 6, torch.arange(8), 'process', 10**6).tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    expected = rng.integers(5, 6, torch.arange(8), "process", 10**6).tolist()
    assert printed.strip() == str(expected)


def test_global_random_state_is_left_as_found() -> None:
    before = torch.get_rng_state()
    rng.uniform(0, 0, torch.arange(4), "state")
    rng.permutation(0, 0, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("draw", DRAWS)
def test_gpu_and_cpu_give_the_same_numbers(draw: Callable[[Tensor], Tensor]) -> None:
    indices = torch.arange(4096)
    on_gpu = draw(indices.cuda())
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), draw(indices))


def test_bits_for_images_are_those_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    outputs = rng._splitmix(np.array([1234567], np.uint64), np.arange(3, dtype=np.uint64))
    assert outputs.tolist() == published
    keys = rng.make_keys(5, "image", np.arange(3, dtype=np.uint64))
    start = rng._hash("5 image")
    assert keys[1:].tolist() == splitmix64_outputs(start, 2)
