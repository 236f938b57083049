"""Codes of a few bits as one dense stream of bits in int32 words: what every packed format on disk is made of.

Code k of a row begins at bit k * bits of the row, counted from the lowest bit of its first word; a code may lie
across two words. Four bits and three bits:

    bit     31..28 27..24 ... 7..4 3..0        31 30 | 29..27 ... 5..3 2..0
    word 0    q7     q6   ...  q1   q0         q10 lo |   q9   ...  q1   q0
    word 1    q15    q14  ...  q9   q8         q21 lo |  q20 ...    q11 | q10 hi (bit 0)

Eight codes take exactly `bits` bytes, so this is little-endian arithmetic on bytes. A row is filled up with zero bits.
"""

from __future__ import annotations

import sys
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.pieces import PIECE, for_each_piece

assert sys.byteorder == "little", "the packed formats are written byte by byte as little-endian machines keep them"


def words_per_row(columns: int, bits: int) -> int:
    """int32 words that hold a row of `columns` codes."""
    return -(-columns * bits // 32)


def pack_words(codes_ND: Tensor, bits: int) -> Tensor:
    """Unsigned codes 0 .. 2^bits - 1 (N, D) uint8 -> int32 (N, ceil(D * bits / 32))."""
    rows, columns = codes_ND.shape
    words_NW = torch.empty(rows, words_per_row(columns, bits), dtype=torch.int32, device=codes_ND.device)

    def work(part: slice) -> None:
        words_NW[part] = _pack(codes_ND[part], bits, words_NW.shape[1])

    for_each_piece(codes_ND, work)
    return words_NW


def unpack_words(words_NW: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: int32 (N, W) -> uint8 (N, columns)."""
    codes_ND = torch.empty(words_NW.shape[0], columns, dtype=torch.uint8, device=words_NW.device)

    def work(part: slice) -> None:
        codes_ND[part] = _unpack(words_NW[part], bits)[:, :columns]

    for_each_piece(words_NW, work, PIECE * bits // 32)
    return codes_ND


def signed_to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """int8 codes -2^(bits-1) .. as uint8 codes 0 .. ("offset binary"): the stored form of signed codes everywhere."""
    return codes.view(torch.uint8) + 2 ** (bits - 1)  # wraps around, as it should for eight bits


def unsigned_to_signed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `signed_to_unsigned`."""
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def _unit(bits: int) -> tuple[int, int]:
    """(bytes, codes) after which the pattern of bits repeats: 1 byte for 1, 2, 4 and 8 bits, 3 for 3 and 6."""
    size = bits // gcd(bits, 8)
    return size, size * 8 // bits


def _codes_in(words: int, bits: int) -> int:
    """Codes of the whole units that cover `words`."""
    size, count = _unit(bits)
    return -(-4 * words // size) * count


def _wide(size: int) -> torch.dtype:
    return torch.int32 if size < 4 else torch.int64


def _pack(codes_ND: Tensor, bits: int, words: int) -> Tensor:
    rows, columns = codes_ND.shape
    if (missing := _codes_in(words, bits) - columns) > 0:
        codes_ND = F.pad(codes_ND, (0, missing))
    bytes_NB = _bytes_of(codes_ND, bits)[:, : 4 * words]
    return bytes_NB.flatten().view(torch.int32).view(rows, words)  # flat: a single row may keep an odd stride


def _unpack(words_NW: Tensor, bits: int) -> Tensor:
    """All codes that begin in the words, more than were packed if the row did not fill them."""
    rows = words_NW.shape[0]
    bytes_NB = words_NW.contiguous().view(torch.uint8).view(rows, -1)
    size, count = _unit(bits)
    if missing := -bytes_NB.shape[1] % size:
        bytes_NB = F.pad(bytes_NB, (0, missing))
    units = bytes_NB.view(rows, -1, size)
    mask = 2**bits - 1
    if size == 1:
        parts = [(units[..., 0] >> (bits * i)) & mask for i in range(count)]
    else:
        joined = units[..., 0].to(_wide(size))
        for i in range(1, size):
            joined |= units[..., i].to(joined.dtype) << (8 * i)
        parts = [((joined >> (bits * i)) & mask).to(torch.uint8) for i in range(count)]
    return torch.stack(parts, -1).view(rows, -1)


def _bytes_of(codes_ND: Tensor, bits: int) -> Tensor:
    """(N, D) uint8 -> (N, D * bits / 8) uint8, D a multiple of the unit."""
    size, count = _unit(bits)
    units = codes_ND.contiguous().view(codes_ND.shape[0], -1, count)
    if size == 1:
        joined = units[..., 0].clone()
        for i in range(1, count):
            joined |= units[..., i] << (bits * i)
        return joined
    wide = units[..., 0].to(_wide(size))
    for i in range(1, count):
        wide |= units[..., i].to(wide.dtype) << (bits * i)
    parts = wide.unsqueeze(-1).view(torch.uint8)[..., :size]
    return parts.reshape(codes_ND.shape[0], -1)
