"""Figures for the notebooks and reports: returned, never shown, and no global setting touched.

Images are uint8 (N, H, W, 3). `note`, where given, stands in a tag on the face of the figure; use
it to say what the data were. The colours are Okabe and Ito's, apart for readers of any colour
vision.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.runtime import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, PALE_BLUE, RED, AMBER = "#0072B2", "#8CBFDE", "#D55E00", "#E69F00"
INK, SOFT, LINE = "#1f2430", "#5b6472", "#e3e6ea"
DPI = 120
CHARACTER = 0.068  # inches that a character of 8-point text takes on average
TEXT_LINE = 0.15  # inches from one line of 8-point text to the next
GAP = 0.08  # inches between images
FEW_EPOCHS = 20
MOST_CLASSES_WITH_COUNTS = 20
HEAT = "inferno"
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": INK}
SMALL: dict[str, Any] = {"fontsize": 8, "color": INK}


class _Bin(Protocol):
    """One step of a reliability diagram: shares in [0, 1] and a count of predictions."""

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
    """Scores of one class, in [0, 1]."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> float: ...
    @property
    def recall(self) -> float: ...


def plot_images(
    images: NDArray[np.uint8], titles: Sequence[str] = (), *, columns: int = 10, note: str = ""
) -> Figure:
    """`images` in rows of `columns`, each under its title; pixels stay squares."""
    return _gallery(images, titles, columns, note=note)


def plot_learning_curves(history: Sequence[Mapping[str, float]], note: str = "") -> Figure:
    """Loss, accuracy and learning rate by epoch.

    A row holds `epoch` (from 1), `train_loss`, `train_accuracy` in [0, 1], `learning_rate` and,
    in any of the rows, `validation_loss` and `validation_accuracy`.

    Raises:
        InputError: `history` is empty.
    """
    if not history:
        raise InputError("history has no rows; a run must finish an epoch before it has curves")
    figure = create_figure(10.5, 3.0, note)
    loss, accuracy, rate = figure.subplots(1, 3)
    for part, colour in (("train", BLUE), ("validation", RED)):
        _curve(loss, history, f"{part}_loss", 1.0, colour, part)
        _curve(accuracy, history, f"{part}_accuracy", 100.0, colour, part)
    _curve(rate, history, "learning_rate", 1.0, SOFT, "")
    rate.set_ylim(0.0, 1.08 * max(row["learning_rate"] for row in history) or 1.0)
    rate.yaxis.set_major_formatter("{x:g}")
    for axes, title in ((loss, "Loss"), (accuracy, "Accuracy (%)"), (rate, "Learning rate")):
        _style(axes, title, "epoch", "")
        axes.set_xlim(history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axes in (loss, accuracy):
        axes.legend(**LEGEND)
    return figure


def plot_confusion_matrix(confusion: ArrayLike, classes: Sequence[str], note: str = "") -> Figure:
    """Confusion matrix (C, C) of counts, true classes as rows, coloured by share of its row.

    The colour scale is the square root of the share, so that rare confusions can be seen. Counts
    are written into the cells of up to 20 classes.
    """
    from matplotlib.colors import PowerNorm

    counts = np.asarray(confusion)
    size = len(classes)
    if counts.shape != (size, size):
        raise InputError(f"confusion must be {size} × {size} for its classes, got {counts.shape}")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.5 * size, 2.5, 10.0))
    figure = create_figure(side + 2.0, side + 1.0, note)
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0))
    _style(axes, "Confusion", "predicted class", "true class")
    axes.grid(False)
    every = -(-size // 40)
    ticks = np.arange(0, size, every)
    names = [classes[index] for index in ticks]
    small = 8 if size <= MOST_CLASSES_WITH_COUNTS else 6
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=small)
    axes.set_yticks(ticks, names, fontsize=small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30, ticks=[0, 0.01, 0.1, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "50 %", "100 %"], fontsize=8, color=SOFT)
    bar.ax.tick_params(length=0)
    bar.ax.spines["outline"].set_visible(False)
    bar.set_label("share of the true class", fontsize=8, color=SOFT)
    if size <= MOST_CLASSES_WITH_COUNTS:
        for row, column in np.ndindex(size, size):
            dark = share[row, column] > 0.3
            colour = "white" if dark else INK if counts[row, column] else "#b3bac4"
            text = str(counts[row, column])
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    return figure


