"""Continuous batching: requests come and go at any time, and every step computes what the scheduler says."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from puna.base.console import PunaError, say, size
from puna.engine.adapters import Adapters
from puna.engine.answer import AnswerText, Piece
from puna.engine.batch import Batch, Batcher
from puna.engine.kv_cache import KVCache
from puna.engine.options import EngineOptions
from puna.engine.prompt_scores import score_prompts, wants_scores
from puna.engine.ranks.team import Team, lead
from puna.engine.request import Output, SamplingParams
from puna.engine.room import make_pages
from puna.engine.runner import Runner
from puna.engine.sampling.sampler import BatchSampler, Draws
from puna.engine.sampling.state import Row, SamplingState
from puna.engine.scheduler import Limits, Scheduler, Step
from puna.engine.sequence import Request, Sequence, Slice
from puna.engine.speculate.speculative import Speculation
from puna.model.linear import use_activations
from puna.model.transformer import Transformer
from puna.text.tokenizer import Tokenizer


@dataclass(slots=True)  # not frozen: one is made per answer and step, and that would take three times as long
class Progress:
    """What a step brought to one answer: text that is sure. `output` is the answer itself, which goes on to grow."""

    request_id: int
    index: int
    piece: str
    output: Output
    is_last: bool = False


@dataclass(slots=True)
class _Answer:
    """What the engine keeps of a sequence beside its tokens: how it is drawn, and what it says."""

    state: SamplingState
    text: AnswerText


class Engine:
    """A model, its pages, and everyone who is being answered. Not for several threads at once.

    `add` requests, call `step` while `has_work`; `abort` at any moment in between.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        options: EngineOptions | None = None,
        team: Team | None = None,
    ):
        self.model, self.tokenizer, self.spec = model, tokenizer, model.spec
        self.options = options = options or EngineOptions()
        self.vocab_size = _drawable(model, tokenizer)
        self.eos_ids = set(self.spec.eos_token_ids) | set(tokenizer.eos_ids if tokenizer else ())
        if options.activations != "exact":
            use_activations(model, options.activations)
        self.pages, self.max_model_len = make_pages(model, options, team.size if team else 1)
        self.adapters = Adapters(model)
        self.runner = self._make_runner(team)
        windows = self.spec.sliding_windows
        window = None if None in windows else max(w for w in windows if w is not None)
        self.cache = KVCache(self.pages.num_pages, options.page_size, window, options.prefix_caching)
        limits = Limits(
            max_model_len=self.max_model_len,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
        self.scheduler = Scheduler(limits, self.cache, self._preempted)
        self.speculation: Speculation | None = None
        self._sampler = BatchSampler(self.vocab_size, self.eos_ids)
        self._batcher = Batcher(options.max_num_seqs, -(-self.max_model_len // options.page_size), options.page_size)
        self._answers: dict[Sequence, _Answer] = {}
        self._requests: dict[int, list[Sequence]] = {}
        self._scored: set[Sequence] = set()  # those whose prompt wants log-probabilities
        self._ended: list[Progress] = []  # between steps: aborted ones, to be told of with the next
        self._next_id = self._thrash = 0

    def _make_runner(self, team: Team | None) -> Runner:
        if team is not None:
            return lead(team, self.model, self.pages, self.max_model_len, self.options)
        options = self.options
        return Runner(self.model, self.pages, self.max_model_len, self.adapters, options.native, options.compile)

    # --- requests

    def check(self, prompt_ids: Many[int], params: SamplingParams, adapter: str | None = None) -> SamplingParams:
        """The parameters with a seed and a number of tokens; PunaError (both numbers) for what cannot be answered."""
        if not prompt_ids:
            raise PunaError("the prompt is empty (0 tokens)", "give at least one character or token id")
        if wrong := [token for token in prompt_ids if not 0 <= token < self.spec.vocab_size]:
            raise PunaError(f"token id {wrong[0]} is outside the vocabulary of {self.spec.vocab_size}", "check the ids")
        self.adapters.slot(adapter)
        limit, tokens = self.max_model_len, len(prompt_ids)
        if tokens >= limit:
            raise PunaError(
                f"the prompt has {tokens} tokens, the model's context is {limit}: nothing can follow",
                f"shorten it by {tokens - limit + 1} tokens or more, or use a model with a longer context",
            )
        if params.max_tokens is None:
            params = dataclasses.replace(params, max_tokens=limit - tokens)
        elif tokens + params.max_tokens > limit:
            raise PunaError(
                f"the prompt has {tokens} tokens and max_tokens is {params.max_tokens}: {tokens + params.max_tokens} "
                f"together, the limit is {limit}",
                f"lower max_tokens to {limit - tokens} (or None: until the context is full), or shorten the prompt",
            )
        return params.seeded()

    def add(
        self,
        prompt_ids: Many[int],
        params: SamplingParams,
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str = "",
        indices: Iterable[int] | None = None,
    ) -> int:
        """Queue a request; returns its id. indices: which of its answers (default: all `params.num_answers`).

        Errors: PunaError for what can never be answered; then nothing is queued.
        """
        params, ids = self.check(prompt_ids, params, adapter), list(prompt_ids)
        request = Request(self._next_id, ids, params, priority, adapter, self.adapters.digest(adapter), cache_salt)
        sequences, answers = [], {}
        for index in range(params.num_answers) if indices is None else indices:
            sequence = Sequence(self._next_id, request, index, list(ids), len(ids))
            sequence.use_prefix_cache = params.prompt_logprobs is None
            state = SamplingState(params, ids, index, self.vocab_size, self.eos_ids)
            room = self.max_model_len - len(ids)
            text = AnswerText(params, self.tokenizer, self.eos_ids, len(ids), room, index)
            answers[sequence] = _Answer(state, text)
            sequences.append(sequence)
            self._next_id += 1
        self.scheduler.add(sequences)
        self._answers |= answers
        self._scored.update(sequences if params.prompt_logprobs is not None else ())
        self._requests[request.id] = sequences
        return request.id

    def abort(self, request_id: int) -> None:
        """End a request wherever it is; what it has said comes with the next `step`. Unknown ones are no error."""
        sequences = self._requests.get(request_id, [])
        self.scheduler.abort(request_id)
        for sequence in list(sequences):
            if sequence in self._answers:
                self._ended.append(self._close(sequence))

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._ended)

    # --- a step

    def step(self) -> list[Progress]:
        """Compute one batch; what it brought, answer by answer."""
        step = self.scheduler.schedule()
        self._batcher.forget(step.preempted)
        ended, self._ended = self._ended, []
        ended += [self._close(sequence) for sequence in step.finished]
        if not step.slices:
            self.scheduler.update(step, {})
            return ended
        started = time.perf_counter()
        try:
            batch = self._batcher.of(step.slices, self._adapter_slots(step))
            draws = self._draw(step, batch)
        except BaseException:
            self.scheduler.cancel()  # an interrupt, or the device failed: nothing of this step counts
            self._ended = ended + self._ended
            raise
        progress = self._take_in(step, draws)
        if self.speculation is not None:
            self.speculation.timed(step.slices, time.perf_counter() - started)
            self.speculation.propose(
                [part.sequence for part in step.slices if part.draws and not _is_tried_again(part)]
            )
        return ended + progress

    def _draw(self, step: Step, batch: Batch) -> Draws:
        outputs = {part.sequence: self._answers[part.sequence].text.output for part in step.slices if self._scored}
        if self._scored and wants_scores(step.slices, outputs):
            self.runner.hidden(batch)
            score_prompts(self.runner, step.slices, batch, outputs, self.vocab_size)
            logits_RV = self.runner.logits(batch.rows_R)
        else:
            logits_RV = self.runner.run(batch)
        return self._sampler.draw(logits_RV, self._rows(step))

    def _rows(self, step: Step) -> list[Row]:
        rows = []
        for part in step.slices:
            if part.draws:
                state, drafts = self._answers[part.sequence].state, part.sequence.drafts
                rows += [Row(state, tuple(drafts[:n])) for n in range(part.drafts + 1)] if part.drafts else [Row(state)]
        return rows

    def _take_in(self, step: Step, draws: Draws) -> list[Progress]:
        """Verified tokens to their sequences, text to their readers; whoever is done leaves."""
        row, drawn, news = 0, dict[Sequence, list[int]](), list[tuple[Sequence, _Answer, str, str | None]]()
        for part in step.slices:
            if not part.draws:
                continue
            sequence, first = part.sequence, row
            answer = self._answers[sequence]
            row += 1 + part.drafts
            tokens, error = [draws.token_ids[first]], None
            if part.drafts or draws.failed:
                tokens, error = self._verify(part, draws, first)
            piece = self._push(answer.text, tokens, draws, first)
            drawn[sequence] = tokens = tokens[: piece.kept]
            answer.state.accept(tokens)
            news.append((sequence, answer, piece.text, error))
        self.scheduler.update(step, drawn)
        return [self._settle(*one) for one in news]

    def _push(self, text: AnswerText, tokens: list[int], draws: Draws, first: int) -> Piece:
        if draws.logprobs is None or draws.top_logprobs is None:
            return text.push(tokens)
        end = first + len(tokens)
        return text.push(tokens, draws.logprobs[first:end], draws.top_logprobs[first:end])

    def _verify(self, part: Slice, draws: Draws, first: int) -> tuple[list[int], str | None]:
        """The tokens this slice brings, or why there are none.

        With drafts a failed row says little: a draft may have no numbers, and what attention masks is still multiplied
        by 0. So only rows before it count, and if there are none the token is computed again, alone.
        """
        drawn = draws.token_ids[first : first + 1 + part.drafts]
        good = next((place for place in range(len(drawn)) if first + place in draws.failed), len(drawn))
        if not part.drafts or self.speculation is None:
            return drawn[: min(good, 1)], draws.failed.get(first)
        drafts = part.sequence.drafts[: part.drafts]
        return self.speculation.verify(part.sequence, drafts, drawn)[:good] if good else [], None

    def _settle(self, sequence: Sequence, answer: _Answer, piece: str, error: str | None) -> Progress:
        output = answer.text.output
        if output.finish_reason is not None:
            self.scheduler.finish(sequence, output.finish_reason)
        elif error is not None:
            self.scheduler.finish(sequence, "error", error)
        elif sequence.finish_reason is None:
            return Progress(sequence.request.id, sequence.index, piece, output)
        return self._close(sequence, piece)

    def _close(self, sequence: Sequence, piece: str = "") -> Progress:
        """A finished sequence leaves the engine; what was held back of its text comes out."""
        answer = self._answers.pop(sequence)
        siblings = self._requests[sequence.request.id]
        output = answer.text.output
        piece += answer.text.finish(sequence.finish_reason or "abort", sequence.error)
        output.num_cached_tokens, output.num_preemptions = sequence.num_cached_tokens, sequence.num_preemptions
        if all(other not in self._answers for other in siblings):
            del self._requests[sequence.request.id]
        self._batcher.forget([sequence])
        self._scored.discard(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)
        return Progress(sequence.request.id, sequence.index, piece, output, is_last=True)

    # --- the rest

    def _adapter_slots(self, step: Step) -> list[int] | None:
        if not self.adapters.names:
            return None
        slots = [self.adapters.slot(part.sequence.request.adapter) for part in step.slices]
        return slots if any(slots) else None

    def _preempted(self, sequence: Sequence) -> None:
        """Said when it begins and at every power of two: thrash must not be silent, nor flood the terminal."""
        self._thrash += 1
        if self._thrash & (self._thrash - 1) == 0:
            say(
                f"KV cache full: {self._thrash} preemption{'s' if self._thrash > 1 else ''} so far, the last one of "
                f"{len(sequence.token_ids)} tokens, to be computed again; more kv_memory or a lower max_num_seqs helps"
            )

    def load_adapter(self, name: str, path: str) -> None:
        """Make a LoRA adapter known by a name. Errors: PunaError for a broken one; nothing has changed then."""
        self.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and what was cached with it. Errors: PunaError while requests use it."""
        digest = self.adapters.digest(name)
        users = sum(sequence.request.adapter == name for sequence in self._answers)
        if users:
            raise PunaError(f"{users} answers in the making use adapter {name!r}", "wait for them or abort them")
        self.adapters.unload(name)
        self.cache.drop_adapter(digest)

    def stats(self) -> dict[str, Any]:
        """Counters and sizes for a card, a log line, a metrics page."""
        scheduler, pages = self.scheduler, self.pages
        found: dict[str, Any] = {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "steps": scheduler.num_steps,
            "computed_tokens": scheduler.num_computed_tokens,
            "drawn_tokens": scheduler.num_drawn_tokens,
            "preemptions": scheduler.num_preemptions,
            "preempted_tokens": scheduler.num_preempted_tokens,
            "cache_usage": self.cache.usage,
            "cache_tokens": (pages.num_pages - 1) * pages.page_size,
            "cache_bytes_per_token": pages.bytes_per_token,
        }
        return found | ({"speculation": self.speculation.report()} if self.speculation else {})

    def card(self) -> str:
        """One line: what computes, and what there is room for."""
        pages = self.pages
        tokens = (pages.num_pages - 1) * pages.page_size
        return (
            f"{self.runner.path}; KV cache {size(tokens * pages.bytes_per_token)} "
            f"({str(pages.keys.dtype).removeprefix('torch.')}): {tokens:,} tokens in pages of {pages.page_size}; "
            f"sequences up to {self.max_model_len:,}"
        )


def _is_tried_again(part: Slice) -> bool:
    """Whether a slice with drafts brought nothing: the next step computes its token without any."""
    sequence = part.sequence
    return part.drafts > 0 and sequence.num_computed_tokens == part.start


def _drawable(model: Transformer, tokenizer: Tokenizer | None) -> int:
    """Rows that pad the embedding beyond the tokenizer have no text: they are never drawn."""
    rows = model.spec.vocab_size
    if tokenizer and tokenizer.vocab_size > rows:
        raise PunaError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {rows}",
            "the folder mixes files of two models; fetch it again",
        )
    return tokenizer.vocab_size if tokenizer else rows
