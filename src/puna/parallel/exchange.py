"""Context parallelism: one sequence on w ranks, and an `attend` that makes up for what each rank cannot see.

A rank runs the model on its own tokens (`sharding.shard`); only attention needs the others'. Three methods, by what
travels. Bytes that a rank sends per layer for forward and backward, with t = T / w tokens per rank, H query heads,
G key/value heads, head width K and b bytes per element (gradients of keys and values travel in fp32: 4 bytes):

    ulysses      4 t (H + G') K b (w - 1) / w            heads <-> tokens by all-to-all; G' = G repeated to divide by w
    allgather    2 t G K (w - 1) (2 b + 4)               keys and values to all, twice; their gradients summed home
    ring         2 t G K (w - 1) 2 b  +  2 t G K w 4     the same round a ring, during the arithmetic

Llama-3-8B (H 32, G 8, K 128) in bf16, 131,072 tokens on 8 ranks: 0.59, 1.88 and 2.01 GB per layer;
`traffic_bytes` says it for any shape. Which one wins:

- ulysses, wherever heads divide by w: least traffic, and it falls as 1 / w; each rank sees whole documents, so the
  plain kernel runs unchanged. But nothing hides the all-to-all, so keep it within a node, and tensor parallelism
  already has its share of the heads.
- allgather, where heads do not divide or G is much smaller than H, and for batches of many short documents: few large
  messages and the least arithmetic calls, but it holds every rank's keys and values for the layer at hand.
- ring, for the longest sequences: nothing grows with w, and the transfer hides behind the arithmetic as soon as a
  rank's t tokens keep it busy longer than 2 t G K b bytes take. With short documents there is nothing to hide behind.

Sources: Ulysses: Jacobs et al. 2023, arXiv:2309.14509; all-gather: Llama 3, arXiv:2407.21783, section 3.3.2;
ring: Liu et al. 2023, arXiv:2310.01889. Shapes: as in `ring`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.ops.attention import PackedCausal
from puna.parallel.ring import Share, gather_attention, ring_attention
from puna.parallel.sharding import check_context, token_count


@dataclass(frozen=True)
class ContextParallel:
    """Packed causal attention over the whole sequence, called by every rank of `group` with its own tokens.

    `documents` is the layout of the WHOLE sequence; tokens, positions and targets are cut by `sharding.shard` with the
    same `method`. Gradients of q, k and v come back on the rank that holds the token; gradients of weights are this
    rank's share and want summing over `group`.
    """

    documents: PackedCausal
    group: dist.ProcessGroup
    method: str

    @property
    def max_len(self) -> int:
        return self.documents.max_len

    # torch.compile would trace the plan of every document layout into a graph of its own, and compile for each batch.
    # The private name imports the compiler at the first call, the public one with this file: 2.4 s for every program.
    @torch._disable_dynamo
    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Attention output (T, H, K) of this rank's tokens. Raises PunaError if heads do not divide (ulysses)."""
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        tokens = token_count(self.documents)
        check_context(self.method, tokens, q_THK.shape[1], world)
        assert len(q_THK) * world == tokens, f"{len(q_THK)} tokens on each of {world} ranks, {tokens} in the layout"
        share = Share(self.documents, self.group, rank, world, window)
        device = q_THK.device.type
        q_THK, k_TGK, v_TGK = (x.to(_dtype(v_TGK)) for x in (q_THK, k_TGK, v_TGK))
        with torch.autocast(device, enabled=False):  # sums over parts are kept in fp32, whatever the matmuls run in
            return _ATTENTION[self.method](q_THK, k_TGK, v_TGK, share)


def context_parallel(
    documents: PackedCausal, group: dist.ProcessGroup, method: str, heads: int
) -> ContextParallel | PackedCausal:
    """The `attend` of this rank for a sequence laid out as `documents`; without company, `documents` itself.

    `heads`: query heads of a layer on this rank, after tensor parallelism. Raises PunaError if tokens or heads do not
    divide, or the method is unknown; every rank raises alike, before anything is sent.
    """
    world = dist.get_world_size(group)
    check_context(method, token_count(documents), heads, world)
    return documents if world == 1 else ContextParallel(documents, group, method)


def traffic_bytes(
    method: str, tokens: int, heads: int, kv_heads: int, head_dim: int, world: int, element: int = 2
) -> int:
    """Bytes that one rank sends per layer for forward and backward of a sequence of `tokens` (the table above)."""
    check_context(method, tokens, heads, world)
    row = tokens // world * head_dim
    if method == "ulysses":
        spread = kv_heads * _kv_repeats(heads, kv_heads, world)
        return 4 * row * (heads + spread) * element * (world - 1) // world
    there = 2 * row * kv_heads * (world - 1) * 2 * element
    return there + 2 * row * kv_heads * 4 * (world if method == "ring" else world - 1)


def ulysses_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, share: Share) -> Tensor:
    """All tokens of some heads instead of some tokens of all heads, and back; returns (T, H, K).

    Fewer kv heads than ranks are repeated, so that every rank gets those of its query heads.
    """
    world, kv_heads = share.world, k_TGK.shape[1]
    repeats = _kv_repeats(q_THK.shape[1], kv_heads, world)
    if repeats > 1:
        k_TGK, v_TGK = (x.repeat_interleave(repeats, 1) for x in (k_TGK, v_TGK))
    mine = [x.unflatten(1, (world, -1)) for x in (q_THK, k_TGK, v_TGK)]  # (T, w, heads of one rank, K)
    sizes = [x.shape[2] for x in mine]
    everyones = _AllToAll.apply(torch.cat(mine, 2).transpose(0, 1), share.group)
    q, k, v = everyones.flatten(0, 1).split(sizes, 1)  # (w T, heads of one rank, K)
    out = share.documents(0, q, k, v, share.window)
    heads = _AllToAll.apply(out.unflatten(0, (world, -1)), share.group)  # (w, T, heads of one rank, K)
    return heads.transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Row i of x (w, ...) goes to rank i, whose answer takes its place. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(gradients[0], ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def _kv_repeats(heads: int, kv_heads: int, world: int) -> int:
    """The fewest copies of each kv head with which they divide by `world` and still divide the query heads."""
    most = heads // kv_heads
    return next(n for n in range(1, most + 1) if most % n == 0 and kv_heads * n % world == 0)


def _dtype(x: Tensor) -> torch.dtype:
    """What torch's own attention would compute in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


_ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Share], Tensor]] = {
    "ulysses": ulysses_attention,
    "allgather": gather_attention,
    "ring": ring_attention,
}
