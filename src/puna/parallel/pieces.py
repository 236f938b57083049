"""Which part of a whole tensor a rank holds, and how a whole one comes together or apart again: for saves and loads.

A weight on a mesh is a DTensor: each mesh dimension leaves it whole or cuts it along one of its own dimensions, and
what a rank ends up with is a box, written as a tuple of slices. Of two dimensions that cut the same rows, tensor
parallelism cuts first and FSDP2 cuts what that left, though FSDP2's mesh dimension stands before: its placement is
marked as strided (it carries a `split_factor`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from puna.parallel.plan import bounds

Box = tuple[slice, ...]
Read = Callable[[str, Box], Tensor]  # (name of a parameter, box) -> those numbers, of any dtype, on the CPU


def pieces_of(parameter: Tensor, coordinate: Sequence[int] | None = None) -> Box:
    """The box that the rank at `coordinate` of the parameter's mesh holds; this rank's if None.

    A plain tensor is held whole. Uneven cuts follow torch.chunk, so that the last ranks may hold empty boxes.
    """
    box = [(0, length) for length in parameter.shape]
    if isinstance(parameter, DTensor):
        coordinate = coordinate or parameter.device_mesh.get_coordinate()
        assert coordinate is not None, "this rank is not in the parameter's mesh"
        for mesh_dim, dim in _cuts(parameter):
            first, end = box[dim]
            low, high = bounds(end - first, coordinate[mesh_dim], parameter.device_mesh.size(mesh_dim))
            box[dim] = (first + low, first + high)
    return tuple(slice(*ends) for ends in box)


def collect(wanted: Sequence[tuple[Tensor, int, Tensor]], group: ProcessGroup | None = None) -> Tensor | None:
    """Bring several tensors together at once, each on its owner only: the one this rank owns, else None.

    `wanted`: (parameter, owner's rank, this rank's part of it), in the same order on all ranks that hold parts. The
    parameter says how it is cut and is not read; its part may be a copy on another device (gloo: CPU, NCCL: GPU).
    `group` has all ranks. A rank owns at most one of them. Parts travel to the owner only, from the copy that the owner
    is in itself (its replica of an HSDP mesh, mostly its own nodes). Memory: the whole tensor, and parts that do not
    arrive in place.
    """
    rank, whole = _rank(), None
    work: list[dist.P2POp] = []
    arriving: list[tuple[Tensor, Tensor]] = []
    for parameter, owner, part in wanted:
        if owner == rank:
            assert whole is None, "a rank collects one tensor at a time"
            whole, landings = _open_whole(parameter, part, rank)
            work += [dist.P2POp(dist.irecv, buffer, source, group) for source, _, buffer in landings]
            arriving += [(place, buffer) for _, place, buffer in landings if buffer is not place]
        elif part.numel() and in_copy_of(parameter, owner):
            work.append(dist.P2POp(dist.isend, part.contiguous(), owner, group))
    for request in dist.batch_isend_irecv(work) if work else ():
        request.wait()
    for place, buffer in arriving:
        place.copy_(buffer)
    return whole


def in_copy_of(parameter: Tensor, owner: int) -> bool:
    """Whether this rank's part belongs to the same whole copy as the owner's: a plain tensor is a copy by itself.

    An owner outside of the parameter's mesh has a copy on another mesh (a tied embedding in the last pipeline stage).
    """
    if not isinstance(parameter, DTensor):
        return _rank() == owner
    here, there = parameter.device_mesh.get_coordinate(), _coordinate_of(parameter, owner)
    if here is None or there is None:
        return False
    cutting = {mesh_dim for mesh_dim, _ in _cuts(parameter)}
    return all(here[i] == there[i] for i in range(len(there)) if i not in cutting)


@torch.no_grad()
def load_parts(model: nn.Module, device: torch.device, read: Read, offload: bool = False) -> None:
    """Allocate this rank's parts of a model on meta and fill each from `read`: only what it holds is ever read.

    `offload`: parts lie on the CPU. Memory: the parts, plus one part.
    """
    model.to_empty(device="cpu" if offload else device)
    for name, parameter in model.named_parameters():
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if held.numel():
            held.copy_(read(name, pieces_of(parameter)))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _cuts(parameter: DTensor) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) in the order of cutting: strided ones last, the innermost of them first."""
    placements: list[Any] = [(i, p) for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    plain = [(i, p.dim) for i, p in placements if not hasattr(p, "split_factor")]
    return plain + [(i, p.dim) for i, p in reversed(placements) if hasattr(p, "split_factor")]


def _open_whole(parameter: Tensor, part: Tensor, rank: int) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """The owner's empty tensor with its own part in, and (source rank, place in it, buffer) of each part to come.

    Rows arrive in place; other boxes do not lie in one piece of memory and need a buffer.
    """
    if not isinstance(parameter, DTensor):
        return part, []
    whole = torch.empty(parameter.shape, dtype=part.dtype, device=part.device)
    landings = []
    for source, box in _sources(parameter, rank):
        place = whole[box]
        if place.numel() == 0:
            continue  # DTensor may give an empty part another shape
        if source == rank:
            place.copy_(part)
        else:
            landings.append((source, place, place if place.is_contiguous() else torch.empty_like(place)))
    return whole, landings


def _sources(parameter: DTensor, owner: int) -> Iterator[tuple[int, Box]]:
    """(rank, its box) of the ranks that together hold the copy that the owner is in."""
    mesh, there = parameter.device_mesh, _coordinate_of(parameter, owner)
    assert there is not None, f"rank {owner} holds no part of what it is to collect"
    cutting = {mesh_dim for mesh_dim, _ in _cuts(parameter)}
    for coordinate in product(*(range(mesh.size(i)) if i in cutting else (there[i],) for i in range(mesh.ndim))):
        yield int(mesh.mesh[coordinate]), pieces_of(parameter, coordinate)


def _coordinate_of(parameter: DTensor, rank: int) -> list[int] | None:
    found = (parameter.device_mesh.mesh == rank).nonzero()
    return found[0].tolist() if len(found) else None
