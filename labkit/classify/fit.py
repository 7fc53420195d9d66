"""The orchestrator: `fit` runs, resumes and finishes what a `TrainConfig` describes."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from labkit.classify.augment import TrainLoader, Transform, normalise
from labkit.classify.checkpoint import METRICS, RunFolder
from labkit.classify.config import PRESETS, AugmentConfig, TrainConfig
from labkit.classify.data import ImageData, ImagesAndLabels, Split, load_data, train_val_split
from labkit.classify.evaluate import evaluate, predict_logits
from labkit.classify.metrics import compute_nll
from labkit.classify.models import create_from_config
from labkit.classify.optim import Lookahead, create_optimizer, get_lr
from labkit.classify.run import Run, collect_facts
from labkit.classify.speednet import SpeedNet
from labkit.classify.trainer import (
    Callback,
    ProgressBar,
    Trainer,
    TrainState,
    check_finite,
    check_health,
    cut_batches,
    share_batch,
    train_one_epoch,
    try_compile,
)
from labkit.classify.vit import use_eval_mode
from labkit.runtime import (
    InputError,
    Interrupt,
    Precision,
    World,
    as_one_line,
    defer_interrupt,
    pick_device,
    resolve_precision,
    use_backends,
    use_seed,
)

logger = logging.getLogger(__name__)

SHORT_RUN = 0.25  # share of the epochs of a preset below which its mixing costs accuracy

OptimizerSource = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]


def fit(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    train: ImagesAndLabels | None = None,
    test: ImagesAndLabels | None = None,
    transform: Transform | None = None,
    optimizer: OptimizerSource | None = None,
    callbacks: Sequence[Callback] = (),
    data: ImageData | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    device: str = "auto",
    save_every: float = 60.0,
    mirror: Path | str | None = None,
) -> Run:
    """Train what `config` describes, evaluate it once on the test split, and keep the results.

    Under `torchrun` the processes share each batch; the main process writes.

    Args:
        config: the recipe. What of it your own things replace is recorded as `custom`.
        model: a network of your own, instead of `config.model`. It maps normalised images
            (B, 3, H, W) to logits (B, C) and is trained in place.
        train: training images of your own, instead of `config.data`: a `Split`, a pair
            (images, labels) of arrays or tensors, or a data set as torchvision has them (see
            `labkit.classify.data.as_split`). `config.image_size` follows them.
        test: test images of your own, needed with `train`. They are read once, at the end.
        transform: instead of `config.augment`. It is called for each training image with a PIL
            image, as in torchvision's data sets, and gives a tensor (3, H, W), uint8 or floats in
            [0, 1], or a PIL image. It does not normalise: labkit does, with `config.mean` and
            `config.std`. Its random numbers depend on (seed, epoch, index) alone.
        optimizer: an optimiser over the parameters of `model`, or a function that makes one of
            the trainable parameters. The learning rate of each of its groups is the peak that the
            schedule scales; learning rate, decay and momentum of `config` are not used.
        callbacks: called while training goes on, in the main process only.
        data: images already loaded, instead of `train` and `test`.
        out: folder for `config.json`, `history.jsonl`, `metrics.json`, `report.html`,
            `model.safetensors` and `checkpoints/`; None keeps nothing on disk.
        resume: go on from the newest checkpoint in `out`, if there is one. A finished run with
            fewer epochs than `config` goes on too: from where it stands it follows the schedule
            of a run of `config.epochs` epochs, and the log says where on it that is.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        save_every: seconds between checkpoints; one is also written at an interrupt and at the end.
        mirror: a second folder, on a drive that outlives this machine, that follows `out` and
            from which `out` is brought back where it is missing.

    Returns:
        The finished run. Where `out` holds one already and `resume` is set, that one.

    Raises:
        InputError: a setting or one of your own things cannot be used, `out` holds another run or
            one that another process trains, or fp16 without a GPU.
        SourceError: the data or pretrained weights could not be had, or the disk is full.
        TrainingError: the loss or the weights became non-finite, or the loss scale collapsed.
        KeyboardInterrupt: interrupted; the checkpoint is written first.

    Example:
        >>> images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        >>> labels = np.arange(8) % 2
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        >>> config = TrainConfig(epochs=2, batch_size=4)
        >>> run = fit(config, model=network, train=(images, labels), test=(images, labels))
        >>> len(run.history), run.predict(images).shape
        (2, (8,))
    """
    world = World.from_environment()
    target = pick_device(device)
    if world.size > 1 and target.type == "cuda":
        target = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(target)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    precision = resolve_precision(config.precision, target)
    data = _choose_data(config, train, test, data)
    if world.is_main_process:
        _advise_on_mixing(config)
    config = _record_own_things(config, data, model, transform, optimizer)
    _check_size(config, data)
    folder = RunFolder(
        out, config, data.fingerprint, mirror=mirror, is_main_process=world.is_main_process
    )
    with folder.lock():
        backends = use_backends(target, deterministic=config.deterministic)
        with world.join(target), use_seed(config.seed), backends:
            folder.restore_from_mirror()
            world.wait()
            saved = folder.load_state(resume=resume)
            split, validation = data.train, None
            if config.val_size:
                split, validation = train_val_split(data.train, config.val_size)
            trainer, state = prepare(
                config,
                split,
                target,
                precision,
                world,
                model=model,
                transform=transform,
                optimizer=optimizer,
                pretrained=saved is None,
            )
            if saved is not None:
                _restore(state, saved, folder)
            # While a finished run is given more epochs, its folder describes what is finished.
            if folder.folder is None or not (folder.folder / METRICS).exists():
                folder.save_config()
            try:
                _train(trainer, state, folder, validation, callbacks, save_every)
            finally:
                folder.finish_mirror()
            _use_best(state)
            metrics = evaluate(
                state.model,
                data.test,
                mean=config.mean,
                std=config.std,
                precision=precision,
                device=str(target),
                tta=config.tta,
            )
        facts = collect_facts(config, data, state, target, precision)
        run = Run(
            config=config,
            model=state.model,
            data=data,
            history=state.history,
            metrics=metrics,
            facts=facts,
            folder=folder.folder,
        )
        if world.is_main_process:
            folder.save_config()
            run.save()
            folder.finish_mirror()
    return run


def _restore(state: TrainState, saved: dict[str, Any], folder: RunFolder) -> None:
    """Let `state` become what was saved, or say that it is of another network or optimiser."""
    try:
        state.restore(saved)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the checkpoints in {folder.folder} do not fit this network and optimiser "
            f"({as_one_line(error)}); use those that they were written of, or another folder"
        ) from error


def _advise_on_mixing(config: TrainConfig) -> None:
    """Say so where the augmentation of a preset is too strong for so few epochs."""
    preset = PRESETS.get(config.preset)
    is_mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    if preset is not None and is_mixed and config.epochs < SHORT_RUN * preset.epochs:
        logger.warning(
            "%s mixes images, which pays in long runs and costs accuracy in short ones: it was "
            "made for %d epochs and gets %d. Weaker: --set augment.cutmix=0 --set augment.mixup=0",
            config.preset,
            preset.epochs,
            config.epochs,
        )


def _choose_data(
    config: TrainConfig,
    train: ImagesAndLabels | None,
    test: ImagesAndLabels | None,
    data: ImageData | None,
) -> ImageData:
    if (train is None) != (test is None):
        raise InputError(
            "train and test belong together: the test images are read once, at the end. "
            "labkit.train_val_split parts a Split in two"
        )
    if train is not None:
        if data is not None:
            raise InputError("give either data, or train and test, not both")
        return ImageData.from_splits(train, test)
    if data is not None:
        return data
    if config.data == "custom":
        raise InputError("this configuration is of a run on data of your own: give train and test")
    return load_data(config.data, image_size=config.image_size)


def _record_own_things(
    config: TrainConfig,
    data: ImageData,
    model: nn.Module | None,
    transform: Transform | None,
    optimizer: OptimizerSource | None,
) -> TrainConfig:
    """`config` with `custom` wherever something of the user's replaces a part of it."""
    if data.source == "custom":
        size = data.train.images.shape[1]
        config = dataclasses.replace(config, data="custom", image_size=size)
    if model is not None:
        config = dataclasses.replace(config, model="custom", model_options={})
    elif config.model == "custom":
        raise InputError("this configuration is of a run with a network of your own: give model")
    if transform is not None:
        config = dataclasses.replace(config, augment=AugmentConfig())
    if optimizer is not None:
        config = dataclasses.replace(config, optimizer="custom")
    return config


def _check_size(config: TrainConfig, data: ImageData) -> None:
    height, width = data.train.images.shape[1:3]
    if height != width:
        raise InputError(f"images must be square, got {height} x {width}; crop or resize them")
    if height != config.image_size:
        raise InputError(
            f"image_size is {config.image_size}, but the images are {height} x {width}; "
            f"set image_size={height}, or load them at {config.image_size}"
        )


def prepare(
    config: TrainConfig,
    train: Split,
    device: torch.device,
    precision: Precision,
    world: World,
    *,
    model: nn.Module | None = None,
    transform: Transform | None = None,
    optimizer: OptimizerSource | None = None,
    pretrained: bool = True,
) -> tuple[Trainer, TrainState]:
    """The trainer and the state at step 0; without things of your own a function of the seed.

    Raises:
        InputError: something of your own does not fit, there are too few images for so many
            processes, or `sync_batch_norm` without GPUs.
    """
    _check_world(config, train, device, world)
    loader = TrainLoader(train, config, device, transform)
    batch_sizes = cut_batches(len(train), config.batch_size, 2 * world.size)
    own_model = model is not None
    if model is None:
        model = create_from_config(config, len(train.classes), pretrained=pretrained)
    if isinstance(model, SpeedNet):
        first = torch.from_numpy(train.images[:5000]).permute(0, 3, 1, 2)
        model.fit_whitening(normalise(first, config.mean, config.std))
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if own_model:
        _check_logits(model, train, config, device)
    state = TrainState(
        model=model,
        optimizer=_resolve_optimizer(optimizer, model, config),
        scaler=GradScaler(device.type, enabled=precision.scale_loss),
        ema=_create_average(model, config, len(batch_sizes) * config.epochs),
        sums=torch.zeros(3, device=device),
    )
    if config.sync_batch_norm and world.size > 1:
        synchronise_norms(model)
    forward = model
    if config.compile:
        own_share = len(share_batch(torch.arange(batch_sizes[0]), world))
        shape = (own_share, 3, *train.images.shape[1:3])
        forward = try_compile(model, shape, device, precision)
    if world.size > 1:
        forward = DistributedDataParallel(forward)
    return Trainer(config, loader, forward, device, precision, world, batch_sizes), state


def _create_average(model: nn.Module, config: TrainConfig, total_steps: int) -> nn.Module | None:
    """The averaged weights of `config`, which begin as those of `model`."""
    if config.lookahead:
        return Lookahead(model, config.lookahead, total_steps)
    if config.ema_decay:
        from timm.utils.model_ema import ModelEmaV3

        return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, warmup_power=0.75)
    return None


def _check_world(config: TrainConfig, train: Split, device: torch.device, world: World) -> None:
    if world.size == 1:
        return
    for what, count in (("batch_size", config.batch_size), ("training images", len(train))):
        if count < 2 * world.size:
            raise InputError(
                f"{what}: {world.size} processes need at least 2 each, {2 * world.size} in all, "
                f"got {count}; start fewer processes"
            )
    if config.sync_batch_norm and device.type != "cuda":
        raise InputError("sync_batch_norm needs GPUs; on a CPU set sync_batch_norm=False")


def synchronise_norms(model: nn.Module) -> None:
    """Let each BatchNorm layer inside `model` take its statistics from all processes together.

    Weights, buffers and their names stay. In evaluation mode nothing changes.
    """
    from timm.layers.norm_act import convert_sync_batchnorm

    convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def _check_logits(
    model: nn.Module, train: Split, config: TrainConfig, device: torch.device
) -> None:
    """Raise InputError unless `model` maps two images to one logit for each class."""
    images = torch.from_numpy(train.images[[0, -1]]).permute(0, 3, 1, 2).to(device)
    try:
        with torch.no_grad(), use_eval_mode(model):
            logits = model(normalise(images, config.mean, config.std))
    except Exception as error:  # what a network of the user's raises is open-ended
        raise InputError(
            f"model cannot classify images of shape {tuple(images.shape)}: {as_one_line(error)}"
        ) from error
    expected = (2, len(train.classes))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"model must give logits {expected} for 2 images and {len(train.classes)} classes, "
            f"got {shape}"
        )


def _resolve_optimizer(
    optimizer: OptimizerSource | None, model: nn.Module, config: TrainConfig
) -> Optimizer:
    """The optimiser of `config`, or that of the user, each group with its `peak_lr`."""
    if optimizer is None:
        return create_optimizer(model, config)
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise InputError(
            "optimizer holds parameters that are not of the model; make it of "
            "model.parameters(), or give a function that makes one of the parameters"
        )
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", float(group["lr"]))  # an optimizer may come a second time
    return optimizer


