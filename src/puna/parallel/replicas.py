"""Data parallelism: DDP for whole copies, FSDP2 for shards, both as one mesh (HSDP). Gradients are sums over ranks.

What each stage of ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054) keeps whole on a rank, and what it sends per step of
M micro-batches, in units of the parameters P:

    zero  whole on every rank                    cut over ranks                     all-gather   reduce-scatter
    1     weights and gradients, within a step   fp32 weights, optimizer            P            P
    2     weights, within a micro-batch          the same and gradients             P M          P M
    3     two blocks' weights                    the same                           2 P M        P M
    HSDP  as its stage; across replicas one all-reduce of a rank's gradient shards per step

All are FSDP2, so parameters, optimizer state and checkpoints look the same: zero 1 gathers once per step and holds
gradients back until the last micro-batch.
"""

# No `from __future__ import annotations` here: DDP looks at the types of its hook and refuses strings.

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


def shard_data_parallel(
    model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, zero: int, dtype: torch.dtype, cpu_offload: bool
) -> None:
    """FSDP2 over `mesh` (shard,) or (replicate, shard): each block a unit, the rest of the model one more, in place.

    Weights stay fp32 shards; `dtype` is what is gathered and computed with, gradients are reduced in fp32. Embedding,
    last norm and head stay whole from forward to backward: the loss reads the head outside of the model's forward.
    """
    low = dtype != torch.float32
    policy = MixedPrecisionPolicy(dtype, torch.float32) if low else MixedPrecisionPolicy()
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for block in blocks:
        fully_shard(block, reshard_after_forward=zero == 3, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)
    for unit in _units(model):
        # Sums, not means: the loss is already divided by the scored tokens of the whole global batch.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # else the factor asks for PREMUL_SUM, which only NCCL has


def replicate(model: nn.Module, mesh: DeviceMesh) -> DistributedDataParallel:
    """DDP over a 1-D mesh, its gradients summed: the model is `.module` of what is returned."""
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group())  # there are no buffers to broadcast
    wrapped.register_comm_hook(mesh.get_group(), _sum_bucket)
    return wrapped


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


@contextmanager
def micro_batch(model: nn.Module, last: bool, zero: int = 3) -> Iterator[None]:
    """Around forward and backward of one micro-batch of a step; `last` is the one after which the optimizer steps.

    DDP and zero 1 communicate gradients only in the last, zero 2 and 3 in each: they have no room for whole gradients,
    but for their own shards, so replicas of an HSDP mesh, often on other nodes, still talk only in the last.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_all_reduce(last)
        if zero == 1:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last)
    yield


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward one has left gathered."""
    for unit in _units(model):
        unit.reshard()


def unwrap(model: nn.Module) -> nn.Module:
    """The Transformer itself, out of DDP; FSDP2 and the others change it in place."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
