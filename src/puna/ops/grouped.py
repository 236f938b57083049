"""Low-rank products for rows of several adapters in one batch: y += (x A_s^T) B_s, s the slot of the row.

Rows are sorted by slot, and slots with about as many rows form a block: two batched products each, the shorter slots
padded with copies of their own last row, whose results nobody takes.

    slots 2 0 1 2   ->   one block: slots (1, 2), rows ((2, 2), (0, 3))   row 1 has no adapter and is not touched

Measured (benchmarks/adapters.py, Zen 4): 2 to 4 times as fast as two products per slot where 32 rows have 4 or 32
adapters, as fast where they have one. From 4 adapters on, A and B copied for every row, or one wide product of which
most is set to 0, are slower.
Idea: Chen et al. 2023 (Punica), arXiv:2310.18547, whose kernel gathers segments on a GPU.
Shapes: T rows, K inputs, N outputs, S slots, R rank, C rows of a slot, P rows of a block. Slot 0 adds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_FEW = 8  # slots with at most so many rows share a block: reading A and B costs more than the padding


class LowRankStack:
    """A and B of one linear layer for every slot, padded with zeros to the largest rank; it grows.

    down_SRK holds A, up_SRN the transposed B times its scaling. `held` are the slots that are filled.
    """

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device):
        self.down_SRK = torch.zeros(0, 0, inputs, dtype=dtype, device=device)
        self.up_SRN = torch.zeros(0, 0, outputs, dtype=dtype, device=device)
        self.held: frozenset[int] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes that are held, unused slots and the padding included."""
        return self.down_SRK.nbytes + self.up_SRN.nbytes

    def put(self, slot: int, down_RK: Tensor, up_NR: Tensor, scaling: float) -> None:
        """Fill a slot: the numbers are copied; `scaling` is multiplied in before they are rounded to the dtype."""
        assert slot not in {0, *self.held}, f"slot {slot}, of {sorted(self.held)}"
        rank = down_RK.shape[0]
        self.reserve(slot + 1, rank)
        self.down_SRK[slot, :rank] = down_RK
        self.up_SRN[slot, :rank] = (up_NR.double() * scaling).t()
        self.held |= {slot}

    def drop(self, slot: int) -> None:
        """Empty a slot."""
        if slot in self.held:
            self.down_SRK[slot], self.up_SRN[slot] = 0, 0
            self.held -= {slot}

    def reserve(self, slots: int, rank: int = 0) -> None:
        """Room for at least so many slots, 0 among them: for all that may occur in a batch, held here or not.

        Slots grow by doubling, so that many loads copy little; the rank to the largest as it is.
        """
        here, ranks = self.down_SRK.shape[:2]
        if slots > here or rank > ranks:
            slots, rank = here if slots <= here else max(slots, 2 * here), max(rank, ranks)
            self.down_SRK, self.up_SRN = _padded(self.down_SRK, slots, rank), _padded(self.up_SRN, slots, rank)


def _padded(stack_SRX: Tensor, slots: int, rank: int) -> Tensor:
    grown = stack_SRX.new_zeros(slots, rank, stack_SRX.shape[2])
    grown[: stack_SRX.shape[0], : stack_SRX.shape[1]] = stack_SRX
    return grown


