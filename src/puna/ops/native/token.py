"""The small native steps of decoding a token: normalisation, and attention of one query per head over the cache.

Shapes: D model width, H query heads, G key/value heads, K head width, S cached positions.
"""

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
_NORM, _QUERY = struct.Struct("PPPqqfi"), struct.Struct("PPPPqqqqqii")  # `Norm` and `Query` in token.cpp
Kernel = Callable[[bytes], int]
_NORMS: dict[torch.dtype, Kernel] = {}
_QUERIES: dict[torch.dtype, Kernel] = {}
_CODES: dict[torch.dtype, Kernel] = {}  # by what the cache holds; the query is fp32
if _native.kernels:
    _NORMS |= {torch.float32: _native.kernels.puna_norm_float32, torch.bfloat16: _native.kernels.puna_norm_bfloat16}
    _QUERIES |= {torch.float32: _native.kernels.puna_query_float32, torch.bfloat16: _native.kernels.puna_query_bfloat16}
    _CODES |= {torch.int8: _native.kernels.puna_query_int8, torch.float8_e4m3fn: _native.kernels.puna_query_float8}


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


def serves_query(q_1HK: Tensor, k_GSK: Tensor, v_GSK: Tensor) -> bool:
    """True if `query` may take these: one new token, a cache whose positions lie side by side, no gradient.

    The cache may hold codes of eight bits under a query in fp32.
    """
    codes = q_1HK.dtype is torch.float32 and k_GSK.dtype in _CODES
    return (
        (codes or q_1HK.dtype in _QUERIES)
        and q_1HK.is_contiguous()
        and k_GSK.stride() == v_GSK.stride()
        and k_GSK.stride()[1:] == (q_1HK.shape[-1], 1)
        and not (torch.is_grad_enabled() and (q_1HK.requires_grad or k_GSK.requires_grad or v_GSK.requires_grad))
        and _plain(q_1HK.dtype, q_1HK)
        and _plain(k_GSK.dtype if codes else q_1HK.dtype, k_GSK, v_GSK)
    )


def query(q_1HK: Tensor, k_GSK: Tensor, v_GSK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v of one token over all S positions; returns (1, H, K). Codes count as the numbers they
    are: the scale of keys belongs into q, that of values into what comes out."""
    out = torch.empty_like(q_1HK)
    groups, length, width = k_GSK.shape
    problem = _QUERY.pack(
        q_1HK.data_ptr(), k_GSK.data_ptr(), v_GSK.data_ptr(), out.data_ptr(), groups, q_1HK.shape[1] // groups, width,
        k_GSK.stride(0), length, torch.get_num_threads(), _LEVEL,
    )  # fmt: skip
    if (_CODES.get(k_GSK.dtype) or _QUERIES[q_1HK.dtype])(problem):
        raise MemoryError(f"no memory for the scores of {length} positions")
    return out


def _plain(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Ordinary CPU tensors of one dtype, and nobody watches."""
    return all(t.dtype is dtype and t.is_cpu and type(t) in PLAIN for t in tensors) and not is_watched()
