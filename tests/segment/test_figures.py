from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from labkit.segment.figures import draw_overlay, draw_stages
from labkit.segment.results import Segmentation
from tests.segment.conftest import make_result
from tests.strange_text import STRANGE_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytestmark = pytest.mark.filterwarnings("ignore:.* deprecated - use:DeprecationWarning")


def read_texts(figure: Figure) -> str:
    """Every text of `figure`, with line breaks as spaces."""
    from matplotlib.text import Text

    texts: Any = figure.findobj(Text)
    return " | ".join(text.get_text() for text in texts).replace("\n", " ")


def render(figure: Figure) -> None:
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("sentence", STRANGE_NAMES)
@pytest.mark.parametrize("is_present", [True, False])
def test_any_sentence_is_drawn_without_a_warning(
    segmentation: Segmentation, sentence: str, is_present: bool
) -> None:
    boxes = [(2, 3, 12, 9)] if is_present else []
    strange = replace(
        segmentation,
        sentences=(make_result(sentence, *boxes), make_result("dog", (0, 0, 1, 1))),
        note=sentence,
    )
    render(strange.overlay())
    render(strange.figure())


def test_mark_up_in_a_sentence_is_text(segmentation: Segmentation) -> None:
    results = (make_result("$x$ {y}_1", (2, 3, 12, 9)), make_result("$z$"))
    strange = replace(segmentation, sentences=results, note="$n$ and $m$")
    for figure in (strange.overlay(), strange.figure("heat")):
        render(figure)
        texts = read_texts(figure)
        assert "$x$ {y}_1" in texts and "“$z$”" in texts and "$n$ and $m$" in texts


def test_report_of_strange_sentences_is_written_in_silence(
    segmentation: Segmentation, tmp_path: Path
) -> None:
    results = tuple(make_result(name) for name in STRANGE_NAMES)
    strange = replace(segmentation, sentences=results, image=np.zeros((30, 50, 3), np.uint8))
    folder = strange.save(tmp_path, "caf\udce9 \a $x$.png")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "猫と犬" in page and r"broken caf\udce9" in page and "$x$.png" in page


@pytest.mark.parametrize("draw", [draw_overlay, draw_stages])
def test_no_sentence_is_taken_for_latex(segmentation: Segmentation, draw: Any) -> None:
    import matplotlib
    from matplotlib.text import Text

    with matplotlib.rc_context({"text.usetex": True}):
        figure = draw(segmentation)
        figure.savefig(io.BytesIO(), format="png")
        assert not any(text.get_usetex() for text in figure.findobj(Text))
