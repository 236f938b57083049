"""The native normalisation of the few rows of a decoding step. Shapes: D model width."""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from puna.ops.native import library
from puna.ops.native.guard import PLAIN, is_watched

MAX_ROWS = 8  # rows of a norm that are worth a call of one core; head norms have one row per head and token

_native = library.load()
_LEVEL = _native.level
_NORM = struct.Struct("PPPqqfi")  # `Norm` in norm.cpp
Kernel = Callable[[bytes], int]
_NORMS: dict[torch.dtype, Kernel] = {}
if _native.kernels:
    _NORMS |= {torch.float32: _native.kernels.puna_norm_float32, torch.bfloat16: _native.kernels.puna_norm_bfloat16}


def serves_norm(x: Tensor, weight_D: Tensor) -> bool:
    """True if `norm` may take these: a few rows that nobody differentiates."""
    return (
        x.numel() <= MAX_ROWS * 4096
        and x.dtype in _NORMS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad))
        and x.is_contiguous()
        and weight_D.is_contiguous()
        and _plain(x.dtype, x, weight_D)
    )


def norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`ops.basic.rms_norm` of contiguous rows; mean and product in fp32, rounded once."""
    y, width = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // width
    _NORMS[x.dtype](_NORM.pack(x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), rows, width, eps, _LEVEL))
    return y


def _plain(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Ordinary CPU tensors of one dtype, and nobody watches."""
    return all(t.dtype is dtype and t.is_cpu and type(t) in PLAIN for t in tensors) and not is_watched()
