"""A batch: windows of a token array laid end to end on one token axis, with their document boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from puna.ops.attention import PackedCausal
from puna.ops.basic import IGNORE


@dataclass(frozen=True)
class Batch:
    """What a training step eats. Shapes: all (T,) int64; positions restart in every document and window.

    `attend` keeps documents apart; `valid` counts the targets that are scored.
    """

    tokens_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    attend: PackedCausal
    valid: int

    def to(self, device: torch.device) -> Batch:
        tokens, positions, targets = (
            x.to(device, non_blocking=True) for x in (self.tokens_T, self.positions_T, self.targets_T)
        )
        return Batch(tokens, positions, targets, self.attend, self.valid)


def pack(tokens: np.ndarray, starts: np.ndarray, offsets: Sequence[int], length: int) -> Batch:
    """Windows tokens[o : o + length] with their next tokens as targets.

    A document's last token has no target (the next one belongs to a stranger), and attention, like positions, begins
    anew where a document begins.
    """
    rows = np.asarray(offsets)[:, None] + np.arange(length + 1)
    ids = tokens[rows].astype(np.int64)
    begins = _is_start(starts, rows)
    targets = np.where(begins[:, 1:], IGNORE, ids[:, 1:])
    begins = begins[:, :-1]
    begins[:, 0] = True
    flat = begins.reshape(-1)
    first = np.flatnonzero(flat)
    lengths = np.diff(np.append(first, flat.size))
    positions = np.arange(flat.size) - np.repeat(first, lengths)
    return Batch(
        tokens_T=torch.from_numpy(ids[:, :-1].reshape(-1).copy()),
        positions_T=torch.from_numpy(positions),
        targets_T=torch.from_numpy(targets.reshape(-1)),
        attend=PackedCausal.of(lengths.tolist()),
        valid=int((targets != IGNORE).sum()),
    )


def _is_start(starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Does a document begin at each of these token offsets? `starts` is sorted."""
    place = np.searchsorted(starts, rows)
    return starts[np.minimum(place, len(starts) - 1)] == rows
