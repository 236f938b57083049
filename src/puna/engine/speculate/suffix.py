"""Proposals from everything seen so far: a suffix automaton of each sequence, and of earlier answers. No tensors."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from puna.engine.sequence import Sequence
from puna.engine.speculate.speculative import Proposal


class SuffixAutomaton:
    """All substrings of a growing text, how often each occurred and what followed it most often.

    A state stands for the substrings that end at the same places; `link` leads to the next shorter ending. At most 2
    states a token, amortised constant work (Blumer et al. 1985), plus the counts of the `depth` longest endings.
    """

    def __init__(self, depth: int):
        self.depth = depth
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.count, self.likeliest = [-1], [0], [0], [-1]
        self.last = 0

    def extend(self, token: int) -> None:
        """Append a token to the text."""
        before, new = self.last, self._add({}, -1, self.length[self.last] + 1, 0, -1)
        state = before
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        self.link[new] = 0 if state < 0 else self._split(state, token)
        self.last = new
        self._tally(before, token)

    def move(self, state: int, length: int, token: int) -> tuple[int, int]:
        """From the longest ending found (`length` tokens of it match) to the longest one after `token`."""
        while length and self.length[self.link[state]] >= length:  # the state was split since
            state = self.link[state]
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        following = self.next[state].get(token, -1)
        return (following, length + 1) if following >= 0 else (0, 0)

    def _add(self, following: dict[int, int], link: int, length: int, count: int, likeliest: int) -> int:
        self.next.append(following)
        self.link.append(link)
        self.length.append(length)
        self.count.append(count)
        self.likeliest.append(likeliest)
        return len(self.link) - 1

    def _split(self, state: int, token: int) -> int:
        """The state of (shortest ways to `state` + token): `next[state][token]` where its lengths fit, else a copy."""
        whole = self.next[state][token]
        if self.length[whole] == self.length[state] + 1:
            return whole
        short = self._add(
            dict(self.next[whole]), self.link[whole], self.length[state] + 1, self.count[whole], self.likeliest[whole]
        )
        self.link[whole] = short
        while state >= 0 and self.next[state].get(token) == whole:
            self.next[state][token] = short
            state = self.link[state]
        return short

    def _tally(self, state: int, token: int) -> None:
        """Count `token` behind all endings of the text before it (a state once, though many lead to it)."""
        counted = -1
        for _ in range(self.depth):
            if state < 0:
                return
            following = self.next[state][token]
            if following != counted:
                self.count[following] += 1
                counted = following
            best = self.likeliest[state]
            if best < 0 or self.count[following] >= self.count[self.next[state][best]]:
                self.likeliest[state] = token
            state = self.link[state]


@dataclass(slots=True, eq=False)
class _Part:
    """Ended answers in one automaton; -1 stands between them. `used`: when something of it was last proposed."""

    automaton: SuffixAutomaton
    salt: str
    used: int = 0


@dataclass(slots=True)
class _Reader:
    """How far a sequence was read: into an automaton of its own, and where its ending stands in each part."""

    own: SuffixAutomaton
    end: int = 0
    places: dict[_Part, tuple[int, int]] = field(default_factory=dict)  # state, tokens that match


class Suffix:
    """Goes on as the longest ending did that was seen before, here or in earlier answers, while that is likely.

    Every proposed token has an estimated probability: its share among what followed the same ending, multiplied along
    the way; below `threshold` it stops. Source: SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975; here with
    automatons instead of trees, whose size does not grow with `depth`.
    Earlier answers take at most `memory` tokens (about 0.5 KB each), in parts; the part that was of no use for longest
    goes first. Requests with different cache salts learn nothing from each other.
    """

    name, num_grades = "suffix", 7

    def __init__(self, depth: int = 16, threshold: float = 0.3, memory: int = 65536, parts: int = 8):
        self.depth, self.threshold = depth, threshold
        self._part_tokens, self._max_parts = memory // parts, parts
        self._parts: list[_Part] = []
        self._readers: dict[int, _Reader] = {}
        self._clock = 0

    def propose(self, wanted: Many[tuple[Sequence, int]]) -> list[Proposal]:
        """At most `limit` tokens for each (sequence, limit); the grade grows with the ending's length."""
        return [self._continue(sequence, limit) for sequence, limit in wanted]

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended: its answer is remembered for others."""
        self._readers.pop(sequence.id, None)
        answer = sequence.generated_ids[: self._part_tokens]
        automaton = self._room(sequence.request.cache_salt, len(answer) + 1).automaton
        for token in answer:
            automaton.extend(token)
        automaton.extend(-1)

    def _room(self, salt: str, tokens: int) -> _Part:
        """The newest part of `salt` if it has room, else a new one in the place of the least useful."""
        for part in reversed(self._parts):
            if part.salt == salt and part.automaton.length[part.automaton.last] + tokens <= self._part_tokens:
                return part
        if len(self._parts) == self._max_parts:
            self._parts.remove(min(self._parts, key=lambda part: part.used))
        self._parts.append(_Part(SuffixAutomaton(self.depth), salt, self._clock))
        return self._parts[-1]

    def _continue(self, sequence: Sequence, limit: int) -> Proposal:
        self._clock += 1
        reader = self._read(sequence)
        own = reader.own
        before = own.link[own.last]  # the longest ending that stands elsewhere too
        matched = own.length[before] if before > 0 else 0
        found, best = self._follow(own, before, matched, 1, limit)
        for part, (state, length) in reader.places.items():
            if length > matched:
                other, score = self._follow(part.automaton, state, length, 0, limit)
                if score > best:
                    found, best, matched, part.used = other, score, length, self._clock
        return Proposal(found, min(matched.bit_length(), self.num_grades - 1))

    def _read(self, sequence: Sequence) -> _Reader:
        ids = sequence.token_ids
        reader = self._readers.setdefault(sequence.id, _Reader(SuffixAutomaton(self.depth)))
        old, reader.places = reader.places, {}
        for part in self._parts:
            if part.salt == sequence.request.cache_salt:
                place = old.get(part)
                new = ids[-self.depth :] if place is None else ids[reader.end :]
                state, length = place or (0, 0)
                for token in new:
                    state, length = part.automaton.move(state, length, token)
                reader.places[part] = state, length
        for token in ids[reader.end :]:
            reader.own.extend(token)
        reader.end = len(ids)
        return reader

    def _follow(
        self, automaton: SuffixAutomaton, state: int, length: int, open_ends: int, limit: int
    ) -> tuple[list[int], float]:
        """The likeliest way on from a state, and how many of its tokens are expected to be right.

        `open_ends`: occurrences of the ending that nothing follows yet.
        """
        found: list[int] = []
        expected, probability = 0.0, length / (length + 1)
        total = automaton.count[state] - open_ends
        while length and len(found) < limit:
            token = automaton.likeliest[state]
            if token < 0:
                break
            state = automaton.next[state][token]
            probability *= automaton.count[state] / max(total, 1)
            if probability < self.threshold:
                break
            found.append(token)
            expected += probability
            total = automaton.count[state]
        return found, expected
