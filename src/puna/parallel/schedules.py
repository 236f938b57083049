"""Pipeline schedules as event lists: who computes what when, and how long everyone waits.

K pipeline ranks, M microbatches, v stages on each rank, S = K v stages. An action is one chunk of work of one stage
on one microbatch: F forward, I backward for the input, W backward for the weights, B both at once. The orders are
those of torch.distributed.pipelining (tests/parallel/test_schedules.py compares them); the times follow from the
order and from two dependencies: F needs F of the stage before, I and B need that of the stage behind.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from puna.base.console import PunaError

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv", "dualpipev")
SPLIT_BACKWARD = ("zbv", "dualpipev")  # weights' gradients apart from the inputs'; rank r owns stages r and S - 1 - r

Action = tuple[str, int, int]  # kind, stage, microbatch


@dataclass(frozen=True)
class Event:
    """An action with its place and time (in whatever unit the durations had)."""

    rank: int
    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step: every event of every rank."""

    events: tuple[Event, ...]
    ranks: int

    @property
    def makespan(self) -> float:
        """From the first event of any rank to the last of any: what a step costs, as all ranks meet at its end."""
        return max(event.end for event in self.events)

    @property
    def work(self) -> float:
        """Busy time of the busiest rank; events side by side count once."""
        return max(self._busy(rank) for rank in range(self.ranks))

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank waits; exactly (K-1)/(K-1+M) for GPipe and 1F1B with equal stages."""
        return 1 - self.work / self.makespan

    @property
    def idle_inside(self) -> float:
        """Longest wait of a rank between its own first and last event: the bubble as the zero-bubble paper counts it.

        There ranks do not meet at the end of a step (arXiv:2401.10241, section 4), so late starts cost nothing.
        """
        longest = 0.0
        for rank in range(self.ranks):
            mine = [event for event in self.events if event.rank == rank]
            span = max(event.end for event in mine) - min(event.start for event in mine)
            longest = max(longest, span - self._busy(rank))
        return longest

    def _busy(self, rank: int) -> float:
        return sum(end - start for start, end in {(e.start, e.end) for e in self.events if e.rank == rank})

    def in_flight(self) -> list[int]:
        """Per rank, the most (stage, microbatch) pairs whose activations are alive at once: from F to B or W."""
        alive, most = [0] * self.ranks, [0] * self.ranks
        for event in sorted(self.events, key=lambda event: (event.start, event.end)):
            alive[event.rank] += (event.kind == "F") - (event.kind in "BW")
            most[event.rank] = max(most[event.rank], alive[event.rank])
        return most


def default_stages(schedule: str) -> int:
    """Stages per rank when the recipe says 0: two where the schedule lives from it."""
    return 1 if schedule in ("gpipe", "1f1b") else 2


def rank_of(schedule: str, stage: int, ranks: int) -> int:
    """Which pipeline rank owns a stage: round robin, or there and back again for the V schedules."""
    return min(stage, 2 * ranks - 1 - stage) if schedule in SPLIT_BACKWARD else stage % ranks


def check_schedule(schedule: str, ranks: int, microbatches: int, stages: int) -> None:
    """Raise PunaError where a schedule cannot run with K = `ranks`, M = `microbatches`, v = `stages` per rank."""
    if schedule not in SCHEDULES:
        raise PunaError(f"pp_schedule {schedule!r} is not one puna knows", f"schedules: {', '.join(SCHEDULES)}")
    need = default_stages(schedule)
    if schedule != "interleaved" and stages != need:
        raise PunaError(f"{schedule} has {need} stages per rank, not {stages}",
                        f"use --parallel.pp_stages_per_rank {need}")  # fmt: skip
    if schedule == "1f1b" and microbatches < ranks:
        raise PunaError(f"1f1b needs at least pp = {ranks} microbatches, there are {microbatches}",
                        f"use --parallel.pp_microbatches {ranks} or --parallel.pp_schedule gpipe")  # fmt: skip
    rounds = max(1, microbatches // ranks)
    if schedule == "interleaved" and microbatches % rounds:
        raise PunaError(f"{microbatches} microbatches do not split into {rounds} rounds over {ranks} ranks",
                        f"use --parallel.pp_microbatches {rounds * ranks}")  # fmt: skip
    if schedule == "dualpipev" and microbatches < 2 * ranks:
        raise PunaError(f"dualpipev needs at least 2 x pp = {2 * ranks} microbatches, there are {microbatches}",
                        f"use --parallel.pp_microbatches {2 * ranks} or --parallel.pp_schedule zbv")  # fmt: skip


def order(schedule: str, ranks: int, microbatches: int, stages: int = 0) -> list[list[Action]]:
    """What each rank does, in its order. Raises PunaError for numbers the schedule cannot take."""
    stages = stages or default_stages(schedule)
    check_schedule(schedule, ranks, microbatches, stages)
    return [list(_rank_order(schedule, rank, ranks, microbatches, stages)) for rank in range(ranks)]


@lru_cache(maxsize=4096)
def simulate(
    schedule: str, ranks: int, microbatches: int, stages: int = 0,
    forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0, together: float = 0.0,
) -> Timeline:  # fmt: skip
    """Run a schedule with equal stages, each chunk taking the given times; transfers take none.

    `together`: time of a forward and a backward side by side, as DualPipeV pairs them (the report's F&B), both ending
    with the pair; 0: they run in turn, as in torch, and the forward's result is sent on before the backward begins.
    Source of the schedules: GPipe arXiv:1811.06965; 1F1B and interleaved arXiv:2104.04473; ZBV arXiv:2401.10241,
    section 6; DualPipe arXiv:2412.19437, section 3.2.1, in the V form of github.com/deepseek-ai/DualPipe.
    """
    todo = [deque(_units(actions, together > 0)) for actions in order(schedule, ranks, microbatches, stages)]
    last = ranks * (stages or default_stages(schedule)) - 1
    seconds = {"F": forward, "I": backward_input, "W": backward_weight, "B": backward_input + backward_weight}
    clock, events = [0.0] * ranks, []
    done: dict[Action, float] = {}
    ready = deque(range(ranks))
    while ready:  # a rank runs until it must wait; whoever moves wakes the others
        rank, moved = ready.popleft(), False
        while todo[rank] and (begin := _earliest_unit(done, todo[rank][0], last)) is not None:
            unit, start = todo[rank].popleft(), max(clock[rank], begin)
            clock[rank] = start + (together if len(unit) == 2 else seconds[unit[0][0]])
            for kind, stage, micro in unit:
                done["I" if kind == "B" else kind, stage, micro] = clock[rank]
                events.append(Event(rank, kind, stage, micro, start, clock[rank]))
            moved = True
        if moved:
            ready.extend(other for other in range(ranks) if todo[other] and other not in ready)
    assert not any(todo), f"{schedule} deadlocks with {ranks} ranks, {microbatches} microbatches"
    return Timeline(tuple(events), ranks)


@lru_cache(maxsize=4096)
def summary(
    schedule: str, ranks: int, microbatches: int, stages: int = 0,
    forward: float = 1.0, backward_input: float = 1.0, backward_weight: float = 1.0,
) -> tuple[float, tuple[int, ...]]:  # fmt: skip
    """(bubble, most chunks in flight per rank), also for thousands of microbatches in no time.

    Past 4 K microbatches every schedule repeats itself: one more costs each rank its work and no further wait. Only
    GPipe holds it as well.
    """
    enough = 4 * ranks + microbatches % ranks
    small = microbatches if microbatches <= enough or (schedule == "interleaved" and microbatches % ranks) else enough
    line = simulate(schedule, ranks, small, stages, forward, backward_input, backward_weight)
    more = (microbatches - small) * line.work / small
    flight = [microbatches] * ranks if schedule == "gpipe" else line.in_flight()
    return 1 - (line.work + more) / (line.makespan + more), tuple(flight)


def _units(actions: list[Action], pairs: bool) -> Iterator[tuple[Action, ...]]:
    """Actions one by one, or forwards paired with the backward behind them."""
    rest = deque(actions)
    while rest:
        first = rest.popleft()
        paired = pairs and rest and first[0] == "F" and rest[0][0] == "B"
        yield (first, rest.popleft()) if paired else (first,)


def _earliest_unit(done: dict[Action, float], unit: tuple[Action, ...], last: int) -> float | None:
    """When all inputs are there; None: not yet known."""
    times = [_earliest(done, *action, last) for action in unit]
    return None if None in times else max(time for time in times if time is not None)


def _earliest(done: dict[Action, float], kind: str, stage: int, micro: int, last: int) -> float | None:
    if kind == "W":
        return done.get(("I", stage, micro))
    if kind == "F":
        return 0.0 if stage == 0 else done.get(("F", stage - 1, micro))
    own = done.get(("F", stage, micro))
    after = own if stage == last else done.get(("I", stage + 1, micro))
    return None if own is None or after is None else max(own, after)


def _rank_order(schedule: str, rank: int, ranks: int, microbatches: int, stages: int) -> Iterator[Action]:
    if schedule == "gpipe":
        yield from (("F", rank, m) for m in range(microbatches))
        yield from (("B", rank, m) for m in range(microbatches))
    elif schedule == "1f1b":
        yield from _one_forward_one_backward(rank, min(microbatches, ranks - rank), microbatches)
    elif schedule == "interleaved":
        yield from _interleaved(rank, ranks, microbatches, stages)
    elif schedule == "zbv":
        yield from (action for action in _zbv(rank, ranks, microbatches) if action[2] < microbatches)
    else:
        yield from _dualpipev(rank, ranks, microbatches)


def _one_forward_one_backward(rank: int, warmup: int, microbatches: int) -> Iterator[Action]:
    yield from (("F", rank, m) for m in range(warmup))
    for m in range(microbatches):
        yield "B", rank, m
        if warmup + m < microbatches:
            yield "F", rank, warmup + m


def _interleaved(rank: int, ranks: int, microbatches: int, stages: int) -> Iterator[Action]:
    per_round = microbatches // max(1, microbatches // ranks)
    total = stages * microbatches
    warmup = min((stages - 1) * per_round + 2 * (ranks - 1 - rank), total)
    seen: Counter[tuple[str, int]] = Counter()

    def take(kind: str, step: int) -> Action:
        local = (step // per_round) % stages
        stage = (local if kind == "F" else stages - 1 - local) * ranks + rank
        seen[kind, stage] += 1
        return kind, stage, seen[kind, stage] - 1

    yield from (take("F", step) for step in range(warmup))
    for step in range(total):
        if warmup + step < total:
            yield take("F", warmup + step)
        yield take("B", step)


class _Counter:
    """Hands out the next microbatch of each (kind, stage)."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()

    def __call__(self, kind: str, stage: int) -> Action:
        kinds = ("I", "W") if kind == "B" else (kind,)
        micro = self.seen[kinds[0], stage]
        self.seen.update((k, stage) for k in kinds)
        return kind, stage, micro


def _zbv(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    """Down the V and up again; weights' gradients fill what would be bubbles. Short runs are cut from a full one."""
    take, near, far = _Counter(), rank, 2 * ranks - 1 - rank
    full = max(2 * ranks - 1, microbatches)
    yield from (take("F", near) for _ in range(2 * (ranks - rank) - 1))
    yield from (take("F", stage) for _ in range(rank) for stage in (far, near))
    yield from (take(kind, far) for _ in range(ranks - rank) for kind in "FIW")
    while take.seen["F", far] < take.seen["F", near] or take.seen["F", near] < full:
        if take.seen["F", near] < full:
            yield take("F", near)
        yield from (take("I", near), take("W", near), take("F", far), take("I", far), take("W", far))
    yield from (take("I", stage) for _ in range(rank) for stage in (near, far))
    yield from (take(kind, near) for _ in range(ranks - rank) for kind in "IW")
    for stage in (far, near):
        while take.seen["W", stage] < take.seen["I", stage]:
            yield take("W", stage)


def _dualpipev(rank: int, ranks: int, microbatches: int) -> Iterator[Action]:
    """The eight phases of DeepSeek's code. Where that runs a forward and a backward side by side, they come in turn."""
    take, near, far = _Counter(), rank, 2 * ranks - 1 - rank
    behind = ranks - rank - 1
    waiting: deque[Action] = deque()  # weights' gradients put off

    def put_off(stage: int) -> Action:
        action = take("I", stage)
        waiting.append(("W", *action[1:]))
        return action

    def caught_up() -> Iterator[Action]:
        if waiting:
            take("W", waiting[0][1])
            yield waiting.popleft()

    yield from (take("F", near) for _ in range(2 * behind))
    yield from (take("F", stage) for _ in range(rank + 1) for stage in (near, far))
    for _ in range(behind):
        yield put_off(far)
        yield from caught_up()
        yield take("F", far)
    for _ in range(microbatches - 2 * ranks + rank + 1):
        yield from (take("F", near), take("B", far), take("F", far), take("B", near))
    for _ in range(behind):
        yield from (take("B", far), take("F", far), take("B", near))
    split = False
    for turn in range(2 * (rank + 1)):  # the second half puts its weights' gradients off
        split = split or turn == 2 * ((rank + 1) // 2) + (rank % 2 == 0)
        yield (put_off if split else lambda stage: take("B", stage))((far, near)[turn % 2])
    for _ in range(behind):
        yield from caught_up()
        yield put_off(near) if split else take("B", near)
    while waiting:
        yield from caught_up()
