"""One epoch of training: the state that changes, the step that changes it, the callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from labkit.classify.augment import TrainLoader
from labkit.classify.config import TrainConfig
from labkit.classify.optim import lr_at, momentum_at, set_lr, set_momentum
from labkit.rng import permutation
from labkit.runtime import (
    InputError,
    Precision,
    TrainingError,
    World,
    as_one_line,
    is_interactive,
    is_out_of_memory,
)

logger = logging.getLogger(__name__)

SMALLEST_SCALE = 2.0**-10
LOOK_EVERY = 0.5  # seconds between two looks at the loss, which wait for the device


@dataclass
class TrainState:
    """All that changes while training, and therefore all that a checkpoint holds.

    Attributes:
        model: the network.
        optimizer: updates the parameters of `model`.
        scaler: scales the loss where the precision is fp16.
        ema: the averaged weights; None where there are none.
        sums: (3,) float: loss, correct predictions and images seen so far in `epoch`, by all
            processes together once a step has ended.
        epoch: number of finished epochs.
        step: number of steps taken in the epoch that goes on.
        seconds: time of training so far: steps with their images and augmentation, and callbacks;
            without starting up, compiling ahead, validation and writing checkpoints.
        history: one row an epoch, the newest last.
        best: the weights of the best validation accuracy so far, where there is a split for it.
        parts: number of parts in which a batch is passed through the network, since it does not
            fit into memory as a whole; this alone is not saved.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    ema: nn.Module | None
    sums: Tensor
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    parts: int = 1

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose accuracy counts: the averaged weights where they are kept."""
        if self.ema is None:
            return self.model
        module: nn.Module = self.ema.module  # type: ignore[assignment]
        return module

    def to_dict(self) -> dict[str, Any]:
        """Everything, as nested dicts of tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else {},
            "sums": self.sums,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Become what `to_dict` described."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.sums.copy_(saved["sums"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.seconds, self.history, self.best = saved["seconds"], saved["history"], saved["best"]


