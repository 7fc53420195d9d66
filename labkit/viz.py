"""Figures for notebooks and reports.

A function returns its figure and never shows it; it neither reads nor changes matplotlib's global
settings. Images are uint8 (N, H, W, 3). A `note` is written in a tag on the figure; use it to say
which data were used. The colours are those of Okabe and Ito, which readers of any colour vision
can tell apart. Any text may stand on a figure, also one that the font cannot draw and one that
reads like mark-up; see `make_drawable`.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, PALE_BLUE, RED, AMBER = "#0072B2", "#8CBFDE", "#D55E00", "#E69F00"
COLOURS = (BLUE, RED, "#009E73", AMBER, "#CC79A7")
INK, SOFT, LINE = "#1f2430", "#5b6472", "#e3e6ea"
DPI = 120
CHARACTER = 0.068  # inches that a character of 8-point text takes on average
TEXT_LINE = 0.15  # inches from one line of 8-point text to the next
HEADING_LINE = 0.22  # inches that a line of 10-point text takes
GAP = 0.08  # inches between images
ROW = 0.24  # inches that a row of a table takes
FEW_EPOCHS = 20
MAX_CLASSES_WITH_COUNTS = 20
MAX_TICK_LENGTH = 32  # characters of a class name beside an axis
HEAT = "inferno"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK}
TITLE: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "color": INK}
SMALL: dict[str, Any] = {"fontsize": 8, "color": INK, "parse_math": False}


class _Bin(Protocol):
    """A bin of a reliability diagram: `count` predictions, everything else in [0, 1]."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def confidence(self) -> float: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def count(self) -> int: ...


class _Scores(Protocol):
    """The scores of a class, in [0, 1]."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> float: ...
    @property
    def recall(self) -> float: ...


@contextlib.contextmanager
def use_plain_text() -> Iterator[None]:
    """Let text be drawn by matplotlib itself in the block, even if the user's settings say LaTeX.

    Names of classes are no LaTeX. A text keeps this choice, so that a figure may be shown later.

    Example:
        >>> with use_plain_text():
        ...     create_figure(4, 3, "100 % demo").texts[0].get_usetex()
        False
    """
    import matplotlib

    with matplotlib.rc_context({"text.usetex": False}):
        yield


@use_plain_text()
def plot_images(
    images: NDArray[np.uint8], titles: Sequence[str] = (), *, columns: int = 10, note: str = ""
) -> Figure:
    """Draw images in rows, each below its title; pixels stay squares.

    Args:
        images: (N, H, W, 3) uint8.
        titles: one for each image, or none.
        columns: the number of images in a row.
        note: the text of the tag, or "".

    Raises:
        InputError: `images`, `titles` or `columns` do not fit.

    Example:
        >>> figure = plot_images(np.zeros((2, 8, 8, 3), np.uint8), ["cat", "dog"], note="demo")
        >>> len(figure.axes[0].get_images())
        2
    """
    return _draw_grid(images, titles, columns, note=note)


@use_plain_text()
def plot_learning_curves(history: Sequence[Mapping[str, float]], note: str = "") -> Figure:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        history: a row for each epoch with `epoch` (from 1), `train_loss`, `train_accuracy` in
            [0, 1] and `learning_rate`; any row may have `validation_loss` and
            `validation_accuracy` too.
        note: the text of the tag, or "".

    Raises:
        InputError: `history` is empty.

    Example:
        >>> row = {"epoch": 1, "train_loss": 2.3, "train_accuracy": 0.1, "learning_rate": 0.01}
        >>> [axes.get_title(loc="left") for axes in plot_learning_curves([row]).axes]
        ['Loss', 'Accuracy (%)', 'Learning rate']
    """
    if not history:
        raise InputError("history has no rows; a run must finish an epoch before it has curves")
    figure = create_figure(10.5, 3.0, note)
    loss, accuracy, rate = figure.subplots(1, 3)
    for part, colour in (("train", BLUE), ("validation", RED)):
        _draw_curve(loss, history, f"{part}_loss", 1.0, colour, part)
        _draw_curve(accuracy, history, f"{part}_accuracy", 100.0, colour, part)
    _draw_curve(rate, history, "learning_rate", 1.0, SOFT, "")
    rate.set_ylim(0.0, 1.08 * max(row["learning_rate"] for row in history) or 1.0)
    rate.yaxis.set_major_formatter("{x:g}")
    for axes, title in ((loss, "Loss"), (accuracy, "Accuracy (%)"), (rate, "Learning rate")):
        _style(axes, title, "epoch", "")
        axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axes in (loss, accuracy):
        axes.legend(**LEGEND)
    return figure


