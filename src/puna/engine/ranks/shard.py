"""One rank's part of a model, to answer with: cut by the table that training cuts by, packed weights included.

Projections into the heads and into the feed-forward keep some outputs, those back into the residual stream some inputs:
their partial sums are added up over the ranks, twice a layer. Embedding and head keep some words. Between these sums
everything is local, and every rank holds the whole residual stream. Source: Shoeybi et al. 2019, arXiv:1909.08053,
section 3.

Shapes: T tokens, D model width, V vocabulary, N outputs and K inputs of a layer.
"""

from __future__ import annotations

import dataclasses
from math import gcd
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from puna.base.console import PunaError
from puna.model.linear import QuantizedLinear
from puna.model.transformer import Transformer
from puna.ops.formats.kv import KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed
from puna.parallel.plan import bounds, check_tensor_parallel, cut_dim, kv_heads, role_of
from puna.weights.folder import load_model
from puna.weights.reader import WeightReader


@dataclasses.dataclass(frozen=True)
class Part:
    """Which of `size` ranks this is, and whom it adds up with."""

    rank: int
    size: int
    group: ProcessGroup | None = None

    def add_up(self, x_TD: Tensor) -> Tensor:
        """The sum of all ranks' partial sums, in place."""
        dist.all_reduce(x_TD, group=self.group)
        return x_TD


class SummedLinear(nn.Module):
    """A layer of which every rank has some inputs: the ranks' outputs are added up. One rank has the bias."""

    def __init__(self, inner: nn.Module, part: Part):
        super().__init__()
        self.inner, self.part = inner, part

    def forward(self, x_TK: Tensor) -> Tensor:
        return self.part.add_up(self.inner(x_TK))


class Words:
    """Some rows of the embedding: the Transformer's `look_up`. Other ranks' words are zeros here."""

    def __init__(self, vocab_size: int, part: Part):
        self._first, self._end = bounds(vocab_size, part.rank, part.size)
        self._part = part

    def look_up(self, tokens_T: Tensor, embed_VD: Tensor) -> Tensor:
        elsewhere_T = (tokens_T < self._first) | (tokens_T >= self._end)
        x_TD = F.embedding((tokens_T - self._first).masked_fill(elsewhere_T, 0), embed_VD)
        return self._part.add_up(x_TD.masked_fill_(elsewhere_T[:, None], 0))


def load_part(path: str | Path, dtype: torch.dtype, device: torch.device, part: Part) -> Transformer:
    """The Transformer of a folder (or preset) as rank `part` holds it: one whole tensor in memory at a time.

    Errors: PunaError for shapes or packed groups that cannot be cut, and as `load_model`.
    """
    if str(path).startswith("preset:"):
        whole = load_model(path, dtype, device)
        weights: dict[str, Any] = dict(whole.named_parameters())
        names, spec, scales = list(weights), whole.spec, None
        read = weights.__getitem__
    else:
        reader = WeightReader(path)
        names, spec, scales, read = reader.names(), reader.spec, reader.kv_scales(), reader.weight
    check_tensor_parallel(spec, part.size)
    with torch.device("meta"):
        model = Transformer(spec)
    biases: dict[str, Tensor] = {}
    for name in sorted(names, key=lambda name: not name.endswith("bias")):  # a quantized layer is built with its bias
        with torch.no_grad():
            mine = cut(name, read(name), model, part)
        if name.endswith(".bias"):
            biases[name.removesuffix(".bias")] = mine.to(device, dtype)
        if isinstance(mine, QuantizedWeight):
            layer = name.removesuffix(".weight")
            _replace(model, layer, QuantizedLinear(mine, biases.get(layer), dtype).to(device))
        elif not (name.endswith(".bias") and isinstance(model.get_submodule(name[:-5]), QuantizedLinear)):
            _assign(model, name, mine.to(device=device, dtype=dtype, copy=True))
    _connect(model, part)
    model.kv_scales = None if scales is None else _local_scales(scales, model, part).to(device)  # type: ignore[assignment]
    return model.eval()


def cut(name: str, weight: Tensor | QuantizedWeight, model: Transformer, part: Part) -> Any:
    """This rank's part of the whole parameter `name`."""
    dim, (first, end) = _range(name, weight.shape, model, part)
    if dim is None:
        is_others = isinstance(weight, Tensor) and name.endswith("bias") and role_of(name) == "row" and part.rank > 0
        return torch.zeros_like(weight) if is_others else weight  # type: ignore[arg-type]
    if isinstance(weight, QuantizedWeight):
        return cut_quantized(name, weight, dim, first, end)
    return weight.narrow(dim, first, end - first)


