"""Random numbers that are a function of who draws and when, not of what was drawn before.

A draw's numbers depend on (seed, answer, position) only: the same in any batch, after a preemption, and for a token
that speculation draws ahead of time. The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators"): number i of a stream is mix(key + (i + 1) * GOLDEN), so any i costs the same. Streams
of different keys begin at random places of one cycle of 2^64. An answer has a stream of seeds, one a position; a seed
has a stream of clocks, one a token.

A clock is an exponential number of mean 1. In a race where token i arrives at clock_i / weight_i, token i is the first
with probability weight_i / sum of weights (the Gumbel-max trick: -log of a clock is a Gumbel number). Two distributions
that race by the same clocks draw the same token with probability (1 - d) / (1 + d) or more, d their total variation
(Daliri, Musco, Suresh 2024, arXiv:2408.07978): that is why a draft model draws as its target will.

Clocks come in blocks of 64 tokens: first the smallest of a block, exponential of mean 1/64, and the token that has it,
any of the 64; the other clocks are later than that by exponential numbers of their own. These are 64 independent
exponentials (they do not age), but one number bounds them all: a race needs to look at few blocks.

Shapes: R rows, K blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WIDTH = 64  # tokens in a block: few blocks for 128k tokens, few candidates for the 50 largest

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


def draw_seeds(keys: Sequence[int], positions: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The 64 bits of each (answer's key, tokens generated before), int64 (R,)."""
    keys_R = torch.tensor(np.array(keys, np.uint64).view(np.int64), device=device)
    return _numbers(keys_R, torch.tensor(positions, device=device))


def first_clocks(seeds_R: Tensor, blocks_RK: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest clock of each block, fp64 (R, K), and the id of its token. blocks may be (K,), the same for all."""
    bits_RK = _numbers(seeds_R[:, None], blocks_RK)
    return _exponentials(bits_RK).div_(WIDTH), blocks_RK * WIDTH + (bits_RK & (WIDTH - 1))  # they use other bits


def clocks(seeds: Tensor, ids: Tensor, first: Tensor, winners: Tensor) -> Tensor:
    """The clocks of tokens, fp64. Beside each id its row's seed and the smallest clock of its block, and whose it is.

    Shapes: any that broadcast to that of the ids.
    """
    later = _exponentials(_numbers(_mixed(seeds.clone()), ids))
    return later.masked_fill_(ids == winners, 0).add_(first)


def _exponentials(bits: Tensor) -> Tensor:
    """-log of an odd multiple of 2^-53 from the upper 52 bits: more than 0, less than 37."""
    return _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52).log_().neg_()


def _numbers(keys: Tensor, places: Tensor) -> Tensor:
    """Numbers of streams, int64 that wrap around."""
    return _mixed(keys + (places + 1) * _signed(_GOLDEN))


def _mixed(x: Tensor) -> Tensor:
    """`mix` in place."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_signed(_MIX_1))
    x.bitwise_xor_(_shifted(x, 27)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings in zeros: torch's brings in the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    """The int64 of the same 64 bits."""
    return x - 2**64 if x >> 63 else x
