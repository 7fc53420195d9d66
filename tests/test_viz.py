from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from labkit import viz
from labkit.runtime import InputError
from tests.strange_text import STRANGE_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

pytestmark = pytest.mark.filterwarnings("ignore:.* deprecated - use:DeprecationWarning")

CLASSES = ("cat", "dog", "frog")
NOTE = "demo data: scenes, not CIFAR-10"


@dataclass(frozen=True)
class Row:
    name: str = "cat"
    precision: float = 0.5
    recall: float = 0.5
    low: float = 0.5
    high: float = 0.6
    confidence: float = 0.55
    accuracy: float = 0.75
    count: int = 3


def images(count: int, image_size: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(
        0, 256, (count, image_size, image_size, 3), dtype=np.uint8
    )


def history(epochs: int) -> list[dict[str, float]]:
    return [
        {"epoch": e, "train_loss": 2.0 / e, "train_accuracy": 1 - 1 / e, "learning_rate": 0.1 / e}
        for e in range(1, epochs + 1)
    ]


def effect(name: str, **changes: Any) -> dict[str, Any]:
    row = {"unit": "points", "mean": 1.0, "interval": (0.5, 1.5), "claimed": 2.0}
    return {"name": name, "verdict": "does not hold", **row, **changes}


def accuracies(*values: float) -> list[dict[str, float]]:
    return [{"epoch": e, "validation_accuracy": v} for e, v in enumerate(values, 1)]


FIGURES: dict[str, Callable[[str], Figure]] = {
    "effects": lambda note: viz.plot_effects([effect("a"), effect("b", unit="times")], note),
    "compared_curves": lambda note: viz.plot_compared_curves(
        {"with": [accuracies(0.5, 0.6)], "without": [accuracies(0.4, 0.5)]}, "a claim", note
    ),
    "plot_images": lambda note: viz.plot_images(images(5), list("abcde"), columns=3, note=note),
    "learning_curves": lambda note: viz.plot_learning_curves(history(3), note=note),
    "confusion": lambda note: viz.plot_confusion_matrix(np.eye(3, dtype=int), CLASSES, note=note),
    "reliability": lambda note: viz.plot_reliability([Row()], 0.2, note=note),
    "per_class": lambda note: viz.plot_class_scores([Row(), Row("dog")], note=note),
    "mistakes": lambda note: viz.plot_mistakes(
        images(2), [0, 1], [1, 2], [0.97, 0.6], CLASSES, note=note
    ),
    "predictions": lambda note: viz.plot_predictions(
        images(3), np.full((3, 3), 1 / 3), CLASSES, list("abc"), note=note
    ),
    "attention": lambda note: viz.plot_attention(images(2), np.eye(4)[None].repeat(2, 0), (), note),
    "augmentation": lambda note: viz.plot_augmentations(
        images(2), images(6).reshape(2, 3, 8, 8, 3), note=note
    ),
    "comparison": lambda note: viz.plot_comparison(
        {"a": history(3), "b": history(2)}, ["run", "p"], [["a", ""], ["b", "0.01"]], note
    ),
}


STRANGE_FIGURES: dict[str, Callable[[Sequence[str]], Figure]] = {
    "effects": lambda names: viz.plot_effects([effect(name) for name in names], names[0]),
    "compared_curves": lambda names: viz.plot_compared_curves(
        {names[0]: [accuracies(0.5)]}, " ".join(names), " ".join(names)
    ),
    "plot_images": lambda names: viz.plot_images(images(len(names)), names, note=names[0]),
    "learning_curves": lambda names: viz.plot_learning_curves(history(3), note=" ".join(names)),
    "confusion": lambda names: viz.plot_confusion_matrix(
        np.eye(len(names), dtype=int), names, note=names[0]
    ),
    "reliability": lambda names: viz.plot_reliability([Row()], 0.2, note=" ".join(names)),
    "per_class": lambda names: viz.plot_class_scores([Row(name) for name in names], names[0]),
    "mistakes": lambda names: viz.plot_mistakes(
        images(len(names)),
        range(len(names)),
        [0] * len(names),
        [0.97] * len(names),
        names,
        note=names[0],
    ),
    "predictions": lambda names: viz.plot_predictions(
        images(len(names)), np.eye(len(names)), names, names, top=1, note=names[0]
    ),
    "attention": lambda names: viz.plot_attention(
        images(len(names)), np.eye(4)[None].repeat(len(names), 0), names, names[0]
    ),
    "augmentation": lambda names: viz.plot_augmentations(
        images(2), images(6).reshape(2, 3, 8, 8, 3), note=" ".join(names)
    ),
    "comparison": lambda names: viz.plot_comparison(
        {name: history(2) for name in names}, ["run"], [[name] for name in names], names[0]
    ),
}


def read_texts(figure: Figure) -> str:
    """Every text of `figure`, with line breaks as spaces."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    return " | ".join(t.get_text() for t in texts if isinstance(t, Text)).replace("\n", " ")


def render(figure: Figure) -> NDArray[np.uint8]:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def get_arrays(figure: Figure) -> list[NDArray[Any]]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].get_images()]


@pytest.mark.parametrize("name", FIGURES)
def test_note_is_on_the_figure_and_inside_it(name: str) -> None:
    bare, noted = FIGURES[name](""), FIGURES[name](NOTE)
    assert NOTE not in read_texts(bare)
    assert NOTE in read_texts(noted)
    render(noted)
    tag = noted.texts[-1].get_window_extent()
    assert tag.x0 >= 0 and tag.x1 <= noted.bbox.x1 and tag.y1 <= noted.bbox.y1
    assert all(axes.get_tightbbox().y1 <= tag.y0 for axes in noted.axes)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_need_no_pyplot_and_neither_heed_nor_change_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    def settings() -> dict[str, Any]:
        return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plain = render(FIGURES[name](""))
    dark = {"axes.facecolor": "black", "text.color": "white", "axes.labelcolor": "white"}
    with matplotlib.rc_context({**dark, "xtick.color": "white", "ytick.color": "white"}):
        before = settings()
        np.testing.assert_array_equal(render(FIGURES[name]("")), plain)
        assert settings() == before


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_taken_for_latex(name: str) -> None:
    import matplotlib
    from matplotlib.text import Text

    plain = render(FIGURES[name]("100 % of class_1"))
    with matplotlib.rc_context({"text.usetex": True}):
        figure = FIGURES[name]("100 % of class_1")
        np.testing.assert_array_equal(render(figure), plain)
        assert not any(text.get_usetex() for text in figure.findobj(Text))
        assert matplotlib.rcParams["text.usetex"]


def test_grid_shows_every_image_with_hard_pixels_under_its_title() -> None:
    given = images(5)
    figure = viz.plot_images(given, list("abcde"), columns=3)
    np.testing.assert_array_equal(np.stack(get_arrays(figure)), given)
    drawn = figure.axes[0].get_images()
    assert {image.get_interpolation() for image in drawn} == {"nearest"}
    left = [image.get_extent()[0] for image in drawn]
    assert left[0] == left[3] < left[1] == left[4] < left[2]
    centres = {t.get_text(): t.get_position()[0] for t in figure.axes[0].texts}
    assert centres["b"] == pytest.approx(sum(drawn[1].get_extent()[:2]) / 2)


@pytest.mark.parametrize("name", STRANGE_FIGURES)
def test_strange_names_are_drawn_as_they_are_or_by_a_stand_in(name: str) -> None:
    """Mark-up that cannot be parsed raises, and a glyph that is missing warns."""
    figure = STRANGE_FIGURES[name](STRANGE_NAMES)
    render(figure)
    assert "$x^2$ and $y$" in read_texts(figure)


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_each_strange_name_alone_leaves_room_for_the_figure(name: str) -> None:
    render(viz.plot_confusion_matrix(np.eye(2, dtype=int), [name, "dog"]))
    render(viz.plot_class_scores([Row(name)]))


def test_every_figure_is_tried_with_strange_names() -> None:
    plots = {name for name in vars(viz) if name.startswith("plot_")}
    assert len(STRANGE_FIGURES) == len(FIGURES) == len(plots)


def test_stand_ins_say_which_character_is_meant() -> None:
    assert viz.make_drawable("price: $5 {x}_1 \\") == "price: $5 {x}_1 \\"
    assert viz.make_drawable("猫") == r"\u732b"
    assert viz.make_drawable(7) == "7"
    assert viz.make_drawable("a 🦖\ufe0f") == "a [t-rex]"
    assert viz.make_drawable("caf\udce9 \a") == r"caf\udce9 \x07"
    assert viz.make_drawable("cafe\u0301") == "café"
    assert viz.make_drawable("two\r\nlines\u200b") == "two  lines"
    assert viz.make_drawable("97\u00a0%") == "97\u00a0%"


def test_fonts_that_the_user_has_chosen_are_asked_for_their_characters() -> None:
    import matplotlib

    sign = chr(0x1F701)  # alchemical, in no text font
    assert viz.make_drawable(sign) == "[alchemical symbol for air]"
    with matplotlib.rc_context({"font.family": ["no such font", "sans-serif"]}):
        assert viz.make_drawable("cat") == "cat"
    assert viz.make_drawable("\u231a") == "[watch]"
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", "STIXGeneral"]}):
        assert viz.make_drawable("cat \u231a") == "cat \u231a"
        render(viz.plot_images(images(1), ["cat \u231a"]))


def test_long_names_keep_both_ends() -> None:
    assert viz.make_drawable("0123456789", 10) == "0123456789"
    assert viz.make_drawable("0123456789", 9) == "0123…6789"
    assert viz.make_drawable("0123456789", 3) == "0…9"
    assert viz.make_drawable("ab猫犬猫cd", 17) == r"ab\u732b…\u732bcd"
    assert viz.make_drawable("ab猫犬猫cd", 16) == r"ab\u732b…cd"
    assert viz.make_drawable("猫犬猫犬", 5) == "…"


def test_nothing_to_show_is_a_figure_and_no_error() -> None:
    assert "nothing to show" in read_texts(viz.plot_images(images(0)))
    assert "nothing to show" in read_texts(viz.plot_mistakes(images(0), [], [], [], CLASSES))
    render(viz.plot_attention(images(0), np.zeros((0, 4, 4))))
    assert "nothing to show" in read_texts(
        viz.plot_predictions(images(0), np.zeros((0, 3)), CLASSES)
    )
    render(viz.plot_augmentations(images(0), np.zeros((0, 2, 8, 8, 3), dtype=np.uint8)))
    render(viz.plot_reliability([], 0.0))
    render(viz.plot_class_scores([]))


def test_mistakes_say_true_class_predicted_class_and_confidence() -> None:
    said = read_texts(FIGURES["mistakes"]("")).replace("\u00a0", " ")
    assert "cat → dog (97 %)" in said
    assert "dog → frog (60 %)" in said


def test_curves_are_in_per_cent_and_skip_epochs_without_validation() -> None:
    rows = history(3)
    rows[1]["validation_accuracy"] = 0.25
    loss, accuracy, rate = viz.plot_learning_curves(rows).axes
    assert [line.get_label() for line in loss.lines] == ["train"]
    train, validation = accuracy.lines
    np.testing.assert_allclose(train.get_ydata(), [0, 50, 100 * 2 / 3])
    np.testing.assert_allclose(validation.get_xydata(), [[2, 25]])
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [0.1, 0.05, 0.1 / 3])


def test_curves_have_markers_only_for_few_epochs() -> None:
    assert viz.plot_learning_curves(history(1)).axes[0].lines[0].get_marker() == "o"
    assert viz.plot_learning_curves(history(60)).axes[0].lines[0].get_marker() in ("", "None")


def test_effects_of_one_unit_share_an_axis_with_their_intervals_and_claims() -> None:
    unsure = effect("b", interval=None, claimed=None, mean=-3.0)
    figure = viz.plot_effects([effect("a"), effect("c", unit="times"), unsure])
    points, times = figure.axes
    drawn = [(np.asarray(line.get_xdata()).tolist(), line.get_label()) for line in points.lines[1:]]
    assert [x for x, _ in drawn] == [[0.5, 1.5], [1.0], [-3.0], [2.0]]
    assert drawn[-1][1] == "claimed"
    assert [tick.get_text() for tick in points.get_yticklabels()] == [
        "a\ndoes not hold",
        "b\ndoes not hold",
    ]
    assert [axes.lines[0].get_xdata()[0] for axes in (points, times)] == [0, 1]


def test_compared_curves_show_each_run_and_their_mean() -> None:
    runs = [accuracies(0.4, 0.6), accuracies(0.6, 0.7)]
    axes = viz.plot_compared_curves({"with": runs}).axes[0]
    curves = np.array([line.get_ydata() for line in axes.lines])
    np.testing.assert_allclose(curves, [[40, 60], [60, 70], [50, 65]])


def test_confusion_is_coloured_by_row_share_and_counted_up_to_twenty_classes() -> None:
    figure = viz.plot_confusion_matrix([[3, 1, 0], [0, 0, 0], [0, 5, 5]], CLASSES)
    np.testing.assert_allclose(get_arrays(figure)[0], [[0.75, 0.25, 0], [0, 0, 0], [0, 0.5, 0.5]])
    assert [t.get_text() for t in figure.axes[0].texts] == list("310000055")
    many = viz.plot_confusion_matrix(np.eye(21, dtype=int), [str(n) for n in range(21)])
    assert not many.axes[0].texts


def test_reliability_gap_spans_accuracy_and_confidence() -> None:
    bins = [Row(accuracy=0.75, confidence=0.55), Row(low=0.9, high=1, accuracy=0.6, confidence=0.9)]
    top, bottom = viz.plot_reliability(bins, 0.123).axes
    bars = [(bar.get_y(), bar.get_height()) for bar in top.patches]
    assert np.ravel(bars).tolist() == pytest.approx([0, 0.75, 0, 0.6, 0.55, 0.2, 0.6, 0.3])
    assert [bar.get_height() for bar in bottom.patches] == [50, 50]
    assert "12.3 %" in top.get_title(loc="left")


def test_classes_are_sorted_with_the_best_recall_on_top() -> None:
    rows = [Row("cat", recall=0.5), Row("dog", recall=0.9), Row("frog", recall=0.7)]
    axes = viz.plot_class_scores(rows).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "frog", "dog"]
    recall = axes.patches[:3]
    assert [bar.get_width() for bar in recall] == pytest.approx([50, 70, 90])


def test_attention_is_brightest_where_the_map_is_highest_and_smooth() -> None:
    heat = np.zeros((1, 4, 4))
    heat[0, 1, 2] = 1.0
    grey = np.full((1, 8, 8, 3), 128, dtype=np.uint8)
    (tile,) = get_arrays(viz.plot_attention(grey, heat))
    size = tile.shape[1]
    assert (tile[:size] == 128).all()
    overlay = tile[-size:].astype(int).sum(axis=2)
    row, column = np.unravel_index(overlay.argmax(), overlay.shape)
    assert (row * 4 // size, column * 4 // size) == (1, 2)
    assert np.abs(np.diff(overlay, axis=0)).max() < 0.1 * np.ptp(overlay)


def test_the_method_is_the_title_of_an_attention_figure() -> None:
    figure = viz.plot_attention(images(1), np.ones((1, 4, 4)), ["cat"], method="Grad-CAM")
    said = read_texts(figure)
    assert "Grad-CAM" in said and "cat" in said
    heading, title = (
        next(t for t in figure.axes[0].texts if t.get_text() == text)
        for text in ("Grad-CAM", "cat")
    )
    figure.canvas.draw()
    assert heading.get_window_extent().y0 >= title.get_window_extent().y1


def test_runs_are_drawn_over_one_axis_and_their_table_stands_below() -> None:
    rows = history(3)
    rows[2]["validation_accuracy"] = 0.25
    cells = [["a", "50 %"], ["_b", "60 %"]]
    figure = viz.plot_comparison({"a": rows, "_b": history(5)}, ["run", "accuracy"], cells)
    loss, accuracy, table = figure.axes
    lines = {str(line.get_label()): line for line in accuracy.lines}
    assert set(lines) == {"train, a", "validation, a", "train, _b"}
    np.testing.assert_allclose(lines["validation, a"].get_xydata(), [[3, 25]])
    np.testing.assert_allclose(lines["train, _b"].get_ydata(), [0, 50, 200 / 3, 75, 80])
    assert lines["train, a"].get_color() == lines["validation, a"].get_color()
    assert lines["train, a"].get_color() != lines["train, _b"].get_color()
    assert loss.get_xlim() == (0.5, 5.5)
    legend = loss.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train, a", "train, _b"]
    assert [t.get_text() for t in table.texts] == ["run", "accuracy", "a", "50 %", "_b", "60 %"]


def test_augmented_variants_stand_right_of_their_original() -> None:
    original, variants = images(2), images(6).reshape(2, 3, 8, 8, 3)
    figure = viz.plot_augmentations(original, variants)
    rows = np.stack(get_arrays(figure)).reshape(2, 4, 8, 8, 3)
    np.testing.assert_array_equal(rows[:, 0], original)
    np.testing.assert_array_equal(rows[:, 1:], variants)
    extents = [image.get_extent() for image in figure.axes[0].get_images()]
    assert len({extent[2] for extent in extents[:4]}) == 1
    assert extents[1][0] - extents[0][1] > extents[2][0] - extents[1][1]


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: viz.plot_images(images(2).astype(np.float32)), "uint8"),
        (lambda: viz.plot_images(images(2)[0]), "uint8"),
        (lambda: viz.plot_images(images(2), ["one"]), "1 titles for 2"),
        (lambda: viz.plot_images(images(2), columns=0), "columns"),
        (lambda: viz.plot_learning_curves([]), "history"),
        (lambda: viz.plot_effects([]), "effects"),
        (lambda: viz.plot_compared_curves({"with": []}), "at least one run"),
        (lambda: viz.plot_confusion_matrix(np.eye(2), CLASSES), "3 × 3"),
        (lambda: viz.plot_attention(images(2), np.zeros((1, 4, 4))), "maps"),
        (lambda: viz.plot_augmentations(images(2), images(2)), "variants"),
        (lambda: viz.plot_predictions(images(2), np.eye(3), CLASSES), "probabilities"),
        (lambda: viz.plot_comparison({}, ["run", "p"], [["a"]]), "2 cells"),
    ],
)
def test_arrays_that_do_not_fit_are_named(draw: Callable[[], Figure], message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw()


def test_predictions_show_the_most_probable_classes_first_and_to_scale() -> None:
    table = [[0.1, 0.6, 0.3], [0.8, 0.15, 0.05]]
    axes = viz.plot_predictions(images(2), table, CLASSES, ["a.png", "b.png"], top=2).axes[0]
    texts = [text.get_text().replace("\u00a0", " ") for text in axes.texts]
    assert texts[:5] == ["a.png", "dog", "60 %", "frog", "30 %"]
    assert texts[5:] == ["b.png", "cat", "80 %", "dog", "15 %"]
    widths = [patch.get_width() for patch in axes.patches]
    shares = [part / full for full, part in zip(widths[::2], widths[1::2], strict=True)]
    assert shares == pytest.approx([0.6, 0.3, 0.8, 0.15])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probabilities": [[0.5, 0.5]]}, r"must be \(2, 3\), a row an image, got \(1, 2\)"),
        ({"titles": ["a"]}, "1 titles for 2 images"),
        ({"top": 0}, "top and columns must be at least 1"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"probabilities": np.full((2, 3), 1 / 3), "classes": CLASSES}
    with pytest.raises(InputError, match=message):
        viz.plot_predictions(images(2), **{**options, **changes})


def test_no_predictions_are_a_figure_too() -> None:
    figure = viz.plot_predictions(images(0), np.zeros((0, 3)), CLASSES)
    assert figure.axes[0].texts[0].get_text() == "nothing to show"
