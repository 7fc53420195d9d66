"""One epoch of training: the state that changes, the step that changes it, the callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from labkit.classify.augment import TrainLoader
from labkit.classify.config import TrainConfig
from labkit.classify.optim import lr_at, set_lr
from labkit.rng import permutation
from labkit.runtime import InputError, Precision, TrainingError, World, is_interactive

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
    """

    config: TrainConfig
    loader: TrainLoader
    forward: nn.Module
    device: torch.device
    precision: Precision
    world: World

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps in one epoch."""
        return math.ceil(len(self.loader) / self.config.batch_size)

    def step(self, state: TrainState, indices: Tensor) -> None:
        """Take one optimiser step on the images `indices` (B,) of the batch of all processes."""
        config = self.config
        number = state.epoch * self.steps_per_epoch + state.step
        set_lr(state.optimizer, lr_at(number, self.steps_per_epoch, config))
        # Dropout and its kin become a function of the step, so that no generator needs saving.
        torch.manual_seed(_make_step_seed(config.seed, number, self.world.rank))
        own_indices = indices[self.world.rank :: self.world.size].to(self.device)
        images, targets = self.loader.batch(state.epoch, own_indices)
        with self.precision.autocast(self.device):
            logits = self.forward(images)
            loss_sum = F.cross_entropy(
                logits.float(), targets, reduction="sum", label_smoothing=config.label_smoothing
            )
        # Processes average their gradients: together this is the mean over the whole batch.
        loss = loss_sum * (self.world.size / len(indices))
        torch.autograd.backward(state.scaler.scale(loss))
        if config.clip_norm:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model, step=number)  # type: ignore[operator]
        with torch.no_grad():
            labels = targets.argmax(1) if targets.is_floating_point() else targets
            state.sums[0] += loss_sum.detach()
            state.sums[1] += (logits.argmax(1) == labels).sum()
            state.sums[2] += len(own_indices)
        state.step += 1


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
        images, batch_size = len(self._trainer.loader), self._trainer.config.batch_size
        return images * state.epoch + min(state.step * batch_size, images)

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
    order = permutation(trainer.config.seed, state.epoch, len(trainer.loader))
    batches = torch.split(order, trainer.config.batch_size)
    trainer.forward.train()
    clock = time.perf_counter()
    for indices in batches[state.step :]:
        trainer.step(state, indices)
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
            "clip_norm=1.0; the last checkpoint is from before it."
        )
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        raise TrainingError(
            f"the fp16 loss scale collapsed to {scaler.get_scale():.2g} in epoch {epoch + 1}: "
            "gradients overflow at every scale. Use precision='fp32' or 'bf16', or a lower "
            "learning rate."
        )


def try_compile(
    model: nn.Module, image_size: int, device: torch.device, precision: Precision
) -> nn.Module:
    """`model` compiled, or as it is, with a warning, where this machine cannot compile it."""
    try:
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        model.eval()
        with precision.autocast(device):
            compiled(
                torch.zeros(2, 3, image_size, image_size, device=device)
            ).float().sum().backward()
    except Exception as error:
        logger.warning("torch.compile failed here (%s): training goes on without it", error)
        torch.compiler.reset()
        return model
    finally:
        model.zero_grad(set_to_none=True)
        model.train()
    return compiled
