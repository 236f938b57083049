"""Where a tensor-parallel group talks: the four collectives, each with the one that is its gradient.

With sequence parallelism the residual stream is cut by tokens (T / ranks each); a block gathers tokens on the way in
and reduce-scatters on the way out. Without, it is whole everywhere, and the way out is an all-reduce: the same bytes,
more memory. Everything between these calls works on ordinary local tensors, so kernels need not know DTensor.
Sources: f and g in Shoeybi et al. 2019, arXiv:1909.08053, figure 3; g and g-bar in Korthikanti et al. 2022,
arXiv:2205.05198, figure 5. Shapes: T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from puna.base.console import PunaError


@dataclass(frozen=True)
class TensorParallel:
    """One rank's view of its tensor-parallel group. `sequence`: the residual stream is cut by tokens.

    `overlap` (only with `sequence`): transfers run in ring steps behind the products beside them.
    """

    mesh: DeviceMesh
    sequence: bool = True
    overlap: bool = False

    @property
    def group(self) -> ProcessGroup:
        return self.mesh.get_group()

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    def enter(self, x_TD: Tensor) -> Tensor:
        """Into a region where each rank has some heads, features or words: all tokens, and gradients summed back."""
        return gather(x_TD, self.group) if self.sequence else sum_gradient(x_TD, self.group)

    def leave(self, x_TD: Tensor) -> Tensor:
        """Out of it: the ranks' partial sums added up; each keeps its share of the tokens under sequence parallelism.

        Raises PunaError when the tokens do not divide: the collective itself would abort the process.
        """
        if not self.sequence:
            return _AllReduce.apply(x_TD, self.group)
        if x_TD.shape[0] % self.size:
            raise PunaError(
                f"{x_TD.shape[0]} tokens in a micro-batch are not divisible by tp {self.size}",
                "choose seq_len x micro_batch_size divisible by tp, or --parallel.sequence_parallel false",
            )
        return _ReduceScatter.apply(x_TD, self.group)

    def shared(self, weight: Tensor, partial: bool) -> Tensor:
        """A weight that every rank holds whole, as a local tensor. `partial`: ranks see other tokens or heads, so its
        gradient is their sum."""
        return sum_gradient(local(weight), self.group) if partial else local(weight)


def local(weight: Tensor) -> Tensor:
    """This rank's part of a DTensor, differentiable; a plain tensor is itself."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Rows of all ranks, one after another; the gradient is reduce-scattered."""
    return _Gather.apply(x, group)


def sum_gradient(x: Tensor, group: ProcessGroup) -> Tensor:
    """x itself; its gradient is summed over the group."""
    return _SumGradient.apply(x, group)


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """All-gather along dim 0, not differentiable."""
    ranks = dist.get_world_size(group)
    out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _scatter_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // dist.get_world_size(group), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scatter_rows(gradients[0], ctx.group), None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gather_rows(gradients[0], ctx.group), None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None
