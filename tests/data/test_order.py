from __future__ import annotations

import numpy as np

from puna.data.order import Order


def pairs(order: Order, first: int, count: int) -> list[tuple[int, int]]:
    _, shards, samples = order.locate(np.arange(first, first + count))
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    counts = [5, 0, 7, 30, 3, 11, 1]
    order = Order(counts, key=1, group=3)
    every = sorted((s, i) for s, n in enumerate(counts) for i in range(n))
    first, second = pairs(order, 0, 57), pairs(order, 57, 57)
    assert sorted(first) == sorted(second) == every
    assert first != second
    one = Order([50], key=1)
    assert sorted(pairs(one, 0, 50)) == sorted(pairs(one, 50, 50))
    assert pairs(one, 0, 50) != pairs(one, 50, 50)
    assert order.locate(np.array([0, 56, 57]))[0].tolist() == [0, 0, 1]


def test_asked_one_by_one_or_backwards_it_is_the_same() -> None:
    order = Order([9, 4, 12], key=7, group=2)
    whole = pairs(order, 0, 100)
    again = Order([9, 4, 12], key=7, group=2)
    assert [pairs(again, i, 1)[0] for i in range(99, -1, -1)] == whole[::-1]
    assert pairs(Order([9, 4, 12], key=8, group=2), 0, 100) != whole


def test_only_one_group_of_shards_is_needed_at_a_time() -> None:
    order = Order([10] * 12, key=3, group=4)
    shards = [shard for shard, _ in pairs(order, 0, 120)]
    groups = [set(shards[i : i + 40]) for i in (0, 40, 80)]
    assert [len(group) for group in groups] == [4, 4, 4]
    assert len(set.union(*groups)) == 12
    assert set(order.upcoming(0)[:4]) == groups[0]
    assert set(order.upcoming(39)[4:]) == groups[1]
    assert set(order.upcoming(85)[:4]) == groups[2]
    assert set(order.upcoming(85)[4:]) <= {shard for shard, _ in pairs(order, 120, 40)} | groups[2]
    assert len(set(shards[:20])) == 4  # and within a group they are mixed


def test_ten_thousand_shards_and_a_far_index() -> None:
    order = Order(np.full(10_000, 1000), key=0)
    epoch, shard, sample = order.locate(np.array([10**15 + 5]))
    assert epoch[0] == (10**15 + 5) // 10**7
    assert 0 <= shard[0] < 10_000
    assert 0 <= sample[0] < 1000


def test_the_order_never_changes() -> None:
    """Pinned: another order in a new version would break every run that resumes."""
    assert pairs(Order([4, 3, 5], key=42, group=2), 0, 6) == PINNED


PINNED = [(1, 0), (1, 2), (0, 3), (1, 1), (0, 0), (0, 1)]
