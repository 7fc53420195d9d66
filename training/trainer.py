"""What both trainings share: two optimisers, one schedule, averaged weights, resumption."""

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
AVERAGING = 0.998


def options(
    description: str | None, *, out: str, steps: int, pictures: int, each: str, count: int
) -> argparse.Namespace:
    """The command line of a training, with threads set, the random seed too, and its folder made.

    `each` names how many of them there are for a picture, by default `count`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs/training") / out)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--pictures", type=int, default=pictures)
    parser.add_argument(f"--{each}", type=int, default=count)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments


def optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformers, AdamW for all else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "token" not in name
        (matrices if inner and min(parameter.shape) > 16 else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))]


def rate_at(step: int, steps: int) -> float:
    """Share of the highest learning rate: a short rise, a cosine down to 2 %."""
    rise = min(1.0, (step + 1) / 300)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


class Trainer:
    """A training that can be stopped at any time and goes on from its last checkpoint."""

    def __init__(self, model: nn.Module, folder: Path, *, steps: int, rate: float) -> None:
        self.model, self.folder, self.steps, self._rate = model, folder, steps, rate
        self.averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
        self._optimisers = optimisers(model, rate)
        self.step = 0
        if self._path.exists():
            state = torch.load(self._path, weights_only=True)
            self.step = state["step"]
            model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["averaged"])
            for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)

    @property
    def _path(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
        }
        with open_atomic(self._path) as file:
            torch.save(state, file)

    def run(
        self,
        loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        measure: Callable[[nn.Module], dict[str, float]],
        *,
        every: int,
    ) -> None:
        """Train to the last step; measure the averaged weights every so many steps."""
        saved = time.monotonic()
        for step, row in self._steps(loss_of):
            if step % every == 0 or step == self.steps:
                self.averaged.eval()
                with torch.no_grad():
                    self._log({"step": step, **row, **measure(self.averaged.module)})
            if time.monotonic() - saved > SAVE_SECONDS or step == self.steps:
                self.save()
                saved = time.monotonic()

    def _steps(
        self, loss_of: Callable[[int], tuple[torch.Tensor, dict[str, float]]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        started, first = time.monotonic(), self.step
        while self.step < self.steps:
            self.model.train()
            loss, row = loss_of(self.step)
            for optimiser in self._optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimiser in self._optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = self._rate * rate_at(self.step, self.steps)
                optimiser.step()
            self.averaged.update_parameters(self.model)
            self.step += 1
            pace = (time.monotonic() - started) / (self.step - first)
            yield self.step, {"loss": loss.item(), "seconds_a_step": round(pace, 3), **row}

    def _log(self, row: dict[str, float]) -> None:
        text = json.dumps({k: round(v, 4) for k, v in row.items()})
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(text + "\n")
