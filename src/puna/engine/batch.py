"""A step as arrays: what every rank computes with. NumPy only, so that it can be made without the model.

Shapes: T tokens of the step, B sequences, M pages of the longest, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from puna.engine.sequence import Sequence, Slice


@dataclass(frozen=True)
class Batch:
    """Flat tokens of several sequences, each at its own positions, and where their keys and values lie.

    rows_R: token rows whose logits are drawn from. adapters_T: adapter slot of each token, None where none has one.
    """

    tokens_T: np.ndarray  # int64
    positions_T: np.ndarray  # int64
    slots_T: np.ndarray  # int64: page * page_size + place in the page
    starts_B1: np.ndarray  # int32: first row of each sequence, and the end
    lengths_B: np.ndarray  # int32: positions each sequence has after the step
    tables_BM: np.ndarray  # int32: its pages, padded with the scratch page 0
    rows_R: np.ndarray  # int64
    adapters_T: np.ndarray | None = None


@dataclass(slots=True)
class _Known:
    """A running sequence's row of the table, its leading pages there that will not change, the one after them."""

    place: int
    settled: int = 0
    tail: int = -1


class Batcher:
    """Makes batches; remembers the page table of each running sequence, so that a step copies only what is new."""

    def __init__(self, max_num_seqs: int, max_pages: int, page_size: int):
        self._page_size = page_size
        self._tables = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self._known: dict[Sequence, _Known] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """These are no longer running (finished, aborted, preempted)."""
        for sequence in sequences:
            known = self._known.pop(sequence, None)
            if known is not None:
                self._free.append(known.place)

    def of(self, slices: Many[Slice], adapter_slots: Many[int] | None = None) -> Batch:
        """The arrays of a step. adapter_slots: one per slice; None where no sequence has an adapter."""
        sequences = [part.sequence for part in slices]
        counts_B = np.array([part.count for part in slices])
        begins_B = np.array([part.start for part in slices])
        starts_B1 = np.zeros(len(slices) + 1, dtype=np.int64)
        counts_B.cumsum(out=starts_B1[1:])
        owner_T = np.repeat(np.arange(len(slices)), counts_B)
        positions_T = np.arange(starts_B1[-1]) - starts_B1[owner_T] + begins_B[owner_T]
        lengths_B = begins_B + counts_B
        places_B = np.array([self._place(part) for part in slices])
        pages_T = self._tables[places_B[owner_T], positions_T // self._page_size]
        widest = -(-int(lengths_B.max()) // self._page_size)
        adapters = None if adapter_slots is None else np.asarray(adapter_slots, dtype=np.int64)[owner_T]
        return Batch(
            tokens_T=_tokens(slices, sequences, starts_B1),
            positions_T=positions_T,
            slots_T=pages_T.astype(np.int64) * self._page_size + positions_T % self._page_size,
            starts_B1=starts_B1.astype(np.int32),
            lengths_B=lengths_B.astype(np.int32),
            tables_BM=self._tables[places_B, :widest],
            rows_R=_wanted_rows(slices, starts_B1),
            adapters_T=adapters,
        )

    def _place(self, part: Slice) -> int:
        """The sequence's row in the table, brought up to date."""
        sequence, pages = part.sequence, part.sequence.pages
        known = self._known.get(sequence)
        if known is None:
            known = self._known[sequence] = _Known(self._free.pop())
        first = known.settled
        if len(pages) - first != 1 or pages[first] != known.tail:  # else it goes on in the page it had
            self._tables[known.place, first : len(pages)] = pages[first:]
        # What this step fills may be exchanged for an equal page, and pages of refused drafts are given back.
        known.settled = settled = part.start // self._page_size
        known.tail = pages[-1] if len(pages) == settled + 1 else -1
        return known.place


def _tokens(slices: Many[Slice], sequences: Many[Sequence], starts_B1: np.ndarray) -> np.ndarray:
    if int(starts_B1[-1]) == len(slices):  # everyone decodes: no slicing
        return np.array([s.token_ids[part.start] for part, s in zip(slices, sequences, strict=True)])
    found: list[int] = []
    for part, sequence in zip(slices, sequences, strict=True):
        end = part.start + part.count - part.drafts
        found += sequence.token_ids[part.start : end]
        found += sequence.drafts[: part.drafts]
    return np.asarray(found, dtype=np.int64)


def _wanted_rows(slices: Many[Slice], starts_B1: np.ndarray) -> np.ndarray:
    """The last token of each drawing slice, and its drafts."""
    rows: list[int] = []
    for part, end in zip(slices, starts_B1[1:].tolist(), strict=True):
        if part.draws:
            rows += range(end - 1 - part.drafts, end)
    return np.asarray(rows, dtype=np.int64)
