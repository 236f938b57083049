"""From degrees to process groups: one DeviceMesh whose dimensions are named after what they split.

Order, outermost first: pp, dp_replicate, dp_shard, cp, tp. Neighbouring ranks share a tensor-parallel group, because it
talks most: several times per layer, and within one node over NVLink. Pipelines talk least and may cross nodes.
"""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from puna.base.console import PunaError
from puna.parallel.degrees import Degrees

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DATA = ("dp_replicate", "dp_shard", "cp")  # ranks that see other tokens


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh of all ranks; a dimension of size 1 is left out, but dp_shard stays: FSDP2 wants a mesh, if of one.

    At 16k ranks each dimension left out saves as many process groups. Needs an initialised default process group.
    Raises PunaError when the world is not the product of the degrees.
    """
    if degrees.world != dist.get_world_size():
        raise PunaError(
            f"{degrees} = {degrees.world} ranks, but {dist.get_world_size()} were started",
            f"start {degrees.world} ranks, or change a degree",
        )
    sizes = {name: getattr(degrees, name) for name in DIMENSIONS}
    kept = {name: n for name, n in sizes.items() if n > 1 or name == "dp_shard"}
    return init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def submesh(mesh: DeviceMesh, name: str) -> DeviceMesh | None:
    """The 1-D mesh of one dimension, None where its size is 1 and it was left out."""
    return mesh[name] if name in (mesh.mesh_dim_names or ()) else None


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP2 runs over: (shard,), or (dp_replicate, shard) for HSDP.

    Context-parallel ranks hold the same weights and see other tokens, so they share in the sharding.
    """
    names = mesh.mesh_dim_names or ()
    shard = mesh["dp_shard"]
    if "cp" in names:
        shard = mesh["dp_shard", "cp"]._flatten(
            "dp_shard_cp"
        )  # remembered by the mesh: a second call returns the first
    if "dp_replicate" not in names:
        return shard
    with warnings.catch_warnings():  # of slicing by a flattened name, for which 2.11 has no other way yet
        warnings.simplefilter("ignore", UserWarning)
        return mesh["dp_replicate", "dp_shard_cp" if "cp" in names else "dp_shard"]


def data_ranks(mesh: DeviceMesh) -> tuple[int, int]:
    """(index, count) of the share of a batch that this rank reads: dp_replicate and dp_shard together, not cp."""
    index, ranks = 0, 1
    for name in ("dp_replicate", "dp_shard"):
        if (part := submesh(mesh, name)) is not None:
            index, ranks = index * part.size() + part.get_local_rank(), ranks * part.size()
    return index, ranks


def sum_over_data(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum over every rank that sees other tokens, in place: scored tokens and losses of the whole global batch.

    A loss divided by this count of tokens, with gradients summed (not averaged) over ranks, weighs every scored token
    the same, however unevenly ranks and micro-batches cut them. A mean of means does not.
    """
    for name in DATA:
        if (part := submesh(mesh, name)) is not None and part.size() > 1:
            dist.all_reduce(values, group=part.get_group())
    return values
