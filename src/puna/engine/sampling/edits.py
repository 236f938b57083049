"""What changes scores before a token is chosen: penalties, bias, tokens that are forbidden.

Shapes: R rows, V vocabulary, N places (row, token).

All rows of a step at once, over lists of places: the cost grows with the tokens concerned, not with V.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from puna.engine.sampling.state import Row


def edit(scores_RV: Tensor, rows: Sequence[Row], failed: dict[int, str]) -> dict[int, str]:
    """Change the scores as the answers' knobs say; reasons of rows whose mask could not be had."""
    _penalize(scores_RV, [(place, row) for place, row in enumerate(rows) if row.state.seen is not None])
    biased = [(place, row.state) for place, row in enumerate(rows) if len(row.state.bias_ids)]
    if biased:
        places_N, ids_N = _index([(place, state.bias_ids) for place, state in biased], scores_RV)
        values = np.concatenate([state.bias_values for _, state in biased])
        scores_RV[places_N, ids_N] += torch.from_numpy(values).to(scores_RV.device)
    early = [
        (place, row.state.min_tokens_ids)
        for place, row in enumerate(rows)
        if len(row.state.min_tokens_ids) and row.position < row.state.params.min_tokens
    ]
    if early:
        scores_RV[_index(early, scores_RV)] = -torch.inf
    masked = [place for place, row in enumerate(rows) if row.state.said is not None and place not in failed]
    reasons = {place: _mask(scores_RV[place], rows[place]) for place in masked}
    return {place: reason for place, reason in reasons.items() if reason}


def _index(pairs: Sequence[tuple[int, np.ndarray]], x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(row, ids) pairs as two long index tensors."""
    places = np.repeat([place for place, _ in pairs], [len(ids) for _, ids in pairs])
    ids = np.concatenate([ids for _, ids in pairs])
    return torch.from_numpy(places).to(x_RV.device), torch.from_numpy(ids).to(x_RV.device)


def _penalize(scores_RV: Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    if not rows:
        return
    seen = [row.state.seen.with_extra(row.extra) for _, row in rows if row.state.seen is not None]
    index = _index([(place, ids) for (place, _), (ids, _) in zip(rows, seen, strict=True)], scores_RV)
    knobs = [
        (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in (row.state.params for _, row in rows)
    ]
    each = np.repeat(np.array(knobs, np.float32), [len(ids) for ids, _ in seen], axis=0)
    repetition_N, presence_N, frequency_N = torch.from_numpy(each).to(scores_RV.device).unbind(1)
    counts_N = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(scores_RV.device)
    values_N = scores_RV[index]
    values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
    scores_RV[index] = values_N - (presence_N * (counts_N > 0) + frequency_N * counts_N)


def _mask(scores_V: Tensor, row: Row) -> str | None:
    """Forbid what the row's mask does not allow; why the row fails, if it does."""
    assert row.state.params.token_mask is not None
    assert row.state.said is not None
    try:
        allowed_V = row.state.params.token_mask.allowed((*row.state.said, *row.extra))
        if allowed_V is not None:
            scores_V.masked_fill_(~allowed_V[: len(scores_V)].to(scores_V.device), -torch.inf)
    except Exception as error:  # foreign code: its fault stays in its own request
        return f"the token mask failed: {type(error).__name__}: {error}"
    return None
