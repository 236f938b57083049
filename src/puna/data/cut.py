"""How a shard is cut into samples of a fixed number of positions. Whatever the cut, a sample is a list of pieces.

A piece is a run of tokens inside one document; a sample holds one or more of them side by side:

- `Concat`: windows of T tokens over documents laid end to end. Nothing is padded; documents are cut where windows end.
- `BestFit`: documents stay whole where they fit into T, packed so that little is padding and no token is dropped.
- `Bucket`: sequences of 2^k tokens, each from one document (dataset decomposition).

Each has two questions to answer: how many samples a shard makes (from the manifest, where it can), and which pieces
are in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from puna.data.bestfit import Bins, count_bins, plan_bins
from puna.data.decompose import bucket_counts, sequences
from puna.data.fim import ADDED, FimTokens, chosen
from puna.data.permute import keyed
from puna.data.shards import Shard, ShardInfo


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens of one shard, sample after sample.

    Shapes, all (pieces,): `sample` which of the samples asked for (ascending), `offset` and `length` in tokens,
    `middle` whether fill-in-the-middle rearranges it (it then takes `fim.ADDED` positions more).
    """

    sample: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    middle: np.ndarray

    @staticmethod
    def plain(sample: np.ndarray, offset: np.ndarray, length: np.ndarray) -> Pieces:
        return Pieces(sample, offset, length, np.zeros(len(sample), dtype=bool))

    @cached_property
    def size(self) -> np.ndarray:
        """Positions that each piece takes."""
        return self.length + ADDED * self.middle


class Plan(Protocol):
    """The samples of one open shard."""

    def pieces(self, samples: np.ndarray) -> Pieces:
        """What is in these samples. Shapes: samples (n,) int64, each below the shard's count."""


class Cut(Protocol):
    """A way to cut shards. `width`: positions of a sample."""

    @property
    def width(self) -> int: ...

    def count(self, info: ShardInfo) -> int | None:
        """Samples of a shard, if its line in the manifest tells."""

    def count_starts(self, starts: np.ndarray, shard: int) -> int:
        """Samples of a shard with these document offsets, (documents + 1,)."""

    def plan(self, shard: Shard, number: int) -> Plan:
        """Open shard `number` for random access to its samples."""


@dataclass(frozen=True)
class Concat:
    """Windows of `width` tokens; at most width - 1 tokens at the end of a shard are in none."""

    width: int

    def count(self, info: ShardInfo) -> int:
        return info.tokens // self.width

    def count_starts(self, starts: np.ndarray, shard: int) -> int:
        return int(starts[-1]) // self.width

    def plan(self, shard: Shard, number: int) -> Plan:
        return _Windows(shard.starts, self.width)


@dataclass(frozen=True)
class _Windows:
    starts: np.ndarray
    width: int

    def pieces(self, samples: np.ndarray) -> Pieces:
        begin = samples * self.width
        first = np.searchsorted(self.starts, begin, side="right") - 1
        last = np.searchsorted(self.starts, begin + self.width, side="left")
        sample, document = _ranges(first, last)
        offset = np.maximum(self.starts[document], begin[sample])
        end = np.minimum(self.starts[document + 1], begin[sample] + self.width)
        return Pieces.plain(sample, offset, end - offset)


@dataclass(frozen=True)
class BestFit:
    """Best-fit packing into `width` positions (see data/bestfit), with fill-in-the-middle at a rate.

    Which documents are rearranged hangs on (`key`, shard, document) alone, so that every epoch packs alike.
    """

    width: int
    fim_rate: float = 0.0
    key: int = 0

    def count(self, info: ShardInfo) -> int | None:
        return None if self.fim_rate else info.bins.get(str(self.width))

    def count_starts(self, starts: np.ndarray, shard: int) -> int:
        return count_bins(starts, self.width, self._extra(starts, shard))

    def plan(self, shard: Shard, number: int) -> Plan:
        extra = self._extra(shard.starts, number)
        return _Packed(plan_bins(shard.starts, self.width, extra), shard.starts, extra)

    def _extra(self, starts: np.ndarray, shard: int) -> np.ndarray | None:
        if not self.fim_rate:
            return None
        return ADDED * chosen(np.arange(len(starts) - 1), self.fim_rate, keyed(self.key, shard))


@dataclass(frozen=True)
class _Packed:
    bins: Bins
    starts: np.ndarray
    extra: np.ndarray | None

    def pieces(self, samples: np.ndarray) -> Pieces:
        sample, piece = _ranges(self.bins.first[samples], self.bins.first[samples + 1])
        offset, length = self.bins.offsets[piece], self.bins.lengths[piece]
        if self.extra is None:
            return Pieces.plain(sample, offset, length)
        document = np.searchsorted(self.starts, offset, side="right") - 1
        return Pieces(sample, offset, length, self.extra[document] > 0)


@dataclass(frozen=True)
class Bucket:
    """The sequences of `width` = 2^k tokens among buckets from `shortest` to `longest` (see data/decompose)."""

    width: int
    shortest: int
    longest: int

    @property
    def k(self) -> int:
        return self.width.bit_length() - 1

    def count(self, info: ShardInfo) -> int:
        return bucket_counts(info.bits, self.longest, self.shortest)[self.k]

    def count_starts(self, starts: np.ndarray, shard: int) -> int:
        return len(sequences(starts, self.k, self.longest, self.shortest))

    def plan(self, shard: Shard, number: int) -> Plan:
        return _Sequences(sequences(shard.starts, self.k, self.longest, self.shortest), self.width)


@dataclass(frozen=True)
class _Sequences:
    offsets: np.ndarray
    width: int

    def pieces(self, samples: np.ndarray) -> Pieces:
        return Pieces.plain(np.arange(len(samples)), self.offsets[samples], np.full(len(samples), self.width))


@dataclass(frozen=True)
class FillInTheMiddle:
    """How chosen pieces are rearranged: the markers, and the share told in suffix-prefix-middle order."""

    tokens: FimTokens
    spm_rate: float


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, value) of all values of the ranges [first[row], last[row]), row after row."""
    counts = last - first
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts) + first[row]
