"""What a sampler asks of long rows, each in about one pass over memory by looking at blocks of 64 tokens.

Shapes: R rows, V vocabulary, B blocks of a row (the last may be shorter), K of the largest. Every function treats its
rows one by one: the bits of a row's result are the same alone and among others, on any number of threads. torch's own
argmax, topk and cumsum are several times slower on such rows on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from puna.engine.sampling.randomness import WIDTH, clocks, first_clocks

_LOOK = 4  # blocks whose clocks are made to learn what is late


def pick(x_RV: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of some rows."""
    return x_RV.index_select(0, torch.tensor(rows, device=x_RV.device))


def view(x_RV: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, only to be read: no copy of rows in a row."""
    if rows[-1] - rows[0] == len(rows) - 1:  # they are in ascending order
        return x_RV[rows[0] : rows[-1] + 1]
    return pick(x_RV, rows)


def block_maxima(x_RV: Tensor) -> Tensor:
    """The largest of every block (R, B); NaN where a block has one."""
    whole = x_RV.shape[1] // WIDTH * WIDTH
    parts = [x_RV[:, :whole].unflatten(1, (-1, WIDTH)).amax(-1)] if whole else []
    if whole < x_RV.shape[1]:
        parts.append(x_RV[:, whole:].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def block_sums(x_RV: Tensor) -> Tensor:
    """The sum of every block (R, B) as fp64: within a block in fp32, whose error is that of the terms themselves."""
    whole = x_RV.shape[1] // WIDTH * WIDTH
    parts = [x_RV[:, :whole].unflatten(1, (-1, WIDTH)).sum(-1)] if whole else []
    if whole < x_RV.shape[1]:
        parts.append(x_RV[:, whole:].sum(-1, keepdim=True))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).double()


def first_largest(x_RV: Tensor, maxima_RB: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids (R,) of the largest entries, of equal ones the lowest id; NaN counts as the largest."""
    values_R = maxima_RB.amax(-1)
    inside_R1W, ids_R1W = _take(x_RV, maxima_RB.argmax(-1, keepdim=True), -torch.inf)
    place_R1 = inside_R1W[:, 0].argmax(-1, keepdim=True)
    return values_R, ids_R1W[:, 0].gather(1, place_R1)[:, 0]


def largest(x_RV: Tensor, maxima_RB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids (R, k) of the k largest, largest first.

    They lie in the k blocks with the largest maxima: of any other block, k blocks hold something at least as large.
    """
    if k * WIDTH * 2 >= x_RV.shape[1]:
        return x_RV.topk(k)
    blocks_RK = maxima_RB.topk(k, sorted=False).indices.sort(-1).values
    values_RKW, ids_RKW = _take(x_RV, blocks_RK, -torch.inf)
    values_RK, places_RK = values_RKW.flatten(1).topk(k)
    return values_RK, ids_RKW.flatten(1).gather(1, places_RK)


def descending(x_RV: Tensor) -> Tensor:
    """All values, largest first. numpy's sort of floats is three times torch's on a CPU."""
    if x_RV.device.type == "cpu":
        return torch.from_numpy(np.sort(x_RV.numpy(), -1)).flip(-1)
    return x_RV.sort(-1, descending=True).values


def ascending_order(x_RV: Tensor) -> Tensor:
    """Ids of each row, smallest value first."""
    if x_RV.device.type == "cpu":
        return torch.from_numpy(np.argsort(x_RV.numpy(), -1))
    return x_RV.argsort(-1)


def race(weights_RV: Tensor, seeds_R: Tensor) -> Tensor:
    """Ids (R,): of each row the token whose clock / weight is least, one without weight never (see `randomness`).

    A token cannot win that would be late even with the smallest clock of its block. That leaves about 64 tokens of a
    row, or fewer: each is in time with a probability near 64 w / (64 w + total). So few clocks are made. First some
    arrival is found that is early; M blocks, and N tokens in them, could be earlier.
    """
    maxima_RB = block_maxima(weights_RV)
    first_RB, winners_RB = first_clocks(seeds_R, torch.arange(maxima_RB.shape[1], device=seeds_R.device))
    bounds_RB = first_RB / maxima_RB
    known_R = _early_arrival(weights_RV, seeds_R, first_RB, winners_RB, bounds_RB)
    rows_M, blocks_M = (bounds_RB <= known_R[:, None]).nonzero().unbind(1)
    weights_MW = _take_each(weights_RV, rows_M, blocks_M)
    first_M, winners_M = first_RB[rows_M, blocks_M], winners_RB[rows_M, blocks_M]
    m_N, inside_N = (first_M[:, None] / weights_MW <= known_R[rows_M][:, None]).nonzero().unbind(1)
    rows_N, ids_N = rows_M[m_N], blocks_M[m_N] * WIDTH + inside_N
    arrivals_N = clocks(seeds_R[rows_N], ids_N, first_M[m_N], winners_M[m_N]).div_(weights_MW[m_N, inside_N])
    best_R = torch.full_like(known_R, torch.inf).scatter_reduce_(0, rows_N, arrivals_N, "amin")
    won_N = arrivals_N == best_R[rows_N]
    return torch.zeros_like(seeds_R).scatter_(0, rows_N[won_N], ids_N[won_N])


def _early_arrival(
    weights_RV: Tensor, seeds_R: Tensor, first_RB: Tensor, winners_RB: Tensor, bounds_RB: Tensor
) -> Tensor:
    """The first arrival (R,) of the few blocks that might be the earliest."""
    blocks_RK = bounds_RB.topk(min(_LOOK, bounds_RB.shape[1]), largest=False).indices
    weights_RKW, ids_RKW = _take(weights_RV, blocks_RK, 0)
    first_RK1, winners_RK1 = (x_RB.gather(1, blocks_RK)[:, :, None] for x_RB in (first_RB, winners_RB))
    return clocks(seeds_R[:, None, None], ids_RKW, first_RK1, winners_RK1).div_(weights_RKW).amin((1, 2))


def race_among(weights_RC: Tensor, ids_RC: Tensor, seeds_R: Tensor) -> Tensor:
    """Ids (R,): the winners of a race of these tokens only, by the clocks that they have in any race."""
    first_RC, winners_RC = first_clocks(seeds_R, ids_RC // WIDTH)
    arrivals_RC = clocks(seeds_R[:, None], ids_RC, first_RC, winners_RC).div_(weights_RC)
    return ids_RC.gather(1, arrivals_RC.argmin(-1, keepdim=True))[:, 0]


def _take(x_RV: Tensor, blocks_RK: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """Values and ids (R, K, 64) of some blocks; `beyond` stands where the last block ends early."""
    vocab = x_RV.shape[1]
    ids_RKW = blocks_RK[:, :, None] * WIDTH + torch.arange(WIDTH, device=x_RV.device)
    if vocab % WIDTH == 0:
        return x_RV.gather(1, ids_RKW.flatten(1)).view(ids_RKW.shape), ids_RKW
    inside_RKW = ids_RKW < vocab
    ids_RKW = ids_RKW.clamp_max_(vocab - 1)
    values_RKW = x_RV.gather(1, ids_RKW.flatten(1)).view(ids_RKW.shape)
    return values_RKW.masked_fill_(~inside_RKW, beyond), ids_RKW


def _take_each(x_RV: Tensor, rows_M: Tensor, blocks_M: Tensor) -> Tensor:
    """Values (M, 64) of blocks of any rows; 0 where the last block ends early."""
    vocab = x_RV.shape[1]
    if vocab % WIDTH == 0:
        return x_RV.reshape(-1, WIDTH).index_select(0, rows_M * (vocab // WIDTH) + blocks_M)
    ids_MW = blocks_M[:, None] * WIDTH + torch.arange(WIDTH, device=x_RV.device)
    return x_RV[rows_M[:, None], ids_MW.clamp_max(vocab - 1)].masked_fill_(ids_MW >= vocab, 0)
