"""The passes that make a Transformer parallel, applied after building it: the model file knows of none of them.

Order matters: tensor parallelism cuts weights, checkpointing and compilation wrap each block's forward, FSDP2 cuts what
is left and hooks around all that. Build the model on meta and hand in a seed: no rank ever holds it whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from puna.base.console import PunaError
from puna.model.attention import RMSNorm
from puna.model.linear import Linear
from puna.model.spec import Spec
from puna.model.transformer import Block, Transformer
from puna.parallel.layers import ColumnLinear, HeadNorm, RowLinear, SequenceNorm, Vocabulary, distribute
from puna.parallel.materialise import init_weights
from puna.parallel.mesh import data_mesh, submesh
from puna.parallel.plan import check_tensor_parallel, kv_heads, role_of
from puna.parallel.recompute import checkpoint_activations, compile_blocks
from puna.parallel.replicas import replicate, shard_data_parallel
from puna.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Options:
    """What the mesh does not say. `dtype`: of gathered weights and arithmetic under FSDP2 (elsewhere use autocast).

    `compiler`: e.g. `torch.compile`, applied to each block's forward; None: eager. `rewrite`: a pass from above, called
    when tensor parallelism has put its layers in place; it may change layers, not their parameters.
    """

    zero: int = 3
    sequence_parallel: bool = True
    overlap: bool = False
    activation_checkpointing: str = "none"
    compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    dtype: torch.dtype = torch.float32
    cpu_offload: bool = False
    rewrite: Callable[[Transformer], None] | None = None


Fill = Callable[[Transformer, torch.device, bool], None]  # (model of parts on meta, device, offload): weights into it


def parallelize(
    model: Transformer,
    mesh: DeviceMesh,
    options: Options | None = None,
    seed: int | None = None,
    fill: Fill | None = None,
) -> nn.Module:
    """Apply every degree of `mesh` but pp and cp, in place; returns the model, in DDP where only dp_replicate is > 1.

    `model` is on meta, and then gets weights once it is cut: from `fill`, or those of `Transformer.init_weights` for
    `seed`, or none yet (then `materialise` them; DDP copies weights, so it needs one of both). Or it is filled, alike
    on every rank. Raises PunaError for shapes that the mesh cannot cut.
    """
    options = options or Options()
    blocks = _blocks(model)
    if (tensor := submesh(mesh, "tp")) is not None:
        apply_tensor_parallel(
            model, TensorParallel(tensor, options.sequence_parallel, options.overlap and options.sequence_parallel)
        )
    if options.rewrite is not None:
        options.rewrite(model)
    checkpoint_activations(blocks, options.activation_checkpointing)
    if options.compiler is not None:
        compile_blocks(blocks, options.compiler)
    sharded = needs_fsdp(mesh, options)
    if sharded:
        _check_zero(options.zero)
        shard_data_parallel(model, blocks, data_mesh(mesh), options.zero, options.dtype, options.cpu_offload)
    if fill is None and seed is not None and next(model.parameters()).is_meta:
        fill = partial(_init, seed)
    if fill is not None:
        fill(model, torch.device(_device(mesh)), sharded and options.cpu_offload)
    copies = submesh(mesh, "dp_replicate")
    return replicate(model, copies) if copies is not None and not sharded else model


def needs_fsdp(mesh: DeviceMesh, options: Options) -> bool:
    """True unless ranks hold nothing but whole copies.

    FSDP2 also joins copies of DTensors and of pipeline stages, which DDP does not, and casts for tp and pp in bf16.
    """
    data = data_mesh(mesh)
    if data.size(data.ndim - 1) > 1 or options.cpu_offload:
        return True
    cut = not {"tp", "pp"}.isdisjoint(mesh.mesh_dim_names or ())
    return cut and (data.size() > 1 or options.dtype != torch.float32)


def apply_tensor_parallel(model: Transformer, tp: TensorParallel) -> None:
    """Replace each layer the table in `plan` names by its tensor-parallel twin; names of parameters stay."""
    spec = model.spec
    check_tensor_parallel(spec, tp.size)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear | RMSNorm) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _twin(name, module, spec, tp))
    words = Vocabulary(spec.vocab_size, tp)
    model.look_up, model.score = words.look_up, words.score
    if getattr(model, "embed", None) is not None:
        model.embed = distribute(model.embed, tp, 0)
    if model.lm_head is not None:
        model.lm_head.weight = distribute(model.lm_head.weight, tp, 0)


def _twin(name: str, module: nn.Module, spec: Spec, tp: TensorParallel) -> nn.Module:
    role = role_of(name)
    if isinstance(module, RMSNorm):
        # The last norm's tokens go to the loss, which gathers nothing itself.
        return (
            SequenceNorm(module, tp, name == "norm" or not tp.overlap) if role == "sequence" else HeadNorm(module, tp)
        )
    assert isinstance(module, Linear)
    if role == "row":
        return RowLinear(module, tp)
    if role == "kv_column" and spec.num_key_value_heads < tp.size:
        first, end = kv_heads(spec, tp.rank, tp.size)
        return ColumnLinear(module, tp, (first * spec.head_dim, end * spec.head_dim))
    return ColumnLinear(module, tp)


def _init(seed: int, model: Transformer, device: torch.device, offload: bool) -> None:
    init_weights(model, device, seed, offload)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """In order of execution; a pipeline stage has some."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _device(mesh: DeviceMesh) -> str:
    return "cpu" if mesh.device_type == "cpu" else f"{mesh.device_type}:{torch.cuda.current_device()}"


def _check_zero(zero: int) -> None:
    if zero not in (1, 2, 3):
        raise PunaError(f"zero {zero} is no stage of ZeRO", "use --parallel.zero 1, 2 or 3")
