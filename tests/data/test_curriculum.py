"""curriculum: exact shares at the end, the order the name promises on the way, the same for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.data.curriculum import CYCLES, bucket_of_step, place_of_step, steps_by_bucket

# Shares of the DCLM subset in the README of the paper's code, in tenths of a percent: 8000 steps make 8 equal cycles.
TOKENS = {8: 108, 9: 182, 10: 225, 11: 191, 12: 157, 13: 137}


def whole_run(curriculum, steps=8000, tokens=TOKENS, seed=0) -> np.ndarray:
    return np.array([bucket_of_step(s, steps, tokens, curriculum, seed) for s in range(steps)])


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.integers(0, 17), st.integers(0, 10**15), min_size=1).filter(lambda t: sum(t.values())),
    st.integers(1, 400),
    st.sampled_from(sorted(CYCLES)),
    st.integers(-(2**70), 2**70),
)
def test_every_bucket_gets_its_share(tokens, total, curriculum, seed):
    wanted, run = steps_by_bucket(total, tokens), whole_run(curriculum, total, tokens, seed)
    assert sum(wanted.values()) == total
    for k, number in tokens.items():
        assert abs(wanted[k] * sum(tokens.values()) - total * number) < sum(tokens.values())  # within one step
        assert (run == k).sum() == wanted[k]


@pytest.mark.parametrize("curriculum", CYCLES)
def test_a_step_knows_its_place_without_the_steps_before(curriculum):
    run, seen = whole_run(curriculum, 500), dict.fromkeys(TOKENS, 0)
    for step, k in enumerate(run.tolist()):
        assert place_of_step(step, 500, TOKENS, curriculum, 0) == (k, seen[k])
        seen[k] += 1


def test_mixture_is_a_mixture_all_along():
    run = whole_run("mixture")
    share = np.array(list(TOKENS.values())) / sum(TOKENS.values())
    taken = np.cumsum(run[:, None] == np.array(list(TOKENS)), axis=0)
    assert np.abs(taken - share * np.arange(1, 8001)[:, None]).max() < 4
    assert len(set(zip(run[:-1].tolist(), run[1:].tolist(), strict=True))) == 36  # any bucket may follow any


def test_short_to_long_cycles_from_short_to_long():
    run = whole_run("short_to_long")
    for cycle in run.reshape(8, 1000):
        assert {k: (cycle == k).sum() for k in TOKENS} == TOKENS
        assert (np.diff((2.0**cycle).reshape(5, 200).mean(1)) > 0).all()
        assert (cycle[-60:] == 13).all()  # half of the longest come after the end of all others
        last = [np.flatnonzero(cycle == k)[-1] for k in TOKENS]
        assert last == sorted(last)  # used up from short to long


def test_odds_of_short_to_long_are_grow_p2():
    """At the start of a cycle, before any bucket is used up, bucket k is drawn by share times 32, 16, 8, 4, 2, 1."""
    steps = steps_by_bucket(80_000, TOKENS)
    odds = np.array([n * 2.0 ** (13 - k) for k, n in steps.items()])
    run = whole_run("short_to_long", 80_000).reshape(8, 10_000)[:, :1500]
    drawn = np.bincount(run.ravel(), minlength=14)[8:] / run.size
    np.testing.assert_allclose(drawn, odds / odds.sum(), atol=0.003)


def test_other_seeds_other_orders():
    for curriculum in CYCLES:
        runs = [whole_run(curriculum, 300, seed=seed) for seed in (0, 1, -1)]
        assert not any((a == b).all() for a, b in (runs[:2], runs[1:], runs[::2]))


def test_the_order_is_the_same_for_ever():
    """A resumed run must draw what it drew, on any machine and with any numpy."""
    drawn = {c: "".join(map(str, whole_run(c, 40, {3: 5, 4: 2, 6: 3}, 7))) for c in CYCLES}
    assert drawn["mixture"] == "3643346363363463343646333634633643636433"
    assert drawn["short_to_long"] == "3346333466334633364634363334663346433366"


def test_what_cannot_be_is_refused():
    with pytest.raises(PunaError, match="longest") as caught:
        bucket_of_step(0, 10, TOKENS, "longest", 0)
    assert "mixture" in caught.value.hint
    with pytest.raises(PunaError, match="no bucket"):
        bucket_of_step(0, 10, {8: 0}, "mixture", 0)
    with pytest.raises(AssertionError):
        bucket_of_step(10, 10, TOKENS, "mixture", 0)
