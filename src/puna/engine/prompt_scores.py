"""Log-probabilities of the tokens of a prompt: row p of it says how likely token p + 1 was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from puna.engine.batch import Batch
from puna.engine.request import Output
from puna.engine.runner import Runner
from puna.engine.sampling.sampler import logprobs_of
from puna.engine.sequence import Sequence as Answer
from puna.engine.sequence import Slice

_AT_ONCE = 256  # rows of logits: never all of a long prompt's


def wants_scores(slices: Sequence[Slice], outputs: Mapping[Answer, Output]) -> bool:
    """Whether any of these slices holds tokens of a prompt that still need a score."""
    return any(_is_scored(part, outputs[part.sequence]) for part in slices)


def score_prompts(
    runner: Runner, slices: Sequence[Slice], batch: Batch, outputs: Mapping[Answer, Output], vocab_size: int
) -> None:
    """Add the scores of a step to the outputs; `runner` holds the hidden states of all its rows.

    After a preemption rows come twice; the first counts.
    """
    for part, start in zip(slices, batch.starts_B1.tolist(), strict=False):
        output = outputs[part.sequence]
        if not _is_scored(part, output):
            continue
        sequence = part.sequence
        scores, tops = output.prompt_logprobs or [None], output.prompt_top_logprobs or [None]
        last = min(part.start + part.count, sequence.num_prompt_tokens - 1)
        for begin in range(max(part.start, len(scores) - 1), last, _AT_ONCE):
            end = min(begin + _AT_ONCE, last)
            rows_R = np.arange(start + begin - part.start, start + end - part.start)
            targets = sequence.token_ids[begin + 1 : end + 1]
            top = sequence.request.params.prompt_logprobs or 0
            found, likeliest = logprobs_of(runner.logits(rows_R), targets, top, vocab_size)
            scores += found
            tops += likeliest
        output.prompt_logprobs, output.prompt_top_logprobs = scores, tops


def _is_scored(part: Slice, output: Output) -> bool:
    sequence = part.sequence
    if sequence.request.params.prompt_logprobs is None or part.start >= sequence.num_prompt_tokens:
        return False
    return len(output.prompt_logprobs or ()) < sequence.num_prompt_tokens
