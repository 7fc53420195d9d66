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

import labkit
from labkit import notebook, viz
from labkit.classify.data import ImageData
from labkit.scenes import make_classification_scenes

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


def test_q1_asks_for_three_predictions_and_hides_each_answer() -> None:
    cells = nbformat.read(ROOT / "q1.ipynb", as_version=4).cells
    texts = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    asked = [match.start() for match in re.finditer(r"\*\*Predict first \(\d of 3\)", texts)]
    answers = [m.start() for m in re.finditer(r"<details><summary>Answer</summary>\n\n", texts)]
    assert len(asked) == len(answers) == texts.count("</details>") == 3
    assert sorted(asked + answers) == [x for pair in zip(asked, answers, strict=True) for x in pair]


def test_every_cell_of_q1_after_the_parameters_runs_on_small_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the set-up, the parameters, the loading of the data and the magics of TensorBoard."""
    train, test = (make_classification_scenes(count, seed=count) for count in (1200, 300))
    data = ImageData.from_splits(train, test)
    small = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = labkit.get_preset(
        "demo", model_options=small, epochs=2, batch_size=40, val_size=50, data="custom"
    )
    names = {"labkit": labkit, "notebook": notebook, "viz": viz, "Path": Path}
    names |= {"dataset": data, "train": data.train, "test": data.test, "note": data.note}
    names |= {"config": config, "folder": tmp_path / "run", "mirror": None, "callbacks": []}
    monkeypatch.chdir(tmp_path)
    for cell in code_cells(ROOT / "q1.ipynb"):
        if cell.id not in ("cell-02", "cell-04", "cell-05", "cell-07", "tensorboard"):
            exec(compile(cell.source, cell.id, "exec"), names)
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^loss (\S+)$", said, re.MULTILINE)]
    assert len(losses) == 8 and abs(losses[0] - 2.3) < 0.5 and losses[-1] < losses[0]
    accuracy = f"{names['run'].metrics.accuracy:.2%}"  # type: ignore[attr-defined]
    assert f"saved {accuracy}, loaded and measured again {accuracy}" in said
    assert re.search(r"grey +\d+\.\d% of 300 images right", said)
