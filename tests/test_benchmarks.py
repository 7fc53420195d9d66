"""The scripts that measure: what they write, compare and skip. None of them measures here."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import gpu_check, rerun
from benchmarks.rerun import Figure, Measurement, compare
from labkit.classify.config import get_preset
from labkit.classify.models import create_from_config

ROOT = Path(__file__).parents[1]
SHARE, SPEED = Figure(("share",)), Figure(("rate", "median"), is_ratio=False)


def make_result(share: float, rate: float, device: str = "cpu") -> dict[str, Any]:
    return {"share": share, "rate": {"median": rate}, "device": device, "processor": "x"}


def test_what_fell_by_more_than_a_tenth_is_named() -> None:
    committed = make_result(0.8, 1000)
    assert compare(committed, make_result(0.73, 901), [SHARE, SPEED]) == []
    assert compare(committed, make_result(0.71, 899), [SHARE, SPEED]) == [
        "share fell from 0.8 to 0.71",
        "rate median fell from 1000 to 899",
    ]


def test_speeds_of_another_machine_are_not_compared() -> None:
    committed = make_result(0.8, 1000)
    assert compare(committed, make_result(0.8, 10, device="gpu"), [SHARE, SPEED]) == []


def test_a_figure_that_is_missing_is_not_compared() -> None:
    assert compare({}, make_result(0.1, 1), [SHARE, SPEED]) == []
    assert compare({"rate": 3}, make_result(0.1, 1), [SHARE, SPEED]) == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import sys; open(sys.argv[-1], 'w').write('{\"share\": 0.5}')", "share fell from 1 to"),
        ("import time; time.sleep(60)", "not finished in 2 s"),
        ("raise SystemExit('no data')", "failed: no data"),
    ],
)
def test_a_measurement_that_fell_failed_or_hung_is_named(
    script: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text('{"share": 1.0}')
    (line,) = rerun.rerun(Measurement("a.json", ["-c", script], [SHARE]), tmp_path, seconds=2)
    assert line.startswith(expected)


def test_what_bench_compares_is_in_the_committed_files_and_the_budget_is_10_minutes() -> None:
    measurements = rerun.list_measurements()
    assert len(measurements) * rerun.SECONDS < 600
    for measurement in measurements:
        path = ROOT / "benchmarks" / "results" / measurement.file
        if path.exists():
            result = json.loads(path.read_text())
            values = [rerun._look_up(result, figure.path) for figure in measurement.figures]
            assert all(isinstance(value, float) for value in values)


def test_without_a_gpu_the_check_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="no GPU was found"):
        gpu_check.main()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu"])
    with pytest.raises(SystemExit, match="choose another --out"):
        gpu_check.main()
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out=x", "--presets=a,vit"])
    with pytest.raises(SystemExit, match="there is no preset a; there are: seed-resnet18"):
        gpu_check.main()


def test_a_failed_row_loses_no_other_and_is_tried_again(tmp_path: Path) -> None:
    out, begun = tmp_path / "gpu.json", []

    def make(name: str, status: str) -> Any:
        def run() -> dict[str, Any]:
            begun.append(name)
            return {"status": status, **({"error": "boom"} if status == "failed" else {})}

        return run

    rows = {"a": make("a", "done"), "b": make("b", "failed"), "c": make("c", "done")}
    assert gpu_check.measure(rows, out, "T4") == 1
    saved = json.loads(out.read_text())
    assert {name: row["status"] for name, row in saved["rows"].items()} == {
        "a": "done",
        "b": "failed",
        "c": "done",
    }
    assert gpu_check.measure({**rows, "b": make("b", "done")}, out, "T4") == 0
    assert begun == ["a", "b", "c", "b"]
    assert list(json.loads(out.read_text())["rows"]) == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="was measured on T4, this is L4"):
        gpu_check.measure(rows, out, "L4")


def test_every_preset_and_mode_has_a_row(tmp_path: Path) -> None:
    rows = gpu_check.list_rows(["vit", "speed"], ["vit"], tmp_path, [])
    assert list(rows) == [
        "tests marked gpu",
        "one epoch, vit, fp16",
        "one epoch, vit, bf16",
        "one epoch, vit, compile",
        "one epoch, speed, fp16",
        "one epoch, speed, bf16",
        "one epoch, speed, compile",
        "accuracy, vit",
    ]


def test_skipped_tests_are_no_passed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(output: str) -> None:
        row = {"status": "done", "output": output}
        monkeypatch.setattr(gpu_check, "run_process", lambda command: dict(row))

    pretend("8 skipped, 900 deselected in 3 s")
    assert gpu_check.run_tests() == {"status": "failed", "error": "8 tests were skipped"}
    pretend("8 passed, 900 deselected in 3 s")
    assert gpu_check.run_tests() == {"status": "done", "passed": 8}


@pytest.mark.slow
def test_the_check_runs_on_a_cpu_where_fp16_fails_and_bf16_does_not(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("test", 2)):
        for name in ("dark", "bright"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                level = 200 if name == "bright" else 40
                Image.new("RGB", (32, 32), (level, level, number)).save(folder / f"{number}.png")
    out = tmp_path / "check.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu"]
    command += ["--data", str(tmp_path / "images"), "--presets", "seed-resnet18"]
    command += ["--to-the-end", "", "--only", "16", "--work", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += ["--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == "1 rows failed; the same command tries them again"
    rows = json.loads(out.read_text())["rows"]
    failed, measured = (
        rows["one epoch, seed-resnet18, fp16"],
        rows["one epoch, seed-resnet18, bf16"],
    )
    assert failed["status"] == "failed" and "precision 'fp16' needs a CUDA GPU" in failed["error"]
    assert measured["status"] == "done" and measured["precision"] == "bf16"
    assert measured["images_per_second"] > 0 and measured["epochs"] == 1


def test_the_race_is_between_networks_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    vit_race: Any = importlib.import_module("vit_race")
    sizes = {}
    for name, contestant in vit_race.list_contestants(get_preset("vit-nano")).items():
        model = create_from_config(contestant.config, 10)
        contestant.adapt(model)
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        sizes[name] = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert list(sizes) == ["vit-nano", "vit-cifar", "cct"]
    biases = 6 * 2 * 15 * 15  # of 6 blocks of 2 heads, for relative positions: vit-nano's alone
    assert sizes["vit-nano"] - biases == sizes["vit-cifar"] == sizes["cct"]


def test_the_lead_is_that_over_the_best_of_the_others_seed_by_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    vit_race: Any = importlib.import_module("vit_race")
    accuracies = {"vit-nano": [0.80, 0.82], "vit-cifar": [0.60, 0.61], "cct": [0.75, 0.75]}
    result = vit_race.summarise(accuracies)
    assert result["best_other"] == "cct" and result["lead"] == pytest.approx(0.06)
    assert result["lead_ci"][0] < 0.05 < 0.07 < result["lead_ci"][1]


def test_the_time_to_the_seeds_accuracy_is_that_of_forty_epochs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is written while the longest run is still missing, and then again."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    time_to_seed: Any = importlib.import_module("time_to_seed")

    def make_run(seconds: float) -> Any:
        facts = {"train_seconds": seconds, "data_name": "x", "precision": "fp32", "parameters": 1}
        metrics = SimpleNamespace(accuracy=0.9, accuracy_interval=(0.8, 1.0), accuracy_tta=0.91)
        return SimpleNamespace(facts=facts, metrics=metrics, config=get_preset("speed"))

    runs = {"seed-fp32": make_run(100), "seed-mixed": make_run(50), "fast": make_run(200)}
    result = time_to_seed.summarise(runs, 0.8)
    assert (result["seed_seconds"], result["seed_seconds_mixed"]) == (4000, 2000)
    assert result["ratio"] == 0.05 and "accuracy_in_seed_time" not in result
    result = time_to_seed.summarise({**runs, "long": make_run(3900)}, 0.8)
    assert result["long_seconds"] == 3900 and result["accuracy_in_seed_time"] == 0.9
