"""Pictures of a segmentation: every stage from sentence to mask, and the masks over the image."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from labkit.runtime import InputError
from labkit.segment.results import Answer, Findings, FoundObject
from labkit.viz import CHARACTER, HEAT, INK, RED, SMALL, SOFT, create_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Objects = tuple[FoundObject, ...]

_WIDEST = 900  # pixels of the longer side, as drawn
_CELL = 3.0  # inches
# Okabe and Ito's colours, apart for readers of any colour vision.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def overlay_figure(findings: Findings) -> Figure:
    """The image under every mask, each in its colour and named; with what was not found below."""
    image = _drawable(findings.image)
    height, width = image.shape[:2]
    wide = 6.5 * min(max(width / height, 0.4), 1.0)
    tall = min(wide * height / width, 8.0)
    lines = textwrap.wrap(_summary(findings), max(20, int(wide / CHARACTER)))
    figure = create_figure(wide, tall + 0.25 + 0.17 * len(lines), findings.note)
    axes = figure.subplots()
    _show(axes, image)
    for index, thing in enumerate(findings.objects):
        colour = _COLOURS[index % len(_COLOURS)]
        _paint(axes, thing.mask, colour)
        scale = width / findings.image.shape[1]
        left, top = thing.box[0] * scale, thing.box[1] * scale
        style = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "none"}
        place: dict[str, Any] = {"va": "bottom", "clip_on": True, "parse_math": False}
        axes.text(left, top, thing.prompt, bbox=style, **place, **SMALL)
    axes.set_title("\n".join(lines), loc="left", fontsize=9, color=INK, parse_math=False)
    return figure


def stages_figure(findings: Findings, *stages: str) -> Figure:
    """A row for each sentence: its heat map, the prompts made of it, the masks drawn from them.

    Raises:
        InputError: one of `stages`, by default all, is not heat, prompts or masks.
    """
    draw = {"heat": _draw_heat, "prompts": _draw_prompts, "masks": _draw_masks}
    shown = stages or tuple(draw)
    if unknown := set(shown) - set(draw):
        raise InputError(f"stages must be among {', '.join(draw)}, got {sorted(unknown)}")
    image = _drawable(findings.image)
    height, width = image.shape[:2]
    tall = _CELL * min(height / width, 1.6)
    rows = len(findings.answers)
    figure = create_figure(len(shown) * (_CELL + 0.3), rows * (tall + 0.75), findings.note)
    grid = figure.subplots(rows, len(shown), squeeze=False)
    for row, answer in zip(grid, findings.answers, strict=True):
        found = findings.objects_of(answer.prompt)
        for axes, stage in zip(row, shown, strict=True):
            draw[stage](axes, image, answer, found)
    return figure


def _draw_heat(axes: Axes, image: NDArray[np.uint8], answer: Answer, found: Objects) -> None:
    """The map on an absolute scale up to its peak, which is written beside the bar."""
    height, width = image.shape[:2]
    _show(axes, image.mean(axis=2, keepdims=True).repeat(3, axis=2).astype(np.uint8))
    peak = float(answer.heat.max())
    picture = axes.imshow(
        answer.heat,
        cmap=HEAT,
        alpha=0.75,
        vmin=0,
        vmax=max(peak, 1e-6),
        extent=(0, width, height, 0),
        interpolation="bilinear",
    )
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.7, aspect=20, ticks=[0, peak])
    bar.ax.set_yticklabels(["0", f"{peak:.3f}"], fontsize=7, color=SOFT)
    bar.ax.spines["outline"].set_visible(False)
    _title(axes, f"“{answer.prompt}”: heat map")


def _draw_prompts(axes: Axes, image: NDArray[np.uint8], answer: Answer, found: Objects) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    _show(axes, image)
    rows, columns = answer.heat.shape
    for index, prompt in enumerate(answer.prompts):
        colour = _COLOURS[index % len(_COLOURS)]
        placed = prompt.scaled(width / columns, height / rows)
        left, top, right, bottom = placed.box
        edge: dict[str, Any] = {"edgecolor": colour, "facecolor": "none", "linewidth": 1.5}
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, **edge))
        _paint(axes, prompt.region, colour, strength=0.3)
        for label, marker, face in ((1, "*", "white"), (0, "X", RED)):
            x, y = placed.points[placed.labels == label].T + 0.5
            axes.scatter(x, y, s=55, marker=marker, c=face, edgecolors=INK, linewidths=0.7)
    told = f"{len(answer.prompts)} objects prompted" if answer.prompts else "no prompt: not there"
    _title(axes, told.replace("1 objects", "1 object"))


def _draw_masks(axes: Axes, image: NDArray[np.uint8], answer: Answer, found: Objects) -> None:
    _show(axes, image)
    for index, thing in enumerate(found):
        _paint(axes, thing.mask, _COLOURS[index % len(_COLOURS)])
    verdict = f"{len(found)} found" if found else f"absent: {answer.reason}"
    _title(axes, f"{verdict} (presence {answer.presence:.2f})")


def _summary(findings: Findings) -> str:
    absent = [f"“{a.prompt}” ({a.reason})" for a in findings.answers if not a.present]
    found = f"{len(findings.objects)} found" if findings.objects else "Nothing found"
    return found + (f"; absent: {', '.join(absent)}" if absent else "")


def _drawable(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`image` no larger than it can be seen."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((_WIDEST, _WIDEST))
    return np.asarray(picture)


def _show(axes: Axes, image: NDArray[np.uint8]) -> None:
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _paint(axes: Axes, mask: NDArray[np.bool_], colour: str, strength: float = 0.5) -> None:
    """`mask`, of whatever size, over the whole of `axes`: tinted, with an outline."""
    from matplotlib.colors import to_rgb
    from PIL import Image
    from scipy import ndimage

    width, height = (round(abs(b - a)) for a, b in (axes.get_xlim(), axes.get_ylim()))
    picture = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    inside = np.asarray(picture)
    layer = np.zeros((*inside.shape, 4))
    layer[..., :3] = to_rgb(colour)
    layer[inside, 3] = strength
    thick = max(1, round(max(inside.shape) / 300))
    layer[inside & ~ndimage.binary_erosion(inside, iterations=thick), 3] = 1.0
    axes.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")


def _title(axes: Axes, text: str) -> None:
    lines = textwrap.wrap(text, int(_CELL / CHARACTER))
    axes.set_title("\n".join(lines), loc="left", fontsize=8, color=INK, parse_math=False)
