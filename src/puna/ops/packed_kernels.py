"""Everyone who can multiply with a quantized weight on a CPU; `packed_linear` chooses among them.

    native       C++ for few rows: codes become floats in registers, so memory is the whole cost; exact
    dequantize   pieces of the weight become numbers (which stay in the cache), then `ops.linear`; any format, exact
    integer      int8 inputs times int8 weights in int32 (`torch._int_mm`); exact
    bfloat16     dequantize, with pieces in bf16                                   }  only for bf16 inputs: what they
    torch_int8   torch's kernel for int8 per channel                               }  compute with is rounded to bf16
    torch_int4   torch's kernel for int4 groups, with a packing of its own         }

"Exact" is exact but for the order of an fp32 sum. Kernels read four or eight bits, groups side by side: see `Stored`.
Shapes: T rows, D inputs, N outputs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops import linear as ops
from puna.ops.formats.activations import quantize_activation
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed, pack
from puna.ops.native import packed as native

# Numbers dequantized at a time, 4 MiB in fp32: they stay in the shared cache. Smaller pieces suit one core better, but
# cores wait for each other at every piece, on a busy machine for milliseconds.
PIECE = 1 << 20


class Kernel(Protocol):
    """x_TD (T > 0) -> x Q^T + b (T, N) in `out`; x is rounded as the weight says. nbytes: what it keeps for itself."""

    name: str
    nbytes: int

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor: ...


# --- what is stored -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A packed weight as kernels read it: `packed` has 4 or 8 bits and neighbouring groups; `origin` tells what it was.

    order_D: column d of `packed` belongs to column order_D[d] of x; None: as they come.
    """

    packed: Packed
    origin: Packed  # its scheme and group_of_D; its data is `packed`'s or empty
    order_D: Tensor | None = None

    def canonical(self) -> Packed:
        """The packed weight that came in, number for number."""
        if self.origin.data is self.packed.data:
            return self.origin
        codes = self.packed.codes()
        if self.order_D is not None:
            codes = codes.index_select(1, self.order_D.long().argsort())
        scales, zeros = self.origin.scales, self.origin.zeros
        return pack(codes.contiguous(), self.origin.scheme, scales, zeros, self.origin.group_of_D)


def store(packed: Packed) -> Stored:
    """Wider codes and sorted columns where kernels need them; formats without a kernel stay as they are."""
    scheme, order_D = packed.scheme, _sorted_columns(packed)
    bits = 4 if scheme.bits <= 4 else 8
    if scheme.kind == "float" or (bits == scheme.bits and order_D is None):
        return Stored(packed, packed)
    if packed.group_of_D is not None and order_D is None:
        return Stored(packed, packed)
    codes = packed.codes() if order_D is None else packed.codes().index_select(1, order_D.long())
    wider = pack(codes.contiguous(), dataclasses.replace(scheme, bits=bits), packed.scales, packed.zeros)
    origin = dataclasses.replace(packed, data=packed.data.new_empty(0))
    return Stored(wider, origin, order_D)


def _sorted_columns(packed: Packed) -> Tensor | None:
    """The columns of scattered groups, group by group; None if they are not scattered or not of one size."""
    if packed.group_of_D is None or packed.group_of_D.is_meta:
        return None
    width = packed.scheme.group_size
    order = packed.group_of_D.long().argsort(stable=True)
    groups = torch.arange(packed.shape[1], device=order.device) // max(1, width)
    fits = packed.shape[1] == width * packed.scales.shape[1]
    return order.int() if fits and torch.equal(packed.group_of_D.long()[order], groups) else None


# --- kernels --------------------------------------------------------------------------------------------------------


class Twin:
    """`QuantizedWeight.product`: all of the weight at once, whatever the format, device or dtype."""

    name, nbytes = "twin", 0

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        self._weight, self._bias = dataclasses.replace(weight, up_NR=None, down_RD=None), bias_N

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        bias = None if self._bias is None else self._bias.to(out)
        return self._weight.product(x_TD, bias).to(out)


