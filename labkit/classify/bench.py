"""How close training comes to what the machine can do, and how long a run will take.

One multiplication with its addition counts as two floating-point operations (FLOPs), as is usual.
Random pixels and freshly initialised weights stand in for data and pretrained weights: the
arithmetic is the same.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.classify.config import TrainConfig, get_preset
from labkit.classify.data import Split
from labkit.classify.fit import prepare
from labkit.classify.models import create_from_config
from labkit.classify.trainer import train_one_epoch
from labkit.runtime import (
    InputError,
    Precision,
    PrecisionName,
    World,
    describe_device,
    get_versions,
    pick_device,
    resolve_precision,
    use_seed,
)

logger = logging.getLogger(__name__)

TARGETS: Mapping[str, float] = {
    "resnet18": 0.6,
    "speed": 0.6,
    "vit-classic": 0.5,
    "vit": 0.5,
    "vit-finetune": 0.5,
}
"""The share of the peak that each preset aims at."""

NUM_CLASSES = 10
PROFILED = 12  # operators that a profile names
BURST_SECONDS = 0.05
_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}

Shape = tuple[int, int, int, int, int]
"""Of a 3x3 convolution with padding 1: batch, input and output channels, height, width."""


@dataclass(frozen=True)
class Peak:
    """The most FLOPs a second that this machine was seen to do.

    Attributes:
        gemm: in a product of two square matrices.
        convolution: in a 3x3 convolution in channels_last; 0 where none was measured.
    """

    gemm: float
    convolution: float


def count_step_flops(
    config: TrainConfig, num_classes: int = NUM_CLASSES, *, model: nn.Module | None = None
) -> int:
    """FLOPs of the forward and backward pass of one training step of `config.batch_size` images.

    Only matrix products, convolutions and attention are counted. Nothing is computed: the tensors
    have shapes and no content.

    Args:
        config: names the network, the batch size and the size of the images.
        num_classes: number of classes.
        model: a network of your own, instead of `config.model`; it is not changed.

    Example:
        >>> config = TrainConfig(image_size=8, batch_size=4)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        >>> count_step_flops(config, model=network) == 2 * (2 * 4 * 192 * 10)
        True
    """
    return sum(_count_by_operator(config, num_classes, model).values())


def _count_by_operator(
    config: TrainConfig, num_classes: int, model: nn.Module | None = None
) -> dict[str, int]:
    """FLOPs of a training step by the name of the operator."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention is several operators, not all of which are counted on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(_run_on_meta(config, num_classes, model).sum())
    return {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}


def _run_on_meta(config: TrainConfig, num_classes: int, model: nn.Module | None = None) -> Tensor:
    """Logits without content of a batch without content."""
    import copy

    if model is None:
        with use_seed(0):
            model = create_from_config(config, num_classes, pretrained=False)
    else:
        model = copy.deepcopy(model)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    logits: Tensor = model.to("meta").train()(torch.zeros(shape, device="meta"))
    return logits


