"""quant/low_rank.py: the best product there is, by the weight or by the outputs; randomised as good as exact."""

from __future__ import annotations

import pytest
import torch

from planted_inputs import correlated_inputs, heavy_weight
from puna.base.console import PunaError
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import Scheme
from puna.quant import low_rank as module
from puna.quant.error import error_of
from puna.quant.low_rank import low_rank_error

INT4_G32 = Scheme(4, "int", True, "group", 32)


def left_over(weight, packed, factors):
    up, down = factors
    return (weight - packed.dequantize() - up.float() @ down.float()).double()


def test_plain_is_the_best_product_of_its_rank():
    weight = heavy_weight(96, 64)
    packed = round_to_nearest(weight, INT4_G32)
    singular = torch.linalg.svdvals((weight - packed.dequantize()).double())
    for rank in (1, 8, 63):
        factors = low_rank_error(weight, packed, rank, dtype=torch.float32)
        assert [tuple(f.shape) for f in factors] == [(96, rank), (rank, 64)]
        assert float(left_over(weight, packed, factors).norm()) == pytest.approx(
            float(singular[rank:].norm()), rel=1e-4
        )
    assert left_over(weight, packed, low_rank_error(weight, packed, 500, dtype=torch.float32)).abs().max() < 1e-6


def test_with_second_moments_it_is_the_best_product_for_the_outputs():
    weight, x = heavy_weight(96, 64), correlated_inputs(4000, 64, outliers=2)
    packed = round_to_nearest(weight, INT4_G32)
    factors = low_rank_error(weight, packed, 8, second_DD=x.t() @ x, dtype=torch.float32)
    error = (weight - packed.dequantize()).double() @ x.double().t()
    best = float(torch.linalg.svdvals(error)[8:].norm())
    assert float((left_over(weight, packed, factors) @ x.double().t()).norm()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_kind_repairs_more_than_the_one_before_on_other_inputs(dtype):
    weight, x = heavy_weight(256, 256), correlated_inputs(4000, 256, outliers=6)
    known, unknown = x[:2000], x[2000:]
    packed = round_to_nearest(weight, INT4_G32)
    kinds = ({}, {"mean_square_D": known.square().mean(0)}, {"second_DD": known.t() @ known})
    plain = error_of(weight, packed, sample_TD=unknown) ** 2
    repaired = []
    for kind in kinds:
        up, down = low_rank_error(weight, packed, 16, dtype=dtype, **kind)
        assert up.dtype is down.dtype is dtype
        layer = QuantizedWeight(packed, up_NR=up, down_RD=down)
        repaired.append(1 - error_of(weight, layer, sample_TD=unknown) ** 2 / plain)
    assert repaired[0] > 0.05
    assert repaired[1] > repaired[0] + 0.3  # the outliers' columns first
    assert repaired[2] > repaired[1]


def test_randomised_is_nearly_exact_and_always_the_same(monkeypatch):
    weight = heavy_weight(300, 260)
    packed = round_to_nearest(weight, INT4_G32.__class__(4, "int", True, "group", 52))
    exact = left_over(weight, packed, low_rank_error(weight, packed, 16, dtype=torch.float32)).square().sum()
    whole = (weight - packed.dequantize()).double().square().sum()
    monkeypatch.setattr(module, "_EXACT", 0)
    factors = low_rank_error(weight, packed, 16, dtype=torch.float32)
    found = left_over(weight, packed, factors).square().sum()
    assert (whole - found) / (whole - exact) > 0.99  # of what the exact product takes away
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = low_rank_error(weight, packed, 16, dtype=torch.float32)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(factors, again, strict=True))


def test_hard_cases():
    weight = heavy_weight(32, 64)
    packed = round_to_nearest(weight, INT4_G32)
    second = torch.zeros(64, 64)
    for kind in ({"second_DD": second}, {"mean_square_D": torch.zeros(64)}):
        assert all(f.isfinite().all() for f in low_rank_error(weight, packed, 4, **kind))
    x = correlated_inputs(5, 64)  # fewer inputs than columns
    up, down = low_rank_error(weight, packed, 8, second_DD=x.t() @ x)
    assert error_of(weight, QuantizedWeight(packed, up_NR=up, down_RD=down), sample_TD=x) < 0.02 * error_of(
        weight, packed, sample_TD=x
    )
    assert not any(f.any() for f in low_rank_error(weight, weight, 4))
    huge = torch.full((32, 64), 1e12)
    with pytest.raises(PunaError, match="which float16 cannot hold"):
        low_rank_error(huge, torch.zeros(32, 64), 2)
    assert low_rank_error(huge, torch.zeros(32, 64), 2, dtype=torch.bfloat16)[0].isfinite().all()
