"""How fast are products with activations rounded to int8 on this CPU, on layers of a 1.1B model (TinyLlama's shape).

    nice -n -10 python benchmarks/tiles.py                    # both tables; writes results/tiles.json
    nice -n -10 python benchmarks/tiles.py --threads 1 --rounds 30

Decoding: one pass through layers that no cache holds; GB/s of packed bytes, % of the speed at which torch sums 256 MB,
measured in turn, beside the exact kernel. Rows: billions of operations a second on one layer. With one thread seconds
are the core's own, which others on the machine hardly disturb; with more, those of the wall. Best of many rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from packed_linear import best_of
from side_by_side import RESULTS, about

from puna.base.console import table
from puna.base.hardware import describe
from puna.model.linear import QuantizedLinear
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.native.tiles import LEVELS, best_level
from puna.quant.config import parse_format

SHAPES = ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))  # q k v, o, gate up, down
WEIGHTS = sum(outputs * inputs for outputs, inputs in SHAPES)
COLD_BYTES = 256 << 20
FORMATS = ("int4_g32", "int4_g128", "int4_g32_asym", "int8")
FEW, MANY = (1, 2, 4, 8), (16, 128, 512)


def layers(text: str, activations: str) -> list[list[QuantizedLinear]]:
    """As many layers as fill COLD_BYTES."""
    scheme = parse_format(text)
    weights = [QuantizedWeight(round_to_nearest(torch.randn(s) * 0.02, scheme, torch.float16)) for s in SHAPES]
    count = int(COLD_BYTES / (WEIGHTS * weights[0].bits_per_weight / 8)) + 1
    found = [[QuantizedLinear(copy_of(weight)) for weight in weights] for _ in range(count)]
    for linear in (linear for layer in found for linear in layer):
        linear.rechoose(activations)
    return found


def copy_of(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers elsewhere in memory."""
    packed = weight.packed
    zeros = None if packed.zeros is None else packed.zeros.clone()
    return QuantizedWeight(type(packed)(packed.data.clone(), packed.scales.clone(), zeros, packed.scheme, packed.shape))


def through(some: list[list[QuantizedLinear]], rows: int) -> Callable[[], object]:
    """All products of all layers, each with its own x."""
    inputs = [torch.randn(rows, inputs) for _, inputs in SHAPES]
    return lambda: [linear(x) for layer in some for linear, x in zip(layer, inputs, strict=True)]


@torch.no_grad()
def measure(text: str, rounds: int) -> dict[str, float]:
    """Figures of one format by name."""
    block = torch.ones(64 << 20)
    start = time.perf_counter()
    rounding = layers(text, "int8")
    seconds = time.perf_counter() - start
    exact = layers(text, "exact")
    kept = sum(linear.nbytes for layer in rounding for linear in layer)
    runs: dict[str, Callable[[], object]] = {"read": lambda: block.sum(), "exact": through(exact, 1)}
    runs |= {f"int8 {rows}": through(rounding, rows) for rows in FEW}
    best = best_of(rounds, runs)
    read = block.nbytes / best["read"] / 1e9
    figures = {"load s": seconds, "read GB/s": read, "exact GB/s": kept / best["exact"] / 1e9}
    for rows in FEW:
        speed = kept / best[f"int8 {rows}"] / 1e9
        figures |= {f"{rows} rows GB/s": speed, f"{rows} rows %": 100 * speed / read}
    best = best_of(max(3, rounds // 3), {str(rows): through(rounding[:1], rows) for rows in MANY})
    return figures | {f"{rows} rows GOP/s": 2 * rows * WEIGHTS / best[str(rows)] / 1e9 for rows in MANY}


def run(threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Both tables, printed, and their figures."""
    torch.set_num_threads(threads)
    print(f"{describe()}; {LEVELS[best_level()]}; {threads} threads")
    results = {text: measure(text, rounds) for text in FORMATS}
    few = [
        (
            text,
            f"{f['read GB/s']:.1f}",
            f"{f['exact GB/s']:.1f}",
            *(f"{f[f'{rows} rows GB/s']:.1f} ({f[f'{rows} rows %']:.0f}%)" for rows in FEW),
        )
        for text, f in results.items()
    ]
    print(table(few, ("cold, GB/s", "read", "exact, 1 row", *(f"int8, {rows}" for rows in FEW))))
    many = [(text, *(f"{f[f'{rows} rows GOP/s']:.0f}" for rows in MANY)) for text, f in results.items()]
    print(table(many, ("GOP/s", *(f"{rows} rows" for rows in MANY))), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    options = parser.parse_args()
    results = {f"{threads} threads": run(threads, options.rounds) for threads in options.threads}
    (RESULTS / "tiles.json").write_text(json.dumps({**about("tiles"), **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
