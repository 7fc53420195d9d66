"""Draw a measured result into the first cell of `q1.ipynb`, so that a reader sees one at once.

python scripts/draw_result.py    # after benchmarks/results/seed-resnet18.json has changed

The image is part of the cell's text, since a notebook opened alone has no file beside it and Colab
shows no attachments.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import nbformat
from PIL import Image

from labkit import viz
from labkit.classify.metrics import ClassScores

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "seed-resnet18.json"
IMAGE = re.compile(r"!\[[^\]]*\]\(data:image/png;base64,[^)]*\)")
DPI = 70
COLOURS = 64


def draw_result(result: Path) -> str:
    """Markdown of an image: recall and precision by class of the run that `result` describes."""
    measured = json.loads(result.read_text(encoding="utf-8"))
    figure = viz.plot_class_scores([ClassScores(**row) for row in measured["per_class"]])
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
    text = base64.b64encode(small.getvalue()).decode("ascii")
    caption = f"{measured['preset']}, {measured['test_accuracy']:.2%} of the test images right"
    return f"![{caption}](data:image/png;base64,{text})"


def main() -> None:
    """Replace the image in the notebook."""
    notebook = nbformat.read(ROOT / "q1.ipynb", as_version=4)
    cell = notebook.cells[0]
    cell.source, count = IMAGE.subn(draw_result(RESULT), cell.source)
    if count != 1:
        raise SystemExit(f"the first cell of q1.ipynb must hold one image, it holds {count}")
    nbformat.write(notebook, ROOT / "q1.ipynb")


if __name__ == "__main__":
    main()
