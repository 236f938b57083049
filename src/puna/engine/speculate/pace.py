"""How many tokens to propose: as many as pay, and none where none does. Plain Python, no clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from puna.engine.sequence import Sequence


class StepTime:
    """Seconds of a step as fixed + row * rows, fitted to the latest steps (old ones fade).

    Where their sizes say little of what a row costs, the last proportion of the two that was sure counts more (ridge
    regression): one interrupted step of two rows must not look as if rows were dear.
    """

    FADE, RISE = 0.98, 1.05
    DOUBT, SURE = 4.0, 16.0  # sums of squared differences of rows: what the old proportion weighs, what makes a new one

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._fixed_in_rows = 10.0  # rows that cost as much as the fixed part: at first a guess
        self._usual: dict[int, float] = {}  # seconds of a step of so many rows when nothing else had the machine

    def add(self, rows: int, seconds: float) -> None:
        """One step more. Interruptions only ever add time: what counts is the least for its size, slowly rising."""
        if self._weight > 1:
            seconds = min(seconds, self._usual.get(rows, seconds) * self.RISE, 2 * self.of(rows))
        self._usual[rows] = seconds
        fade = self.FADE
        self._weight = fade * self._weight + 1
        self._rows = fade * self._rows + rows
        self._seconds = fade * self._seconds + seconds
        self._rows_rows = fade * self._rows_rows + rows * rows
        self._rows_seconds = fade * self._rows_seconds + rows * seconds
        if self._spread > self.SURE:
            fixed, row = self.fit()
            self._fixed_in_rows = max(0.5, fixed / row)  # at 0 it would never be tried, so never be known, again

    def of(self, rows: float) -> float:
        """Expected seconds of a step of `rows`."""
        fixed, row = self.fit()
        return fixed + row * rows

    def fit(self) -> tuple[float, float]:
        """fixed >= 0, and row at least 0.2% of a mean step: noise must not make rows free."""
        if not self._weight:
            return self._fixed_in_rows, 1.0
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        presumed = seconds / (rows + self._fixed_in_rows)
        together = self._rows_seconds - self._rows * seconds
        row = (together + self.DOUBT * presumed) / (self._spread + self.DOUBT)
        row = min(max(row, 0.002 * seconds), seconds / rows)
        return seconds - row * rows, row

    @property
    def _spread(self) -> float:
        return max(0.0, self._rows_rows - self._rows * self._rows / self._weight)


@dataclass(slots=True)
class Acceptance:
    """Of the proposals' first, second, ... token: how many of those whose predecessors were right were right too.

    Means that become fading averages (weight `floor` for the newest); a place not seen yet is as good as the last one.
    """

    floor: float
    share: list[float] = field(default_factory=lambda: [0.5])
    seen: list[int] = field(default_factory=lambda: [1])

    def add(self, proposed: int, accepted: int) -> None:
        for place in range(min(proposed, accepted + 1)):
            if place == len(self.share):
                self.share.append(self.share[-1])
                self.seen.append(1)
            weight = max(self.floor, 1 / (1 + self.seen[place]))
            self.share[place] += weight * ((place < accepted) - self.share[place])
            self.seen[place] += 1

    def copy(self, floor: float) -> Acceptance:
        """To start another sequence with; a few observations overrule it."""
        return Acceptance(floor, list(self.share), [min(seen, 4) for seen in self.seen])


@dataclass(slots=True)
class _Stride:
    """What proposals of one grade did in one sequence, and when the next is tried while they do not pay there."""

    acceptance: Acceptance
    rest: int = 0  # tokens to generate before the next try
    due: int = 0  # num_generated at which that is


class Pace:
    """How many tokens of a proposal are tried: the number that makes the most tokens of a second.

    k drafts bring 1 + s_1 + ... + s_k tokens and cost a / sequences + (1 + k) b + k d. s_i: the chance that the first i
    are all right, learnt for each grade in this sequence, beginning with what other sequences showed; a + b * rows is
    fitted to the steps that ran, d is the proposer's own time. Where no k is best, one draft is tried after 8, 16, 32,
    ... tokens (up to 1024), and again at once when it was right: text without any pattern costs next to nothing.
    """

    FIRST_REST, LONGEST_REST = 8, 1024

    def __init__(self, max_drafts: int = 8):
        self.max_drafts, self.step_time = max_drafts, StepTime()
        self._overall: dict[int, Acceptance] = {}  # by grade
        self._strides: dict[int, dict[int, _Stride]] = {}  # by sequence and grade
        self._draft_seconds = 0.0

    def length(self, sequence: Sequence, num_sequences: int, grade: int) -> int:
        """Drafts that pay in a step of `num_sequences`."""
        stride = self._stride(sequence, grade)
        return self._best(stride.acceptance.share, num_sequences) or int(sequence.num_generated >= stride.due)

    def judged(self, sequence: Sequence, grade: int, proposed: int, accepted: int) -> None:
        """What came of a proposal."""
        stride = self._stride(sequence, grade)
        stride.acceptance.add(proposed, accepted)
        self._overall[grade].add(proposed, accepted)
        stride.rest = 0 if accepted else min(max(2 * stride.rest, self.FIRST_REST), self.LONGEST_REST)
        stride.due = sequence.num_generated + stride.rest

    def proposing_took(self, drafts: int, seconds: float) -> None:
        """The proposer's own time counts too: a draft model's is not small. Again the least: prompts come on top."""
        if drafts:
            usual = self._draft_seconds * StepTime.RISE or seconds / drafts
            self._draft_seconds = min(seconds / drafts, usual)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._strides.pop(sequence.id, None)

    def _stride(self, sequence: Sequence, grade: int) -> _Stride:
        strides = self._strides.setdefault(sequence.id, {})
        if grade not in strides:
            strides[grade] = _Stride(self._overall.setdefault(grade, Acceptance(0.02)).copy(0.05))
        return strides[grade]

    def _best(self, share: list[float], num_sequences: int) -> int:
        fixed, row = self.step_time.fit()
        tokens, seconds, alive = 1.0, fixed / num_sequences + row, 1.0
        best, best_rate = 0, tokens / seconds
        for place in range(self.max_drafts):
            alive *= share[min(place, len(share) - 1)]
            tokens, seconds = tokens + alive, seconds + row + self._draft_seconds
            if tokens / seconds > best_rate:
                best, best_rate = place + 1, tokens / seconds
        return best
