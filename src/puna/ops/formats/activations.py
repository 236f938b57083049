"""Activations in eight bits while the model runs: int8 or float8, symmetric, one scale per token or one for all.

    dynamic   the scale is this very tensor's absmax (per token: every row's own)
    static    one number found by calibration: `symmetric_scale(absmax, scheme)`, stored with the weights as
    `input_scale`

Shapes: x (..., D) of any leading shape; scales (..., 1) per token, (1,) per tensor. Source: W8A8 as in SmoothQuant,
Xiao et al. 2022, arXiv:2211.10438, table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops.formats.rounding import decode, encode, symmetric_scale
from puna.ops.formats.scheme import Scheme


def quantize_activation(x: Tensor, scheme: Scheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes like x, scales in fp32). With `scale` given (static) it is used as it is; larger numbers are clamped."""
    assert scheme.symmetric
    assert scheme.granularity in ("token", "tensor")
    if scale is None:
        scale = symmetric_scale(activation_absmax(x, scheme), scheme)
    return encode(x, scheme, scale), scale


def dequantize_activation(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers the codes stand for."""
    return decode(codes, scale).to(dtype)


def activation_absmax(x: Tensor, scheme: Scheme) -> Tensor:
    """(..., 1) per token, (1,) per tensor: what calibration takes the maximum of over its batches."""
    if scheme.granularity == "token":
        return x.abs().amax(-1, keepdim=True)
    return x.abs().amax().reshape(1) if x.numel() else x.new_zeros(1)
