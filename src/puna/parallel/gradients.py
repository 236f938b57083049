"""The norm of a gradient that is scattered over many ranks, each number counted once, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

Layout = tuple[DeviceMesh, tuple[Placement, ...]] | None  # None: a plain tensor, whole on this rank


def clip_gradients(
    parameters: Iterable[Tensor], limit: float, pipeline: ProcessGroup | None = None, eps: float = 1e-6
) -> Tensor:
    """Scale all gradients down to a global 2-norm of `limit` (0: never) and return the norm before that.

    As `torch.nn.utils.clip_grad_norm_`, for parameters on several meshes at once. `pipeline`: the group whose ranks
    hold other layers. The same fp32 scalar on every rank.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(parameters, pipeline)
    if limit > 0:
        factor = (limit / (norm + eps)).clamp(max=1.0)
        for parameter in parameters:
            grad = _local_grad(parameter)
            grad.mul_(factor.to(grad.device))
    return norm


def gradient_norm(parameters: Iterable[Tensor], pipeline: ProcessGroup | None = None) -> Tensor:
    """Global 2-norm of all gradients, fp32, equal on every rank.

    Squares are summed per layout (mesh and placements) and added over the dimensions that cut the tensor, never over
    those that repeat it: one small all-reduce per cut dimension and layout, not per tensor.
    """
    gradients: dict[Layout, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            gradients[_layout(parameter.grad)].append(_local_grad(parameter))
    total: Tensor | None = None
    for layout in sorted(gradients, key=_order):
        squares = _sum_squares(gradients[layout])
        if layout is not None:
            squares = _sum_over_cuts(squares, *layout)
        total = squares if total is None else total + squares.to(total.device)
    if total is None:
        total = torch.zeros((), dtype=torch.float64)
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    norm: Tensor = total.sqrt().float()
    return norm


def _layout(grad: Tensor) -> Layout:
    return (grad.device_mesh, tuple(grad.placements)) if isinstance(grad, DTensor) else None


def _order(layout: Layout) -> str:
    """Ranks call the collectives in one order. By names: a mesh's own text holds ranks, which differ between groups."""
    return "" if layout is None else f"{layout[0].mesh_dim_names} {layout[1]}"


def _local_grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _sum_squares(tensors: list[Tensor]) -> Tensor:
    """In fp64 after fp32 norms: a square of 1e20 is beyond fp32, and a shard may be empty."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    norms = torch._foreach_norm(filled, 2.0, dtype=torch.float32)
    return torch.stack(list(norms)).double().square().sum()


def _sum_over_cuts(squares: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    squares = squares.to(mesh.device_type)  # offloaded gradients lie on the CPU, the group talks on the device
    for dim, placement in enumerate(placements):
        assert not placement.is_partial(), "a gradient that is not summed yet"
        if not placement.is_replicate() and mesh.size(dim) > 1:
            dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares
