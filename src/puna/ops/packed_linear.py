"""The product with a quantized weight: who computes it is chosen once, at load; `QuantizedWeight.product` is the twin.

The kernels are in `packed_kernels` (and `packed_triton` for a GPU). An fp32 model gets exact ones only, so a prompt and
a generated token agree to the order of an fp32 sum; a bf16 model may get those that compute with bf16 weights. Whoever
asks for `activations="int8"` gets `packed_tiles` on a CPU, where there is one for the weight.
What kernels keep instead of the weight that came in, `Product.weight` turns back, number for number.

`PUNA_PACKED=twin`, `torch` or `native` forces one kind. Shapes: T rows, D inputs, N outputs.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops import linear as ops
from puna.ops import packed_tiles as tiles
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed
from puna.ops.native import packed as native
from puna.ops.native.guard import PLAIN, is_watched
from puna.ops.packed_kernels import (
    Dequantize,
    Integer,
    Kernel,
    Native,
    Stored,
    TorchInt4,
    TorchInt8,
    Twin,
    some_rows,
    store,
    torch_takes_int4,
)

CLASSES = ((8, 1), (32, 16), (1 << 62, 128))  # (most rows of the class, rows it is measured with)
PROBE = 1 << 19  # weights that a measurement multiplies with
ACTIVATIONS = ("exact", "int8")
_FORCED = ("", "twin", "torch", "native")


class Product:
    """x W^T + b with a quantized W: callable (..., D) -> (..., N) in x's dtype, differentiable in x.

    activations: exact, or int8 where that was asked for. nbytes: all that is held. bits_per_weight: of the weight that
    came in.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        dtype: torch.dtype,
        stored: Stored,
        bias_N: Tensor | None,
        kernels: Sequence[Kernel],
        activations: str = "exact",
    ) -> None:
        self.bias, self.kernels, self.shape, self.dtype = bias_N, tuple(kernels), weight.shape, dtype
        self.activations, self.bits_per_weight = activations, weight.bits_per_weight
        self._repacked = kernels[0] if isinstance(kernels[0], TorchInt4 | tiles.Tiles) else None
        self._stored = None if self._repacked else stored
        packed = stored.origin
        if self._repacked is not None:  # what came in is not kept beside what the kernels read
            packed = self._repacked.without(packed)
        self._weight = dataclasses.replace(weight, packed=packed)

    @property
    def name(self) -> str:
        """`native`, or where the number of rows decides `native, dequantize`; what is not as asked for says so."""
        name = ", ".join(dict.fromkeys(kernel.name for kernel in self.kernels))
        return name if self.activations == "exact" or name == tiles.Tiles.name else f"{name} (exact)"

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._weight.packed.scales.device

    @property
    def goes_native(self) -> bool:
        """Whether rows may go to a native kernel together with other products."""
        plain = self._weight.up_NR is None and not self._weight.threshold
        return plain and isinstance(self.kernels[0], Native | tiles.Tiles)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is kept, what kernels add, and the bias."""
        total = self._weight.nbytes + sum({id(kernel): kernel.nbytes for kernel in self.kernels}.values())
        if self._stored is not None and self._stored.origin is not self._stored.packed:
            total += self._stored.packed.data.nbytes + _size(self._stored.order_D)  # scales and zeros are shared
        return total + _size(self.bias)

    @property
    def weight(self) -> QuantizedWeight:
        """The quantized weight that came in, number for number; put together anew if the kernels keep another form."""
        packed = self._weight.packed
        if self._repacked is not None:
            packed = self._repacked.canonical(packed)
        elif self._stored is not None:
            packed = self._stored.canonical()
        return dataclasses.replace(self._weight, packed=packed)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])
        if torch.compiler.is_compiling() or type(x) not in PLAIN or is_watched():
            return self.weight.product(x, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _ThroughWeight.apply(x, self)
            return y
        return self.forward(x)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The product without a gradient."""
        assert x_TD.shape[1] == self.shape[1], f"{x_TD.shape[1]} inputs for a weight of {self.shape[1]}"
        assert x_TD.device == self.device, f"inputs on {x_TD.device}, the weight on {self.device}"
        if x_TD.shape[0] == 0 or 0 in self.shape:
            return self._of_nothing(x_TD)
        kernel = next(k for k, (most, _) in zip(self.kernels, CLASSES, strict=True) if x_TD.shape[0] <= most)
        up_NR, down_RD = self._weight.up_NR, self._weight.down_RD
        if up_NR is None or down_RD is None:
            return kernel(x_TD, x_TD.dtype)
        wide = torch.float64 if x_TD.dtype is torch.float64 else torch.float32
        low = ops.linear(ops.linear(x_TD.to(wide), down_RD.to(wide)), up_NR.to(wide))
        return low.add_(kernel(x_TD, wide)).to(x_TD.dtype)

    def backward(self, g_TN: Tensor) -> Tensor:
        """g W, piece by piece: the gradient of x. Rounding of x is taken as the identity."""
        stored = self._stored or store(self.weight.packed)
        wide = torch.float64 if g_TN.dtype is torch.float64 else torch.float32
        through = Dequantize(stored, self._weight, None, wide, native.serves(stored.packed))
        g = g_TN.to(wide)
        dx_TD = g.new_zeros(g.shape[0], self.shape[1])
        for begin, end in through.pieces(g.shape[0]):
            dx_TD += g[:, begin:end] @ through.numbers(begin, end, wide)
        if stored.order_D is not None:
            dx_TD = dx_TD.index_select(1, stored.order_D.long().argsort())
        if self._weight.up_NR is not None and self._weight.down_RD is not None:
            dx_TD += (g @ self._weight.up_NR.to(wide)) @ self._weight.down_RD.to(wide)
        return dx_TD.to(g_TN.dtype)

    def _of_nothing(self, x_TD: Tensor) -> Tensor:
        y_TN = x_TD.new_zeros(x_TD.shape[0], self.shape[0])
        return y_TN if self.bias is None else y_TN + self.bias.to(y_TN.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are chosen anew: kernels hold addresses."""
        return choose, (self.weight, self.dtype, self.device, self.bias, self.activations)


class _ThroughWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, product: Product) -> Tensor:
        ctx.product = product
        return product.forward(x_TD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.product.backward(gradients[0]), None


def product_group(products: Sequence[Product], x_TD: Tensor) -> list[Tensor]:
    """Several products of one x: for a few rows one native call, which wakes the cores once."""
    grouped = 1 < len(products) <= native.MOST and x_TD.dim() == 2 and x_TD.shape[0] > 0
    if grouped and native.takes(x_TD) and not (torch.is_grad_enabled() and x_TD.requires_grad):
        first = [product.kernels[0] for product in products if product.goes_native]
        in_tiles = [kernel for kernel in first if isinstance(kernel, tiles.Tiles)]
        if len(in_tiles) == len(products):
            return tiles.product_group(in_tiles, x_TD)
        plain = [kernel.plain for kernel in first if isinstance(kernel, Native)]
        if len(plain) == len(products) and x_TD.shape[0] <= CLASSES[0][0]:
            return native.product(plain, x_TD, x_TD.dtype)
    return [product(x_TD) for product in products]


def choose(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device | str,
    bias: Tensor | None = None,
    activations: str = "exact",
) -> Product:
    """The product for activations of `dtype` on `device`: measured once per process for weights of a kind.

    The choice is among kernels of one exactness (see above). Without anything to measure (meta or traced tensors) it is
    the twin. activations: `int8` rounds x (`packed_tiles`) where a kernel does that, else the name says `exact`.
    Errors: `PunaError` for activations or a PUNA_PACKED that do not exist or cannot be.
    """
    if activations not in ACTIVATIONS:
        raise PunaError(f"there are no activations {activations!r}", f"use {' or '.join(ACTIVATIONS)}")
    forced, device = _forced(), torch.device(device)
    weight = to_device(weight, device)
    bias = None if bias is None else bias.detach().to(device)
    if forced == "twin" or device.type == "meta" or type(weight.packed.data) not in PLAIN:
        twins = [Twin(weight, bias)] * 3
        return Product(weight, dtype, Stored(weight.packed, weight.packed), bias, twins, activations)
    kernels_exist = forced != "torch" and (device.type != "cpu" or native.available())
    stored = store(weight.packed) if kernels_exist else Stored(weight.packed, weight.packed)
    if activations == "int8" and kernels_exist and tiles.serves(stored, weight):
        return Product(weight, dtype, stored, bias, [tiles.Tiles(stored, bias)] * 3, activations)
    if stored.packed.data.is_cpu and not native.serves(stored.packed):
        stored = Stored(weight.packed, weight.packed)  # no reason to keep it wider
    inner = dataclasses.replace(weight, packed=stored.packed, up_NR=None, down_RD=None)
    candidates = _candidates(stored, inner, bias, dtype, forced)
    names = _fastest(stored, inner, dtype, forced, [kernel.name for kernel in candidates])
    by_name = {kernel.name: kernel for kernel in candidates}
    return Product(weight, dtype, stored, bias, [by_name[name] for name in names], activations)


def to_device(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """The same weight with all its tensors on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(device)
        if isinstance(value, Packed):
            return dataclasses.replace(value, **{name: moved(part) for name, part in vars(value).items()})
        return value

    return dataclasses.replace(weight, **{name: moved(part) for name, part in vars(weight).items()})


def _forced() -> str:
    forced = os.environ.get("PUNA_PACKED", "")
    if forced not in _FORCED:
        raise PunaError(f"PUNA_PACKED is {forced!r}", "use twin, torch or native, or leave it unset")
    if forced == "native" and not native.available():
        raise PunaError(f"PUNA_PACKED is 'native', but the kernels are {native.reason()}", "leave it unset")
    return forced


def _candidates(
    stored: Stored, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, forced: str
) -> list[Kernel]:
    """Kernels that can take this weight, in the order in which they are preferred."""
    packed, scheme, half = stored.packed, stored.packed.scheme, dtype is torch.bfloat16
    if not packed.data.is_cpu:
        return _device_candidates(stored, weight, bias, dtype, forced)
    fast = native.serves(packed) and forced != "torch"
    found: list[Kernel] = []
    if fast:
        found.append(Native(stored, weight, bias))
    elif half and torch_takes_int4(stored, weight):
        return [TorchInt4(weight, bias)]
    found.append(Dequantize(stored, weight, bias, torch.float32, fast))
    plain_int8 = packed.data.dtype is torch.int8 and scheme.symmetric and packed.scales.shape[1] == 1
    if plain_int8 and stored.order_D is None and weight.activations is not None and weight.activations.kind == "int":
        found.append(Integer(weight, bias))
    if half:
        found.append(Dequantize(stored, weight, bias, torch.bfloat16, fast))
        if plain_int8 and stored.order_D is None and weight.activations is None:
            found.append(TorchInt8(weight, bias))
    return found


def _device_candidates(
    stored: Stored, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, forced: str
) -> list[Kernel]:
    working = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    plain: list[Kernel] = [Dequantize(stored, weight, bias, working, False)]
    if forced == "torch" or find_spec("triton") is None or not stored.packed.data.is_cuda:
        return plain
    from puna.ops.packed_triton import Triton, serves

    return [Triton(stored.packed, stored.order_D, weight, bias), *plain] if serves(stored.packed) else plain


# --- the measurement --------------------------------------------------------------------------------------------------

_CHOSEN: dict[tuple[Any, ...], tuple[str, ...]] = {}  # per process: weights of one kind measure once


def _fastest(
    stored: Stored, weight: QuantizedWeight, dtype: torch.dtype, forced: str, names: Sequence[str]
) -> tuple[str, ...]:
    """The name of the kernel for each class of rows."""
    packed = stored.packed
    if len(names) == 1 or packed.shape[0] * packed.shape[1] == 0:
        return (names[0],) * len(CLASSES)
    if forced == "native" or not packed.data.is_cpu:
        return (names[0], names[0], "dequantize" if packed.data.is_cpu else names[0])
    few = min(packed.shape[0], -(-PROBE // packed.shape[1] // 256) * 256)
    key = (few, packed.shape[1], packed.scheme, weight.activations, weight.threshold > 0, packed.scales.dtype, dtype,
           stored.order_D is None, tuple(names), torch.get_num_threads())  # fmt: skip
    if key not in _CHOSEN:
        probe = dataclasses.replace(stored, packed=some_rows(packed, 0, few))
        part = dataclasses.replace(weight, packed=probe.packed)
        kernels = _candidates(probe, part, None, dtype, forced)
        _CHOSEN[key] = tuple(_measure(kernels, rows, packed.shape[1], dtype) for _, rows in CLASSES)
    return _CHOSEN[key]


@torch.no_grad()
def _measure(kernels: Sequence[Kernel], rows: int, inputs: int, dtype: torch.dtype) -> str:
    """The fastest kernel for `rows` rows; the first one unless another is a tenth faster.

    For a few rows it is the native one, which nothing beat on any format (benchmarks/packed_linear.py). Seconds are one
    core's own: on a busy machine a clock on the wall once made a kernel win that was fifty times slower.
    """
    if rows <= CLASSES[0][0] and kernels[0].name == "native":
        return "native"
    x_TD = torch.linspace(-1, 1, rows * inputs).view(rows, inputs).to(dtype)
    seconds = dict.fromkeys((kernel.name for kernel in kernels), float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):  # in turn; the first ones also warm caches up
            for kernel in kernels:
                seconds[kernel.name] = min(seconds[kernel.name], _seconds(kernel, x_TD))
    finally:
        torch.set_num_threads(threads)
    fastest = min(seconds, key=lambda name: seconds[name])
    return fastest if seconds[fastest] < 0.9 * seconds[kernels[0].name] else kernels[0].name


def _seconds(kernel: Kernel, x_TD: Tensor) -> float:
    start = time.thread_time()
    kernel(x_TD, x_TD.dtype)
    return time.thread_time() - start


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
