"""Speculative decoding: who proposes tokens, how many, and what of it is kept. Plain Python, no tensors.

A proposal is verified by the target itself: the rows of all proposed tokens are computed in one step, and the token of
each row is drawn with the random number that belongs to its place in the answer. A proposed token stays while it equals
what was drawn there. So a proposal can be anything: the tokens are the ones that come without speculation, at any
temperature, and only the number of steps differs. (Leviathan et al. 2022, arXiv:2211.17192, accept with a second random
number instead: the same distribution, other tokens.)
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from puna.engine.sequence import Sequence, Slice, Status
from puna.engine.speculate.pace import Pace


class Proposal(NamedTuple):
    """Tokens that may come next. `grade`: how much stands behind them; what a grade is worth is learnt (`Pace`)."""

    tokens: list[int]
    grade: int = 0


class Proposer(Protocol):
    """Guesses how an answer goes on.

    `propose` gets (sequence, the most tokens wanted) of all sequences of a step, and returns a proposal for each, empty
    where it has no idea. `forget`: a sequence has ended. Nothing else is told: what is new in `token_ids` since the
    last time is seen there, so preemption and rejected proposals need no care.
    With one grade the tokens wanted are as many as pay; with more, that is seen when the grade is known.
    """

    name: str
    num_grades: int

    def propose(self, wanted: Many[tuple[Sequence, int]]) -> list[Proposal]: ...

    def forget(self, sequence: Sequence) -> None: ...


@dataclass(slots=True)
class _Places:
    """Which tokens stood behind what, in one sequence. A place is the position of the token behind; 0 is none.

    Chains of equal pairs (as in LZ77) instead of a table of all n-grams: about 0.15 KB a token, and n is free.
    """

    single: dict[int, int] = field(default_factory=dict)  # token -> its latest place
    pair: dict[int, int] = field(default_factory=dict)  # first << 32 | second -> their latest place
    earlier: array[int] = field(default_factory=lambda: array("i", (0, 0)))  # place -> the one before of the same pair

    def learn(self, ids: list[int]) -> None:
        """Take in what is new."""
        if len(self.earlier) == 2 and len(ids) > 1:
            self.single[ids[0]] = 1
        for place in range(len(self.earlier), len(ids)):
            last = ids[place - 1]
            key = ids[place - 2] << 32 | last
            self.earlier.append(self.pair.get(key, 0))
            self.pair[key] = self.single[last] = place

    def find(self, ids: list[int], longest: int, tries: int) -> tuple[int, int]:
        """The latest place behind the longest (at most `longest`) ending of `ids` that stood before; its length."""
        place = self.pair.get(ids[-2] << 32 | ids[-1], 0) if len(ids) > 1 and longest > 1 else 0
        if not place:
            place = self.single.get(ids[-1], 0)
            return place, int(place > 0)
        best, best_length = place, 2
        for _ in range(tries):
            length = same_before(ids, place, longest)
            if length > best_length:
                best, best_length = place, length
            place = self.earlier[place]
            if not place or best_length == longest:
                break
        return best, best_length


class NGram:
    """The last tokens stood here before: go on as they did (prompt lookup decoding, Saxena 2023).

    The longest n-gram of `shortest` to `longest` tokens that has an earlier occurrence decides, the latest one of it
    (looked for in the latest `tries` places of its last two tokens). A new token costs three entries in tables.
    """

    name = "n-gram"

    def __init__(self, longest: int = 8, shortest: int = 1, tries: int = 32):
        assert 1 <= shortest <= longest
        self.longest, self.shortest, self.tries = longest, shortest, tries
        self.num_grades = longest + 1
        self._places: dict[int, _Places] = {}

    def propose(self, wanted: Many[tuple[Sequence, int]]) -> list[Proposal]:
        """At most `limit` tokens for each (sequence, limit); the grade is the length of the n-gram."""
        return [self._continue(sequence, limit) for sequence, limit in wanted]

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._places.pop(sequence.id, None)

    def _continue(self, sequence: Sequence, limit: int) -> Proposal:
        ids = sequence.token_ids
        places = self._places.setdefault(sequence.id, _Places())
        places.learn(ids)
        place, length = places.find(ids, self.longest, self.tries)
        return Proposal(copy_from(ids, place, limit), length) if length >= self.shortest else Proposal([])


def same_before(ids: list[int], place: int, longest: int) -> int:
    """How many tokens before `place` equal the last ones, counted up to `longest`."""
    length = 0
    while length < min(longest, place) and ids[place - 1 - length] == ids[-1 - length]:
        length += 1
    return length


def copy_from(ids: list[int], place: int, count: int) -> list[int]:
    """`count` tokens from `place` on; beyond the end they repeat what was copied (as in LZ77), so a loop goes on."""
    period = len(ids) - place
    return ids[place : place + count] if count <= period else [ids[place + i % period] for i in range(count)]


class Speculation:
    """What the engine calls: `propose` after a step, `verify` and `timed` in the next, `forget` when a sequence ends.

    `verify` may be left out where nothing was proposed, `timed` wants every step.

    `max_model_len`: tokens a sequence can have. `clock`: seconds, for the proposer's own time.
    """

    def __init__(
        self,
        proposer: Proposer,
        max_model_len: int,
        pace: Pace | None = None,
        max_drafts: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.proposer, self.pace, self.max_model_len = proposer, pace or Pace(max_drafts), max_model_len
        self._clock = clock
        self._proposed, self._accepted = [0] * self.pace.max_drafts, [0] * self.pace.max_drafts
        self._draws = 0  # of a sequence in a step, however many tokens came of it
        self._grades: dict[int, int] = {}  # of each sequence's last proposal

    def propose(self, sequences: Many[Sequence]) -> None:
        """Set `drafts` of the sequences whose tokens are all computed but the last; the others have none."""
        ready = [sequence for sequence in sequences if _draws_next(sequence)]
        wanted = [(sequence, limit) for sequence in ready if (limit := self._limit(sequence, len(ready))) > 0]
        for sequence in sequences:
            sequence.drafts = []
        if not wanted:
            return
        start = self._clock()
        found = self.proposer.propose(wanted)
        self.pace.proposing_took(sum(len(proposal.tokens) for proposal in found), self._clock() - start)
        for (sequence, limit), proposal in zip(wanted, found, strict=True):
            if proposal.tokens:
                self._grades[sequence.id] = proposal.grade
                pays = self.pace.length(sequence, len(ready), proposal.grade)
                sequence.drafts = proposal.tokens[: min(limit, pays)]

    def verify(self, sequence: Sequence, drafts: Many[int], drawn: Many[int]) -> list[int]:
        """The tokens the sequence gets: the target's own draws, up to and with the first that was not proposed.

        drawn[i] is drawn from the row behind i drafts, so it counts only while the drafts before it came true.
        """
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == drawn[accepted]:
            accepted += 1
        if drafts:
            self._count(len(drafts), accepted)
            self.pace.judged(sequence, self._grades.get(sequence.id, 0), len(drafts), accepted)
        return list(drawn[: accepted + 1])

    def timed(self, slices: Many[Slice], seconds: float) -> None:
        """How long a step took. Pieces of prompts would spoil the picture: steps with any are left out."""
        self._draws += sum(part.draws for part in slices)
        if all(part.count == 1 + part.drafts for part in slices):
            self.pace.step_time.add(sum(part.count for part in slices), seconds)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended, however it did."""
        self.proposer.forget(sequence)
        self.pace.forget(sequence)
        self._grades.pop(sequence.id, None)

    def report(self) -> dict[str, Any]:
        """For cards and metrics: tokens proposed and accepted so far, also by place in the proposal."""
        fixed, row = self.pace.step_time.fit()
        pairs = zip(self._proposed, self._accepted, strict=True)
        proposed, accepted = sum(self._proposed), sum(self._accepted)
        return {
            "proposer": self.proposer.name,
            "proposed": proposed,
            "accepted": accepted,
            "acceptance": accepted / proposed if proposed else None,
            "acceptance_by_place": [hits / tries for tries, hits in pairs if tries],
            "tokens_per_step": 1 + accepted / self._draws if self._draws else None,
            "row_cost": row / (fixed + row),  # of another row, in steps of one row
        }

    def _limit(self, sequence: Sequence, num_sequences: int) -> int:
        """No more than pays, than may still be generated, than there are positions."""
        asked, tokens = sequence.request.params.max_tokens, len(sequence.token_ids)
        most = self.max_model_len if asked is None else min(self.max_model_len, asked + sequence.num_prompt_tokens)
        room = min(most - tokens - 1, self.pace.max_drafts)
        known = room > 0 and self.proposer.num_grades == 1
        return min(room, self.pace.length(sequence, num_sequences, 0)) if known else room

    def _count(self, proposed: int, accepted: int) -> None:
        for place in range(min(proposed, len(self._proposed))):
            self._proposed[place] += 1
            self._accepted[place] += place < accepted


def _draws_next(sequence: Sequence) -> bool:
    """Only its last token, which was drawn just now, is not computed."""
    left = len(sequence.token_ids) - sequence.num_computed_tokens
    return left == 1 and sequence.num_generated > 0 and sequence.status is Status.RUNNING
