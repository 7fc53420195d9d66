"""Rerun the short measurements, and name what fell by a tenth against benchmarks/results.

Ratios are compared wherever they were measured; speeds and times only where the committed file is
of the same device. Everything together takes less than 10 minutes: a measurement that needs longer
than its share is stopped, and named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 0.1
SECONDS = 140.0  # a measurement; there are four


@dataclass(frozen=True)
class Figure:
    """A figure to compare.

    Attributes:
        path: the keys that lead to it in the file.
        is_ratio: whether it means the same on every machine.
    """

    path: tuple[str, ...]
    is_ratio: bool = True


@dataclass(frozen=True)
class Measurement:
    """A command that writes a file like the one in benchmarks/results, in less time.

    Attributes:
        file: name of the file.
        command: arguments of Python; `--out FILE` is added.
        figures: what is compared; all are better when larger.
    """

    file: str
    command: Sequence[str]
    figures: Sequence[Figure]


def list_measurements() -> tuple[Measurement, ...]:
    """What `make bench` measures."""
    speeds = [Figure(("images_per_second", "labkit", "median"), is_ratio=False)]
    shares = [Figure(("presets", name, "share")) for name in ("speed", "vit-classic")]
    scenes = ["--profile", "demo", "--scenes", "60"]
    return (
        Measurement(
            "loader.json",
            ["benchmarks/loader.py", "--images", "20000", "--rounds", "3"],
            [Figure(("ratio",)), *speeds],
        ),
        Measurement(
            "train-step.json",
            ["benchmarks/train_step.py", "--steps", "6", "--rounds", "3", "--skip-memory"],
            [Figure(("share_of_bare_loop",)), Figure(("ratio_to_seed_loop",)), *speeds],
        ),
        Measurement(
            "peak-share.json",
            [
                *("-m", "labkit", "bench", "train", "--presets", "speed,vit-classic"),
                *("--batch-size", "64", "--steps", "1", "--rounds", "3"),
            ],
            shares,
        ),
        Measurement(
            "segment-scenes.json",
            ["-m", "labkit", "bench", "segment", *scenes],
            [Figure(("miou",)), Figure(("boundary_miou",)), Figure(("presence_mcc",))],
        ),
    )


def compare(
    committed: Mapping[str, Any], measured: Mapping[str, Any], figures: Sequence[Figure]
) -> list[str]:
    """A line for each of `figures` that is more than a tenth below the committed one."""
    machine = ("device", "processor")
    is_same = all(committed.get(key) == measured.get(key) for key in machine)
    fallen = []
    for figure in figures:
        before, now = _look_up(committed, figure.path), _look_up(measured, figure.path)
        if before is None or now is None or not (figure.is_ratio or is_same):
            continue
        if now < (1 - TOLERANCE) * before:
            fallen.append(f"{' '.join(figure.path)} fell from {before:.4g} to {now:.4g}")
    return fallen


def _look_up(result: Any, path: Sequence[str]) -> float | None:
    """The number that `path` leads to; None where there is none."""
    for key in path:
        result = result.get(key) if isinstance(result, Mapping) else None
    return result


def rerun(measurement: Measurement, results: Path, seconds: float = SECONDS) -> list[str]:
    """Measure, and say in lines what fell, or why there is nothing to compare."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / measurement.file
        command = [sys.executable, *measurement.command, "--out", str(out)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=seconds, capture_output=True, text=True, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return [f"not finished in {seconds:.0f} s"]
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            return [f"failed: {lines[-1]}"]
        measured = json.loads(out.read_text())
    committed = results / measurement.file
    if not committed.exists():
        print(f"  no committed {measurement.file} to compare with")
        return []
    return compare(json.loads(committed.read_text()), measured, measurement.figures)


def main() -> None:
    """Rerun all, or those named, and end with status 1 if something fell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    fallen = []
    for measurement in list_measurements():
        if arguments.only in measurement.file:
            print(f"{measurement.file} ...", flush=True)
            lines = rerun(measurement, arguments.results)
            fallen += [f"{measurement.file}: {line}" for line in lines]
    print("\n".join(fallen) or "nothing fell by a tenth")
    raise SystemExit(1 if fallen else 0)


if __name__ == "__main__":
    main()
