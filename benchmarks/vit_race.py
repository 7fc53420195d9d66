"""Small Vision Transformers at equal time: `vit-nano` against the ways of ViT-CIFAR and of CCT.

All have the width and depth of `vit-nano` and its schedule. What differs is what their authors are
known for: tokens, pooling, positions and augmentation.

- `vit-cifar`: linear patches, a class token, AutoAugment;
- `cct`: convolutions and pooling as tokens, sequence pooling, RandAugment, mixup and CutMix
  (Hassani et al. 2021, arXiv 2104.05704, CCT-x/3x2).

Each trains as many whole epochs as fit into `--minutes` on this machine, measured beforehand,
with each random seed. The test split is read once a run. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_result
from torch import Tensor, nn

from labkit import AugmentConfig, Run, TrainConfig, fit, get_preset, load_data
from labkit.classify.ablate import compute_interval
from labkit.classify.augment import Transform
from labkit.classify.data import ImageData, Split
from labkit.classify.models import create_from_config
from labkit.classify.vit import VisionTransformer
from labkit.files import write_json
from labkit.runtime import use_seed

RESULTS = Path(__file__).parent / "results"
TIMED_IMAGES = 5120  # images of the training that tells how long an epoch is


class ConvolutionalTokens(nn.Module):
    """The tokens of CCT-x/3x2: twice a 3x3 convolution, ReLU and a pooling of stride 2."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 64), (64, embed_dim)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to tokens (B, 64, C)."""
        tokens: Tensor = self.layers(images)
        return tokens.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Contestant:
    """A way of training: the recipe, and what it replaces beside the recipe."""

    config: TrainConfig
    adapt: Callable[[VisionTransformer], None] = lambda model: None
    transform: Transform | None = None

    def train(self, data: ImageData, *, epochs: int, seed: int = 0, out: Path | None = None) -> Run:
        """Train, or go on in `out`."""
        config = dataclasses.replace(self.config, epochs=epochs, seed=seed)
        with use_seed(seed):
            model = create_from_config(config, len(data.classes))
            self.adapt(model)
        return fit(config, model=model, data=data, transform=self.transform, out=out, resume=True)


def count_epochs(
    contestants: Mapping[str, Contestant], data: ImageData, minutes: float
) -> dict[str, int]:
    """How many epochs of each fit into `minutes`, by an epoch of a few images."""
    few = Split(
        data.train.images[:TIMED_IMAGES], data.train.labels[:TIMED_IMAGES], data.train.classes
    )
    small = dataclasses.replace(data, train=few)
    epochs = {}
    for name, contestant in contestants.items():
        run = contestant.train(small, epochs=1)
        images_per_second = run.facts["images_per_second"]
        epochs[name] = max(1, int(60 * minutes * images_per_second / len(data.train)))
        print(f"{name}: {images_per_second:.0f} images/s, {epochs[name]} epochs", flush=True)
    return epochs


def list_contestants(nano: TrainConfig) -> dict[str, Contestant]:
    """The contestants, all of the size of `nano`."""
    from torchvision import transforms

    plain: dict[str, Any] = {"relative_bias": False, "mimetic": False, "tokens": "patch"}
    classic = {**nano.model_options, **plain, "pool": "cls"}
    compact = {**nano.model_options, **plain, "pool": "sequence"}
    policy = transforms.AutoAugmentPolicy.CIFAR10

    def use_convolutional_tokens(model: VisionTransformer) -> None:
        model.patch_embed = ConvolutionalTokens(model.norm.normalized_shape[0])

    mixing = AugmentConfig(
        pad=4, flip="random", auto_augment="rand", mixup=0.8, cutmix=1.0, mix_until=0.6
    )
    return {
        "vit-nano": Contestant(nano),
        "vit-cifar": Contestant(
            dataclasses.replace(nano, model_options=classic, augment=AugmentConfig()),
            transform=transforms.Compose(
                [
                    transforms.RandomCrop(32, padding=4),
                    transforms.RandomHorizontalFlip(),
                    transforms.AutoAugment(policy),
                ]
            ),
        ),
        "cct": Contestant(
            dataclasses.replace(nano, model_options=compact, augment=mixing),
            use_convolutional_tokens,
        ),
    }


def summarise(accuracies: Mapping[str, list[float]]) -> dict[str, Any]:
    """Mean accuracy of each contestant, and how far `vit-nano` leads, seed by seed."""
    rows = {
        name: {"accuracy": statistics.mean(values), "accuracies": values, "n": len(values)}
        for name, values in accuracies.items()
    }
    best = max((n for n in rows if n != "vit-nano"), key=lambda name: rows[name]["accuracy"])
    leads = [
        ours - theirs for ours, theirs in zip(accuracies["vit-nano"], accuracies[best], strict=True)
    ]
    return {
        "contestants": rows,
        "best_other": best,
        "lead": statistics.mean(leads),
        "lead_ci": compute_interval(leads),
    }


def main() -> None:
    """Measure, and write benchmarks/results/vit-race.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs/vit-race"))
    parser.add_argument("--out", type=Path, default=RESULTS / "vit-race.json")
    arguments = parser.parse_args()
    data = load_data(arguments.data)
    nano = get_preset("vit-nano", data=arguments.data, precision=arguments.precision)
    contestants = list_contestants(nano)
    counted = arguments.runs / "epochs.json"  # a race that goes on keeps them
    if not counted.exists():
        write_json(counted, count_epochs(contestants, data, arguments.minutes))
    epochs: dict[str, int] = json.loads(counted.read_text())
    accuracies: dict[str, list[float]] = {name: [] for name in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in arguments.seeds:
        for name, contestant in contestants.items():
            folder = arguments.runs / f"{name}-seed{seed}"
            run = contestant.train(data, epochs=epochs[name], seed=seed, out=folder)
            accuracies[name].append(run.metrics.accuracy)
            seconds[name].append(run.facts["train_seconds"])
            print(f"{name} seed {seed}: {run.metrics.accuracy:.2%}", flush=True)
    result = {"data_name": data.name, "minutes": arguments.minutes, "epochs": epochs}
    result["train_seconds"] = seconds
    write_result(arguments.out, {**result, **summarise(accuracies)})


if __name__ == "__main__":
    main()
