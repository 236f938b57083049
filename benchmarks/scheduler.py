"""What scheduling costs: microseconds per step and per running answer, and tokens computed twice when memory is short.

    python benchmarks/scheduler.py                # host time, no model
    python benchmarks/scheduler.py --thrash       # the same load with and without headroom after preemptions

Host time: `schedule` and `update` of decode steps (a token per running answer), pages crossed as they come, CPU time of
the thread, the best of `--repeats` means over 200 steps. The waiting ones cannot be admitted: all slots are taken.
"""

from __future__ import annotations

import argparse
import random
import time

from puna.base.console import table
from puna.engine import scheduler as scheduler_file
from puna.engine.kv_cache import KVCache
from puna.engine.request import SamplingParams
from puna.engine.scheduler import Limits, Scheduler, Step
from puna.engine.sequence import Request, Sequence

STEPS = 200


def ask(scheduler: Scheduler, number: int, prompt: list[int], max_tokens: int = 10**6) -> None:
    request = Request(number, prompt, SamplingParams(max_tokens=max_tokens))
    scheduler.add([Sequence(number, request, 0, list(prompt), len(prompt))])


def drawn(step: Step) -> dict[Sequence, list[int]]:
    return {part.sequence: [7] for part in step.slices if part.draws}


def decode_steps(running: int, waiting: int) -> tuple[float, float]:
    """Mean microseconds of `schedule` and of `update`."""
    cache = KVCache(running * 64 + 1000)
    limits = Limits(max_model_len=10**6, max_num_seqs=running, max_num_batched_tokens=16384)
    scheduler = Scheduler(limits, cache)
    for number in range(running + waiting):
        ask(scheduler, number, [number % 1000] * (20 + number % 16))
    while scheduler.num_drawn_tokens < 2 * running:
        step = scheduler.schedule()
        scheduler.update(step, drawn(step))
    plan = take = 0.0
    for _ in range(STEPS):
        begin = time.thread_time()
        step = scheduler.schedule()
        middle = time.thread_time()
        tokens = drawn(step)
        after = time.thread_time()
        scheduler.update(step, tokens)
        plan, take = plan + middle - begin, take + time.thread_time() - after
    assert len(step.slices) == step.num_tokens == running
    return plan / STEPS * 1e6, take / STEPS * 1e6


def host_time(repeats: int) -> str:
    rows = []
    cases = [(running, waiting) for running in (1, 8, 32, 128, 256) for waiting in (10, 1000, 10_000)]
    best = dict.fromkeys(cases, (1e9, 1e9))
    for _ in range(repeats):
        for case in cases:
            best[case] = min(best[case], decode_steps(*case), key=sum)
    for (running, waiting), (plan, take) in best.items():
        both = plan + take
        rows.append([f"{n:.1f}" if isinstance(n, float) else str(n) for n in (running, waiting, plan, take, both)])
        rows[-1].append(f"{both / running:.2f}")
    return table(rows, ("running", "waiting", "schedule us", "update us", "both us", "us per running"), "decode steps")


def overload(pages: int, requests: int, most_headroom: float) -> list[str]:
    """Chat-like lengths at far more requests than fit; random ends. Counts, no clock."""
    scheduler_file._HEADROOM_MOST = most_headroom
    draw = random.Random(0)
    scheduler = Scheduler(Limits(max_model_len=8192), KVCache(pages))
    ends, needed = {}, 0
    for number in range(requests):
        prompt = [draw.randrange(32000) for _ in range(int(draw.lognormvariate(5, 1)) + 1)]
        ends[number] = int(draw.lognormvariate(5.3, 0.8)) + 1
        needed += len(prompt) + ends[number] - 1  # the last token of an answer is not computed
        ask(scheduler, number, prompt)
    held = 0.0
    while scheduler.has_work:
        step = scheduler.schedule()
        tokens = drawn(step)
        scheduler.update(step, tokens)
        held += scheduler.cache.usage
        for sequence in tokens:
            if sequence.num_generated >= ends[sequence.id]:
                scheduler.finish(sequence, "length")
    twice = scheduler.num_computed_tokens / needed - 1
    figures = (scheduler.num_steps, scheduler.num_preemptions, scheduler.num_preempted_tokens)
    return [f"{most_headroom:g}", *map(str, figures), f"{twice:.1%}", f"{held / scheduler.num_steps:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--thrash", action="store_true")
    options = parser.parse_args()
    if not options.thrash:
        print(host_time(options.repeats))
        return
    for pages in (500, 2000):
        rows = [overload(pages, 600, headroom) for headroom in (0.0, 16.0, 64.0, 128.0, 256.0)]
        header = ("headroom at most", "steps", "preemptions", "tokens given up", "computed twice", "mean usage")
        print(table(rows, header, f"600 requests, {pages} pages of 16 tokens"))


if __name__ == "__main__":
    main()
