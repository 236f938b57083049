"""Seconds of one GPTQ solve, next to plain rounding, and how much of rounding's damage it repairs.

    OMP_NUM_THREADS=1 python benchmarks/gptq.py           # best of 3; writes results/gptq.json
    python benchmarks/gptq.py --large                     # also 4096 x 14336, an 8B model's down_proj: minutes, 6 GB

Inputs are correlated (spectrum 1/k) and a few columns large; weights are normal. int4, groups of 128, act-order. CPU
seconds are what the process used, on a shared machine the steadier figure. `peak` is the memory above what was held
before the call, in multiples of the D x D matrix it is given (too low by what making the inputs took and gave back).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import torch
from side_by_side import RESULTS, about

from puna.base.console import table
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import INT4
from puna.quant.gptq import gptq
from puna.quant.moments import Moments

SHAPES = [(768, 2048), (2048, 2048), (4096, 4096)]
LARGE = (4096, 14336)


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moments of 2 D inputs."""
    generator = torch.Generator().manual_seed(0)
    fall = torch.arange(1, columns + 1) ** -0.5
    fall[::100] *= 20
    basis = torch.randn(columns, 256, generator=generator) / 16
    moments = Moments(columns, second=True, sample_rows=0)
    for _ in range(2 * columns // 2048):
        x = torch.randn(2048, columns, generator=generator)
        moments.add((x + x @ basis @ basis.t()) * fall)
    second_DD = moments.second_DD
    assert second_DD is not None
    return 0.02 * torch.randn(rows, columns, generator=generator), second_DD


def measure(rows: int, columns: int, rounds: int) -> dict:
    weight, second = problem(rows, columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    solve = used = plain = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        round_to_nearest(weight, INT4)
        middle, middle_used = time.perf_counter(), time.process_time()
        found = gptq(weight, second, INT4)
        solve, plain = min(solve, time.perf_counter() - middle), min(plain, middle - start)
        used = min(used, time.process_time() - middle_used)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {
        "shape": f"{rows} x {columns}",
        "seconds": solve,
        "cpu_seconds": used,
        "plain_seconds": plain,
        "gflops": (4 * rows * columns**2 / 2 + columns**3 / 3) / used / 1e9,
        "repaired": found.repaired,
        "peak": peak / (4 * columns**2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES + [LARGE] * options.large:
        rows.append(measure(*shape, 1 if shape == LARGE else options.rounds))
        print(rows[-1], file=sys.stderr, flush=True)
    shown = [
        (
            r["shape"],
            *(f"{r[key]:.2f}" for key in ("seconds", "cpu_seconds", "plain_seconds")),
            f"{r['gflops']:.0f}",
            f"{r['repaired']:.0%}",
            f"{r['peak']:.1f}",
        )
        for r in rows
    ]
    print(table(shown, ("weight", "gptq s", "CPU s", "rounding s", "GFLOP/CPU s", "repaired", "peak, D x D")))
    RESULTS.mkdir(exist_ok=True)
    threads = {"threads": torch.get_num_threads(), "note": "the machine was shared with other jobs"}
    (RESULTS / "gptq.json").write_text(json.dumps({**about("gptq"), **threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