def plot_reliability(bins: Sequence[_Bin], ece: float, note: str = "") -> Figure:
    """Accuracy against confidence, with the share of predictions in each bin below.

    A bar is the accuracy of a bin, the hatched part what separates it from the mean confidence;
    `ece` in [0, 1] goes into the title.
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


def plot_class_scores(scores: Sequence[_Scores], note: str = "") -> Figure:
    """Recall and precision of each class, the best recall at the top."""
    ordered = sorted(scores, key=lambda row: row.recall)
    figure = create_figure(6.5, 0.9 + 0.36 * max(len(ordered), 1), note)
    axes = figure.subplots()
    place = np.arange(len(ordered))
    for name, shift, colour in (("recall", 0.19, BLUE), ("precision", -0.19, AMBER)):
        shares = [100 * getattr(row, name) for row in ordered]
        bars = axes.barh(place + shift, shares, height=0.34, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7, color=SOFT)
    _style(axes, "Recall and precision by class (%)", "", "")
    axes.grid(False, axis="y")
    axes.set_yticks(place, [row.name for row in ordered])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set(xlim=(0, 107), xticks=range(0, 101, 20), ylim=(-0.6, max(len(ordered), 1) - 0.4))
    axes.legend(**LEGEND, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def plot_mistakes(
    images: NDArray[np.uint8],
    labels: Sequence[int] | NDArray[np.integer[Any]],
    predictions: Sequence[int] | NDArray[np.integer[Any]],
    confidences: Sequence[float] | NDArray[np.floating[Any]],
    classes: Sequence[str],
    note: str = "",
) -> Figure:
    """Wrong predictions in the order given, each as `true → said (97 %)`; (N,) beside `images`."""
    rows = zip(labels, predictions, confidences, strict=True)
    titles = [f"{classes[t]} → {classes[p]} ({100 * c:.0f}\u00a0%)" for t, p, c in rows]
    return _gallery(images, titles, 6, cell=1.35, note=note)


def plot_attention(
    images: NDArray[np.uint8],
    maps: NDArray[np.floating[Any]],
    titles: Sequence[str] = (),
    note: str = "",
) -> Figure:
    """Each image over its heat map: `maps` (N, h, w) in [0, 1], 1 where the model attends most.

    Source of attention roll-out: Abnar and Zuidema, Quantifying Attention Flow in Transformers,
    2020.
    """
    from matplotlib.cm import ScalarMappable

    pictures = _as_images(images)
    heat = np.asarray(maps, dtype=np.float32)
    if heat.ndim != 3 or len(heat) != len(pictures):
        raise InputError(f"maps must be ({len(pictures)}, h, w), one an image, got {heat.shape}")
    pairs = [_over_heat(picture, warmth) for picture, warmth in zip(pictures, heat, strict=True)]
    figure = _gallery(
        np.stack(pairs) if pairs else pictures, titles, 8, cell=1.35, foot=0.35, note=note
    )
    axes = figure.axes[0]
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]  # inches
    scale = axes.inset_axes((0.1 / width, 0.2 / height, 1.3 / width, 0.07 / height))
    bar = figure.colorbar(ScalarMappable(cmap=HEAT), cax=scale, orientation="horizontal")
    bar.set_ticks([0, 0.5, 1], labels=["0", "attention", "1"], **SMALL)
    bar.ax.tick_params(length=0)
    bar.ax.spines["outline"].set_visible(False)
    return figure


def plot_augmentations(
    original: NDArray[np.uint8], variants: NDArray[np.uint8], note: str = ""
) -> Figure:
    """Each original (N, H, W, 3) at the left of its augmented `variants` (N, K, H, W, 3)."""
    first, others = _as_images(original), np.asarray(variants)
    if others.ndim != 5 or others.shape[:1] + others.shape[2:] != first.shape:
        raise InputError(f"variants must be (N, K, H, W, 3) of {first.shape}, got {others.shape}")
    rows = np.concatenate([first[:, None], others], axis=1)  # (N, 1 + K, H, W, 3)
    columns = rows.shape[1]
    titles = ["original", "augmented"][:columns] + [""] * (len(rows) * columns)
    titles = titles[: len(rows) * columns]
    return _gallery(rows.reshape(-1, *first.shape[1:]), titles, columns, lead=1, note=note)


def create_figure(width: float, height: float, note: str, pad: float = 0.08) -> Figure:
    """A white figure of `width` × `height` inches, under a strip with the tag if there is one."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    lines = textwrap.wrap(note, max(16, int((width - 0.3) / CHARACTER)))
    strip = 0.16 + TEXT_LINE * len(lines) if lines else 0.0
    total = height + strip
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, height / total), w_pad=pad, h_pad=pad)
    figure = Figure(figsize=(width, total), dpi=DPI, layout=layout, facecolor="white")
    if lines:
        tag = {"boxstyle": "round,pad=0.35", "facecolor": "#fff4d6", "edgecolor": AMBER}
        x, y = 1 - 0.1 / width, 1 - 0.1 / total
        figure.text(x, y, "\n".join(lines), ha="right", va="top", bbox=tag, **SMALL)
    return figure


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_facecolor("white")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)
    axes.tick_params(labelsize=8, color=LINE, labelcolor=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.set_axisbelow(True)
    axes.grid(True, color=LINE, linewidth=0.7)


def _curve(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    key: str,
    factor: float,
    colour: str,
    label: str,
) -> None:
    points = [(row["epoch"], factor * row[key]) for row in history if row.get(key) is not None]
    if points:
        marker = "o" if len(history) <= FEW_EPOCHS else ""
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3.5)


