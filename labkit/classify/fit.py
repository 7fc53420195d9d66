"""The training loop: `fit` runs, resumes and finishes what a `TrainConfig` describes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from labkit.classify.augment import TrainingImages, normalise
from labkit.classify.config import TrainConfig
from labkit.classify.data import ImageData, Split, hold_out, load_data
from labkit.classify.evaluate import predict
from labkit.classify.keeper import Keeper
from labkit.classify.models import model_for
from labkit.classify.optim import build_optimizer
from labkit.classify.run import Run, evaluate, training_facts
from labkit.classify.speednet import SpeedNet
from labkit.classify.trainer import Trainer, TrainState, check_health, train_one_epoch, try_compile
from labkit.runtime import (
    InputError,
    Interrupt,
    Precision,
    World,
    defer_interrupt,
    is_interactive,
    pick_device,
    resolve_precision,
    use_seed,
)

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5


class _Watch:
    """After each step: progress, health, a checkpoint when one is due, and held-back interrupts."""

    def __init__(
        self,
        trainer: Trainer,
        state: TrainState,
        save: Callable[[], None],
        save_every: float,
        interrupt: Interrupt,
    ) -> None:
        self._trainer, self._state = trainer, state
        self._save, self._save_every, self._interrupt = save, save_every, interrupt
        self._saved = self._looked = time.monotonic()
        pictures, epochs = len(trainer.images), trainer.config.epochs
        self.bar = tqdm(
            total=pictures * epochs,
            initial=pictures * state.epoch + min(state.step * trainer.config.batch_size, pictures),
            unit="img",
            unit_scale=True,
            desc=trainer.config.preset,
            disable=not (trainer.world.is_main_process and is_interactive()),
        )

    def __call__(self, seen: int) -> None:
        self.bar.update(seen)
        now = time.monotonic()
        if now - self._looked >= _WATCH_SECONDS:
            self._looked = now
            self.look()
        if self._interrupt.requested or now - self._saved >= self._save_every:
            self.look()
            started = time.perf_counter()
            self._save()
            self._saved = time.monotonic()
            self._state.seconds -= time.perf_counter() - started
        self._interrupt.raise_if_requested()

    def look(self) -> None:
        """Show where the epoch stands, and stop a run that has lost its way."""
        state = self._state
        loss, correct, seen = state.sums.tolist()
        check_health(loss, state.scaler, state.epoch)
        if seen:
            self.bar.set_postfix(
                epoch=f"{min(state.epoch + 1, self._trainer.config.epochs)}",
                loss=f"{loss / seen:.3f}",
                acc=f"{100 * correct / seen:.1f}%",
                refresh=False,
            )


def fit(
    config: TrainConfig,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    data: ImageData | None = None,
    device: str = "auto",
    save_every: float = 60.0,
    mirror: Path | str | None = None,
) -> Run:
    """Train what `config` describes, evaluate it once on the test split, and keep the results.

    Under `torchrun` the processes share each batch; the first one writes.

    Args:
        config: the recipe.
        out: folder for `config.json`, `history.jsonl`, `metrics.json`, `report.html`,
            `model.safetensors` and `checkpoints/`; None keeps nothing on disk.
        resume: go on from the newest checkpoint in `out`, if there is one.
        data: pictures already loaded; None loads `config.data`.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`.
        save_every: seconds between checkpoints; one is also written at an interrupt and at the end.
        mirror: a second folder, on a drive that outlives this machine, that follows `out` and
            from which `out` is brought back where it is missing.

    Returns:
        The finished run. Where `out` holds one already and `resume` is set, that one.

    Raises:
        InputError: a setting is out of range, `out` holds another run, or fp16 without a GPU.
        SourceError: the data or pretrained weights could not be had, or the disk is full.
        TrainingError: the loss became non-finite, or the loss scale collapsed.
        KeyboardInterrupt: interrupted; the checkpoint is written first.
    """
    world = World.from_environment()
    place = pick_device(device)
    if world.size > 1 and place.type == "cuda":
        place = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(place)
    precision = resolve_precision(config.precision, place)
    data = load_data(config.data, image_size=config.image_size) if data is None else data
    _check_size(config, data)
    leads = world.is_main_process
    keeper = Keeper(_path(out), _path(mirror), config, data.fingerprint)
    with world.join(place), use_seed(config.seed):
        if leads:
            keeper.bring_back()
        world.wait()
        saved = keeper.checkpoint(resume=resume)
        train, validation = _splits(config, data)
        trainer, state = prepare(config, data, train, place, precision, world)
        if saved is not None:
            state.restore(saved)
            if not leads:  # the sums in the checkpoint are those of the leading process
                state.sums.zero_()
        # Only the leading process writes.
        mine = keeper if leads else Keeper(None, None, config, data.fingerprint)
        mine.begin()
        _train(trainer, state, mine, validation, save_every)
        _use_best(state)
        metrics, probabilities = evaluate(
            state.model, data, mean=config.mean, std=config.std, precision=precision
        )
    run = Run(
        config=config,
        model=state.model,
        data=data,
        history=state.history,
        metrics=metrics,
        probabilities=probabilities,
        facts=training_facts(
            config, data, state.model, state.history, state.seconds, place, precision
        ),
        folder=mine.folder,
    )
    run.save()
    mine.follow()
    return run


def _path(folder: Path | str | None) -> Path | None:
    return None if folder is None else Path(folder)


def _check_size(config: TrainConfig, data: ImageData) -> None:
    height, width = data.train.images.shape[1:3]
    if (height, width) != (config.image_size, config.image_size):
        raise InputError(
            f"image_size is {config.image_size}, but the pictures are {height} x {width}; "
            f"set image_size={height}, or load them at {config.image_size}"
        )


def _train(
    trainer: Trainer,
    state: TrainState,
    keeper: Keeper,
    validation: Split | None,
    save_every: float,
) -> None:
    """All epochs that `state` still has before it."""

    def save() -> None:
        step = state.epoch * trainer.steps_per_epoch + state.step
        keeper.save(state.to_dict(), step)

    with defer_interrupt() as interrupt:
        watch = _Watch(trainer, state, save, save_every, interrupt)
        with watch.bar:
            while state.epoch < trainer.config.epochs:
                train_one_epoch(trainer, state, watch)
                watch.look()
                _close_epoch(trainer, state, validation)
                keeper.record(state.history)
        save()
        interrupt.raise_if_requested()


def _use_best(state: TrainState) -> None:
    """Give the model the weights that count: the chosen, the averaged, or the last."""
    if state.best:
        state.model.load_state_dict(state.best["model"])
    elif state.ema is not None:
        state.model.load_state_dict(state.evaluated.state_dict())
    state.model.eval()


def _close_epoch(trainer: Trainer, state: TrainState, validation: Split | None) -> None:
    """Turn the sums of an epoch into a row of the history, and move on to the next epoch."""
    if trainer.world.size > 1:
        torch.distributed.all_reduce(state.sums)
    loss, correct, seen = state.sums.tolist()
    seconds = state.seconds - sum(row["seconds"] for row in state.history)
    row = {
        "epoch": state.epoch + 1,
        "train_loss": loss / seen,
        "train_accuracy": correct / seen,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }
    if validation is not None:
        row |= _validate(trainer, state, validation)
        if row["validation_accuracy"] > state.best.get("accuracy", -1.0):
            weights = {k: v.clone() for k, v in state.evaluated.state_dict().items()}
            accuracy = row["validation_accuracy"]
            state.best = {"accuracy": accuracy, "epoch": state.epoch + 1, "model": weights}
    state.history.append(row)
    logger.info("%s", row)
    state.sums.zero_()
    state.epoch, state.step = state.epoch + 1, 0


def _validate(trainer: Trainer, state: TrainState, validation: Split) -> dict[str, float]:
    config = trainer.config
    probabilities, _ = predict(
        state.evaluated,
        validation.images,
        mean=config.mean,
        std=config.std,
        device=trainer.device,
        precision=trainer.precision,
    )
    right = probabilities.argmax(1) == validation.labels
    truth = torch.from_numpy(probabilities)[torch.arange(len(validation)), validation.labels]
    loss = -truth.clamp_min(1e-12).log().mean()
    return {"validation_loss": float(loss), "validation_accuracy": float(right.mean())}


def _splits(config: TrainConfig, data: ImageData) -> tuple[Split, Split | None]:
    if not config.hold_out:
        return data.train, None
    return hold_out(data.train, config.hold_out)


def prepare(
    config: TrainConfig,
    data: ImageData,
    train: Split,
    device: torch.device,
    precision: Precision,
    world: World,
) -> tuple[Trainer, TrainState]:
    """The trainer and the state at step 0, a function of `config.seed`."""
    images = TrainingImages(train, len(data.classes), config, device)
    model = model_for(config, len(data.classes))
    if isinstance(model, SpeedNet):
        first = torch.from_numpy(train.images[:5000]).permute(0, 3, 1, 2)
        model.fit_whitening(normalise(first, config.mean, config.std))
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = None
    if config.ema_decay:
        from timm.utils.model_ema import ModelEmaV3

        ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, warmup_power=0.75)
    state = TrainState(
        model=model,
        optimizer=build_optimizer(model, config),
        scaler=GradScaler(device.type, enabled=precision.scale_loss),
        ema=ema,
        sums=torch.zeros(3, device=device),
    )
    forward = try_compile(model, config.image_size, device, precision) if config.compile else model
    if world.size > 1:
        forward = DistributedDataParallel(forward)
    return Trainer(config, images, forward, device, precision, world), state
