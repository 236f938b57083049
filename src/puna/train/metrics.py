"""What a run tells: one line per step on the terminal, every step in metrics.jsonl, a curve as PNG."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from puna.base.console import count, duration, say
from puna.base.storage import write_atomic

HEADER = "   step     loss  val b/B        lr   gnorm   tok/s      ms  wait      eta"


class Metrics:
    """Rows of one run, appended to `run/metrics.jsonl`; a row has 'step' and either 'loss' or 'val_loss'.

    `write`: one rank writes them, the others only keep them.
    """

    def __init__(self, run: Path, resumed_step: int, write: bool = True):
        self.path = run / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= resumed_step]
        self._file: TextIO | None = None
        if not write:
            return
        # Steps after the save that is resumed from will be done again: their rows go, by an atomic rewrite.
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run

    def add(self, row: dict[str, Any]) -> None:
        """Keep and append one row; floats are written in full, so that runs can be compared bit by bit."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has `key`."""
        return [(row["step"], row[key]) for row in self.rows if key in row]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics file; a last line cut by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def print_step(row: dict[str, Any], eta_seconds: float) -> None:
    """The fixed-column line of a training step; `wait` is the share of it that stood still for data."""
    val = f"{row['val_bits_per_byte']:7.3f}" if "val_bits_per_byte" in row else " " * 7
    norm = f"{row['grad_norm']:6.2f}" if row["grad_norm"] is not None else "   inf"
    say(
        f"{row['step']:7d}  {row['loss']:7.4f}  {val}  {row['lr']:8.2e}  {norm}  {count(row['tokens_per_second']):>6}  "
        f"{row['ms']:6.0f}  {row['data_ms'] / row['ms']:4.0%}  {duration(eta_seconds):>7}"
    )


class WaitReport:
    """Says when storage is slower than the model: over 20 steps, more than a tenth of the time went into waiting."""

    STEPS, SHARE, PAUSE = 20, 0.1, 200

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=self.STEPS)
        self._quiet = 0

    def add(self, row: dict[str, Any]) -> None:
        """Look at one step's 'ms' and 'data_ms'; after a line was said, 200 steps pass before the next."""
        self._recent.append((row["data_ms"], row["ms"]))
        self._quiet -= 1
        waited, all_of_it = (sum(values) / len(self._recent) for values in zip(*self._recent, strict=True))
        if len(self._recent) == self.STEPS and self._quiet < 0 and waited > self.SHARE * all_of_it:
            self._quiet = self.PAUSE
            say(
                f"storage is slower than the model: {waited:.0f} of {all_of_it:.0f} ms a step "
                f"({waited / all_of_it:.0%}) are spent waiting for data"
            )


def plot_png(metrics: Metrics, path: Path, title: str) -> None:
    """Training and validation loss over steps as a picture."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        if points := metrics.series(key):
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(beside := path.with_name(f".{path.name}.tmp"), format="png")
    os.replace(beside, path)
