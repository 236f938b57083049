"""How puna talks to people: errors with a way out, human units, tables, a terminal curve.

Data goes to stdout, talk to stderr. Only rank 0 of a distributed job talks.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any


class PunaError(Exception):
    """Something a user can mend. `message` carries the numbers, `hint` the way out; the command line exits with 2."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.told = False  # under torchrun: rank 0 has said it for all


def print_error(error: PunaError) -> None:
    """Message and hint on stderr."""
    print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr, flush=True)


def is_main_rank() -> bool:
    """True in a single process and on rank 0 under torchrun (which sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Talk to the person: one line on stderr, from rank 0 only."""
    if is_main_rank():
        print(text, file=sys.stderr, flush=True)


def emit_json(payload: dict[str, Any]) -> None:
    """The machine-readable answer of a verb: one JSON object, the last line of stdout."""
    if is_main_rank():
        print(json.dumps(payload, ensure_ascii=False), flush=True)


def count(n: float) -> str:
    """Tokens, parameters: 1234567 -> '1.23M', 8.03e9 -> '8.03B'."""
    return _scaled(n, 1000.0, ("", "k", "M", "B", "T"))


def flops(n: float) -> str:
    """Floating-point operations: 5.2e10 -> '52.00 GFLOP'."""
    return _scaled(n, 1000.0, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP"))


def size(n: float) -> str:
    """Bytes in powers of 1024: 1536 -> '1.50 KiB'."""
    return _scaled(n, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def duration(seconds: float) -> str:
    """75 -> '1m15s'; 3.2 -> '3.2s'."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _scaled(n: float, base: float, units: Sequence[str]) -> str:
    value, index = float(n), 0
    while abs(value) >= base and index < len(units) - 1:
        value, index = value / base, index + 1
    return f"{value:.0f}{units[0]}" if index == 0 and value == int(value) else f"{value:.2f}{units[index]}"


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), title: str = "") -> str:
    """Rows of text as an aligned plain table; columns that hold numbers are right-aligned."""
    cells = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [all(row[i].lstrip("-+")[:1].isdigit() for row in rows) for i in range(len(widths))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, numeric, strict=True)
        return "  ".join(text.rjust(w) if right else text.ljust(w) for text, w, right in pairs).rstrip()

    body = [line(row) for row in cells]
    if header:
        body.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([title, *body] if title else body)


def curve(values: Sequence[float], width: int = 60, height: int = 8) -> str:
    """A line plot in Braille dots (2 x 4 per character), with the highest and lowest value at the left edge.

    With more values than dots, a dot shows the mean of its share.
    """
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return "(too few points for a curve)"
    columns, rows = width * 2, height * 4
    points = _resample(finite, columns)
    low, high = min(points), max(points)
    span = (high - low) or 1.0
    grid = [[0] * width for _ in range(height)]
    previous = None
    for x, value in enumerate(points):
        y = round((high - value) / span * (rows - 1))
        for dot in range(min(y, y if previous is None else previous), max(y, y if previous is None else previous) + 1):
            grid[dot // 4][x // 2] |= _BRAILLE[dot % 4][x % 2]
        previous = y
    label = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    return "\n".join(f"{label.get(i, ''):>8} |" + "".join(chr(0x2800 + c) for c in row) for i, row in enumerate(grid))


def _resample(values: Sequence[float], columns: int) -> list[float]:
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    bins = [values[a : max(b, a + 1)] or values[-1:] for a, b in pairwise(edges)]
    return [sum(part) / len(part) for part in bins]


# Bit of each dot in a Unicode Braille cell (block U+2800), by [row][column].
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner with the elapsed time while something of unknown length runs; off a terminal, one plain line."""
    if not sys.stderr.isatty() or not is_main_rank():
        say(text)
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def progress(total: int, text: str, done: int = 0, unit: str = "bytes") -> Iterator[Callable[[int, str], None]]:
    """A bar over `total` bytes (or lines, ...) with speed and time left; off a terminal, a plain line every 10 s.

    Yields advance(number, note): call it when that many more are done; the note stands beside the speed.
    """
    if not sys.stderr.isatty() or not is_main_rank():
        yield _PlainProgress(total, text, done, unit).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    texts = (TextColumn("{task.description}"), TextColumn("{task.fields[note]}"))
    speed = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (TextColumn("{task.completed:,.0f}"),)
    columns = (texts[0], BarColumn(), *speed, TimeRemainingColumn(), texts[1])
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total, completed=done, note="")
        yield lambda more, note: bar.update(task, advance=more, note=note)


class _PlainProgress:
    """Progress for logs: one line every SECONDS_BETWEEN_LINES."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total: int, text: str, done: int, unit: str):
        self.total, self.text, self.done, self.before, self.unit = total, text, done, done, unit
        self.started = self.told = time.monotonic()

    def advance(self, more: int, note: str) -> None:
        self.done += more
        now = time.monotonic()
        if now - self.told < self.SECONDS_BETWEEN_LINES:
            return
        self.told = now
        speed = (self.done - self.before) / (now - self.started)
        left = duration((self.total - self.done) / speed) if speed else "unknown"
        show = size if self.unit == "bytes" else "{:,}".format
        share = f"{show(self.done)} of {show(self.total)} ({self.done / max(1, self.total):.0%})"
        rate = f"{speed / 1e6:.1f} MB/s" if self.unit == "bytes" else f"{speed:.1f} {self.unit}/s"
        say(f"{self.text}: {share}, {rate}, {note}, {left} left")
