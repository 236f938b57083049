"""A plan as one HTML file that needs nothing else: no network, no script. Readable in light and in dark.

Two drawings as SVG, the pipeline's schedule and each rank's memory, and the figures as tables. Colours are classes, so
that the style sheet alone knows of light and dark; what a colour says stands in a legend, a tool tip and a table too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from puna.parallel.job import Job
from puna.parallel.machines import GIB, Machine
from puna.parallel.memory import Memory
from puna.parallel.picture import NAMES, drawn_timeline
from puna.parallel.schedules import Event
from puna.parallel.throughput import Throughput

WIDTH, LEFT, RIGHT = 1000, 56, 64  # of a drawing, of its labels left of the axis and of the totals right of the bars
ROW, GAP, AXIS = 22, 4, 34  # a rank's bar, between two, and the axis below them, with its name
NARROWEST = 13  # a box this wide holds its number
Rows = Sequence[tuple[str, ...]]

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2330; --soft: #5b6475; --line: #d5dae3;
  --limit: #c62828; --c0: #3a6ea8; --c1: #d9731a; --c2: #3f8f4f; --c3: #8a5a96; --c4: #b8921a; --c5: #cf5f74;
  --c6: #35858a; --c7: #9aa1ad; --c8: #6a7180; --f0: #3a6ea8; --f1: #8fb8dd; --b0: #d9731a; --b1: #f3b27a;
  --w0: #3f8f4f; --w1: #96cf9f; --on-f0: #ffffff; --on-f1: #14171d; --on-b0: #14171d; --on-b1: #14171d;
  --on-w0: #ffffff; --on-w1: #14171d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e6e9ef; --soft: #a3abba; --line: #333a47;
  --limit: #ff6b62; --c0: #5b93d0; --c1: #ee9146; --c2: #5fb371; --c3: #b285bf; --c4: #d8b341; --c5: #e88497;
  --c6: #57aeb3; --c7: #757d8b; --c8: #565d6a; --f0: #5b93d0; --f1: #37597f; --b0: #ee9146; --b1: #8d5426;
  --w0: #5fb371; --w1: #35663f; --on-f0: #14171d; --on-f1: #ffffff; --on-b0: #14171d; --on-b1: #ffffff;
  --on-w0: #14171d; --on-w1: #ffffff; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1040px; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; } p { color: var(--soft); margin: .2rem 0; }
svg { display: block; width: 100%; min-width: 640px; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); } svg .n { font-size: 9px; } svg line { stroke: var(--line); }
svg .limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 6 4; }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .4rem 0; }
li::before { content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  background: var(--of); border-radius: 2px; }
div { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } .number { text-align: right; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
# Colour of a box by what it is, and 0 or 1 for its rank's first or a later chunk; `on-` it that of its number.
BOXES = {"F": "f", "B": "b", "I": "b", "W": "w"}


def plan_page(
    path: str | Path, job: Job, gpu: Machine, memory: Sequence[Memory], speed: Throughput, title: str, figures: Rows
) -> Path:
    """Write the page of a plan to `path` and return it. `figures`: (name, value) rows. Raises OSError."""
    parts = [f"<h1>{escape(title)}</h1>"]
    if job.degrees.pp > 1:
        parts += _schedule(job, speed)
    parts += _memory(gpu, memory)
    parts += ["<h2>Figures</h2>", _table(figures)]
    seconds = [(name, f"{value:.3g}", f"{value / speed.seconds:.1%}") for name, value in speed.parts.items() if value]
    parts += ["<h2>Where a step goes</h2>", _table(seconds, ("", "seconds", "share"))]
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts))
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _schedule(job: Job, speed: Throughput) -> list[str]:
    """One row per pipeline rank, one box per chunk with its microbatch, empty where a rank waits."""
    line, caption = drawn_timeline(job, speed)
    ranks = job.degrees.pp
    scale = (WIDTH - LEFT - RIGHT) / line.makespan
    boxes = [_box(event, scale, ranks) for event in line.events]
    drawing = _drawing(caption, ranks, [*_axis(line.makespan, scale, ranks, "seconds"), *boxes])
    used = dict.fromkeys((event.kind, _chunk(event, ranks)) for event in line.events)
    names = [(f"{BOXES[kind]}{chunk}", NAMES[kind] + (", later chunk" if chunk else "")) for kind, chunk in used]
    return ["<h2>Schedule of the pipeline</h2>", f"<p>{escape(caption)}</p>", drawing, _legend(names)]


def _chunk(event: Event, ranks: int) -> int:
    return 0 if event.stage < ranks else 1


def _box(event: Event, scale: float, ranks: int) -> str:
    x, width = LEFT + event.start * scale, (event.end - event.start) * scale
    kind = f"{BOXES[event.kind]}{_chunk(event, ranks)}"
    tip = f"rank {event.rank}, stage {event.stage}, microbatch {event.microbatch}: {NAMES[event.kind]}"
    tip += f", {event.start:.3g} to {event.end:.3g} s"
    y = event.rank * (ROW + GAP)
    box = _rectangle(x, y, max(0.5, width - 0.8), kind, tip)
    if width < NARROWEST:
        return box
    place = f'x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle" style="fill: var(--on-{kind})"'
    return f'{box}<text class="n" {place}>{event.microbatch}</text>'


def _memory(gpu: Machine, memory: Sequence[Memory]) -> list[str]:
    """A stacked bar per pipeline rank, the GPU's memory as a line, and the same in numbers."""
    names = [name for name in memory[0].parts() if any(found.parts()[name] for found in memory)]
    limit = gpu.memory / GIB
    most = max(limit, *(found.total / GIB for found in memory))
    scale = (WIDTH - LEFT - RIGHT) / most
    marks = _axis(most, scale, len(memory), "GiB per GPU")
    for rank, found in enumerate(memory):
        marks += _bar(rank, found, names, scale)
    x = f"{LEFT + limit * scale:.1f}"
    marks.append(f'<line class="limit" x1="{x}" x2="{x}" y1="-4" y2="{len(memory) * (ROW + GAP)}"/>')
    caption = f"dashed: {gpu.name}, {limit:.0f} GiB"
    rows = [(name, *(f"{found.parts()[name] / GIB:,.1f}" for found in memory)) for name in names]
    rows.append(("total", *(f"{found.total / GIB:,.1f}" for found in memory)))
    head = ("GiB", *(f"rank {rank}" for rank in range(len(memory))))
    legend = _legend([(f"c{i}", name) for i, name in enumerate(names)])
    return ["<h2>Memory per rank</h2>", f"<p>{escape(caption)}</p>", _drawing(caption, len(memory), marks), legend,
            _table(rows, head)]  # fmt: skip


