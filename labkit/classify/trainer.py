"""One epoch of training: the state that moves, the step that moves it, and its health."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from labkit.classify.augment import TrainingImages
from labkit.classify.checkpoint import restore_optimizer
from labkit.classify.config import TrainConfig
from labkit.classify.optim import lr_at, set_lr
from labkit.rng import permutation
from labkit.runtime import Precision, TrainingError, World

logger = logging.getLogger(__name__)

SMALLEST_SCALE = 2.0**-10


@dataclass
class TrainState:
    """All that changes while training, and therefore all that a checkpoint holds.

    `sums` (3,) float: loss, correct predictions and pictures seen so far in `epoch`.
    `best` holds the weights of the best validation accuracy so far, where there is a split for it.
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
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the averaged weights where they are kept."""
        if self.ema is None:
            return self.model
        module: nn.Module = self.ema.module  # type: ignore[assignment]
        return module

    def to_dict(self) -> dict[str, Any]:
        """Everything, as nested dicts of tensors and JSON values."""
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
        restore_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.sums.copy_(saved["sums"])
        self.epoch, self.step = saved["epoch"], saved["step"]
        self.seconds, self.history, self.best = saved["seconds"], saved["history"], saved["best"]


@dataclass(frozen=True)
class Trainer:
    """What stays the same while training: the configuration, the pictures and the place."""

    config: TrainConfig
    images: TrainingImages
    forward: nn.Module
    device: torch.device
    precision: Precision
    world: World

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the training pictures."""
        return math.ceil(len(self.images) / self.config.batch_size)

    def step(self, state: TrainState, indices: Tensor) -> None:
        """One optimiser step on the pictures `indices` (B,) of the global batch."""
        config = self.config
        number = state.epoch * self.steps_per_epoch + state.step
        set_lr(state.optimizer, lr_at(number, self.steps_per_epoch, config))
        # Dropout and its kin become a function of the step, so that no generator needs saving.
        torch.manual_seed(_step_seed(config.seed, number, self.world.rank))
        mine = indices[self.world.rank :: self.world.size].to(self.device)
        images, targets = self.images.batch(state.epoch, mine)
        with self.precision.autocast(self.device):
            logits = self.forward(images)
            loss_sum = F.cross_entropy(
                logits.float(), targets, reduction="sum", label_smoothing=config.label_smoothing
            )
        # Processes average their gradients: together this is the mean over the global batch.
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
            state.sums[2] += len(mine)
        state.step += 1


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63


def train_one_epoch(
    trainer: Trainer,
    state: TrainState,
    after_step: Callable[[int], None] = lambda seen: None,
) -> None:
    """Train from `state.step` to the end of `state.epoch`, in the order that (seed, epoch) gives.

    Args:
        trainer: what to train on, and how.
        state: moves on with every step.
        after_step: called with the size of each batch once its step is done.
    """
    order = permutation(trainer.config.seed, state.epoch, len(trainer.images))
    batches = torch.split(order, trainer.config.batch_size)
    trainer.forward.train()
    clock = time.perf_counter()
    for indices in batches[state.step :]:
        trainer.step(state, indices)
        clock, before = time.perf_counter(), clock
        state.seconds += clock - before
        after_step(len(indices))
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
    model: nn.Module, size: int, device: torch.device, precision: Precision
) -> nn.Module:
    """`model` compiled, or as it is, with a warning, where this machine cannot compile it."""
    try:
        compiled: nn.Module = torch.compile(model)  # type: ignore[assignment]
        model.eval()
        with precision.autocast(device):
            compiled(torch.zeros(2, 3, size, size, device=device)).float().sum().backward()
    except Exception as error:
        logger.warning("torch.compile failed here (%s): training goes on without it", error)
        torch.compiler.reset()
        return model
    finally:
        model.zero_grad(set_to_none=True)
        model.train()
    return compiled
