"""Figures of a segmentation: every stage from sentence to mask, and the masks over the image."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    TEXT_LINE,
    create_figure,
    make_drawable,
    use_plain_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from labkit.segment.results import Segmentation, SegmentedObject, SentenceResult

_LONGEST = 900  # pixels of the longer side, as drawn
_CELL = 3.0  # inches wide
_OVERLAY_WIDTH, _OVERLAY_HEIGHT, _NARROWEST = 6.5, 8.0, 2.2  # inches
_MAX_NAMED = 12  # objects with their sentence beside them; more have numbers
_MAX_LABEL, _MAX_QUOTE = 40, 100  # characters of a sentence, on an object and in a title
# Okabe and Ito's colours, apart for readers of any colour vision.
_STANDS_OUT = 45.0  # distance in CIELAB of a colour from the pixels that it tints
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


@use_plain_text()
def draw_overlay(segmentation: Segmentation) -> Figure:
    """Draw the image under every mask, each in its colour and named, and say what is absent.

    Many objects are numbered, and the title says which numbers a sentence has.

    Example:
        >>> from labkit import Segmentation
        >>> nothing = Segmentation(image=np.zeros((40, 60, 3), np.uint8), sentences=())
        >>> draw_overlay(nothing).axes[0].get_title(loc="left")
        'Nothing found'
    """
    image = _shrink(segmentation.image)
    height, width = image.shape[:2]
    image_width = min(_OVERLAY_WIDTH, _OVERLAY_HEIGHT * width / height)
    figure_width = max(image_width, _NARROWEST)
    line_length = int(figure_width / (CHARACTER * 9 / 8))  # of 9-point text
    lines = textwrap.wrap(_summarize(segmentation), line_length)
    figure_height = image_width * height / width + 0.25 + 0.17 * len(lines)
    figure = create_figure(figure_width, figure_height, segmentation.note)
    axes = figure.subplots()
    _show(axes, image)
    colours = _paint_objects(axes, image, segmentation)
    _name_objects(axes, segmentation, colours, width / image_width)
    axes.set_title("\n".join(lines), loc="left", fontsize=9, color=INK, parse_math=False)
    return figure


def _name_objects(
    axes: Axes, segmentation: Segmentation, colours: Sequence[str], pixels_per_inch: float
) -> None:
    """Write the name of each object, or its number where there are many, near it.

    Args:
        axes: as wide and high, in data units, as the image that is shown.
        segmentation: the objects.
        colours: of each of them.
        pixels_per_inch: of the image that is shown.
    """
    if not len(segmentation):
        return
    names = [make_drawable(segmented.sentence, _MAX_LABEL) for segmented in segmentation]
    if len(names) > _MAX_NAMED:
        names = [str(number) for number in range(1, len(names) + 1)]
    width, height = _measure_axes(axes)
    boxes = segmentation.boxes * (width / segmentation.image.shape[1])
    sizes = np.array([(CHARACTER * len(name) + 0.14, TEXT_LINE + 0.08) for name in names])
    places = place_labels(boxes, sizes * pixels_per_inch, (width, height))
    for (x, y), name, colour in zip(places, names, colours, strict=True):
        box = {"boxstyle": "round,pad=0.2", "facecolor": colour, "edgecolor": "white"}
        text = {**SMALL, "color": pick_text_colour(colour)}
        inset = 0.05 * pixels_per_inch
        axes.text(x + inset, y + inset, name, bbox=box, va="top", clip_on=True, **text)


def place_labels(
    boxes: NDArray[np.float64], sizes: NDArray[np.float64], frame: tuple[float, float]
) -> NDArray[np.float64]:
    """Find places for labels beside their boxes, where they cover neither each other nor the edge.

    The smallest box chooses first: above it, inside, below, or beside it. If another label is in
    each of these places, the nearest free one in the frame is taken.

    Args:
        boxes: (N, 4) XYXY.
        sizes: (N, 2), width and height of each label.
        frame: width and height of the image, in the same units.

    Returns:
        Upper left corners (N, 2). Where the frame has no room, labels cover each other.

    Example:
        >>> boxes = np.array([[10.0, 30, 40, 60], [12, 30, 30, 50]])
        >>> place_labels(boxes, np.array([[20.0, 8], [20, 8]]), (100, 100)).tolist()
        [[10.0, 30.0], [12.0, 22.0]]
    """
    room = np.maximum(np.array(frame) - sizes, 0)  # (N, 2): the farthest corner of each label
    places = np.zeros((len(boxes), 2))
    taken: list[int] = []
    for index in np.argsort(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable"):
        (left, top, right, bottom), (width, height) = boxes[index], sizes[index]
        near = [(left, top - height), (left, top), (left, bottom), (right - width, top - height)]
        near += [(right, top), (left - width, top), (left, bottom - height)]
        x, y = (np.arange(0, limit + 1, height / 2) for limit in room[index])
        anywhere = np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)
        distance = ((anywhere - (left, top)) ** 2).sum(axis=1)
        choices = np.clip([*near, *anywhere[np.argsort(distance, kind="stable")]], 0, room[index])
        low = np.maximum(choices[:, None], places[taken])
        high = np.minimum(choices[:, None] + sizes[index], places[taken] + sizes[taken])
        covered = np.prod(np.maximum(high - low, 0), axis=2).sum(axis=1)
        places[index] = choices[covered.argmin()]
        taken.append(int(index))
    return places


def pick_text_colour(colour: str) -> str:
    """Black or white, whichever is easier to read on `colour` (by the contrast of WCAG 2).

    Example:
        >>> pick_text_colour("#F0E442"), pick_text_colour("#0072B2")
        ('black', 'white')
    """
    from matplotlib.colors import to_rgb

    levels = np.array(to_rgb(colour))
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _paint_objects(
    axes: Axes, image: NDArray[np.uint8], objects: Iterable[SegmentedObject]
) -> list[str]:
    """Tint each object over the image in `axes`; return the colours."""
    height, width = image.shape[:2]
    masks = [_resize_mask(segmented.mask, width, height) for segmented in objects]
    colours = _pick_colours(image, masks)
    for mask, colour in zip(masks, colours, strict=True):
        _paint(axes, mask, colour)
    return colours


def _pick_colours(image: NDArray[np.uint8], masks: Sequence[NDArray[np.bool_]]) -> list[str]:
    """A colour for each mask that stands out from its pixels, the least used of these."""
    from matplotlib.colors import to_rgb
    from skimage.color import rgb2lab

    palette, lab = rgb2lab([to_rgb(colour) for colour in _COLOURS]), rgb2lab(image)
    uses = np.zeros(len(_COLOURS), dtype=int)
    colours = []
    for mask in masks:
        seen = lab[mask].mean(axis=0) if mask.any() else lab.mean(axis=(0, 1))
        distance = ((palette - seen) ** 2).sum(axis=1) ** 0.5
        close = np.maximum(_STANDS_OUT - distance, 0)  # 0 for all that stand out
        best = int(np.lexsort((uses, close))[0])
        uses[best] += 1
        colours.append(_COLOURS[best])
    return colours


@use_plain_text()
def draw_stages(segmentation: Segmentation, *stages: str, sentences: Sequence[str] = ()) -> Figure:
    """Draw a row for each sentence: its heat map, the prompts made of it, the masks.

    Args:
        segmentation: whose stages are drawn.
        stages: heat, prompts or masks; by default all.
        sentences: those of which a row is drawn; by default all.

    Raises:
        InputError: a stage is another, or a sentence was not asked.
    """
    results = [segmentation[s] for s in sentences] or segmentation.sentences
    return _draw_rows(segmentation, [("", result) for result in results], stages)


@use_plain_text()
def draw_ways(ways: Mapping[str, Segmentation], sentence: str) -> Figure:
    """Draw what became of one sentence in several ways: a row each, with its heat and its masks.

    Args:
        ways: segmentations of the same image, by what is different about each.
        sentence: asked in all of them.
    """
    rows = [(f"{way}: ", found[sentence]) for way, found in ways.items()]
    return _draw_rows(next(iter(ways.values())), rows, ("heat", "masks"))


def _draw_rows(
    segmentation: Segmentation, rows: Sequence[tuple[str, SentenceResult]], stages: Sequence[str]
) -> Figure:
    """Draw the stages of each result over the image; what each row is called stands before it."""
    draw = {"heat": _draw_heat, "prompts": _draw_prompts, "masks": _draw_masks}
    shown = stages or tuple(draw)
    if unknown := set(shown) - set(draw):
        raise InputError(f"stages must be among {', '.join(draw)}, got {sorted(unknown)}")
    image = _shrink(segmentation.image)
    height, width = image.shape[:2]
    cell_height = _CELL * min(height / width, 1.6)
    cell_width = max(cell_height * width / height, _CELL * 0.6)
    figure = create_figure(
        len(shown) * (cell_width + 0.3), len(rows) * (cell_height + 0.75), segmentation.note
    )
    grid = figure.subplots(len(rows), len(shown), squeeze=False)
    for cells, (name, result) in zip(grid, rows, strict=True):
        for column, (axes, stage) in enumerate(zip(cells, shown, strict=True)):
            title = ("" if column else name) + draw[stage](axes, image, result)
            text = "\n".join(textwrap.wrap(title, int(cell_width / CHARACTER)))
            axes.set_title(text, loc="left", fontsize=8, color=INK, parse_math=False)
    return figure


def _draw_heat(axes: Axes, image: NDArray[np.uint8], result: SentenceResult) -> str:
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
    return f"{_quote(result)}: heat map"


def _draw_prompts(axes: Axes, image: NDArray[np.uint8], result: SentenceResult) -> str:
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
    return prompted if count else "no prompt: not there"


def _draw_masks(axes: Axes, image: NDArray[np.uint8], result: SentenceResult) -> str:
    _show(axes, image)
    _paint_objects(axes, image, result.objects)
    verdict = f"{len(result.objects)} found" if result.objects else f"absent: {result.reason}"
    assumed = "assumed, " if result.assumed else ""
    return f"{verdict} ({assumed}presence {result.presence:.2f})"


def _summarize(segmentation: Segmentation) -> str:
    absent = [f"{_quote(r)} ({r.reason})" for r in segmentation.sentences if not r.present]
    found = f"{len(segmentation)} found" if len(segmentation) else "Nothing found"
    if len(segmentation) > _MAX_NAMED:
        found += f": {', '.join(_list_numbers(segmentation))}"
    return found + (f"; absent: {', '.join(absent)}" if absent else "")


def _list_numbers(segmentation: Segmentation) -> Iterator[str]:
    """Each sentence with the numbers of its objects, such as “dog” 3–5."""
    first = 1
    for result in segmentation.sentences:
        last = first + len(result.objects) - 1
        if last >= first:
            yield f"{_quote(result)} {first}" + (f"–{last}" if last > first else "")
        first = last + 1


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


def _resize_mask(mask: NDArray[np.bool_], width: int, height: int) -> NDArray[np.bool_]:
    import cv2

    size = (width, height)
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT) > 0


def _measure_axes(axes: Axes) -> tuple[int, int]:
    """Width and height of `axes` in data units, which are pixels of the image shown."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    return round(abs(right - left)), round(abs(top - bottom))


def _paint(axes: Axes, mask: NDArray[np.bool_], colour: str, strength: float = 0.5) -> None:
    """Tint `mask`, of any size, over the whole of `axes`, with an outline inside a white one."""
    import cv2
    from matplotlib.colors import to_rgb

    width, height = _measure_axes(axes)
    small = _resize_mask(mask, width, height)
    thickness = max(1, round(max(small.shape) / 300))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = small.astype(np.uint8)
    core = cv2.erode(
        inside, cross, iterations=thickness, borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    layer = np.zeros((*small.shape, 4))
    layer[cv2.dilate(inside, cross, iterations=thickness) > inside] = 1.0  # white
    layer[small] = (*to_rgb(colour), strength)
    layer[inside > core, 3] = 1.0
    axes.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")