def find_convolutions(config: TrainConfig, count: int = 2) -> list[Shape]:
    """The shapes of the 3x3 convolutions of stride 1 that do most of the FLOPs of a network.

    Args:
        config: names the network, the batch size and the size of the images.
        count: the largest number of shapes.
    """
    totals: dict[Shape, int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not isinstance(module, nn.Conv2d):
            return
        if (module.kernel_size, module.stride, module.groups) == ((3, 3), (1, 1), 1):
            batch, channels, height, width = inputs[0].shape
            shape = (batch, channels, module.out_channels, height, width)
            totals[shape] = totals.get(shape, 0) + _count_convolution(shape)

    with use_seed(0):
        model = create_from_config(config, NUM_CLASSES, pretrained=False).to("meta")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    model(torch.zeros(config.batch_size, 3, config.image_size, config.image_size, device="meta"))
    return sorted(totals, key=lambda shape: -totals[shape])[:count]


def _count_convolution(shape: Shape) -> int:
    batch, inputs, outputs, height, width = shape
    return 2 * 9 * batch * inputs * outputs * height * width


def measure_peak(
    device: torch.device,
    precision: Precision,
    convolutions: Sequence[Shape] = (),
    *,
    seconds: float = 0.3,
) -> Peak:
    """Measure what this machine can do at best, in the arithmetic of a run.

    Args:
        device: where.
        precision: numbers are of its type.
        convolutions: shapes of the 3x3 convolutions to try.
        seconds: how long each size and shape is tried.
    """
    dtype = precision.autocast_dtype or torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    gemm = convolution = 0.0
    with torch.no_grad():
        for size in _SIZES.get(device.type, _SIZES["cuda"]):
            left, right = draw(size, size), draw(size, size)
            spent = _time_best(lambda a=left, b=right: a @ b, device, seconds)  # type: ignore[misc]
            gemm = max(gemm, 2 * size**3 / spent)
        for shape in convolutions:
            batch, inputs, outputs, height, width = shape
            x = draw(batch, inputs, height, width).to(memory_format=torch.channels_last)
            w = draw(outputs, inputs, 3, 3).to(memory_format=torch.channels_last)
            spent = _time_best(
                lambda x=x, w=w: nn.functional.conv2d(x, w, padding=1),  # type: ignore[misc]
                device,
                seconds,
            )
            convolution = max(convolution, _count_convolution(shape) / spent)
    return Peak(gemm, convolution)


def _wait(device: torch.device) -> None:
    """Wait until `device` has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _time_best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one `call` in the fastest of several bursts of calls."""

    def time_burst(count: int) -> float:
        _wait(device)
        started = time.perf_counter()
        for _ in range(count):
            call()
        _wait(device)
        return (time.perf_counter() - started) / count

    time_burst(1)
    count = max(1, round(BURST_SECONDS / max(time_burst(1), 1e-6)))
    started, best = time.perf_counter(), float("inf")
    while best == float("inf") or time.perf_counter() - started < seconds:
        best = min(best, time_burst(count))
    return best


def _make_stretch(
    config: TrainConfig, device: torch.device, precision: Precision, steps: int
) -> Callable[[], float]:
    """A function that trains `steps` steps on random pixels, and returns the seconds they took."""
    count, size = steps * config.batch_size, config.image_size
    rng = np.random.default_rng(0)
    split = Split(
        rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        rng.integers(0, NUM_CLASSES, count),
        tuple(map(str, range(NUM_CLASSES))),
    )
    with use_seed(config.seed):
        trainer, state = prepare(config, split, device, precision, World())

    def train() -> float:
        with use_seed(config.seed):
            _wait(device)
            started = time.perf_counter()
            train_one_epoch(trainer, state)
            _wait(device)
        state.step = 0
        return time.perf_counter() - started

    return train


def _drop_pretrained(config: TrainConfig) -> TrainConfig:
    """`config` with random weights where it asks for pretrained ones."""
    options = dict(config.model_options)
    if config.model == "vit-finetune" or "pretrained" in options:
        options["pretrained"] = False
    return dataclasses.replace(config, model_options=options)


def profile_operators(train: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The operators that take most of the time of `train`, each with its percentage.

    Args:
        train: what to profile.
        device: the clock that counts: that of a GPU, or of the processor.

    Returns:
        Rows with `operator` and `percent`, most first; at most 12.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities, acc_events=True) as profiler:
        train()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = {event.key: getattr(event, key) for event in profiler.key_averages()}
    total = sum(spent.values()) or 1.0
    best = sorted(spent, key=lambda name: -spent[name])[:PROFILED]
    return [{"operator": name, "percent": 100 * spent[name] / total} for name in best]


def measure_shares(
    presets: Sequence[str] = tuple(TARGETS),
    *,
    device: str = "auto",
    precision: PrecisionName = "auto",
    batch_size: int | None = None,
    steps: int = 2,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measure what share of the machine's peak the training of each preset reaches.

    A round measures the peaks and then trains a stretch of each preset; one round before the first
    is not counted. The share is the preset's FLOPs, counted, times its median images per second,
    over the best peak of all rounds: that of matrix products, or, for a network whose FLOPs are
    mostly convolutions, the better of matrix products and of its own two largest convolutions.

    Args:
        presets: names of recipes.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        precision: arithmetic of the forward passes.
        batch_size: images per step; by default those of the preset. On a CPU 32 to 64 are enough.
        steps: steps in a stretch.
        rounds: how often each is measured.

    Returns:
        The content of `peak-share.json`.

    Raises:
        InputError: a preset is unknown, or a number is below 1.
    """
    for name, number in (("steps", steps), ("rounds", rounds), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    target = pick_device(device)
    arithmetic = resolve_precision(precision, target)
    configs = {name: _drop_pretrained(get_preset(name, precision=precision)) for name in presets}
    if batch_size is not None:
        configs = {n: dataclasses.replace(c, batch_size=batch_size) for n, c in configs.items()}
    shapes = {n: find_convolutions(c) for n, c in configs.items()}
    flops = {name: _count_by_operator(config, NUM_CLASSES) for name, config in configs.items()}
    stretches = {n: _make_stretch(c, target, arithmetic, steps) for n, c in configs.items()}
    peaks: dict[str, list[Peak]] = {name: [] for name in presets}
    rates: dict[str, list[float]] = {name: [] for name in presets}
    for number in range(rounds + 1):
        for name, train in stretches.items():
            peak = measure_peak(target, arithmetic, shapes[name], seconds=0.2)
            rate = steps * configs[name].batch_size / train()
            logger.info("round %d %s: %.1f images/s", number, name, rate)
            if number:
                peaks[name].append(peak)
                rates[name].append(rate)
    gemm = max(peak.gemm for seen in peaks.values() for peak in seen)
    rows = {
        name: _summarise(
            name,
            flops[name],
            configs[name].batch_size,
            rates[name],
            Peak(gemm, max(peak.convolution for peak in peaks[name])),
        )
        | {"profile": profile_operators(stretches[name], target)}
        for name in presets
    }
    return {
        "gemm_flops_per_second": gemm,
        "presets": rows,
        "steps_in_a_stretch": steps,
        "precision": arithmetic.name,
        "device": describe_device(target),
        "versions": get_versions(),
    }


def _summarise(
    name: str, flops: Mapping[str, int], batch_size: int, rates: Sequence[float], peak: Peak
) -> dict[str, Any]:
    """The row of a preset in `peak-share.json`."""
    total = sum(flops.values())
    convolved = sum(count for operator, count in flops.items() if "convolution" in operator)
    is_convolutional = convolved > total / 2
    best = max(peak.gemm, peak.convolution) if is_convolutional else peak.gemm
    per_image = total / batch_size
    shares = [per_image * rate / best for rate in rates]
    return {
        "share": statistics.median(shares),
        "share_spread": {
            "median": statistics.median(shares),
            "min": min(shares),
            "max": max(shares),
            "n": len(shares),
        },
        "target": TARGETS.get(name),
        "peak": "convolution" if best == peak.convolution else "gemm",
        "peak_flops_per_second": best,
        "convolution_flops_per_second": peak.convolution,
        "flops_per_image": per_image,
        "images_per_second": statistics.median(rates),
        "batch_size": batch_size,
    }


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long a run is expected to train.

    Attributes:
        minutes: expected minutes of training and validation; data and figures are not included.
        flops_per_image: FLOPs of the training step of one image.
        images_per_second: measured on this machine just now.
    """

    minutes: float
    flops_per_image: float
    images_per_second: float

    def __str__(self) -> str:
        """One sentence for the reader of a notebook."""
        time_needed = f"{self.minutes:.0f} minutes" if self.minutes >= 1.5 else "about a minute"
        if self.minutes >= 90:
            time_needed = f"{self.minutes / 60:.1f} hours"
        flops = self.flops_per_image
        return (
            f"Expected training time on this device: {time_needed} "
            f"({flops / 1e9:.2g} GFLOP an image, {flops * self.images_per_second / 1e9:,.0f} "
            f"GFLOP/s in a measurement of two seconds)."
        )


def estimate_training(
    config: TrainConfig,
    num_images: int,
    device: str = "auto",
    *,
    num_classes: int = NUM_CLASSES,
    seconds: float = 2.0,
) -> Estimate:
    """How long the training of `config` will take here, from real steps of about `seconds`.

    The batch is made smaller where a step of the whole batch would take longer than a quarter of
    `seconds`. An image in validation counts as a third of one in training: forward, not backward.

    Args:
        config: the recipe.
        num_images: training images, those of the validation split included.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        num_classes: number of classes.
        seconds: how long to measure, after a warm-up.

    Raises:
        InputError: there are fewer than 1 training images beside the validation split.

    Example:
        >>> config = get_preset("demo")
        >>> estimate_training(config, 2000, "cpu", seconds=0.1).minutes > 0
        True
    """
    train_images = num_images - config.val_size
    if train_images < 1:
        raise InputError(f"num_images must be above val_size ({config.val_size}), got {num_images}")
    target = pick_device(device)
    precision = resolve_precision(config.precision, target)
    config = dataclasses.replace(_drop_pretrained(config), compile=False)
    whole = min(config.batch_size, train_images)
    probed = min(whole, 4)
    fitting = int(seconds / 4 / _time_step(config, probed, target, precision, 0.0) * probed)
    batch_size = whole if target.type == "cuda" else max(probed, min(whole, fitting))
    rate = batch_size / _time_step(config, batch_size, target, precision, seconds)
    return Estimate(
        minutes=config.epochs * (train_images + config.val_size / 3) / rate / 60,
        flops_per_image=count_step_flops(config, num_classes) / config.batch_size,
        images_per_second=rate,
    )


def _time_step(
    config: TrainConfig,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    seconds: float,
) -> float:
    """Seconds of a training step of `batch_size` images: the mean over about `seconds`."""
    train = _make_stretch(
        dataclasses.replace(config, batch_size=batch_size), device, precision, steps=1
    )
    train()
    count, spent = 0, 0.0
    while count == 0 or spent < seconds:
        count, spent = count + 1, spent + train()
    return spent / count
