"""The native product of rows rounded to int8 with a weight in tiles (tiles.cpp draws them).

Shapes: T rows of x, D inputs, N outputs, G groups of columns that share a scale, J = ceil(N / 16) tiles.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.packed import Packed
from puna.ops.formats.scheme import Scheme
from puna.ops.formats.words import words_per_row
from puna.ops.native import library
from puna.ops.native.guard import PLAIN

MOST = 4  # products in one call; `MOST` in tiles.cpp
OUTPUTS, BLOCK = 16, 32  # of a tile, columns that one scale of x is for
LEVELS = ("baseline", "AVX2", "AVX-512", "AVX-512 VNNI")

_native = library.load()
_WEIGHT, _PROBLEM = struct.Struct("PPPPPPqqqiii4x"), struct.Struct("PPqqq")  # `Tiles`, and `Problem` before it
_LAYOUT = struct.Struct("PPqqqii")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def best_level() -> int:
    """The index in LEVELS of the best kernels for this processor."""
    return int(_native.kernels.puna_tiles_level()) if available() else 0  # type: ignore[union-attr]


def available() -> bool:
    """True if the native kernels are loaded."""
    return getattr(_native.kernels, "puna_tiles_product", None) is not None


_level = best_level()


def serves(packed: Packed) -> bool:
    """True if it can lie in tiles: int4 or int8 on a CPU, per channel or tensor or in groups of whole blocks."""
    scheme, (rows, columns) = packed.scheme, packed.shape
    tensors = [part for part in (packed.data, packed.scales, packed.zeros) if part is not None]
    if not available() or scheme.kind != "int" or scheme.bits not in (4, 8) or packed.group_of_D is not None:
        return False
    if not all(part.is_cpu and type(part) in PLAIN for part in tensors) or packed.scales.dtype not in _SCALES:
        return False
    width = scheme.tile(packed.shape)[1]
    return rows > 0 and columns > 0 and (width == columns or width % BLOCK == 0)


class TilesWeight:
    """A weight in tiles: codes (J * blocks * 64 * bits,) uint8; scales (J, G, 16), zeros and mins alike or None.

    scales, mins: fp16 or fp32. bias_N fp32; order_D int32: column d of the codes belongs to column order_D[d] of x.
    span: blocks of 32 columns that share a scale. `struct`: `Tiles` of tiles.h, valid while this object lives.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, mins: Tensor | None, bias_N: Tensor | None,
        order_D: Tensor | None, shape: tuple[int, int], span: int, bits: int,
    ) -> None:  # fmt: skip
        assert mins is None or mins.dtype is scales.dtype
        self.codes, self.scales, self.zeros, self.mins, self.shape, self.bits = codes, scales, zeros, mins, shape, bits
        self.order_D, self._bias = order_D, None if bias_N is None else bias_N.float().contiguous()
        parts = (codes, scales, zeros, mins, self._bias, order_D)
        half = scales.dtype is torch.float16
        self.struct = _WEIGHT.pack(
            *(0 if part is None else part.data_ptr() for part in parts), *shape, span, bits, half, _level
        )

    @classmethod
    def of(cls, packed: Packed, bias_N: Tensor | None = None, order_D: Tensor | None = None) -> TilesWeight:
        """A packed weight that it `serves`; nothing of it is kept."""
        height, width = packed.scheme.tile(packed.shape)
        scales, zeros = packed.scales, packed.zeros
        if height > 1:
            scales = scales.repeat_interleave(height, 0)
            zeros = None if zeros is None else zeros.repeat_interleave(height, 0)
        span = -(-width // BLOCK)
        codes = _pack(packed.data, packed.shape, packed.scheme.bits)
        zeros = None if zeros is None else _arrange(zeros)
        (scales,) = _narrow(scales)
        return cls(codes, _arrange(scales), zeros, None, bias_N, order_D, packed.shape, span, packed.scheme.bits)

    @classmethod
    def from_codes(
        cls, codes_ND: Tensor, scales_NG: Tensor, mins_NG: Tensor | None, bits: int, bias_N: Tensor | None = None
    ) -> TilesWeight:
        """weight = scale * code - min: codes 0 .. 15 (uint8) of 4 bits or int8; groups of a multiple of 32 columns.

        D a multiple of 32 G. The offset that 4 bits are stored with (8) goes into the mins.
        """
        columns, groups = codes_ND.shape[1], scales_NG.shape[1]
        assert columns % (BLOCK * groups) == 0, f"{columns} columns in {groups} groups"
        if bits == 4:
            assert codes_ND.dtype is torch.uint8
            data = codes_ND[:, 0::2] | codes_ND[:, 1::2] << 4
            # Tiles take 8 off every code: scale * (code - 8) - (min - 8 * scale).
            scales_NG = scales_NG.float()
            mins_NG = -8 * scales_NG if mins_NG is None else mins_NG.float() - 8 * scales_NG
        else:
            assert codes_ND.dtype is torch.int8
            data = codes_ND
        codes = _pack(data.contiguous(), (codes_ND.shape[0], columns), bits)
        parts = [_arrange(part) for part in _narrow(*(part for part in (scales_NG, mins_NG) if part is not None))]
        mins = None if mins_NG is None else parts[1]
        shape = (codes_ND.shape[0], columns)
        return cls(codes, parts[0], None, mins, bias_N, None, shape, columns // groups // BLOCK, bits)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, without the bias and the order."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.mins) if part is not None)

    def packed(self, scheme: Scheme, scale_dtype: torch.dtype) -> Packed:
        """The packed weight it was made `of`, number for number, for scales of one row each."""
        outputs, inputs = self.shape
        row = words_per_row(inputs, 4) * 4 if self.bits == 4 else inputs
        data = torch.zeros(outputs, row, dtype=torch.int8)
        _layout("puna_tiles_unpack", data, self.codes, self.shape, self.bits)
        if self.bits == 4:
            data = data.view(torch.int32)
        scales = _in_rows(self.scales, outputs).to(scale_dtype)
        zeros = None if self.zeros is None else _in_rows(self.zeros, outputs)
        return Packed(data, scales, zeros, scheme, self.shape)


def product(weights: Sequence[TilesWeight], x_TD: Tensor) -> list[Tensor]:
    """round(x) W^T + b for up to four weights of one width; x fp32, returns (T, N) fp32 each."""
    assert len(weights) <= MOST
    assert x_TD.dtype is torch.float32
    rows, width = x_TD.shape
    assert all(weight.shape[1] == width for weight in weights)
    if x_TD.stride(1) != 1:
        x_TD = x_TD.contiguous()
    results, problems = [], b""
    for weight in weights:
        y_TN = torch.empty(rows, weight.shape[0])
        results.append(y_TN)
        head = (x_TD.data_ptr(), y_TN.data_ptr(), rows, x_TD.stride(0), torch.get_num_threads())
        problems += _PROBLEM.pack(*head) + weight.struct
    assert _native.kernels is not None
    if _native.kernels.puna_tiles_product(problems, len(weights)):
        raise MemoryError(f"no memory for {rows} rounded rows of {width} inputs")
    return results


def _pack(data: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    blocks = -(-shape[1] // BLOCK) * -(-shape[0] // OUTPUTS)
    room = torch.empty(blocks * 64 * bits + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64  # a line of the tile is a line of the cache
    tiles = room[start : start + blocks * 64 * bits]
    _layout("puna_tiles_pack", data.contiguous(), tiles, shape, bits)
    return tiles


def _layout(name: str, data: Tensor, tiles: Tensor, shape: tuple[int, int], bits: int) -> None:
    row_bytes = data.shape[1] * data.element_size()
    layout = _LAYOUT.pack(data.data_ptr(), tiles.data_ptr(), *shape, row_bytes, bits, torch.get_num_threads())
    getattr(_native.kernels, name)(layout)


def _narrow(*parts: Tensor) -> list[Tensor]:
    """All in fp16 where that changes no number, else in fp32."""
    halves = [part.half() for part in parts]
    exact = all(torch.equal(half.to(part.dtype), part) for half, part in zip(halves, parts, strict=True))
    return halves if exact else [part.float() for part in parts]


def _arrange(parts_NG: Tensor) -> Tensor:
    """(N, G) -> (J, G, 16), 0 beyond the last output."""
    outputs, groups = parts_NG.shape
    padded = F.pad(parts_NG, (0, 0, 0, -outputs % OUTPUTS))
    return padded.view(-1, OUTPUTS, groups).transpose(1, 2).contiguous()


def _in_rows(parts: Tensor, outputs: int) -> Tensor:
    """The inverse."""
    return parts.transpose(1, 2).reshape(-1, parts.shape[1])[:outputs].contiguous()
