"""Pieces of an HTML page that needs no script: tables, legends, and SVG drawings whose colours are CSS variables.

A colour is a variable's name (`after`, `c3`), so that the style sheet alone knows of light and dark. Everything that
comes from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from puna.quant.score import Estimate

WIDTH, LEFT = 760, 76  # of a large drawing, and of the names on its left
BARS, NAMES, FIGURES = 480, 100, 84  # of a drawing of bars, of the names on its left, of the figures on its right
ROW, GAP = 22, 8  # a bar, and between two
CERTAIN = 2  # standard errors a whisker reaches each way

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f1f4f8; --ink: #1d2330; --soft: #5b6475; --line: #d5dae3;
  --good: #2e7d43; --bad: #c62828; --c0: #3a6ea8; --c1: #d9731a; --c2: #3f8f4f; --c3: #8a5a96; --c4: #a07c10;
  --c5: #cf5f74; --c6: #35858a; --c7: #6a7180; --after: #3a6ea8; --rounding: #d9731a; --before: #9aa1ad; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --card: #1e232c; --ink: #e6e9ef; --soft: #a3abba;
  --line: #333a47; --good: #6cc483; --bad: #ff6b62; --c0: #5b93d0; --c1: #ee9146; --c2: #5fb371; --c3: #b285bf;
  --c4: #d8b341; --c5: #e88497; --c6: #57aeb3; --c7: #8d95a3; --after: #5b93d0; --rounding: #ee9146;
  --before: #757d8b; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto;
  max-width: 940px; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
p { color: var(--soft); margin: .2rem 0; } p.good { color: var(--good); } p.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.8rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--card); border-radius: 6px; padding: .5rem .7rem; }
.tiles b { display: block; white-space: nowrap; } .tiles span { color: var(--soft); font-size: .85rem; }
svg { display: block; width: 100%; max-width: 620px; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg line { stroke: var(--line); } svg .error { stroke: var(--ink); stroke-width: 1.5; }
.wide { overflow-x: auto; } svg.large { min-width: 620px; max-width: none; }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; }
li::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  background: var(--of); border-radius: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } summary { cursor: pointer; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th, table.grid td { white-space: nowrap; } th { font-weight: 600; overflow-wrap: normal; }
pre { overflow-x: auto; background: var(--card); padding: .6rem; border-radius: 6px; font-size: .85rem; }
@media (max-width: 600px) { table.grid { font-size: .8rem; } th, td { padding-right: .5rem; }
  table.short th, table.short td { white-space: normal; overflow-wrap: normal; } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def html_page(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    return _PAGE.format(title=escape(title), style=STYLE, body="\n".join(part for part in parts if part))


def paragraph(text: str, kind: str = "") -> str:
    """A line of text; `kind`: good or bad."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def html_table(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kind: str = "grid") -> str:
    """The first cell of a row is its name. With a head, cells stay on one line and a narrow screen scrolls.

    kind: `grid`, or `grid short`, whose cells break on a narrow screen.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        rest = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[1:])
        return f'<tr><th scope="row">{escape(cells[0])}</th>{rest}</tr>'

    body = "".join(line(row, "td") for row in rows)
    table = f'<table class="{kind}">{line(head, "th")}' if head else "<table>"
    return f'<div class="wide">{table}{body}</table></div>'


def folded(summary: str, inside: str) -> str:
    """Closed until somebody opens it."""
    return f"<details><summary>{escape(summary)}</summary>\n{inside}\n</details>"


def legend(names: Iterable[tuple[str, str]]) -> str:
    """(colour, name) pairs."""
    items = "".join(f'<li style="--of: var(--{colour})">{escape(name)}</li>' for colour, name in names)
    return f"<ul>{items}</ul>"


def drawing(name: str, height: float, marks: Iterable[str], large: bool = True) -> str:
    """An SVG; a `large` one is as wide as the page, and on a phone scrolled rather than shrunk."""
    kind = ' class="large"' if large else ""
    box = f'viewBox="0 -8 {WIDTH if large else BARS} {height + 12:g}" role="img" aria-label="{escape(name)}"'
    return f'<div class="wide"><svg{kind} {box}>\n' + "\n".join(marks) + "\n</svg></div>"


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Words at a point; anchor: start, middle or end."""
    soft = f' class="{kind}"' if kind else ""
    return f'<text{soft} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "", colour: str = "") -> str:
    """A straight line; thin and grey unless kind or colour say otherwise."""
    kind = f' class="{kind}"' if kind else ""
    style = f' style="stroke: var(--{colour})"' if colour else ""
    return f'<line{kind}{style} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def rectangle(x: float, y: float, width: float, height: float, colour: str, tip: str) -> str:
    """A filled box with a tool tip."""
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{height:.1f}"'
    return f'<rect {place} style="fill: var(--{colour})"><title>{escape(tip)}</title></rect>'


def circle(x: float, y: float, radius: float, colour: str, tip: str, ring: bool = False) -> str:
    """A dot, or a ring."""
    fill = f"fill: var(--paper); stroke: var(--{colour}); stroke-width: 1.2" if ring else f"fill: var(--{colour})"
    title = f"<title>{escape(tip)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" style="{fill}">{title}</circle>'


def bars(name: str, points: Mapping[str, Estimate], colours: Mapping[str, str], words: Mapping[str, str]) -> str:
    """Horizontal bars from zero with whiskers. `words`: what stands beside a bar."""
    ends = [value.value + sign * CERTAIN * (value.error or 0) for value in points.values() for sign in (-1, 0, 1)]
    finite = [0.0, *(end for end in ends if math.isfinite(end))]
    scale = (BARS - NAMES - FIGURES) / ((max(finite) - min(finite)) or 1)
    zero = NAMES - min(finite) * scale
    marks = []
    for row, (label, value) in enumerate(points.items()):
        marks.append(text(NAMES - 8, row * (ROW + GAP) + 15, label, "end"))
        marks += _bar(row * (ROW + GAP), zero, scale, value, colours[label], words[label])
    height = len(points) * (ROW + GAP)
    return drawing(name, height, [*marks, line(zero, -4, zero, height - GAP + 4)], large=False)


def _bar(y: float, zero: float, scale: float, value: Estimate, colour: str, words: str) -> list[str]:
    if not math.isfinite(value.value):
        return [text(zero + 6, y + 15, words)]
    reach = CERTAIN * (value.error or 0)
    reach = reach if math.isfinite(reach) else 0.0
    end = zero + value.value * scale
    marks = [rectangle(min(zero, end), y, abs(end - zero), ROW, colour, words)]
    if reach:
        left, right, middle = end - reach * scale, end + reach * scale, y + ROW / 2
        marks += [line(x, y + 6, x, y + ROW - 6, "error") for x in (left, right)]
        marks.append(line(left, middle, right, middle, "error"))
    return [*marks, text(max(zero, end + reach * scale) + 6, y + 15, words)]
