"""Drawn tokens to an answer: its text as it becomes sure, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from puna.base.console import PunaError
from puna.engine.request import Output, SamplingParams, StopText
from puna.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """What a step added: text that is sure to stay, and how many of its tokens belong to the answer."""

    text: str
    kept: int


class AnswerText:
    """The answer of one sequence; `output` holds it so far.

    `room`: tokens that the context has left for the answer. Raises PunaError for stop strings without a tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        eos_ids: Collection[int],
        prompt_tokens: int,
        room: int,
        index: int = 0,
    ):
        if params.stop and tokenizer is None:
            raise PunaError(
                f"stop string {params.stop[0]!r}, but this model has no tokenizer",
                "stop strings are found in text; use stop_token_ids, or add tokenizer.json",
            )
        self.output = Output(prompt_tokens=prompt_tokens, index=index)
        self._params = params
        self._eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._limit = min(params.max_tokens or room, room)
        shows = tokenizer is not None and params.detokenize
        self._decoder = tokenizer.stream(params.skip_special_tokens) if tokenizer and shows else None
        self._stop = StopText(params.stop, params.include_stop_in_output)
        if params.logprobs is not None:
            self.output.logprobs, self.output.top_logprobs = [], []
        if params.logprobs is not None or params.is_ranked:
            self.output.cumulative_logprob = 0.0

    @property
    def is_finished(self) -> bool:
        return self.output.finish_reason is not None

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None] | None = None,
        top_logprobs: Sequence[dict[int, float] | None] | None = None,
    ) -> Piece:
        """Add the tokens of a step, in order, until one ends the answer; those behind it are dropped."""
        pieces: list[str] = []
        for place, token in enumerate(token_ids):
            if self.is_finished:
                return Piece("".join(pieces), place)
            if logprobs is not None:
                self._record(logprobs[place], top_logprobs[place] if top_logprobs else None)
            pieces.append(self._add(token))
        return Piece("".join(pieces), len(token_ids))

    def finish(self, reason: str, error: str | None = None) -> str:
        """End the answer from outside (length, abort, error); the text that was held back. An end stays what it was."""
        if self.is_finished:
            return ""
        self.output.finish_reason, self.output.error = reason, error
        return self._show(self._rest())

    def _add(self, token: int) -> str:
        output = self.output
        output.token_ids.append(token)
        is_end = token in self._eos_ids or token in self._params.stop_token_ids
        piece = "" if is_end and not self._params.include_stop_in_output else self._text(token)
        if is_end and not self._stop.found:
            output.finish_reason = "stop"
            output.stop_reason = token if token in self._params.stop_token_ids else None
        elif self._stop.found:
            output.finish_reason, output.stop_reason = "stop", self._stop.found
        elif len(output.token_ids) >= self._limit:
            output.finish_reason = "length"
        return self._show(piece + self._rest() if self.is_finished else piece)

    def _text(self, token: int) -> str:
        if self._decoder is None:
            return ""
        piece = self._decoder.push(token)
        # before min_tokens no stop can be: that text is never searched
        return piece if len(self.output.token_ids) <= self._params.min_tokens else self._stop.push(piece)

    def _rest(self) -> str:
        """Half a character, the beginning of what might have been a stop string: nothing more will come."""
        if self._decoder is None or self._stop.found:
            return ""
        return self._stop.push(self._decoder.flush()) + self._stop.flush()

    def _show(self, piece: str) -> str:
        self.output.text += piece
        return piece

    def _record(self, logprob: float | None, top: dict[int, float] | None) -> None:
        output = self.output
        if logprob is None:
            return
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprob
        if output.logprobs is not None and output.top_logprobs is not None:
            output.logprobs.append(logprob)
            output.top_logprobs.append(top or {})


def choose_best(outputs: Sequence[Output], params: SamplingParams) -> list[Output]:
    """The `n` of `best_of` answers with the highest mean logprob, best first and numbered anew; failed ones last."""
    if not params.is_ranked:
        return list(outputs)

    def mean(output: Output) -> float:
        if output.finish_reason == "error" or output.cumulative_logprob is None or not output.token_ids:
            return float("-inf")
        return output.cumulative_logprob / len(output.token_ids)

    best = sorted(outputs, key=mean, reverse=True)[: params.n]
    for index, output in enumerate(best):
        output.index = index
    return best