@use_plain_text()
def plot_effects(effects: Sequence[Mapping[str, Any]], note: str = "") -> Figure:
    """Draw what each ingredient brought, with its interval, beside what was claimed.

    Effects of one unit share an axis: accuracies in points around 0, speeds as ratios around 1.

    Args:
        effects: rows with `name`, `unit` (`points` or `times`), `mean`, `interval` (low, high) or
            None, `claimed` or None, and `verdict`.
        note: the text of the tag, or "".

    Raises:
        InputError: `effects` is empty.

    Example:
        >>> row = {"name": "flip", "unit": "points", "mean": 1.0, "interval": (0.5, 1.5)}
        >>> figure = plot_effects([{**row, "claimed": 2.0, "verdict": "does not hold"}])
        >>> figure.axes[0].get_xlabel()
        'points of accuracy'
    """
    if not effects:
        raise InputError("effects has no rows; an ablation needs at least one claim")
    units = list(dict.fromkeys(row["unit"] for row in effects))
    groups = [[row for row in effects if row["unit"] == unit] for unit in units]
    heights = [len(group) + 1 for group in groups]
    figure = create_figure(7.5, 0.45 * sum(heights) + 0.8 * len(units), note)
    panels = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, unit, group in zip(panels, units, groups, strict=True):
        _style(axes, "", "points of accuracy" if unit == "points" else "times as fast", "")
        axes.axvline(0 if unit == "points" else 1, color=SOFT, linewidth=1)
        for y, row in enumerate(group):
            if row["interval"] is not None:
                axes.plot(row["interval"], (y, y), color=BLUE, linewidth=2.2)
            label = "measured, 95 % interval" if y == 0 else None
            axes.plot(row["mean"], y, "o", color=BLUE, markersize=6, label=label)
        claims = [(row["claimed"], y) for y, row in enumerate(group) if row["claimed"] is not None]
        if claims:
            axes.plot(*zip(*claims, strict=True), "D", color=RED, markersize=6, label="claimed")
        names = [f"{make_drawable(row['name'], 40)}\n{row['verdict']}" for row in group]
        axes.set_yticks(range(len(group)), labels=names, **SMALL)
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.legend(**LEGEND, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


@use_plain_text()
def plot_compared_curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    title: str = "",
    note: str = "",
) -> Figure:
    """Draw the validation accuracy of two groups of runs by epoch: each run, and their mean.

    Args:
        histories: for each group its runs, each with rows as `plot_learning_curves` takes them;
            all runs have equally many epochs.
        title: the title of the figure.
        note: the text of the tag, or "".

    Raises:
        InputError: there are more groups than colours, or a group has no runs.

    Example:
        >>> run = [{"epoch": 1, "validation_accuracy": 0.5}]
        >>> plot_compared_curves({"with": [run], "without": [run]}).axes[0].get_xlabel()
        'epoch'
    """
    from matplotlib.ticker import MaxNLocator

    colours = (BLUE, RED, AMBER)
    if len(histories) > len(colours) or not all(histories.values()):
        raise InputError(f"give 1 to {len(colours)} groups of at least one run each")
    figure = create_figure(6.0, 3.4, note)
    axes = figure.subplots()
    for (name, runs), colour in zip(histories.items(), colours, strict=False):
        epochs = [row["epoch"] for row in runs[0]]
        curves = np.array([[100 * row["validation_accuracy"] for row in run] for run in runs])
        axes.plot(epochs, curves.T, color=colour, linewidth=0.8, alpha=0.5)
        label = f"{make_drawable(name, 40)} (mean of {len(runs)})"
        axes.plot(epochs, curves.mean(0), "o-", color=colour, markersize=3.5, label=label)
    lines = textwrap.wrap(make_drawable(title, 180), 62)
    _style(axes, "\n".join(lines), "epoch", "validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for text in axes.legend(**LEGEND).get_texts():
        text.set_parse_math(False)
    return figure


@use_plain_text()
def plot_comparison(
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
) -> Figure:
    """Draw loss and accuracy of several runs over the epochs, and below them a table.

    Dashed lines are training, solid ones validation.

    Args:
        histories: the rows of each run as `plot_learning_curves` takes them, by its name.
        columns: the heads of the columns of the table.
        rows: the cells of its rows; the first cell of a row is the widest.
        note: the text of the tag, or "".

    Raises:
        InputError: a row has not one cell for each column.

    Example:
        >>> row = {"epoch": 1, "train_loss": 2.3, "train_accuracy": 0.1, "learning_rate": 0.01}
        >>> figure = plot_comparison({"a": [row]}, ["run", "accuracy"], [["a", "10 %"]])
        >>> [text.get_text() for text in figure.axes[2].texts]
        ['run', 'accuracy', 'a', '10 %']
    """
    if any(len(row) != len(columns) for row in rows):
        raise InputError(f"each row of the table must have {len(columns)} cells, one for a column")
    table_height = ROW * (1 + len(rows))
    figure = create_figure(10.5, 3.0 + table_height, note)
    figure_axes: dict[str, Any] = figure.subplot_mosaic(
        [["loss", "accuracy"], ["table", "table"]], height_ratios=(3.0, table_height)
    )
    epochs = [row["epoch"] for history in histories.values() for row in history]
    for key, title, factor in (("loss", "Loss", 1.0), ("accuracy", "Accuracy (%)", 100.0)):
        axes = figure_axes[key]
        for (name, history), colour in zip(histories.items(), itertools.cycle(COLOURS)):
            for part, style in (("train", "--"), ("validation", "-")):
                label = f"{part}, {make_drawable(name, MAX_TICK_LENGTH)}"
                _draw_curve(axes, history, f"{part}_{key}", factor, colour, label, style)
        _style(axes, title, "epoch", "")
        axes.set_xlim(min(epochs, default=1) - 0.5, max(epochs, default=1) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for text in axes.legend(**LEGEND).get_texts():
            text.set_parse_math(False)
    _draw_table(figure_axes["table"], columns, rows)
    return figure


def _draw_table(axes: Axes, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Draw the cells in columns, below their heads; the first column is twice as wide."""
    starts = [0.0, *(np.arange(2, len(columns) + 1) / (len(columns) + 1)).tolist()]
    for index, row in enumerate([columns, *rows]):
        for start, cell in zip(starts, row, strict=True):
            text = {**SMALL, "fontweight": "bold"} if index == 0 else SMALL
            axes.text(start, index, make_drawable(cell, MAX_TICK_LENGTH), va="center", **text)
    axes.axhline(0.5, color=LINE, linewidth=1.0)
    axes.set(xlim=(0, 1), ylim=(len(rows) + 0.5, -0.5))
    axes.set_axis_off()


@use_plain_text()
def plot_confusion_matrix(confusion: ArrayLike, classes: Sequence[str], note: str = "") -> Figure:
    """Draw a confusion matrix.

    The colour of a cell is its share of its row on a square-root scale, so that rare confusions
    can be seen. With up to 20 classes the counts are written into the cells.

    Args:
        confusion: (C, C) counts; rows are true classes, columns predicted classes.
        classes: the names of the C classes.
        note: the text of the tag, or "".

    Raises:
        InputError: `confusion` is not (C, C).

    Example:
        >>> figure = plot_confusion_matrix([[3, 1], [0, 4]], ["cat", "dog"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['3', '1', '0', '4']
    """
    from matplotlib.colors import PowerNorm

    counts = np.asarray(confusion)
    num_classes = len(classes)
    if counts.shape != (num_classes, num_classes):
        raise InputError(
            f"confusion must be {num_classes} × {num_classes} for its classes, got {counts.shape}"
        )
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ticks = np.arange(0, num_classes, -(-num_classes // 40))
    names = [make_drawable(classes[index], MAX_TICK_LENGTH) for index in ticks]
    extra = max(0.0, CHARACTER * max(map(len, names), default=0) - 0.9)  # inches, for long names
    inches = float(np.clip(0.5 * num_classes, 2.5, 10.0))
    figure = create_figure(inches + 2.0 + extra, inches + 1.0 + extra, note)
    axes = figure.subplots()
    cells = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0))
    _style(axes, "Confusion", "predicted class", "true class")
    axes.grid(False)
    font_size = 8 if num_classes <= MAX_CLASSES_WITH_COUNTS else 6
    tilt: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, names, fontsize=font_size, parse_math=False, **tilt)
    axes.set_yticks(ticks, names, fontsize=font_size, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(cells, ax=axes, shrink=0.8, aspect=30, ticks=[0, 0.01, 0.1, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "50 %", "100 %"], fontsize=8, color=SOFT)
    bar.ax.tick_params(length=0)
    bar.ax.spines["outline"].set_visible(False)
    bar.set_label("share of the true class", fontsize=8, color=SOFT)
    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        for row, column in np.ndindex(counts.shape):
            dark = share[row, column] > 0.3
            colour = "white" if dark else INK if counts[row, column] else "#b3bac4"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    return figure


@use_plain_text()
def plot_reliability(bins: Sequence[_Bin], ece: float, note: str = "") -> Figure:
    """Draw accuracy over confidence, and below it the share of predictions in each bin.

    A bar shows the accuracy of a bin; its hatched part is the gap to the mean confidence.

    Args:
        bins: the bins of confidence, with their `low` and `high` edges.
        ece: the expected calibration error in [0, 1], for the title.
        note: the text of the tag, or "".

    Example:
        >>> plot_reliability([], ece=0.012).axes[0].get_title(loc="left")
        'Reliability (expected calibration error 1.2 %)'
    """
    figure = create_figure(4.6, 5.2, note)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    low = np.array([row.low for row in bins])
    width = np.array([row.high for row in bins]) - low
    accuracy = np.array([row.accuracy for row in bins])
    confidence = np.array([row.confidence for row in bins])
    count = np.array([row.count for row in bins], dtype=float)
    bar = {"width": width, "align": "edge", "edgecolor": "white", "linewidth": 1.0}
    top.bar(low, accuracy, color=PALE_BLUE, label="accuracy", **bar)
    gap = {**bar, "edgecolor": RED, "hatch": "////", "linewidth": 0.8}
    base = np.minimum(accuracy, confidence)
    top.bar(low, np.abs(confidence - accuracy), bottom=base, color="none", label="gap", **gap)
    top.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="calibrated")
    top.set(xlim=(0, 1), ylim=(0, 1))
    bottom.bar(low, 100 * count / max(count.sum(), 1.0), color=SOFT, **bar)
    _style(top, f"Reliability (expected calibration error {100 * ece:.1f} %)", "", "accuracy")
    _style(bottom, "", "confidence", "predictions (%)")
    top.legend(**LEGEND, loc="upper left")
    return figure


@use_plain_text()
def plot_class_scores(scores: Sequence[_Scores], note: str = "") -> Figure:
    """Draw recall and precision of each class, the class with the best recall at the top.

    Args:
        scores: `name`, `precision` and `recall` of each class.
        note: the text of the tag, or "".

    Example:
        >>> len(plot_class_scores([]).axes)
        1
    """
    ordered = sorted(scores, key=lambda row: row.recall)
    figure = create_figure(6.5, 0.9 + 0.36 * max(len(ordered), 1), note)
    axes = figure.subplots()
    positions = np.arange(len(ordered))
    for name, shift, colour in (("recall", 0.19, BLUE), ("precision", -0.19, AMBER)):
        shares = [100 * getattr(row, name) for row in ordered]
        bars = axes.barh(positions + shift, shares, height=0.34, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7, color=SOFT)
    _style(axes, "Recall and precision by class (%)", "", "")
    axes.grid(False, axis="y")
    names = [make_drawable(row.name, MAX_TICK_LENGTH) for row in ordered]
    axes.set_yticks(positions, names, parse_math=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set(xlim=(0, 107), xticks=range(0, 101, 20), ylim=(-0.6, max(len(ordered), 1) - 0.4))
    axes.legend(**LEGEND, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


@use_plain_text()
def plot_mistakes(
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[np.integer[Any]],
    predictions: Sequence[int] | NDArray[np.integer[Any]],
    confidences: Sequence[float] | NDArray[np.floating[Any]],
    classes: Sequence[str],
    note: str = "",
) -> Figure:
    """Draw wrong predictions in the given order, each titled `true → predicted (97 %)`.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) true classes.
        predictions: (N,) predicted classes.
        confidences: (N,) probabilities of the predicted classes.
        classes: the names of all classes.
        note: the text of the tag, or "".

    Example:
        >>> image = np.zeros((1, 8, 8, 3), np.uint8)
        >>> figure = plot_mistakes(image, [0], [1], [0.97], ["cat", "dog"])
        >>> figure.axes[0].texts[0].get_text().replace(chr(160), " ")
        'cat → dog (97 %)'
    """
    rows = zip(labels, predictions, confidences, strict=True)
    titles = [f"{classes[t]} → {classes[p]} ({100 * c:.0f}\u00a0%)" for t, p, c in rows]
    return _draw_grid(images, titles, 6, cell=1.35, note=note)


@use_plain_text()
def plot_predictions(
    images: NDArray[np.uint8],
    probabilities: ArrayLike,
    classes: Sequence[str],
    titles: Sequence[str] = (),
    *,
    top: int = 3,
    columns: int = 2,
    note: str = "",
) -> Figure:
    """Draw each image beside bars of its most probable classes, the most probable on top.

    Args:
        images: (N, H, W, 3) uint8.
        probabilities: (N, C) in [0, 1].
        classes: the names of the C classes.
        titles: one for each image, or none.
        top: the number of classes to show for each image.
        columns: the number of images in a row.
        note: the text of the tag, or "".

    Raises:
        InputError: `images`, `probabilities`, `classes`, `titles`, `top` or `columns` do not fit.

    Example:
        >>> image = np.zeros((1, 8, 8, 3), np.uint8)
        >>> figure = plot_predictions(image, [[0.1, 0.9]], ["cat", "dog"], note="demo")
        >>> [text.get_text().replace(chr(160), " ") for text in figure.axes[0].texts]
        ['dog', '90 %', 'cat', '10 %']
    """
    images, table = _check_images(images), np.asarray(probabilities, dtype=np.float64)
    if table.shape != (len(images), len(classes)):
        wanted = (len(images), len(classes))
        raise InputError(f"probabilities must be {wanted}, a row an image, got {table.shape}")
    if len(titles) not in (0, len(images)):
        raise InputError(f"{len(titles)} titles for {len(images)} images; give one each or none")
    if min(top, columns) < 1:
        raise InputError(f"top and columns must be at least 1, got {top} and {columns}")
    size, bar, line = 1.35, 1.5, 0.45  # inches: an image, a bar of 100 %, a class
    shown = min(top, len(classes))
    above = TEXT_LINE + GAP if titles else GAP
    cell_width = size + bar + 0.75
    cell_height = above + max(size, line * shown) + GAP
    columns = max(1, min(columns, len(images)))
    width = max(columns * cell_width, 2.4)
    height = max(-(-len(images) // columns) * cell_height, 0.5)
    figure = create_figure(width, height, note, pad=0.0)
    axes = figure.subplots()
    for index, (image, row) in enumerate(zip(images, table, strict=True)):
        left = GAP + index % columns * cell_width
        y = index // columns * cell_height + above
        extent = (left, left + size, y + size, y)
        axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
        if titles:
            title = make_drawable(titles[index], int((cell_width - GAP) / CHARACTER))
            axes.text(left, y - 0.04, title, va="bottom", ha="left", **SMALL)
        start = left + size + 0.12
        for rank, label in enumerate(np.argsort(-row, kind="stable")[:shown]):
            middle, colour = y + rank * line + 0.27, BLUE if rank == 0 else PALE_BLUE
            axes.barh(middle, bar, 0.12, left=start, color=LINE)
            axes.barh(middle, bar * row[label], 0.12, left=start, color=colour)
            name = make_drawable(classes[label], MAX_TICK_LENGTH)
            axes.text(start, middle - 0.09, name, va="bottom", ha="left", **SMALL)
            share = f"{100 * row[label]:.0f}\u00a0%"
            axes.text(start + bar + 0.06, middle, share, va="center", ha="left", **SMALL)
    if not len(images):
        axes.text(width / 2, height / 2, "nothing to show", va="center", ha="center", **SMALL)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure


@use_plain_text()
def plot_attention(
    images: NDArray[np.uint8],
    maps: NDArray[np.floating[Any]],
    titles: Sequence[str] = (),
    note: str = "",
    method: str = "Attention",
) -> Figure:
    """Draw each image above the map of where the model looks.

    Args:
        images: (N, H, W, 3) uint8.
        maps: (N, h, w) in [0, 1]; 1 where the model looks most.
        titles: one for each image, or none.
        note: the text of the tag, or "".
        method: how the maps were computed, the title of the figure.

    Raises:
        InputError: `images`, `maps` or `titles` do not fit.

    Example:
        >>> figure = plot_attention(np.zeros((2, 32, 32, 3), np.uint8), np.ones((2, 8, 8)))
        >>> len(figure.axes[0].get_images())
        2
    """
    from matplotlib.cm import ScalarMappable

    images, heat = _check_images(images), np.asarray(maps, dtype=np.float32)
    if heat.ndim != 3 or len(heat) != len(images):
        raise InputError(f"maps must be ({len(images)}, h, w), one an image, got {heat.shape}")
    if len(images):
        images = np.stack([_draw_above_heat(*pair) for pair in zip(images, heat, strict=True)])
    figure = _draw_grid(images, titles, 8, cell=1.35, heading=method, bottom=0.35, note=note)
    axes = figure.axes[0]
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]  # inches
    scale = axes.inset_axes((0.1 / width, 0.2 / height, 1.3 / width, 0.07 / height))
    bar = figure.colorbar(ScalarMappable(cmap=HEAT), cax=scale, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1], labels=["low", "", "high"], **SMALL)
    bar.ax.tick_params(length=0)
    bar.ax.spines["outline"].set_visible(False)
    return figure


@use_plain_text()
def plot_augmentations(
    original: NDArray[np.uint8], variants: NDArray[np.uint8], note: str = ""
) -> Figure:
    """Draw each original image to the left of its augmented variants.

    Args:
        original: (N, H, W, 3) uint8.
        variants: (N, K, H, W, 3) uint8.
        note: the text of the tag, or "".

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> original = np.zeros((2, 8, 8, 3), np.uint8)
        >>> figure = plot_augmentations(original, np.zeros((2, 3, 8, 8, 3), np.uint8))
        >>> len(figure.axes[0].get_images())
        8
    """
    first, variants = _check_images(original), np.asarray(variants)
    if variants.ndim != 5 or variants.shape[:1] + variants.shape[2:] != first.shape:
        raise InputError(f"variants must be (N, K, H, W, 3) of {first.shape}, got {variants.shape}")
    rows = np.concatenate([first[:, None], variants], axis=1)  # (N, 1 + K, H, W, 3)
    columns = rows.shape[1]
    titles = ["original", "augmented"][:columns] + [""] * (len(rows) * columns)
    titles = titles[: len(rows) * columns]
    images = rows.reshape(-1, *first.shape[1:])
    return _draw_grid(images, titles, columns, columns_apart=1, note=note)


def create_figure(width: float, height: float, note: str, pad: float = 0.08) -> Figure:
    """Create a white figure of `width` × `height` inches, below a strip for the tag.

    Args:
        width: inches.
        height: inches without the strip.
        note: the text of the tag; without a text there is no strip.
        pad: inches around each pair of axes.

    Example:
        >>> create_figure(4, 3, "").get_size_inches().tolist()
        [4.0, 3.0]
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = textwrap.wrap(make_drawable(note), max(16, int((width - 0.3) / CHARACTER)))
    strip = 0.16 + TEXT_LINE * len(lines) if lines else 0.0
    total = height + strip
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, height / total), w_pad=pad, h_pad=pad)
    figure = Figure(figsize=(width, total), dpi=DPI, layout=layout, facecolor="white")
    if lines:
        tag = {"boxstyle": "round,pad=0.35", "facecolor": "#fff4d6", "edgecolor": AMBER}
        x, y = 1 - 0.1 / width, 1 - 0.1 / total
        figure.text(x, y, "\n".join(lines), ha="right", va="top", bbox=tag, **SMALL)
    return figure


def make_drawable(text: object, max_length: int | None = None) -> str:
    r"""Make of any text one line of characters that matplotlib's font has.

    White space becomes a space. A symbol that the font lacks, such as an emoji, becomes its
    Unicode name in brackets; another character that it lacks or that cannot be seen becomes its
    escape. Joiners, which only change the look of their neighbours, are left out. Draw the result
    with `parse_math=False`, so that a dollar sign stays a dollar sign.

    Args:
        text: any str, lone surrogates included; of anything else its str.
        max_length: the most characters, at least 3. The middle of a longer text becomes an
            ellipsis; no stand-in is cut in two. None leaves the text as long as it is.

    Example:
        >>> make_drawable("two\nlines of \u732b and \U0001f996")
        'two lines of \\u732b and [t-rex]'
        >>> make_drawable("a very long name", 9)
        'a ve…name'
    """
    fonts = _load_fonts()
    letters = unicodedata.normalize("NFC", str(text))
    parts = [_make_stand_in(letter, fonts) for letter in letters]
    if max_length is None or sum(map(len, parts)) <= max_length:
        return "".join(parts)
    head = _take_parts(parts, max_length // 2)
    tail = _take_parts(parts[::-1], (max_length - 1) // 2)[::-1]
    return "".join([*head, "…", *tail])


def _take_parts(parts: Sequence[str], length: int) -> Sequence[str]:
    """Return the first of `parts`, as many as have at most `length` characters together."""
    return parts[: bisect.bisect_right(list(itertools.accumulate(map(len, parts))), length)]


def _load_fonts() -> list[Any]:
    """Load the fonts in which matplotlib looks for a character, the first choice first."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = []
    for family in FontProperties().get_family():
        with contextlib.suppress(ValueError):  # it is not installed
            path = findfont(FontProperties(family=[family]), fallback_to_default=False)
            fonts.append(get_font(path))
    return fonts or [get_font(findfont(FontProperties()))]


def _make_stand_in(letter: str, fonts: Sequence[Any]) -> str:
    """Return `letter` itself if one of `fonts` has it, else what is drawn in its stead."""
    if letter.isspace():
        return letter if letter == "\u00a0" else " "
    category, name = unicodedata.category(letter), unicodedata.name(letter, "").lower()
    if category == "Cf" or name.startswith("variation selector"):
        return ""
    if letter.isprintable() and any(font.get_char_index(ord(letter)) for font in fonts):
        return letter
    if category.startswith("S") and name:
        return f"[{name}]"
    return letter.encode("unicode_escape").decode("ascii")


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_facecolor("white")
    axes.set_title(title, loc="left", parse_math=False, **TITLE)
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)
    axes.tick_params(labelsize=8, color=LINE, labelcolor=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.set_axisbelow(True)
    axes.grid(True, color=LINE, linewidth=0.7)


def _draw_curve(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    key: str,
    factor: float,
    colour: str,
    label: str,
    style: str = "-",
) -> None:
    points = [(row["epoch"], factor * row[key]) for row in history if row.get(key) is not None]
    if points:
        marker = "o" if len(history) <= FEW_EPOCHS else ""
        x, y = zip(*points, strict=True)
        line: dict[str, Any] = {"linewidth": 1.6, "linestyle": style}
        axes.plot(x, y, color=colour, label=label, marker=marker, markersize=3.5, **line)


def _check_images(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise InputError(f"images must be uint8 (N, H, W, 3), got {array.dtype} {array.shape}")
    return array


def _draw_above_heat(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draw `image`, enlarged, above a grey copy under `heat`, with a white gap between them."""
    from matplotlib import colormaps
    from PIL import Image

    scale = -(-256 // max(image.shape[:2]))
    large = image.repeat(scale, axis=0).repeat(scale, axis=1)
    size = (large.shape[1], large.shape[0])
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = large.mean(axis=2, keepdims=True).repeat(3, axis=2)
    mixed = 0.4 * grey + 0.6 * 255 * colormaps[HEAT](smooth)[..., :3]
    gap = np.full((size[0] // 32, size[0], 3), 255, dtype=np.uint8)
    return np.concatenate([large, gap, mixed.round().astype(np.uint8)])


def _draw_grid(
    images: NDArray[np.uint8],
    titles: Sequence[str],
    columns: int,
    *,
    cell: float = 1.07,
    columns_apart: int = 0,
    heading: str = "",
    bottom: float = 0.0,
    note: str,
) -> Figure:
    """Draw images in rows on one pair of axes whose unit is the inch.

    Each image is `cell` inches wide and stands below its wrapped title. A wider gap follows the
    first `columns_apart` columns, a `heading` of one line stands above the first row, and
    `bottom` inches are left free below the last row.
    """
    images = _check_images(images)
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    if len(titles) not in (0, len(images)):
        raise InputError(f"{len(titles)} titles for {len(images)} images; give one each or none")
    cell_height = cell * images.shape[1] / max(images.shape[2], 1)
    wrapped = [textwrap.wrap(make_drawable(title), int(cell / CHARACTER)) for title in titles]
    title_heights = [TEXT_LINE * len(lines) for lines in wrapped] or [0.0] * len(images)
    corners: list[tuple[float, float]] = []  # top left, y downwards
    top = HEADING_LINE if heading else 0.0
    for start in range(0, len(images), columns):
        row = title_heights[start : start + columns]
        top += GAP + max(row)
        for column in range(len(row)):
            extra = 2 * GAP if 0 < columns_apart <= column else 0.0
            corners.append((GAP / 2 + extra + column * (cell + GAP), top))
        top += cell_height
    width = max([x + cell + GAP / 2 for x, _ in corners] + [2.4])
    height = max([y + cell_height + GAP / 2 + bottom for _, y in corners] + [0.5])
    figure = create_figure(width, height, note, pad=0.0)
    axes = figure.subplots()
    for (x, y), image in zip(corners, images, strict=True):
        extent = (x, x + cell, y + cell_height, y)
        axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
    for (x, y), lines in zip(corners, wrapped, strict=False):
        axes.text(x + cell / 2, y - 0.04, "\n".join(lines), va="bottom", ha="center", **SMALL)
    if heading:
        axes.text(GAP / 2, 0.04, make_drawable(heading), va="top", parse_math=False, **TITLE)
    if not corners:
        axes.text(width / 2, height / 2, "nothing to show", va="center", ha="center", **SMALL)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure
