"""One rank of the context parallel checks; `test_exchange.py` starts four. Differences from one process go to a JSON file.

python exchange_ranks.py RANK STORE_FILE RESULT_FILE
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from puna.base.console import PunaError
from puna.model.spec import Rope, Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal, attention_twin
from puna.ops.basic import cross_entropy
from puna.parallel import ring
from puna.parallel.exchange import ContextParallel, context_parallel, traffic_bytes
from puna.parallel.sharding import METHODS, shard, unshard

RANKS, TOKENS = 4, 64
LAYOUTS = {
    "one": [64],
    "crossing": [5, 20, 3, 17, 1, 18],
    "aligned": [8] * 8,
    "tokens": [1] * 64,
}
HEADS = [(8, 4), (8, 1), (24, 6)]  # (24, 6): on 4 ranks of ulysses each kv head is needed twice
WINDOWS = [None, 1, 7, 30]
Run = Callable[[], dict[str, float]]


def attention_cases() -> Iterator[tuple[str, int, str, str, tuple[int, int], int | None]]:
    for method, world, layout, heads, window in itertools.product(METHODS, (2, 4), LAYOUTS, HEADS, WINDOWS):
        yield (
            f"{method}-cp{world}-{layout}-{heads[0]}to{heads[1]}-window{window}",
            world,
            method,
            layout,
            heads,
            window,
        )


def model_cases() -> Iterator[tuple[str, int, str, str]]:
    for method, world, mode in itertools.product(METHODS, (2, 4), ("plain", "recompute")):
        yield f"model-{method}-cp{world}-{mode}", world, method, mode
    yield "model-ring-cp2-compile", 2, "ring", "compile"  # 7 s each; what keeps the compiler out is shared by all


def draw(heads: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v and the output's gradient for the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(TOKENS, n, 8, generator=generator).to(dtype) for n in (heads[0], heads[1], heads[1], heads[0])]


def difference(ours: Tensor, whole: Tensor, group: dist.ProcessGroup, method: str) -> float:
    """Largest absolute difference of this rank's tokens."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return (ours - shard([whole], rank, world, method)[0]).abs().max().item()


def check_attention(
    group: dist.ProcessGroup, method: str, layout: str, heads: tuple[int, int], window: int | None
) -> dict[str, float]:
    documents = PackedCausal.of(LAYOUTS[layout])
    *inputs, d_out = draw(heads)
    numbers = torch.repeat_interleave(torch.arange(len(LAYOUTS[layout])), torch.tensor(LAYOUTS[layout]))
    whole = [x.clone().requires_grad_() for x in inputs]
    expected = attention_twin(*whole, numbers, window)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = [x.requires_grad_() for x in shard(inputs, rank, world, method)]
    out = context_parallel(documents, group, method, heads[0])(0, *mine, window)
    gradients = torch.autograd.grad(expected, whole, d_out)
    ours = torch.autograd.grad(out, mine, shard([d_out], rank, world, method)[0])
    pairs = zip("qkv", ours, gradients, strict=True)
    return {"out": difference(out, expected, group, method)} | {
        name: difference(a, b, group, method) for name, a, b in pairs
    }


def model_loss(model: Transformer, arrays: tuple[Tensor, ...], attend: object, mode: str) -> Tensor:
    forwards = {block: block.forward for block in model.layers} if mode == "recompute" else {}
    for block, forward in forwards.items():
        block.forward = lambda *x, forward=forward: checkpoint(forward, *x, use_reentrant=False)
    for block in model.layers if mode == "compile" else ():
        block.compile(backend="aot_eager")
    tokens, positions, targets = arrays
    loss = cross_entropy(model(tokens, positions, attend), model.head_weight, targets, 1e-4)[0]
    loss.backward()
    for block in forwards:
        del block.forward
    return loss.detach()


def check_model(group: dist.ProcessGroup, method: str, mode: str) -> dict[str, float]:
    """Loss and every weight's gradient, summed over the group; one layer has a window, dynamic rope sees the length."""
    spec = Spec.preset("debug").replace(
        vocab_size=128, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=8,
        sliding_windows=(None, 9, None), rope=Rope(rope_type="dynamic", factor=2.0, max_position_embeddings=8),
    )  # fmt: skip
    model = Transformer(spec)
    model.init_weights(torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    lengths = LAYOUTS["crossing"]
    positions = torch.cat([torch.arange(n) for n in lengths])
    tokens, targets = (torch.randint(128, (TOKENS,), generator=generator) for _ in range(2))
    documents = PackedCausal.of(lengths)
    rank, world = dist.get_rank(group), dist.get_world_size(group)

    expected = model_loss(model, (tokens, positions, targets), documents, "plain") / TOKENS
    whole = {name: x.grad / TOKENS for name, x in model.named_parameters()}
    model.zero_grad()
    mine = shard((tokens, positions, targets), rank, world, method)
    loss = model_loss(model, mine, context_parallel(documents, group, method, 8), mode) / TOKENS
    dist.all_reduce(loss, group=group)
    worst = 0.0
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad, group=group)
        worst = max(worst, (parameter.grad / TOKENS - whole[name]).abs().max().item())
    found = {"loss": (loss - expected).abs().item(), "gradients": worst}
    return found | (count_recompiles(model, mine, group, method) if mode == "compile" else {})


