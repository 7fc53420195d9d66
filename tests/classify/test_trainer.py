from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.classify.augment import TrainLoader
from labkit.classify.config import AugmentConfig, TrainConfig, get_preset
from labkit.classify.data import Split
from labkit.classify.fit import fit, prepare, synchronise_norms
from labkit.classify.run import Run
from labkit.classify.trainer import (
    Callback,
    CompiledModel,
    ProgressBar,
    Trainer,
    TrainState,
    cut_batches,
    share_batch,
    try_compile,
)
from labkit.rng import permutation
from labkit.runtime import InputError, Precision, World, use_seed

FP32 = Precision(autocast_dtype=None, scale_loss=False)
META = torch.device("meta")  # tensors without content: a GPU that can only be waited for in error
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "unique")


class OperationCounter(TorchDispatchMode):
    """Counts tensor operations, and names those that would make a GPU wait for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.crossings: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        crosses = len({tensor.device for tensor in tensors}) > 1
        indexes_by_mask = "index" in str(func) and any(
            tensor.dtype == torch.bool for tensor in tensors[1:]
        )
        if crosses or indexes_by_mask or any(name in str(func) for name in WAITING):
            self.crossings[str(func)] += 1
        return result


class ConstantFinder(TorchFunctionMode):
    """Names the tensors that are made of Python's numbers, of which meta tensors take no copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def make_split(count: int, image_size: int = 32, num_classes: int = 10) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, image_size, image_size, 3), dtype=np.uint8)
    classes = tuple(map(str, range(num_classes)))
    return Split(images, rng.integers(0, num_classes, count), classes)


