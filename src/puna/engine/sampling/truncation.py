"""Scores to what is drawn from: temperature, then top-k, top-p, min-p, typical.

Shapes: R rows, V vocabulary, K likeliest tokens, C tokens that are drawn from. Top-k and top-p need no order of the
whole vocabulary: mostly the 64 or 1,024 likeliest tokens hold all that stays, and then nothing else is looked at again.
Which way a row goes depends on the row alone, so its bits do too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from puna.engine.request import SamplingParams
from puna.engine.sampling.row_blocks import (
    ascending_order,
    block_maxima,
    block_sums,
    descending,
    largest,
    pick,
    race,
    race_among,
)
from puna.engine.sampling.state import short_width

_COLDEST = 1e-30  # fp32 cannot divide by much less


class Choice(NamedTuple):
    """Tokens to draw from, in the order of their ids: weights (R, C), 1 for the likeliest, 0 for what was cut off.

    ids None: all tokens, C = V.
    """

    weights_RC: Tensor
    ids_RC: Tensor | None

    def draw(self, seeds_R: Tensor) -> Tensor:
        """A token id of each row (R,), by a race whose clocks do not depend on which tokens are here."""
        if self.ids_RC is None:
            return race(self.weights_RC, seeds_R)
        return race_among(self.weights_RC, self.ids_RC, seeds_R)

    def of(self, rows: Sequence[int]) -> Choice:
        """The same for some rows."""
        if len(rows) == len(self.weights_RC):
            return self
        return Choice(pick(self.weights_RC, rows), None if self.ids_RC is None else pick(self.ids_RC, rows))


def choices(scores_RV: Tensor, params: Sequence[SamplingParams], width: int) -> Iterator[tuple[list[int], Choice]]:
    """(rows, what they draw from), every row once; all have the same `short_width`."""
    maxima_RB = block_maxima(scores_RV)
    if not width:
        yield list(range(len(params))), Choice(_weigh(scores_RV, maxima_RB, params), None)
        return
    choice, is_enough = _shortlist(scores_RV, maxima_RB, params, width)
    if enough := [row for row, good in enumerate(is_enough) if good]:
        yield enough, choice.of(enough)
    if rest := [row for row, good in enumerate(is_enough) if not good]:
        fewer = [params[row] for row in rest]
        wider = short_width(fewer[0], scores_RV.shape[1], width)
        for places, choice in choices(pick(scores_RV, rest), fewer, wider):
            yield [rest[place] for place in places], choice


def _shortlist(
    scores_RV: Tensor, maxima_RB: Tensor, params: Sequence[SamplingParams], width: int
) -> tuple[Choice, list[bool]]:
    """What rows draw from if it is among the `width` likeliest tokens, and whether it is."""
    cut = _Cut.make(maxima_RB, params, scores_RV.shape[1])
    values_RK, ids_RK = largest(scores_RV, maxima_RB, width)
    total_R1 = None
    if any(p.top_p < 1 and not 0 < p.top_k < scores_RV.shape[1] for p in params):
        total_R1 = block_sums(cut.weights(scores_RV)).sum(-1, keepdim=True)
    limits_R1 = cut.limits(values_RK, total_R1)
    # else more may stay: the mass is not reached yet, or equals of the last one are outside
    is_enough_R1 = values_RK[:, -1:] < limits_R1
    ids_RK, order_RK = ids_RK.sort(-1)
    weights_RK = cut.weights(values_RK).masked_fill_(values_RK < limits_R1, 0).gather(1, order_RK)
    return Choice(_cut_unlikely(weights_RK, params), ids_RK), is_enough_R1[:, 0].tolist()


def _weigh(scores_RV: Tensor, maxima_RB: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Weights of all tokens (R, V), however many stay."""
    cut = _Cut.make(maxima_RB, params, scores_RV.shape[1])
    weights_RV = cut.weights(scores_RV)
    if rows := [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]:
        some_RV, total_R1 = pick(scores_RV, rows), block_sums(pick(weights_RV, rows)).sum(-1, keepdim=True)
        limits_R1 = cut.of(rows).limits(descending(some_RV), total_R1)
        weights_RV[rows] = pick(weights_RV, rows).masked_fill_(some_RV < limits_R1, 0)
    return _cut_unlikely(weights_RV, params)


