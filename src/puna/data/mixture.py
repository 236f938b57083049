"""Which source each sample comes from: weights kept exactly, by largest deficit first, without any state.

A source's deficit is what its weight promises it so far, less what it got; the largest is served next. Weights are
brought to whole parts of a period, so the pattern repeats: after each period every source has exactly its share, at no
moment does one have a whole sample too many, and sample number ten billion is found without counting up to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from puna.base.console import PunaError

# Weights whose common denominator is larger (token counts, say) are rounded to multiples of 1 / 2^16.
LONGEST_PERIOD = 1 << 16


@dataclass(frozen=True)
class Pattern:
    """One period. `sources` (period,): who is served; `ranks` (period,): how often before; `shares` (sources,)."""

    sources: np.ndarray
    ranks: np.ndarray
    shares: np.ndarray


class Mixture:
    """Samples over sources, by weights that may change at given samples.

    `phases`: (first sample, weights), the first at 0, ascending. Weights need not sum to one; 0 leaves a source out.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]):
        self.starts = np.array([first for first, _ in phases], dtype=np.int64)
        assert self.starts[0] == 0
        assert (np.diff(self.starts) > 0).all()
        self.patterns = [make_pattern(weights) for _, weights in phases]
        self._before = [np.zeros(len(phases[0][1]), dtype=np.int64)]  # each source's samples before a phase
        for pattern, length in zip(self.patterns, np.diff(self.starts).tolist(), strict=False):
            self._before.append(self._before[-1] + _counts(pattern, length))

    def split(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index within that source) of each global sample. Shapes: all (n,) int64."""
        index = np.asarray(index, dtype=np.int64)
        phases = np.searchsorted(self.starts, index, side="right") - 1
        sources, within = np.empty_like(index), np.empty_like(index)
        for phase in np.unique(phases).tolist():
            here = phases == phase
            pattern = self.patterns[phase]
            periods, places = np.divmod(index[here] - self.starts[phase], len(pattern.sources))
            who = pattern.sources[places]
            sources[here] = who
            within[here] = self._before[phase][who] + periods * pattern.shares[who] + pattern.ranks[places]
        return sources, within

    def counts(self, index: int) -> np.ndarray:
        """How many of the samples before `index` each source gave, (sources,)."""
        phase = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self._before[phase] + _counts(self.patterns[phase], index - int(self.starts[phase]))


def _counts(pattern: Pattern, length: int) -> np.ndarray:
    periods, rest = divmod(length, len(pattern.sources))
    return periods * pattern.shares + np.bincount(pattern.sources[:rest], minlength=len(pattern.shares))


def make_pattern(weights: Sequence[float]) -> Pattern:
    """One period of largest deficit first; of equal deficits the first source is served."""
    shares = np.array(_whole_parts(weights), dtype=np.int64)
    period = int(shares.sum())
    deficit = np.zeros(len(shares), dtype=np.int64)
    served = np.zeros(len(shares), dtype=np.int64)
    sources, ranks = np.empty(period, dtype=np.int64), np.empty(period, dtype=np.int64)
    for place in range(period):
        deficit += shares
        who = int(deficit.argmax())
        deficit[who] -= period
        sources[place], ranks[place] = who, served[who]
        served[who] += 1
    return Pattern(sources, ranks, shares)


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportion, or nearly so: see LONGEST_PERIOD."""
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    denominator = math.lcm(*(part.denominator for part in exact))
    parts = [int(part * denominator) for part in exact]
    divisor = math.gcd(*parts)
    if sum(parts) // divisor <= LONGEST_PERIOD:
        return [part // divisor for part in parts]
    scaled = [part * LONGEST_PERIOD / total for part in exact]
    rounded = [max(1, int(part)) if part else 0 for part in scaled]
    by_remainder = sorted(range(len(scaled)), key=lambda i: int(scaled[i]) - scaled[i])
    for number in by_remainder[: max(0, LONGEST_PERIOD - sum(rounded))]:
        rounded[number] += 1
    return rounded


def check_weights(weights: Sequence[float], sources: int, where: str) -> None:
    """Refuse weights that name no mixture: another number of them, a negative one, all zero."""
    if len(weights) != sources:
        raise PunaError(f"{where} has {len(weights)} weights for {sources} sources", "give one weight per source")
    if any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
        shown = ", ".join(f"{w:g}" for w in weights)
        raise PunaError(f"{where} is {shown}", "weights are 0 or more, and at least one is positive")


def parse_schedule(entries: Sequence[str], sources: int) -> list[tuple[int, tuple[float, ...]]]:
    """['5000: 0.5 0.5'] -> [(5000, (0.5, 0.5))]: from step 5000 on these weights. PunaError for anything else."""
    phases: list[tuple[int, tuple[float, ...]]] = []
    for entry in entries:
        step, colon, rest = entry.partition(":")
        try:
            phase = int(step), tuple(float(word) for word in rest.split())
        except ValueError:
            colon = ""
        if not colon:
            hint = 'write each entry as "STEP: WEIGHT WEIGHT ...", one weight per source'
            raise PunaError(f"data.schedule has {entry!r}", hint)
        check_weights(phase[1], sources, f"data.schedule at step {phase[0]}")
        if phase[0] < 1 or (phases and phase[0] <= phases[-1][0]):
            raise PunaError(f"data.schedule has step {phase[0]} out of order", "steps begin at 1 and ascend")
        phases.append(phase)
    return phases
