"""Checks that run on ranks (see ranks.py): boxes are what DTensor holds, and whole tensors come together on their owner."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from puna.parallel import pieces
from puna.parallel.pieces import collect, in_copy_of, load_parts, pieces_of

SHAPES = [(8, 6), (5, 7), (1, 3), (9,), (2, 3, 4), (13, 1)]  # even, uneven, fewer rows than ranks, vectors


def numbers(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1


def grid(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple("abc"[: len(sizes)]))


def layouts(whole: Tensor) -> list[DTensor]:
    """This tensor cut in every way that this world's meshes allow, as DTensor itself cuts it."""
    world, last = dist.get_world_size(), whole.ndim - 1
    line = grid(world)
    found = [distribute_tensor(whole, line, [placement]) for placement in (Shard(0), Shard(last), Replicate())]
    if world == 4:
        square = grid(2, 2)
        choices = [
            (Shard(0), Replicate()),
            (Replicate(), Shard(last)),
            (Replicate(), Replicate()),
            (Shard(0), Shard(0)),
        ]
        choices += [(Shard(0), Shard(last)), (Shard(last), Shard(0))] if last else []
        found += [distribute_tensor(whole, square, choice) for choice in choices]
        found.append(distribute_tensor(whole, square["b"], [Shard(0)]))  # two copies on meshes of their own
    return found


def sharded(whole: Tensor, offload: bool = False) -> list[DTensor]:
    """FSDP2's cuts: alone, of two copies, and of what tensor parallelism left (its strided placement)."""
    world = dist.get_world_size()
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    found = []
    meshes = [(grid(world), None)]
    if world == 4:
        square = grid(2, 2)
        meshes += [(square, None), (square["a"], (square["b"], 0)), (square["a"], (square["b"], whole.ndim - 1))]
    for mesh, tensor_parallel in meshes:
        module = nn.Module()
        module.weight = nn.Parameter(whole.clone())
        if tensor_parallel is not None:
            module.weight = nn.Parameter(distribute_tensor(whole, tensor_parallel[0], [Shard(tensor_parallel[1])]))
        fully_shard(module, mesh=mesh, **policy)
        found.append(module.weight)
    return found


def boxes_are_what_ranks_hold() -> int:
    """The box of this rank cut out of the whole is its local part, bit for bit, for every kind of cut."""
    compared = 0
    for shape in SHAPES:
        whole = numbers(shape)
        for parameter in layouts(whole) + sharded(whole) + sharded(whole, offload=True):
            held = parameter.detach().to_local()
            cut = whole[pieces_of(parameter)]  # an empty part of DTensor's may have another shape
            assert torch.equal(cut, held) or cut.numel() == held.numel() == 0, (shape, parameter.placements)
            compared += 1
    assert pieces_of(numbers((3, 4))) == (slice(0, 3), slice(0, 4))
    return compared


def boxes_of_one_copy_cover_it_once() -> None:
    for shape in SHAPES:
        for parameter in layouts(numbers(shape)) + sharded(numbers(shape)):
            mine = parameter.device_mesh.mesh.flatten().tolist()
            for owner in mine:
                covered = torch.zeros(shape)
                for _, box in pieces._sources(parameter, owner):
                    covered[box] += 1
                assert bool((covered == 1).all()), (shape, parameter.placements)


def whole_tensors_come_to_their_owner() -> int:
    """One after the other to each rank, from the ranks' copies; others get nothing."""
    rank, arrived = dist.get_rank(), 0
    for shape in SHAPES:
        whole = numbers(shape)
        for parameter in layouts(whole) + sharded(whole):
            part = parameter.detach().to_local().clone()
            for owner in range(dist.get_world_size()):
                holders = parameter.device_mesh.mesh.flatten().tolist()
                there = owner in holders  # the other ranks hold another copy, on a mesh of their own
                found = collect([(parameter, owner, part)] if in_copy_of(parameter, owner) else [])
                assert (found is not None) == (rank == owner)
                assert not there or in_copy_of(parameter, owner) or rank != owner
                if found is not None:
                    assert torch.equal(found, whole), (shape, parameter.placements, owner)
                    arrived += 1
    return arrived


def several_owners_at_once() -> None:
    """A round: every rank collects another tensor at the same time; over a group of its own, too."""
    world, rank = dist.get_world_size(), dist.get_rank()
    group = dist.new_group(backend="gloo")
    for turn in range(3):
        wholes = [numbers((7, 5)) * (owner + 1) + turn for owner in range(world)]
        parameters = [distribute_tensor(whole, grid(world), [Shard(owner % 2)]) for owner, whole in enumerate(wholes)]
        wanted = [(parameter, owner, parameter.to_local()) for owner, parameter in enumerate(parameters)]
        assert torch.equal(collect(wanted, group), wholes[rank])
    plain = [(wholes[owner], owner, wholes[owner]) for owner in range(world)]
    assert collect(plain, group) is wholes[rank]


def only_the_copy_of_the_owner_travels() -> None:
    """Of two copies (HSDP) only the owner's own sends; a replicated tensor and an empty part do not travel."""
    if dist.get_world_size() != 4:
        return
    sent: list[int] = []
    real = dist.batch_isend_irecv

    def count(work: list[Any]) -> Any:
        sent.extend(one.tensor.numel() for one in work)
        return real(work)

    rank, square = dist.get_rank(), grid(2, 2)
    dist.batch_isend_irecv = count
    try:
        parameter = distribute_tensor(numbers((4, 4)), square, [Replicate(), Shard(0)])
        collect([(parameter, 1, parameter.to_local())] if in_copy_of(parameter, 1) else [])
        assert sent == ([8] if rank in (0, 1) else []), (rank, sent)
        sent.clear()
        parameter = distribute_tensor(numbers((4, 4)), square, [Replicate(), Replicate()])
        collect([(parameter, 1, parameter.to_local())] if in_copy_of(parameter, 1) else [])
        parameter = distribute_tensor(numbers((1, 4)), grid(4), [Shard(0)])
        collect([(parameter, 0, parameter.to_local())])
        assert sent == []
    finally:
        dist.batch_isend_irecv = real


def parts_are_read_and_nothing_else() -> None:
    """`load_parts` asks for this rank's boxes only, and puts them where they belong."""
    world = dist.get_world_size()
    asked: dict[str, int] = {}

    def read(name: str, box: tuple[slice, ...]) -> Tensor:
        part = (numbers((9, 4)) * (2 if name == "second" else 1))[box]
        asked[name] = part.numel()
        return part

    for offload in (False, True):
        with torch.device("meta"):
            model = nn.Module()
            model.first, model.second = nn.Parameter(torch.empty(9, 4)), nn.Parameter(torch.empty(9, 4))
        fully_shard(model, mesh=grid(world))
        load_parts(model, torch.device("cpu"), read, offload)
        assert torch.equal(model.first.full_tensor(), numbers((9, 4)))
        assert torch.equal(model.second.full_tensor(), numbers((9, 4)) * 2)
        held = model.first.to_local().numel()
        assert set(asked.values()) <= {held}


CHECKS = [
    boxes_are_what_ranks_hold,
    boxes_of_one_copy_cover_it_once,
    whole_tensors_come_to_their_owner,
    several_owners_at_once,
    only_the_copy_of_the_owner_travels,
    parts_are_read_and_nothing_else,
]
WORLDS = {4: CHECKS, 2: CHECKS}