@dataclass(frozen=True)
class _Block:
    """Slots with about as many rows. first: their rows, unpadded, are those from here on in order, else None.

    Shapes: gather_SC row of every place; keep_P the places that are no padding, None for all; rows_P their rows.
    """

    slots: tuple[int, ...]
    slots_S: Tensor
    gather_SC: Tensor
    keep_P: Tensor | None
    rows_P: Tensor
    first: int | None

    def inputs(self, x_TK: Tensor) -> Tensor:
        """(S, C, K)."""
        slots, rows = self.gather_SC.shape
        picked = x_TK.index_select(0, self.gather_SC.view(-1)) if self.first is None else self._straight(x_TK)
        return picked.view(slots, rows, x_TK.shape[1])

    def add(self, y_TN: Tensor, x_SCK: Tensor, stack: LowRankStack) -> None:
        low_SCR = torch.bmm(x_SCK, self._of(stack.down_SRK).transpose(1, 2))
        up_SRN = self._of(stack.up_SRN)
        if self.first is not None:
            self._straight(y_TN).view(*x_SCK.shape[:2], -1).baddbmm_(low_SCR, up_SRN)
            return
        more_PN = torch.bmm(low_SCR, up_SRN).view(-1, y_TN.shape[1])
        y_TN.index_add_(0, self.rows_P, more_PN if self.keep_P is None else more_PN.index_select(0, self.keep_P))

    def _straight(self, x_TX: Tensor) -> Tensor:
        assert self.first is not None
        return x_TX.narrow(0, self.first, self.rows_P.shape[0])

    def _of(self, stack_SRX: Tensor) -> Tensor:
        """The slots' part of a stack: a view if they are neighbours, else a copy."""
        low, high = self.slots[0], self.slots[-1]
        neighbours = high - low + 1 == len(self.slots)
        return stack_SRX[low : high + 1] if neighbours else stack_SRX.index_select(0, self.slots_S)


@dataclass(frozen=True)
class RowGroups:
    """Which rows of a batch use which slot, worked out once and used by every layer."""

    slots: frozenset[int]
    blocks: tuple[_Block, ...]

    @staticmethod
    def of(slots_T: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> RowGroups | None:
        """From the slot of every row; None if all are 0. `device`: where the rows will be."""
        slots = np.asarray(slots_T, np.int64)
        rows = np.flatnonzero(slots)
        if rows.size == 0:
            return None
        rows = rows[np.argsort(slots[rows], kind="stable")]
        present, firsts, counts = np.unique(slots[rows], return_index=True, return_counts=True)
        sizes = np.ceil(np.log2(np.maximum(counts, _FEW)))  # within a block, more than _FEW rows differ less than twice
        alike = [sizes == size for size in np.unique(sizes)]
        blocks = [_block(rows, present[which], firsts[which], counts[which], device) for which in alike]
        return RowGroups(frozenset(present.tolist()), tuple(blocks))


def _block(
    rows: np.ndarray, slots: np.ndarray, firsts: np.ndarray, counts: np.ndarray, device: torch.device | str
) -> _Block:
    """rows: all that have an adapter, sorted by slot; firsts and counts: where a slot's rows lie in them."""
    place = np.arange(counts.max())
    gather = rows[firsts[:, None] + np.minimum(place, counts[:, None] - 1)]
    real = place < counts[:, None]
    taken = gather[real]
    straight = bool(real.all() and (np.diff(taken) == 1).all())

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    keep = None if real.all() else tensor(np.flatnonzero(real))
    names = tuple(slots.tolist())
    return _Block(names, tensor(slots), tensor(gather), keep, tensor(taken), int(taken[0]) if straight else None)


def add_low_rank(
    outputs: Sequence[Tensor], x_TK: Tensor, stacks: Sequence[LowRankStack | None], groups: RowGroups
) -> None:
    """Add to each (T, N) of `outputs`, in place, what its stack makes of x for the rows that have a slot.

    The outputs are those of layers with one input x (q, k and v): its rows are gathered once. A stack may be None.
    Rows without a slot are not touched. Products in x's dtype, as PEFT; no gradient.
    """
    wanted = [(y, stack) for y, stack in zip(outputs, stacks, strict=True) if stack and stack.held & groups.slots]
    for block in groups.blocks if wanted else ():
        x_SCK = block.inputs(x_TK)
        for y_TN, stack in wanted:
            block.add(y_TN, x_SCK, stack)


def add_low_rank_twin(y_TN: Tensor, x_TK: Tensor, stack: LowRankStack, slots_T: Sequence[int]) -> None:
    """`add_low_rank` row by row, in fp64."""
    for row, slot in enumerate(slots_T):
        if slot in stack.held:
            low_R = stack.down_SRK[slot].double() @ x_TK[row].double()
            y_TN[row] += (low_R @ stack.up_SRN[slot].double()).to(y_TN.dtype)
