"""The matrix product of every layer, y = x W^T + b, and the one place that chooses who computes it on a CPU.

- Up to 8 tokens and no gradient (decoding): every weight is read for little work, so memory sets the speed. The native
  kernel reads at that speed, about twice as fast as torch.
- fp32 on AMD processors (training, prompts): oneDNN, which torch brings along, multiplies 5-10 % faster there than MKL,
  which `F.linear` calls. Measured on Zen 4 by `benchmarks/linear.py`.
- Everything else: `F.linear`, the twin of both.

Shapes: T tokens, D inputs, N outputs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.native import library
from puna.ops.native.guard import PLAIN, is_watched

MAX_ROWS = 8  # above, torch's blocked product wins: it reads a weight once for many rows

_native = library.load()
_PROBLEM = struct.Struct("PPPPqqqqii")  # `Problem` in gemv.cpp
_GEMV: dict[torch.dtype, Callable[[bytes, int], None]] = (
    {torch.float32: _native.kernels.puna_gemv_float32, torch.bfloat16: _native.kernels.puna_gemv_bfloat16}
    if _native.kernels
    else {}
)


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b over the last dimension of x.

    Shapes: x_TD (..., D), weight_ND (N, D), bias_N (N,) or None; returns (..., N) in x's dtype, summed in fp32.
    """
    if torch.compiler.is_compiling() or not _is_plain(x_TD, weight_ND, bias_N):
        return F.linear(x_TD, weight_ND, bias_N)
    learns = torch.is_grad_enabled() and _requires_grad(x_TD, weight_ND, bias_N)
    if not learns and x_TD.dtype in _GEMV and x_TD.numel() <= MAX_ROWS * x_TD.shape[-1]:
        return _gemv(x_TD, [(weight_ND, bias_N)])[0]
    if x_TD.dtype is torch.float32 and x_TD.is_contiguous() and _onednn() is not None:
        return _OneDNN.apply(x_TD, weight_ND, bias_N) if learns else _multiply(x_TD, weight_ND, bias_N)
    return F.linear(x_TD, weight_ND, bias_N)


def linear_group(x_TD: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`linear` of one x with up to four weights: when decoding on a CPU one native call, which wakes the cores once."""
    few = x_TD.dtype in _GEMV and x_TD.numel() <= MAX_ROWS * x_TD.shape[-1] and x_TD.dim() == 2
    if few and not torch.compiler.is_compiling():
        pairs = list(zip(weights, biases, strict=True))
        plain = all(_is_plain(x_TD, weight, bias) for weight, bias in pairs)
        if plain and not (torch.is_grad_enabled() and any(_requires_grad(x_TD, w, b) for w, b in pairs)):
            return _gemv(x_TD, pairs)
    return [linear(x_TD, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def describe() -> str:
    """One line for the start card: whose kernels run on this CPU, and why."""
    return f"native: {_native.reason}; fp32 matmul: {'oneDNN' if _onednn() else 'torch default'}"


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Ordinary CPU tensors of one dtype, and nobody watches the operation who must see torch's own.

    The exact types keep out FakeTensor, DTensor and other subclasses.
    """
    dtype = x.dtype
    return (
        x.is_cpu
        and weight.is_cpu
        and weight.dtype is dtype
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.shape[1] == x.shape[-1]
        and x.numel() > 0
        and (bias is None or _is_plain_bias(bias, weight))
        and not is_watched()
    )


def _is_plain_bias(bias: Tensor, weight: Tensor) -> bool:
    return (
        type(bias) in PLAIN
        and bias.is_cpu
        and bias.dtype is weight.dtype
        and bias.shape == weight.shape[:1]
        and bias.is_contiguous()
    )


def _requires_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


# --- few rows: the native kernel ------------------------------------------------------------------------------------


def _gemv(x: Tensor, pairs: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    assert len(pairs) <= 4  # MOST in gemv.cpp: its table of shares lies on the stack
    width = x.shape[-1]
    if x.is_contiguous():
        stride = width
    elif x.dim() == 2 and x.stride(1) == 1:
        stride = x.stride(0)  # a slice of a wider matrix, such as q in a fused q, k, v
    else:
        x, stride = x.contiguous(), width
    rows, threads = x.numel() // width, torch.get_num_threads()
    results, problems = [], b""
    for weight, bias in pairs:
        columns = weight.shape[0]
        y = x.new_empty(x.shape[0], columns) if x.dim() == 2 else x.new_empty(*x.shape[:-1], columns)
        results.append(y)
        problems += _PROBLEM.pack(
            x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
            rows, columns, width, stride, threads, _native.level,
        )  # fmt: skip
    _GEMV[x.dtype](problems, len(results))
    return results


# --- many rows in fp32: oneDNN --------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _onednn() -> Callable[..., Tensor] | None:
    """torch's binding of oneDNN's product, or None where it is not the faster one, is missing, or does not work.

    The binding is internal to torch (inductor uses it), so it is tried once against `F.linear`.
    """
    if not _is_amd() or not torch.backends.mkldnn.is_available():
        return None
    try:
        operation: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        x, weight = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
        with torch.no_grad():
            direct = operation(x, weight, None, "none", [], "")
            transposed = operation(x, weight.t().contiguous().t(), None, "none", [], "")
        expected = x @ weight.t()
        return operation if torch.equal(direct, expected) and torch.equal(transposed, expected) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    operation = _onednn()
    assert operation is not None
    return operation(x, weight, bias, "none", [], "")


class _OneDNN(torch.autograd.Function):
    """`F.linear` with oneDNN forward and for the gradient of x; MKL is the faster one for the gradient of W.

    With y = x W^T:  dx = g W  and  dW = g^T x.  oneDNN takes W transposed in place, without a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g = gradients[0].contiguous()
        g_TN = g.reshape(-1, weight.shape[0])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            # oneDNN is slower than MKL at summing over a vocabulary; and what it computes has no second derivative.
            mkl = torch.is_grad_enabled() or weight.shape[0] > _WIDE
            dx = g @ weight if mkl else _multiply(g, weight.t())
        if ctx.needs_input_grad[1]:
            dweight = g_TN.t() @ x.reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[2]:
            dbias = g_TN.sum(0)
        return dx, dweight, dbias


_WIDE = 16384
