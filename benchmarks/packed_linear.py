"""How fast is the product with a quantized weight on this CPU, kernel by kernel, with weights that no cache holds.

    nice -n -10 python benchmarks/packed_linear.py               # both tables; writes results/packed_linear.json
    nice -n -10 python benchmarks/packed_linear.py --threads 1 --rounds 30

With one thread seconds are the core's own, which others on the machine hardly disturb; with more, those of the wall.
Decoding: GB/s of packed bytes (codes, scales, zero points) and % of the speed at which torch sums 256 MB, measured in
turn. Rows: milliseconds of what `choose` takes, and its speed relative to `F.linear` in fp32 on the plain weight.
Best of many rounds, because other processes on the machine only ever add time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import RESULTS, about
from torch import Tensor

from puna.base.console import table
from puna.base.hardware import describe
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed, round_to_nearest
from puna.ops.formats.scheme import INT8_TOKEN
from puna.ops.packed_kernels import Kernel, Native, TorchInt4, TorchInt8, store
from puna.ops.packed_linear import choose
from puna.quant.config import parse_format

WIDTH = 4096
COLD_BYTES = 200 << 20  # more than any cache
FORMATS = ("int8", "int8_g128", "int4_g128", "int4_g32", "int4_g32_asym", "int3_g128", "fp8")
ROWS = (1, 8, 64, 512)


def best_of(rounds: int, contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls of each, taken in turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, run in contestants.items():
            start = clock()
            run()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds


def copy_of(packed: Packed) -> Packed:
    """The same numbers elsewhere in memory."""
    parts = {name: part.clone() if isinstance(part, Tensor) else part for name, part in vars(packed).items()}
    return dataclasses.replace(packed, **parts)


def contestants(packed: Packed) -> dict[str, tuple[list[Kernel], torch.dtype]]:
    """Kernels by name, each on as many copies of the weight as fill COLD_BYTES."""

    def native() -> Kernel:
        stored = store(copy_of(packed))
        return Native(stored, QuantizedWeight(stored.packed), None)

    makers: dict[str, tuple[Callable[[], Kernel], torch.dtype]] = {"native": (native, torch.float32)}
    if packed.scheme.bits == 8 and packed.scheme.kind == "int" and packed.scheme.granularity == "channel":
        makers["torch"] = (lambda: TorchInt8(QuantizedWeight(copy_of(packed)), None), torch.bfloat16)
    if packed.scheme.bits == 4:
        makers["torch"] = (lambda: TorchInt4(QuantizedWeight(packed), None), torch.bfloat16)
    count = COLD_BYTES // packed.nbytes + 1
    return {name: ([make() for _ in range(count)], dtype) for name, (make, dtype) in makers.items()}


@torch.no_grad()
def decoding(rounds: int) -> list[dict]:
    """One row of x, cold weights."""
    block, rows = torch.ones(64 << 20), []
    for text in FORMATS:
        packed = round_to_nearest(torch.randn(WIDTH, WIDTH) * 0.02, parse_format(text), torch.float16)
        kernels = contestants(packed)
        runs: dict[str, Callable[[], object]] = {"read": lambda: block.sum()}
        for name, (some, dtype) in kernels.items():
            x = torch.randn(1, WIDTH).to(dtype)
            runs[name] = lambda x=x, some=some: [kernel(x, x.dtype) for kernel in some]  # type: ignore[misc]
        seconds = best_of(rounds, runs)
        read = block.nbytes / seconds["read"] / 1e9
        for name, (some, _) in kernels.items():
            kept = store(packed).packed.nbytes if name == "native" else packed.nbytes
            speed = kept * len(some) / seconds[name] / 1e9
            rows.append(
                {"format": text, "kernel": name, "GB/s": speed, "read GB/s": read, "percent": 100 * speed / read}
            )
    return rows


@torch.no_grad()
def many_rows(rounds: int) -> list[dict]:
    """What is chosen for each number of rows, against the plain fp32 product."""
    plain, rows = torch.randn(WIDTH, WIDTH) * 0.02, []
    for text, activations in [(text, None) for text in FORMATS] + [("int8", INT8_TOKEN)]:
        weight = QuantizedWeight(round_to_nearest(plain, parse_format(text), torch.float16), activations)
        products = {dtype: choose(weight, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)}
        for count in ROWS:
            x = torch.randn(count, WIDTH)
            runs: dict[str, Callable[[], object]] = {"F.linear": lambda x=x: F.linear(x, plain)}  # type: ignore[misc]
            for dtype, product in products.items():
                same = x.to(dtype)
                runs[str(dtype)[6:]] = lambda x=same, p=product: p(x)  # type: ignore[misc]
            seconds = best_of(max(3, rounds // (1 + count // 32)), runs)
            row: dict = {"format": text + (" x int8" if activations else ""), "rows": count}
            for name, value in seconds.items():
                row[f"{name} ms"] = 1e3 * value
            row["kernels"] = [products[dtype].name for dtype in products]
            row["ratio"] = seconds["F.linear"] / seconds["float32"]
            rows.append(row)
    return rows


def run(threads: int, rounds: int) -> dict[str, list[dict]]:
    """Both tables, printed, and their figures."""
    torch.set_num_threads(threads)
    print(f"{describe()}; {threads} threads")
    cold = decoding(rounds)
    shown = [
        (r["format"], r["kernel"], f"{r['GB/s']:.1f}", f"{r['percent']:.0f} of {r['read GB/s']:.0f}") for r in cold
    ]
    print(table(shown, ("one row, cold", "kernel", "GB/s", "% of read GB/s")))
    warm = many_rows(rounds)
    names = ("F.linear ms", "float32 ms", "bfloat16 ms")
    lines = [
        (
            r["format"],
            str(r["rows"]),
            *(f"{r[name]:.2f}" for name in names),
            f"{r['ratio']:.2f}",
            " | ".join(r["kernels"]),
        )
        for r in warm
    ]
    print(table(lines, (f"{WIDTH} x {WIDTH}", "rows", *names, "F.linear / fp32", "chosen: fp32 | bf16")), flush=True)
    return {"decoding": cold, "rows": warm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    options = parser.parse_args()
    results = {f"{threads} threads": run(threads, options.rounds) for threads in options.threads}
    (RESULTS / "packed_linear.json").write_text(json.dumps({**about("packed_linear"), **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
