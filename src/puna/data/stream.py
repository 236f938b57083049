"""The training stream: global row i is the same tokens whoever asks, on however many ranks, after any resume.

    row i -> how wide are its samples (curriculum) -> which source (mixture) -> which shard, which sample (order)
          -> which pieces of which documents (cut) -> Batch (pack)

Every arrow is a pure function of (seed, manifests, i), so there is no state to save but the number of rows served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from puna.base.console import PunaError
from puna.data.curriculum import place_of_step
from puna.data.cut import Concat, Cut, Plan
from puna.data.mixture import Mixture
from puna.data.order import GROUP, Order
from puna.data.pack import Batch, Part, Rules, pack
from puna.data.permute import keyed
from puna.data.reader import KEEP_OPEN, ShardReader
from puna.data.shards import Shard


class Lane:
    """One source cut one way: its samples in endless shuffled order. `counts`: samples of each shard."""

    def __init__(self, reader: ShardReader, cut: Cut, counts: Sequence[int], key: int, group: int = GROUP):
        self.reader, self.cut, self.key = reader, cut, key
        self.order = Order(counts, key, group)  # the same order of shards at every width
        self.open = lru_cache(maxsize=KEEP_OPEN)(self._open)

    def _open(self, number: int) -> tuple[Shard, Plan]:
        shard = self.reader.shard(number)
        return shard, self.cut.plan(shard, number)

    def parts(self, index: np.ndarray, place: np.ndarray) -> Iterator[Part]:
        """The pieces of this lane's samples `index`, each to begin at `place` in the batch. Shapes: both (n,)."""
        epochs, shards, samples = self.order.locate(index)
        for epoch, number in sorted(set(zip(epochs.tolist(), shards.tolist(), strict=True))):
            here = (epochs == epoch) & (shards == number)
            shard, plan = self.open(number)
            pieces = plan.pieces(samples[here])
            ends = pieces.size.cumsum()
            first = np.searchsorted(pieces.sample, np.arange(here.sum()))
            within = ends - pieces.size - (ends - pieces.size)[first][pieces.sample]
            yield Part(shard, pieces, place[here][pieces.sample] + within, keyed(self.key, epoch, number))


@dataclass(frozen=True)
class Curriculum:
    """Which lane each step takes, for decomposed data: see data/curriculum."""

    name: str
    steps: int
    rows_per_step: int
    tokens: Mapping[int, int]
    seed: int

    def place(self, step: int) -> tuple[int, int]:
        """(log2 of the sample's width, earlier steps of that width)."""
        return place_of_step(step % self.steps, self.steps, self.tokens, self.name, self.seed)


