from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from labkit.report import Table, write_report
from labkit.runtime import InputError
from tests.strange_text import STRANGE_NAMES

pytestmark = pytest.mark.filterwarnings("ignore:.* deprecated - use:DeprecationWarning")


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write_page(
    folder: Path,
    *,
    title: str = "A run",
    note: str = "",
    facts: Mapping[str, str] | None = None,
    tables: Mapping[str, Table] | None = None,
) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().imshow(np.eye(3))
    path = folder / "report.html"
    write_report(
        path,
        title=title,
        note=note,
        facts=facts or {"epochs": "3"},
        figures={"A diagonal": figure},
        tables=tables or {"Scores": Table(("class", "recall"), [("cat", 0.5)])},
    )
    return path.read_text(encoding="utf-8")


def test_text_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"<b>\""
    page = Page(
        write_page(
            tmp_path,
            title=evil,
            note=evil,
            facts={evil: evil},
            tables={evil: Table((evil,), [(evil,)])},
        )
    )
    assert not page.all("script") and not page.all("b")
    # title, heading, note, fact and its value, caption, column and cell
    assert page.text.count(evil) == 8


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_strange_text_is_shown_or_escaped_on_the_page(tmp_path: Path, name: str) -> None:
    table = Table((name,), [(name,)])
    html = write_page(tmp_path, title=name, note=name, facts={name: name}, tables={name: table})
    allowed = {"\n", "\t", "\u200d"}
    hidden = {letter for letter in html + table._repr_html_() if not letter.isprintable()}
    assert hidden <= allowed
    if name.isprintable() and name.strip():
        assert [text for text in Page(html).text if text == name.strip()]


def test_hidden_characters_stand_as_their_escapes(tmp_path: Path) -> None:
    html = write_page(tmp_path, title="a \a b \x9b c caf\udce9 \u202egnp")
    assert r"a \x07 b \x9b c caf\udce9 \u202egnp" in html


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html = write_page(tmp_path, note="demo")
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http://" not in html and "https://" not in html
    assert "url(" not in html and "@import" not in html
    policies = [meta for meta in page.all("meta") if "http-equiv" in meta]
    assert policies[0]["content"].startswith("default-src 'none'")


def test_figures_are_embedded_with_alternative_text(tmp_path: Path) -> None:
    from PIL import Image

    (tag,) = Page(write_page(tmp_path)).all("img")
    assert tag["alt"] == "A diagonal"
    kind, _, payload = tag["src"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(payload, validate=True))) as image:
        image.load()
        assert image.size == (384, 192)  # 2 × 1 inches, two device pixels for a CSS pixel
    assert tag["width"] == "192"


def test_banner_is_shown_only_with_a_note(tmp_path: Path) -> None:
    assert not [p for p in Page(write_page(tmp_path)).all("p") if p.get("class") == "note"]
    page = Page(write_page(tmp_path, note="demo: scenes"))
    assert [p for p in page.all("p") if p.get("class") == "note"]
    assert "demo: scenes" in page.text


def test_cells_are_written_for_people_and_numbers_stand_right(tmp_path: Path) -> None:
    rows = [("cat", 0.123456, 1000), ("dog", 123456.7, None)]
    page = Page(write_page(tmp_path, tables={"Scores": Table(("class", "recall", "n"), rows)}))
    assert page.text[-6:] == ["cat", "0.1235", "1000", "dog", "123457", "–"]
    assert [cell.get("class") for cell in page.all("th")] == [None, "number", "number"]
    assert [cell.get("class") for cell in page.all("td")][:3] == [None, "number", "number"]


def test_empty_report_is_a_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(
        path, title="Bare", note="", facts={}, figures={}, tables={"None": Table(("a",), [])}
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert "Bare" in page.text
    assert not page.all("dl") and not page.all("img") and not page.all("td")


def test_same_input_gives_the_same_file(tmp_path: Path) -> None:
    assert write_page(tmp_path / "a") == write_page(tmp_path / "b")


def test_table_with_a_ragged_row_is_rejected() -> None:
    with pytest.raises(InputError, match="row 1 has 1 cells for 2"):
        Table(("a", "b"), [(1, 2), (3,)])
