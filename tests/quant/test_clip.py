"""quant/clip.py: the best of all shares for every tile, checked one by one; no row's outputs get worse."""

from __future__ import annotations

import pytest
import torch

from planted_inputs import correlated_inputs, heavy_weight
from puna.ops.formats import rounding
from puna.ops.formats.scheme import FLOAT8, INT4, Scheme
from puna.quant import clip as module
from puna.quant.clip import SHARES, search_clip

SCHEMES = [
    Scheme(4, "int", True, "group", 16),
    Scheme(3, "int", False, "group", 32),
    Scheme(4, "int", True, "channel"),
    Scheme(4, "int", True, "block", 8),
    Scheme(3, "int", True, "tensor"),
]
ids = lambda s: f"int{s.bits}-{s.granularity}{s.group_size or ''}"  # noqa: E731


def rounded(weight, scheme, clip):
    scales, zeros = rounding.choose_scales(weight, scheme, clip)
    return rounding.dequantize(rounding.quantize(weight, scheme, scales, zeros), scales, zeros)


def damage(weight, scheme, clip, x):
    """Squared error of every output row."""
    return ((rounded(weight, scheme, clip) - weight).double() @ x.double().t()).square().sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("tokens", [10, 400])  # fewer and more inputs than columns
def test_every_tile_has_its_best_share_or_its_full_range(scheme, tokens):
    weight, x = heavy_weight(16, 64), correlated_inputs(tokens, 64, outliers=2)
    found = search_clip(weight, scheme, x)
    assert found.shape == scheme.grid((16, 64))
    height, width = scheme.tile((16, 64))
    losses = []
    for share in SHARES:
        delta = (rounded(weight, scheme, share) - weight).double()
        tiles = torch.einsum("ngw,tgw->ngt", delta.unflatten(1, (-1, width)), x.double().unflatten(1, (-1, width)))
        losses.append(tiles.square().sum(2).unflatten(0, (-1, height)).sum(1))
    best = torch.tensor(SHARES)[torch.stack(losses).argmin(0)]
    whole = (found == 1).all(1)  # rows that kept their range because their whole output got worse
    same = (found - best).abs() < 1e-6
    assert same[~whole].double().mean() > 0.95  # fp32 may tell two nearly equal losses apart the other way
    assert (same.all(1) | whole).double().mean() > 0.8
    # The whole output of the rows of a tile together is no worse.
    sums = [damage(weight, scheme, clip, x).unflatten(0, (-1, height)).sum(1) for clip in (found, 1.0)]
    assert (sums[0] <= sums[1] * 1.0001).all()


@pytest.mark.parametrize(("scheme", "share"), [(INT4, 0.1), (Scheme(3, "int", True, "group", 128), 0.2)])
def test_it_repairs_a_share_of_the_damage_on_other_inputs(scheme, share):
    weight, x = heavy_weight(64, 256), correlated_inputs(2000, 256)
    found = search_clip(weight, scheme, x[:512])
    before, after = (damage(weight, scheme, clip, x[512:]).sum() for clip in (1.0, found))
    assert 1 - after / before > share
    assert 0 < (found < 1).double().mean() < 1


def test_rows_in_parts_are_the_same(monkeypatch):
    weight, x = heavy_weight(24, 64), correlated_inputs(100, 64)
    for scheme in SCHEMES[:-1]:
        whole = search_clip(weight, scheme, x)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_NUMBERS", 8 * 100)
            assert torch.equal(search_clip(weight, scheme, x), whole)


def test_edges():
    x = correlated_inputs(100, 64)
    for scheme in SCHEMES:
        assert (search_clip(torch.zeros(8, 64), scheme, x) == 1).all()
        assert (search_clip(heavy_weight(8, 64), scheme, torch.zeros(9, 64)) == 1).all()
    assert search_clip(torch.zeros(0, 64), SCHEMES[0], x).shape == (0, 4)
    assert search_clip(heavy_weight(8, 64), FLOAT8, x).shape == (8, 1)
    assert torch.equal(search_clip(heavy_weight(8, 64), SCHEMES[0], x, shares=(1.0,)), torch.ones(8, 4))
