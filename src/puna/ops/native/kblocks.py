"""The native search for llama.cpp's K blocks: the same bytes as its twin in ops/formats/gguf_k, 20 times as fast."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from puna.ops.native import library
from puna.ops.native.guard import PLAIN, is_watched

_STRUCT = struct.Struct("PPPPqqqiiii")  # `Problem` in kblocks.cpp
_native = library.load()
_KERNEL = getattr(_native.kernels, "puna_k_blocks", None)
_BITS = {144: 4, 176: 5, 210: 6}  # bytes of a block -> bits of a code


def serves(*tensors: Tensor) -> bool:
    """True if `quantize` may take these: ordinary CPU tensors, and nobody watches."""
    return _KERNEL is not None and all(t.is_cpu and type(t) in PLAIN for t in tensors) and not is_watched()


def quantize(x: Tensor, out: Tensor, codes: tuple[float, ...], importance_D: Tensor | None, first: int) -> None:
    """Fill `out` (blocks, 144, 176 or 210) uint8 with the Q4_K, Q5_K or Q6_K blocks of x (blocks, 256) fp32.

    codes: what the range of a group is divided by, one per trial. importance_D fp32 or None, D a multiple of 256:
    block 0 is block `first` of the tensor, whose rows have D weights. All contiguous.
    """
    assert _KERNEL is not None
    assert x.is_contiguous()
    assert out.is_contiguous()
    factors = _factors(codes)
    pointer, per_row = 0, 1
    if importance_D is not None:
        importance_D = importance_D.contiguous()
        pointer, per_row = importance_D.data_ptr(), len(importance_D) // 256
    problem = _STRUCT.pack(
        x.data_ptr(), pointer, out.data_ptr(), factors.data_ptr(), len(x), first, per_row, len(codes),
        _BITS[out.shape[1]], torch.get_num_threads(), _native.level,
    )  # fmt: skip
    _KERNEL(problem)


@lru_cache
def _factors(codes: tuple[float, ...]) -> Tensor:
    return torch.tensor(codes, dtype=torch.float32)
