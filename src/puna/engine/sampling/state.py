"""What a sampler knows of one answer: its knobs, its random stream, what was said. No tensors."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from puna.base.console import PunaError
from puna.engine.request import SamplingParams
from puna.engine.sampling.randomness import stream_key

_WIDTHS = (64, 1024)


class Work(enum.Enum):
    """Kinds of rows that are drawn together."""

    PLAIN = "greedy, not a knob turned"
    GREEDY = "greedy after edits"
    SAMPLED = "sampled"
    SAMPLED_EDITED = "sampled after edits"
    TRUNCATED = "sampled from some tokens"
    TRUNCATED_EDITED = "sampled from some tokens after edits"


class Seen:
    """Distinct tokens and how often each was generated (0: in the prompt only).

    Arrays that grow, so that a step converts nothing but its new token. Tokens from `vocab_size` on (a prompt may have
    them, where the embedding is padded) have no score that could be penalized: they are left out.
    """

    __slots__ = ("_counts", "_ids", "_slot_of", "_vocab_size")

    def __init__(self, vocab_size: int, prompt_ids: Iterable[int] = ()):
        self._vocab_size = vocab_size
        told = sorted(token for token in set(prompt_ids) if token < vocab_size)
        self._slot_of = {token: slot for slot, token in enumerate(told)}
        self._ids = np.fromiter(self._slot_of, np.int64, len(self._slot_of))
        self._counts = np.zeros(len(self._slot_of), np.float32)

    def add(self, token: int) -> None:
        """Count one more generated token."""
        slot = self._slot_of.get(token)
        if slot is None:
            slot = self._slot_of[token] = len(self._slot_of)
            if slot == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * slot + 16), np.resize(self._counts, 2 * slot + 16)
            self._ids[slot], self._counts[slot] = token, 0
        self._counts[slot] += 1

    def with_extra(self, extra: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts) as they would be after `extra` more tokens, in no particular order."""
        size = len(self._slot_of)
        ids, counts = self._ids[:size], self._counts[:size]
        if not extra:
            return ids, counts
        more: dict[int, int] = {}
        counts = counts.copy()
        for token in extra:
            if (slot := self._slot_of.get(token)) is not None:
                counts[slot] += 1
            elif token < self._vocab_size:
                more[token] = more.get(token, 0) + 1
        return (
            np.concatenate((ids, np.fromiter(more, np.int64, len(more)))),
            np.concatenate((counts, np.fromiter(more.values(), np.float32, len(more)))),
        )


class SamplingState:
    """One answer as its sampler sees it. Cheap where no knob is turned: a penalty-free answer keeps a number only.

    `accept` must be told of every token that becomes part of the answer, in order; a preemption changes nothing here.
    Raises PunaError for ids outside the vocabulary.
    """

    __slots__ = (
        "bias_ids", "bias_values", "is_edited", "is_greedy", "key", "min_tokens_ids", "num_generated", "params", "said",
        "seen", "short_width", "tells_processed", "wants_logprobs", "work",
    )  # fmt: skip

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], index: int, vocab_size: int, eos_ids: Iterable[int]
    ):
        params = params.seeded()
        self.params = params
        self.key = stream_key(params.seed or 0, index)
        self.num_generated = 0
        self.said: list[int] | None = [] if params.token_mask is not None else None  # only a mask reads them again
        self.seen: Seen | None = None
        if params.repetition_penalty != 1:
            self.seen = Seen(vocab_size, prompt_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.seen = Seen(vocab_size)
        if wrong := [token for token in params.logit_bias if not 0 <= token < vocab_size]:
            raise PunaError(f"logit_bias for token {wrong[0]}, the vocabulary has {vocab_size}", "check the ids")
        self.bias_ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        self.bias_values = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        early = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)} if params.min_tokens else set()
        self.min_tokens_ids = np.array(sorted(token for token in early if 0 <= token < vocab_size), np.int64)
        self.is_greedy = params.temperature == 0
        self.is_edited = bool(
            self.seen is not None or len(self.bias_ids) or len(self.min_tokens_ids) or params.token_mask is not None
        )
        self.wants_logprobs = params.logprobs is not None or params.is_ranked
        self.tells_processed = self.wants_logprobs and params.logprobs_mode == "processed"
        self.work = self._kind_of_work(vocab_size)
        self.short_width = 0 if self.is_greedy else short_width(params, vocab_size)

    def _kind_of_work(self, vocab_size: int) -> Work:
        params = self.params
        if self.is_greedy:
            return Work.GREEDY if self.is_edited or self.tells_processed else Work.PLAIN
        if 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1:
            return Work.TRUNCATED_EDITED if self.is_edited else Work.TRUNCATED
        return Work.SAMPLED_EDITED if self.is_edited else Work.SAMPLED

    def accept(self, token_ids: Iterable[int]) -> None:
        """These tokens are now part of the answer."""
        for token in token_ids:
            self.num_generated += 1
            if self.seen is not None:
                self.seen.add(token)
            if self.said is not None:
                self.said.append(token)


def short_width(params: SamplingParams, vocab_size: int, beyond: int = 0) -> int:
    """How many of the likeliest tokens should hold what top-k and top-p keep; 0: look at all.

    beyond: more than so many, which were not enough.
    """
    k = params.top_k if 0 < params.top_k < vocab_size else 0
    if not k and params.top_p >= 1:
        return 0
    return next((width for width in _WIDTHS if max(k, beyond) < width < vocab_size), 0)


class Row(NamedTuple):
    """A row of logits to draw from: the answer, and tokens presumed after what it has accepted (speculation)."""

    state: SamplingState
    extra: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """Tokens of the answer before the one to be drawn."""
        return self.state.num_generated + len(self.extra)
