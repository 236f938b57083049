"""The product with a weight in llama.cpp's blocks: kernels chosen at load, as `packed_linear` does for packed ones.

    native       C++ for few rows: blocks become floats in registers; the same bits for any number of rows
    dequantize   pieces of the weight become numbers (which stay in the cache), then `ops.linear`; any device

Both are exact but for the order of an fp32 sum. `GgufWeight.product` is the twin. `PUNA_PACKED=twin`, `torch` or
`native` forces one kind, as for packed weights. Shapes: T rows, D inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from puna.ops import linear as ops
from puna.ops import packed_linear
from puna.ops.formats.gguf import dequantize_gguf
from puna.ops.formats.gguf_layer import GgufWeight
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.native import ggufblocks as native
from puna.ops.native.guard import PLAIN, is_watched
from puna.ops.packed_kernels import PIECE
from puna.ops.packed_linear import Product

MOST_ROWS = 24  # for the native kernel, which unpacks the blocks again for every four; beyond, both take as long


class BlockProduct:
    """x W^T + b with W in blocks: callable (..., D) -> (..., N) in x's dtype, differentiable in x.

    dtype: of the inputs. activations: what was asked for; it is exact. nbytes: all that is held.
    """

    def __init__(self, weight: GgufWeight, dtype: torch.dtype, bias_N: Tensor | None, activations: str) -> None:
        self.weight, self.dtype, self.bias, self.shape = weight, dtype, bias_N, weight.shape
        self.activations, forced = activations, packed_linear._forced()
        fast = native.serves(weight) and forced not in ("twin", "torch")
        self._is_twin = forced == "twin"
        self.native = native.NativeBlocks(weight, bias_N) if fast else None
        self.most_rows = 1 << 62 if forced == "native" else MOST_ROWS

    @property
    def name(self) -> str:
        """`native, dequantize`, or `dequantize` or `twin` alone."""
        if self.native is None:
            return "twin" if self._is_twin else "dequantize"
        return "native, dequantize"

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    @property
    def bits_per_weight(self) -> float:
        """Of the format, scales included."""
        return self.weight.bits_per_weight

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks and the bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])
        if self._is_twin or torch.compiler.is_compiling() or type(x) not in PLAIN or is_watched():
            return self.weight.product(x, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _ThroughBlocks.apply(x, self)
            return y
        return self.forward(x)

    def takes(self, x_TD: Tensor) -> bool:
        """Whether these rows go to the native kernel."""
        few = 0 < x_TD.shape[0] <= self.most_rows and x_TD.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return few and self.native is not None

    def forward(self, x_TD: Tensor) -> Tensor:
        """The product without a gradient."""
        assert x_TD.shape[1] == self.shape[1], f"{x_TD.shape[1]} inputs for a weight of {self.shape[1]}"
        assert x_TD.device == self.device, f"inputs on {x_TD.device}, the weight on {self.device}"
        if self.native is not None and self.takes(x_TD):
            return native.product([self.native], x_TD.float())[0].to(x_TD.dtype)
        dtype, working = x_TD.dtype, _working(x_TD.dtype)
        x_TD = x_TD.to(working)
        y_TN = x_TD.new_empty(x_TD.shape[0], self.shape[0])
        for begin, end in self._pieces(x_TD.shape[0]):
            y_TN[:, begin:end] = ops.linear(x_TD, self.numbers(begin, end).to(working))
        return (y_TN if self.bias is None else y_TN.add_(self.bias)).to(dtype)

    def backward(self, g_TN: Tensor) -> Tensor:
        """g W, piece by piece: the gradient of x."""
        g = g_TN.to(_working(g_TN.dtype))
        dx_TD = g.new_zeros(g.shape[0], self.shape[1])
        for begin, end in self._pieces(g.shape[0]):
            dx_TD += g[:, begin:end] @ self.numbers(begin, end).to(g.dtype)
        return dx_TD.to(g_TN.dtype)

    def numbers(self, begin: int, end: int) -> Tensor:
        """Rows begin to end - 1 of the weight in fp32."""
        if self.native is not None:
            return native.dequantize(self.native, begin, end)
        return dequantize_gguf(self.weight.data[begin:end], self.weight.type)

    def _pieces(self, rows: int) -> list[tuple[int, int]]:
        size = PIECE * (1 if rows <= 128 else 4) if self.weight.data.is_cpu else 1 << 24
        step = max(1, size // max(1, self.shape[1]))
        return [(begin, min(self.shape[0], begin + step)) for begin in range(0, self.shape[0], step)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are chosen anew: kernels hold addresses."""
        return choose, (self.weight, self.dtype, self.device, self.bias, self.activations)


class _ThroughBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, product: BlockProduct) -> Tensor:
        ctx.product = product
        return product.forward(x_TD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.product.backward(gradients[0]), None


def choose(
    weight: GgufWeight | QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device | str,
    bias: Tensor | None = None,
    activations: str = "exact",
) -> BlockProduct | Product:
    """The product of either kind of weight for inputs of `dtype` on `device`: `packed_linear.choose` for packed ones.

    Blocks have exact kernels only: with `activations="int8"` their inputs are not rounded either. Errors: `PunaError`
    for a PUNA_PACKED that does not exist or cannot be.
    """
    if isinstance(weight, QuantizedWeight):
        return packed_linear.choose(weight, dtype, device, bias, activations)
    device = torch.device(device)
    bias = None if bias is None else bias.detach().to(device)
    return BlockProduct(weight.to(device), dtype, bias, activations)


def product_group(products: Sequence[BlockProduct | Product], x_TD: Tensor) -> list[Tensor]:
    """Several products of one x: for a few rows one native call for all that are of one kind."""
    packed = [product for product in products if isinstance(product, Product)]
    if len(packed) == len(products):
        return packed_linear.product_group(packed, x_TD)
    blocks = [product for product in products if isinstance(product, BlockProduct)]
    if len(blocks) == len(products) and len(blocks) <= native.MOST and _may_group(blocks, x_TD):
        kernels = [product.native for product in blocks if product.native is not None]
        return [y_TN.to(x_TD.dtype) for y_TN in native.product(kernels, x_TD.float())]
    return [product(x_TD) for product in products]


def _may_group(products: Sequence[BlockProduct], x_TD: Tensor) -> bool:
    learns = torch.is_grad_enabled() and x_TD.requires_grad
    watched = torch.compiler.is_compiling() or type(x_TD) not in PLAIN or is_watched()
    return x_TD.dim() == 2 and not learns and not watched and all(product.takes(x_TD) for product in products)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
