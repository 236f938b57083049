"""Which sample comes when: a pure function of (key, samples per shard, index), so that resuming needs one integer.

An epoch shows every sample once. Its shards are shuffled, taken in groups, and the samples of a group are shuffled
among themselves: so the samples of a batch come from many shards, but only one group of shards is needed at a time.

    epoch:   | shard 7  shard 2  shard 9 | shard 0  shard 4  shard 1 | ...
               samples of three shards     the next three are fetched
               in one shuffled order       meanwhile
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from puna.data.permute import keyed, permute

GROUP = 16  # shards whose samples are shuffled among themselves; part of the order, so never to be changed


@dataclass(frozen=True)
class Epoch:
    """One epoch's shuffled shards: their numbers, and where each one's samples end, in that order."""

    shards: np.ndarray
    ends: np.ndarray


class Order:
    """Endless order over the samples of one source. `counts`: samples of each shard in one epoch."""

    def __init__(self, counts: Sequence[int] | np.ndarray, key: int, group: int = GROUP):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.key, self.group = key, group
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, shard, sample within the shard) of each index. Shapes: all (n,) int64."""
        epochs, places = np.divmod(np.asarray(index, dtype=np.int64), self.total)
        shards, samples = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards[here], samples[here] = self._locate(epoch, places[here])
        return epochs, shards, samples

    def upcoming(self, index: int, groups: int = 2) -> list[int]:
        """Shards of the group that `index` lies in and of the ones after it, in the order they will be needed."""
        found: list[int] = []
        for _ in range(groups):
            epoch, place = divmod(index, self.total)
            table = self.epoch(epoch)
            first = self._group_of(table, np.array([place]))[0] * self.group
            found += table.shards[first : first + self.group].tolist()
            last = min(first + self.group, len(table.ends)) - 1
            index = epoch * self.total + int(table.ends[last])
        return list(dict.fromkeys(found))

    def _epoch(self, epoch: int) -> Epoch:
        shards = permute(np.arange(len(self.counts)), len(self.counts), keyed(self.key, epoch))
        shards = shards[self.counts[shards] > 0]
        return Epoch(shards, self.counts[shards].cumsum())

    def _group_of(self, table: Epoch, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(table.ends, places, side="right") // self.group

    def _locate(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self.epoch(epoch)
        groups = self._group_of(table, places)
        shuffled = np.empty_like(places)
        for group in np.unique(groups).tolist():
            here = groups == group
            first = group * self.group
            start = int(table.ends[first - 1]) if first else 0
            size = int(table.ends[min(first + self.group, len(table.ends)) - 1]) - start
            shuffled[here] = start + permute(places[here] - start, size, keyed(self.key, epoch, group))
        position = np.searchsorted(table.ends, shuffled, side="right")
        begin = table.ends[position] - self.counts[table.shards[position]]
        return table.shards[position], shuffled - begin
