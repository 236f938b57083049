"""What a step costs the host beside the model: scheduling, arrays, verifying, text; by answers running and waiting.

    OMP_NUM_THREADS=1 python benchmarks/host.py          # a minute; goal: 300 us + 5 us per running answer

The model's forward and the draw are replaced by constants, so what is left is the engine. Time is this thread's own, so
a busy machine counts little; the median of the steps in the middle of the answers.
"""

from __future__ import annotations

import json
import time
from statistics import median

import torch

from puna.base.console import table
from puna.base.hardware import describe
from puna.engine.engine import Engine
from puna.engine.options import EngineOptions
from puna.engine.request import SamplingParams
from puna.engine.sampling.sampler import Draws
from puna.model.spec import Spec
from puna.weights.folder import load_model

STEPS, PROMPT = 120, 64


def step_seconds(running: int, waiting: int) -> float:
    """Thread seconds of a step."""
    spec = Spec.preset("debug")
    model = load_model("preset:debug")
    engine = Engine(model, None, EngineOptions(max_num_seqs=running, max_num_batched_tokens=max(512, 4 * running)))
    logits = torch.zeros(1, spec.vocab_size)
    engine.runner.run = lambda batch: logits  # type: ignore[method-assign]
    engine._sampler.draw = lambda _, rows: Draws([7] * len(rows))  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=STEPS + 60, ignore_eos=True)
    for number in range(running + waiting):
        engine.add([(number * 7 + i) % 500 for i in range(PROMPT)], params)
    while engine.stats()["computed_tokens"] < running * PROMPT:
        engine.step()
    seconds = []
    for _ in range(STEPS):
        started = time.thread_time()
        engine.step()
        seconds.append(time.thread_time() - started)
    return median(seconds)


def main() -> None:
    rows, found = [], []
    for running in (1, 8, 32, 128, 256):
        for waiting in (10, 1000, 10_000):
            seconds = step_seconds(running, waiting)
            per = seconds / running
            goal = 300e-6 + 5e-6 * running
            found.append({"running": running, "waiting": waiting, "seconds": seconds, "goal": goal})
            rows.append([f"{running}", f"{waiting:,}", f"{seconds * 1e6:.0f}", f"{per * 1e6:.1f}", f"{goal * 1e6:.0f}"])
            print(table(rows[-1:]), flush=True)
    print(table(rows, ("running", "waiting", "us per step", "us per answer", "goal"), describe()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
