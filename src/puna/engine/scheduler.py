"""What is computed in the next step, and for whom. Plain Python: no tensors, tested without any.

There are no prefill and decode phases: every answer has tokens, and `num_computed_tokens` chases them under a budget
per step. A prompt in pieces, one half found in the cache, one computed again after a preemption, an answer that grows
by a token, and drafts to be verified are all a `Slice`.

    step = scheduler.schedule()          # running answers first, then prompts under way, then new ones
    drawn = ...                          # the model and the sampler
    scheduler.update(step, drawn)        # tokens appended, full pages shared

Order. A request has a rank, fixed when it arrives: its step of arrival + priority x `steps_per_priority`; the lowest
goes first. So a priority is worth that many steps of waiting: whoever waits is overtaken by a better priority only if
that came within so many steps after it, and nobody starves. Ranks of newcomers only grow, so whoever is preempted (the
highest rank among the running) becomes, in time, the last to be preempted.

Memory. A request is admitted when the pages for all its tokens are there, beside those promised to prompts under way
and some headroom for the running ones to grow into. None at first; a preemption, a sign of too many admitted, doubles
it, and without preemptions it fades. So memory too small for the load costs waiting, not computing the
same tokens again and again.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from operator import attrgetter

from puna.base.console import PunaError
from puna.engine.kv_cache import KVCache
from puna.engine.sequence import Sequence, Slice, Status, Step

_RUNNING, _FINISHED = Status.RUNNING, Status.FINISHED
# Tokens, and the share lost per step without a preemption. With them 3.2% of the tokens are computed twice instead of
# 26.5%, in 4.5% more steps; 128 tokens save 0.7% more for 3% more steps (benchmarks/scheduler.py --thrash).
_HEADROOM_FIRST, _HEADROOM_MOST, _HEADROOM_FADE = 16.0, 64.0, 1 / 1024
_rank = attrgetter("rank")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a step and of a sequence.

    max_model_len: tokens of prompt and answer. max_num_seqs: answers that run at a time. max_num_batched_tokens: per
    step, at least max_num_seqs, so that every running answer grows in every step however long the prompts beside it.
    max_prefill_chunk: of one prompt per step, so that several advance side by side (0: whatever is left of the budget).
    steps_per_priority: how many steps of waiting a priority is worth.
    Errors: `PunaError` for limits that contradict each other.
    """

    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_prefill_chunk: int = 0
    steps_per_priority: int = 256

    def __post_init__(self) -> None:
        if min(self.max_model_len, self.max_num_seqs) < 1 or min(self.max_prefill_chunk, self.steps_per_priority) < 0:
            raise PunaError(f"not possible: {self}", "lengths and counts are 1 or more, max_prefill_chunk 0 or more")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise PunaError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}",
                "every running answer needs a token per step; raise the first or lower the second",
            )

    @property
    def chunk(self) -> int:
        """Most tokens of one prompt in a step."""
        return min(self.max_prefill_chunk or self.max_num_batched_tokens, self.max_num_batched_tokens)