def _as_images(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise InputError(f"images must be uint8 (N, H, W, 3), got {array.dtype} {array.shape}")
    return array


def _over_heat(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`picture` above itself in grey under `heat`, one image with a white gap between them."""
    from matplotlib import colormaps
    from PIL import Image

    times = -(-256 // max(picture.shape[:2]))
    large = picture.repeat(times, axis=0).repeat(times, axis=1)
    size = (large.shape[1], large.shape[0])
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = large.mean(axis=2, keepdims=True).repeat(3, axis=2)
    mixed = 0.4 * grey + 0.6 * 255 * colormaps[HEAT](smooth)[..., :3]
    gap = np.full((size[0] // 32, size[0], 3), 255, dtype=np.uint8)
    return np.concatenate([large, gap, mixed.round().astype(np.uint8)])


def _gallery(
    images: NDArray[np.uint8],
    titles: Sequence[str],
    columns: int,
    *,
    cell: float = 1.07,
    lead: int = 0,
    foot: float = 0.0,
    note: str,
) -> Figure:
    """`images` in rows, `cell` inches wide, on one pair of axes whose unit is the inch.

    Titles are wrapped above their images; the first `lead` columns stand apart, and `foot` inches
    are left free at the bottom.
    """
    pictures = _as_images(images)
    if columns < 1:
        raise InputError(f"columns must be at least 1, got {columns}")
    if len(titles) not in (0, len(pictures)):
        raise InputError(f"{len(titles)} titles for {len(pictures)} images; give one each or none")
    tall = cell * pictures.shape[1] / max(pictures.shape[2], 1)
    captions = [textwrap.wrap(title, int(cell / CHARACTER)) for title in titles]
    heads = [TEXT_LINE * len(lines) for lines in captions] or [0.0] * len(pictures)
    places = _places(heads, columns, cell, tall, lead)
    width = max([x + cell + GAP / 2 for x, _ in places] + [2.4])
    height = max([y + tall + GAP / 2 + foot for _, y in places] + [0.5])
    figure = create_figure(width, height, note, pad=0.0)
    axes = figure.subplots()
    for (x, y), picture in zip(places, pictures, strict=True):
        box = (x, x + cell, y + tall, y)
        axes.imshow(picture, extent=box, interpolation="nearest", aspect="auto")
    for (x, y), lines in zip(places, captions, strict=False):
        axes.text(x + cell / 2, y - 0.04, "\n".join(lines), va="bottom", ha="center", **SMALL)
    if not places:
        axes.text(width / 2, height / 2, "nothing to show", va="center", ha="center", **SMALL)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return figure


def _places(
    heads: Sequence[float], columns: int, cell: float, tall: float, lead: int
) -> list[tuple[float, float]]:
    """Top-left corners in inches, y downwards, of images with `heads` inches of title above."""
    places: list[tuple[float, float]] = []
    top = 0.0
    for start in range(0, len(heads), columns):
        row = heads[start : start + columns]
        top += GAP + max(row)
        for column in range(len(row)):
            apart = 2 * GAP if lead and column >= lead else 0.0
            places.append((GAP / 2 + apart + column * (cell + GAP), top))
        top += tall
    return places