def prepare_on_meta(config: TrainConfig) -> tuple[Trainer, TrainState]:
    """A training without content; torch's fused optimisers, one operation each, need a device."""
    return prepare(
        config,
        make_split(3 * config.batch_size),
        META,
        FP32,
        World(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )


def draw_batches(trainer: Trainer, state: TrainState) -> Iterator[tuple[Tensor, Tensor]]:
    order = permutation(0, state.epoch, len(trainer.loader))
    return trainer.loader.batches(state.epoch, torch.split(order, trainer.batch_sizes))


# ---------------------------------------------------------------- a step on a GPU


@pytest.mark.parametrize("preset", ["seed-resnet18", "vit-classic", "vit", "speed", "demo"])
def test_a_step_makes_a_gpu_wait_nowhere(preset: str) -> None:
    config = get_preset(preset, batch_size=64, val_size=0)
    trainer, state = prepare_on_meta(config)
    batches = draw_batches(trainer, state)
    next(batches)  # with it all that is random goes to the device
    with ConstantFinder() as constants, OperationCounter() as counter:
        images, targets = next(batches)
        augmentation = counter.count
        trainer.step(state, images, targets)
    assert not counter.crossings and not constants.found
    assert augmentation < 200


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor([0.5, 1.0], device=META) * x,
        lambda x: x + torch.ones(2),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x[torch.ones(2, dtype=torch.bool, device=META)],
        lambda x: x.sum().item(),
    ],
    ids=["constant", "host operand", "copy", "mask", "item"],
)
def test_the_counter_sees_what_makes_a_gpu_wait(wait: Any) -> None:
    x, counter, constants = torch.zeros(2, device=META), OperationCounter(), ConstantFinder()
    try:
        with constants, counter:
            wait(x)
    except (RuntimeError, NotImplementedError):
        return  # a tensor without content cannot be waited for
    assert counter.crossings or constants.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("preset", ["seed-resnet18", "vit-classic", "vit", "speed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_torch_finds_no_waiting_in_a_step_on_a_gpu(preset: str, dtype: torch.dtype | None) -> None:
    config = get_preset(preset, batch_size=64)
    precision = Precision(autocast_dtype=dtype, scale_loss=dtype == torch.float16)
    device = torch.device("cuda", 0)
    trainer, state = prepare(config, make_split(256), device, precision, World())
    batches = draw_batches(trainer, state)
    trainer.step(state, *next(batches))  # the first one makes the state of the optimiser
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(state, *next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- batches and processes


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [8, 63, 64, 65, 66, 67, 71, 95, 129])
def test_every_process_has_two_images_of_every_batch(count: int, size: int) -> None:
    sizes = cut_batches(count, 32, 2 * size)
    assert sum(sizes) == count and sizes[:-1] == [32] * (len(sizes) - 1)
    left = count % 32
    assert sizes[-1] in ({left} if left >= 2 * size else {32, 32 + left})
    for number in sizes:
        shares = [share_batch(torch.arange(number), World(rank, size)) for rank in range(size)]
        assert min(map(len, shares)) >= 2
        assert torch.cat(shares).sort().values.tolist() == list(range(number))


@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_processes_does_not_change_what_is_mixed(size: int) -> None:
    augment = AugmentConfig(pad=2, auto_augment="trivial", erase=0.5, mixup=0.3, cutmix=1.0)
    loader = TrainLoader(make_split(50, 12), TrainConfig(augment=augment), torch.device("cpu"))
    indices = permutation(0, 0, 50)[:33]
    whole, targets = loader.batch(1, indices)
    for rank in range(size):
        world = World(rank, size)
        images, own_targets = loader.batch(1, share_batch(indices, world))
        rows = share_batch(torch.arange(33), world)
        assert torch.equal(images, whole[rows]) and torch.equal(own_targets, targets[rows])


def make_network() -> nn.Module:
    """A network that cannot be trained on a single image."""
    with use_seed(1):
        return nn.Sequential(
            nn.Conv2d(3, 4, 4, stride=4),
            nn.Flatten(),
            nn.BatchNorm1d(36),
            nn.Dropout(0.1),
            nn.Linear(36, 3),
        )


CONFIG = TrainConfig(epochs=2, batch_size=16, schedule="one-cycle", warmup=0.5)


def fit_network(count: int, **options: Any) -> Run:
    split = make_split(count, 12, 3)
    config = dataclasses.replace(CONFIG, **options.pop("changes", {}))
    return fit(config, model=make_network(), train=split, test=split, device="cpu", **options)


class CountedImages(Callback):
    """What a progress bar shows after every step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.steps: list[int] = []

    def on_step_end(self, state: TrainState) -> None:
        self.steps.append(state.step)
        self.counts.append(int(state.sums[2]))


@pytest.mark.parametrize(
    ("count", "seen"), [(33, [16, 33]), (34, [16, 32, 34]), (5, [5]), (17, [17])]
)
def test_a_last_batch_of_one_image_is_trained_with_the_one_before(
    count: int, seen: list[int]
) -> None:
    images = CountedImages()
    run = fit_network(count, callbacks=[images])
    assert images.counts == 2 * seen and images.steps == 2 * list(range(1, len(seen) + 1))
    assert run.facts["training_images"] == count
    assert all(np.isfinite(row["train_loss"]) for row in run.history)


def test_the_progress_bar_counts_the_images_of_a_larger_last_batch() -> None:
    split = make_split(33, 12, 3)
    trainer, state = prepare(
        CONFIG, split, torch.device("cpu"), FP32, World(), model=make_network()
    )
    bar, shown = ProgressBar(trainer), []
    for state.epoch in range(2):
        for state.step in range(trainer.steps_per_epoch + 1):
            shown.append(bar._count_images(state))
    assert shown == [0, 16, 33, 33, 49, 66]


def test_too_few_images_for_the_processes_are_refused() -> None:
    world, cpu = World(0, 4), torch.device("cpu")
    with pytest.raises(InputError, match=r"batch_size.*4 processes.*8 in all, got 6"):
        prepare(dataclasses.replace(CONFIG, batch_size=6), make_split(20), cpu, FP32, world)
    with pytest.raises(InputError, match=r"training images.*got 7"):
        prepare(CONFIG, make_split(7), cpu, FP32, world)


# ---------------------------------------------------------------- norms of several processes


def test_synchronised_norms_need_gpus() -> None:
    config = dataclasses.replace(CONFIG, sync_batch_norm=True)
    with pytest.raises(InputError, match="sync_batch_norm=False"):
        prepare(config, make_split(20), torch.device("cpu"), FP32, World(0, 2))


def test_synchronised_norms_keep_weights_and_names() -> None:
    model = make_network()
    parameters, names = set(model.parameters()), list(model.state_dict())
    images = torch.rand(4, 3, 12, 12)
    before = model.eval()(images)
    synchronise_norms(model)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules())
    assert set(model.parameters()) == parameters and list(model.state_dict()) == names
    assert torch.equal(model.eval()(images), before)


# ---------------------------------------------------------------- compilation


class CountingCompiler:
    """A compiler that runs each graph as it is, and fails from call `fails_at` on."""

    def __init__(self, fails_at: float = float("inf")) -> None:
        self.inputs: list[list[Tensor]] = []
        self.calls = 0
        self.fails_at = fails_at

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.inputs.append(inputs)

        def run(*arguments: Any) -> Any:
            self.calls += 1
            results = graph.forward(*arguments)
            if self.calls >= self.fails_at:
                raise RuntimeError("no such kernel")
            return results

        return run


def use_compiler(patch: pytest.MonkeyPatch, compiler: CountingCompiler) -> None:
    torch.compiler.reset()
    patch.setattr(torch, "compile", partial(torch.compile, backend=compiler))


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    first, second = left.state_dict(), right.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_compiling_happens_once_for_the_graph_of_training_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, compiler = fit_network(40), CountingCompiler()  # the last batch has 8 images
    use_compiler(monkeypatch, compiler)
    compiled = fit_network(40, changes={"compile": True})
    assert len(compiler.inputs) == 1 and compiler.calls == 1 + 2 * 2
    (images,) = [x for x in compiler.inputs[0] if x.ndim == 4 and x.shape[1:] == (3, 12, 12)]
    assert images.shape[0] == 16 and images.is_contiguous(memory_format=torch.channels_last)
    assert_same_state(compiled.model, plain.model)


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_wherever_compiled_code_fails_training_goes_on_as_without_it(
    fails_at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, compiler = fit_network(40), CountingCompiler(fails_at)
    use_compiler(monkeypatch, compiler)
    with caplog.at_level(logging.WARNING):
        compiled = fit_network(40, changes={"compile": True})
    assert compiler.calls == fails_at
    assert caplog.text.count("torch.compile failed here (no such kernel)") == 1
    assert_same_state(compiled.model, plain.model)


def test_the_trial_of_a_compiler_leaves_everything_as_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_compiler(monkeypatch, CountingCompiler())
    model, generator = make_network(), torch.get_rng_state()
    compiled = try_compile(model, (16, 3, 12, 12), torch.device("cpu"), FP32)
    assert isinstance(compiled, CompiledModel)
    assert_same_state(model, make_network())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(compiled.parameters()) == set(model.parameters())
    assert len(list(compiled.parameters())) == len(list(model.parameters()))
