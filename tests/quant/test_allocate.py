"""quant/allocate.py: the least damage there is, by trying all; large cases near the bound of the relaxed problem."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.quant import allocate as module
from puna.quant.allocate import allocate

FORMATS = {"int3_g128": 3.125, "int4_g128": 4.125, "int8": 8.01, "none": 16.0}


def case(layers, seed, formats=4):
    """Damage that falls with bits, more or less, on layers of different size and sensitivity."""
    rng = np.random.default_rng(seed)
    names = [f"layers.{i}" for i in range(layers)]
    weights = {name: int(rng.integers(1, 20)) * 1000 for name in names}
    kinds = dict(list(FORMATS.items())[:formats])
    bits = dict.fromkeys(names, kinds)
    damage = {
        name: {kind: float(rng.exponential() * 4.0**-width * rng.uniform(0.3, 3)) for kind, width in kinds.items()}
        for name in names
    }
    return damage, bits, weights


def sums(choice, damage, bits, weights):
    average = sum(weights[n] * bits[n][f] for n, f in choice.items()) / sum(weights.values())
    return sum(damage[n][f] for n, f in choice.items()), average


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), layers=st.integers(1, 5), target=st.floats(3.125, 17))
def test_no_choice_is_better(seed, layers, target):
    damage, bits, weights = case(layers, seed)
    found, average = sums(allocate(damage, bits, weights, target), damage, bits, weights)
    assert average <= target * (1 + 1e-6)
    best = min(
        total
        for kinds in product(FORMATS, repeat=layers)
        for total, width in [sums(dict(zip(damage, kinds, strict=True)), damage, bits, weights)]
        if width <= target
    )
    assert found == pytest.approx(best, rel=1e-9)


def relaxed(damage, bits, weights, target):
    """A lower bound of the damage (Lagrange): the largest over prices of min damage + price (bits - budget)."""
    total = sum(weights.values())
    bounds = []
    for price in np.logspace(-12, 0, 200):
        per_layer = [min(damage[n][f] + price * weights[n] * bits[n][f] for f in damage[n]) for n in damage]
        bounds.append(sum(per_layer) - price * target * total)
    return max(bounds)


@pytest.mark.parametrize("target", [3.3, 4.5, 6.0])
@pytest.mark.parametrize(
    ("states", "most"), [(200, 1.07), (1 << 14, 1.007)]
)  # the first is far too few, and still near
def test_many_layers_are_near_the_bound(target, states, most, monkeypatch):
    monkeypatch.setattr(module, "_STATES", states)
    damage, bits, weights = case(120, 3)
    found, average = sums(allocate(damage, bits, weights, target), damage, bits, weights)
    assert average <= target * (1 + 1e-6)
    assert relaxed(damage, bits, weights, target) <= found < most * relaxed(damage, bits, weights, target)


def test_edges():
    damage, bits, weights = case(4, 0)
    assert set(allocate(damage, bits, weights, 3.125).values()) == {"int3_g128"}
    everything = allocate(damage, bits, weights, 100)
    assert everything == {name: min(damage[name], key=damage[name].__getitem__) for name in damage}
    assert list(everything) == list(damage)
    only = {"a": {"int4": 1.0}}
    assert allocate(only, {"a": {"int4": 4.25, "int8": 8.0}}, {"a": 7}, 4.25) == {"a": "int4"}
    assert allocate({}, {}, {}, 4.0) == {}


def test_too_few_bits_are_refused_with_numbers():
    damage, bits, weights = case(4, 0)
    with pytest.raises(PunaError, match=r"an average of 3 bits per weight is below the 3\.125") as found:
        allocate(damage, bits, weights, 3)
    assert found.value.hint.startswith("ask for at least 3.13 bits")