class Native:
    """The C++ kernel, for as many rows as one likes; it reads the weight again for every four."""

    name, nbytes = "native", 0

    def __init__(self, stored: Stored, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        self.weight = weight
        inside = weight.activations if not weight.threshold else None  # outliers are told apart by torch
        scale = 0.0 if weight.input_scale is None else float(weight.input_scale)
        bias = None if bias_N is None else bias_N.float()
        self.plain = native.NativeWeight(stored.packed, bias, stored.order_D, inside, scale)

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        if self.weight.threshold:
            x_TD = self.weight.round_inputs(x_TD)
        if x_TD.dtype in (torch.float32, torch.bfloat16) and out in (torch.float32, torch.bfloat16):
            return native.product([self.plain], x_TD, out)[0]
        return native.product([self.plain], x_TD.float(), torch.float32)[0].to(out)


class Dequantize:
    """Pieces of the weight as numbers in `working`, one after another through `ops.linear`."""

    nbytes = 0

    def __init__(
        self, stored: Stored, weight: QuantizedWeight, bias_N: Tensor | None, working: torch.dtype, fast: bool
    ) -> None:
        self.name = "bfloat16" if working is torch.bfloat16 else "dequantize"
        self.stored, self._weight, self._bias, self._working = stored, weight, bias_N, working
        self._plain = native.NativeWeight(stored.packed, None, None, None, 0.0) if fast else None

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        working = torch.float64 if x_TD.dtype is torch.float64 else self._working
        x_TD = self._weight.round_inputs(x_TD).to(working)
        if self.stored.order_D is not None:
            x_TD = x_TD.index_select(1, self.stored.order_D)
        y_TN = x_TD.new_empty(x_TD.shape[0], self.stored.packed.shape[0], dtype=out)
        for begin, end in self.pieces(x_TD.shape[0]):
            y_TN[:, begin:end] = ops.linear(x_TD, self.numbers(begin, end, working))
        return y_TN if self._bias is None else y_TN.add_(self._bias)

    def pieces(self, rows: int) -> list[tuple[int, int]]:
        """Ranges of outputs: fewer and larger ones for many rows, where the product is most of the work."""
        outputs, inputs = self.stored.packed.shape
        height = self.stored.packed.scheme.group_size if self.stored.packed.scheme.granularity == "block" else 16
        size = PIECE * (1 if rows <= 128 else 4) if self.stored.packed.data.is_cpu else 1 << 24
        step = max(1, size // max(1, inputs) // height) * height
        return [(begin, min(outputs, begin + step)) for begin in range(0, outputs, step)]

    def numbers(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows of the weight in the order of the stored columns."""
        if self._plain is not None and dtype in (torch.float32, torch.bfloat16):
            return native.dequantize(self._plain, begin, end, dtype)
        return some_rows(self.stored.packed, begin, end).dequantize(dtype)


class Integer:
    """int8 inputs times int8 weights per channel: int32 sums, then both scales; outliers in full precision."""

    name, nbytes = "integer", 0

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        self._weight, self._bias = weight, bias_N
        self._scales_N = weight.packed.scales.float().flatten()

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        weight, codes_ND = self._weight, self._weight.packed.data
        assert weight.activations is not None
        outliers_TD = x_TD.abs() >= weight.threshold if weight.threshold else None
        plain_TD = x_TD if outliers_TD is None else x_TD.masked_fill(outliers_TD, 0)
        codes_TD, scales_T1 = quantize_activation(plain_TD, weight.activations, weight.input_scale)
        y_TN = torch._int_mm(codes_TD, codes_ND.t()).float().mul_(scales_T1)
        if outliers_TD is not None:
            some = outliers_TD.any(0).nonzero().flatten()
            large = x_TD.masked_fill(~outliers_TD, 0).index_select(1, some)
            y_TN += F.linear(large.float(), codes_ND.index_select(1, some).float())
        y_TN *= self._scales_N
        return (y_TN if self._bias is None else y_TN.add_(self._bias)).to(out)


class TorchInt8:
    """torch's product of bf16 rows with int8 per channel; scales are rounded to bf16."""

    name = "torch_int8"

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        self._data, self._bias = weight.packed.data, bias_N
        self._scales_N = weight.packed.scales.flatten().expand(weight.shape[0]).bfloat16().contiguous()
        self.nbytes = self._scales_N.nbytes

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        y_TN = torch._weight_int8pack_mm(x_TD.bfloat16().contiguous(), self._data, self._scales_N).to(out)
        return y_TN if self._bias is None else y_TN + self._bias.to(out)


class TorchInt4:
    """torch's product of bf16 rows with int4 groups, in a packing of its own: w = (q - 8) s + z, s and z in bf16."""

    name = "torch_int4"

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        packed = weight.packed
        scales_GN = packed.scales.float().t()
        shift_GN = torch.zeros_like(scales_GN) if packed.zeros is None else -packed.zeros.t() * scales_GN
        self._pairs = torch.stack([scales_GN, shift_GN], 2).bfloat16().contiguous()
        codes = (packed.codes().to(torch.int32) + 8).contiguous()
        self._data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._width, self._bias = packed.scheme.group_size, bias_N
        self.nbytes = self._data.nbytes + self._pairs.nbytes

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        rows = x_TD.bfloat16().contiguous()
        y_TN = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._data, self._width, self._pairs).to(out)
        return y_TN if self._bias is None else y_TN + self._bias.to(out)

    def without(self, packed: Packed) -> Packed:
        """`packed`, which came in, less what this packing holds."""
        return dataclasses.replace(packed, data=packed.data.new_empty(0))

    def canonical(self, rest: Packed) -> Packed:
        """What came in, from the packing and what `without` left."""
        return pack(self.codes(rest.shape[1]), rest.scheme, rest.scales, rest.zeros)

    def codes(self, inputs: int) -> Tensor:
        """The codes (N, D) again: the product of the identity with scales of 1 and no shift."""
        plain = torch.zeros_like(self._pairs)
        plain[..., 0] = 1
        columns = torch.eye(inputs, dtype=torch.bfloat16).split(256)
        parts = [torch.ops.aten._weight_int4pack_mm_for_cpu(c, self._data, self._width, plain) for c in columns]
        return torch.cat([part.to(torch.int8) for part in parts]).t().contiguous()


def some_rows(packed: Packed, begin: int, end: int) -> Packed:
    """Some rows of a packed weight, as views; whole blocks where tiles are blocks."""
    height = packed.scheme.tile(packed.shape)[0] if packed.group_of_D is None else 1
    some = slice(None) if packed.scales.shape[0] == 1 else slice(begin // height, -(-end // height))
    zeros = None if packed.zeros is None else packed.zeros[some]
    shape = (end - begin, packed.shape[1])
    return Packed(packed.data[begin:end], packed.scales[some], zeros, packed.scheme, shape, packed.group_of_D)


def torch_takes_int4(stored: Stored, weight: QuantizedWeight) -> bool:
    """Whether `TorchInt4` has a kernel for this."""
    scheme, outputs = stored.packed.scheme, stored.packed.shape[0]
    fits = scheme.bits == 4 and scheme.group_size in (32, 64, 128, 256) and outputs % 16 == 0
    return fits and stored.packed.group_of_D is None and stored.order_D is None and weight.activations is None
