"""The native packed attention as one differentiable operation.

Shapes: T tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from puna.ops.native import library
from puna.ops.native.guard import PLAIN, is_watched

_native = library.load()
_VIEW = "Pqq"
_PROBLEM = struct.Struct(5 * _VIEW + "5P" + "P7q" + "2i")  # `Problem` in attention.cpp
_NOTHING = (0, 0, 0)
_UNLIMITED = 2**30  # the kernel counts distances between tokens in 32 bits


def serves(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> bool:
    """True if `attention` may take these: ordinary fp32 CPU tensors, and nobody watches the operation."""
    tokens, heads, width = q_THK.shape
    return (
        _native.kernels is not None
        and all(x.dtype is torch.float32 and x.is_cpu and type(x) in PLAIN for x in (q_THK, k_TGK, v_TGK))
        and q_THK.numel() > 0
        and k_TGK.shape == v_TGK.shape
        and k_TGK.shape[::2] == (tokens, width)
        and heads % k_TGK.shape[1] == 0
        and not is_watched()
    )


def attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Causal attention within each document; returns (T, H, K). Tokens outside all documents are left as they are."""
    if torch.is_grad_enabled() and (q_THK.requires_grad or k_TGK.requires_grad or v_TGK.requires_grad):
        out: Tensor = _Attention.apply(q_THK, k_TGK, v_TGK, documents, window)
        return out
    return _forward(_dense(q_THK), _dense(k_TGK), _dense(v_TGK), None, documents, window)


class Documents:
    """(start, length) of each document as C numbers; longest first, so that no core is left with the long one last."""

    def __init__(self, bounds: list[tuple[int, int]]) -> None:
        ordered = sorted(bounds, key=lambda bound: -bound[1])
        self.numbers = (ctypes.c_int64 * (2 * len(ordered)))(*(n for bound in ordered for n in bound))
        self.count = len(ordered)
        self.longest = ordered[0][1] if ordered else 0
        self.end = max((start + length for start, length in ordered), default=0)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None
    ) -> Tensor:
        q, k, v = _dense(q_THK), _dense(k_TGK), _dense(v_TGK)
        lse = q.new_empty(q.shape[1], q.shape[0])
        out = _forward(q, k, v, lse, documents, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.window = documents, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        views = [*_view(q), *_view(k), *_view(v), *_view(out)]
        d_out = _dense(gradients[0])
        results = [x.new_empty(x.shape) for x in (q, k, v)]
        pointers = [0, lse.data_ptr(), *(x.data_ptr() for x in results)]
        _call("backward", [*views, *_view(d_out), *pointers], q, k, ctx.documents, ctx.window)
        return *results, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, documents: Documents, window: int | None) -> Tensor:
    out = q.new_empty(q.shape)
    views = [*_view(q), *_view(k), *_view(v), *_NOTHING, *_NOTHING]
    pointers = [out.data_ptr(), 0 if lse is None else lse.data_ptr(), 0, 0, 0]
    _call("forward", [*views, *pointers], q, k, documents, window)
    return out


def _call(which: str, fields: list[int], q: Tensor, k: Tensor, documents: Documents, window: int | None) -> None:
    tokens, heads, width = q.shape
    problem = _PROBLEM.pack(
        *fields, ctypes.addressof(documents.numbers), documents.count, documents.longest, tokens, heads, k.shape[1],
        width, _UNLIMITED if window is None else min(window, _UNLIMITED), torch.get_num_threads(), _native.level,
    )  # fmt: skip
    if getattr(_native.kernels, f"puna_attention_{which}")(problem):
        raise MemoryError(f"no memory for attention over {documents.longest} tokens")


def _dense(x: Tensor) -> Tensor:
    """x, its last dimension contiguous as the kernel reads it; tokens and heads may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _view(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)
