"""A linear layer's weight in llama.cpp's own blocks: the bytes of the file, and what they stand for.

Q8_0 and Q4_0 are groups of 32 codes under one scale, which is also what `Packed` holds: they become a `QuantizedWeight`
without any loss. The other formats have offsets that are no whole zero points, or scales of scales; they stay blocks.

Shapes: N outputs, D inputs; data (N, bytes per row) uint8, x (..., D).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.gguf import TYPES, dequantize_gguf
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed, pack
from puna.ops.formats.scheme import Scheme

_SCHEMES = {
    "Q8_0": Scheme(bits=8, granularity="group", group_size=32),
    "Q4_0": Scheme(bits=4, granularity="group", group_size=32),
}
_PIECE = 1 << 20  # rows of codes are moved in pieces of so many numbers: memory beyond the result is bounded


@dataclass(frozen=True)
class GgufWeight:
    """Blocks of one of `gguf.TYPES`; `data` may be a view of a mapped file. `shape` (N, D)."""

    data: Tensor
    type: str
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        kind = TYPES[self.type]
        assert self.data.dtype is torch.uint8
        assert self.data.shape == (self.shape[0], self.shape[1] // kind.weights * kind.bytes)

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.data.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Scales included: 4.5 for Q4_K."""
        return TYPES[self.type].bits_per_weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight (N, D) that the blocks stand for: fp32, or rounded to `dtype`."""
        weight = dequantize_gguf(self.data, self.type)
        return weight if dtype is None else weight.to(dtype)

    def product(self, x: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """x W^T + b in x's dtype with fp32 weights: the twin of every kernel, exact and slow."""
        working = torch.float64 if x.dtype is torch.float64 else torch.float32
        y = F.linear(x.to(working), self.dequantize(working))
        return (y if bias_N is None else y + bias_N).to(x.dtype)

    def to(self, device: torch.device) -> GgufWeight:
        """The same blocks on `device`."""
        return dataclasses.replace(self, data=self.data.to(device))


def from_blocks(data: Tensor, type: str, shape: tuple[int, int]) -> GgufWeight | QuantizedWeight:
    """A weight from its bytes in a file (N, bytes per row): number for number what `dequantize_gguf` gives.

    A `QuantizedWeight` has memory of its own; a `GgufWeight` keeps `data` itself.
    """
    if type not in _SCHEMES:
        return GgufWeight(data, type, shape)
    parts = [_codes_and_scales(rows, type) for rows in data.split(max(1, _PIECE // max(1, shape[1])))]
    scales = torch.cat([scales for _, scales in parts])
    pieces = [pack(codes, _SCHEMES[type], some).data for (codes, some) in parts]
    return QuantizedWeight(Packed(torch.cat(pieces), scales, None, _SCHEMES[type], shape))


def _codes_and_scales(data: Tensor, type: str) -> tuple[Tensor, Tensor]:
    """Signed codes (rows, D) int8 and fp16 scales (rows, D / 32) of Q8_0 or Q4_0 blocks."""
    blocks = data.contiguous().view(data.shape[0], -1, TYPES[type].bytes)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(2)
    q = blocks[..., 2:]
    codes = q.view(torch.int8) if type == "Q8_0" else torch.cat([q & 15, q >> 4], 2).to(torch.int8).sub_(8)
    return codes.reshape(data.shape[0], -1), scales
