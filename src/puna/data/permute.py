"""A shuffled order without a table: a seeded bijection of [0, n), evaluated at the places one asks for.

Made of integer arithmetic alone, so an order drawn today is drawn again by any version of numpy on any machine.
"""

from __future__ import annotations

import numpy as np

# splitmix64, Steele, Lea & Flood 2014 "Fast splittable pseudorandom number generators", section 5: the Weyl increment
# (2^64 / golden ratio) and the finalizer's multipliers (Stafford's variant 13 of MurmurHash3).
_WEYL, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1
# Four rounds of a random function make a strong pseudo-random permutation of many values (Luby & Rackoff 1988). Small
# ones need more, as a round draws few bits: with 8 rounds the 120 orders of 5 values are visibly not equally likely.
_ROUNDS, _ROUNDS_SMALL = 6, 24
# 16384 uint64 values and their temporaries stay in the second-level cache: 1.5x the speed of one long vector.
_CHUNK = 1 << 14


def mix64(values: np.ndarray) -> np.ndarray:
    """The splitmix64 finalizer: a bijection of 64-bit words in which every input bit moves half of the output bits.

    Shapes: any array of uint64; returns a new one. mix64(0) is 0, so add something before mixing a counter.
    """
    mixed = values ^ (values >> np.uint64(30))
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_SECOND)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def keyed(*parts: int) -> int:
    """One 64-bit key from integers of any size and sign, for instance keyed(seed, epoch, shard); their order counts."""
    key = len(parts)
    for part in parts:
        while True:  # 64 bits at a time; what is left in the end, 0 or -1, is the sign
            key = _mix_word(_mix_word(key + _WEYL) ^ (part & _MASK))
            part >>= 64
            if part in (0, -1):
                break
        key ^= part & _MASK
    return key


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where each of `index` goes in a permutation of [0, n) chosen by `key`.

    Shapes: index (m,) int64, each in [0, n), 1 <= n <= 2^62; returns (m,) int64. Over all of [0, n) the results are
    [0, n) again, each once. Memory and time are those of the indices asked for, whatever n is.

    A Feistel network on the fewest bits that hold n permutes [0, 2^bits); a result outside [0, n) goes through it again
    until it falls inside, which takes fewer than two passes on average.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 (cycle walking) and 5 (Feistel).
    """
    assert 1 <= n <= 2**62, f"no permutation of {n} values"
    given = np.asarray(index, dtype=np.int64)
    assert given.size == 0 or (given.min() >= 0 and given.max() < n), f"an index is not in [0, {n})"
    bits = (n - 1).bit_length()
    rounds = [keyed(key, number) for number in range(max(_ROUNDS, _ROUNDS_SMALL - 2 * bits))]
    placed = given.astype(np.uint64)
    for first in range(0, len(placed), _CHUNK):
        chunk = _feistel(placed[first : first + _CHUNK], bits, rounds)
        outside = np.flatnonzero(chunk >= n)
        while outside.size:
            again = _feistel(chunk[outside], bits, rounds)
            chunk[outside] = again
            outside = outside[again >= n]
        placed[first : first + _CHUNK] = chunk
    return placed.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, rounds: list[int]) -> np.ndarray:
    """A bijection of [0, 2^bits): the two halves of the bits are changed in turn, each by a hash of the other.

    With an odd number of bits the left half is one longer; an xor undoes itself, so each round is a bijection anyway.
    """
    width = np.uint64(bits // 2)
    masks = (np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << (bits // 2)) - 1))
    left, right = values >> width, values & masks[1]
    for number, round_key in enumerate(rounds):
        if number % 2 == 0:
            left ^= mix64(right ^ np.uint64(round_key)) & masks[0]
        else:
            right ^= mix64(left ^ np.uint64(round_key)) & masks[1]
    return (left << width) | right


def _mix_word(word: int) -> int:
    """mix64 of one Python integer, 20 times as fast as an array of one; the tests hold the two together."""
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)
