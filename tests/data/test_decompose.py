"""decompose: buckets of powers of two against a cut made document by document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.data.decompose import bucket_counts, kept_tokens, length_bits, sequences

LENGTHS = st.lists(st.integers(0, 300), max_size=40)
SIZES = st.integers(0, 8).flatmap(
    lambda high: st.tuples(st.just(1 << high), st.integers(0, high).map(lambda k: 1 << k))
)


def starts_of(lengths) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def cut_by_hand(lengths, T, shortest) -> dict[int, list[int]]:
    """{length: offsets}: the longest power of two that still fits, again and again."""
    found, begin = {T >> j: [] for j in range(T.bit_length()) if T >> j >= shortest}, 0
    for length in lengths:
        place, end = begin, begin + length
        for size in found:
            while place + size <= end:
                found[size].append(place)
                place += size
        assert end - place < shortest
        begin = end
    return found


@settings(max_examples=300, deadline=None)
@given(LENGTHS, SIZES)
def test_equals_the_cut_by_hand(lengths, sizes):
    T, shortest = sizes
    starts = starts_of(lengths)
    bits, by_hand = length_bits(starts), cut_by_hand(lengths, T, shortest)
    counts = bucket_counts(bits, T, shortest)
    assert {1 << k: n for k, n in counts.items()} == {size: len(found) for size, found in by_hand.items()}
    taken = np.zeros(sum(lengths), dtype=int)
    for k in counts:
        offsets = sequences(starts, k, T, shortest)
        assert offsets.dtype == np.int64
        assert offsets.tolist() == by_hand[1 << k]
        document = np.searchsorted(starts, offsets, side="right") - 1
        assert (offsets + (1 << k) <= starts[document + 1]).all()
        for offset in offsets:
            taken[offset : offset + (1 << k)] += 1
    assert taken.max(initial=0) <= 1
    tails = sum(length % shortest for length in lengths)
    assert taken.sum() == kept_tokens(bits, T, shortest) == sum(lengths) - tails


def test_by_hand():
    starts = starts_of([4, 23]) + 100
    assert length_bits(starts) == [1, 1, 2, 0, 1]
    assert bucket_counts(length_bits(starts), 8, 2) == {1: 1, 2: 2, 3: 2}
    assert sequences(starts, 3, 8, 2).tolist() == [104, 112]
    assert sequences(starts, 2, 8, 2).tolist() == [100, 120]
    assert sequences(starts, 1, 8, 2).tolist() == [124]
    assert kept_tokens(length_bits(starts), 8, 2) == 26


def test_bits_of_shards_add_up():
    lengths = np.random.Generator(np.random.Philox(1)).integers(0, 5000, 200)
    whole, parts = length_bits(starts_of(lengths)), [length_bits(starts_of(p)) for p in (lengths[:90], lengths[90:])]
    added = [sum(p[j] for p in parts if j < len(p)) for j in range(max(map(len, parts)))]
    assert added == whole
    assert sum(n << j for j, n in enumerate(whole)) == lengths.sum()


def test_empty_shard():
    assert length_bits(np.array([0])) == []
    assert bucket_counts([], 8, 2) == {1: 0, 2: 0, 3: 0}
    assert sequences(np.array([0]), 3, 8, 2).shape == (0,)


@pytest.mark.parametrize(
    ("T", "shortest", "message", "hint"),
    [
        (1000, 64, "1000 tokens, which is no power of two", "use 512 or 1024"),
        (1024, 48, "shortest sequence is 48", "use 32 or 64"),
        (64, 128, r"\(128\) is longer than the longest \(64\)", "use at most 64"),
        (1024, 0, "is 0 tokens", "use 1 or 2"),
    ],
)
def test_sizes_that_are_no_powers_of_two_are_refused(T, shortest, message, hint):
    with pytest.raises(PunaError, match=message) as caught:
        bucket_counts([1], T, shortest)
    assert caught.value.hint == hint


def test_a_bucket_that_does_not_exist_is_refused():
    with pytest.raises(PunaError, match=r"2\^4"):
        sequences(starts_of([20]), 4, 8, 2)