class _SumOverProcesses(Callback):
    """Makes `state.sums` the sums over all processes after every step.

    Each process then saves, shows and resumes the same statistics of an epoch. On GPUs no process
    waits for it: three numbers join the gradients on their way.
    """

    def on_train_begin(self, state: TrainState) -> None:
        self._total = state.sums.clone()

    def on_step_end(self, state: TrainState) -> None:
        if state.step == 1:  # the epoch before was closed
            self._total.zero_()
        own = state.sums - self._total
        torch.distributed.all_reduce(own)
        state.sums.copy_(self._total.add_(own))


class _CheckpointTimer(Callback):
    """Saves the state when it is time, and when the user interrupts, which it then passes on."""

    def __init__(self, save: Callable[[], None], every: float, interrupt: Interrupt) -> None:
        self._save, self._every, self._interrupt = save, every, interrupt
        self._saved = time.monotonic()

    def on_step_end(self, state: TrainState) -> None:
        if self._interrupt.requested or time.monotonic() - self._saved >= self._every:
            check_health(float(state.sums[0]), state.scaler, state.epoch)
            started = time.perf_counter()
            self._save()
            self._saved = time.monotonic()
            state.seconds -= time.perf_counter() - started
        self._interrupt.raise_if_requested()


def _train(
    trainer: Trainer,
    state: TrainState,
    folder: RunFolder,
    validation: Split | None,
    callbacks: Sequence[Callback],
    save_every: float,
) -> None:
    """Train all epochs that `state` still has before it."""

    def save() -> None:
        check_finite(state)
        folder.save_state(state.to_dict(), state.epoch * trainer.steps_per_epoch + state.step)

    with defer_interrupt() as interrupt:
        hooks: list[Callback] = [_SumOverProcesses()] if trainer.world.size > 1 else []
        hooks += [ProgressBar(trainer), _CheckpointTimer(save, save_every, interrupt)]
        hooks += callbacks if trainer.world.is_main_process else ()
        for hook in hooks:
            hook.on_train_begin(state)
        try:
            while state.epoch < trainer.config.epochs:
                train_one_epoch(trainer, state, hooks)
                _close_epoch(trainer, state, validation)
                folder.save_history(state.history)
                for hook in hooks:
                    hook.on_epoch_end(state)
        finally:
            for hook in hooks:
                hook.on_train_end(state)
        save()
        interrupt.raise_if_requested()


def _use_best(state: TrainState) -> None:
    """Give the model the weights that count: the best, the averaged, or the last."""
    if state.best:
        state.model.load_state_dict(state.best["model"])
    elif state.ema is not None:
        state.model.load_state_dict(state.evaluated_model.state_dict())
    state.model.eval()


def _close_epoch(trainer: Trainer, state: TrainState, validation: Split | None) -> None:
    """Turn the sums of an epoch into a row of the history, and begin the next epoch."""
    loss, correct, seen = state.sums.tolist()
    check_health(loss, state.scaler, state.epoch)
    seconds = state.seconds - sum(row["seconds"] for row in state.history)
    row = {
        "epoch": state.epoch + 1,
        "train_loss": loss / seen,
        "train_accuracy": correct / seen,
        "learning_rate": get_lr(state.optimizer),
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }
    if validation is not None:
        row |= _validate(trainer, state, validation)
        if row["validation_accuracy"] > state.best.get("accuracy", -1.0):
            weights = {k: v.clone() for k, v in state.evaluated_model.state_dict().items()}
            accuracy = row["validation_accuracy"]
            state.best = {"accuracy": accuracy, "epoch": state.epoch + 1, "model": weights}
    state.history.append(row)
    logger.info("%s", row)
    state.sums.zero_()
    state.epoch, state.step = state.epoch + 1, 0


def _validate(trainer: Trainer, state: TrainState, validation: Split) -> dict[str, float]:
    logits = predict_logits(
        state.evaluated_model,
        validation.images,
        mean=trainer.config.mean,
        std=trainer.config.std,
        device=trainer.device,
        precision=trainer.precision,
    )
    probabilities = logits.softmax(1).numpy()
    is_right = probabilities.argmax(1) == validation.labels
    return {
        "validation_loss": compute_nll(probabilities, validation.labels),
        "validation_accuracy": float(np.mean(is_right)),
    }