def cut_quantized(name: str, weight: QuantizedWeight, dim: int, first: int, end: int) -> QuantizedWeight:
    """Some outputs (dim 0) or inputs (dim 1) of a packed weight.

    Errors: PunaError where that would cut through groups.
    """
    packed, (rows, columns) = weight.packed, weight.shape
    height, width = packed.scheme.tile(packed.shape)
    changed: dict[str, Any]
    low: dict[str, Any]
    if dim == 0:
        _check_edges(name, "outputs", first, end, rows, height)
        tiles = slice(first // height, -(-end // height))
        changed = {"data": packed.data[first:end], "shape": (end - first, columns), "scales": packed.scales[tiles]}
        changed |= {} if packed.zeros is None else {"zeros": packed.zeros[tiles]}
        low = {} if weight.up_NR is None else {"up_NR": weight.up_NR[first:end]}
        return dataclasses.replace(weight, packed=_contiguous(dataclasses.replace(packed, **changed)), **low)
    if weight.activations is not None:
        raise PunaError(
            f"{name} rounds its inputs token by token: a rank that sees some of them would round otherwise",
            "use tensor parallelism with weight-only formats, or one process",
        )
    step, words = _columns_of_words(packed)
    _check_edges(name, "inputs", first, end, columns, step)
    data = packed.data[:, first // step * words : -(-end // step) * words]
    changed = {"data": data, "shape": (rows, end - first)}
    if packed.group_of_D is not None:
        changed["group_of_D"] = packed.group_of_D[first:end]
    elif packed.scales.shape[1] > 1:
        _check_edges(name, "inputs", first, end, columns, width)
        tiles = slice(first // width, -(-end // width))
        changed["scales"] = packed.scales[:, tiles]
        changed |= {} if packed.zeros is None else {"zeros": packed.zeros[:, tiles]}
    low = {} if weight.down_RD is None else {"down_RD": weight.down_RD[:, first:end]}
    return dataclasses.replace(weight, packed=_contiguous(dataclasses.replace(packed, **changed)), **low)


def _columns_of_words(packed: Packed) -> tuple[int, int]:
    """(columns, entries of data): the fewest columns that fill whole entries."""
    if packed.data.dtype is not torch.int32:
        return 1, 1
    step = 32 // gcd(32, packed.scheme.bits)
    return step, step * packed.scheme.bits // 32


def _range(name: str, shape: Any, model: Transformer, part: Part) -> tuple[int | None, tuple[int, int]]:
    spec = model.spec
    if role_of(name) == "kv_column":
        first, end = kv_heads(spec, part.rank, part.size)  # with fewer heads than ranks, neighbours share one
        return 0, (first * spec.head_dim, end * spec.head_dim)
    dim = cut_dim(name, spec, part.size)
    return dim, (0, 0) if dim is None else bounds(shape[dim], part.rank, part.size)


def _check_edges(name: str, what: str, first: int, end: int, length: int, step: int) -> None:
    if first % step or (end % step and end != length):
        raise PunaError(
            f"{name} is packed in groups of {step} {what}; a rank's part from {first} to {end} cuts through one",
            "use fewer ranks, or quantize with smaller groups",
        )


def _contiguous(packed: Packed) -> Packed:
    parts: dict[str, Any] = {
        name: value.contiguous() for name, value in vars(packed).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(packed, **parts)


def _connect(model: Transformer, part: Part) -> None:
    for block in blocks_of(model):
        block.attn.o_proj = SummedLinear(block.attn.o_proj, part)
        block.mlp.down_proj = SummedLinear(block.mlp.down_proj, part)
    model.look_up = Words(model.spec.vocab_size, part).look_up


def blocks_of(model: Transformer) -> list[Any]:
    """Its blocks, for those who look into them or exchange a layer."""
    return list(model.layers)


def _local_scales(scales: KVScales, model: Transformer, part: Part) -> KVScales:
    if scales.heads is None:
        return scales
    mine = slice(*kv_heads(model.spec, part.rank, part.size))
    keys, values = ([scale[mine] for scale in side] for side in (scales.keys, scales.values))
    return dataclasses.replace(scales, keys=tuple(keys), values=tuple(values))


def _replace(model: nn.Module, layer: str, module: nn.Module) -> None:
    parent, _, leaf = layer.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor.contiguous(), requires_grad=False))


def local_kv_heads(model: Transformer) -> int:
    """Key/value heads that this rank computes: counted on the projection."""
    layer = blocks_of(model)[0].attn.k_proj
    outputs = layer.product.shape[0] if isinstance(layer, QuantizedLinear) else layer.weight.shape[0]
    return outputs // model.spec.head_dim
