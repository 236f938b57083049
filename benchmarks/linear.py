"""How fast is y = x W^T on this CPU: puna, F.linear and oneDNN, interleaved, with weights that no cache holds.

    python benchmarks/linear.py                # decoding: 1 and 8 tokens, GB/s of weights and % of measured read speed
    python benchmarks/linear.py --train        # a chain of layers forward and backward, fp32: seconds and ratio

Best of many rounds, because other processes on the machine only ever add time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.base.console import table
from puna.base.hardware import describe
from puna.ops import linear as ops

SHAPES = ((768, 768), (2048, 768), (768, 2048), (32000, 768))  # (outputs, inputs) in a model of 100M parameters
COLD_BYTES = 160 << 20  # more than any cache


def best_of(rounds: int, **contestants: Callable[[], object]) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls of each, taken in turn."""
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.no_grad()
def decoding(rounds: int) -> str:
    """Weights are rotated so that each comes from memory; the read speed beside them is torch's sum of 256 MB."""
    block = torch.ones(64 << 20)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES:
            size = outputs * inputs * dtype.itemsize
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(COLD_BYTES // size + 1)]
            for tokens in (1, 4, 8):
                x = torch.randn(tokens, inputs).to(dtype)
                seconds = best_of(
                    rounds,
                    read=lambda: block.sum(),
                    puna=lambda x=x, w=weights: [ops.linear(x, one) for one in w],
                    torch=lambda x=x, w=weights: [F.linear(x, one) for one in w],
                    onednn=lambda x=x, w=weights: [onednn(x, one) for one in w],
                )
                read = block.numel() * 4 / seconds.pop("read") / 1e9
                speed = {name: size * len(weights) / s / 1e9 for name, s in seconds.items()}
                rows.append(
                    [str(dtype)[6:], f"{outputs} x {inputs}", str(tokens)]
                    + [f"{speed[name]:.1f}" for name in ("puna", "torch", "onednn")]
                    + [f"{speed['puna'] / speed['torch']:.2f}", f"{100 * speed['puna'] / read:.0f} of {read:.0f}"]
                )
    header = ("dtype", "weight", "tokens", "puna GB/s", "F.linear", "oneDNN", "ratio", "% of read GB/s")
    return table(rows, header)


def training(rounds: int) -> str:
    """Two layers and the head of a model, forward and backward."""
    rows = []
    for name, width, hidden, vocabulary in (("10M", 256, 688, 8192), ("100M", 768, 2048, 32000)):
        layer = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
        weights = [torch.randn(s).div_(s[1] ** 0.5).requires_grad_() for s in layer * 2 + [(vocabulary, width)]]
        for tokens in (1024, 4096) if vocabulary < 10000 else (1024,):
            x = torch.randn(tokens, width)
            seconds = best_of(
                rounds,
                puna=lambda x=x, w=weights: forward_backward(ops.linear, x, w),
                torch=lambda x=x, w=weights: forward_backward(F.linear, x, w),
            )
            ratio = seconds["torch"] / seconds["puna"]
            rows.append([name, str(tokens), f"{seconds['puna']:.3f}", f"{seconds['torch']:.3f}", f"{ratio:.3f}"])
    return table(rows, ("model", "tokens", "puna s", "F.linear s", "ratio"))


def forward_backward(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> None:
    """Every product of two layers with its own shape, without what stands between them."""
    *layers, head = weights
    for i in range(0, len(layers), 7):
        q, k, v, o, gate, up, down = layers[i : i + 7]
        x = product(product(x, q) + product(x, k) + product(x, v), o)
        x = product(product(x, gate) + product(x, up), down)
    y = product(x, head)
    y.backward(torch.ones_like(y))
    for weight in weights:
        weight.grad = None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="time training instead of decoding")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{describe()}; {torch.get_num_threads()} threads; {ops.describe()}")
    print(training(arguments.rounds) if arguments.train else decoding(arguments.rounds))
