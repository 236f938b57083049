"""Products with activations rounded to int8 in groups of 32, as llama.cpp does by default: an explicit choice.

A number of x is off by at most half a step, absmax of its 32 / 254, so a product of many is off by 0.5 to 1 percent of
its usual size (measured on normal data: tests/ops/test_tiles.py). Rows are rounded one by one: nothing depends on the
batch. `rounded` is the twin's view of x; `native.tiles` computes.

Shapes: T rows, D inputs, N outputs.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed
from puna.ops.native import tiles as native
from puna.ops.packed_kernels import Stored

_LEAST = 2.0**-100  # a group without a number above it counts as zeros: 127 / absmax stays finite


def rounded(x_TD: Tensor) -> Tensor:
    """x as the kernel sees it: codes times scales, number for number, in fp64. x fp32, finite."""
    columns = x_TD.shape[1]
    groups = F.pad(x_TD, (0, -columns % native.BLOCK)).unflatten(1, (-1, native.BLOCK))
    most = groups.abs().amax(2, keepdim=True)
    full = torch.full_like(most, 127)  # number / tensor would be a product with the reciprocal
    codes = torch.where(most > _LEAST, groups * (full / most), 0).round()
    return (codes.double() * (most / full).double()).flatten(1)[:, :columns]


def serves(stored: Stored, weight: QuantizedWeight) -> bool:
    """Whether there are kernels: see `native.tiles.serves`; weights that say themselves how x is rounded are left."""
    return weight.activations is None and native.serves(stored.packed)


class Tiles:
    """The kernel: keeps the weight in tiles and nothing else; `canonical` gives back what came in."""

    name = "int8 activations"

    def __init__(self, stored: Stored, bias_N: Tensor | None) -> None:
        packed, origin = stored.packed, stored.origin
        self.plain = native.TilesWeight.of(packed, bias_N, stored.order_D)
        self._scheme, self._scale_dtype = packed.scheme, packed.scales.dtype
        self._is_origin = origin.data is packed.data
        self._shares_scales = packed.scheme.tile(packed.shape)[0] > 1  # then there are few: they are kept as they came
        self.nbytes = self.plain.nbytes + (0 if stored.order_D is None else stored.order_D.nbytes)

    def __call__(self, x_TD: Tensor, out: torch.dtype) -> Tensor:
        return native.product([self.plain], x_TD.float())[0].to(out)

    def without(self, packed: Packed) -> Packed:
        """`packed`, which came in, less what the tiles hold."""
        empty = packed.data.new_empty(0)
        if self._shares_scales:
            return dataclasses.replace(packed, data=empty)
        zeros = None if packed.zeros is None else packed.zeros.new_empty(0)
        return dataclasses.replace(packed, data=empty, scales=packed.scales.new_empty(0), zeros=zeros)

    def canonical(self, rest: Packed) -> Packed:
        """What came in, number for number, from the tiles and what `without` left."""
        stored = self.plain.packed(self._scheme, self._scale_dtype)
        if self._shares_scales:
            stored = dataclasses.replace(stored, scales=rest.scales, zeros=rest.zeros)
        if self._is_origin:
            return stored
        origin = dataclasses.replace(rest, scales=stored.scales, zeros=stored.zeros)
        return Stored(stored, origin, self.plain.order_D).canonical()


def product_group(kernels: list[Tiles], x_TD: Tensor) -> list[Tensor]:
    """Several products of one x in one call: it is rounded once, and the cores are woken once."""
    results = native.product([kernel.plain for kernel in kernels], x_TD.float())
    return [y_TN.to(x_TD.dtype) for y_TN in results]
