"""In which order the buckets of a decomposed corpus are trained on: a pure function of the step.

Every step takes sequences of one length, all steps have the same number of tokens, and over the run each bucket gets
the share of steps that it has of the tokens, to the step. Two orders:

- "mixture": all buckets throughout, each evenly spread.
- "short_to_long": the run is cut into 8 cycles with the same share of every bucket. Within a cycle a bucket is drawn
  with odds that double from each length to the next shorter one, times its share, until it is used up: short sequences
  come first and are used up first, the longest last until the end of the cycle, and then short ones come again.
  The paper calls these odds Grow-P2; it reports gains on ordinary and on long-context benchmarks.

How a cycle is drawn. Bucket b with n steps and odds o is given n arrival times (i + u_i) / (n o), i = 0 .. n - 1, with
u_i uniform in [0, 1); the steps of the cycle are the arrivals in order of time. So b arrives at the constant rate n o
until time 1 / o, which is when it is used up. (With exponential gaps instead, this would be exactly the sampler of the
paper's code; evenly spread arrivals have the same odds with less noise, and need only divisions, which are the same on
every machine, unlike a logarithm.)

Source: Pouransari et al. 2024, arXiv:2405.13226, section 2.2, and its code, github.com/apple/ml-dataset-decomposition:
`get_dd_params.py` (weight = share times 32, 16, 8, 4, 2, 1; 8 cycles) and `MyRandomMix` in `open_lm.patch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from puna.base.console import PunaError
from puna.data.permute import keyed, mix64

CYCLES = {"mixture": 1, "short_to_long": 8}


def bucket_of_step(step: int, total_steps: int, tokens_by_bucket: Mapping[int, int], curriculum: str, seed: int) -> int:
    """k of the sequences (2^k tokens each) that step `step` of [0, total_steps) trains on.

    The first call for a run makes a table (~0.1 s and ~10 MB per million steps), later ones look into it. Another
    total_steps is another order. Raises PunaError for an unknown curriculum and when no bucket has tokens.
    """
    return place_of_step(step, total_steps, tokens_by_bucket, curriculum, seed)[0]


def place_of_step(
    step: int, total_steps: int, tokens_by_bucket: Mapping[int, int], curriculum: str, seed: int
) -> tuple[int, int]:
    """(k, how many earlier steps trained on bucket k): what is needed to find the step's sequences without a replay."""
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    buckets, earlier = _table(total_steps, tuple(sorted(tokens_by_bucket.items())), curriculum, seed)
    return int(buckets[step]), int(earlier[step])


def steps_by_bucket(total_steps: int, tokens_by_bucket: Mapping[int, int]) -> dict[int, int]:
    """Steps each bucket gets: its share of the tokens, rounded so that they add up (largest remainder first).

    A bucket with less than half a step's share may get none.
    """
    total = sum(tokens_by_bucket.values())
    if total < 1:
        raise PunaError("no bucket holds a sequence", "give longer documents or a smaller shortest sequence")
    parts = {k: divmod(tokens * total_steps, total) for k, tokens in sorted(tokens_by_bucket.items())}
    steps = {k: whole for k, (whole, _) in parts.items()}
    by_remainder = sorted(parts, key=lambda k: (-parts[k][1], k))
    for k in by_remainder[: total_steps - sum(steps.values())]:
        steps[k] += 1
    return steps


@lru_cache(maxsize=4)
def _table(
    total_steps: int, tokens: tuple[tuple[int, int], ...], curriculum: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(bucket of each step, earlier steps of the same bucket)."""
    if curriculum not in CYCLES:
        raise PunaError(f"there is no curriculum {curriculum!r}", f"use {' or '.join(CYCLES)}")
    steps, cycles = steps_by_bucket(total_steps, dict(tokens)), CYCLES[curriculum]
    order = [
        _draw_cycle(
            {k: n * (cycle + 1) // cycles - n * cycle // cycles for k, n in steps.items()},
            doubling=curriculum == "short_to_long",
            key=keyed(seed, cycle),
        )
        for cycle in range(cycles)
    ]
    buckets = np.concatenate(order)
    earlier = np.empty(total_steps, dtype=np.int64)
    for k, number in steps.items():
        earlier[buckets == k] = np.arange(number)
    return buckets, earlier


def _draw_cycle(steps: Mapping[int, int], doubling: bool, key: int) -> np.ndarray:
    """The buckets of one cycle's steps in the order of their arrival times; `steps` has its keys in ascending order."""
    times = [np.empty(0)]
    for k, number in steps.items():
        counter = np.arange(1, number + 1, dtype=np.uint64) ^ np.uint64(keyed(key, k))
        uniform = (mix64(counter) >> np.uint64(11)) * 2.0**-53
        # Time 1 is when the shortest bucket would end, were its odds 1.
        used_up = 2.0 ** (k - min(steps)) if doubling else 1.0
        times.append((np.arange(number) + uniform) / max(number, 1) * used_up)
    order = np.argsort(np.concatenate(times), kind="stable")
    return np.repeat(np.array(list(steps), dtype=np.uint8), list(steps.values()))[order]
