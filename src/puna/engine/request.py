"""What is asked and what comes back. Plain Python, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from puna.base.console import PunaError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Names and meanings as in the OpenAI API and vLLM.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 keep everything. `repetition_penalty` divides (multiplies
    negative) logits of tokens seen in prompt or answer; presence and frequency penalties subtract, answer only.
    `logprobs` k adds the log-probability of each token, and of the k likeliest when k > 0, before any of the knobs.
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
    max_tokens: int = 128
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise PunaError(f"{name} is {value}", f"use a value from {low:g} to {high:g}")
        if self.repetition_penalty <= 0:
            raise PunaError(f"repetition_penalty is {self.repetition_penalty}", "use a value above 0; 1 is off")
        if any(not text for text in self.stop):
            raise PunaError("a stop string is empty", "every text contains it; leave it out")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 1_000_000),
    ("temperature", 0, 100),
    ("top_k", 0, 10**9),
    ("top_p", 1e-9, 1),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("max_tokens", 1, 10**9),
    ("logprobs", 0, 1000),
)


@dataclass
class Output:
    """One answer. `token_ids` holds every generated id, a closing eos included; `text` has neither specials nor stop.

    `logprobs[i]` is log p(token i | before) under the model itself; `top_logprobs[i]` maps the likeliest ids to theirs.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0


class StopText:
    """Holds back just enough text that no part of a stop string is ever shown.

    Feed pieces; get back what is safe to show. `found` is set when a stop string is complete.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        if self.found:
            return ""
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._take(min(places))
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
