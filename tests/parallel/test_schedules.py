"""Schedules: torch's own orders, the bubbles of the papers, and what cannot run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed.pipelining.schedules as theirs

from puna.base.console import PunaError
from puna.parallel.schedules import SCHEDULES, Event, Timeline, default_stages, order, rank_of, simulate, summary

SIZES = [(2, 4), (3, 6), (4, 8), (4, 12), (8, 16)]
KIND = {theirs.FORWARD: "F", theirs.BACKWARD_INPUT: "I", theirs.BACKWARD_WEIGHT: "W", theirs.FULL_BACKWARD: "B"}
CLASSES = {
    "interleaved": theirs.ScheduleInterleaved1F1B,
    "zbv": theirs.ScheduleZBVZeroBubble,
    "dualpipev": theirs.ScheduleDualPipeV,
}


def torchs(schedule: str, rank: int, ranks: int, microbatches: int, stages: int) -> list[tuple[str, int, int]]:
    """The order torch would run, waits left out and pairs opened; needs no process group."""
    rounds = max(1, microbatches // ranks)
    self = SimpleNamespace(
        pp_group_size=ranks, _n_microbatches=microbatches, num_stages=ranks * stages, n_local_stages=stages,
        number_of_rounds=rounds, microbatches_per_round=microbatches // rounds,
    )  # fmt: skip
    actions = CLASSES[schedule]._calculate_single_rank_operations(self, rank)
    single = [part for action in actions if action is not None for part in (action.sub_actions or (action,))]
    return [(KIND[a.computation_type], a.stage_index, a.microbatch_index) for a in single]


@pytest.mark.parametrize("schedule", CLASSES)
@pytest.mark.parametrize(("ranks", "microbatches"), [*SIZES, (1, 3), (4, 10), (3, 2)])
def test_orders_are_torchs(schedule: str, ranks: int, microbatches: int) -> None:
    if schedule == "dualpipev" and microbatches < 2 * ranks:
        pytest.skip("dualpipev needs 2 x pp microbatches")
    for stages in (2, 3) if schedule == "interleaved" else (2,):
        mine = order(schedule, ranks, microbatches, stages)
        for rank in range(ranks):
            assert mine[rank] == torchs(schedule, rank, ranks, microbatches, stages)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_every_chunk_is_computed_once_and_after_its_inputs(schedule: str, ranks: int, microbatches: int) -> None:
    line = simulate(schedule, ranks, microbatches)
    stages = ranks * default_stages(schedule)
    end: dict[tuple[str, int, int], float] = {}
    for event in line.events:
        for kind in {"F": "F", "I": "I", "W": "W", "B": "IW"}[event.kind]:
            assert end.setdefault((kind, event.stage, event.microbatch), event.end) == event.end
        assert event.rank == rank_of(schedule, event.stage, ranks)
    assert len(end) == 3 * stages * microbatches
    for event in line.events:
        before = {"F": ("F", event.stage - 1), "W": ("I", event.stage)}.get(event.kind, ("I", event.stage + 1))
        assert end.get((*before, event.microbatch), 0.0) <= event.start


@pytest.mark.parametrize(("ranks", "microbatches"), [*SIZES, (8, 64), (16, 16), (5, 7)])
def test_gpipe_and_1f1b_bubble_is_exactly_the_formula(ranks: int, microbatches: int) -> None:
    """(K - 1) / (K - 1 + M), GPipe (arXiv:1811.06965) section 3; 1F1B changes memory, not time."""
    for schedule in ("gpipe", "1f1b"):
        if schedule == "gpipe" or microbatches >= ranks:
            for times in ((1.0, 1.0, 1.0), (1.0, 1.5, 1.0)):
                bubble = simulate(schedule, ranks, microbatches, 0, *times).bubble
                assert bubble == pytest.approx((ranks - 1) / (ranks - 1 + microbatches), abs=1e-12)


@pytest.mark.parametrize(("ranks", "microbatches", "stages"), [(2, 4, 2), (4, 8, 2), (4, 12, 3), (8, 32, 4)])
def test_interleaving_divides_the_bubble_by_the_stages(ranks: int, microbatches: int, stages: int) -> None:
    """Wait over work is (K - 1) / (v M): arXiv:2104.04473, section 2.2."""
    line = simulate("interleaved", ranks, microbatches, stages)
    assert (line.makespan - line.work) / line.work == pytest.approx((ranks - 1) / (stages * microbatches))


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_zbv_has_no_bubble_between_a_ranks_first_and_last_event(ranks: int, microbatches: int) -> None:
    """Zero with equal F, B, W and 2 K or more microbatches: arXiv:2401.10241, section 6. Memory is 1F1B's: 2 K half
    stages on every rank. Where all ranks must meet at the end, the last to start still costs its K - 1 forwards."""
    line = simulate("zbv", ranks, microbatches)
    assert line.idle_inside == 0
    assert line.makespan - line.work == ranks - 1
    assert line.in_flight() == [2 * ranks] * ranks
    assert simulate("1f1b", ranks, microbatches).idle_inside == 3 * (ranks - 1)  # (K-1)(F + B + W), the paper's table


@pytest.mark.parametrize(("ranks", "microbatches"), [*SIZES, (4, 16), (8, 20)])
def test_dualpipev_bubble_is_the_reports(ranks: int, microbatches: int) -> None:
    """(PP/2 - 1)(F&B + B - 3 W), arXiv:2412.19437, table 2, with PP = 2 K (the V folds two devices into one)."""
    together, backward, weight = 3.0, 2.0, 1.0
    line = simulate("dualpipev", ranks, microbatches, 0, 1.0, backward - weight, weight, together)
    assert line.makespan - line.work == pytest.approx((ranks - 1) * (together + backward - 3 * weight))
    assert max(line.in_flight()) == 2 * ranks + 1  # PP + 1


def test_memory_order_of_the_schedules() -> None:
    """GPipe holds every microbatch, 1F1B as many as stages are behind."""
    assert simulate("gpipe", 4, 8).in_flight() == [8, 8, 8, 8]
    assert simulate("1f1b", 4, 8).in_flight() == [4, 3, 2, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 2.0, 1.0)])
def test_summary_equals_the_simulation_for_many_microbatches(schedule: str, times: tuple[float, ...]) -> None:
    for ranks, microbatches in ((4, 64), (4, 66), (3, 50), (8, 96)):
        if schedule == "interleaved" and microbatches % (microbatches // ranks):
            continue
        line = simulate(schedule, ranks, microbatches, 0, *times)
        bubble, flight = summary(schedule, ranks, microbatches, 0, *times)
        assert bubble == pytest.approx(line.bubble, abs=1e-9)
        assert list(flight) == line.in_flight()


def test_busy_time_counts_a_pair_once() -> None:
    line = Timeline((Event(0, "F", 0, 1, 0.0, 3.0), Event(0, "B", 1, 0, 0.0, 3.0)), 1)
    assert line.work == 3


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches", "stages", "hint"),
    [
        ("zigzag", 2, 4, 1, "gpipe"),
        ("dualpipev", 4, 7, 2, "--parallel.pp_microbatches 8"),
        ("1f1b", 4, 3, 1, "--parallel.pp_microbatches 4"),
        ("interleaved", 4, 9, 2, "--parallel.pp_microbatches 8"),
        ("zbv", 4, 8, 3, "--parallel.pp_stages_per_rank 2"),
    ],
)
def test_what_cannot_run_is_refused(schedule: str, ranks: int, microbatches: int, stages: int, hint: str) -> None:
    with pytest.raises(PunaError) as error:
        order(schedule, ranks, microbatches, stages)
    assert hint in error.value.hint
