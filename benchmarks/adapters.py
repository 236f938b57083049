"""What LoRA adapters cost: the low-rank product by itself, and a decode step of 32 rows with 0, 1, 4 and 32 adapters.

    python benchmarks/adapters.py                        # rank 16, layers of 2048 x 2048 and 768 x 2048
    python benchmarks/adapters.py --model --format int4_g32
                                                         # blocks of a 1.1B model without attention to a past

Contestants of the product: `blocks` (ops.grouped), `per slot` (two products for each), `gathered` (A and B copied for
every row, then batched), `masked` (one product with all slots' A, what is not a row's own set to 0). Best of many
rounds, in turn; stacks are rotated so that they come from memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from puna.base.console import table
from puna.base.hardware import describe
from puna.engine.adapters import Adapters
from puna.model.linear import Linear, QuantizedLinear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops import linear as ops
from puna.ops.attention import PackedCausal
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.grouped import LowRankStack, RowGroups, add_low_rank
from puna.quant.config import parse_format
from puna.weights.adapter import Adapter, Delta
from puna.weights.folder import empty_model

COLD_BYTES = 64 << 20
CPU = torch.device("cpu")


def best_of(rounds: int, contestants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls of each, taken in turn."""
    seconds = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def filled(outputs: int, inputs: int, adapters: int, rank: int, dtype: torch.dtype) -> LowRankStack:
    stack = LowRankStack(outputs, inputs, dtype, CPU)
    stack.reserve(adapters + 1, rank)
    for slot in range(1, adapters + 1):
        stack.put(slot, torch.randn(rank, inputs), torch.randn(outputs, rank), 1.0)
    return stack


def per_slot(y: Tensor, x: Tensor, stack: LowRankStack, rows_of: dict[int, Tensor]) -> None:
    for slot, rows in rows_of.items():
        low = ops.linear(x.index_select(0, rows), stack.down_SRK[slot])
        y.index_add_(0, rows, low @ stack.up_SRN[slot])


def gathered(y: Tensor, x: Tensor, stack: LowRankStack, slots: Tensor) -> None:
    low = torch.bmm(x[:, None], stack.down_SRK[slots].transpose(1, 2))
    y += torch.bmm(low, stack.up_SRN[slots])[:, 0]


def masked(y: Tensor, x: Tensor, stack: LowRankStack, others: Tensor) -> None:
    low = ops.linear(x, stack.down_SRK[1:].flatten(0, 1)).masked_fill_(others, 0)
    y.addmm_(low, stack.up_SRN[1:].flatten(0, 1))


@torch.no_grad()
def products(rank: int, rounds: int) -> str:
    """Microseconds of one low-rank product."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in ((2048, 2048), (2048, 768)):
            for tokens, adapters in ((1, 1), (32, 1), (32, 4), (32, 32), (256, 4)):
                slots = torch.arange(tokens) % adapters + 1
                rows_of = {slot: (slots == slot).nonzero()[:, 0] for slot in range(1, adapters + 1)}
                others = slots[:, None] != torch.arange(1, adapters + 1).repeat_interleave(rank)
                groups = RowGroups.of(slots.numpy())
                assert groups is not None
                one = filled(outputs, inputs, adapters, rank, dtype)
                stacks = [
                    one,
                    *(filled(outputs, inputs, adapters, rank, dtype) for _ in range(COLD_BYTES // one.nbytes)),
                ]
                x, y = torch.randn(tokens, inputs).to(dtype), torch.zeros(tokens, outputs, dtype=dtype)
                contestants = {
                    "blocks": lambda s, x=x, y=y, g=groups: add_low_rank([y], x, [s], g),
                    "per slot": lambda s, x=x, y=y, r=rows_of: per_slot(y, x, s, r),
                    "gathered": lambda s, x=x, y=y, r=slots: gathered(y, x, s, r),
                    "masked": lambda s, x=x, y=y, r=others: masked(y, x, s, r),
                }
                some = stacks[:16]
                all_of = {name: lambda run=run, some=some: [run(s) for s in some] for name, run in contestants.items()}
                seconds = {name: value / len(some) for name, value in best_of(rounds, all_of).items()}
                rows.append(
                    [str(dtype)[6:], f"{outputs} x {inputs}", str(tokens), str(adapters)]
                    + [f"{1e6 * seconds[name]:.0f}" for name in contestants]
                )
    return table(rows, ("dtype", "layer", "rows", "adapters", *(f"{name} us" for name in contestants)))


def model_of(layers: int, text: str, dtype: torch.dtype) -> Transformer:
    """Blocks as wide as a 1.1B model's, with a small vocabulary."""
    spec = Spec.preset("debug").replace(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, head_dim=64,
        num_hidden_layers=layers, sliding_windows=(), vocab_size=512,
    )  # fmt: skip
    model = empty_model(spec, dtype, CPU)
    model.init_weights()
    for name, layer in list(model.named_modules()):
        if text and isinstance(layer, Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            weight = QuantizedWeight(round_to_nearest(layer.weight.detach().float(), parse_format(text), torch.float16))
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(weight, dtype=dtype))
    return model.requires_grad_(False).eval()


def adapter_of(model: Transformer, rank: int) -> Adapter:
    """On every linear layer of every block."""
    deltas = {}
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            outputs, inputs = layer.product.shape if isinstance(layer, QuantizedLinear) else layer.weight.shape
            deltas[name] = Delta(torch.randn(rank, inputs) * 0.01, torch.randn(outputs, rank) * 0.01, 1.0)
    return Adapter.of(deltas)


@torch.no_grad()
def steps(text: str, dtype: torch.dtype, layers: int, rank: int, rounds: int) -> str:
    """Milliseconds of a step in which every row is a sequence of its own."""
    model, plain = (model_of(layers, text, dtype) for _ in range(2))
    adapters = Adapters(model)
    for number in range(32):
        adapters.add(f"a{number}", adapter_of(plain, rank))
    rows = []
    for tokens in (1, 8, 32):
        ids, positions = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
        attend = PackedCausal.of([1] * tokens)

        def step(count: int, ids=ids, positions=positions, attend=attend) -> None:
            adapters.rows([i % count + 1 for i in range(len(ids))] if count else None)
            model(ids, positions, attend)

        contestants = {"plain": lambda i=ids, p=positions, a=attend: plain(i, p, a)}
        contestants |= {str(c): lambda c=c, step=step: step(c) for c in (0, 1, 4, 32) if c <= tokens}
        seconds = best_of(rounds, contestants)
        found = (f"{1e3 * seconds[name]:.1f}" if name in seconds else "-" for name in ("plain", "0", "1", "4", "32"))
        rows.append([str(tokens), *found])
    return table(rows, ("rows", "plain ms", "loaded, unused", "1 adapter", "4", "32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="store_true", help="time whole steps")
    parser.add_argument("--format", default="", help="of the model's weights, such as int4_g32; empty: plain")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"{describe()}; {torch.get_num_threads()} threads; {ops.describe()}")
    if args.model:
        print(steps(args.format, getattr(torch, args.dtype), args.layers, args.rank, args.rounds))
    else:
        print(products(args.rank, args.rounds))


if __name__ == "__main__":
    main()
