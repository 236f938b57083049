"""Time of one sampling step, all rows together, by kind of sampling; beside it a loop of torch.multinomial row by row.

    python benchmarks/sampler.py [--rows 1,32,256] [--vocab 32000,128256] [--rounds 7] [--threads N]

Logits look like a language model's: a few hundred likely tokens on a wide floor. Prints a table (microseconds per step,
the best of the rounds, kinds interleaved) and one JSON line. `typical` sorts every row and is timed up to 32 rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from puna.base.console import say, table
from puna.engine.request import SamplingParams
from puna.engine.sampling.sampler import BatchSampler
from puna.engine.sampling.state import Row

KINDS = {
    "greedy": SamplingParams(temperature=0),
    "greedy + 5 logprobs": SamplingParams(temperature=0, logprobs=5),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top-k 50": SamplingParams(top_k=50, seed=1),
    "top-p 0.9": SamplingParams(top_p=0.9, temperature=0.7, seed=1),
    "min-p 0.05": SamplingParams(min_p=0.05, seed=1),
    "typical 0.9": SamplingParams(typical_p=0.9, seed=1),
    "penalties, greedy": SamplingParams(temperature=0, repetition_penalty=1.1, frequency_penalty=0.1),
}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def logits_like(rows: int, vocab: int) -> torch.Tensor:
    """Scores (rows, vocab) whose probability is in a few hundred tokens."""
    base = torch.randn(rows, vocab)
    likely = torch.rand(rows, vocab) < 300 / vocab
    return base + likely * torch.rand(rows, vocab) * 14


def works(rows: int, vocab: int) -> dict[str, Callable[[], object]]:
    """A step of every kind; answers of 200 tokens after prompts of 500."""
    sampler, logits = BatchSampler(vocab), logits_like(rows, vocab)

    def step(params: SamplingParams) -> Callable[[], object]:
        states = [sampler.state(params, range(500), index) for index in range(rows)]
        for state in states:
            state.accept(range(400, 600))
        batch = [Row(state) for state in states]
        return lambda: sampler.draw(logits, batch)

    found = {name: step(params) for name, params in KINDS.items() if rows <= 32 or "typical" not in name}
    found["(loop) temperature"] = lambda: [torch.multinomial((row / 0.8).softmax(-1), 1).item() for row in logits]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="1,32,256")
    parser.add_argument("--vocab", default="32000,128256")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for vocab in map(int, options.vocab.split(",")):
        for rows in map(int, options.rows.split(",")):
            kinds = works(rows, vocab)
            best = dict.fromkeys(kinds, float("inf"))
            for _ in range(options.rounds):
                for name, work in kinds.items():
                    best[name] = min(best[name], seconds(work))
            found.append({"vocab": vocab, "rows": rows} | {name: round(t * 1e6) for name, t in best.items()})
    header = ["microseconds", *(f"{row['rows']} x {row['vocab']}" for row in found)]
    say(table([[name, *(str(row.get(name, "")) for row in found)] for name in works(1, 100)], header))
    print(json.dumps({"threads": options.threads, "microseconds": found}))


if __name__ == "__main__":
    main()
