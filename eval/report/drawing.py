"""From matplotlib to SVG inside a page: text stays text, colours are the page's own, equal figures have equal bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What is drawn in these is shown in the page's colours, light or dark: `var(--ink)` and so on.
INK, MUTED, RULE, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
#: Told apart with any colour vision (Okabe and Ito 2008); `var(--c0)` ... of the page.
SERIES = ("#0d0e01", "#0d0e02", "#0d0e03", "#0d0e04", "#0d0e05", "#0d0e06", "#0d0e07")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_NAMES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", **{c: f"c{k}" for k, c in enumerate(SERIES)}}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # what is measured with; the page's own font is narrower
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "moerge",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def drawing() -> Iterator[None]:
    """While this is entered, figures are drawn in our style; letters that no font of ours has are left to the page."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def new_figure(width: float, height: float) -> Figure:
    """In points, as the SVG has them."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=144)


def svg(figure: Figure, name: str, alt: str) -> str:
    """An `<svg>` for a page, ids made unique by `name`; `alt` is what those hear who do not see it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"<!--.*?-->|<(metadata|style).*?</\1>", "", out.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    body = re.sub(r"<[^>]*>", lambda tag: _inlined(tag[0], name), text[text.index(">") + 1 :])
    body = re.sub(r"\s*\n\s*", " ", body).strip()
    alt = escape(alt, quote=True)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="--width: {width:g}pt" role="img" aria-label="{alt}">\n{body}\n'
    )


def _inlined(tag: str, name: str) -> str:
    """A tag with ids of its own, and the page's colours and font."""
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', tag)
    tag = re.sub(r'(href="#|url\(#)([^")]+)', rf"\1{name}-\2", tag)
    tag = re.sub(r"#0[0-9a-f]{5}", lambda found: f"var(--{_NAMES[found[0]]})" if found[0] in _NAMES else found[0], tag)
    tag = re.sub(r" font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"(font: [^;\"]*px) [^;\"]*", r"\1 var(--sans)", tag)
    return re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag)


def short(name: str, most: int = 30) -> str:
    """On one line, its middle left out where it is long."""
    name = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    if len(name) <= most:
        return name
    return f"{name[: (most - 1) // 2 + 1].rstrip()}…{name[-(most // 2 - 1) :].lstrip()}"
