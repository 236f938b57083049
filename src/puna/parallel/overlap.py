"""Tensor-parallel transfers hidden behind the matrix products beside them: both are cut into the steps of a ring.

Plain, a region begins with an all-gather whose result the product waits for, and ends with a reduce-scatter that waits
for the product. In steps, with n ranks, each works on one n-th of the tokens while the next n-th is under way:

    gather_matmul    step s: multiply the tokens of rank r - s, while they are passed on to rank r + 1
    matmul_scatter   step s: multiply the tokens of rank r - 1 - s, add what came from rank r - 1, pass the sum on

A transfer shows only as far as it takes longer than one n-th of the product. The same bytes travel as by the
collectives; backward passes are made of the same two loops. Forward keeps a rank's own tokens only: for the weights'
gradients they travel once more (as in Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2), so a block remembers
2 T D / n numbers of what enters its two regions instead of 2 T D.

Smaller products run less efficiently: worth it from some thousand tokens per rank. Source: Wang et al. 2022, ASPLOS,
'Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models', section 4.
Shapes: T tokens, t = T / n this rank's, D model width, K a rank's input and N a rank's output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from puna.base.console import PunaError


def gather_matmul(x_tD: Tensor, weights: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """[x w^T (T, N) for each w (N, D)] with x the rows of all ranks (T, D): what enters a region, as one gather.

    The gradient of x is summed over ranks and comes back cut by tokens. Every rank holds as many tokens.
    """
    return list(_GatherMatmul.apply(group, *_autocast(x_tD, *weights)))


def matmul_scatter(x_TK: Tensor, weight_NK: Tensor, group: ProcessGroup) -> Tensor:
    """x w^T summed over ranks, of which each keeps its tokens (t, N): what leaves a region.

    Raises PunaError when the tokens do not divide by the ranks. Partial sums travel in x's dtype, as in the collective.
    """
    ranks = dist.get_world_size(group)
    if x_TK.shape[0] % ranks:
        raise PunaError(
            f"{x_TK.shape[0]} tokens in a micro-batch are not divisible by tp {ranks}",
            "choose seq_len x micro_batch_size divisible by tp, or --parallel.sequence_parallel false",
        )
    return _MatmulScatter.apply(group, *_autocast(x_TK, weight_NK))


class _GatherMatmul(Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x_tD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x_tD, *weights)
        tokens, ranks = x_tD.shape[0], dist.get_world_size(group)
        outputs = tuple(x_tD.new_empty(tokens * ranks, weight.shape[0]) for weight in weights)
        for rank, part_tD in _everyones(x_tD, group):
            for weight, y_TN in zip(weights, outputs, strict=True):
                torch.mm(part_tD, weight.T, out=_rows(y_TN, rank, tokens))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_tD, *weights = ctx.saved_tensors
        tokens = x_tD.shape[0]
        grad_x: Tensor | None = None
        grad_w: list[Tensor] = []
        if ctx.needs_input_grad[1]:

            def part(rank: int) -> Tensor:
                pairs = zip(gradients, weights, strict=True)
                return _sum_products([(_rows(g_TN, rank, tokens), weight) for g_TN, weight in pairs])

            grad_x = _summed(part, ctx.group)
        if any(ctx.needs_input_grad[2:]):
            grad_w = [torch.zeros_like(weight) for weight in weights]
            for rank, part_tD in _everyones(x_tD, ctx.group):
                for total_ND, g_TN in zip(grad_w, gradients, strict=True):
                    total_ND.addmm_(_rows(g_TN, rank, tokens).T, part_tD)
        return None, grad_x, *(grad_w or (None,) * len(weights))


class _MatmulScatter(Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(x_TK, weight_NK)
        tokens = x_TK.shape[0] // dist.get_world_size(group)
        return _summed(lambda rank: _rows(x_TK, rank, tokens) @ weight_NK.T, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        tokens = gradients[0].shape[0]
        grad_x = torch.empty_like(x_TK) if ctx.needs_input_grad[1] else None
        grad_w = torch.zeros_like(weight_NK) if ctx.needs_input_grad[2] else None
        for rank, g_tN in _everyones(gradients[0], ctx.group):
            if grad_x is not None:
                torch.mm(g_tN, weight_NK, out=_rows(grad_x, rank, tokens))
            if grad_w is not None:
                grad_w.addmm_(g_tN.T, _rows(x_TK, rank, tokens))
        return None, grad_x, grad_w


def _everyones(x: Tensor, group: ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(rank, its x) for every rank, this one first; the next x is under way while the caller works with this one."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    x = x.contiguous()
    for step in range(ranks):
        moving = _Moving(x, group) if step < ranks - 1 else None
        yield (rank - step) % ranks, x
        if moving is not None:
            x = moving.arrived()


def _summed(part: Callable[[int], Tensor], group: ProcessGroup) -> Tensor:
    """The sum over ranks of their `part(this rank)`; a sum is under way while the next part is made."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total, moving = part((rank - 1) % ranks), None
    for step in range(1, ranks):
        moving = _Moving(total, group)
        total = part((rank - 1 - step) % ranks)
        total += moving.arrived()
    return total


class _Moving:
    """A tensor on its way to the next rank, and one of that shape from the rank before."""

    def __init__(self, x: Tensor, group: ProcessGroup):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent, self.received = x, torch.empty_like(x)
        there = dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % ranks)
        here = dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % ranks)
        self.works = dist.batch_isend_irecv([there, here])

    def arrived(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _rows(x: Tensor, rank: int, tokens: int) -> Tensor:
    return x[rank * tokens : (rank + 1) * tokens]


def _sum_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    (first, weight), *others = pairs
    total = first @ weight
    for gradient, weight in others:
        total.addmm_(gradient, weight)
    return total


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that a product would run in: the Functions call torch below autocast."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
