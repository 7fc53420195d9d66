"""Collect a finished run into benchmarks/results: its `metrics.json` and its per-epoch history."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from labkit.files import write_json


def main() -> None:
    """Write benchmarks/results/<preset>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    metrics = json.loads((arguments.run / "metrics.json").read_text())
    lines = (arguments.run / "history.jsonl").read_text().splitlines()
    result = {**metrics, "history": [json.loads(line) for line in lines]}
    write_json(arguments.results / f"{metrics['preset']}.json", result)


if __name__ == "__main__":
    main()
