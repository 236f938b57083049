"""What is learnt of steps and of proposals; what follows from it is tested in test_speculative."""

from __future__ import annotations

import pytest

from puna.engine.speculate.pace import Acceptance, StepTime


def test_step_time_finds_the_two_costs_and_forgives_interruptions() -> None:
    step_time = StepTime()
    step_time.add(4, 1.4)
    assert step_time.of(4) == pytest.approx(1.4)
    assert 0 < step_time.fit()[1] < 0.2  # one size says nothing of rows: a guess
    for step, rows in enumerate([1, 4, 9] * 40):
        step_time.add(rows, (2 + 0.5 * rows) * (1 if step % 2 else 1.9))
    assert step_time.fit() == pytest.approx((2, 0.5), rel=0.1)
    step_time.add(9, 1000.0)
    assert step_time.of(9) < 1.1 * 6.5
    for rows in [2, 4] * 1000:
        step_time.add(rows, 1.0)
    fixed, row = step_time.fit()
    assert row == pytest.approx(0.002, rel=0.01)  # never free
    assert fixed + 3 * row == pytest.approx(1, rel=1e-3)


def test_one_interrupted_step_does_not_make_rows_dear() -> None:
    step_time = StepTime()
    for rows, seconds in [(1, 1.1)] * 9 + [(2, 5.0)]:
        step_time.add(rows, seconds)
    fixed, row = step_time.fit()
    assert 0.05 < row / fixed < 0.5


def test_step_time_remembers_what_rows_cost_while_all_steps_are_equal() -> None:
    step_time = StepTime()
    for rows in [1, 4] * 50 + [1] * 1000:
        step_time.add(rows, 2 + 0.5 * rows)
    assert step_time.fit() == pytest.approx((2, 0.5))


def test_rows_that_cost_whole_steps_are_tried_again_some_day() -> None:
    step_time = StepTime()
    for rows in [1, 4] * 50:
        step_time.add(rows, rows)
    assert step_time.fit()[0] == pytest.approx(0, abs=0.2)
    for _ in range(1000):
        step_time.add(1, 1)
    fixed, row = step_time.fit()
    assert fixed == pytest.approx(0.5 * row)


def test_acceptance_by_place() -> None:
    found = Acceptance(floor=0.01)
    for _ in range(500):
        found.add(3, 2)
        found.add(3, 0)
        found.add(1, 1)
    assert found.share == pytest.approx([2 / 3, 1, 0], abs=0.05)
