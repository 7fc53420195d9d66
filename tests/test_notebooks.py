from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))


def code_cells(path: Path) -> list[Any]:
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_committed_without_outputs(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in code_cells(path):
        assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_code_cell_has_at_most_15_lines(path: Path) -> None:
    assert max(len(cell.source.splitlines()) for cell in code_cells(path)) <= 15


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_one_setup_and_one_parameters_cell(path: Path) -> None:
    tags = [tag for cell in code_cells(path) for tag in cell.metadata.get("tags", [])]
    assert sorted(tags) == ["parameters", "setup"]


def test_the_first_cell_of_q1_shows_the_result_that_was_measured() -> None:
    """And says the same figure as the file that it is drawn from."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "seed-resnet18.json").read_text())
    text = nbformat.read(ROOT / "q1.ipynb", as_version=4).cells[0].source
    ((caption, image),) = re.findall(r"!\[(.*?)\]\(data:image/png;base64,(.*?)\)", text)
    drawn = base64.b64decode(image, validate=True)
    assert Image.open(io.BytesIO(drawn)).size > (400, 250) and len(drawn) < 20_000
    accuracy = f"{measured['test_accuracy']:.2%}"
    assert caption == f"{measured['preset']}, {accuracy} of the test images right"
    assert accuracy.replace("%", " %") in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_logic_stays_in_the_package(path: Path) -> None:
    for cell in code_cells(path):
        words = cell.source.split()
        assert "def" not in words and "class" not in words and "while" not in words