@dataclass(eq=False, slots=True)
class _Group:
    """The answers to one request that have not ended. `held` wait for the leader's prompt, to share its pages."""

    leader: Sequence
    live: set[Sequence] = field(default_factory=set)
    held: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Who runs, who waits. Call `schedule` and `update` in turn; `add`, `abort` and `finish` whenever neither runs.

    on_preempt: told of every preempted sequence (to log it); it must not call back.
    """

    def __init__(self, limits: Limits, cache: KVCache, on_preempt: Callable[[Sequence], None] | None = None):
        self.limits, self.cache = limits, cache
        self.num_steps = self.num_computed_tokens = self.num_drawn_tokens = 0
        self.num_preemptions = 0
        self.num_preempted_tokens = 0  # whose keys and values were given up
        self._on_preempt = on_preempt
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap by rank; ended ones are skipped
        self._num_waiting = 0
        self._running: list[Sequence] = []  # by rank
        self._groups: dict[int, _Group] = {}  # by request id
        self._step: Step | None = None  # between schedule and update
        self._left: list[Sequence] = []  # ended in between: their pages may still be written, so come back later
        self._headroom = 0.0  # tokens each running answer is to have room for when another is admitted
        self._blocked: tuple[Sequence, int] | None = None  # the first of the waiting, and the pages it needs
        self._arrivals = 0
        self._prompts_wait = False  # for the budget: drafts leave room for them

    @property
    def has_work(self) -> bool:
        """Something runs or waits."""
        return bool(self._running or self._num_waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def sequences(self) -> list[Sequence]:
        """All that have not ended, and those whose pages come back after the step under way."""
        return [sequence for group in self._groups.values() for sequence in group.live] + self._left

    def add(self, sequences: list[Sequence]) -> None:
        """Queue answers to one request. The others of a prompt with full pages wait for the first, and share its pages.

        Errors: `PunaError` (and none is queued) for a prompt longer than max_model_len or than the whole cache.
        """
        for sequence in sequences:
            self._check_size(sequence)
        request = sequences[0].request
        group = self._groups.setdefault(request.id, _Group(sequences[0]))
        for sequence in sequences:
            assert sequence.request is request, sequence
            self._arrivals += 1
            sequence.rank = (self.num_steps + request.priority * self.limits.steps_per_priority, self._arrivals)
            group.live.add(sequence)
        self._num_waiting += len(sequences)
        shared = (sequences[0].num_prompt_tokens - 1) // self.cache.page_size
        at_once = 1 if shared and group.leader is sequences[0] else len(sequences)
        self._queue(sequences[:at_once])
        group.held += sequences[at_once:]

    def abort(self, request_id: int) -> None:
        """End all answers to a request, wherever they are; an unknown or ended request is no error."""
        group = self._groups.get(request_id)
        if group is not None:
            for sequence in list(group.live):
                self.finish(sequence, "abort")

    def finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        """End an answer. Its pages come back now or, while a step is being computed, with that step's `update`."""
        if sequence.status is _FINISHED:
            return
        if sequence.status is _RUNNING:
            self._running.remove(sequence)
            self._left.append(sequence)
            self._clear_left()
        else:
            self._num_waiting -= 1
            if len(self._waiting) > 64 + 2 * self._num_waiting:
                self._waiting = [entry for entry in self._waiting if entry[1].status is not _FINISHED]
                heapify(self._waiting)
        sequence.status, sequence.finish_reason, sequence.error = _FINISHED, reason, error
        self._leave_group(sequence)

    def schedule(self) -> Step:
        """The next step. It is empty only when nothing can run (nothing is left, or what was left has just ended)."""
        assert self._step is None, "the step before has had no update"
        self.num_steps += 1
        step = Step()
        prompts = self._schedule_answers(step)
        self._prompts_wait = False
        promised = sum(self._schedule_prompt(sequence, step) for sequence in prompts)
        if step.preempted:
            self._headroom = min(_HEADROOM_MOST, max(_HEADROOM_FIRST, 2 * self._headroom))
        else:
            self._headroom -= self._headroom * _HEADROOM_FADE
            self._admit(step, promised)
        self._step = step
        return step

    def update(self, step: Step, drawn: Mapping[Sequence, list[int]]) -> None:
        """Take in what a step computed.

        drawn: per drawing sequence the accepted drafts in order and one token more; cut short where the answer ends.
        Nothing for a drawing one: its last token is computed again. Sequences ended meanwhile are passed over.
        """
        assert step is self._step, "not the step under way"
        self._step = None
        self._clear_left()
        size, longest = self.cache.page_size, self.limits.max_model_len
        for part in step.slices:
            sequence, start = part.sequence, part.start
            if sequence.status is not _RUNNING:
                continue
            end = start + part.count - part.drafts
            if part.draws:
                new = drawn.get(sequence) or ()
                end += len(new) - 1  # the last one has no keys yet
                sequence.token_ids.extend(new)
                self.num_drawn_tokens += len(new)
                if part.drafts:
                    self._settle_drafts(part, new)
                if start < sequence.num_prompt_tokens:
                    self._release_siblings(sequence)
            sequence.num_computed_tokens = end
            if end // size != start // size:
                self.cache.commit(sequence)
            if len(sequence.token_ids) >= longest and part.draws:
                self.finish(sequence, "length")
        self.num_computed_tokens += step.num_tokens

    def cancel(self) -> None:
        """Forget the step under way (the model failed): nothing of it counts as computed, it is scheduled anew."""
        step, self._step = self._step or Step(), None
        self._clear_left()
        for part in step.slices:
            if part.drafts and part.sequence.status is _RUNNING:
                self.cache.trim(part.sequence)

    def preempt_all(self) -> None:
        """Every running answer computes its tokens again (the weights have changed, say)."""
        assert self._step is None, "a step is under way"
        while self._running:
            self._preempt(self._running[-1], Step())

    def _check_size(self, sequence: Sequence) -> None:
        tokens, pages = len(sequence.token_ids), self.cache.num_pages - 1
        needed = self.cache.pages_for(tokens, 1)
        if tokens > self.limits.max_model_len:
            raise PunaError(
                f"the prompt has {tokens} tokens, max_model_len is {self.limits.max_model_len}",
                "shorten the prompt or raise max_model_len",
            )
        if needed > pages:
            raise PunaError(
                f"the prompt of {tokens} tokens needs {needed} pages, the KV cache has {pages}",
                "shorten the prompt, or give the cache more memory or fewer bits",
            )

    def _schedule_answers(self, step: Step) -> list[Sequence]:
        """A token, and drafts, for every answer that has all but its last token computed; returns the others."""
        size, slices, prompts = self.cache.page_size, step.slices, []
        spare = self.limits.max_num_batched_tokens - len(self._running)
        if self._prompts_wait:
            spare //= 2  # drafts may be for nothing, prompts never are
        # Only the last of the list is ever taken out, and never one before `sequence`: the loop may go on over it.
        for sequence in self._running:
            start, drafts = sequence.num_computed_tokens, 0
            if len(sequence.token_ids) - start != 1:
                prompts.append(sequence)
                continue
            if sequence.drafts:
                drafts = self._cut_drafts(sequence, spare)
            if start + drafts >= len(sequence.pages) * size:
                if not self._grow(sequence, step):
                    continue
                drafts = len(sequence.drafts)
            spare -= drafts
            slices.append(Slice(sequence, start, 1 + drafts, drafts, True))
            step.num_tokens += 1 + drafts
        return prompts

    def _schedule_prompt(self, sequence: Sequence, step: Step) -> int:
        """A piece of a prompt, as the budget and the free pages allow; returns the pages it goes on to need."""
        if sequence.status is not _RUNNING:
            return 0
        start = sequence.num_computed_tokens
        left = len(sequence.token_ids) - start
        room = (len(sequence.pages) + self.cache.num_free_pages) * self.cache.page_size - start
        count = min(left, self.limits.chunk, self.limits.max_num_batched_tokens - step.num_tokens, max(1, room))
        if count > 0 and self._make_room(sequence, start + count, step):
            step.slices.append(Slice(sequence, start, count, 0, count == left))
            step.num_tokens += count
        self._prompts_wait |= count < left
        return self.cache.missing_pages(sequence, self.limits.chunk) if sequence.status is _RUNNING else 0

    def _admit(self, step: Step, promised: int) -> None:
        """Let the first of the waiting in while there is room. Never the second before the first: it would starve."""
        waiting, limits = self._waiting, self.limits
        while waiting and step.num_tokens < limits.max_num_batched_tokens and len(self._running) < limits.max_num_seqs:
            sequence = waiting[0][1]
            if sequence.status is _FINISHED:
                heappop(waiting)
            elif self.cache.pages_for(len(sequence.token_ids), 1) > self.cache.num_pages - 1:
                self._outgrown(sequence, step)
            elif self._fits(sequence, promised):
                heappop(waiting)
                self._num_waiting -= 1
                sequence.status = _RUNNING
                insort(self._running, sequence, key=_rank)
                promised += self._schedule_prompt(sequence, step)
            else:
                break
        self._prompts_wait |= bool(waiting) and len(self._running) < limits.max_num_seqs

    def _fits(self, sequence: Sequence, promised: int) -> bool:
        """Take its cached pages if the rest can be had. Where nothing runs, whoever fits into the cache at all does."""
        running, free = len(self._running), self.cache.num_free_pages
        spare = promised + int(self._headroom * (running + 1) / self.cache.page_size) if running else 0
        if self._blocked and self._blocked[0] is sequence and free - spare < self._blocked[1] and running:
            return False  # looking up a long prompt in every step of waiting would cost more than the step
        leader = self._groups[sequence.request.id].leader
        sibling = leader if leader.status is _RUNNING else None
        lacking = self.cache.admit(sequence, sibling, self.limits.chunk if running else 1, spare)
        self._blocked = (sequence, free - spare + lacking) if lacking else None
        return not lacking

    def _cut_drafts(self, sequence: Sequence, spare: int) -> int:
        room = self.limits.max_model_len - 1 - len(sequence.token_ids)
        del sequence.drafts[max(0, min(spare, room)) :]
        return len(sequence.drafts)

    def _grow(self, sequence: Sequence, step: Step) -> bool:
        """Pages for an answer's next token and drafts; if they are short, without drafts."""
        if self.cache.reserve(sequence, len(sequence.token_ids) + len(sequence.drafts)):
            return True
        sequence.drafts = []
        return self._make_room(sequence, len(sequence.token_ids), step)

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Pages for positions < num_tokens, if need be those of drafts and then of the last in rank, maybe its own."""
        while not self.cache.reserve(sequence, num_tokens):
            if self._take_back_drafts(step):
                continue
            victim = self._running[-1]
            if len(self._running) == 1:
                self._outgrown(victim, step)
            else:
                self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _outgrown(self, sequence: Sequence, step: Step) -> None:
        tokens = (self.cache.num_pages - 1) * self.cache.page_size
        error = f"its {len(sequence.token_ids)} tokens fill the KV cache, which has room for {tokens}"
        self.finish(sequence, "length", error)
        step.finished.append(sequence)

    def _take_back_drafts(self, step: Step) -> bool:
        """Drop the drafts of this step; True if that freed a page."""
        free = self.cache.num_free_pages
        for part in step.slices:
            if part.drafts:
                step.num_tokens -= part.drafts
                part.count, part.drafts, part.sequence.drafts = part.count - part.drafts, 0, []
                self.cache.trim(part.sequence)
        return self.cache.num_free_pages > free

    def _preempt(self, victim: Sequence, step: Step) -> None:
        """Back to waiting, in its old place; its pages stay findable until they are needed, maybe till it is back."""
        assert self._running.pop() is victim
        for index in reversed(range(len(step.slices))):
            if step.slices[index].sequence is victim:
                step.num_tokens -= step.slices.pop(index).count
        self.num_preemptions += 1
        self.num_preempted_tokens += victim.num_computed_tokens
        victim.num_preemptions += 1
        self.cache.release(victim)
        victim.drafts, victim.status = [], Status.WAITING
        self._num_waiting += 1
        self._queue([victim])
        step.preempted.append(victim)
        if self._on_preempt is not None:
            self._on_preempt(victim)

    def _settle_drafts(self, part: Slice, new: Iterable[int]) -> None:
        accepted = list(new)[:-1]
        assert accepted == part.sequence.drafts[: len(accepted)], f"{accepted} were not drafts"
        part.sequence.drafts = []
        self.cache.trim(part.sequence)

    def _queue(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            heappush(self._waiting, (sequence.rank, sequence))

    def _release_siblings(self, sequence: Sequence) -> None:
        """A prompt is computed: others may find it in the cache now."""
        self._blocked = None
        group = self._groups[sequence.request.id]
        if group.leader is sequence and group.held:
            self._queue(held for held in group.held if held.status is not _FINISHED)
            group.held = []

    def _leave_group(self, sequence: Sequence) -> None:
        self._release_siblings(sequence)
        group = self._groups[sequence.request.id]
        group.live.discard(sequence)
        if not group.live:
            del self._groups[sequence.request.id]

    def _clear_left(self) -> None:
        """Give back the pages of sequences that ended, unless the step under way may still write to them."""
        if self._step is None:
            for sequence in self._left:
                self.cache.release(sequence)
            self._left.clear()
