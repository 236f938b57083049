"""quant/hqq.py: better than plain rounding for most weights, in no tile worse in squared error; zero points are codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planted_inputs import heavy_weight
from puna.base.console import PunaError
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import FLOAT8, INT4, Scheme
from puna.quant import hqq as module
from puna.quant.hqq import P, hqq

SCHEMES = [
    Scheme(bits, "int", symmetric, granularity, size)
    for bits, symmetric, granularity, size in [
        (4, False, "group", 64), (4, True, "group", 64), (3, False, "group", 32), (2, False, "group", 64),
        (4, False, "channel", 0), (8, False, "group", 64),
    ]
]  # fmt: skip
ids = lambda s: f"int{s.bits}-{'sym' if s.symmetric else 'asym'}-{s.granularity}{s.group_size or ''}"  # noqa: E731


def errors(weight, packed):
    """(sum |error|^p, sum error^2) of every tile, in fp64."""
    wrong = (packed.dequantize() - weight).double().abs().unflatten(1, (packed.scales.shape[1], -1))
    return wrong.pow(P).sum(2), wrong.square().sum(2)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_better_in_the_norm_it_minimises_and_never_worse_in_squares(scheme, dtype):
    weight = heavy_weight(96, 256)
    found, plain = hqq(weight, scheme, scale_dtype=dtype), round_to_nearest(weight, scheme, dtype)
    assert found.scales.dtype is (dtype or torch.float32)
    (norm, square), (plain_norm, plain_square) = errors(weight, found), errors(weight, plain)
    assert (norm <= plain_norm * 1.00001).all()
    assert (square <= plain_square * 1.00001).all()
    if scheme.bits < 8 or dtype is None:  # scales of 16 bits are too coarse to better 8
        assert norm.mean() < {2: 0.9, 3: 0.93, 4: 0.98, 8: 0.999}[scheme.bits] * plain_norm.mean()
    if dtype is None:
        assert square.mean() < {2: 0.8, 3: 0.95, 4: 0.99, 8: 0.999}[scheme.bits] * plain_square.mean()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), scheme=st.sampled_from(SCHEMES), size=st.sampled_from([1e-6, 1e-2, 1e4]))
def test_hard_weights(seed, scheme, size):
    """Rows of one sign, rows of one number, zeros, one number far out: finite, in range, never worse."""
    weight = heavy_weight(12, 128, seed % 1000)
    weight[0], weight[1], weight[2], weight[3] = weight[0].abs(), -weight[1].abs(), 0, 1.5
    weight[4, 7] = 100
    weight[5, ::2], weight[5, 1::2] = -1, 3
    weight[6], weight[7] = weight[6] + 0.3, weight[7] - 0.3  # the line would have its zero point far outside
    weight *= size
    found = hqq(weight, scheme)
    (norm, square), (plain_norm, plain_square) = errors(weight, found), errors(weight, round_to_nearest(weight, scheme))
    assert found.scales.isfinite().all()
    assert (found.scales > 0).all()
    if found.zeros is not None:
        assert found.zeros.dtype is torch.int8
        assert scheme.lowest <= found.zeros.min() <= found.zeros.max() <= scheme.highest
    assert (norm <= plain_norm * 1.0001 + size**P * 1e-5).all()
    assert (square <= plain_square * 1.0001 + size**2 * 1e-9).all()
    assert not found.dequantize()[2].any()


def test_many_pieces_are_the_same_as_one():
    weight = heavy_weight(300, 256)
    whole, part = hqq(weight, SCHEMES[0]), hqq(weight[290:], SCHEMES[0])
    assert torch.equal(whole.codes()[290:], part.codes())


def test_refused():
    with pytest.raises(PunaError, match="hqq cannot choose scales of float per channel"):
        hqq(torch.zeros(4, 64), FLOAT8)
    bad = torch.zeros(4, 128)
    bad[0, 0] = float("nan")
    with pytest.raises(PunaError, match="1 NaN"):
        hqq(bad, INT4)
    assert hqq(torch.zeros(0, 128), INT4).shape == (0, 128)


@pytest.mark.parametrize("bits", [2, 3])  # with four least squares does as well
def test_forgiving_large_errors_is_what_helps(bits, monkeypatch):
    """Without the shrinking step the line is plain least squares."""
    weight, scheme = heavy_weight(96, 256), Scheme(bits, "int", False, "group", 64)
    found = errors(weight, hqq(weight, scheme))[0].mean()
    monkeypatch.setattr(module, "_shrink", lambda wrong, *others: torch.zeros_like(wrong))
    assert found < 0.985 * errors(weight, hqq(weight, scheme))[0].mean()
