"""What needs a GPU, measured on one: writes benchmarks/results/gpu.json.

The tests marked `gpu`; one epoch of each preset in fp16, in bf16 and compiled; `speed` and `vit`
to the end. Each is a process of its own and a row of the file, written when it ends: a failure
loses no other row, and the same command goes on after an interruption, with what is missing and
what failed. `python scripts/make_tables.py` writes the rows into the README.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from labkit.classify.config import PRESETS
from labkit.files import write_json
from labkit.runtime import as_one_line, describe_device, get_versions

ROOT = Path(__file__).resolve().parents[1]
MODES: Mapping[str, Sequence[str]] = {
    "fp16": ("--precision", "fp16"),
    "bf16": ("--precision", "bf16"),
    "compile": ("--compile",),
}
KEPT = (
    *("preset", "data_name", "epochs", "precision", "train_seconds", "images_per_second"),
    *("peak_memory_gib", "test_accuracy", "test_accuracy_interval", "test_accuracy_tta"),
)
"""What a row keeps of `metrics.json`."""

Row = dict[str, Any]


def run_process(command: Sequence[str]) -> Row:
    """Run Python with `command`; the row that says whether it failed, and with what last line."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode == 0:
        return {"status": "done", "output": text}
    lines = [line for line in text.splitlines() if line.strip()] or ["no output"]
    return {"status": "failed", "error": as_one_line(lines[-1])}


def run_tests() -> Row:
    """Run the tests marked `gpu`; the row has the number that passed."""
    row = run_process(["-m", "pytest", "-q", "-m", "gpu", "tests"])
    output = row.pop("output", "")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", output)}
    if row["status"] == "done" and counts.get("skipped"):
        return {"status": "failed", "error": f"{counts['skipped']} tests were skipped"}
    return row | ({"passed": counts.get("passed", 0)} if row["status"] == "done" else {})


def train(preset: str, folder: Path, options: Sequence[str]) -> Row:
    """Train `preset` in `folder`; the row has what its `metrics.json` says."""
    command = ["-m", "labkit", "train", "--preset", preset, "--out", str(folder), "--resume"]
    row = run_process([*command, *options])
    if row.pop("output", None) is not None:
        metrics = json.loads((folder / "metrics.json").read_text())
        row |= {key: metrics[key] for key in KEPT if key in metrics}
    return row


def list_rows(
    presets: Sequence[str], to_the_end: Sequence[str], work: Path, options: Sequence[str]
) -> dict[str, Callable[[], Row]]:
    """Every row by name, with what measures it."""
    rows: dict[str, Callable[[], Row]] = {"tests marked gpu": run_tests}
    for preset in presets:
        for mode, changes in MODES.items():
            once = [*options, "--epochs", "1", *changes]
            folder = work / f"{preset}-{mode}"
            rows[f"one epoch, {preset}, {mode}"] = partial(train, preset, folder, once)
    for preset in to_the_end:
        rows[f"accuracy, {preset}"] = partial(train, preset, work / preset, options)
    return rows


def measure(rows: Mapping[str, Callable[[], Row]], out: Path, device: str) -> int:
    """Measure every row that `out` does not hold as done; return how many failed.

    Raises:
        SystemExit: `out` holds rows of another device.
    """
    saved = json.loads(out.read_text()) if out.exists() else {"device": device, "rows": {}}
    if saved["device"] != device:
        raise SystemExit(
            f"{out} was measured on {saved['device']}, this is {device}: "
            "move it away, or choose another file with --out"
        )
    done = {name: row for name, row in saved["rows"].items() if row["status"] == "done"}
    failed = 0
    for name, run in rows.items():
        if name not in done:
            print(f"{name} ...", flush=True)
            row = run()
            failed += row["status"] != "done"
            print(f"  {row['status']} {row.get('error', '')}", flush=True)
            saved["rows"][name] = row
            write_json(out, {**saved, "versions": get_versions()})
    return failed


def main() -> None:
    """Measure, and write benchmarks/results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = [name for name, config in PRESETS.items() if config.data != "scenes"]
    parser.add_argument("--data", default="hub", help="as in labkit train")
    parser.add_argument("--device", default="cuda", help="cpu tries this script, and is slow")
    parser.add_argument("--presets", default=",".join(known), help="with commas between them")
    parser.add_argument("--to-the-end", default="speed,vit", help="trained for all their epochs")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-check"), help="for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU was found. In Colab: Runtime > Change runtime type > T4 GPU. "
            "--device cpu --out FILE tries this script without one."
        )
    if arguments.device == "cpu" and arguments.out == parser.get_default("out"):
        raise SystemExit("figures of a CPU do not belong into gpu.json: choose another --out")
    presets = [name for name in arguments.presets.split(",") if name]
    to_the_end = [name for name in arguments.to_the_end.split(",") if name]
    if unknown := sorted({*presets, *to_the_end} - set(PRESETS)):
        raise SystemExit(
            f"there is no preset {', '.join(unknown)}; there are: {', '.join(PRESETS)}"
        )
    options = ["--data", arguments.data, "--device", arguments.device]
    rows = list_rows(presets, to_the_end, arguments.work.resolve(), options)
    rows = {name: run for name, run in rows.items() if arguments.only in name}
    device = describe_device(torch.device(arguments.device))
    if failed := measure(rows, arguments.out, device):
        raise SystemExit(f"{failed} rows failed; the same command tries them again")


if __name__ == "__main__":
    main()