@dataclass(frozen=True)
class Trainer:
    """What stays the same while training.

    Attributes:
        config: the recipe.
        loader: gives the batches.
        forward: the network as it is called: compiled, or shared by several processes.
        device: where the network is.
        precision: arithmetic of the forward passes.
        world: the processes that train together.
        batch_sizes: number of images in each batch of an epoch, over all processes together.
    """

    config: TrainConfig
    loader: TrainLoader
    forward: nn.Module
    device: torch.device
    precision: Precision
    world: World
    batch_sizes: Sequence[int]

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps in one epoch."""
        return len(self.batch_sizes)

    def step(self, state: TrainState, images: Tensor, targets: Tensor) -> None:
        """Take one optimiser step; a GPU is told what to do, and waited for nowhere.

        (In fp16, timm's Muon waits for its loss scale.)

        Args:
            state: changes.
            images: (B, 3, H, W) float32, what this process has of the batch of all processes.
            targets: (B,) int64 labels, or (B, C) float probabilities.
        """
        config = self.config
        number = state.epoch * self.steps_per_epoch + state.step
        progress = number / (config.epochs * self.steps_per_epoch)
        set_lr(state.optimizer, lr_at(number, self.steps_per_epoch, config), progress)
        if config.cycle_momentum:
            set_momentum(state.optimizer, momentum_at(progress, config.warmup))
        results = self._compute_gradients(state, images, targets, number)
        if config.clip_norm:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model, step=number)  # type: ignore[operator]
        with torch.no_grad():
            for loss_sum, correct in results:
                state.sums[0] += loss_sum
                state.sums[1] += correct
            state.sums[2] += len(images)
        state.step += 1

    def _compute_gradients(
        self, state: TrainState, images: Tensor, targets: Tensor, number: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Leave the gradients of the batch of step `number` in the network.

        A batch that does not fit into memory is passed in twice as many parts from then on, whose
        gradients add up to those of the whole batch. (BatchNorm takes the statistics of each part.)

        Returns:
            The loss, summed over its images, and the number of correct predictions of each part.

        Raises:
            TrainingError: a single image does not fit, or several processes train together.
        """
        while True:
            # Dropout and its kin are a function of the step, so that no generator needs saving.
            torch.manual_seed(_make_step_seed(self.config.seed, number, self.world.rank))
            split = [images], [targets]
            if state.parts > 1:
                split = list(images.chunk(state.parts)), list(targets.chunk(state.parts))
            try:
                return [self._pass(state, *part) for part in zip(*split, strict=True)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.world.size > 1 or state.parts >= len(images):
                    raise TrainingError(
                        f"out of memory on {self.device} with batches of "
                        f"{self.batch_sizes[state.step]} images in {state.parts} parts; lower "
                        "batch_size, or choose a smaller network or another device"
                    ) from error
            # Outside the handler, since its traceback would keep the memory alive.
            state.optimizer.zero_grad(set_to_none=True)
            state.parts = min(2 * state.parts, len(images))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning(
                "out of memory on %s: batches of %d images go through the network in %d parts "
                "from here on; a step is still one of the whole batch",
                self.device,
                self.batch_sizes[state.step],
                state.parts,
            )

    def _pass(self, state: TrainState, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Add the gradients of these images; return their summed loss and the number correct."""
        with self.precision.autocast(self.device):
            logits = self.forward(images)
            loss_sum = F.cross_entropy(
                logits.float(),
                targets,
                reduction="sum",
                label_smoothing=self.config.label_smoothing,
            )
        # Processes average their gradients: together this is the mean over the whole batch.
        loss = loss_sum * (self.world.size / self.batch_sizes[state.step])
        torch.autograd.backward(state.scaler.scale(loss))
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        return loss_sum.detach(), (logits.detach().argmax(1) == labels).sum()


def cut_batches(count: int, batch_size: int, smallest: int) -> list[int]:
    """Cut `count` images into batches of `batch_size`; the last one has what is left.

    If fewer than `smallest` are left, the batch before takes them too: BatchNorm needs two images,
    in each process that trains.

    Returns:
        The number of images in each batch.

    Example:
        >>> cut_batches(100, 32, 2), cut_batches(97, 32, 2), cut_batches(5, 32, 2)
        ([32, 32, 32, 4], [32, 32, 33], [5])
    """
    whole, left = divmod(count, batch_size)
    sizes = [batch_size] * whole
    if sizes and left < smallest:
        sizes[-1] += left
    elif left:
        sizes.append(left)
    return sizes


def share_batch(indices: Tensor, world: World) -> Tensor:
    """Pick what this process has of a batch (B,): every so many pairs of neighbours.

    Neighbours, which mixup and CutMix mix, stay together, so that the number of processes does
    not change who is mixed with whom.

    Example:
        >>> [share_batch(torch.arange(7), World(rank, size=2)).tolist() for rank in (0, 1)]
        [[0, 1, 4, 5], [2, 3, 6]]
    """
    pairs = torch.arange(len(indices)) // 2
    return indices[(pairs - world.rank) % world.size == 0]


def _make_step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63


class Callback:
    """What is called while `labkit.fit` trains; override the methods that you need.

    Under `torchrun` the callbacks given to `fit` are called in the main process only.

    Example:
        >>> class PrintLoss(Callback):
        ...     def on_epoch_end(self, state: TrainState) -> None:
        ...         print(state.history[-1]["train_loss"])
    """

    def on_train_begin(self, state: TrainState) -> None:
        """Called once before the first step; `state.epoch` is above 0 if the run is resumed."""

    def on_step_end(self, state: TrainState) -> None:
        """Called after every optimiser step, of which there may be thousands: be quick."""

    def on_epoch_end(self, state: TrainState) -> None:
        """Called after every epoch; `state.history[-1]` is its row, `state.model` the network."""

    def on_train_end(self, state: TrainState) -> None:
        """Called once after the last step, also where an error or an interrupt ends training."""


class TensorBoard(Callback):
    """Writes loss, accuracy, learning rate and speed of every epoch for TensorBoard.

    Args:
        folder: where to write; by default a new folder in `runs`, as TensorBoard names it.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "TensorBoard needs a package of this name: pip install tensorboard"
            ) from error
        self._create_writer: Any = SummaryWriter
        self._folder = folder

    def on_train_begin(self, state: TrainState) -> None:
        """Open the file."""
        self._writer = self._create_writer(None if self._folder is None else str(self._folder))

    def on_epoch_end(self, state: TrainState) -> None:
        """Write the numbers of the epoch."""
        for name, value in state.history[-1].items():
            if name != "epoch":
                self._writer.add_scalar(name, value, state.epoch)
        self._writer.flush()

    def on_train_end(self, state: TrainState) -> None:
        """Close the file."""
        self._writer.close()


class ProgressBar(Callback):
    """Shows how far training is, and stops it where the loss is no number any more."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, state: TrainState) -> None:
        """Show the bar."""
        from tqdm.auto import tqdm

        self._bar: Any = tqdm(
            total=len(self._trainer.loader) * self._trainer.config.epochs,
            initial=self._count_images(state),
            unit="img",
            unit_scale=True,
            desc=self._trainer.config.preset,
            disable=not (self._trainer.world.is_main_process and is_interactive()),
        )
        self._looked = time.monotonic()

    def _count_images(self, state: TrainState) -> int:
        return len(self._trainer.loader) * state.epoch + sum(
            self._trainer.batch_sizes[: state.step]
        )

    def on_step_end(self, state: TrainState) -> None:
        """Move the bar, and look at the loss twice a second."""
        self._bar.update(self._count_images(state) - self._bar.n)
        now = time.monotonic()
        if now - self._looked >= LOOK_EVERY:
            self._looked = now
            loss, correct, seen = state.sums.tolist()
            check_health(loss, state.scaler, state.epoch)
            self._bar.set_postfix(
                epoch=f"{state.epoch + 1}",
                loss=f"{loss / seen:.3f}",
                acc=f"{100 * correct / seen:.1f}%",
                refresh=False,
            )

    def on_train_end(self, state: TrainState) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def train_one_epoch(
    trainer: Trainer, state: TrainState, callbacks: Sequence[Callback] = ()
) -> None:
    """Train from `state.step` to the end of `state.epoch`, in the order that (seed, epoch) gives.

    Args:
        trainer: what to train on, and how.
        state: changes with every step.
        callbacks: their `on_step_end` is called after every step; its time counts as training.
    """
    trainer.forward.train()
    clock = time.perf_counter()
    order = permutation(trainer.config.seed, state.epoch, len(trainer.loader))
    batches = torch.split(order, list(trainer.batch_sizes))
    shares = [share_batch(batch, trainer.world) for batch in batches[state.step :]]
    for batch in trainer.loader.batches(state.epoch, shares):
        trainer.step(state, *batch)
        del batch  # its memory is free for the next one
        clock, before = time.perf_counter(), clock
        state.seconds += clock - before
        for callback in callbacks:
            callback.on_step_end(state)
    state.sums.cpu()  # waits for the device
    state.seconds += time.perf_counter() - clock


def check_health(loss: float, scaler: GradScaler, epoch: int) -> None:
    """Stop a run whose loss is no number, or whose loss scale has collapsed.

    Raises:
        TrainingError: either is so; checkpoints written so far are from before it.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss became {loss} in epoch {epoch + 1}. Lower the learning rate, or set "
            "clip_norm=1.0; checkpoints written so far are from before it."
        )
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        raise TrainingError(
            f"the fp16 loss scale collapsed to {scaler.get_scale():.2g} in epoch {epoch + 1}: "
            "gradients overflow at every scale. Use precision='fp32' or 'bf16', or a lower "
            "learning rate."
        )


def check_finite(state: TrainState) -> None:
    """Stop a run whose state holds something that is no number, before it is saved.

    A loss can be finite while its gradient is not; the step has then spoiled weights or optimiser.

    Raises:
        TrainingError: weights, averaged weights or the state of the optimiser are not finite.
    """
    parts = {
        "weights": state.model.state_dict().values(),
        "averaged weights": state.ema.state_dict().values() if state.ema is not None else (),
        "state of the optimiser": (
            value for values in state.optimizer.state.values() for value in values.values()
        ),
    }
    for name, values in parts.items():
        tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            raise TrainingError(
                f"the {name} became non-finite in epoch {state.epoch + 1}. Lower the learning "
                "rate, or set clip_norm=1.0; checkpoints written so far are from before it."
            )


class CompiledModel(nn.Module):
    """A network that is compiled for batches of one shape, and runs as it is for those of another.

    So it is compiled once, whatever the size of the last batch. If what was compiled fails, it
    goes on as it is, from the batch that failed on, with one warning.

    Args:
        model: the network; its parameters and buffers are shared.
        compiled: the same, compiled.
        shape: (B, 3, H, W) of the batches that it is compiled for.
    """

    def __init__(self, model: nn.Module, compiled: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self._shape = tuple(shape)
        # The method, since a module would be registered and show all parameters a second time.
        self._run_compiled: Callable[[Tensor], Tensor] | None = compiled.__call__

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        if self._run_compiled is not None and tuple(images.shape) == self._shape:
            restore = _remember(self.model, images.device)
            try:
                return self._run_compiled(images)
            except Exception as error:
                self._run_compiled = None
                restore()
                _warn_uncompiled(error)
        logits: Tensor = self.model(images)
        return logits


def try_compile(
    model: nn.Module, shape: Sequence[int], device: torch.device, precision: Precision
) -> nn.Module:
    """Compile `model` as it will be trained, or leave it, with a warning, where that fails.

    What is compiled, and tried out forwards and backwards, is the graph of training: train mode,
    channels_last, the precision of the run. Weights, buffers and random generators are left as
    found.

    Args:
        model: the network, on `device`.
        shape: (B, 3, H, W) of the batches of this process.
        device: where the network is.
        precision: arithmetic of the forward passes.

    Returns:
        A `CompiledModel`, or `model` itself.
    """
    model.train()
    restore = _remember(model, device)
    try:
        compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        images = torch.zeros(*shape, device=device).to(memory_format=torch.channels_last)
        with precision.autocast(device):
            logits = compiled(images)
        logits.float().sum().backward()
    except Exception as error:
        _warn_uncompiled(error)
        return model
    finally:
        model.zero_grad(set_to_none=True)
        restore()
    return CompiledModel(model, compiled, shape)


def _warn_uncompiled(error: Exception) -> None:
    logger.warning(
        "torch.compile failed here (%s): training goes on without it", as_one_line(error)
    )
    torch.compiler.reset()


def _remember(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """What puts the buffers of `model` and the random generators back as they are now."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cpu_state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, device)

    return restore