@dataclass(frozen=True)
class _Cut:
    """Knobs and likeliest scores of rows, (R, 1) each."""

    k_R1: Tensor  # at most V
    p_R1: Tensor
    heat_R1: Tensor
    peak_R1: Tensor

    @classmethod
    def make(cls, maxima_RB: Tensor, params: Sequence[SamplingParams], vocab_size: int) -> _Cut:
        """From the maxima of the rows' blocks."""
        like = maxima_RB
        ks = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=like.device)
        ps = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=like.device)
        heat_R1 = _column([max(p.temperature, _COLDEST) for p in params], like)
        return cls(ks[:, None], ps[:, None], heat_R1, maxima_RB.amax(-1, keepdim=True))

    def of(self, rows: Sequence[int]) -> _Cut:
        """The same for some rows."""
        return _Cut(*(pick(x_R1, rows) for x_R1 in (self.k_R1, self.p_R1, self.heat_R1, self.peak_R1)))

    def weights(self, scores_RC: Tensor) -> Tensor:
        """Probabilities but for a factor per row: 1 for the likeliest token."""
        return (scores_RC - self.peak_R1).div_(self.heat_R1).exp_()

    def limits(self, sorted_RK: Tensor, total_R1: Tensor | None) -> Tensor:
        """From the K largest scores in order: the lowest one that stays; the last of them where K are too few to tell.

        total: the weight of all tokens, for rows with top-p and without top-k.
        """
        count = sorted_RK.shape[1]
        last_R1 = self.k_R1.clamp_max(count) - 1
        mass_RK = self.weights(sorted_RK).double().cumsum(-1)
        kept_R1 = mass_RK.gather(1, last_R1)
        if total_R1 is not None:
            kept_R1 = torch.where(self.k_R1 <= count, kept_R1, total_R1)
        wanted_R1 = torch.where(self.p_R1 < 1, self.p_R1 * kept_R1, torch.inf)
        # token i stays while the mass before it is less than wanted
        index_R1 = torch.minimum((mass_RK < wanted_R1).sum(-1, keepdim=True), last_R1)
        return sorted_RK.gather(1, index_R1)


def _cut_unlikely(weights_RC: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Min-p and typical, in place."""
    if any(p.min_p for p in params):
        weights_RC.masked_fill_(weights_RC < _column([p.min_p for p in params], weights_RC), 0)
    if rows := [row for row, p in enumerate(params) if p.typical_p < 1]:
        mass_R1 = _column([params[row].typical_p for row in rows], weights_RC).double()
        weights_RC[rows] = _typical(pick(weights_RC, rows), mass_R1)
    return weights_RC


def _typical(weights_RC: Tensor, mass_R1: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the expected one (the entropy), up to this mass. Sorts: slow."""
    share_RC = weights_RC / block_sums(weights_RC).sum(-1, keepdim=True).float()
    log_RC = share_RC.log()
    entropy_R1 = -block_sums(torch.where(share_RC > 0, share_RC * log_RC, 0.0)).sum(-1, keepdim=True).float()
    distance_RC = (-log_RC - entropy_R1).abs_()
    order_RC = ascending_order(distance_RC)
    mass_RC = share_RC.gather(1, order_RC).cumsum(-1, dtype=torch.float64)
    last_R1 = (mass_RC < mass_R1).sum(-1, keepdim=True).clamp_max_(weights_RC.shape[1] - 1)
    limit_R1 = distance_RC.gather(1, order_RC.gather(1, last_R1))
    return weights_RC.masked_fill(distance_RC > limit_R1, 0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
