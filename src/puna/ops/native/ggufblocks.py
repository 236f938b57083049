"""The native product of a few rows with a weight in llama.cpp's blocks, and blocks as numbers.

Shapes: T rows of x, D inputs, N outputs; data (N, bytes per row) uint8.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.ops.formats.gguf_layer import GgufWeight
from puna.ops.native import library
from puna.ops.native.guard import PLAIN

MOST = 4  # products in one call; `MOST` in ggufblocks.cpp

_native = library.load()
_PRODUCT = getattr(_native.kernels, "puna_blocks_product", None)
_DEQUANTIZE = getattr(_native.kernels, "puna_blocks_dequantize", None)
_PROBLEM = struct.Struct("PPPPqqqqqiii4x")  # `Problem` in ggufblocks.cpp
_KINDS = {"Q4_1": 0, "Q5_0": 1, "Q5_1": 2, "Q4_K": 3, "Q5_K": 4, "Q6_K": 5}


def available() -> bool:
    """True if the native kernels are loaded."""
    return _PRODUCT is not None


def serves(weight: GgufWeight) -> bool:
    """True if there is a kernel for it: any type of blocks, on a CPU, in one piece."""
    data = weight.data
    usual = data.is_cpu and type(data) in PLAIN and data.is_contiguous() and data.numel() > 0
    return _PRODUCT is not None and usual and weight.type in _KINDS


class NativeBlocks:
    """What the kernel needs of a weight that it `serves`. bias_N (N,) fp32 or None."""

    def __init__(self, weight: GgufWeight, bias_N: Tensor | None) -> None:
        self.shape, self._data = weight.shape, weight.data
        self._bias = None if bias_N is None else bias_N.float().contiguous()
        self._kind = _KINDS[weight.type]

    def problem(self, x: int, y: int, rows: int, stride: int, end: int) -> bytes:
        """`Problem` of ggufblocks.cpp for the first `end` outputs."""
        bias = 0 if self._bias is None else self._bias.data_ptr()
        return _PROBLEM.pack(
            x, y, self._data.data_ptr(), bias, rows, stride, end, self.shape[1], self._data.shape[1],
            self._kind, torch.get_num_threads(), _native.level,
        )  # fmt: skip


def product(weights: Sequence[NativeBlocks], x_TD: Tensor) -> list[Tensor]:
    """x W^T + b for up to four weights of one width; x fp32 (T, D), returns fp32 (T, N) each.

    The same bits for any number of rows and threads.
    """
    assert len(weights) <= MOST
    assert x_TD.dtype is torch.float32
    rows, width = x_TD.shape
    assert all(weight.shape[1] == width for weight in weights)
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    results = [torch.empty(rows, weight.shape[0]) for weight in weights]
    problems = b"".join(
        weight.problem(x_TD.data_ptr(), y_TN.data_ptr(), rows, x_TD.stride(0), weight.shape[0])
        for weight, y_TN in zip(weights, results, strict=True)
    )
    assert _PRODUCT is not None
    _PRODUCT(problems, len(weights))
    return results


def dequantize(weight: NativeBlocks, begin: int, end: int) -> Tensor:
    """Rows begin to end - 1 of the weight as fp32 numbers, bit for bit those of `dequantize_gguf`."""
    numbers = torch.empty(end - begin, weight.shape[1])
    assert _DEQUANTIZE is not None
    _DEQUANTIZE(weight.problem(0, numbers.data_ptr(), begin, 0, end))
    return numbers
