"""The canonical packed weight: rounding, GPTQ, AWQ and imports all end in it; exports and kernels read it.

    data     int4, int3, ...: int32 words (N, ceil(D * bits / 32)), signed codes kept as code + 2^(bits-1), see `words`
             int8: int8 (N, D)              float8: float8_e4m3fn (N, D)
    scales   one per tile of the scheme, e.g. (N, D / g) for groups
    zeros    int8 of the same shape, signed like the codes; None if symmetric
    group_of_D   int32 (D,), the group of each column where groups are no neighbours (GPTQ's `g_idx`), else None

It is also byte for byte what compressed-tensors calls `weight_packed`, and transposed what GPTQ calls `qweight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.ops.formats import rounding
from puna.ops.formats.scheme import Scheme
from puna.ops.formats.words import pack_words, signed_to_unsigned, unpack_words, unsigned_to_signed


@dataclass(frozen=True)
class Packed:
    """A weight of `shape` (N outputs, D inputs) in few bits; the file's docstring draws it."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    shape: tuple[int, int]
    group_of_D: Tensor | None = None

    def codes(self) -> Tensor:
        """The codes one by one: int8 or float8_e4m3fn (N, D)."""
        if not _is_dense(self.scheme):
            return self.data
        unsigned = unpack_words(self.data, self.scheme.bits, self.shape[1])
        return unsigned_to_signed(unsigned, self.scheme.bits)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, D) that the codes stand for, computed in fp32 (or the scales' fp64), given in dtype."""
        if self.group_of_D is None:
            weight = rounding.dequantize(self.codes(), self.scales, self.zeros)
        else:
            zeros = None if self.zeros is None else self.zeros.index_select(1, self.group_of_D)
            weight = rounding.decode(self.codes(), self.scales.index_select(1, self.group_of_D), zeros)
        return weight if dtype is None else weight.to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; zero points as here, one byte each."""
        parts = (self.data, self.scales, self.zeros, self.group_of_D)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Everything that is stored, divided by the number of weights: 4.25 for int4, groups of 128, fp32 scales."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def pack(
    codes_ND: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None, group_of_D: Tensor | None = None
) -> Packed:
    """Codes (int8 or float8, chosen by any method) with their scales -> the canonical form."""
    shape = (codes_ND.shape[0], codes_ND.shape[1])
    assert codes_ND.dtype is rounding.code_dtype(scheme)
    assert (zeros is None) == scheme.symmetric
    assert zeros is None or (zeros.shape == scales.shape and zeros.dtype is torch.int8)
    assert group_of_D is not None or scales.shape == scheme.grid(shape), f"{scales.shape} scales for {shape}"
    data = codes_ND.contiguous()
    if _is_dense(scheme):
        data = pack_words(signed_to_unsigned(data, scheme.bits), scheme.bits)
    return Packed(data, scales, zeros, scheme, shape, group_of_D)


def round_to_nearest(weight_ND: Tensor, scheme: Scheme, scale_dtype: torch.dtype | None = None) -> Packed:
    """The plain method: scales from the range, codes by rounding. weight must be finite (`rounding.check_finite`)."""
    scales, zeros = rounding.choose_scales(weight_ND, scheme, dtype=scale_dtype)
    return pack(rounding.quantize(weight_ND, scheme, scales, zeros), scheme, scales, zeros)


def _is_dense(scheme: Scheme) -> bool:
    return scheme.kind == "int" and scheme.bits < 8
