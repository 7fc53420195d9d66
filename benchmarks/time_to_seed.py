"""How soon a small network reaches the accuracy of the lab's seed recipe, on the same images.

Three trainings, one after the other on an otherwise idle machine: one epoch of `seed-resnet18`,
whose time is multiplied by its 40 epochs; `--fast`, which should reach the seed's accuracy in a
tenth of that; and `--long`, which may take as long as the seed. The seed's accuracy is that of
benchmarks/results/seed-resnet18.json. Each training goes on where it was interrupted; the result is
written as soon as `--fast` is done, and again at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from common import write_result

from labkit import fit, get_preset, load_data
from labkit.classify.run import Run

RESULTS = Path(__file__).parent / "results"


def describe(run: Run) -> dict[str, object]:
    """What counts of a run: how it was trained, how long, and how good it is."""
    return {
        "config": run.config.to_json(),
        "train_seconds": run.facts["train_seconds"],
        "precision": run.facts["precision"],
        "parameters": run.facts["parameters"],
        "accuracy": run.metrics.accuracy,
        "accuracy_interval": list(run.metrics.accuracy_interval),
        "accuracy_tta": run.metrics.accuracy_tta,
    }


def summarise(runs: Mapping[str, Run], seed_accuracy: float) -> dict[str, object]:
    """Time and accuracy of each run against the seed's; that of `long` may still be missing."""
    epochs = get_preset("seed-resnet18").epochs
    seconds = {name: run.facts["train_seconds"] for name, run in runs.items()}
    seed_seconds = epochs * seconds["seed-fp32"]
    result: dict[str, object] = {
        "data_name": runs["fast"].facts["data_name"],
        "seed_seconds": seed_seconds,
        "seed_seconds_mixed": epochs * seconds["seed-mixed"],
        "seed_accuracy": seed_accuracy,
        "speed_seconds": seconds["fast"],
        "speed_accuracy": runs["fast"].metrics.accuracy,
        "ratio": seconds["fast"] / seed_seconds,
        "runs": {name: describe(run) for name, run in runs.items()},
    }
    if "long" in runs:
        result["long_seconds"] = seconds["long"]
        result["accuracy_in_seed_time"] = runs["long"].metrics.accuracy
    return result


def main() -> None:
    """Measure, and write benchmarks/results/time-to-seed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="the images of seed-resnet18.json")
    parser.add_argument("--fast", default="speed-narrow", help="preset that is to be fast")
    parser.add_argument("--long", default="speed", help="preset that may take as long as the seed")
    parser.add_argument("--long-epochs", type=int, default=22)
    parser.add_argument("--precision", default="bf16", help="of --fast and --long")
    parser.add_argument("--runs", type=Path, default=Path("runs/time-to-seed"))
    parser.add_argument("--out", type=Path, default=RESULTS / "time-to-seed.json")
    arguments = parser.parse_args()
    data = load_data(arguments.data)
    on_file = json.loads((RESULTS / "seed-resnet18.json").read_text())
    if on_file["data_name"] != data.name:
        raise SystemExit(f"the seed was trained on {on_file['data_name']}, not on {data.name}")
    seed = dataclasses.replace(get_preset("seed-resnet18"), data=arguments.data)
    configs = {
        "seed-fp32": dataclasses.replace(seed, epochs=1, precision="fp32"),
        "seed-mixed": dataclasses.replace(seed, epochs=1, precision=arguments.precision),
        "fast": get_preset(arguments.fast, data=arguments.data, precision=arguments.precision),
        "long": get_preset(
            arguments.long,
            data=arguments.data,
            precision=arguments.precision,
            epochs=arguments.long_epochs,
        ),
    }
    runs: dict[str, Run] = {}
    for name, config in configs.items():
        runs[name] = fit(config, data=data, out=arguments.runs / name, resume=True)
        if "fast" in runs:
            write_result(arguments.out, summarise(runs, on_file["test_accuracy"]))


if __name__ == "__main__":
    main()
