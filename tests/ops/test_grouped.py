"""ops/grouped.py: low-rank products for rows of several adapters, against the twin that goes row by row."""

from __future__ import annotations

import random

import pytest
import torch

from puna.ops.grouped import LowRankStack, RowGroups, add_low_rank, add_low_rank_twin

INPUTS, OUTPUTS = 48, 40
RANKS = {1: 4, 2: 16, 3: 1, 5: 8}  # by slot; 4 is free


def filled(outputs=OUTPUTS, ranks=RANKS, dtype=torch.float32) -> LowRankStack:
    stack = LowRankStack(outputs, INPUTS, dtype, torch.device("cpu"))
    for slot, rank in ranks.items():
        stack.put(slot, torch.randn(rank, INPUTS), torch.randn(outputs, rank), 0.5)
    stack.reserve(7)
    return stack


def added(slots, y_TN, x_TK, stack) -> torch.Tensor:
    y_TN, groups = y_TN.clone(), RowGroups.of(slots)
    assert groups is not None
    add_low_rank([y_TN], x_TK, [stack], groups)
    return y_TN


BATCHES = {
    "one row": [2], "one adapter": [2] * 9, "in order": [1, 1, 2, 2, 3, 3], "mixed": [5, 0, 1, 2, 0, 5, 3, 1, 1],
    "not neighbours": [5, 1, 5, 1, 0], "a prompt among tokens": [1, *[2] * 70, 3, 0, 5, 1], "base before": [0, 0, 2, 2],
    "many of each": [slot for slot in (1, 2, 3, 5) for _ in range(10 + slot)], "unknown here": [4, 6, 1, 4],
}  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES)
def test_as_the_twin(batch):
    slots, stack = BATCHES[batch], filled()
    x, y = torch.randn(len(slots), INPUTS), torch.randn(len(slots), OUTPUTS)
    expected = y.double()
    add_low_rank_twin(expected, x, stack, slots)
    torch.testing.assert_close(added(slots, y, x, stack).double(), expected, rtol=1e-5, atol=1e-4)


def test_scaling_is_in():
    stack = LowRankStack(OUTPUTS, INPUTS, torch.float32, torch.device("cpu"))
    down, up, x = torch.randn(3, INPUTS), torch.randn(OUTPUTS, 3), torch.randn(1, INPUTS)
    stack.put(1, down, up, 0.25)
    torch.testing.assert_close(added([1], torch.zeros(1, OUTPUTS), x, stack), 0.25 * x @ down.T @ up.T)


def test_a_row_is_the_same_whatever_stands_beside_it():
    stack, draw = filled(), random.Random(0)
    x, y = torch.randn(60, INPUTS), torch.randn(60, OUTPUTS)
    alone = {
        (row, slot): added([slot], y[row : row + 1], x[row : row + 1], stack)[0] for row in range(60) for slot in RANKS
    }
    for _ in range(20):
        rows = draw.sample(range(60), draw.randrange(1, 60))
        weights = [draw.random() ** 3 for _ in range(5)]
        slots = [1, *draw.choices([0, *RANKS], weights, k=len(rows) - 1)]
        together = added(slots, y[rows], x[rows], stack)
        for row, slot, one in zip(rows, slots, together, strict=True):
            if slot:
                torch.testing.assert_close(one, alone[row, slot], rtol=1e-6, atol=1e-5)
            else:
                assert torch.equal(one, y[row])


def test_nan_stays_in_its_row():
    stack, slots = filled(), [1, 2, 0, 1, 2, 2]
    x, y = torch.randn(6, INPUTS), torch.randn(6, OUTPUTS)
    clean = added(slots, y, x, stack)
    x[1, 3] = float("nan")
    broken = added(slots, y, x, stack)
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]])


def test_several_outputs_of_one_input():
    slots, stacks = [2, 0, 3, 1, 2], [filled(), None, filled(24, {3: 2})]
    x, outputs = torch.randn(5, INPUTS), [torch.randn(5, width) for width in (OUTPUTS, 16, 24)]
    expected = [y.clone() for y in outputs]
    for y, stack in zip(expected, stacks, strict=True):
        if stack:
            add_low_rank_twin(y, x, stack, slots)
    groups = RowGroups.of(torch.tensor(slots).numpy())
    assert groups is not None
    assert groups.slots == {1, 2, 3}
    add_low_rank(outputs, x, stacks, groups)
    for y, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-4)


def test_bf16_and_outputs_with_a_stride():
    stack, slots = filled(dtype=torch.bfloat16), [5, 5, 1, 0, 2]
    x, wide = torch.randn(5, INPUTS).bfloat16(), torch.zeros(5, 2 * OUTPUTS, dtype=torch.bfloat16)
    expected = torch.zeros(5, OUTPUTS, dtype=torch.float64)
    add_low_rank_twin(expected, x, stack, slots)
    for batch in (slots, [5] * 5):
        y = wide.clone()[:, :OUTPUTS]
        groups = RowGroups.of(batch)
        assert groups is not None
        add_low_rank([y], x, [stack], groups)
        rows = [0, 1] if batch is not slots else range(5)
        torch.testing.assert_close(y[rows].double(), expected[rows], rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_padding_is_less_than_the_rows():
    """A prompt of 300 rows beside single tokens does not make 300 of each of them."""
    slots = [1] * 300 + [2, 3, 4, 5] * 3 + [6] * 40 + [7] * 60
    groups = RowGroups.of(slots)
    assert groups is not None
    assert sum(block.gather_SC.numel() for block in groups.blocks) < 2 * len(slots)
    assert [block.slots for block in groups.blocks] == [(2, 3, 4, 5), (6, 7), (1,)]


def test_no_adapter_is_no_group():
    assert RowGroups.of([0, 0]) is None
    assert RowGroups.of([]) is None


def test_a_stack_grows_and_forgets():
    stack = filled(ranks={1: 4})
    first = stack.down_SRK[1, :4].clone()
    stack.put(9, torch.randn(20, INPUTS), torch.randn(OUTPUTS, 20), 1.0)
    assert torch.equal(stack.down_SRK[1, :4], first)
    assert not stack.down_SRK[1, 4:].any()
    assert stack.down_SRK.shape[:2] == stack.up_SRN.shape[:2] == (14, 20)  # twice 7
    assert stack.nbytes == 14 * 20 * (INPUTS + OUTPUTS) * 4
    stack.drop(9)
    stack.drop(3)
    assert stack.held == {1}
    x, y = torch.randn(2, INPUTS), torch.randn(2, OUTPUTS)
    together = added([9, 1], y, x, stack)
    assert torch.equal(together[0], y[0])
    assert not torch.equal(together[1], y[1])
    with pytest.raises(AssertionError, match="slot 1"):
        stack.put(1, torch.randn(4, INPUTS), torch.randn(OUTPUTS, 4), 1.0)
