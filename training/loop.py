"""The training loop of both scripts: two optimizers, one schedule, averaged weights, resuming."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from labkit.files import open_atomic

SAVE_SECONDS = 120
EMA_DECAY = 0.998


def parse_options(
    description: str | None,
    *,
    out: str,
    prompts: str,
    on_scenes: tuple[int, int, int],
    on_photographs: tuple[int, int, int],
) -> argparse.Namespace:
    """Read the command line, set threads and random seed, and create the output folder.

    Args:
        description: the help text of the script.
        out: the name of the output folder below runs/training.
        prompts: the name of the option for the number of sentences or prompts for each image.
        on_scenes: the defaults of `--steps`, of `--images`, the images in a batch, and of that
            option, in a training on scenes.
        on_photographs: the same in a training on photographs.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of train and val; without it, scenes")
    parser.add_argument("--out", type=Path, help=f"default for scenes: runs/training/{out}")
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument(f"--{prompts}", type=int)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.data and not arguments.out:
        parser.error("--data needs --out: weights trained on photographs are no part of labkit")
    arguments.out = arguments.out or Path("runs/training") / out
    defaults = on_photographs if arguments.data else on_scenes
    for name, default in zip(("steps", "images", prompts), defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def create_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Create Muon for the matrices inside transformers, and AdamW for all other parameters."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "token" not in name
        (matrices if inner and min(parameter.shape) > 16 else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))]


def lr_factor_at(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then a cosine down to 0.02."""
    warm_up = min(1.0, (step + 1) / 300)
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class TrainingLoop:
    """A training that can be stopped at any time and resumes from its last checkpoint."""

    def __init__(self, model: nn.Module, folder: Path, *, steps: int, lr: float) -> None:
        self.model, self.folder, self.steps, self._lr = model, folder, steps, lr
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self._optimizers = create_optimizers(model, lr)
        self.step = 0
        if self._path.exists():
            state = torch.load(self._path, weights_only=True)
            self.step = state["step"]
            model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["averaged"])
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)

    @property
    def _path(self) -> Path:
        return self.folder / "resume.ckpt"

    def save(self) -> None:
        """Write a checkpoint atomically."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        with open_atomic(self._path) as file:
            torch.save(state, file)

    def run(
        self,
        compute_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        validate: Callable[[nn.Module], dict[str, float]],
        *,
        interval: int,
        export: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """Train to the last step.

        Args:
            compute_loss: takes the number of a step; returns its loss and figures for the log.
            validate: takes the model with averaged weights; returns figures for the log.
            interval: the number of steps between two validations.
            export: takes the model with averaged weights after each validation.
        """
        last_save = time.monotonic()
        for step, row in self._steps(compute_loss):
            if step % interval == 0 or step == self.steps:
                self.averaged.eval()
                with torch.no_grad():
                    self._log({"step": step, **row, **validate(self.averaged.module)})
                if export:
                    export(self.averaged.module)
            if time.monotonic() - last_save > SAVE_SECONDS or step == self.steps:
                self.save()
                last_save = time.monotonic()

    def _steps(
        self, compute_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        started, first = time.monotonic(), self.step
        while self.step < self.steps:
            self.model.train()
            loss, row = compute_loss(self.step)
            for optimizer in self._optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._lr * lr_factor_at(self.step, self.steps)
                optimizer.step()
            self.averaged.update_parameters(self.model)
            self.step += 1
            seconds = (time.monotonic() - started) / (self.step - first)
            yield self.step, {"loss": loss.item(), "seconds_per_step": round(seconds, 3), **row}

    def _log(self, row: dict[str, float]) -> None:
        text = json.dumps({k: round(v, 4) for k, v in row.items()})
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(text + "\n")
