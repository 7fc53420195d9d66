"""Figures of a segmentation: every stage from sentence to mask, and the masks over the image."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError
from labkit.viz import (
    CHARACTER,
    HEAT,
    INK,
    RED,
    SMALL,
    SOFT,
    create_figure,
    make_drawable,
    use_plain_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from labkit.segment.results import Segmentation, SentenceResult

_LONGEST = 900  # pixels of the longer side, as drawn
_CELL = 3.0  # inches wide
_MAX_LABEL, _MAX_QUOTE = 40, 100  # characters of a sentence, on an object and in a title
# Okabe and Ito's colours, apart for readers of any colour vision.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


@use_plain_text()
def draw_overlay(segmentation: Segmentation) -> Figure:
    """Draw the image under every mask, each in its colour and named, and say what is absent.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((40, 60, 3), np.uint8), sentences=())
        >>> draw_overlay(nothing).axes[0].get_title(loc="left")
        'Nothing found'
    """
    image = _shrink(segmentation.image)
    height, width = image.shape[:2]
    figure_width = 6.5 * min(max(width / height, 0.4), 1.0)
    image_height = min(figure_width * height / width, 8.0)
    line_length = max(20, int(figure_width / (CHARACTER * 9 / 8)))  # of 9-point text
    lines = textwrap.wrap(_summarize(segmentation), line_length)
    figure_height = image_height + 0.25 + 0.17 * len(lines)
    figure = create_figure(figure_width, figure_height, segmentation.note)
    axes = figure.subplots()
    _show(axes, image)
    scale = width / segmentation.image.shape[1]
    for index, segmented in enumerate(segmentation):
        colour = _COLOURS[index % len(_COLOURS)]
        _paint(axes, segmented.mask, colour)
        left, top = segmented.box[0] * scale, segmented.box[1] * scale
        style = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "none"}
        label = make_drawable(segmented.sentence, _MAX_LABEL)
        axes.text(left, top, label, bbox=style, va="bottom", clip_on=True, **SMALL)
    axes.set_title("\n".join(lines), loc="left", fontsize=9, color=INK, parse_math=False)
    return figure


@use_plain_text()
def draw_stages(segmentation: Segmentation, *stages: str) -> Figure:
    """Draw a row for each sentence: its heat map, the prompts made of it, the masks.

    Raises:
        InputError: one of `stages`, by default all, is not heat, prompts or masks.
    """
    draw = {"heat": _draw_heat, "prompts": _draw_prompts, "masks": _draw_masks}
    shown = stages or tuple(draw)
    if unknown := set(shown) - set(draw):
        raise InputError(f"stages must be among {', '.join(draw)}, got {sorted(unknown)}")
    image = _shrink(segmentation.image)
    height, width = image.shape[:2]
    cell_height = _CELL * min(height / width, 1.6)
    rows = len(segmentation.sentences)
    figure = create_figure(
        len(shown) * (_CELL + 0.3), rows * (cell_height + 0.75), segmentation.note
    )
    grid = figure.subplots(rows, len(shown), squeeze=False)
    for row, result in zip(grid, segmentation.sentences, strict=True):
        for axes, stage in zip(row, shown, strict=True):
            draw[stage](axes, image, result)
    return figure


def _draw_heat(axes: Axes, image: NDArray[np.uint8], result: SentenceResult) -> None:
    """Draw the map on an absolute scale up to its peak, which is written beside the bar."""
    height, width = image.shape[:2]
    _show(axes, image.mean(axis=2, keepdims=True).repeat(3, axis=2).astype(np.uint8))
    peak = float(result.heat.max())
    heat = axes.imshow(
        result.heat,
        cmap=HEAT,
        alpha=0.75,
        vmin=0,
        vmax=max(peak, 1e-6),
        extent=(0, width, height, 0),
        interpolation="bilinear",
    )
    bar = axes.figure.colorbar(heat, ax=axes, shrink=0.7, aspect=20, ticks=[0, peak])
    bar.ax.set_yticklabels(["0", f"{peak:.3f}"], fontsize=7, color=SOFT)
    bar.ax.spines["outline"].set_visible(False)
    _set_title(axes, f"{_quote(result)}: heat map")


def _draw_prompts(axes: Axes, image: NDArray[np.uint8], result: SentenceResult) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    _show(axes, image)
    rows, columns = result.heat.shape
    for index, prompt in enumerate(result.prompts):
        colour = _COLOURS[index % len(_COLOURS)]
        scaled = prompt.scale(width / columns, height / rows)
        left, top, right, bottom = scaled.box
        edge: dict[str, Any] = {"edgecolor": colour, "facecolor": "none", "linewidth": 1.5}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **edge))
        _paint(axes, prompt.region, colour, strength=0.3)
        for label, marker, face in ((1, "*", "white"), (0, "X", RED)):
            x, y = scaled.points[scaled.labels == label].T + 0.5
            axes.scatter(x, y, s=55, marker=marker, c=face, edgecolors=INK, linewidths=0.7)
    count = len(result.prompts)
    prompted = f"{count} object{'s' if count > 1 else ''} prompted"
    _set_title(axes, prompted if count else "no prompt: not there")


def _draw_masks(axes: Axes, image: NDArray[np.uint8], result: SentenceResult) -> None:
    _show(axes, image)
    for index, segmented in enumerate(result.objects):
        _paint(axes, segmented.mask, _COLOURS[index % len(_COLOURS)])
    verdict = f"{len(result.objects)} found" if result.objects else f"absent: {result.reason}"
    assumed = "assumed, " if result.assumed else ""
    _set_title(axes, f"{verdict} ({assumed}presence {result.presence:.2f})")


def _summarize(segmentation: Segmentation) -> str:
    absent = [f"{_quote(r)} ({r.reason})" for r in segmentation.sentences if not r.present]
    found = f"{len(segmentation)} found" if len(segmentation) else "Nothing found"
    return found + (f"; absent: {', '.join(absent)}" if absent else "")


def _quote(result: SentenceResult) -> str:
    return f"“{make_drawable(result.sentence, _MAX_QUOTE)}”"


def _shrink(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`image` no larger than it can be seen."""
    from PIL import Image

    small = Image.fromarray(image)
    small.thumbnail((_LONGEST, _LONGEST))
    return np.asarray(small)


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _paint(axes: Axes, mask: NDArray[np.bool_], colour: str, strength: float = 0.5) -> None:
    """Tint `mask`, of any size, over the whole of `axes`, with an outline."""
    import cv2
    from matplotlib.colors import to_rgb

    width, height = (round(abs(b - a)) for a, b in (axes.get_xlim(), axes.get_ylim()))
    small = cv2.resize(
        mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )
    thickness = max(1, round(max(small.shape) / 300))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    core = cv2.erode(
        small, cross, iterations=thickness, borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    layer = np.zeros((*small.shape, 4))
    layer[..., :3] = to_rgb(colour)
    layer[small > 0, 3] = strength
    layer[small > core, 3] = 1.0
    axes.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")


def _set_title(axes: Axes, text: str) -> None:
    lines = textwrap.wrap(text, int(_CELL / CHARACTER))
    axes.set_title("\n".join(lines), loc="left", fontsize=8, color=INK, parse_math=False)
