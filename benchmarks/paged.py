"""Attention over pages on a CPU: the native kernel against torch and against contiguous attention, side by side.

    python benchmarks/paged.py [--rounds 9] [--threads 2] [--heads 32 --groups 4 --width 64] [--dtype float32]

Chunks: `PackedCausal` (the training kernel, no cache) and torch (pages gathered, then its attention), same shapes.
Decoding: one new token each of 1, 8 and 32 sequences; GB/s are the bytes of keys and values that must be read, once.
The candidates take turns; the best round of each counts. Pages lie in order, or scattered over the whole storage.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import torch

from puna.ops.attention import PackedCausal
from puna.ops.native import library
from puna.ops.native import paged as native
from puna.ops.paged import PagedCausal, Pages

CHUNKS = ((512, 512), (2048, 2048), (64, 2048), (512, 4096))  # new tokens, positions
BATCHES, CONTEXTS = (1, 8, 32), (512, 4096)
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="of the cache; queries are float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, dtype = (options.heads, options.groups, options.width), getattr(torch, options.dtype)
    print(f"torch {torch.__version__}, {options.threads} threads, heads, groups, width {shape}, cache {options.dtype}")
    with torch.inference_mode():
        chunks(shape, dtype, options.rounds)
        decoding(shape, dtype, options.rounds)


def chunks(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> None:
    heads, groups, width = shape
    print(f"\n{'tokens of positions':<22}{'native ms':>10}{'GFLOP/s':>9}{'torch ms':>10}{'PackedCausal ms':>17}")
    for tokens, positions in CHUNKS:
        attend = filled(shape, dtype, [positions], tokens, scattered=True)
        q, k, v = (torch.randn(tokens, n, width) for n in (heads, groups, groups))
        runs: dict[str, Run] = {
            "native": partial(attend, 0, q, k, v, None),
            "torch": partial(without_native, attend, q, k, v),
        }
        if tokens == positions:
            runs["packed"] = partial(PackedCausal.of([tokens]), 0, q, k, v, None)
        best = compare(runs, rounds)
        flops = 4 * heads * width * tokens * (positions - tokens / 2)
        packed = f"{best['packed'] * 1e3:>17.2f}" if "packed" in best else ""
        print(
            f"{f'{tokens} of {positions}':<22}{best['native'] * 1e3:>10.2f}{flops / best['native'] / 1e9:>9.0f}"
            f"{best['torch'] * 1e3:>10.2f}{packed}"
        )


def decoding(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> None:
    heads, groups, width = shape
    names = ("in order", "scattered", "torch")
    print(f"\n{'sequences x context':<22}" + "".join(f"{f'{name} ms':>14}{'GB/s':>7}" for name in names))
    for context in CONTEXTS:
        for batch in BATCHES:
            q, k, v = (torch.randn(batch, n, width) for n in (heads, groups, groups))
            tidy, mixed = (filled(shape, dtype, [context] * batch, 1, scattered) for scattered in (False, True))
            runs: dict[str, Run] = {
                "in order": partial(Turns(tidy), q, k, v),
                "scattered": partial(Turns(mixed), q, k, v),
                "torch": partial(without_native, mixed, q, k, v),
            }
            best, size = compare(runs, rounds), 2 * batch * context * groups * width * dtype.itemsize
            figures = "".join(f"{best[name] * 1e3:>14.3f}{size / best[name] / 1e9:>7.1f}" for name in names)
            print(f"{f'{batch} x {context}':<22}{figures}")


class Turns:
    """One layer after the other, as a model does: so keys and values come from memory, not from the cache."""

    def __init__(self, attend: PagedCausal) -> None:
        self.attend, self.layer = attend, 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.layer = (self.layer + 1) % self.attend.pages.keys.shape[0]
        return self.attend(self.layer, q, k, v, None)


def filled(
    shape: tuple[int, int, int], dtype: torch.dtype, contexts: list[int], tokens: int, scattered: bool
) -> PagedCausal:
    """Pages of as many layers as make 128 MiB, and the attend of each context's last `tokens`."""
    _, groups, width = shape
    each = [-(-context // 16) for context in contexts]
    layer_bytes = 2 * sum(each) * 16 * groups * width * dtype.itemsize
    pages = Pages.of(max(1, 2**27 // layer_bytes), groups, width, sum(each) + 1, 16, dtype)
    for part in (pages.keys, pages.values):
        part.copy_(torch.randn(part.shape[1:]).to(dtype))
    ids = list(range(1, sum(each) + 1))
    if scattered:
        random.Random(0).shuffle(ids)
    slices = []
    for context, count in zip(contexts, each, strict=True):
        slices.append((ids[:count], context - tokens, tokens))
        ids = ids[count:]
    return PagedCausal.of(pages, slices, max(contexts))


def without_native(attend: PagedCausal, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    loaded, native._native = native._native, native._native._replace(kernels=None)
    try:
        return attend(0, q, k, v, None)
    finally:
        native._native = loaded


def compare(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Best seconds of each, taking turns; the first round warms up."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            for _ in range(3):
                run()
            if turn:
                best[name] = min(best[name], (time.perf_counter() - started) / 3)
    return best


if __name__ == "__main__":
    assert library.available(), library.load().reason
    main()
