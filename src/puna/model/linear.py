"""The only Linear in the house. Today its weight is plain; packed weights will stand behind the same call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.ops import linear as ops


class Linear(nn.Module):
    """y = x W^T + b. Shapes: x (T, K), weight (N, K), bias (N,) or none; returns (T, N)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_TK: Tensor) -> Tensor:
        return ops.linear(x_TK, self.weight, self.bias)

    def forward_all(self, layers: tuple[Linear, ...], x_TK: Tensor) -> list[Tensor]:
        """The outputs of several layers, of which this is the first, for one input."""
        if all(type(layer) is Linear for layer in layers):
            return ops.linear_group(x_TK, [layer.weight for layer in layers], [layer.bias for layer in layers])
        return [layer(x_TK) for layer in layers]


def apply_all(layers: tuple[Linear, ...], x_TK: Tensor) -> list[Tensor]:
    """Every layer's output for one input, the way the first layer's kind does it: plain ones in one call."""
    return layers[0].forward_all(layers, x_TK)
