"""The scheduler with a toy in the model's place, which reads every token back through the page tables."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from puna.base.console import PunaError
from puna.engine import scheduler
from puna.engine.kv_cache import NULL_PAGE, KVCache
from puna.engine.request import SamplingParams
from puna.engine.scheduler import Limits, Scheduler, Step
from puna.engine.sequence import Request, Sequence, Status

VOCAB = 4  # few, so that beginnings coincide


def next_token(seen: tuple[int, ...], index: int) -> int:
    """The toy: a token that depends on every token seen (and on which of n answers it is)."""
    number = 5381 + index
    for token in seen:
        number = (33 * number + token + 1) % 1_000_003
    return number % VOCAB


def answer_alone(prompt: list[int], index: int, count: int, window: int | None) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tuple(tokens[-(window or len(tokens)) :]), index))
    return tokens[len(prompt) :]


@dataclass
class Toy:
    """An engine of token ids: a page holds the ids themselves, where a cache would hold their keys and values."""

    limits: Limits
    cache: KVCache
    guess: random.Random | None = None  # proposes drafts
    asked: dict[int, list[Sequence]] = field(default_factory=dict)
    preempted: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, self.cache, self.preempted.append)
        self.rows = [[-1] * self.cache.page_size for _ in range(self.cache.num_pages)]

    def ask(self, prompt: list[int], n: int = 1, priority: int = 0, max_tokens: int = 4, **kw) -> list[Sequence]:
        request = Request(len(self.asked), prompt, SamplingParams(n=n, max_tokens=max_tokens), priority, **kw)
        sequences = [Sequence(100 * request.id + i, request, i, list(prompt), len(prompt)) for i in range(n)]
        self.scheduler.add(sequences)
        self.asked[request.id] = sequences
        return sequences

    def forward(self, step: Step) -> dict[Sequence, list[int]]:
        """Write every slice, then read what each row sees. A page that is written has one holder and is not findable."""
        size = self.cache.page_size
        for part in step.slices:
            seq, end = part.sequence, part.start + part.count
            tokens = seq.token_ids + seq.drafts
            assert part.start == seq.num_computed_tokens
            assert end <= len(seq.pages) * size
            for position in range(part.start, end):
                page = seq.pages[position // size]
                assert page != NULL_PAGE
                assert self.cache._holders[page] == 1, "a shared page is written"
                assert self.cache._node_of[page] is None, "a findable page is written"
                self.rows[page][position % size] = tokens[position]
        return {part.sequence: self.draw(part) for part in step.slices if part.draws}

    def draw(self, part) -> list[int]:
        seq = part.sequence
        new: list[int] = []
        for position in range(part.start + part.count - part.drafts - 1, part.start + part.count):
            new.append(next_token(self.seen(seq, position), seq.index))
            if len(new) <= part.drafts and new[-1] != seq.drafts[len(new) - 1]:
                break
        return new[: seq.request.params.max_tokens - seq.num_generated]

    def seen(self, seq: Sequence, position: int) -> tuple[int, ...]:
        size = self.cache.page_size
        first = 0 if self.cache.window is None else max(0, position - self.cache.window + 1)
        found = tuple(self.rows[seq.pages[p // size]][p % size] for p in range(first, position + 1))
        assert found == tuple((seq.token_ids + seq.drafts)[first : position + 1]), "another's keys and values"
        return found

    def step(self, meanwhile=lambda step: None) -> Step:
        step = self.scheduler.schedule()
        self.check(step)
        drawn = self.forward(step)
        meanwhile(step)
        self.scheduler.update(step, drawn)
        for seq in drawn:
            if seq.num_generated >= seq.request.params.max_tokens:
                self.scheduler.finish(seq, "length")
            elif self.guess is not None and seq.status is Status.RUNNING:
                seq.drafts = self.propose(seq)
        self.cache.check_integrity(self.scheduler.sequences)
        needed = [-(-len(part.sequence.token_ids) // self.cache.page_size) for part in step.slices]
        assert all(len(part.sequence.pages) <= pages for part, pages in zip(step.slices, needed, strict=True))
        return step

    def propose(self, seq: Sequence) -> list[int]:
        assert self.guess is not None
        count, limit = self.guess.randrange(4), seq.request.params.max_tokens - seq.num_generated - 1
        right = answer_alone(seq.token_ids, seq.index, min(count, limit), self.cache.window)
        return [token if self.guess.random() < 0.7 else self.guess.randrange(VOCAB) for token in right]

    def check(self, step: Step) -> None:
        assert step.num_tokens == sum(part.count for part in step.slices) <= self.limits.max_num_batched_tokens
        assert len({part.sequence for part in step.slices}) == len(step.slices) <= self.limits.max_num_seqs
        assert self.scheduler.num_running <= self.limits.max_num_seqs
        assert all(part.sequence.status is Status.RUNNING for part in step.slices)
        assert all(part.count > 0 for part in step.slices)
        assert not any(seq.pages or seq.drafts or seq.num_computed_tokens for seq in step.preempted)
        assert step.slices or step.finished or not self.scheduler.has_work, "a step in which nothing happens"

    def run(self, most: int = 5000) -> int:
        """Steps until all is done."""
        for count in range(most):
            if not self.scheduler.has_work:
                return count
            self.step()
        raise AssertionError(f"not done after {most} steps")

    def check_answers(self) -> None:
        """Whatever happened on the way: the tokens are those of each request alone."""
        for sequences in self.asked.values():
            for seq in sequences:
                assert seq.status is Status.FINISHED
                alone = answer_alone(list(seq.request.prompt_ids), seq.index, seq.num_generated, self.cache.window)
                assert seq.generated_ids == alone
                if seq.finish_reason == "length" and not seq.error:
                    assert seq.num_generated == seq.request.params.max_tokens
        assert self.scheduler.sequences == []
        assert self.cache.num_free_pages == self.cache.num_pages - 1


def toy(
    pages=41, size=4, budget=16, seqs=8, chunk=0, window=None, caching=True, guess=None, aging=256, length=500
) -> Toy:
    limits = Limits(
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
        steps_per_priority=aging,
    )
    return Toy(limits, KVCache(pages, size, window, caching), random.Random(guess) if guess is not None else None)


def test_an_answer_grows_a_token_a_step_and_a_prompt_by_the_budget() -> None:
    t = toy()
    (seq,) = t.ask([1] * 40, max_tokens=3)
    assert [(p.start, p.count, p.draws) for p in (t.step().slices[0] for _ in range(4))] == [
        (0, 16, False),
        (16, 16, False),
        (32, 8, True),
        (40, 1, True),
    ]
    t.run()
    assert seq.generated_ids == answer_alone([1] * 40, 0, 3, None)
    assert (seq.finish_reason, t.scheduler.num_drawn_tokens, t.scheduler.num_computed_tokens) == ("length", 3, 42)


def test_a_long_prompt_never_holds_up_running_answers() -> None:
    t = toy(pages=200, budget=16, seqs=8)
    short = [t.ask([i], max_tokens=30)[0] for i in range(4)]
    t.step()
    (long,) = t.ask([2] * 200, max_tokens=1)
    while long.status is not Status.FINISHED:
        before = [seq.num_generated for seq in short]
        step = t.step()
        assert [seq.num_generated - b for seq, b in zip(short, before, strict=True)] == [1] * 4
        assert step.num_tokens == 16 or long.status is Status.FINISHED
    t.run()
    t.check_answers()


def test_pieces_of_a_set_size_let_prompts_advance_side_by_side() -> None:
    t = toy(pages=200, budget=16, chunk=4)
    for i in range(4):
        t.ask([i] * 30)
    assert [part.count for part in t.step().slices] == [4, 4, 4, 4]


def test_what_was_computed_is_not_computed_again() -> None:
    t = toy(pages=100, budget=64)
    prompt = [random.Random(0).randrange(VOCAB) for _ in range(30)]
    t.ask(prompt)
    t.run()
    (seq,) = t.ask([*prompt, 1, 2])
    assert t.step().slices[0].start == 28 == seq.num_cached_tokens
    t.run()
    t.check_answers()
    assert (t.cache.num_queried_tokens, t.cache.num_hit_tokens) == (62, 28)


@pytest.mark.parametrize("caching", [True, False])
def test_answers_to_one_prompt_compute_it_once(caching) -> None:
    t = toy(pages=100, budget=64, caching=caching)
    t.ask([0, 1, 2, 3] * 5 + [1, 2], n=4)
    assert [part.count for part in t.step().slices] == [22]
    assert t.scheduler.num_waiting == 3
    assert [part.count for part in t.step().slices] == [1, 2, 2, 2]
    t.run()
    t.check_answers()


def test_a_leader_that_ends_early_sets_its_siblings_free() -> None:
    for meanwhile in ("finish", "abort"):
        t = toy(pages=100, budget=16)
        first, *others = t.ask([1] * 40, n=3)
        t.step()
        assert t.scheduler.num_waiting == 2
        if meanwhile == "finish":
            t.scheduler.finish(first, "error", "NaN logits")
            t.run()
            assert first.error == "NaN logits"
            assert all(seq.num_generated == 4 for seq in others)
        else:
            t.scheduler.abort(first.request.id)
            assert not t.scheduler.has_work
            assert [seq.finish_reason for seq in (first, *others)] == ["abort"] * 3
        assert (t.scheduler.num_waiting, t.scheduler.num_running) == (0, 0)
        t.check_answers()


def test_too_little_memory_costs_time_but_no_answer() -> None:
    t = toy(pages=11, size=4, budget=32)
    for i in range(8):
        t.ask([i % VOCAB] * 6, max_tokens=24)
    t.run()
    t.check_answers()
    assert t.scheduler.num_preemptions == len(t.preempted) > 0
    assert t.scheduler.num_preempted_tokens > 0
    assert t.preempted[0] is not t.asked[0][0]  # the first never


def test_the_first_of_the_waiting_is_looked_at_again_when_it_may_fit() -> None:
    t = toy(pages=21, size=4)
    t.ask([1] * 8, max_tokens=40)
    t.step()
    t.scheduler._headroom = 64.0  # as after a preemption: 32 pages are to be left
    (seq,) = t.ask([2] * 8)
    t.step()
    assert seq.status is Status.WAITING
    t.scheduler._headroom = 0.0
    t.step()
    assert seq.status is Status.RUNNING
    t = toy(pages=9, size=4, budget=16, chunk=8)
    t.ask([1] * 20, max_tokens=8)
    (seq,) = t.ask([1] * 20)  # 5 pages, but 4 of them are those of the first, once it has them
    t.step(), t.step(), t.step()
    assert seq.status is Status.WAITING
    t.step()
    assert (seq.status, seq.num_cached_tokens) == (Status.RUNNING, 16)
    t.run()
    t.check_answers()


def test_whoever_is_preempted_leaves_the_step_it_was_in() -> None:
    t = toy(pages=9, size=4, budget=8, chunk=4)
    (long,), (answer,) = t.ask([1] * 24), t.ask([2] * 4, max_tokens=20)
    for _ in range(5):
        assert len(t.step().slices) == 2
    step = t.step()  # the answer has taken the last page, the prompt before it in rank needs it
    assert step.preempted == [answer]
    assert [part.sequence for part in step.slices] == [long]
    t.run()
    t.check_answers()


def test_after_a_preemption_fewer_are_admitted(monkeypatch) -> None:
    """Hysteresis: without headroom the same load computes many more tokens twice."""

    def wasted(headroom: float) -> int:
        monkeypatch.setattr(scheduler, "_HEADROOM_MOST", headroom)
        t = toy(pages=81, size=4, budget=256, seqs=64, length=1000)
        for i in range(60):
            t.ask([i % VOCAB, i // VOCAB] * 2, max_tokens=60)
        t.run()
        t.check_answers()
        return t.scheduler.num_preempted_tokens

    assert 0 < wasted(64.0) < 0.5 * wasted(0.0)


@pytest.mark.parametrize("preempted", [False, True])
def test_an_answer_that_fills_the_cache_alone_ends_with_the_numbers(preempted) -> None:
    t = toy(pages=6, size=4)
    (seq,) = t.ask([1] * 10, max_tokens=100)
    while len(seq.token_ids) < 21:
        t.step()
    if preempted:
        t.scheduler.preempt_all()
    assert t.step().finished == [seq]
    assert (seq.finish_reason, len(seq.token_ids)) == ("length", 21)  # the last one needs no keys
    assert seq.error is not None
    assert "21 tokens" in seq.error
    assert "20" in seq.error
    t.check_answers()


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    t = toy(pages=6, size=4, length=30)
    with pytest.raises(PunaError, match=r"31 tokens, max_model_len is 30"):
        t.ask([1] * 31)
    with pytest.raises(PunaError, match=r"21 tokens needs 6 pages, the KV cache has 5"):
        t.ask([1] * 21)
    assert not t.scheduler.has_work
    with pytest.raises(PunaError, match=r"max_num_batched_tokens 4 is less than max_num_seqs 8"):
        Limits(max_model_len=8, max_num_seqs=8, max_num_batched_tokens=4)
    with pytest.raises(PunaError, match="not possible"):
        Limits(max_model_len=8, max_num_seqs=0)
    t = toy(pages=6, size=4, window=5, budget=64)
    (seq,) = t.ask([1] * 300)  # behind a window pages come back; its pieces are what the others hold
    t.run()
    t.check_answers()
    assert seq.num_generated == 4


def test_the_models_length_is_the_end() -> None:
    t = toy(length=12, guess=1, pages=100)
    (seq,) = t.ask([1] * 5, max_tokens=100)
    t.run()
    assert (len(seq.token_ids), seq.finish_reason) == (12, "length")


def test_drafts_give_way_to_budget_and_memory() -> None:
    t = toy(budget=8, seqs=4, pages=41)
    seqs = [t.ask([i], max_tokens=30)[0] for i in range(4)]
    t.step()
    for seq in seqs:
        seq.drafts = [0, 0, 0]
    step = t.scheduler.schedule()
    assert [part.drafts for part in step.slices] == [3, 1, 0, 0]
    assert [len(seq.drafts) for seq in seqs] == [3, 1, 0, 0]
    t.scheduler.cancel()
    for seq in seqs[1:]:
        t.scheduler.abort(seq.request.id)
    t.ask([1] * 20)
    t.step()
    seqs[0].drafts = [0] * 7
    assert [part.count for part in t.step().slices] == [1 + 3, 4]  # beside a prompt only half of what is left


def test_drafts_are_dropped_before_anyone_is_preempted() -> None:
    t = toy(pages=6, size=4, caching=False)
    a, b, c = (t.ask([i] * length)[0] for i, length in enumerate([3, 4, 4]))
    t.step()
    a.drafts = [0] * 4  # two pages; then b and c need their second
    step = t.step()
    assert [part.count for part in step.slices] == [1, 1, 1]
    assert not step.preempted
    assert [len(seq.pages) for seq in (a, b, c)] == [1, 2, 2]
    t.run()
    t.check_answers()


def test_an_abort_while_the_model_runs_gives_the_pages_back_afterwards() -> None:
    t = toy()
    (seq,) = t.ask([1] * 20)
    (other,) = t.ask([2] * 3, max_tokens=6)
    held = []

    def meanwhile(step: Step) -> None:
        t.scheduler.abort(seq.request.id)
        t.scheduler.abort(seq.request.id)
        t.scheduler.abort(12345)
        held.append(list(seq.pages))  # the model may still be writing here
        t.cache.check_integrity(t.scheduler.sequences)

    t.step(meanwhile)
    assert held[0] != []
    assert seq.pages == []
    assert (seq.finish_reason, seq.num_generated) == ("abort", 0)
    t.run()
    t.check_answers()
    assert other.num_generated == 6


def test_a_failed_step_is_scheduled_again() -> None:
    t = toy()
    t.ask([1] * 20)
    t.step()
    first = t.scheduler.schedule()
    t.scheduler.cancel()
    again = t.scheduler.schedule()
    assert [(p.start, p.count) for p in first.slices] == [(p.start, p.count) for p in again.slices]
    t.forward(again)
    t.scheduler.update(again, {})  # drew, but nothing came
    assert t.step().slices[0].count == 1
    t.run()
    t.check_answers()


def test_a_failed_step_keeps_no_pages_for_its_drafts() -> None:
    t = toy()
    (seq,) = t.ask([1] * 3, max_tokens=20)
    t.step()
    seq.drafts = [0] * 8
    t.scheduler.schedule()
    assert len(seq.pages) == 3
    t.scheduler.cancel()
    assert (len(seq.pages), len(seq.drafts)) == (1, 8)
    t.cache.check_integrity([seq])


def test_new_weights_start_everybody_again() -> None:
    t = toy(budget=64)
    seqs = [t.ask([i] * 9, max_tokens=8)[0] for i in range(3)]
    t.step()
    t.step()
    t.scheduler.preempt_all()
    t.cache.reset_prefix_cache()
    assert t.cache.num_free_pages == 40
    assert [part.start for part in t.step().slices] == [0, 0, 0]
    assert [seq.num_generated for seq in seqs] == [3, 3, 3]
    t.run()
    t.check_answers()


def test_priorities_go_first_and_waiting_counts_as_priority() -> None:
    t = toy(seqs=1, budget=64, aging=10)

    def finished(seq: Sequence) -> bool:
        return seq.status is Status.FINISHED

    t.ask([0], max_tokens=3)
    t.step()
    low, high = t.ask([1], priority=1)[0], t.ask([2], priority=-1)[0]
    while not finished(high):
        t.step()
    assert low.num_generated == 0
    waited = 0
    while not finished(low):  # a better one arrives every other step, for ever
        if waited % 2 == 0:
            t.ask([3], priority=0, max_tokens=2)
        t.step()
        waited += 1
    assert 5 <= waited <= 40  # one priority is worth ten steps
    t.run()
    t.check_answers()


def test_a_big_request_is_not_overtaken_for_ever_by_small_ones() -> None:
    t = toy(pages=21, size=4, seqs=8, budget=64)
    for _ in range(4):
        t.ask([0] * 3, max_tokens=12)
    t.step()
    (big,) = t.ask([1] * 70, max_tokens=1)
    steps = 0
    while big.status is not Status.FINISHED:
        t.ask([2] * 3, max_tokens=12)
        t.step()
        steps += 1
        assert steps < 40
    t.run()
    t.check_answers()


def test_ended_requests_do_not_pile_up_in_the_queue() -> None:
    t = toy(seqs=1)
    t.ask([0], max_tokens=400)
    t.step()
    for i in range(1000):
        (seq,) = t.ask([1])
        if i % 10:
            t.scheduler.abort(seq.request.id)
    assert t.scheduler.num_waiting == 100
    assert len(t.scheduler._waiting) < 300


class Machine(RuleBasedStateMachine):
    """Anything may arrive, end or fail at any moment; memory is far too small."""

    @initialize(
        pages=st.integers(4, 14),
        size=st.sampled_from([1, 2, 4]),
        seqs=st.integers(1, 5),
        more=st.integers(0, 12),
        chunk=st.sampled_from([0, 0, 1, 5]),
        window=st.sampled_from([None, None, 1, 4, 9]),
        caching=st.booleans(),
        guess=st.sampled_from([None, 0, 1]),
    )
    def start(self, pages, size, seqs, more, chunk, window, caching, guess) -> None:
        self.toy = toy(pages, size, seqs + more, seqs, chunk, window, caching, guess, aging=3, length=40)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        priority=st.integers(-1, 1),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from(["", "", "s"]),
    )
    def arrive(self, prompt, n, priority, max_tokens, salt) -> None:
        needed = self.toy.cache.pages_for(len(prompt), 1)
        if needed > self.toy.cache.num_pages - 1:
            with pytest.raises(PunaError, match="pages"):
                self.toy.ask(prompt, n)
            return
        sequences = self.toy.ask(prompt, n, priority, max_tokens, cache_salt=salt)
        sequences[0].use_prefix_cache = len(prompt) != 7

    @rule(count=st.integers(1, 6))
    def steps(self, count) -> None:
        for _ in range(count):
            self.toy.step()

    @rule(which=st.integers(0, 30))
    def abort(self, which) -> None:
        self.toy.scheduler.abort(which)

    @rule(which=st.integers(0, 30), late=st.integers(0, 6))
    def end_while_the_model_runs(self, which, late) -> None:
        def meanwhile(step: Step) -> None:
            self.toy.scheduler.abort(which)
            if late < len(step.slices):
                self.toy.scheduler.finish(step.slices[late].sequence, "error", "planted")
            self.toy.cache.check_integrity(self.toy.scheduler.sequences)

        self.toy.step(meanwhile)

    @rule()
    def fail(self) -> None:
        self.toy.forward(self.toy.scheduler.schedule())
        self.toy.scheduler.cancel()

    @rule(how=st.integers(0, 3))
    def forget(self, how) -> None:
        if how == 0:
            self.toy.scheduler.preempt_all()
        if how <= 1:
            self.toy.cache.reset_prefix_cache()
        if how == 2:
            self.toy.cache.drop_adapter(b"")

    @invariant()
    def no_page_is_lost(self) -> None:
        if hasattr(self, "toy"):
            self.toy.cache.check_integrity(self.toy.scheduler.sequences)

    def teardown(self) -> None:
        if hasattr(self, "toy"):
            self.toy.run()
            self.toy.check_answers()
            self.toy.cache.check_integrity([])


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, derandomize=True, deadline=None)
TestAnyOrder = Machine.TestCase
