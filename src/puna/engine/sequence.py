"""One answer in the making: the unit that is scheduled. Plain Python, no tensors."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any

from puna.engine.request import SamplingParams


class Status(enum.Enum):
    """Where an answer stands."""

    WAITING = "waiting"  # for its first tokens, or again after a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Request:
    """What was asked: `params.n` answers to one prompt.

    priority: lower is served first. adapter: name of a LoRA adapter; adapter_digest: of its weights, so that keys and
    values of one adapter are never another's. cache_salt: requests with different salts share no cached prefix.
    """

    id: int
    prompt_ids: Ids[int]
    params: SamplingParams
    priority: int = 0
    adapter: str | None = None
    adapter_digest: bytes = b""
    cache_salt: str = ""


@dataclass(eq=False, slots=True)
class Sequence:
    """An answer: its tokens, and how many of them have keys and values.

    Every step computes some of `token_ids[num_computed_tokens:]` and then of `drafts`; where the last token is
    computed, a new one is drawn. So a prompt in pieces, a cached beginning, a recomputation and drafts are one thing.
    """

    id: int
    request: Request
    index: int  # 0 .. n - 1 among the answers to one request
    token_ids: list[int]  # prompt and answer
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    drafts: list[int] = field(default_factory=list)  # proposed tokens, to be verified in the next step
    pages: list[int] = field(default_factory=list)  # the kv cache's; position p is in pages[p // page_size]
    status: Status = Status.WAITING
    finish_reason: str | None = None  # stop, length, abort, error
    error: str | None = None
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was first admitted
    num_preemptions: int = 0
    use_prefix_cache: bool = True  # False: every token is computed here (prompt log-probabilities, mean pooling)
    rank: tuple[int, int] = (0, 0)  # the scheduler's: lower goes first
    prefix: Any = None  # the kv cache's: where it stands in the tree of shared beginnings

    @property
    def num_new_tokens(self) -> int:
        """Tokens (drafts included) without keys and values yet."""
        return len(self.token_ids) + len(self.drafts) - self.num_computed_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generated_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(eq=False, slots=True)
class Slice:
    """What one sequence computes in a step: `count` tokens from position `start`, the last `drafts` of them proposals.

    `draws`: the slice reaches the end of `token_ids`, so 1 + drafts new tokens are drawn from its last rows.
    Not frozen: one is made per sequence and step, and a frozen dataclass takes four times as long (0.60 us, 0.16 us).
    """

    sequence: Sequence
    start: int
    count: int
    drafts: int = 0
    draws: bool = False


@dataclass(eq=False, slots=True)
class Step:
    """What to compute: slices of different sequences, `num_tokens` in all (drafts included).

    finished: ended while scheduling (no memory to grow into); status and reason are set, no slice is theirs.
    """

    slices: list[Slice] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
