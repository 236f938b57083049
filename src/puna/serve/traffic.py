"""Many users at once: a closed loop on the engine, and how long they wait."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from puna.base.console import PunaError
from puna.serve.bench import Subject, answer_one, greedy, open_engine, random_prompts, said

# Spread of log(tokens) of prompts and answers: p90 / p50 of about 2.4 and 3.3 (ours; the trace's medians are cited).
_PROMPT_P50, _PROMPT_SIGMA, _OUTPUT_P50, _OUTPUT_SIGMA = 1020, 0.68, 129, 0.93


@dataclass(frozen=True)
class Traffic:
    """`concurrency` users, each asking again when answered, until `requests` have been; 0 scale: fit the context.

    Lengths are log-normal around the medians of Azure's conversation trace (1020 tokens in, 129 out: Patel et al. 2023,
    arXiv:2311.18677, section 3) times `scale`, cut where the context ends.
    """

    requests: int = 64
    concurrency: int = 32
    scale: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.requests, self.concurrency) < 1 or self.scale < 0:
            raise PunaError(
                f"{self.requests} requests by {self.concurrency} users at scale {self.scale:g}",
                "use 1 or more of both, and a scale above 0 (or 0: what fits)",
            )

    def lengths(self, context: int) -> list[tuple[int, int]]:
        """(prompt, output) tokens of each request; together at most `context`."""
        scale = self.scale or min(1.0, context / (4 * (_PROMPT_P50 + _OUTPUT_P50)))
        draw = np.random.default_rng(self.seed).lognormal
        prompts = draw(math.log(_PROMPT_P50 * scale), _PROMPT_SIGMA, self.requests)
        outputs = draw(math.log(_OUTPUT_P50 * scale), _OUTPUT_SIGMA, self.requests)
        found = []
        for prompt, output in zip(np.ceil(prompts).astype(int), np.ceil(outputs).astype(int), strict=True):
            room = min(int(prompt), context - 1)
            found.append((room, min(int(output), context - room)))
        return found


@dataclass(slots=True)
class _Asked:
    """A request under way: when it came and when tokens came, and how many there were."""

    began: float
    tokens: int = 0
    last: float = 0.0


def serve(subject: Subject, traffic: Traffic) -> dict[str, Any]:
    """A closed loop of users on the engine: output tokens per second, waiting times, preemptions, the host's share.

    TTFT is from asking to the first token; the time between tokens is shared by tokens that come together.
    """
    engine, watched = open_engine(subject)
    lengths = traffic.lengths(engine.max_model_len)
    prompts = random_prompts(engine.spec, [prompt for prompt, _ in lengths], traffic.seed)
    answer_one(engine, prompts[0][:8])  # the first step of a process is slow
    pending = iter(zip(prompts, (output for _, output in lengths), strict=True))
    asked: dict[int, _Asked] = {}
    firsts, gaps = list[float](), list[float]()
    steps, rows, watched.seconds, before = 0, 0, 0.0, engine.stats()
    started = time.perf_counter()
    while True:
        while len(asked) < traffic.concurrency and (job := next(pending, None)) is not None:
            request = engine.add(job[0], greedy(job[1]))
            asked[request] = _Asked(time.perf_counter())
        if not asked:
            break
        news = engine.step()
        steps, rows, now = steps + 1, rows + engine.scheduler.num_running, time.perf_counter()
        for each in news:
            _note(asked[each.request_id], len(each.output.token_ids), now, firsts, gaps)
            if each.is_last:
                del asked[each.request_id]
    seconds = time.perf_counter() - started
    after, host = engine.stats(), seconds - watched.seconds
    made = after["drawn_tokens"] - before["drawn_tokens"]
    row = {
        "requests": traffic.requests, "concurrency": traffic.concurrency, "seconds": seconds, "rate": made / seconds,
        "prompt_tokens": sum(prompt for prompt, _ in lengths), "output_tokens": made,
        "ttft_ms": _percentiles(firsts), "between_tokens_ms": _percentiles(gaps), "steps": steps,
        "preemptions": after["preemptions"] - before["preemptions"],
        "host_share": host / seconds, "host_us_per_running": 1e6 * host / max(1, rows),
    }  # fmt: skip
    return {"rows": [row], **said(engine), "traffic": asdict(traffic)}


def _note(asked: _Asked, tokens: int, now: float, firsts: list[float], gaps: list[float]) -> None:
    new = tokens - asked.tokens
    if new <= 0:
        return
    if asked.tokens:
        gaps += [(now - asked.last) / new] * new
    else:
        firsts.append(now - asked.began)
    asked.tokens, asked.last = tokens, now


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    found = 1e3 * np.percentile(seconds, (50, 90, 99))
    return dict(zip(("p50", "p90", "p99"), found.tolist(), strict=True))