def _bar(rank: int, found: Memory, names: Iterable[str], scale: float) -> list[str]:
    marks, x, y = [], float(LEFT), rank * (ROW + GAP)
    for number, name in enumerate(names):
        width = found.parts()[name] / GIB * scale
        if width:
            marks.append(_rectangle(x, y, width, f"c{number}", f"{name} {found.parts()[name] / GIB:.1f} GiB"))
        x += width
    return [*marks, f'<text x="{x + 6:.1f}" y="{y + 15}">{found.total / GIB:.1f}</text>']


def _rectangle(x: float, y: float, width: float, colour: str, tip: str) -> str:
    style = f'style="fill: var(--{colour})"'
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" {style}><title>{escape(tip)}</title></rect>'


def _axis(most: float, scale: float, ranks: int, name: str) -> list[str]:
    """Ranks on the left, about six round numbers below."""
    bottom = ranks * (ROW + GAP)
    marks = [f'<text x="{LEFT - 8}" y="{rank * (ROW + GAP) + 15}" text-anchor="end">rank {rank}</text>'
             for rank in range(ranks)]  # fmt: skip
    step = _round(most / 6)
    for number in range(int(most / step) + 1):
        x = f"{LEFT + number * step * scale:.1f}"
        marks.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{bottom}"/>')
        marks.append(f'<text class="soft" x="{x}" y="{bottom + 12}" text-anchor="middle">{number * step:g}</text>')
    marks.append(f'<text class="soft" x="{WIDTH - RIGHT}" y="{bottom + 26}" text-anchor="end">{name}</text>')
    return marks


def _round(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** len(str(int(step))) / 10 if step >= 1 else 1.0
    while step < power:
        power /= 10
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step)


def _drawing(name: str, ranks: int, marks: Iterable[str]) -> str:
    height = ranks * (ROW + GAP) + AXIS
    body = "\n".join(marks)
    return f'<div><svg viewBox="0 -6 {WIDTH} {height}" role="img" aria-label="{escape(name)}">\n{body}\n</svg></div>'


def _legend(names: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<li style="--of: var(--{colour})">{escape(name)}</li>' for colour, name in names)
    return f"<ul>{items}</ul>"


def _table(rows: Rows, head: tuple[str, ...] = ()) -> str:
    """Numbers to the right where there is a head."""
    kind = ' class="number"' if head else ""

    def line(cells: tuple[str, ...], tag: str) -> str:
        rest = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell in cells[1:])
        return f'<tr><th scope="row">{escape(cells[0])}</th>{rest}</tr>'

    body = "".join(line(row, "td") for row in rows)
    return f"<div><table>{line(head, 'th') if head else ''}{body}</table></div>"
