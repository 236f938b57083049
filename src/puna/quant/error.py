"""How wrong a layer's outputs are because its weight is rounded: the measure every method is judged by.

    error = sqrt( sum over inputs |(W' - W) x|^2 / sum over inputs |W x|^2 ) = sqrt( tr dW H dW^T / tr W H W^T )

with H the sum of x x^T. Both sides of the second form need nothing but H; with a sample of inputs H is X^T X.

Shapes: N outputs, D inputs, T sampled inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed

_ROWS = 1024  # of the weight at a time: what is held beside it is bounded


def error_of(
    weight_ND: Tensor,
    other: Tensor | Packed | QuantizedWeight,
    *,
    second_DD: Tensor | None = None,
    sample_TD: Tensor | None = None,
) -> float:
    """Relative error of the outputs if `other` stands where the weight stood; 0 for equal weights, 1 for a weight of 0.

    Measured by second_DD, else on sample_TD, else without inputs (all columns count alike).
    """
    other_ND = other if isinstance(other, Tensor) else other.dequantize()
    wrong = weight_ND.new_zeros((), dtype=torch.float64)
    whole = torch.zeros_like(wrong)
    for weight, approx in zip(weight_ND.split(_ROWS), other_ND.split(_ROWS), strict=True):
        delta = approx.float() - weight.float()
        wrong += squares(delta, second_DD, sample_TD).sum(dtype=torch.float64)
        whole += squares(weight.float(), second_DD, sample_TD).sum(dtype=torch.float64)
    return float((wrong / whole).sqrt()) if whole > 0 else float(wrong > 0)


def squares(rows_ND: Tensor, second_DD: Tensor | None = None, sample_TD: Tensor | None = None) -> Tensor:
    """Sum over the inputs of (row x)^2, one number per row (N,)."""
    if second_DD is not None:
        return (rows_ND @ second_DD).mul_(rows_ND).sum(1).clamp_(min=0)
    outputs = rows_ND if sample_TD is None else rows_ND @ sample_TD.to(rows_ND.dtype).t()
    return outputs.square().sum(1)
