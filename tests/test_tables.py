"""The tables of README.md and of the notebooks are those that the results give."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    path = ROOT / "scripts" / "make_tables.py"
    spec = importlib.util.spec_from_file_location("make_tables", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tables = load_script()


@pytest.fixture
def results(tmp_path: Path) -> Any:
    """A folder of results with only what a test writes."""
    return tables.Results(tmp_path)


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def test_readme_and_notebook_agree_with_the_results() -> None:
    assert tables.update(ROOT, write=False) == [], "run: make tables"


def test_every_table_is_shown_somewhere() -> None:
    texts = [(ROOT / "README.md").read_text()]
    for path in ROOT.glob("q?.ipynb"):
        texts += [cell.source for cell in nbformat.read(path, as_version=4).cells]
    shown = {name for text in texts for name in tables.MARKED.findall(text)}
    assert shown == set(tables.TABLES)


def test_a_changed_figure_is_noticed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", "q1.ipynb", "q2.ipynb"):
        shutil.copy(ROOT / name, tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", folder)
    result = json.loads((folder / "seed-resnet18.json").read_text())
    write(folder, "seed-resnet18.json", {**result, "test_accuracy": 0.1234})
    command = ["make_tables", "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--check"])
    with pytest.raises(SystemExit, match="make tables"):
        tables.main()
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    monkeypatch.setattr(sys, "argv", command)
    tables.main()
    assert "| 12.34 %, 95 % interval" in (tmp_path / "README.md").read_text()
    assert "| 12.34 % |" in (tmp_path / "q1.ipynb").read_text()
    assert "q1.ipynb: written" in capsys.readouterr().out
    assert tables.update(tmp_path) == []


def test_what_no_file_holds_is_not_measured(results: Any) -> None:
    for name, make in tables.TABLES.items():
        rows = make(results).splitlines()[2:]
        given = [row for row in rows if "by the lab" not in row]
        assert given and all("| not measured |" in row for row in given), name


def test_an_unknown_table_is_refused(results: Any) -> None:
    with pytest.raises(SystemExit, match="no table is called 'cats'"):
        tables.fill("<!-- table: cats -->\n<!-- /table -->", results)


def test_rows_of_a_gpu_are_shown_and_those_of_a_cpu_are_not(tmp_path: Path, results: Any) -> None:
    rows = {
        "tests marked gpu": {"status": "done", "passed": 8},
        "one epoch, vit, fp16": {
            "status": "done",
            "images_per_second": 1234.5,
            "train_seconds": 40.4,
        },
        "one epoch, vit, compile": {"status": "failed", "error": "a | b"},
        "accuracy, speed": {
            "status": "done",
            "test_accuracy": 0.94,
            "test_accuracy_interval": [0.935, 0.945],
            "train_seconds": 20,
        },
    }
    write(tmp_path, "gpu.json", {"device": "Tesla T4", "rows": rows})
    assert tables.make_gpu(results).splitlines()[2:6] == [
        "| tests marked gpu | 8 passed | – |",
        "| one epoch, vit, fp16 | 1,234 images/s | 40 s |",
        "| one epoch, vit, compile | failed: a \\| b | – |",
        "| accuracy, speed | 94.00 %, 95 % interval 93.50–94.50 % (one run) | 20 s |",
    ]
    assert "On a Tesla T4" in tables.make_gpu(results)
    write(tmp_path, "gpu.json", {"device": "cpu (x86_64, 2 threads)", "rows": rows})
    assert "1,234" not in tables.make_gpu(results)


def test_ablations_and_shares_are_shown_with_their_spread(tmp_path: Path, results: Any) -> None:
    claim = {"claim": "flips help", "mean": 1.25, "unit": "points", "interval": [0.5, 2.0]}
    row = {**claim, "n": 3, "verdict": "holds"}
    write(tmp_path, "ablate.json", {"claims": [row], "epochs": 3, "data_name": "scenes"})
    text = tables.make_ablate(results)
    assert "| flips help | 1.25 points | 0.50 to 2.00 | 3 | holds |" in text
    assert "3 epochs on scenes" in text
    share = {
        "share": 0.61,
        "peak": "gemm",
        "share_spread": {"min": 0.6, "max": 0.65, "n": 5},
        "profile": [{"operator": "aten::mm", "percent": 51.2}],
    }
    write(tmp_path, "peak-share.json", {"presets": {"vit": share}})
    expected = "| `vit` | 0.61 (gemm) | 0.60–0.65, 5 rounds | 0.5 | `aten::mm` 51 % |"
    assert expected in tables.make_peak_share(results)
