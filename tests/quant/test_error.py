"""quant/error.py: both forms against the definition."""

from __future__ import annotations

import pytest
import torch

from planted_inputs import correlated_inputs, heavy_weight
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import INT8, Scheme
from puna.quant import error
from puna.quant.error import error_of


def test_both_forms_are_the_definition(monkeypatch):
    monkeypatch.setattr(error, "_ROWS", 10)
    x, weight = correlated_inputs(50, 32, outliers=1), heavy_weight(24, 32)
    packed = round_to_nearest(weight, Scheme(4, "int", True, "group", 16))
    wrong, right = x.double() @ (packed.dequantize() - weight).double().t(), x.double() @ weight.double().t()
    expected = float((wrong.square().sum() / right.square().sum()).sqrt())
    assert error_of(weight, packed, sample_TD=x) == pytest.approx(expected, rel=1e-4)
    assert error_of(weight, packed.dequantize(), second_DD=x.t() @ x) == pytest.approx(expected, rel=1e-3)


def test_edges():
    weight = heavy_weight(8, 16)
    assert error_of(weight, weight) == 0
    assert error_of(weight, torch.zeros_like(weight)) == pytest.approx(1)
    assert error_of(torch.zeros(8, 16), torch.zeros(8, 16)) == 0
    assert error_of(torch.zeros(8, 16), weight) == 1
    assert 0 < error_of(weight, round_to_nearest(weight, INT8)) < 0.02