class Stream:
    """Rows of `width` positions from several sources.

    `lanes[w][s]`: source s cut into samples of w positions, None where it has none; `mixtures[w]` says who is served.
    `width` of a row; without a curriculum it is the only one.
    """

    def __init__(
        self,
        lanes: Mapping[int, Sequence[Lane | None]],
        mixtures: Mapping[int, Mixture],
        rules: Rules,
        curriculum: Curriculum | None = None,
        width: int = 0,
    ):
        self.lanes, self.mixtures, self.rules, self.curriculum = lanes, mixtures, rules, curriculum
        self.width = width or max(lanes)

    def batch(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1 of the endless global sequence."""
        return self.batches([(first, count)])[0]

    def batches(self, ranges: Sequence[tuple[int, int]]) -> list[Batch]:
        """A batch for each (first row, rows). Many small ones at once cost little more than one of them alone."""
        parts: list[Part] = []
        for width, (samples, place) in self._samples(ranges).items():
            sources, within = self.mixtures[width].split(samples)
            for source in np.unique(sources).tolist():
                lane = self.lanes[width][source]
                assert lane is not None
                here = sources == source
                parts += lane.parts(within[here], place[here])
        return pack(parts, [count for _, count in ranges], self.width, self.rules)

    def _samples(self, ranges: Sequence[tuple[int, int]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """For each sample width, over ranges of rows end to end: the numbers of its samples, and their places."""
        rows = np.concatenate([np.arange(first, first + count) for first, count in ranges])
        if self.curriculum is None:
            return {self.width: (rows, np.arange(len(rows)) * self.width)}
        steps, row = np.divmod(rows, self.curriculum.rows_per_step)
        asked, back = np.unique(steps, return_inverse=True)
        k, earlier = np.array([self.curriculum.place(step) for step in asked.tolist()]).T[:, back]
        found = {}
        for bucket in np.unique(k).tolist():
            here = np.flatnonzero(k == bucket)
            per_row = self.width >> bucket
            begin = (earlier[here] * self.curriculum.rows_per_step + row[here]) * per_row
            within = np.arange(per_row)
            samples = (begin[:, None] + within).reshape(-1)
            found[1 << bucket] = samples, (here[:, None] * self.width + (within << bucket)).reshape(-1)
        return found

    def upcoming(self, first: int) -> Iterator[tuple[Lane, int]]:
        """(lane, shard) of what the rows from `first` on will need, nearest first: what to fetch ahead."""
        for width, (samples, _) in self._samples([(first, 1)]).items():
            before = self.mixtures[width].counts(int(samples[0]))
            for lane, index in zip(self.lanes[width], before.tolist(), strict=True):
                if lane is not None:
                    yield from ((lane, number) for number in lane.order.upcoming(index))

    def epochs(self, rows: int) -> list[float]:
        """How often each source was gone through after the first `rows` rows, by samples."""
        served = np.zeros(len(next(iter(self.lanes.values()))))
        held = np.zeros_like(served)
        for width, lanes in self.lanes.items():
            samples = self._served(width, rows)
            counts = self.mixtures[width].counts(samples)
            served += counts * width
            held += [lane.order.total * width if lane else 0 for lane in lanes]
        return (served / np.maximum(held, 1)).tolist()

    def _served(self, width: int, rows: int) -> int:
        """Samples of a width in the first `rows` rows."""
        if self.curriculum is None:
            return rows
        steps, rest = divmod(rows, self.curriculum.rows_per_step)
        whole, last = divmod(steps, self.curriculum.steps)
        tally = self._tally(width, self.curriculum.steps) * whole + self._tally(width, last)
        here = bool(rest) and self.curriculum.place(steps)[0] == width.bit_length() - 1
        return (tally * self.curriculum.rows_per_step + rest * here) * (self.width // width)

    def _tally(self, width: int, steps: int) -> int:
        """Steps of a width among the first `steps` of the curriculum: what the last one of them has counted."""
        assert self.curriculum is not None
        for step in range(steps - 1, -1, -1):
            k, earlier = self.curriculum.place(step)
            if 1 << k == width:
                return earlier + 1
        return 0


def share(first: int, count: int, rank: int, world: int) -> tuple[int, int]:
    """(first row, rows) of one rank's part of a global batch. The parts of all ranks are the batch, in order."""
    if count % world:
        raise PunaError(
            f"a batch of {count} rows cannot be shared by {world} ranks", f"use a batch size that {world} divides"
        )
    return first + rank * (count // world), count // world


class Held:
    """A source held out for validation: the same windows, spread evenly over it, every time.

    Evenly, because neighbours are alike: the first windows of a sorted folder may all be tables of numbers.
    """

    def __init__(self, reader: ShardReader, width: int, rules: Rules):
        cut = Concat(width)
        self.reader, self.rules = reader, rules
        self.lane = Lane(reader, cut, [cut.count(info) for info in reader.manifest.shards], key=0)
        if self.lane.order.total < 1:
            raise too_short(reader, width)

    def batches(self, count: int, limit: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """At most `limit` windows, `count` at a time, dealt out to `world` ranks.

        All ranks get as many batches, for a forward pass may need all of them: a surplus one scores nothing.
        """
        ends = self.lane.order.counts.cumsum()
        total = self.lane.order.total
        chosen = min(total, limit)
        samples = np.arange(chosen) * total // chosen
        shards = np.searchsorted(ends, samples, side="right")
        firsts = range(0, chosen, count)
        for number in range(rank, -(-len(firsts) // world) * world, world):
            first = firsts[min(number, len(firsts) - 1)]
            some = slice(first, first + count)
            batch = self._pack(shards[some], samples[some] - (ends - self.lane.order.counts)[shards[some]])
            yield batch if number < len(firsts) else batch.unscored()

    def _pack(self, shards: np.ndarray, samples: np.ndarray) -> Batch:
        width = self.lane.cut.width
        parts, place = [], np.arange(len(shards)) * width
        for number in np.unique(shards).tolist():
            here = shards == number
            shard, plan = self.lane.open(number)
            pieces = plan.pieces(samples[here])
            within = pieces.offset - (samples[here] * width)[pieces.sample]
            parts.append(Part(shard, pieces, place[here][pieces.sample] + within))
        return pack(parts, [len(shards)], width, self.rules)[0]

    def bytes_per_token(self) -> float:
        """Bytes of text per scored token of the whole source: turns nats per token into bits per byte."""
        manifest = self.reader.manifest
        return manifest.text_bytes / max(1, manifest.tokens - manifest.documents)


def too_short(reader: ShardReader, width: int) -> PunaError:
    return PunaError(
        f"{reader.name} has {reader.manifest.tokens} tokens in {len(reader.manifest.shards)} shards, "
        f"one sequence needs {width} of one shard",
        "give more text or a smaller data.seq_len",
    )
