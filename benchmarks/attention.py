"""Packed causal attention in fp32 on a CPU: the native kernel against torch's, side by side.

    python benchmarks/attention.py [--rounds 9] [--threads 2]

Both go through `PackedCausal`, so torch's figure is what training would run without the kernel. The two take turns; a
ratio is that of neighbouring turns: median (lowest-highest). GFLOP/s count the useful, causal half of the products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from puna.ops.attention import PackedCausal
from puna.ops.native import attention as native

SHAPES = ((8, 8, 512, 32), (2, 12, 512, 64), (16, 4, 256, 32), (1, 12, 2048, 64))  # documents, heads, tokens, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} rounds, best and ratio")
    print(f"{'documents, heads, tokens, width':<34}{'':<10}{'torch ms':>9}{'native ms':>11}{'GFLOP/s':>9}  ratio")
    for shape in SHAPES:
        for name, flops, run in cases(*shape):
            torch_s, native_s = compare(run, options.rounds)
            ratios = [a / b for a, b in zip(torch_s, native_s, strict=True)]
            print(
                f"{shape!s:<34}{name:<10}{min(torch_s) * 1e3:>9.2f}{min(native_s) * 1e3:>11.2f}"
                f"{flops / min(native_s) / 1e9:>9.0f}  {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f}-{max(ratios):.2f})"
            )


def cases(documents: int, heads: int, tokens: int, width: int) -> list[tuple[str, float, Callable[[], object]]]:
    attend = PackedCausal.of([tokens] * documents)
    q, k, v = (torch.randn(documents * tokens, heads, width, requires_grad=True) for _ in range(3))
    direction = torch.randn_like(q)
    product = documents * heads * tokens**2 * width  # one triangle, a multiplication and an addition

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attend(0, q, k, v, None)

    def both() -> object:
        return torch.autograd.grad(attend(0, q, k, v, None), (q, k, v), direction)

    return [("forward", 2 * product, forward), ("+backward", 7 * product, both)]


def compare(run: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    loaded = native._native
    for turn in range(2 * (rounds + 1)):
        native._native = loaded if turn % 2 else loaded._replace(kernels=None)
        started = time.perf_counter()
        for _ in range(3):
            run()
        if turn >= 2:  # the first round warms up
            seconds[turn % 2].append((time.perf_counter() - started) / 3)
    native._native = loaded
    return seconds


if __name__ == "__main__":
    main()
