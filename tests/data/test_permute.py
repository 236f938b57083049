"""permute: a bijection for every size, different by key, without a pattern, and the same for ever."""

import numpy as np
import pytest

from puna.data.permute import _mix_word, keyed, mix64, permute


def chi_square(values: np.ndarray, cells: int) -> float:
    """How many standard deviations the counts of `values` in [0, cells) are from even."""
    expected = len(values) / cells
    chi = ((np.bincount(values, minlength=cells) - expected) ** 2 / expected).sum()
    return (chi - (cells - 1)) / np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000, 4096, 65537])
def test_every_index_goes_to_one_place(n):
    for key in (0, 1, 2**64 - 1):
        np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_pointwise_equals_the_whole():
    whole = permute(np.arange(65537), 65537, 5)
    asked = np.array([65536, 0, 17, 40000, 17])
    np.testing.assert_array_equal(permute(asked, 65537, 5), whole[asked])
    assert permute(np.empty(0, dtype=np.int64), 9, 5).shape == (0,)


def test_any_size_up_to_the_largest():
    for n in (2**31 + 1, 2**61 + 1, 2**62):
        index = np.concatenate((np.arange(500), n - 1 - np.arange(500)))
        placed = permute(index, n, 3)
        assert placed.min() >= 0
        assert placed.max() < n
        assert len(set(placed.tolist())) == 1000
        assert abs(chi_square(placed // (n // 10 + 1), 10)) < 5


def test_the_order_is_the_same_for_ever():
    """These numbers are in the checkpoints of people: a change of theirs would change the order of a resumed run."""
    assert permute(np.arange(10), 10, 0).tolist() == [7, 1, 2, 3, 6, 8, 4, 0, 9, 5]
    assert permute(np.arange(3), 10**12, keyed(1, 2)).tolist() == [205528833734, 783649390707, 71494095106]


def test_differs_by_key():
    n = 1000
    orders = [permute(np.arange(n), n, key) for key in range(30)]
    same = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(same) < 10  # Poisson with mean 1
    assert 0.8 < np.mean(same) < 1.2


@pytest.mark.parametrize("n", [3, 8, 100])
def test_first_two_places_are_uniform_over_keys(n):
    pairs = np.array([permute(np.array([0, 1]), n, key) for key in range(4_000 if n < 50 else 12_000)])
    codes = pairs[:, 0] * n + pairs[:, 1]
    possible = np.array([a * n + b for a in range(n) for b in range(n) if a != b])
    assert abs(chi_square(np.searchsorted(possible, codes), n * (n - 1))) < 5


def test_all_orders_of_five_are_equally_likely():
    orders = np.array([permute(np.arange(5), 5, key) for key in range(6_000)]) @ 5 ** np.arange(5)
    assert len(np.unique(orders)) == 120
    assert abs(chi_square(np.unique(orders, return_inverse=True)[1], 120)) < 5


@pytest.mark.parametrize("n", [4096, 65537])
def test_no_pattern(n):
    index = np.arange(n)
    placed = permute(index, n, 11).astype(float)
    assert abs(np.abs(placed - index).mean() / n - 1 / 3) < 0.02  # two uniform places are n / 3 apart
    bound = 5 / np.sqrt(n)
    assert abs(np.corrcoef(placed, index)[0, 1]) < bound
    assert abs(np.corrcoef(placed[:-1], placed[1:])[0, 1]) < bound
    assert (
        abs(np.corrcoef(np.diff(placed)[:-1], np.diff(placed)[1:])[0, 1] + 0.5) < bound
    )  # -1/2 for independent values


def test_what_is_not_in_the_range_is_refused():
    for index in (-1, 10):
        with pytest.raises(AssertionError):
            permute(np.array([index]), 10, 0)


def test_mix64_is_the_splitmix64_of_the_paper():
    """The first outputs of the reference generator (Vigna's splitmix64.c) with seed 1234567."""
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = mix64(np.arange(1, 100, dtype=np.uint64))
    assert words.tolist() == [_mix_word(i) for i in range(1, 100)]


def test_keys_count_order_sign_size_and_number_of_parts():
    parts = [
        (),
        (0,),
        (0, 0),
        (0, 1),
        (1, 0),
        (-1,),
        (2**64 - 1,),
        (2**64,),
        (-(2**64),),
        (2**200 + 1,),
        (1,),
        (0, 0, 0),
    ]
    keys = [keyed(*p) for p in parts]
    assert len(set(keys)) == len(parts)
    assert all(0 <= key < 2**64 for key in keys)
    assert keyed(1, 2, 3) == 5722171163458373358
