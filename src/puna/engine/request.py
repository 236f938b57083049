"""What is asked and what comes back. Plain Python, no tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Protocol

from puna.base.console import PunaError

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_MASS = 1e-9  # the least share of probability that top_p and typical_p may keep


class TokenMask(Protocol):
    """Guided decoding: says which tokens may come next.

    Must be a pure function of the ids: after a preemption, and for every proposed token of speculation, it is asked
    again about other beginnings of the same answer. One object may serve several answers (n > 1) at once.
    """

    def allowed(self, generated_ids: Sequence[int]) -> Tensor | None:
        """Bool (V,), True where a token may follow these ids of the answer; None allows all.

        When nothing is allowed, or an exception comes out, the request fails with that reason; others do not notice.
        """
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Names and meanings as in the OpenAI API and vLLM. Hashable; raises PunaError out of range.

    Which tokens: temperature 0 is greedy. top_k 0 (or -1), top_p 1, min_p 0 and typical_p 1 keep everything.
    `repetition_penalty` divides (multiplies negative) logits of tokens seen in prompt or answer; presence and frequency
    penalties subtract, answer only; `logit_bias` is added per token id; `token_mask` allows or forbids (see TokenMask).
    When to end: eos (unless `ignore_eos`), `stop_token_ids`, `stop` strings, `max_tokens` (None: until the context is
    full). Before `min_tokens` none of the first three can happen: the ids are not drawn, and text of those tokens is
    not searched. `include_stop_in_output` shows the stop.
    How many: `n` answers; with `best_of` that many are made, and the n with the highest mean logprob come back.
    `seed`: the random numbers are a function of (seed, number of the answer, number of tokens before), so the same draw
    comes in any batch. None: a new one for every request.
    What is told: `logprobs` k adds the log-probability of each token, and of the k likeliest when k > 0: "raw" ones are
    the model's own, before any knob, "processed" ones those of the distribution drawn from (greedy: of temperature 1).
    `prompt_logprobs` does so for the prompt, always raw. `detokenize` False gives ids only.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 128
    seed: int | None = None
    logprobs: int | None = None
    typical_p: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    best_of: int | None = None
    include_stop_in_output: bool = False
    prompt_logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    token_mask: TokenMask | None = field(default=None, hash=False, repr=False)
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._normalize()
        for name, low, high, kind in _RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not (isinstance(value, kind) and low <= value <= high):
                what = "a whole number" if kind is Integral else "a value"
                raise PunaError(f"{name} is {value!r}", f"use {what} from {low:g} to {high:g}")
        self._check()

    def _normalize(self) -> None:
        """Other spellings of the same: one stop string, lists, top_k -1, ids that JSON made strings."""
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        try:
            bias = {int(token): float(value) for token, value in (self.logit_bias or {}).items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise PunaError(f"logit_bias is {self.logit_bias!r}", "use {token id: number}") from error
        object.__setattr__(self, "logit_bias", bias)

    def _check(self) -> None:
        if self.repetition_penalty <= 0:
            raise PunaError(f"repetition_penalty is {self.repetition_penalty}", "use a value above 0; 1 is off")
        if any(not text for text in self.stop):
            raise PunaError("a stop string is empty", "every text contains it; leave it out")
        if self.stop and not self.detokenize:
            raise PunaError("stop strings with detokenize off", "they are found in text; use stop_token_ids instead")
        if wrong := [value for value in self.logit_bias.values() if not -100 <= value <= 100]:
            raise PunaError(f"a logit_bias is {wrong[0]}", "use values from -100 to 100")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise PunaError(f"min_tokens is {self.min_tokens}, max_tokens only {self.max_tokens}", "lower min_tokens")
        if self.best_of is not None and self.best_of < self.n:
            raise PunaError(f"best_of is {self.best_of}, n is {self.n}", "best_of answers are made, n of them returned")
        if self.logprobs_mode not in ("raw", "processed"):
            raise PunaError(f"logprobs_mode is {self.logprobs_mode!r}", "use raw or processed")

    @property
    def num_answers(self) -> int:
        """How many are made."""
        return self.best_of or self.n

    @property
    def is_ranked(self) -> bool:
        """More answers are made than returned, so all need logprobs and none can be streamed."""
        return self.num_answers > self.n

    def seeded(self) -> SamplingParams:
        """The same with a seed: its own, or a random one. Done once per request, before it goes to several workers."""
        return self if self.seed is not None else replace(self, seed=random.SystemRandom().getrandbits(63))


_OPTIONAL = ("max_tokens", "best_of", "seed", "logprobs", "prompt_logprobs")
_RANGES: tuple[tuple[str, float, float, Any], ...] = (
    ("n", 1, 1_000_000, Integral),
    ("temperature", 0, 100, Real),
    ("top_k", 0, 10**9, Integral),
    ("top_p", _KEPT_MASS, 1, Real),
    ("min_p", 0, 1, Real),
    ("typical_p", _KEPT_MASS, 1, Real),
    ("repetition_penalty", 0, 1000, Real),
    ("presence_penalty", -2, 2, Real),
    ("frequency_penalty", -2, 2, Real),
    ("max_tokens", 1, 10**9, Integral),
    ("min_tokens", 0, 10**9, Integral),
    ("best_of", 1, 1_000_000, Integral),
    ("seed", -(2**127), 2**127, Integral),
    ("logprobs", 0, 1000, Integral),
    ("prompt_logprobs", 0, 1000, Integral),
)


@dataclass
class Output:
    """One answer. `token_ids` holds every generated id, a closing eos included; `text` has neither specials nor stop.

    `logprobs[i]` is log p(token i | before), raw or processed as asked; `top_logprobs[i]` maps the likeliest ids to
    theirs; `cumulative_logprob` is their sum. `prompt_logprobs[i]` is that of prompt token i (the first: None).
    finish_reason: stop (`stop_reason` says which string or id; None for eos), length, abort, or error (`error`: why).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    index: int = 0  # among the answers to one prompt
    stop_reason: str | int | None = None
    error: str | None = None
    cumulative_logprob: float | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_preemptions: int = 0


class StopText:
    """Holds back just enough text that no part of a stop string is ever shown.

    Feed pieces; get back what is safe to show. `found` is the first stop string to be complete; with `include` it is
    shown, as the end of the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False):
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Add text; what of all so far is now safe, nothing once a stop was found."""
        if self.found or not self._stops:
            return "" if self.found else piece
        self._held += piece
        places = [(place, -len(stop), stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, _, self.found = min(places)  # the first; of two at one place the longer
            return self._take(place + len(self.found) * self._include)
        return self._take(len(self._held) - self._partial())

    def flush(self) -> str:
        """What is still held back, once no more text will come."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, end: int) -> str:
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
