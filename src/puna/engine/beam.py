"""Beam search: the likeliest whole answers instead of drawn ones. It knows no model: `expand` asks it.

The bookkeeping (what may finish, when nothing can improve) is that of transformers' `generate(num_beams=...)`, so the
answers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from puna.base.console import PunaError
from puna.engine.request import Output
from puna.text.tokenizer import Tokenizer

Expand = Callable[[Sequence[Sequence[int]], int], list[list[tuple[int, float]]]]
"""(answers so far, k) -> for each, up to k (token id, log-probability) of the likeliest next tokens."""


@dataclass(frozen=True)
class BeamParams:
    """How to search. Raises PunaError out of range.

    A finished answer's score is its log-probability / length ** length_penalty. early_stopping: True ends as soon as
    `beam_width` answers are finished; False when no running one would beat them at its present length; "never" when
    none could even at the best possible length. `n` of the answers come back.
    """

    beam_width: int = 4
    max_tokens: int = 128
    n: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= 256:
            raise PunaError(f"beam_width is {self.beam_width}", "use a value from 1 to 256")
        if self.max_tokens < 1:
            raise PunaError(f"max_tokens is {self.max_tokens}", "use at least 1")
        if not 1 <= self.n <= self.beam_width:
            raise PunaError(f"n is {self.n}, beam_width is {self.beam_width}", "use n from 1 to beam_width")
        if self.early_stopping not in (True, False, "never"):
            raise PunaError(f"early_stopping is {self.early_stopping!r}", "use True, False or never")


class _Beam(NamedTuple):
    score: float
    token_ids: tuple[int, ...]
    logprob: float
    hits_end: bool = False


def beam_search(
    expand: Expand,
    params: BeamParams,
    eos_ids: Collection[int] = (),
    tokenizer: Tokenizer | None = None,
    prompt_tokens: int = 0,
) -> list[Output]:
    """The `params.n` best answers, best first. Raises PunaError when the model has nothing to go on with."""
    ends = frozenset() if params.ignore_eos else frozenset(eos_ids)
    keep = max(2, 1 + len(ends)) * params.beam_width  # enough that beam_width of them go on, whatever ends
    if keep > 1000:
        raise PunaError(
            f"beam_width {params.beam_width} with {len(ends)} end tokens needs {keep} likely tokens of each beam",
            f"1,000 is the most; use a beam_width up to {1000 // max(2, 1 + len(ends))}",
        )
    running, finished = [_Beam(0.0, (), 0.0)], list[_Beam]()
    while running:
        candidates = _expand(expand, running, keep, ends, params.max_tokens)
        if not candidates and not finished:
            raise PunaError("the model gave no next token for any beam", "are its logits finite?")
        ending = [_finished(beam, params) for beam in candidates[: params.beam_width] if beam.hits_end]
        finished = sorted(finished + ending, key=_score)[: params.beam_width]
        running = [beam for beam in candidates if not beam.hits_end][: params.beam_width]
        if running and not _can_improve(running[0], finished, params):
            break
    return [_output(beam, index, ends, tokenizer, prompt_tokens) for index, beam in enumerate(finished[: params.n])]


def _score(beam: _Beam) -> float:
    return -beam.score  # sorted() is stable: of equal ones the earlier stays ahead


def _expand(expand: Expand, beams: list[_Beam], keep: int, ends: frozenset[int], max_tokens: int) -> list[_Beam]:
    """The `keep` likeliest continuations of all beams together, likeliest first."""
    found = []
    for beam, tokens in zip(beams, expand([beam.token_ids for beam in beams], keep), strict=True):
        for token, logprob in tokens:
            ids, total = (*beam.token_ids, token), beam.logprob + logprob
            found.append(_Beam(total, ids, total, token in ends or len(ids) >= max_tokens))
    return sorted(found, key=_score)[:keep]


def _finished(beam: _Beam, params: BeamParams) -> _Beam:
    return beam._replace(score=beam.logprob / len(beam.token_ids) ** params.length_penalty)


def _can_improve(best: _Beam, finished: list[_Beam], params: BeamParams) -> bool:
    """Whether a running beam might still beat the worst of enough finished ones."""
    if len(finished) < params.beam_width:
        return True
    if params.early_stopping is True:
        return False
    length = len(best.token_ids)
    if params.early_stopping == "never" and params.length_penalty > 0:
        length = params.max_tokens
    return best.logprob / length**params.length_penalty > finished[-1].score


def _output(beam: _Beam, index: int, ends: frozenset[int], tokenizer: Tokenizer | None, prompt_tokens: int) -> Output:
    ids = list(beam.token_ids)
    is_stopped = ids[-1] in ends
    text = tokenizer.decode(ids[:-1] if is_stopped else ids, skip_specials=True) if tokenizer else ""
    reason = "stop" if is_stopped else "length"
    return Output(text, ids, None, None, reason, prompt_tokens, index, cumulative_logprob=beam.logprob)
