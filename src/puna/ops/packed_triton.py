"""The product with a packed weight on a GPU: codes become numbers in registers, right before they are multiplied.

    weights      x Q^T with int4, int8 or float8 codes: a group's codes are multiplied as they are (whole numbers up to
                 255 and float8 are exact in bf16 and fp16), the sum of a group then with its scale, in fp32
    integer      int8 inputs times int8 weights per channel: int32 sums, then both scales

Inputs rounded to eight bits go through as codes too, with a scale per row at the end. fp32 inputs are multiplied in
fp32 ("ieee", not TF32). The twin is `QuantizedWeight.product`. Needs triton. With TRITON_INTERPRET=1, set before triton
is imported, the same code runs on a CPU (but for bf16, which triton 3.6's interpreter multiplies as whole numbers).

Shapes: M rows of x, K inputs, N outputs; a tile of one scale is `height` x `width`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.ops.formats.activations import quantize_activation
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed

_BLOCK_K = 64
_INT4, _INT8, _FLOAT8 = 0, 1, 2
_KINDS = {("int", 4): _INT4, ("int", 8): _INT8, ("float", 8): _FLOAT8}


def serves(packed: Packed) -> bool:
    """True if there is a kernel for this format: four or eight bits, groups a multiple of 16 wide."""
    if (packed.scheme.kind, packed.scheme.bits) not in _KINDS or packed.group_of_D is not None:
        return False
    width = packed.scheme.tile(packed.shape)[1]
    return 0 not in packed.shape and (width == packed.shape[1] or width % 16 == 0)


class Triton:
    """The kernels behind the call of `packed_linear.Kernel`: x_TD -> x Q^T + b in `out`."""

    name, nbytes = "triton", 0

    def __init__(self, packed: Packed, order_D: Tensor | None, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        self._packed, self._order, self._weight, self._bias = packed, order_D, weight, bias_N

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        weight, scales_T = self._weight, None
        if weight.activations is not None and not weight.threshold:
            codes, scales = quantize_activation(x_TD, weight.activations, weight.input_scale)
            scales_T = scales.flatten().expand(x_TD.shape[0]).contiguous()
            if codes.dtype is torch.int8 and self._order is None and _is_per_channel_int8(self._packed):
                return integer_product(codes, scales_T, self._packed, self._bias, out)
            x_TD = codes.half()  # exact: eight bits of a whole number, or three of a fraction
        elif weight.threshold:
            x_TD = weight.round_inputs(x_TD)
        if self._order is not None:
            x_TD = x_TD.index_select(1, self._order)
        return weight_product(x_TD, self._packed, self._bias, out, scales_T)


def weight_product(
    x_MK: Tensor, packed: Packed, bias_N: Tensor | None, out: torch.dtype, scales_M: Tensor | None = None
) -> Tensor:
    """x Q^T (times a scale per row, if given) + b; x fp32, bf16 or fp16, returns (M, N) in `out`."""
    x_MK = x_MK.contiguous()
    (rows, inputs), outputs = x_MK.shape, packed.shape[0]
    y_MN = torch.empty(rows, outputs, dtype=out, device=x_MK.device)
    height, width = packed.scheme.tile(packed.shape)
    kind = _KINDS[packed.scheme.kind, packed.scheme.bits]
    codes = packed.data if kind == _INT4 else packed.data.view(torch.int8)
    block_k = next(size for size in (_BLOCK_K, 32, 16) if width % size == 0 or width == inputs)
    grid, blocks = _blocks(rows, outputs)
    nothing = y_MN
    _weights[grid](
        x_MK, codes, packed.scales, _or(packed.zeros, nothing), _or(bias_N, nothing), _or(scales_M, nothing), y_MN,
        rows, outputs, codes.shape[1], inputs // width, width, height,
        INPUTS=inputs, KIND=kind, ZEROS=packed.zeros is not None, BIAS=bias_N is not None,
        ROW_SCALES=scales_M is not None, BLOCK_K=block_k, **blocks,
    )  # fmt: skip
    return y_MN


def integer_product(
    codes_MK: Tensor, scales_M: Tensor, packed: Packed, bias_N: Tensor | None, out: torch.dtype
) -> Tensor:
    """(codes Q^T) times both scales + b, summed in int32; codes int8 (M, K), the weight int8 per channel or tensor."""
    codes_MK = codes_MK.contiguous()
    (rows, inputs), outputs = codes_MK.shape, packed.shape[0]
    y_MN = torch.empty(rows, outputs, dtype=out, device=codes_MK.device)
    scales_N = packed.scales.float().flatten().expand(outputs).contiguous()
    grid, blocks = _blocks(rows, outputs)
    _integers[grid](
        codes_MK, packed.data, scales_M, scales_N, _or(bias_N, y_MN), y_MN, rows, outputs,
        INPUTS=inputs, BIAS=bias_N is not None, BLOCK_K=_BLOCK_K, **blocks,
    )  # fmt: skip
    return y_MN


def _blocks(rows: int, outputs: int) -> tuple[tuple[int, int], dict[str, Any]]:
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64  # 16: the least that tensor cores take
    block_n = 64 if rows <= 64 else 128
    grid = (triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))
    return grid, {"BLOCK_M": block_m, "BLOCK_N": block_n}


def _is_per_channel_int8(packed: Packed) -> bool:
    scheme = packed.scheme
    return scheme.kind == "int" and scheme.bits == 8 and scheme.symmetric and packed.scales.shape[1] == 1


def _or(tensor: Tensor | None, nothing: Tensor) -> Tensor:
    return nothing if tensor is None else tensor


# The number of inputs is a constant of a kernel: a model has two or three, and loops of known length need fewer masks.


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    x, codes, scales, zeros, bias, row_scales, y,
    rows, outputs, code_row, groups, width, height,
    INPUTS: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, ROW_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_m, has_n = m < rows, n < outputs
    m64, n64 = m.to(tl.int64), n.to(tl.int64)  # a head of 128k words times 16k inputs is past 2^31
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, INPUTS, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        has_k = k < INPUTS
        x_mk = tl.load(x + m64[:, None] * INPUTS + k[None, :], mask=has_m[:, None] & has_k[None, :], other=0.0)
        inside = has_k[:, None] & has_n[None, :]
        if KIND == 0:
            words = tl.load(codes + n64[None, :] * code_row + k[:, None] // 8, mask=inside, other=0)
            code = (((words >> ((k % 8) * 4)[:, None]) & 15) - 8).to(tl.float32)
        else:
            byte = tl.load(codes + n64[None, :] * code_row + k[:, None], mask=inside, other=0)
            if KIND == 1:
                code = byte.to(tl.float32)
            else:  # sign and the rest of a float8 in place, 2^120 shifts the exponent: any GPU can
                bits = (byte.to(tl.int32) << 20) & -0x78100000
                code = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
        tile = (n64 // height) * groups + begin // width
        if ZEROS:
            code -= tl.load(zeros + tile, mask=has_n, other=0).to(tl.float32)[None, :]
        scale = tl.load(scales + tile, mask=has_n, other=0.0).to(tl.float32)
        total += tl.dot(x_mk, code.to(x_mk.dtype), input_precision="ieee") * scale[None, :]
    if ROW_SCALES:
        total *= tl.load(row_scales + m, mask=has_m, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + n, mask=has_n, other=0.0).to(tl.float32)[None, :]
    at = y + m64[:, None] * outputs + n[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=has_m[:, None] & has_n[None, :])


@triton.jit
def _integers(  # type: ignore[no-untyped-def]
    x, codes, row_scales, scales, bias, y, rows, outputs,
    INPUTS: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_m, has_n = m < rows, n < outputs
    m64, n64 = m.to(tl.int64), n.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for begin in range(0, INPUTS, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        has_k = k < INPUTS
        x_mk = tl.load(x + m64[:, None] * INPUTS + k[None, :], mask=has_m[:, None] & has_k[None, :], other=0)
        w_kn = tl.load(codes + n64[None, :] * INPUTS + k[:, None], mask=has_k[:, None] & has_n[None, :], other=0)
        total += tl.dot(x_mk, w_kn, out_dtype=tl.int32)
    scale_m = tl.load(row_scales + m, mask=has_m, other=0.0)
    scale_n = tl.load(scales + n, mask=has_n, other=0.0)
    result = total.to(tl.float32) * scale_m[:, None] * scale_n[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=has_n, other=0.0).to(tl.float32)[None, :]
    at = y + m64[:, None] * outputs + n[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=has_m[:, None] & has_n[None, :])
