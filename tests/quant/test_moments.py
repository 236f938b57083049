"""quant/moments.py: sums against fp64, the sample's independence of batches, ranks joined, bad inputs refused."""

from __future__ import annotations

import pytest
import torch

from planted_inputs import correlated_inputs
from puna.base.console import PunaError
from puna.quant.moments import Moments, _lots


def filled(x, cuts, **kinds):
    moments = Moments(x.shape[1], "layers.0.mlp.down_proj", **kinds)
    for part in x.tensor_split(cuts):
        moments.add(part)
    return moments


def test_sums_are_those_of_fp64():
    x = correlated_inputs(700, 96, outliers=2)
    moments = filled(x, [100, 101, 400], second=True)
    exact = x.double()
    assert moments.count == 700
    torch.testing.assert_close(moments.second_DD.double(), exact.t() @ exact, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(moments.absmax_D, x.abs().amax(0), rtol=0, atol=0)
    torch.testing.assert_close(moments.abs_mean_D.double(), exact.abs().mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.mean_square_D.double(), exact.square().mean(0), rtol=1e-5, atol=0)


def test_second_moments_wider_than_a_panel_are_whole_and_can_be_added_to_again():
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(0))
    moments = Moments(1100, second=True, sample_rows=0)
    for part in (x[:10], x[10:]):
        moments.add(part)
        second_DD = moments.second_DD.clone()
        assert torch.equal(second_DD[:1024, 1024:], second_DD[1024:, :1024].t())
        assert torch.equal(second_DD[:256, 256:], second_DD[256:, :256].t())
    torch.testing.assert_close(second_DD, x.t() @ x, rtol=1e-4, atol=1e-4)


def test_sample_does_not_depend_on_batches_and_misses_no_stretch():
    x = torch.arange(4096.0)[:, None].repeat(1, 4) + 1
    one = filled(x, [], sample_rows=256).sample_TD
    many = filled(x.half().float(), [1, 7, 1000, 1001, 3000], sample_rows=256).sample_TD
    many_exact = filled(x, [1, 7, 1000, 1001, 3000], sample_rows=256).sample_TD
    assert torch.equal(one, many_exact)
    assert many.shape == (256, 4)
    rows = one[:, 0].long() - 1
    assert len(rows.unique()) == 256
    assert torch.histc(rows.float(), 8, 0, 4096).min() >= 16  # 32 expected in each eighth
    assert torch.bincount(rows % 16, minlength=16).min() >= 6  # 16 expected: no period is favoured


def test_few_rows_are_all_sampled():
    x = correlated_inputs(30, 8)
    sample = filled(x, [11], sample_rows=64).sample_TD
    assert torch.equal(sample.sort(0).values, x.sort(0).values)
    assert filled(x, [], sample_rows=0).sample_TD.shape == (0, 8)


def test_lots_are_spread():
    lots = _lots(0, 100_000, torch.device("cpu")).double() / 2**63
    assert lots.min() >= 0
    assert abs(float(lots.mean()) - 0.5) < 0.01
    assert abs(float((lots[1:] * lots[:-1]).mean()) - 0.25) < 0.01


def joined(parts, **kinds):
    """What every rank has after `merge`: what each hands to reduce is recorded first, then answered with all parts."""
    sent = []
    for x in parts:
        calls = []
        filled(x, [], **kinds).merge(lambda tensor, op, calls=calls: calls.append(tensor.clone()) or tensor)
        sent.append(calls)
    join = {"sum": sum, "max": lambda tensors: torch.stack(tensors).amax(0), "cat": torch.cat}
    ranks = [filled(x, [], **kinds) for x in parts]
    for rank in ranks:
        answers = iter(zip(*sent, strict=True))
        rank.merge(lambda tensor, op, answers=answers: join[op](list(next(answers))))
        rank.check()
    return ranks


def test_ranks_joined_are_one():
    x = correlated_inputs(500, 24, outliers=1)
    ranks = joined((x[:100], x[100:]), second=True, sample_rows=200)
    whole = filled(x, [], second=True, sample_rows=200)
    for rank in ranks:
        assert rank.count == 500
        torch.testing.assert_close(rank.second_DD, whole.second_DD, rtol=1e-4, atol=1e-3)
        assert torch.equal(rank.absmax_D, whole.absmax_D)
        torch.testing.assert_close(rank.abs_mean_D, whole.abs_mean_D)
        torch.testing.assert_close(rank.mean_square_D, whole.mean_square_D)
    assert torch.equal(ranks[0].sample_TD, ranks[1].sample_TD)
    assert ranks[0].sample_TD.shape == (200, 24)
    of_first = (ranks[0].sample_TD[:, None] == x[None, :100]).all(2).any(1).sum()
    assert 20 <= of_first <= 60  # 100 of 500 rows, so 40 of 200 expected


def test_ranks_with_few_rows_give_them_all_and_one_may_have_none():
    x = correlated_inputs(80, 8)
    for rank in joined((x[:30], x[30:], x[:0]), sample_rows=100):
        assert torch.equal(rank.sample_TD.sort(0).values, x.sort(0).values)
    assert joined((x[:30], x[30:]), sample_rows=0)[0].count == 80


def test_divide_is_as_if_the_inputs_had_been_divided():
    x = correlated_inputs(300, 16, outliers=1)
    scale = torch.linspace(0.1, 10, 16)
    moments, divided = filled(x, [], second=True), filled(x / scale, [], second=True)
    moments.divide(scale)
    for name in ("second_DD", "absmax_D", "abs_mean_D", "mean_square_D", "sample_TD"):
        torch.testing.assert_close(getattr(moments, name), getattr(divided, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad):
    x = torch.ones(5, 8)
    x[2, 3] = bad
    with pytest.raises(PunaError, match=r"layers\.0\.mlp\.down_proj holds"):
        filled(x, [])


@pytest.mark.parametrize("x", [torch.zeros(5, 8), torch.zeros(0, 8)])
def test_zeros_and_nothing_are_refused(x):
    moments = filled(x, [], second=True)
    with pytest.raises(
        PunaError, match=rf"all {len(x)} calibration inputs of layers\.0\.mlp\.down_proj are 0"
    ) as found:
        moments.check()
    assert "does not reach this layer" in found.value.hint


def test_leading_shapes_and_16_bits():
    x = correlated_inputs(24, 8).bfloat16()
    moments = Moments(8, second=True)
    moments.add(x.view(2, 12, 8))
    assert torch.equal(moments.second_DD, filled(x.float(), [], second=True).second_DD)
    assert moments.sample_TD.dtype is torch.float32


def test_bytes_are_what_is_held():
    moments = filled(correlated_inputs(600, 32), [], second=True)
    tensors = [v for v in vars(moments).values() if isinstance(v, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == moments.nbytes == Moments.bytes(32, second=True)
