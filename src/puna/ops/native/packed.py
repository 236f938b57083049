"""The native product of a few rows with a packed weight, and packed rows as numbers again.

Shapes: T rows of x, D inputs, N outputs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from puna.ops.formats.packed import Packed
from puna.ops.formats.scheme import Scheme
from puna.ops.native import library
from puna.ops.native.guard import PLAIN, is_watched

MOST = 4  # products in one call; `MOST` in packed.cpp

_native = library.load()
_LANES = (4, 8, 16)  # floats in a vector, by level
_HEAD, _WEIGHT, _TAIL = struct.Struct("PPqqii"), struct.Struct("PPPPPqqqqqfiii"), struct.Struct("ii")  # `Problem`
_KINDS = {("int", 4): 0, ("int", 8): 1, ("float", 8): 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OUTPUTS = (torch.float32, torch.bfloat16)
_PLAIN_SCHEME = {"int": 1, "float": 2}  # how inputs are rounded


def available() -> bool:
    """True if the native kernels are loaded."""
    return _native.kernels is not None


def reason() -> str:
    """The instruction set of the kernels, or why there are none."""
    return _native.reason


def serves(packed: Packed) -> bool:
    """True if there is a kernel for it: four or eight bits, groups that lie evenly in its vectors, on a CPU."""
    scheme, (rows, columns) = packed.scheme, packed.shape
    tensors = [part for part in (packed.data, packed.scales, packed.zeros) if part is not None]
    if (scheme.kind, scheme.bits) not in _KINDS or packed.group_of_D is not None or _native.kernels is None:
        return False
    if not all(part.is_cpu and type(part) in PLAIN for part in tensors) or packed.scales.dtype not in _TYPES:
        return False
    codes = 32 // scheme.bits
    width = scheme.tile(packed.shape)[1]
    block = codes * _LANES[_native.level]
    even = width % block == 0 or (block % width == 0 and width % codes == 0)
    return rows > 0 and columns > 0 and (width == columns or even)


class NativeWeight:
    """What the kernel needs of a packed weight that it `serves`.

    bias_N fp32 or None; order_D int32 or None: column d of the codes belongs to column order_D[d] of x.
    rounding: how x is rounded, per token or (with input_scale) by one scale; None keeps it.
    """

    def __init__(
        self, packed: Packed, bias_N: Tensor | None, order_D: Tensor | None, rounding: Scheme | None, input_scale: float
    ) -> None:
        self.shape = packed.shape
        parts = (packed.data, packed.scales, packed.zeros, bias_N, order_D)
        self._tensors = [None if part is None else part.contiguous() for part in parts]
        height, width = packed.scheme.tile(packed.shape)
        row_bytes = packed.data.shape[1] * packed.data.element_size()
        self._packed = _WEIGHT.pack(
            *(0 if part is None else part.data_ptr() for part in self._tensors),
            *packed.shape, row_bytes, width, height, input_scale,
            _KINDS[packed.scheme.kind, packed.scheme.bits], _TYPES[packed.scales.dtype],
            0 if rounding is None else _PLAIN_SCHEME[rounding.kind],
        )  # fmt: skip

    def problem(self, x: int, y: int, rows: int, stride: int, kind: int, out: int) -> bytes:
        """`Problem` of packed.cpp."""
        threads = torch.get_num_threads()
        return _HEAD.pack(x, y, rows, stride, kind, out) + self._packed + _TAIL.pack(threads, _native.level)


def takes(x_TD: Tensor) -> bool:
    """True for ordinary CPU rows in fp32 or bf16 that nobody watches or traces."""
    return (
        x_TD.is_cpu
        and x_TD.dtype in _OUTPUTS
        and type(x_TD) in PLAIN
        and not torch.compiler.is_compiling()
        and not is_watched()
    )


def product(weights: Sequence[NativeWeight], x_TD: Tensor, out: torch.dtype) -> list[Tensor]:
    """x W^T + b for up to four weights of one width; returns (T, N) each, in `out` (fp32 or bf16), summed in fp32."""
    assert len(weights) <= MOST
    rows, width = x_TD.shape
    assert all(weight.shape[1] == width for weight in weights)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    results, problems = [], b""
    for weight in weights:
        y_TN = torch.empty(rows, weight.shape[0], dtype=out)
        results.append(y_TN)
        problems += weight.problem(
            x_TD.data_ptr(), y_TN.data_ptr(), rows, x_TD.stride(0), _TYPES[x_TD.dtype], _TYPES[out]
        )
    assert _native.kernels is not None
    if _native.kernels.puna_packed_product(problems, len(weights)):
        raise MemoryError(f"no memory to lay out {rows} rows of {width} inputs")
    return results


def dequantize(weight: NativeWeight, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows begin to end - 1 of the weight as numbers (fp32 or bf16), columns in the order of the codes."""
    numbers = torch.empty(end - begin, weight.shape[1], dtype=dtype)
    problem = bytearray(weight.problem(0, numbers.data_ptr(), begin, 0, 0, _TYPES[dtype]))
    struct.pack_into("q", problem, _ROWS_AT, end)
    assert _native.kernels is not None
    if _native.kernels.puna_packed_dequantize(bytes(problem)):
        raise MemoryError(f"no memory for the scales of {end - begin} rows")
    return numbers


_ROWS_AT = _HEAD.size + struct.calcsize("PPPPP")  # where `n` stands in a `Problem`
