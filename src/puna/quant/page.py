"""The report card as one HTML file that needs nothing else: no network, no script. Readable in light and in dark.

Every number in a drawing stands in a tool tip and in a table too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from puna.base.console import size
from puna.base.storage import write_atomic
from puna.quant.drawing import (
    LEFT,
    WIDTH,
    bars,
    circle,
    drawing,
    folded,
    html_page,
    html_table,
    legend,
    line,
    paragraph,
    rectangle,
    text,
)  # fmt: skip
from puna.quant.figures import Layer, Verdict
from puna.quant.report import WORST_HEADER, Report, columns, comparison, describe, facts, layer_rows, worst_rows
from puna.quant.score import Estimate

TALL, CELL = 240, 16  # height of the plot of layers; of a row of the plot of formats
BINS, BIN_TALL = 30, 120  # of the histogram
COLOURS = 8
_LAYER = re.compile(r"layers\.(\d+)\.(?:\w+\.)*(\w+)")


def report_page(report: Report, path: str | Path, verdict: Verdict | None = None) -> Path:
    """Write the card to `path` and return it. Raises OSError."""
    title = f"Quantization of {report.model}"
    parts = [f"<h1>{escape(title)}</h1>", paragraph(f"{describe(report.config)}; {report.formats()}; {report.format}")]
    if verdict is not None:
        parts.append(paragraph(verdict.message, "good" if verdict.passed else "bad"))
    parts += [paragraph(f"warning: {warning}", "bad") for warning in report.warnings]
    parts += [_tiles(report), html_table(comparison(report), ("", *columns(report)), "grid short")]
    parts += [*_damage(report), *_sizes(report), *_layers(report), *_formats(report), *_histogram(report)]
    parts += ["<h2>Where these figures come from</h2>", html_table(facts(report)), *_everything(report)]
    write_atomic(Path(path), html_page(title, parts))
    return Path(path)


def _tiles(report: Report) -> str:
    """The figures people ask for first."""
    after, mended = report.after, report.repaired
    found = {
        "change of perplexity": after and after.increase and after.increase.percent(signed=True),
        "of rounding's damage repaired": mended and mended.nll and mended.nll.percent(),
        "same top-1 token": after and after.top1 and after.top1.percent(),
        "bits per weight": report.bits_per_weight and f"{report.bits_per_weight:.2f}",
        "of the size": report.size_before and f"{report.size_after / report.size_before:.1%}",
        "tokens/s": report.speed_after and report.speed_after.rate,
    }
    tiles = [f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in found.items() if value]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _damage(report: Report) -> list[str]:
    """Increase of perplexity, and KL, of plain rounding and of the result."""
    variants = {"plain rounding": report.rounding, "after": report.after}
    known = {label: quality for label, quality in variants.items() if quality is not None}
    parts = []
    for name, of, words in (
        ("Increase of perplexity", lambda q: q.increase, lambda e: f"{e.value:+.3%}"),
        ("KL from the original, nats/token", lambda q: q.kl, lambda e: f"{e.value:.3g}"),
    ):
        points = {label: of(quality) for label, quality in known.items() if of(quality) is not None}
        if points:
            said = {label: words(value) for label, value in points.items()}
            parts += [f"<h2>{name}</h2>", bars(name, points, _VARIANTS, said)]
    return [*parts, paragraph("Whiskers: two standard errors, over evaluation sequences.")] if parts else []


_VARIANTS = {"before": "before", "plain rounding": "rounding", "after": "after"}  # -> colour


def _sizes(report: Report) -> list[str]:
    if not (report.size_before and report.size_after):
        return []
    nbytes = {"before": report.size_before, "after": report.size_after}
    points = {name: Estimate(float(number)) for name, number in nbytes.items()}
    return ["<h2>Size</h2>", bars("size", points, _VARIANTS, {name: size(number) for name, number in nbytes.items()})]


class _Grid:
    """Where a layer stands: a column for its block, a shade for its kind (`q_proj`), both in order of appearance."""

    def __init__(self, layers: Sequence[Layer]):
        found = {layer.name: _LAYER.fullmatch(layer.name) for layer in layers}
        self._of = {name: (match[1], match[2]) if match else ("-", name) for name, match in found.items()}
        self.columns = {column: n for n, column in enumerate(dict.fromkeys(c for c, _ in self._of.values()))}
        self.kinds = {kind: n for n, kind in enumerate(dict.fromkeys(kind for _, kind in self._of.values()))}
        self.step = (WIDTH - LEFT - 8) / max(1, len(self.columns))

    def column(self, layer: Layer) -> int:
        return self.columns[self._of[layer.name][0]]

    def kind(self, layer: Layer) -> int:
        return self.kinds[self._of[layer.name][1]]

    def axis(self, bottom: float) -> list[str]:
        """Numbers of blocks below, twenty at most."""
        every = math.ceil(len(self.columns) / 20)
        names = [(name, n) for name, n in self.columns.items() if n % every == 0]
        marks = [text(LEFT + (n + 0.5) * self.step, bottom + 18, name, "middle", "soft") for name, n in names]
        return [*marks, text(LEFT - 8, bottom + 18, "block", "end", "soft")]


def _layers(report: Report) -> list[str]:
    """Relative output error of every layer: a ring for plain rounding, a dot for the result, one colour per kind."""
    shown = [layer for layer in report.layers if _drawable(layer.error)]
    if not shown:
        return []
    grid = _Grid(shown)
    values = [v for layer in shown for v in (layer.error, layer.error_rounded) if _drawable(v)]
    ticks = _ticks(min(values), max(values))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])

    def height(value: float) -> float:
        return (high - math.log10(value)) / (high - low) * TALL

    marks = [line(LEFT, height(tick), WIDTH - 8, height(tick)) for tick in ticks]
    marks += [text(LEFT - 8, height(tick) + 4, f"{tick:g}", "end", "soft") for tick in ticks]
    for layer in shown:
        marks += _dumbbell(layer, grid, height)
    caption = "ring: plain rounding, dot: after; |y' - y| / |y| on calibration inputs, log scale"
    picture = drawing(caption, TALL + 24, [*marks, *grid.axis(TALL)])
    kinds = legend((f"c{n % COLOURS}", kind) for kind, n in grid.kinds.items())
    worst = ["<h2>Largest output errors</h2>", html_table(worst_rows(report), WORST_HEADER)]
    return ["<h2>Output error of each layer</h2>", paragraph(caption), picture, kinds, *worst]


def _ticks(least: float, most: float) -> list[float]:
    """1, 2, 5 times powers of ten, from just below `least` to just above `most`; only the powers if they are many."""
    powers = range(math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 2)
    steps = (1, 2, 5) if len(powers) < 7 else (1,)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    first = max(n for n, tick in enumerate(ticks) if tick <= least)
    last = min(n for n, tick in enumerate(ticks) if tick >= most and n > first)
    return ticks[first : last + 1]


def _drawable(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _dumbbell(layer: Layer, grid: _Grid, height: Callable[[float], float]) -> list[str]:
    colour = f"c{grid.kind(layer) % COLOURS}"
    x = LEFT + (grid.column(layer) + (grid.kind(layer) + 1) / (len(grid.kinds) + 1)) * grid.step
    radius = min(4.0, max(1.5, grid.step / (2 * len(grid.kinds) + 2)))
    tip = f"{layer.name}, {layer.format}: {layer.error:.4g}"
    dot = circle(x, height(layer.error), radius, colour, tip)
    if not _drawable(layer.error_rounded) or layer.error_rounded == layer.error:
        return [dot]
    top, bottom = height(layer.error_rounded), height(layer.error)
    ring = circle(x, top, radius, colour, f"{layer.name}, plain rounding: {layer.error_rounded:.4g}", ring=True)
    return [line(x, top, x, bottom, colour=colour), ring, dot]


def _formats(report: Report) -> list[str]:
    """A cell per layer, coloured by its number format: mixed precision at a glance."""
    if not report.layers:
        return []
    grid = _Grid(report.layers)
    formats = {name: n for n, name in enumerate(dict.fromkeys(layer.format for layer in report.layers))}
    marks = [text(LEFT - 8, n * CELL + 12, kind, "end") for kind, n in grid.kinds.items()]
    for layer in report.layers:
        tip = f"{layer.name}: {layer.format}, {layer.bits_per_weight:.2f} bits per weight"
        place = (LEFT + grid.column(layer) * grid.step, grid.kind(layer) * CELL)
        marks.append(rectangle(*place, grid.step - 1, CELL - 1, f"c{formats[layer.format] % COLOURS}", tip))
    bottom = len(grid.kinds) * CELL
    names = [(f"c{n % COLOURS}", f"{name} ({_mean_bits(report, name):.2f} bits)") for name, n in formats.items()]
    return ["<h2>Bits of each layer</h2>", drawing("number formats", bottom + 24, [*marks, *grid.axis(bottom)]),
            legend(names)]  # fmt: skip


def _mean_bits(report: Report, name: str) -> float:
    layers = [layer for layer in report.layers if layer.format == name]
    return sum(layer.bits_per_weight * layer.weights for layer in layers) / max(
        1, sum(layer.weights for layer in layers)
    )


def _histogram(report: Report) -> list[str]:
    """KL of the evaluation sequences: a mean may hide a few that were hit hard."""
    found = {"plain rounding": report.rounding, "after": report.after}
    series = {name: [v for v in q.kl_per_chunk if _drawable(v)] for name, q in found.items() if q is not None}
    series = {name: values for name, values in series.items() if len(values) > 1}
    if not series:
        return []
    logs = {name: [math.log10(value) for value in values] for name, values in series.items()}
    low, high = min(map(min, logs.values())), max(map(max, logs.values()))
    edges = [10 ** (low + (high - low) * place / BINS) for place in range(BINS + 1)]
    counts = {name: _counts(values, low, (high - low) or 1.0) for name, values in logs.items()}
    most, slot = max(map(max, counts.values())), (WIDTH - LEFT - 8) / BINS
    marks = [line(LEFT, BIN_TALL, WIDTH - 8, BIN_TALL), text(LEFT - 8, 10, f"{most}", "end", "soft")]
    for number, (name, row) in enumerate(counts.items()):
        for place, held in enumerate(row):
            x, tall = LEFT + (place + number / len(counts)) * slot, held / most * BIN_TALL
            tip = f"{name}: {held} sequences, KL {edges[place]:.2g} to {edges[place + 1]:.2g}"
            if held:
                marks.append(rectangle(x, BIN_TALL - tall, slot / len(counts) - 0.6, tall, _VARIANTS[name], tip))
    for place in range(0, BINS + 1, 6):
        anchor = "end" if place == BINS else "middle"
        marks.append(text(LEFT + place * slot, BIN_TALL + 15, f"{edges[place]:.2g}", anchor, "soft"))
    caption = "how many evaluation sequences have which mean KL, nats/token, log scale"
    picture = drawing(caption, BIN_TALL + 20, marks)
    return ["<h2>KL over the text</h2>", paragraph(caption), picture, legend((_VARIANTS[n], n) for n in series)]


def _counts(values: Sequence[float], low: float, span: float) -> list[int]:
    found = [0] * BINS
    for value in values:
        found[min(BINS - 1, int((value - low) / span * BINS))] += 1
    return found


def _everything(report: Report) -> list[str]:
    """Every layer and the whole configuration, folded."""
    config = json.dumps(report.config, indent=1, ensure_ascii=False, default=str)
    origin = json.dumps(report.calibration, indent=1, ensure_ascii=False, default=str)
    rows, head = layer_rows(report)
    parts = [folded(f"All {len(rows)} layers", html_table(rows, head))] if rows else []
    parts.append(folded("Configuration", f"<pre>{escape(config)}</pre>"))
    return [*parts, folded("Text", f"<pre>{escape(origin)}</pre>")] if report.calibration else parts
