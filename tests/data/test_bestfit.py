"""bestfit: every token once, no bin over T, as few bins as plain best-fit decreasing, little padding."""

import asyncio
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.data.bestfit import Bins, count_bins, plan_bins

LENGTHS = st.lists(st.integers(0, 70), max_size=60)


def starts_of(lengths) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def sizes_of(lengths, T, extra):
    """(full pieces, sizes in positions of the rest), cut document by document."""
    full, rest = 0, []
    for length, beside in zip(lengths, extra, strict=True):
        full += length // (T - beside)
        if length % (T - beside):
            rest.append(length % (T - beside) + beside)
    return full, rest


def plain_best_fit(sizes, T) -> list[int]:
    """The twin, O(n^2): the room left in each bin after best-fit decreasing on a list."""
    room = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b in range(len(room)) if room[b] >= size]
        if fitting:
            room[min(fitting, key=room.__getitem__)] -= size
        else:
            room.append(T - size)
    return room


def check(plan: Bins, starts: np.ndarray, T: int, extra: np.ndarray) -> None:
    """Whatever the plan: each token in one piece, each piece in one document, each bin with 1 to T positions."""
    assert [x.dtype for x in (plan.first, plan.offsets, plan.lengths)] == [np.int64] * 3
    assert plan.first[0] == 0
    assert plan.first[-1] == len(plan.offsets) == len(plan.lengths)
    assert (np.diff(plan.first) > 0).all()
    assert (plan.lengths > 0).all()
    order = np.argsort(plan.offsets)
    ends = np.concatenate(([starts[0]], (plan.offsets + plan.lengths)[order]))
    np.testing.assert_array_equal(ends[:-1], plan.offsets[order])
    assert ends[-1] == starts[-1]
    document = np.searchsorted(starts, plan.offsets, side="right") - 1
    assert (plan.offsets + plan.lengths <= starts[document + 1]).all()
    if len(plan.offsets):
        assert np.add.reduceat(plan.lengths + extra[document], plan.first[:-1]).max() <= T


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(4, 40), st.integers(0, 2**60), st.integers(0, 10**12))
def test_every_token_once_and_as_few_bins_as_the_twin(lengths, T, marked, base):
    starts = starts_of(lengths) + base
    extra = np.array([3 * (marked >> d & 1) for d in range(len(lengths))], dtype=np.int64)
    for given_extra, each in ((None, 0 * extra), (extra, extra)):
        plan = plan_bins(starts, T, given_extra)
        check(plan, starts, T, each)
        full, rest = sizes_of(lengths, T, each.tolist())
        twin = plain_best_fit(rest, T)
        assert len(plan.first) - 1 == count_bins(starts, T, given_extra) == full + len(twin)
        document = np.searchsorted(starts, plan.offsets, side="right") - 1
        used = plan.lengths + each[document]
        room = [T - int(used[a:b].sum()) for a, b in zip(plan.first[full:-1], plan.first[full + 1 :], strict=True)]
        assert sorted(room) == sorted(twin)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 40))
def test_full_bins_first_and_each_length_in_document_order(lengths, T):
    plan = plan_bins(starts_of(lengths), T)
    full = sum(length // T for length in lengths)
    np.testing.assert_array_equal(plan.first[: full + 1], np.arange(full + 1))
    assert (plan.lengths[:full] == T).all()
    assert (np.diff(plan.offsets[:full]) > 0).all()
    for size in range(1, T):
        assert (np.diff(plan.offsets[full:][plan.lengths[full:] == size]) > 0).all()


def test_by_hand():
    """T = 8: 19 = 8 + 8 + 3; then 5 opens a bin, the first 3 fills it, the second opens another, where 2 goes."""
    plan = plan_bins(starts_of([19, 5, 3, 2]), 8)
    assert plan.first.tolist() == [0, 1, 2, 4, 6]
    assert plan.offsets.tolist() == [0, 8, 19, 16, 24, 27]
    assert plan.lengths.tolist() == [8, 8, 5, 3, 3, 2]


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [([], []), ([0, 0], []), ([5], [[5]]), ([8], [[8]]), ([9], [[8], [1]]), ([1] * 8, [[1] * 8]), ([1] * 9, None)],
)
def test_edges(lengths, bins):
    starts = starts_of(lengths)
    plan = plan_bins(starts, 8)
    check(plan, starts, 8, np.zeros(len(lengths), dtype=np.int64))
    assert count_bins(starts, 8) == len(plan.first) - 1
    if bins is not None:
        assert [plan.lengths[a:b].tolist() for a, b in zip(plan.first[:-1], plan.first[1:], strict=True)] == bins
    else:
        assert len(plan.first) == 3


def test_extra_positions_shorten_the_pieces():
    plan = plan_bins(starts_of([8, 8]), 8, np.array([0, 3]))
    assert plan.lengths.tolist() == [8, 5, 3]
    with pytest.raises(AssertionError):
        plan_bins(starts_of([8]), 3, np.array([3]))


LOGNORMAL = {"web": (500, 1.0, 20_000), "heavy tail": (700, 1.5, 20_000), "code": (900, 2.0, 8_000)}


@pytest.mark.parametrize("T", [256, 512, 1024, 2048, 4096, 8192])
@pytest.mark.parametrize("kind", LOGNORMAL)
def test_padding_is_below_3_percent(kind, T):
    mean, sigma, number = LOGNORMAL[kind]
    drawn = np.random.Generator(np.random.Philox(T)).lognormal(np.log(mean) - sigma**2 / 2, sigma, number)
    lengths = np.maximum(drawn, 1).astype(np.int64)
    starts = starts_of(lengths)
    plan = plan_bins(starts, T)
    check(plan, starts, T, 0 * lengths)
    assert 1 - lengths.sum() / (count_bins(starts, T) * T) < 0.03
    extra = 3 * (lengths % 2)
    pieces = lengths // (T - extra) + (lengths % (T - extra) > 0)
    assert 1 - (lengths.sum() + (pieces * extra).sum()) / (count_bins(starts, T, extra) * T) < 0.03


@pytest.mark.parametrize("T", [256, 1024, 4096])
def test_padding_of_real_code_is_below_3_percent(T):
    """The files of Python's standard library, at 4 bytes a token."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")) + sorted(Path(asyncio.__file__).parent.glob("*.py"))
    lengths = np.array([file.stat().st_size // 4 for file in files])
    assert lengths.sum() > 500_000
    assert 1 - lengths.sum() / (count_bins(starts_of(lengths), T) * T) < 0.03


def test_where_little_padding_is_impossible():
    """Two pieces of T / 2 + 1 do not fit into T: every bin holds one."""
    assert count_bins(starts_of([129] * 100), 256) == 100


def test_equal_arguments_equal_plans():
    starts = starts_of(np.random.Generator(np.random.Philox(0)).integers(0, 3000, 5000))
    first, second = plan_bins(starts, 1024), plan_bins(starts.copy(), 1024)
    for name in ("first", "offsets", "lengths"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
