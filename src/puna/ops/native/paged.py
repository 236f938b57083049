"""The native attention over a paged KV cache: one call writes the new rows and attends.

Shapes: T new tokens, B sequences, H query heads, G key/value heads, K head width, L layers, P pages of S positions.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from puna.ops.native import library
from puna.ops.native.guard import PLAIN, is_watched

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}  # in paged.h
ROWS = "Pqq"
_CALL = struct.Struct("4P" + 4 * ROWS + "4P" + "11q" + "4i")  # `Call` in paged.h
_UNLIMITED = 2**30  # the kernel counts distances between tokens in 32 bits
_INDEX_TYPES = (torch.int64, torch.int32, torch.int32, torch.int32)

_native = library.load()


def serves(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, keys_LPGSK: Tensor) -> bool:
    """True if `attention` may take these: ordinary CPU tensors of one float dtype, pages that lie side by side."""
    return (
        _native.kernels is not None
        and keys_LPGSK.is_cpu
        and keys_LPGSK.is_contiguous()
        and keys_LPGSK.dtype in KINDS
        and q_THK.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(x.dtype is q_THK.dtype and x.is_cpu and type(x) in PLAIN for x in (q_THK, k_TGK, v_TGK))
        and not (torch.is_grad_enabled() and (q_THK.requires_grad or k_TGK.requires_grad or v_TGK.requires_grad))
        and not is_watched()
    )


def attention(
    layer: int,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    pages: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    window: int | None,
) -> Tensor:
    """Causal attention (T, H, K) of each sequence's new tokens over its pages, their own rows written first.

    pages: keys and values (L, P, G, S, K). scales: of codes, this layer's keys and values, fp32 (1,) or (G,). index:
    slots (T,) int64, starts (B + 1,), lengths (B,) and tables (B, M) int32, contiguous, as in `ops.paged.PagedCausal`.
    Errors: `MemoryError`.
    """
    assert all(x.dtype is dtype and x.is_contiguous() for x, dtype in zip(index, _INDEX_TYPES, strict=True))
    q, k, v = _dense(q_THK), _dense(k_TGK), _dense(v_TGK)
    tokens, heads, width = q.shape
    keys, values = pages
    slots, starts, lengths, tables = index
    out = q.new_empty(q.shape)
    skip = layer * keys.stride(0) * keys.element_size()
    call = _CALL.pack(
        keys.data_ptr() + skip, values.data_ptr() + skip, *(map(Tensor.data_ptr, scales) if scales else (0, 0)),
        *_rows(q), *_rows(k), *_rows(v), *_rows(out),
        slots.data_ptr(), starts.data_ptr(), lengths.data_ptr(), tables.data_ptr(),
        tables.shape[1], len(lengths), tokens, keys.stride(1), keys.stride(2), keys.shape[3], heads, k.shape[1], width,
        int(scales is not None and len(scales[0]) > 1),
        _UNLIMITED if window is None else min(window, _UNLIMITED),
        KINDS[q.dtype], KINDS[keys.dtype], torch.get_num_threads(), _native.level,
    )  # fmt: skip
    if _native.kernels.puna_paged_attention(call):  # type: ignore[union-attr]
        raise MemoryError(f"no memory for attention of {tokens} tokens over {int(lengths.max())} positions")
    return out


def _dense(x: Tensor) -> Tensor:
    """x, its last dimension contiguous as the kernel reads it; tokens and heads may lie anywhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)
