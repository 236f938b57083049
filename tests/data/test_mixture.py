from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.data.mixture import LONGEST_PERIOD, Mixture, check_weights, make_pattern, parse_schedule


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(0, 5000), st.integers(1, 700))
def test_every_window_holds_the_weights(weights, start, length) -> None:
    """From any beginning, any length: no source is two samples away from its share (three sources and more: ln k)."""
    mixture = Mixture([(0, weights)])
    sources, _ = mixture.split(np.arange(start, start + length))
    got = np.bincount(sources, minlength=len(weights))
    wanted = length * np.array(weights) / sum(weights)
    bound = 2 if len(weights) < 3 else 2 + np.log(len(weights))
    assert (np.abs(got - wanted) < bound).all()
    prefix = np.bincount(mixture.split(np.arange(start))[0], minlength=len(weights)) if start else 0
    assert (prefix - start * np.array(weights) / sum(weights) < 1).all()  # never a whole sample too many
    assert (got[np.array(weights) == 0] == 0).all()


def test_after_a_period_the_shares_are_exact() -> None:
    pattern = make_pattern([0.7, 0.2, 0.1])
    assert pattern.shares.tolist() == [7, 2, 1]
    assert np.bincount(pattern.sources).tolist() == [7, 2, 1]
    sources, _ = Mixture([(0, [0.7, 0.2, 0.1])]).split(np.arange(10**9, 10**9 + 10))
    assert np.bincount(sources).tolist() == [7, 2, 1]


def test_largest_deficit_is_served_first() -> None:
    """Against the plain definition: promised so far, less served."""
    weights = np.array([5, 3, 1])
    served = np.zeros(3)
    for number, source in enumerate(make_pattern(weights.tolist()).sources.tolist(), start=1):
        deficit = weights / 9 * number - served
        assert deficit[source] == pytest.approx(deficit.max())
        served[source] += 1


def test_a_source_counts_on_through_a_schedule() -> None:
    mixture = Mixture([(0, [0.5, 0.5]), (101, [0.9, 0.1]), (350, [0, 1])])
    sources, within = mixture.split(np.arange(1000))
    for source in (0, 1):
        mine = within[sources == source]
        assert mine.tolist() == list(range(len(mine)))
    assert mixture.counts(1000).tolist() == np.bincount(sources).tolist()
    assert mixture.counts(222).tolist() == np.bincount(sources[:222]).tolist()
    assert (sources[350:] == 1).all()
    assert abs((sources[101:350] == 0).sum() - 0.9 * 249) < 1


def test_token_counts_as_weights_are_rounded_finely() -> None:
    pattern = make_pattern([123_456_789.0, 98_765.0, 7.0])
    assert len(pattern.sources) == LONGEST_PERIOD
    assert pattern.shares[2] == 1  # the smallest still has its turn
    assert abs(pattern.shares[1] / LONGEST_PERIOD - 98_765 / 123_555_561) < 1 / LONGEST_PERIOD


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "1 weights for 2 sources"),
        ((1.0, -1.0), "is 1, -1"),
        ((0.0, 0.0), "is 0, 0"),
        ((1.0, float("nan")), "nan"),
    ],
)
def test_weights_that_name_no_mixture(weights, message) -> None:
    with pytest.raises(PunaError, match=message):
        check_weights(weights, 2, "data.weights")


def test_schedules() -> None:
    assert parse_schedule(["100: 0.5 0.5", "2000:1 0"], 2) == [(100, (0.5, 0.5)), (2000, (1.0, 0.0))]
    for bad in (["100"], ["x: 1 1"], ["100: 1 x"], ["100: 1"], ["100: 1 1", "100: 1 2"], ["0: 1 1"]):
        with pytest.raises(PunaError):
            parse_schedule(bad, 2)
