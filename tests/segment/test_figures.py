from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from labkit.runtime import InputError
from labkit.segment.figures import (
    draw_overlay,
    draw_stages,
    draw_ways,
    pick_text_colour,
    place_labels,
)
from labkit.segment.results import Segmentation
from tests.segment.conftest import SHAPE, make_result
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


def make_crowd(count: int) -> list[tuple[int, int, int, int]]:
    """Boxes of about the same place, in an image of `SHAPE`."""
    rng = np.random.default_rng(0)
    corners = rng.integers((20, 10), (28, 18), (count, 2))
    return [(int(x), int(y), int(x) + 6, int(y) + 5) for x, y in corners]


def find_labels(figure: Figure) -> list[Any]:
    """The labels of objects, after the figure was laid out."""
    figure.draw_without_rendering()
    return [text for text in figure.axes[0].texts if text.get_bbox_patch()]


@pytest.mark.parametrize("count", [12, 20])
def test_labels_cover_neither_each_other_nor_the_edge(
    segmentation: Segmentation, count: int
) -> None:
    image = np.zeros((600, 1000, 3), np.uint8)
    crowd = replace(segmentation, image=image, sentences=(make_result("cat", *make_crowd(count)),))
    figure = crowd.overlay()
    boxes = [text.get_bbox_patch().get_window_extent() for text in find_labels(figure)]
    assert len(boxes) == count
    frame = figure.axes[0].get_window_extent().padded(1)
    for index, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_many_objects_are_numbered_and_the_title_says_which_are_whose(
    segmentation: Segmentation,
) -> None:
    results = (
        make_result("cat", *make_crowd(12)),
        make_result("horse"),
        make_result("dog", (0, 0, 1, 1)),
    )
    figure = replace(segmentation, sentences=results).overlay()
    assert {text.get_text() for text in find_labels(figure)} == {str(n) for n in range(1, 14)}
    title = figure.axes[0].get_title(loc="left").replace("\n", " ")
    assert title.startswith("13 found: “cat” 1–12, “dog” 13; absent: “horse”")
    few = replace(segmentation, sentences=results[1:]).overlay()
    assert [text.get_text() for text in find_labels(few)] == ["dog"]


def test_places_are_found_while_there_is_room_and_kept_in_the_frame() -> None:
    boxes = np.tile([40.0, 40, 60, 60], (50, 1))
    sizes = np.tile([20.0, 10], (50, 1))  # fifty of them fill the frame
    places = place_labels(boxes, sizes, (100, 100))
    assert len({tuple(place) for place in places}) == 50
    cells = np.zeros((100, 100), dtype=int)
    for x, y in places.astype(int):
        cells[y : y + 10, x : x + 20] += 1
    assert (cells == 1).all()
    assert place_labels(boxes[:1], np.array([[300.0, 10]]), (100, 100)).tolist() == [[0.0, 30.0]]


@pytest.mark.parametrize("colour", ["#E69F00", "#F0E442", "#0072B2", "#D55E00", "#000000"])
def test_text_is_legible_on_any_colour(colour: str) -> None:
    """By the contrast that WCAG 2.1 asks of text, computed as its appendix has it."""
    from matplotlib.colors import to_rgb

    def luminance(name: str) -> float:
        channels = [
            level / 12.92 if level <= 0.03928 else ((level + 0.055) / 1.055) ** 2.4
            for level in to_rgb(name)
        ]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    low, high = sorted([luminance(colour), luminance(pick_text_colour(colour))])
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("colour", ["#F0E442", "#E69F00", "#808080", "#009E73", "#FFFFFF"])
def test_a_tint_stands_out_from_what_it_covers(segmentation: Segmentation, colour: str) -> None:
    from matplotlib.colors import to_rgb
    from skimage.color import rgb2lab

    pixel = np.rint(np.array(to_rgb(colour)) * 255).astype(np.uint8)
    image = np.broadcast_to(pixel, (*SHAPE, 3)).copy()
    result = make_result("post", (10, 5, 40, 25), (2, 5, 8, 25))
    figure = replace(segmentation, image=image, sentences=(result,), note="").overlay()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    file = io.BytesIO()
    figure.savefig(file, format="raw")
    width, height = (round(side) for side in figure.get_size_inches() * figure.dpi)
    drawn = np.frombuffer(file.getvalue(), np.uint8).reshape(height, width, 4)[..., :3]
    seen = []
    for x, y in ((25, 15), (4, 20), (45, 28)):  # in either object, and beside them
        column, row = axes.transData.transform((x, y))
        seen.append(rgb2lab(drawn[height - 1 - round(row), round(column)] / 255))
    first, second, ground = seen
    assert min(np.linalg.norm(first - ground), np.linalg.norm(second - ground)) >= 20
    assert np.linalg.norm(first - second) >= 10  # the two have colours of their own


@pytest.mark.parametrize("shape", [(900, 90), (90, 900)])
def test_tall_and_wide_images_fill_their_figure(
    segmentation: Segmentation, shape: tuple[int, int]
) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    strange = replace(segmentation, image=image, sentences=(make_result("post"),), note="")
    figure = strange.overlay()
    figure.draw_without_rendering()
    drawn = figure.axes[0].get_window_extent()
    longer = 0 if shape[1] > shape[0] else 1
    assert drawn.bounds[2 + longer] >= 0.5 * figure.bbox.bounds[2 + longer]
    assert figure.bbox.width <= 2.3 * figure.dpi or drawn.width >= 0.9 * figure.bbox.width


def test_rows_of_some_sentences_and_of_several_ways(segmentation: Segmentation) -> None:
    figure = segmentation.figure("heat", sentences=["Dog."])
    assert len(figure.axes) == 2  # the map and its bar
    assert "“dog”" in read_texts(figure) and "“cat”" not in read_texts(figure)
    with pytest.raises(InputError, match="'cow' was not asked for"):
        segmentation.figure(sentences=["cow"])
    ways = {"as it is": segmentation, "stretched": replace(segmentation, image=segmentation.image)}
    texts = read_texts(draw_ways(ways, "horse"))
    assert "as it is: “horse”" in texts and "stretched: “horse”" in texts
    assert texts.count("absent") == 2
