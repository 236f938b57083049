"""ops/formats/words.py: the bits are those of compressed-tensors and of a loop that follows the drawing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.ops.formats.words import (
    pack_words,
    signed_to_unsigned,
    unpack_words,
    unsigned_to_signed,
    words_per_row,
)


def loop(row, bits):
    """Bit by bit, from the definition."""
    stream = 0
    for position, code in enumerate(row):
        stream |= code << (position * bits)
    words = [(stream >> 32 * n) & 0xFFFFFFFF for n in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_bits_lie_where_they_should(bits, rows, columns, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype is torch.int32
    assert words.shape == (rows, words_per_row(columns, bits))
    assert words.tolist() == [loop(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_words(words, bits, columns), codes)
    signed = unsigned_to_signed(codes, bits)
    assert signed.tolist() == [[code - 2 ** (bits - 1) for code in row] for row in codes.tolist()]
    assert torch.equal(signed_to_unsigned(signed, bits), codes)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)


def test_first_code_in_the_lowest_nibble():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_words(codes, 4).item() & 0xFFFFFFFF == 0x87654321


def test_strided_codes():
    codes = torch.randint(0, 8, (40, 6), dtype=torch.uint8)
    assert torch.equal(pack_words(codes.t(), 3), pack_words(codes.t().contiguous(), 3))
    words = pack_words(codes.t(), 3)
    assert torch.equal(unpack_words(words.t().contiguous().t(), 3, 40), codes.t())
