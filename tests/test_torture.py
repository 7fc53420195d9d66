"""The short forms of `make torture`: nothing lost, nothing let in, the same twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check

ROOT = Path(__file__).parents[1]
SHORT = (
    *("13 kill at system calls", "14 damaged checkpoints", "14 failing disks", "15 downloads"),
    *("16 odd images", "16 fuzzed images", "17 addresses", "17 archives", "17 weights"),
    *("18 numbers", "20 trainings"),
)
"""The lines that take a few seconds; the others take too long for a test."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="traces processes as Linux does")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The rows that the short form writes, by the name of the line."""
    out = tmp_path_factory.mktemp("torture") / "trust.json"
    command = [sys.executable, "benchmarks/torture.py", "--quick", "--out", str(out)]
    command += ["--lines", ",".join(SHORT)]
    subprocess.run(command, cwd=ROOT, capture_output=True)
    result = json.loads(out.read_text())
    assert result["quick"] and {"device", "processor", "versions"} <= result.keys()
    return {row["line"]: row for row in result["lines"]}


@pytest.mark.parametrize("line", SHORT)
def test_a_line_of_the_torture_holds(line: str, rows: dict[str, Any]) -> None:
    assert rows[line]["failures"] == []
    assert rows[line]["failed"] == 0 and rows[line]["tried"] > 2


def test_every_line_of_the_committed_file_was_tried() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "trust.json").read_text())
    assert not result["quick"]
    assert {row["line"] for row in result["lines"]} >= set(SHORT)
    assert all(row["tried"] > 0 for row in result["lines"] if "not_run" not in row["figures"])


def test_the_short_form_never_takes_the_place_of_the_whole() -> None:
    row = gpu_check.run_process(["benchmarks/torture.py", "--quick"])
    assert row["status"] == "failed" and "choose an --out" in row["error"]
