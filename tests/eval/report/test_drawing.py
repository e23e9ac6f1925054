"""Pictures as markup: text is text, colours are the page's, ids are their own."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from eval.report.drawing import INK, SERIES, drawing, new_figure, short, svg
from eval.report.figures import Grid
from eval.report.heat import cell, heat_map, strips
from eval.report.plots import Point, frontier

pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

ODD = '</svg><script>alert(1)</script> $x_1$ id="p" #010203'


def parsed(markup: str) -> ET.Element:
    """As XML, which is stricter than a page."""
    return ET.fromstring(markup.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))


def texts(markup: str) -> list[str]:
    return ["".join(each.itertext()) for each in parsed(markup).iter("text")]


def plain(name: str) -> str:
    with drawing():
        figure = new_figure(200, 100)
        axes = figure.add_axes((0.2, 0.2, 0.7, 0.7))
        axes.plot([0, 1], [0, 1], color=SERIES[0], marker="o")
        axes.text(0.5, 0.5, ODD, color=INK)
        return svg(figure, name, f"alt {ODD}")


def test_text_stays_text_whatever_it_is():
    assert ODD in texts(plain("one"))
    assert parsed(plain("one")).get("aria-label") == f"alt {ODD}"


def test_equal_figures_have_equal_bytes_and_ids_of_their_own():
    assert plain("one") == plain("one")
    ids = [{each.get("id") for each in parsed(plain(name)).iter() if each.get("id")} for name in ("one", "two")]
    assert ids[0].isdisjoint(ids[1])
    used = {each.get("{http://www.w3.org/1999/xlink}href", "#")[1:] for each in parsed(plain("one")).iter("use")}
    assert used <= ids[0]


def test_colours_are_those_of_the_page():
    markup = plain("one")
    assert "var(--c0)" in markup
    assert "var(--ink)" in markup
    assert "DejaVu" not in markup


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("retrieval", "retrieval"),
        ("a" * 31, f"{'a' * 15}…{'a' * 14}"),
        ("two\nlines\tand\x00 more", "two lines and more"),
    ],
)
def test_names_are_shown_on_one_line_of_thirty_letters_at_most(name, shown):
    assert short(name) == shown
    assert len(short(name)) <= 30


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.004, "0"),
        (0.5, ".50"),
        (0.873, ".87"),
        (0.996, "1"),
        (1, "1"),
        (1.25, "1.2"),
        (12.4, "12"),
        (-0.5, "\N{MINUS SIGN}.50"),
    ],
)
def test_figures_in_cells_have_two_digits(value, shown):
    assert cell(value) == shown


def test_a_heat_map_has_its_labels_and_its_figures():
    grid = Grid(("row", ODD), ("a", "b"), np.array([[0.25, np.nan], [1.0, 0.75]]), ((0, 0),))
    with drawing():
        seen = texts(heat_map(grid, "h", "alt", label="mean score"))
    assert {"row", "a", "b", ".25", ".75", "mean score"} <= set(seen)


@pytest.mark.parametrize("values", [[[0.0]], [[np.nan, 2.0]], [[-3.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
@pytest.mark.parametrize("kind", ["score", "share"])
def test_any_figures_can_be_drawn(values, kind):
    array = np.array(values)
    rows, columns = (tuple(f"{kind} {k}" for k in range(n)) for n in array.shape)
    with drawing():
        parsed(heat_map(Grid(rows, columns, array), "h", "alt", label="x", kind=kind))


def test_strips_name_the_most_used_experts_and_count_the_others():
    experts = [f"expert {k}" for k in range(12)]
    tokens = tuple(k for k in range(12) for _ in range(12 - k))
    with drawing():
        seen = texts(strips([("a prompt", tokens)], experts, "s", "alt"))
    assert {"a prompt", "expert 0", "expert 6", "5 others"} <= set(seen)
    assert "expert 7" not in seen


@pytest.mark.parametrize("times", [(50.0, 50.0), (50.0, 60.0), (2.0, 900.0), (0.01, 100_000.0)])
def test_an_axis_of_times_has_some_round_figures(times):
    points = [Point(str(k), 0.5, 0.4, 0.6, ms) for k, ms in enumerate(times)]
    with drawing():
        seen = texts(frontier(points, "f", "alt"))
    figures = [text for text in seen if text.replace(",", "").replace(".", "").isdigit()]
    assert len(figures) > 4  # of both axes
