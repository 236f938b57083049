"""The model's layers as one rank of a tensor-parallel group holds them: the same names, weights as DTensors.

A weight is a DTensor, so optimizers, checkpoints and FSDP2 know what is a part of what; the arithmetic takes its local
part, so puna's kernels run as on one device. Shapes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from puna.model.attention import RMSNorm
from puna.model.linear import Linear
from puna.ops.basic import rms_norm
from puna.ops.linear import linear
from puna.parallel.overlap import gather_matmul, matmul_scatter
from puna.parallel.plan import bounds, take
from puna.parallel.tensor import TensorParallel, gather_rows, local


class ColumnLinear(Linear):
    """This rank's output features; x holds all tokens. `rows` picks some of a weight that every rank holds whole."""

    def __init__(self, source: Linear, tp: TensorParallel, rows: tuple[int, int] | None = None):
        nn.Module.__init__(self)
        self.tp, self.rows = tp, rows
        dim = 0 if rows is None else None
        self.weight = distribute(source.weight, tp, dim)
        self.bias = None if source.bias is None else distribute(source.bias, tp, dim)

    def forward(self, x_TK: Tensor) -> Tensor:
        return linear(x_TK, self._part(self.weight), None if self.bias is None else self._part(self.bias))

    def forward_all(self, layers: tuple[Linear, ...], x_TK: Tensor) -> list[Tensor]:
        if not self.tp.overlap:
            return super().forward_all(layers, x_TK)
        columns = cast("tuple[ColumnLinear, ...]", layers)
        outputs = gather_matmul(x_TK, [layer._part(layer.weight) for layer in columns], self.tp.group)
        biases = [None if layer.bias is None else layer._part(layer.bias) for layer in columns]
        return [y if bias is None else y + bias.to(y.dtype) for y, bias in zip(outputs, biases, strict=True)]

    def _part(self, weight: Tensor) -> Tensor:
        if self.rows is None:
            return local(weight)
        return self.tp.shared(weight, partial=True)[slice(*self.rows)]


class RowLinear(Linear):
    """This rank's input features; the partial sums leave the region together, and the bias is added once after that."""

    def __init__(self, source: Linear, tp: TensorParallel):
        nn.Module.__init__(self)
        self.tp = tp
        self.weight = distribute(source.weight, tp, 1)
        self.bias = None if source.bias is None else distribute(source.bias, tp, None)

    def forward(self, x_TK: Tensor) -> Tensor:
        if self.tp.overlap:
            y_TN = matmul_scatter(x_TK, self._part(self.weight), self.tp.group)
        else:
            y_TN = self.tp.leave(linear(x_TK, self._part(self.weight)))
        if self.bias is None:
            return y_TN
        return y_TN + self.tp.shared(self.bias, partial=self.tp.sequence).to(y_TN.dtype)

    def _part(self, weight: Tensor) -> Tensor:
        return local(weight)


class SequenceNorm(RMSNorm):
    """Norms its share of the tokens, then enters the region: what comes out holds all tokens.

    Unless the products behind it fetch them themselves.
    """

    def __init__(self, source: RMSNorm, tp: TensorParallel, enters: bool = True):
        nn.Module.__init__(self)
        self.tp, self.eps, self.enters = tp, source.eps, enters
        self.weight = distribute(source.weight, tp, None)

    def forward(self, x_TD: Tensor) -> Tensor:
        weight = self.tp.shared(self.weight, partial=self.tp.sequence)
        x_TD = rms_norm(x_TD, weight, self.eps)
        return self.tp.enter(x_TD) if self.enters else x_TD


class HeadNorm(SequenceNorm):
    """Norms this rank's heads with the weight that all heads share."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.tp.shared(self.weight, partial=True), self.eps)


class Vocabulary:
    """Embedding and head by words: each rank has some rows. Fills the Transformer's `look_up` and `score`."""

    def __init__(self, size: int, tp: TensorParallel):
        self.size, self.tp = size, tp
        self.first, self.end = bounds(size, tp.rank, tp.size)

    def look_up(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        """Rows of the embedding: zeros for other ranks' words, then summed; leaves cut by tokens as `leave` does."""
        elsewhere_T = (tokens_T < self.first) | (tokens_T >= self.end)
        x_TD = F.embedding((tokens_T - self.first).masked_fill(elsewhere_T, 0), local(weight_VD))
        return self.tp.leave(x_TD.masked_fill(elsewhere_T[:, None], 0))

    def score(self, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        """Logits over the whole vocabulary (T, V), on every rank: for generation. The loss never gathers them."""
        if torch.is_grad_enabled() and hidden_TD.requires_grad:
            raise RuntimeError("gathered logits carry no gradient; use parallel.loss.cross_entropy")
        logits_TV = linear(hidden_TD, local(weight_VD))
        step = bounds(self.size, 0, self.tp.size)[1]  # the widest part; a narrower last one is padded, then cut off
        padded_VT = F.pad(logits_TV, (0, step - logits_TV.shape[1])).T.contiguous()
        return gather_rows(padded_VT, self.tp.group)[: self.size].T


def distribute(weight: Tensor, tp: TensorParallel, dim: int | None) -> nn.Parameter:
    """A weight that is whole and equal on every rank (or on meta), as a DTensor that keeps this rank's part only."""
    placement: Placement = Replicate() if dim is None else Shard(dim)
    part = weight.detach() if dim is None else take(weight.detach(), dim, tp.rank, tp.size).clone().contiguous()
    shape, stride = weight.shape, weight.stride()
    held = DTensor.from_local(part, tp.mesh, [placement], run_check=False, shape=shape, stride=stride)
    return nn.Parameter(held, requires_grad=weight.requires_grad)
