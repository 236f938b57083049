"""Rows of logits to tokens, all rows of a step together. Shapes: R rows, V vocabulary, K of the likeliest.

The order of operations, for each row by itself:

1. repetition, then presence and frequency penalties (formulas of CTRL, arXiv:1909.05858, and of OpenAI's API);
2. logit_bias is added; then min_tokens and the token mask forbid;
3. division by the temperature (0: the likeliest token, of equal ones the lowest id, and none of what follows);
4. top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751), min-p (Nguyen et al. 2024, arXiv:2407.01082), typical (Meister
   et al. 2022, arXiv:2202.00666): the order of transformers; each sees what the one before has left, renormalised.
   Top-k and top-p are thresholds on the logits, so tokens exactly as likely as the last one kept stay too;
5. one token by a race of exponential clocks, the row's own (`randomness`): draws from near distributions by the same
   clocks are mostly the same token.

What a row gets depends on its logits and its answer alone: the same bits in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.engine.request import SamplingParams
from puna.engine.sampling.edits import edit
from puna.engine.sampling.randomness import draw_seeds
from puna.engine.sampling.row_blocks import block_maxima, block_sums, first_largest, largest, pick, view
from puna.engine.sampling.state import Row, SamplingState, Work
from puna.engine.sampling.truncation import choices

_CHUNK = {"cpu": 1 << 19}  # logits worked on at once: scratch memory, and on a CPU what stays in its cache
_CHUNK_ELSEWHERE = 1 << 26


@dataclass
class Draws:
    """A token for every row; -1 for those that `failed` names with their reasons.

    `logprobs` and `top_logprobs` have an entry per row, None for a row that did not ask (or failed).
    """

    token_ids: list[int]
    logprobs: list[float | None] | None = None
    top_logprobs: list[dict[int, float] | None] | None = None
    failed: dict[int, str] = field(default_factory=dict)


class BatchSampler:
    """Draws the tokens of a step. `vocab_size` of them can be drawn; rows may be longer (a padded embedding)."""

    def __init__(self, vocab_size: int, eos_ids: set[int] | frozenset[int] = frozenset()):
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(eos_ids)

    def state(self, params: SamplingParams, prompt_ids: Sequence[int], index: int = 0) -> SamplingState:
        """What the draws of answer `index` need; a seed is drawn if there is none (see SamplingParams.seeded)."""
        return SamplingState(params, prompt_ids, index, self.vocab_size, self.eos_ids)

    @torch.inference_mode()
    def draw(self, logits_RV: Tensor, rows: Sequence[Row]) -> Draws:
        """A token for each row of fp32 logits, which are not changed. States do not move: their `accept` does that."""
        assert len(rows) == len(logits_RV), (len(rows), logits_RV.shape)
        draws = Draws([-1] * len(rows))
        if any(row.state.wants_logprobs for row in rows):
            draws.logprobs, draws.top_logprobs = [None] * len(rows), [None] * len(rows)
        scores_RV = logits_RV[:, : self.vocab_size]
        for (work, _), numbers in _by_work(rows).items():
            if work == Work.PLAIN:
                _take_likeliest(scores_RV, numbers, draws)
                continue
            for some in _chunks(numbers, scores_RV):
                _draw_chunk(scores_RV, some, rows, draws)
        if draws.logprobs is not None:
            self._tell_raw(logits_RV, rows, draws)
        return draws

    def _tell_raw(self, logits_RV: Tensor, rows: Sequence[Row], draws: Draws) -> None:
        asked = [
            number
            for number, (state, _) in enumerate(rows)
            if state.wants_logprobs and state.params.logprobs_mode == "raw" and number not in draws.failed
        ]
        for some in _chunks(asked, logits_RV):
            chunk_RV = view(logits_RV, some)
            _tell(draws, some, rows, chunk_RV[:, : self.vocab_size], _log_mass(chunk_RV))


def logprobs_of(
    logits_RV: Tensor, target_ids_R: Sequence[int], top: int, vocab_size: int | None = None
) -> tuple[list[float], list[dict[int, float]]]:
    """log p of a target per row under the model itself, and the `top` likeliest of every row: for a prompt's tokens.

    vocab_size: only lower ids are told among the likeliest. NaN where the logits are not finite.
    """
    logprobs: list[float] = []
    tops: list[dict[int, float]] = []
    for some in _chunks(range(len(target_ids_R)), logits_RV):
        chunk_RV = logits_RV[some[0] : some[-1] + 1]
        mass_R1 = _log_mass(chunk_RV)
        targets_R1 = torch.tensor([target_ids_R[number] for number in some], device=chunk_RV.device)[:, None]
        logprobs += (chunk_RV.gather(1, targets_R1).double() - mass_R1)[:, 0].tolist()
        tops += _likeliest(chunk_RV[:, :vocab_size], mass_R1, top) if top else [{} for _ in some]
    return logprobs, tops


# Rows of a kind.


def _by_work(rows: Sequence[Row]) -> dict[tuple[Work, int], list[int]]:
    """Numbers of the rows with the same kind of work."""
    groups: dict[tuple[Work, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row.state.work, row.state.short_width), []).append(number)
    return groups


def _chunks(numbers: Sequence[int], x_RV: Tensor) -> Iterator[Sequence[int]]:
    size = max(1, _CHUNK.get(x_RV.device.type, _CHUNK_ELSEWHERE) // x_RV.shape[1])
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _take_likeliest(scores_RV: Tensor, numbers: Sequence[int], draws: Draws) -> None:
    """Greedy rows without a knob: their logits are only read."""
    if len(numbers) < len(scores_RV):
        scores_RV = view(scores_RV, numbers)
    values_R, ids_R = first_largest(scores_RV, block_maxima(scores_RV))
    for number, token, value in zip(numbers, ids_R.tolist(), values_R.tolist(), strict=True):
        if math.isfinite(value):
            draws.token_ids[number] = token
        else:
            draws.failed[number] = _reason(value)


def _draw_chunk(scores_RV: Tensor, numbers: Sequence[int], rows: Sequence[Row], draws: Draws) -> None:
    """Rows of one kind of work; the logits of all rows are only read."""
    chunk = [rows[number] for number in numbers]
    scores_RV, failed = _prepare(scores_RV, numbers, chunk)
    draws.failed.update({numbers[place]: reason for place, reason in failed.items()})
    if chunk[0].state.is_greedy:
        ids_R = first_largest(scores_RV, block_maxima(scores_RV))[1]
        _settle(draws, numbers, ids_R)
        if asked := _asked_processed(draws, numbers, rows):  # of temperature 1: of 0 there would be nothing to tell
            some_RV = pick(scores_RV, asked)
            _tell(draws, [numbers[place] for place in asked], rows, some_RV, _log_mass(some_RV))
        return
    seeds_R = draw_seeds([row.state.key for row in chunk], [row.position for row in chunk], scores_RV.device)
    for places, choice in choices(scores_RV, [row.state.params for row in chunk], chunk[0].state.short_width):
        some = [numbers[place] for place in places]
        _settle(draws, some, choice.draw(seeds_R[places]))
        if asked := _asked_processed(draws, some, rows):
            weights_RC, ids_RC = choice.of(asked)
            log_mass_R1 = block_sums(weights_RC).sum(-1, keepdim=True).log()
            _tell(draws, [some[place] for place in asked], rows, weights_RC.log(), log_mass_R1, ids_RC)


def _settle(draws: Draws, numbers: Sequence[int], ids_R: Tensor) -> None:
    for number, token in zip(numbers, ids_R.tolist(), strict=True):
        if number not in draws.failed:
            draws.token_ids[number] = token


def _asked_processed(draws: Draws, numbers: Sequence[int], rows: Sequence[Row]) -> list[int]:
    """Places in `numbers` of rows that want processed log-probabilities."""
    wanted = [place for place, number in enumerate(numbers) if rows[number].state.tells_processed]
    return [place for place in wanted if numbers[place] not in draws.failed]


def _prepare(scores_RV: Tensor, numbers: Sequence[int], chunk: Sequence[Row]) -> tuple[Tensor, dict[int, str]]:
    """Scores of some rows after penalties, bias and masks, a copy if there are any; reasons of those that fail."""
    if not chunk[0].state.is_edited:
        return _fence(view(scores_RV, numbers), _reason)
    scores_RV, failed = _fence(pick(scores_RV, numbers), _reason)
    failed |= edit(scores_RV, chunk, failed)
    scores_RV, empty = _fence(scores_RV, lambda _: "no token is left: mask, bias and min_tokens forbid all")
    return scores_RV, empty | failed  # an earlier reason says more


# Failures stay in their row.


def _reason(peak: float) -> str:
    return f"the model's logits are not finite (the largest is {peak})"


def _fence(scores_RV: Tensor, reason: Callable[[float], str]) -> tuple[Tensor, dict[int, str]]:
    """Rows whose largest score is NaN or infinite, with their reason; in a copy they are zeros, which trip nothing."""
    peaks = block_maxima(scores_RV).amax(-1).tolist()
    failed = {place: reason(peak) for place, peak in enumerate(peaks) if not math.isfinite(peak)}
    if failed:
        scores_RV = scores_RV.clone()
        scores_RV[list(failed)] = 0
    return scores_RV, failed


# Log-probabilities.


def _log_mass(scores_RV: Tensor) -> Tensor:
    """log of the sum of exp (R, 1), in fp64."""
    peak_R1 = block_maxima(scores_RV).amax(-1, keepdim=True)
    return block_sums((scores_RV - peak_R1).exp_()).sum(-1, keepdim=True).log() + peak_R1


def _likeliest(scores_RC: Tensor, log_mass_R1: Tensor, k: int, ids_RC: Tensor | None = None) -> list[dict[int, float]]:
    """The k likeliest tokens of each row with their log-probabilities; fewer where fewer are possible."""
    values_RK, ids_RK = largest(scores_RC, block_maxima(scores_RC), min(k, scores_RC.shape[1]))
    if ids_RC is not None:
        ids_RK = ids_RC.gather(1, ids_RK)
    tops = []
    for ids, values in zip(ids_RK.tolist(), (values_RK.double() - log_mass_R1).tolist(), strict=True):
        tops.append({token: value for token, value in zip(ids, values, strict=True) if value > -math.inf})
    return tops


def _tell(
    draws: Draws,
    numbers: Sequence[int],
    rows: Sequence[Row],
    scores_RC: Tensor,
    log_mass_R1: Tensor,
    ids_RC: Tensor | None = None,
) -> None:
    """Fill in what these rows asked for; log p = score - log mass. ids: of the scores, if they are not all tokens'."""
    assert draws.logprobs is not None
    assert draws.top_logprobs is not None
    chosen_R1 = torch.tensor([draws.token_ids[number] for number in numbers], device=scores_RC.device)[:, None]
    if ids_RC is not None:
        chosen_R1 = torch.searchsorted(ids_RC, chosen_R1)
    found = (scores_RC.gather(1, chosen_R1).double() - log_mass_R1)[:, 0].tolist()
    places_of: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        draws.logprobs[number] = found[place]
        draws.top_logprobs[number] = {}
        places_of.setdefault(rows[number].state.params.logprobs or 0, []).append(place)
    for k, places in places_of.items():
        if k:
            some_ids = None if ids_RC is None else pick(ids_RC, places)
            some_RC = scores_RC if len(places) == len(numbers) else pick(scores_RC, places)
            tops = _likeliest(some_RC, pick(log_mass_R1, places), k, some_ids)
            for place, top in zip(places, tops, strict=True):
                draws.top_logprobs[numbers[place]] = top
