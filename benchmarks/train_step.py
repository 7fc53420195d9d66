"""The training loop against a bare loop over ready tensors, and against the lab's seed loop.

All three train the seed's ResNet18 with AdamW at batch 256 in fp32 on a CPU (in the precision
that `auto` means on a GPU), a stretch of steps each in turn. Peak memory is that of a separate
process that trains one epoch of `seed-resnet18`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch
from common import alternate, summary, write_result
from loader import BATCH, ImageDataset
from torch import nn
from torch.utils.data import DataLoader

from labkit import get_preset, load_data
from labkit.classify.augment import TrainLoader
from labkit.classify.fit import prepare
from labkit.classify.models import create_from_config
from labkit.classify.trainer import train_one_epoch
from labkit.runtime import World, pick_device, resolve_precision


def main() -> None:
    """Measure, and write benchmarks/results/train-step.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--steps", type=int, default=40, help="steps in a stretch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-memory", action="store_true", help="no epoch for the peak memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train-step.json"))
    arguments = parser.parse_args()
    config, device = get_preset("seed-resnet18"), pick_device()
    precision, data = resolve_precision("auto", device), load_data(arguments.data)
    count = arguments.steps * config.batch_size
    train = dataclasses.replace(
        data.train, images=data.train.images[:count], labels=data.train.labels[:count]
    )
    trainer, state = prepare(config, train, device, precision, World())

    def run_labkit() -> int:
        train_one_epoch(trainer, state)
        state.step = 0
        return count

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor):
        with precision.autocast(device):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def make(
        layout: torch.memory_format, **options: bool
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = create_from_config(config, len(data.classes)).to(device, memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2, **options)

    # The bare loop has labkit's layout and optimiser; the seed's loop has what the lab wrote.
    bare = make(torch.channels_last, fused=True)
    train_loader = TrainLoader(train, config, device)
    ready = [train_loader.batch(0, torch.arange(BATCH * i, BATCH * (i + 1))) for i in range(8)]

    def run_bare() -> int:
        for number in range(arguments.steps):
            loss = step(*bare, *ready[number % len(ready)])
        loss.item()
        return count

    seed = make(torch.contiguous_format)
    loader = DataLoader(ImageDataset(data.train), BATCH, shuffle=True, num_workers=2)

    def run_seed() -> int:
        seen = 0
        for x, y in islice(loader, arguments.steps):
            step(*seed, x.to(device), y.to(device)).item()
            seen += len(y)
        return seen

    rates = alternate({"labkit": run_labkit, "bare": run_bare, "seed": run_seed}, arguments.rounds)
    share = [a / b for a, b in zip(rates["labkit"], rates["bare"], strict=True)]
    ratio = [a / b for a, b in zip(rates["labkit"], rates["seed"], strict=True)]
    write_result(
        arguments.out,
        {
            "share_of_bare_loop": summary(share)["median"],
            "ratio_to_seed_loop": summary(ratio)["median"],
            "peak_gib": None if arguments.skip_memory else measure_peak_gib(arguments.data),
            "share_spread": summary(share),
            "ratio_spread": summary(ratio),
            "images_per_second": {name: summary(values) for name, values in rates.items()},
            "steps_in_a_stretch": arguments.steps,
            "data": data.name,
            "precision": precision.name,
        },
    )


def measure_peak_gib(data: str) -> float:
    """Peak memory in GiB of a process that trains one epoch of `seed-resnet18` on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["train", "--preset", "seed-resnet18", "--data", data, "--epochs", "1"]
        options = ["--device", "cpu", "--out", folder]
        subprocess.run([sys.executable, "-m", "labkit", *command, *options], check=True)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return float(metrics["peak_memory_gib"])


if __name__ == "__main__":
    main()
