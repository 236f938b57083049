"""ops/formats/packed.py: what goes in comes out, whatever the format; groups out of order; sizes."""

from __future__ import annotations

import pytest
import torch

from puna.ops.formats import rounding
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.scheme import FLOAT8, INT4, INT8, Scheme

SCHEMES = [INT8, INT4, FLOAT8, Scheme(3, "int", False, "group", 32), Scheme(2, "int", True, "channel")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_survive_packing(scheme):
    w = torch.randn(24, 128)
    scales, zeros = rounding.choose_scales(w, scheme)
    codes = rounding.quantize(w, scheme, scales, zeros)
    packed = pack(codes, scheme, scales, zeros)
    assert torch.equal(packed.codes().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(packed.dequantize(), rounding.dequantize(codes, scales, zeros))
    assert torch.equal(round_to_nearest(w, scheme).dequantize(), packed.dequantize())
    assert packed.dequantize(torch.bfloat16).dtype is torch.bfloat16


def test_width_that_fills_no_word():
    packed = round_to_nearest(torch.randn(3, 13), Scheme(4))
    assert packed.data.shape == (3, 2)
    assert packed.codes().shape == (3, 13)


def test_groups_out_of_order():
    """With act-order, column c has the scale of group g_idx[c]: a loop says the same."""
    order = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32)
    codes = torch.randint(-8, 8, (2, 8), dtype=torch.int8)
    scales, zeros = torch.rand(2, 2) + 0.1, torch.randint(-8, 8, (2, 2), dtype=torch.int8)
    packed = pack(codes, Scheme(4, "int", False, "group", 4), scales, zeros, order)
    for n in range(2):
        for c in range(8):
            expected = (codes[n, c].float() - zeros[n, order[c]]) * scales[n, order[c]]
            assert packed.dequantize()[n, c] == expected


def test_bits_per_weight():
    w = torch.randn(64, 256)
    assert round_to_nearest(w, INT4).bits_per_weight == 4.25
    assert round_to_nearest(w, INT4, torch.float16).bits_per_weight == 4.125
    assert round_to_nearest(w, Scheme(3, "int", False, "group", 128), torch.float16).bits_per_weight == 3 + 24 / 128
    assert round_to_nearest(w, FLOAT8).bits_per_weight == 8 + 32 / 256
