"""Quantization-aware training: numbers are rounded on the way forward, the gradient passes as if they had not been.

    forward   w' = dequantize(quantize(w))          backward   dw = dw' where w lies in the range of codes, else 0

Outside the range the rounded number does not move with w, so there the true gradient, 0, is the right one.
Source: the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432; clipped as in Jacob et al. 2018,
arXiv:1712.05877, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from puna.ops.formats import rounding
from puna.ops.formats.scheme import FLOAT8_MAX, Scheme

_SLACK = 1e-4  # of a step: absmax / scale is 7.5 but for the rounding of the division, and must keep its gradient


def fake_quantize(x: Tensor, scheme: Scheme, scales: Tensor | None = None, zeros: Tensor | None = None) -> Tensor:
    """x rounded to the scheme's numbers, in x's dtype and shape (..., D), with the straight-through gradient.

    Without scales they are chosen from x itself (what a weight in training needs). Equals `dequantize(quantize(x))`.
    """
    rounded: Tensor = _StraightThrough.apply(x, scheme, scales, zeros)
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scheme: Scheme, scales: Tensor | None, zeros: Tensor | None) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        if scales is None:
            scales, zeros = rounding.choose_scales(x_ND, scheme)
        codes = rounding.quantize(x_ND, scheme, scales, zeros)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_inside(x_ND, scheme, scales, zeros).view(x.shape))
        return rounding.dequantize(codes, scales, zeros).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def _inside(x_ND: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Where x is within half a step of the outermost codes; the last step of float8 is 32 of 448."""
    margin = FLOAT8_MAX / 28 if scheme.kind == "float" else 0.5
    highest, lowest = scheme.highest + margin + _SLACK, scheme.lowest - margin - _SLACK
    zero = 0.0 if zeros is None else _spread(zeros, x_ND.shape)
    step = _spread(scales, x_ND.shape)
    return (x_ND <= (highest - zero) * step) & (x_ND >= (lowest - zero) * step)


def _spread(values: Tensor, shape: torch.Size) -> Tensor:
    """One value per tile -> one per number."""
    height, width = shape[0] // max(1, values.shape[0]), shape[1] // max(1, values.shape[1])
    return values.repeat_interleave(height, 0).repeat_interleave(width, 1)
