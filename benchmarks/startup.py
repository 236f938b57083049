"""How fast the front door opens: `puna --help`, `puna train --help`, `import puna`, `puna info preset:llama3_405b`.

    python benchmarks/startup.py               # seconds, best and median of 20

Python's own start is in the figures. Absolute times belong to the machine that is named.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from puna.base.console import table
from puna.base.hardware import describe

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import puna": ["-c", "import puna"],
    "puna --help": ["-m", "puna", "--help"],
    "puna train --help": ["-m", "puna", "train", "--help"],
    "puna generate --help": ["-m", "puna", "generate", "--help"],
    "puna info preset:llama3_405b": ["-m", "puna", "info", "preset:llama3_405b"],
}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=60)
    return time.perf_counter() - started


if __name__ == "__main__":
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(20):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    rows = [(name, f"{min(t):.3f}", f"{statistics.median(t):.3f}") for name, t in times.items()]
    print(table(rows, ("command", "best s", "median s"), title=describe()))
