"""Random numbers that are a function of who draws and when, not of what was drawn before.

A draw's number depends on (seed, answer, position) only: the same in any batch, after a preemption, and for a token
that speculation draws ahead of time. The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators"): number i of a stream is mix(key + (i + 1) * GOLDEN), so any i costs the same. Streams
of different keys begin at random places of one cycle of 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def stream_key(seed: int, index: int) -> int:
    """The 64-bit key of answer `index` of a request; any integer is a seed."""
    seed %= 2**128
    return mix(mix(mix(seed) + mix(seed >> 64) * 3 + _GOLDEN) + (index + 1) * _GOLDEN)


def uniforms(keys: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """A number in (0, 1) for each (key, position), float64 (R,): an odd multiple of 2^-53, so never 0 nor 1."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        x = np.array(keys, np.uint64) + (np.array(positions, np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def uniform(seed: int, index: int, position: int) -> float:
    """The number of one draw: answer `index` of a request with `seed`, `position` tokens generated before."""
    bits = mix(stream_key(seed, index) + (position + 1) * _GOLDEN) >> 12
    return (bits + 0.5) * 2.0**-52
