"""What the measurements share: runs in turn, medians with their spread, results with hardware."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from labkit.files import write_json
from labkit.runtime import describe_device, get_versions


def measure_rate(run: Callable[[], int]) -> float:
    """Images per second of one call of `run`, which returns how many it handled."""
    started = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - started)


def alternate(runs: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Rates of each of `runs`, taken in turn, so that a drift of the machine meets all alike.

    One round before the first is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            measured = measure_rate(run)
            print(f"round {number} {name:<14}{measured:12,.0f} images/s", flush=True)
            if number:
                rates[name].append(measured)
    return rates


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of `values`."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def _describe_processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result` with the hardware and versions it was measured on, and show it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = {
        **result,
        "device": describe_device(device),
        "processor": _describe_processor(),
        "versions": get_versions(),
    }
    write_json(path, full)
    print(json.dumps(full, indent=2))
