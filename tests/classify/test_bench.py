from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from labkit.classify import bench
from labkit.classify.bench import (
    Estimate,
    count_step_flops,
    estimate_training,
    find_convolutions,
    measure_peak,
    measure_shares,
    profile_operators,
)
from labkit.classify.config import TrainConfig, get_preset
from labkit.classify.data import ImageData
from labkit.classify.fit import fit
from labkit.runtime import InputError, Precision

CPU = torch.device("cpu")
FP32 = Precision(autocast_dtype=None, scale_loss=False)


@pytest.fixture
def small(tiny_config: TrainConfig) -> TrainConfig:
    """A ViT of which 32 images take milliseconds."""
    return tiny_config


def test_flops_of_linear_layers_equal_the_hand_count() -> None:
    config = TrainConfig(image_size=8, batch_size=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    first, second = 2 * 4 * 192 * 32, 2 * 4 * 32 * 10
    # Forward, gradient of the weights, and gradient of the input, which the first layer needs not.
    assert count_step_flops(config, model=model) == 2 * first + 3 * second
    assert next(model.parameters()).device == CPU


def test_flops_of_a_convolution_equal_the_hand_count() -> None:
    config = TrainConfig(image_size=8, batch_size=4)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Flatten(), nn.Linear(384, 10))
    convolution, linear = 2 * 4 * 9 * 3 * 6 * 64, 2 * 4 * 384 * 10
    assert count_step_flops(config, model=model) == 2 * convolution + 3 * linear


def test_flops_of_attention_are_counted() -> None:
    """A block by hand: four projections, two products of attention, two layers of the MLP."""
    options = {"patch_size": 4, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0}

    def count(depth: int) -> int:
        config = TrainConfig(
            model="vit", image_size=16, batch_size=2, model_options={**options, "depth": depth}
        )
        return count_step_flops(config)

    tokens, dim = 16 + 1, 16
    projections = 2 * tokens * dim * dim * (4 + 2 * 2)
    attention = 2 * (2 * tokens * tokens * dim)
    assert count(3) - count(2) == 3 * 2 * (projections + attention)


def test_the_seeds_flops_agree_with_those_of_its_published_macs() -> None:
    """37 MMAC an image forward; the backward pass is twice that but for the first layer."""
    config = get_preset("seed-resnet18")
    per_image = count_step_flops(config) / config.batch_size
    assert per_image == pytest.approx(2 * 3 * 37e6, rel=0.03)


def test_the_largest_convolutions_of_a_network_are_found() -> None:
    config = get_preset("speed", batch_size=8)
    # 256 to 256 channels at 7 x 7 twice, once in each of two groups; 64 to 256 at 15 x 15 once.
    assert find_convolutions(config) == [(8, 256, 256, 7, 7), (8, 64, 256, 15, 15)]
    assert find_convolutions(get_preset("vit-classic")) == []


def test_a_peak_is_that_of_the_fastest_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of one's own: each call takes 2 s but in one burst, in which it takes 1 s."""
    now = [0.0]
    spent = iter([2.0, 2.0, 2.0, 1.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(spent)

    assert bench._time_best(call, CPU, seconds=5.0) == 1.0


def test_peaks_are_measured() -> None:
    peak = measure_peak(CPU, FP32, [(2, 8, 8, 8, 8)], seconds=0.01)
    assert peak.gemm > 1e8 and peak.convolution > 1e6
    assert measure_peak(CPU, FP32, seconds=0.01).convolution == 0


def test_shares_are_flops_times_rate_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([bench.Peak(1.0, 1.0), bench.Peak(4e9, 1e9), bench.Peak(5e9, 1e9)])
    monkeypatch.setattr(bench, "measure_peak", lambda *_, **__: next(peaks))
    seconds = iter([9.0, 2.0, 1.0, 9.0])  # uncounted, two rounds, profile

    def make_stretch(*_: object) -> Callable[[], float]:
        return lambda: next(seconds)

    monkeypatch.setattr(bench, "_make_stretch", make_stretch)
    result = measure_shares(["demo"], device="cpu", batch_size=8, steps=3, rounds=2)
    row = result["presets"]["demo"]
    per_image = count_step_flops(get_preset("demo")) / 128
    assert row["flops_per_image"] == per_image
    rates = (12.0, 24.0)  # 3 steps of 8 images in 2 s and in 1 s; the first round does not count
    assert row["share_spread"]["min"] == pytest.approx(per_image * rates[0] / 5e9)
    assert row["share_spread"]["max"] == pytest.approx(per_image * rates[1] / 5e9)
    assert row["peak"] == "gemm" and result["gemm_flops_per_second"] == 5e9


def test_shares_of_real_steps_are_between_0_and_1_and_come_with_a_profile() -> None:
    result = measure_shares(["demo"], device="cpu", batch_size=8, steps=1, rounds=1)
    row = result["presets"]["demo"]
    assert 0 < row["share"] <= 1
    percents = [item["percent"] for item in row["profile"]]
    assert percents == sorted(percents, reverse=True) and 0 < sum(percents) <= 100.001
    assert any("mm" in item["operator"] for item in row["profile"])


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="rounds must be at least 1, got 0"):
        measure_shares(["demo"], rounds=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        measure_shares(["demo"], batch_size=0)
    with pytest.raises(InputError, match="preset 'vitt' is unknown"):
        measure_shares(["vitt"])
    with pytest.raises(InputError, match="num_images must be above val_size"):
        estimate_training(get_preset("demo"), 1000, "cpu")


def test_a_profile_names_the_operator_that_takes_the_time() -> None:
    left = torch.rand(400, 400)
    rows = profile_operators(lambda: [left @ left for _ in range(5)], CPU)
    assert rows[0]["operator"] == "aten::mm" and rows[0]["percent"] > 50


def test_the_estimate_is_near_the_time_of_a_real_run(
    small: TrainConfig, squares: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neighbours on a busy machine lengthen the time on the clock, not that of the processor.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = dataclasses.replace(small, epochs=12)
    ratios = []
    for _ in range(4):  # one comparison may be spoilt, not all
        estimate = estimate_training(config, len(squares.train), "cpu", num_classes=3, seconds=0.5)
        run = fit(config, data=squares, device="cpu")
        ratios.append(60 * estimate.minutes / run.facts["train_seconds"])
        if 1 / 1.5 < ratios[-1] < 1.5:
            return
    pytest.fail(f"estimated over measured time: {ratios}")


def test_an_estimate_counts_validation_as_a_third(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_time_step", lambda config, batch_size, *_: batch_size / 100)
    config = dataclasses.replace(small, epochs=6, val_size=300)
    assert estimate_training(config, 1300, "cpu").minutes == pytest.approx(6 * 1100 / 100 / 60)


@pytest.mark.parametrize(
    ("minutes", "words"), [(0.4, "about a minute"), (20.4, "20 minutes"), (150, "2.5 hours")]
)
def test_an_estimate_reads_as_a_sentence(minutes: float, words: str) -> None:
    estimate = Estimate(minutes=minutes, flops_per_image=11.3e9, images_per_second=8)
    assert str(estimate) == (
        f"Expected training time on this device: {words} "
        "(11 GFLOP an image, 90 GFLOP/s in a measurement of two seconds)."
    )
