"""The report of a run: one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.files import write_text
from labkit.runtime import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None
CSS_PIXELS_PER_INCH = 96


@dataclass(frozen=True)
class Table:
    """A table for a report or a notebook.

    Attributes:
        columns: the names of the C columns.
        rows: rows of C cells each. Text is aligned left, numbers right; None becomes a dash.

    Raises:
        InputError: a row has more or fewer cells than there are columns.

    Example:
        >>> table = Table(("class", "recall"), [("cat", 0.5), ("dog", None)])
        >>> table.rows[0]
        ('cat', 0.5)
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise InputError(
                    f"table row {index} has {len(row)} cells for {len(self.columns)} columns"
                )

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = (
            "".join(f"<td>{escape(_format_cell(cell))}</td>" for cell in row) for row in self.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        html = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return escape_controls(html)


# Controls but tab and line breaks, marks that turn the direction of writing, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --ink: #1f2430; --soft: #5b6472; --paper: #fff; --line: #e3e6ea; --tint: #f6f7f9;
        --warn-ink: #6b4a00; --warn: #fff4d6; --warn-line: #e69f00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #a3acba; --paper: #14171c; --line: #2e343d; --tint: #1c2027;
          --warn-ink: #ffd479; --warn: #33270a; --warn-line: #b37b00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
       background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
.note { margin: 0 0 1.25rem; padding: .6rem .9rem; border-left: 4px solid var(--warn-line);
        border-radius: 4px; color: var(--warn-ink); background: var(--warn); font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .5rem;
     margin: 0 0 2rem; }
dl div { padding: .55rem .8rem; border-radius: 6px; background: var(--tint); }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
figure { margin: 2rem 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 6px; background: #fff; }
figcaption { margin-bottom: .5rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
th { color: var(--soft); font-weight: 600; }
.number { text-align: right; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if note %}<p class="note" role="note">{{ note }}</p>
{% endif %}
{% if facts %}<dl>
{% for name, value in facts.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% endif %}
{% for name, image in figures.items() %}<figure>
<figcaption>{{ name }}</figcaption>
<img src="data:image/png;base64,{{ image.png }}" width="{{ image.width }}" alt="{{ name }}">
</figure>
{% endfor %}
{% for name, table in tables.items() %}<figure>
<figcaption>{{ name }}</figcaption>
<div class="scroll" tabindex="0" role="region" aria-label="{{ name }}"><table>
<thead><tr>
{% for column in table.columns %}
<th{% if table.rows and table.rows[0][loop.index0] is number %} class="number"{% endif %}>
{{- column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}<tr>
{% for cell in row %}
<td{% if cell is number %} class="number"{% endif %}>{{ cell|text }}</td>
{% endfor %}
</tr>{% endfor %}
</tbody>
</table></div>
</figure>
{% endfor %}
</main>
</body>
</html>
"""


def write_report(
    path: Path,
    *,
    title: str,
    note: str,
    facts: Mapping[str, str],
    figures: Mapping[str, Figure],
    tables: Mapping[str, Table],
) -> None:
    """Write a page of facts, figures and tables to `path`, atomically and in the given order.

    All text is escaped, figures are embedded, and the page's own policy forbids it to load
    anything. Control characters and lone surrogates are shown as their escapes.

    Args:
        path: the HTML file.
        title: the heading.
        note: a banner below the heading, such as "demo: procedural scenes", or "".
        facts: short texts by their names.
        figures: figures by their captions, which are the alternative texts too.
        tables: tables by their captions.

    Raises:
        SourceError: the file could not be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> facts = {"accuracy": "93.1 %"}
        >>> write_report(path, title="A run", note="", facts=facts, figures={}, tables={})
        >>> "93.1 %" in path.read_text()
        True
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["text"] = _format_cell
    images = {name: _encode_figure(figure) for name, figure in figures.items()}
    page = environment.from_string(_PAGE)
    html = page.render(title=title, note=note, facts=facts, figures=images, tables=tables)
    write_text(path, escape_controls(html))


def escape_controls(text: str) -> str:
    r"""Replace what no page can show by its escape: control characters and lone surrogates.

    Marks that turn the direction of writing are replaced too, because they could hide text.

    Example:
        >>> escape_controls("a bell \a in caf\udce9")
        'a bell \\x07 in caf\\udce9'
    """
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _encode_figure(figure: Figure) -> dict[str, str | int]:
    """Return a figure as PNG in base64, and its width in CSS pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * CSS_PIXELS_PER_INCH, metadata={"Software": None})
    width = round(figure.get_figwidth() * CSS_PIXELS_PER_INCH)
    return {"png": base64.b64encode(buffer.getvalue()).decode("ascii"), "width": width}


def _format_cell(cell: Cell) -> str:
    """Return `cell` as text; a float keeps four digits, and all digits before the point."""
    if cell is None:
        return "–"
    if isinstance(cell, Real) and not isinstance(cell, Integral):
        return f"{cell:.4g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)
