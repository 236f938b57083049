"""Best-fit packing: documents into bins of T positions, so that no token is dropped and little is padding.

Documents longer than T are cut into pieces of T; what is left of them, and the short ones, are packed best-fit
decreasing: longest first, each into the fullest bin that still takes it.

    T = 8, documents of 19, 5, 3 and 2 tokens:   aaaaaaaa  aaaaaaaa  bbbbbccc  aaadd...
    (19 = 8 + 8 + 3)

All pieces of one length meet the same question, so the histogram is packed and not the list: bins with the same
content are one group, and a step of the loop places one length into one whole group.

Source: Ding et al. 2024, "Fewer truncations improve language modeling", arXiv:2404.10830, section 3; the histogram:
Krell et al. 2021, arXiv:2107.02027, section 3.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# What a bin holds, last first: (what it held before, length of a piece, how many of that length in each bin).
_Items = tuple["_Items", int, int] | None
# Bins with the same content: (how many, their items).
_Group = tuple[int, _Items]


@dataclass(frozen=True)
class Bins:
    """Which tokens share a bin: the pieces of bin b are [first[b], first[b + 1]).

    Shapes: first (bins + 1,), offsets (pieces,) token offsets in the shard, lengths (pieces,) in tokens; all int64.
    """

    first: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


def count_bins(starts: np.ndarray, T: int, extra: np.ndarray | None = None) -> int:
    """How many bins `plan_bins` makes of the same arguments, without saying which tokens are in them."""
    _, whole, rest, extra = _cut(starts, T, extra)
    return int(whole.sum()) + sum(bins for bins, _ in _pack(*_histogram(rest, extra, T), T))


def plan_bins(starts: np.ndarray, T: int, extra: np.ndarray | None = None) -> Bins:
    """Every token of a shard in exactly one bin of at most T positions.

    Shapes: starts (documents + 1,) int64, document d is [starts[d], starts[d + 1]); extra (documents,) int64, the
    positions that each piece of a document needs beside its tokens (3 where fill-in-the-middle adds its markers): such
    pieces hold at most T - extra tokens and take up length + extra. Bins of one full piece come first, in document
    order; in the others, from bin to bin, the pieces of one size are used in document order.

    Text and code leave well below 1 % padding at any T that makes a hundred bins or more of a shard. But pieces that
    all take a little over T / 2 cannot share a bin, in this packing or any other: padding is then close to 50 %.
    """
    starts = np.asarray(starts, dtype=np.int64)
    room, whole, rest, extra = _cut(starts, T, extra)
    full_offsets, full_lengths = _full_pieces(starts[:-1], room, whole)
    size = np.where(rest > 0, rest + extra, 0)
    order = np.argsort(-size, kind="stable")[: int((rest > 0).sum())]
    bin_sizes, places = _layout(_pack(*_histogram(rest, extra, T), T))
    offsets, lengths = np.empty_like(order), np.empty_like(order)
    offsets[places] = (starts[:-1] + whole * room)[order]
    lengths[places] = rest[order]
    per_bin = np.concatenate((np.ones(len(full_offsets), dtype=np.int64), bin_sizes))
    return Bins(
        first=np.concatenate(([0], per_bin.cumsum())),
        offsets=np.concatenate((full_offsets, offsets)),
        lengths=np.concatenate((full_lengths, lengths)),
    )


def _cut(starts: np.ndarray, T: int, extra: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per document: tokens of a full piece, full pieces, tokens left over, positions beside the tokens."""
    lengths = np.diff(np.asarray(starts, dtype=np.int64))
    beside = np.zeros_like(lengths) if extra is None else np.asarray(extra, dtype=np.int64)
    assert beside.shape == lengths.shape, f"extra has {beside.shape} entries for {lengths.shape} documents"
    room = T - beside
    assert min(T, room.min(initial=T)) > 0, f"no token fits into {T} positions beside the extra ones"
    whole, rest = np.divmod(lengths, room)
    return room, whole, rest, beside


def _histogram(rest: np.ndarray, extra: np.ndarray, T: int) -> tuple[list[int], list[int]]:
    """(sizes, counts) of the leftover pieces, in positions, longest first."""
    counts = np.bincount((rest + extra)[rest > 0], minlength=1)
    sizes = np.flatnonzero(counts)[::-1]
    return sizes.tolist(), counts[sizes].tolist()


def _pack(sizes: list[int], counts: list[int], T: int) -> list[_Group]:
    """Best-fit decreasing on a histogram: groups of bins with the same content.

    After one piece a bin is the fullest that can take the next of the same size, until it can take no more. So the
    bins of a group are filled with pieces of that size one after the other: some wholly, one in part, the rest not.
    """
    levels: list[int] = []  # the different amounts of room left in bins, ascending
    at: dict[int, list[_Group]] = {}

    def put(room: int, bins: int, items: _Items) -> None:
        if bins:
            if room not in at:
                insort(levels, room)
                at[room] = []
            at[room].append((bins, items))

    for size, count in zip(sizes, counts, strict=True):
        while count:
            place = bisect_left(levels, size)
            if place == len(levels):
                room, bins, items = T, -(-count // (T // size)), None
            else:
                room = levels[place]
                bins, items = at[room].pop()
                if not at[room]:
                    del at[room], levels[place]
            each = room // size
            wholly, part = divmod(min(count, bins * each), each)
            count -= wholly * each + part
            put(room, bins - wholly - (part > 0), items)
            put(room - part * size, int(part > 0), (items, size, part))
            put(room - each * size, wholly, (items, size, each))
    return [group for room in levels for group in at[room]]


def _layout(groups: list[_Group]) -> tuple[np.ndarray, np.ndarray]:
    """(pieces in each bin, place of each piece), the pieces sorted by size, longest first, then in document order."""
    entries: list[tuple[int, int, int, int]] = []  # (group, bins in it, size, pieces of that size in each bin)
    for number, (bins, items) in enumerate(groups):
        first = len(entries)
        while items is not None:
            items, size, times = items
            entries.append((number, bins, size, times))
        entries[first:] = entries[first:][::-1]  # the chain led from the last items to the first
    group_E, bins_E, size_E, each_E = np.array(entries, dtype=np.int64).reshape(-1, 4).T
    group_bins = np.array([repeated for repeated, _ in groups], dtype=np.int64)
    group_pieces = np.bincount(group_E, weights=each_E, minlength=len(groups)).astype(np.int64)  # in each bin
    group_first = np.cumsum(group_bins * group_pieces) - group_bins * group_pieces
    before = np.cumsum(each_E) - each_E  # pieces of a bin that come before this entry
    before -= before[np.searchsorted(group_E, group_E)]

    order = np.argsort(-size_E, kind="stable")
    each_E, bins_E, group_E, before = each_E[order], bins_E[order], group_E[order], before[order]
    pieces_E = each_E * bins_E
    entry = np.repeat(np.arange(len(order)), pieces_E)
    bin_number, slot = np.divmod(np.arange(len(entry)) - (np.cumsum(pieces_E) - pieces_E)[entry], each_E[entry])
    places = group_first[group_E[entry]] + bin_number * group_pieces[group_E[entry]] + before[entry] + slot
    return np.repeat(group_pieces, group_bins), places


def _full_pieces(begins: np.ndarray, room: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths of the pieces that fill a bin, in document order."""
    document = np.repeat(np.arange(len(whole)), whole)
    number = np.arange(len(document)) - (np.cumsum(whole) - whole)[document]
    return begins[document] + number * room[document], room[document]
