"""Dataset decomposition: sequences of 2^k tokens, each from one document, so that nothing is padded and nothing mixed.

A document's length in binary says how it is cut. With T = 8 and shortest = 2, one of 23 = 0b10111 tokens becomes

    aaaaaaaa  aaaaaaaa  aaaa  aa  (a)         two of 8, then one per set bit of the rest, longest first

and the last token, a sequence shorter than `shortest`, is dropped: the tail. So the whole decomposition of a shard is
summed up in 40 numbers, how many documents have bit j set, and a manifest need not be read again for another T.

Source: Pouransari et al. 2024, arXiv:2405.13226, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from puna.base.console import PunaError

_BITS = 40  # a document has fewer than 2^40 tokens


def length_bits(starts: np.ndarray) -> list[int]:
    """bits[j]: how many documents have bit j set in their number of tokens; zeros at the end are left out.

    Shapes: starts (documents + 1,) int64 token offsets.
    """
    lengths: np.ndarray = np.diff(np.asarray(starts, dtype=np.int64))
    longest = int(lengths.max(initial=0)).bit_length()
    assert longest <= _BITS, f"a document of 2^{longest - 1} tokens or more"
    return [int(((lengths >> j) & 1).sum()) for j in range(longest)]


def bucket_counts(bits: Sequence[int], T: int, shortest: int) -> dict[int, int]:
    """How many sequences of 2^k tokens there are, for every k from log2(shortest) to log2(T).

    `bits` from `length_bits`, or such lists of several shards added up. Raises PunaError unless T and shortest are
    powers of two with shortest <= T.
    """
    low, high = _exponents(T, shortest)
    counts = {k: bits[k] if k < len(bits) else 0 for k in range(low, high)}
    counts[high] = sum(bits[j] << (j - high) for j in range(high, len(bits)))
    return counts


def kept_tokens(bits: Sequence[int], T: int, shortest: int) -> int:
    """Tokens in all sequences; what is missing from the corpus are the tails, fewer than `shortest` a document."""
    return sum(number << k for k, number in bucket_counts(bits, T, shortest).items())


def sequences(starts: np.ndarray, k: int, T: int, shortest: int) -> np.ndarray:
    """Token offsets of all sequences of 2^k tokens in a shard, ascending; none crosses a document.

    Shapes: starts (documents + 1,) int64; returns (bucket_counts[k],) int64. Raises PunaError like `bucket_counts`, and
    for a k that has no bucket.
    """
    low, high = _exponents(T, shortest)
    if not low <= k <= high:
        raise PunaError(f"no bucket of 2^{k} tokens", f"there are buckets from 2^{low} to 2^{high}")
    starts = np.asarray(starts, dtype=np.int64)
    begins, lengths = starts[:-1], np.diff(starts)
    if k < high:
        has = (lengths >> k) & 1 == 1
        return begins[has] + (lengths[has] >> (k + 1) << (k + 1))  # all longer sequences of the document come before
    each = lengths >> k
    number = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
    return np.repeat(begins, each) + (number << k)


def _exponents(T: int, shortest: int) -> tuple[int, int]:
    for name, value in (("the longest sequence", T), ("the shortest sequence", shortest)):
        if value < 1 or value & (value - 1):
            below = 1 << max(value, 1).bit_length() - 1
            raise PunaError(f"{name} is {value} tokens, which is no power of two", f"use {below} or {2 * below}")
    if shortest > T:
        raise PunaError(f"the shortest sequence ({shortest}) is longer than the longest ({T})", f"use at most {T}")
    return shortest.bit_length() - 1, T.bit_length() - 1
