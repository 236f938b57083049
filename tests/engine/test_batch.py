"""A step as arrays, checked against a plain loop, while tables change under it as the scheduler changes them."""

from __future__ import annotations

import random

import numpy as np

from puna.engine.batch import Batcher
from puna.engine.request import SamplingParams
from puna.engine.sequence import Request, Sequence, Slice

SIZE = 4


def make(number: int, tokens: list[int], pages: list[int]) -> Sequence:
    request = Request(number, tokens, SamplingParams())
    sequence = Sequence(number, request, 0, list(tokens), len(tokens))
    sequence.pages = pages
    return sequence


def by_hand(slices: list[Slice]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"tokens": [], "positions": [], "slots": [], "rows": []}
    for part in slices:
        everything = part.sequence.token_ids + part.sequence.drafts
        for position in range(part.start, part.start + part.count):
            found["tokens"].append(everything[position])
            found["positions"].append(position)
            found["slots"].append(part.sequence.pages[position // SIZE] * SIZE + position % SIZE)
        if part.draws:
            end = len(found["tokens"])
            found["rows"] += range(end - 1 - part.drafts, end)
    return found


def check(batcher: Batcher, slices: list[Slice]) -> None:
    batch, expected = batcher.of(slices), by_hand(slices)
    assert batch.tokens_T.tolist() == expected["tokens"]
    assert batch.positions_T.tolist() == expected["positions"]
    assert batch.slots_T.tolist() == expected["slots"]
    assert batch.rows_R.tolist() == expected["rows"]
    for place, part in enumerate(slices):
        assert batch.starts_B1[place + 1] - batch.starts_B1[place] == part.count
        length = part.start + part.count
        assert batch.lengths_B[place] == length
        used = -(-length // SIZE)
        assert batch.tables_BM[place, :used].tolist() == part.sequence.pages[:used]
    assert {batch.starts_B1.dtype, batch.lengths_B.dtype, batch.tables_BM.dtype} == {np.dtype(np.int32)}


def test_prompts_in_pieces_single_tokens_and_drafts_side_by_side() -> None:
    a, b, c = make(0, [5, 6, 7, 8, 9, 10], [3, 1]), make(1, [1, 2], [2]), make(2, [4, 4, 4], [7, 8])
    c.drafts = [20, 21]
    slices = [Slice(a, 1, 4), Slice(b, 1, 1, draws=True), Slice(c, 2, 3, drafts=2, draws=True)]
    check(Batcher(4, 8, SIZE), slices)


def test_tables_follow_pages_that_are_exchanged_trimmed_and_taken_anew() -> None:
    draw, batcher = random.Random(0), Batcher(3, 32, SIZE)
    free, live = list(range(1, 200)), [make(i, [i] * draw.randrange(1, 9), []) for i in range(3)]
    for _ in range(300):
        slices = []
        for sequence in live:
            start = sequence.num_computed_tokens
            drafts = [draw.randrange(50) for _ in range(draw.randrange(3))]
            sequence.drafts = drafts
            count = len(sequence.token_ids) + len(drafts) - start
            while len(sequence.pages) * SIZE < start + count:
                sequence.pages.append(free.pop(draw.randrange(len(free))))
            slices.append(Slice(sequence, start, count, len(drafts), draws=True))
        check(batcher, slices)
        for part in slices:
            sequence = part.sequence
            kept = draw.randrange(part.drafts + 1)
            sequence.token_ids += [*sequence.drafts[:kept], draw.randrange(50)]
            sequence.drafts = []
            before, sequence.num_computed_tokens = sequence.num_computed_tokens, len(sequence.token_ids) - 1
            for page in range(before // SIZE, sequence.num_computed_tokens // SIZE):  # an equal page was there already
                if draw.random() < 0.3:
                    free.append(sequence.pages[page])
                    sequence.pages[page] = free.pop(0)
            while len(sequence.pages) * SIZE >= len(sequence.token_ids) + SIZE:
                free.append(sequence.pages.pop())
        for place, sequence in enumerate(live):
            if (
                len(sequence.token_ids) > 100 or draw.random() < 0.05
            ):  # finished or preempted: another one takes its row
                batcher.forget([sequence])
                free += sequence.pages
                live[place] = make(sequence.id + 3, [1] * draw.randrange(1, 9), [])


def test_who_is_forgotten_gives_its_row_back() -> None:
    batcher = Batcher(1, 8, SIZE)
    for number in range(5):
        sequence = make(number, [1, 2, 3], [number + 1])
        check(batcher, [Slice(sequence, 0, 3, draws=True)])
        batcher.forget([sequence, sequence])


def test_adapters_are_said_per_token() -> None:
    a, b = make(0, [1, 2, 3], [1]), make(1, [1], [2])
    slices = [Slice(a, 0, 3), Slice(b, 0, 1, draws=True)]
    assert Batcher(2, 8, SIZE).of(slices).adapters_T is None
    adapters = Batcher(2, 8, SIZE).of(slices, [2, 0]).adapters_T
    assert adapters is not None
    assert adapters.tolist() == [2, 2, 2, 0]