def count_recompiles(
    model: Transformer, mine: tuple[Tensor, ...], group: dist.ProcessGroup, method: str
) -> dict[str, float]:
    """Graphs that batches of other layouts add."""
    before = counters["stats"]["unique_graphs"]
    for layout in LAYOUTS.values():
        model_loss(model, mine, ContextParallel(PackedCausal.of(layout), group, method), "plain")
    added = counters["stats"]["unique_graphs"] - before
    torch._dynamo.reset()
    return {"recompiled": added, "never compiled": float(before == 0)}


def check_half(group: dist.ProcessGroup, method: str) -> dict[str, float]:
    """bf16 by autocast: the dtype that comes out, and the difference from one process in bf16."""
    documents, inputs = PackedCausal.of(LAYOUTS["crossing"]), draw((8, 4))[:3]
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    with torch.autocast("cpu", torch.bfloat16):
        out = context_parallel(documents, group, method, 8)(0, *shard(inputs, rank, world, method), None)
    expected = documents(0, *(x.bfloat16() for x in inputs), None)
    return {
        "out": difference(out.float(), expected.float(), group, method),
        "dtype": float(out.dtype != torch.bfloat16),
    }


def check_refusals(group: dist.ProcessGroup) -> dict[str, float]:
    """Sizes that do not divide are errors on every rank, before a message is sent."""
    attempts = [
        ("ulysses", [64], 6),
        ("ring", [60], 8),
        ("allgather", [4], 8),
        ("ulysses", [66], 8),
        ("rign", [64], 8),
    ]
    accepted = 0
    for method, lengths, heads in attempts:
        with contextlib.suppress(PunaError):
            context_parallel(PackedCausal.of(lengths), group, method, heads)
            accepted += 1
    return {"accepted": float(accepted)}


def check_traffic(group: dist.ProcessGroup, method: str, heads: tuple[int, int]) -> dict[str, float]:
    """Bytes counted at the collectives, against the formula."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sent = [0]

    def counting(module: object, name: str, sizes: Callable[..., float]) -> object:
        real = getattr(module, name)

        def call(*arguments: object, **named: object) -> object:
            sent[0] += int(sizes(*arguments))
            return real(*arguments, **named)

        return mock.patch.object(module, name, call)

    others = (world - 1) / world
    mine = [x.requires_grad_() for x in shard(draw(heads)[:3], rank, world, method)]
    with (
        counting(dist, "all_to_all_single", lambda out, x: x.nbytes * others),
        counting(ring, "_all_gather", lambda out, x: x.nbytes * (world - 1)),
        counting(ring, "_reduce_scatter_sum", lambda out, x: x.nbytes * others),
        counting(dist, "batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
    ):
        ContextParallel(PackedCausal.of([TOKENS]), group, method)(0, *mine, None).sum().backward()
    return {"bytes": abs(sent[0] - traffic_bytes(method, TOKENS, *heads, 8, world, element=4))}


def check_unshard(group: dist.ProcessGroup, method: str) -> dict[str, float]:
    world, x = dist.get_world_size(group), torch.arange(TOKENS)
    return {"moved": (unshard([shard([x], r, world, method)[0] for r in range(world)], method) != x).sum().item()}


def all_checks(groups: dict[int, dist.ProcessGroup]) -> Iterator[tuple[str, Run]]:
    for name, world, method, layout, heads, window in attention_cases():
        yield name, lambda w=world, a=(method, layout, heads, window): check_attention(groups[w], *a)
    for name, world, method, mode in model_cases():
        yield name, lambda w=world, a=(method, mode): check_model(groups[w], *a)
    for method in METHODS:
        yield f"half-{method}", lambda method=method: check_half(groups[4], method)
        yield f"unshard-{method}", lambda method=method: check_unshard(groups[4], method)
        for world, heads in itertools.product((2, 4), HEADS):
            name = f"traffic-{method}-cp{world}-{heads[0]}to{heads[1]}"
            yield name, lambda w=world, a=(method, heads): check_traffic(groups[w], *a)
    yield "refusals", lambda: check_refusals(groups[4])


def main(rank: int, store: str, result: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]  # the second pair's global ranks are not its own
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    found = {name: run() for name, run in all_checks(groups)}
    everyone: list[dict[str, dict[str, float]]] = [{} for _ in range(RANKS)]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        worst = {name: {key: max(one[name][key] for one in everyone) for key in found[name]} for name in found}
        Path(result).write_text(json.dumps(worst))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
