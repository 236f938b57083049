"""Proposals of a smaller model with the same vocabulary (Leviathan et al. 2022, arXiv:2211.17192).

Each sequence has a mirror here: the same tokens, computed by the draft model into its own cache. What the mirror lacks
(a prompt at first, the last accepted tokens later, everything after pages ran out) is computed when it is next asked;
what it has too much (rejected drafts) is overwritten.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence as Many
from dataclasses import dataclass

from puna.base.console import PunaError, say
from puna.engine.batch import Batcher
from puna.engine.kv_cache import KVCache
from puna.engine.runner import Runner
from puna.engine.sampling.sampler import BatchSampler
from puna.engine.sampling.state import Row, SamplingState
from puna.engine.sequence import Sequence, Slice
from puna.engine.speculate.speculative import Proposal
from puna.model.transformer import Transformer
from puna.ops.paged import Pages
from puna.text.tokenizer import Tokenizer


@dataclass(slots=True)
class _Mirror:
    """A sequence as the draft model knows it: `copy.token_ids` are the sequence's first `known` tokens, then drafts."""

    copy: Sequence
    state: SamplingState
    known: int = 0
    shared: int = 0  # full pages that others may find

    @property
    def missing(self) -> int:
        return len(self.copy.token_ids) - self.copy.num_computed_tokens


class DraftModel:
    """Proposes what the draft model says at the same temperature, drawn by the very clocks of the target.

    That is right more often than its likeliest token (of a small pair at temperature 0.8: 49.0% and 24.9%;
    `benchmarks/speculative.py pair`), and at temperature 0 it is the likeliest token.

    vocab_size: tokens that can be drawn; num_pages: of the draft's own cache, which bounds its memory (the sequences
    that were idle for longest give way, and without pages nothing is proposed). catch_up: most tokens it computes at
    once for sequences it is behind with; the rest of a long prompt waits for the next step.
    """

    name, num_grades = "draft model", 1

    def __init__(
        self,
        model: Transformer,
        vocab_size: int,
        num_pages: int,
        max_num_seqs: int,
        eos_ids: set[int] | frozenset[int] = frozenset(),
        page_size: int = 16,
        catch_up: int = 512,
        native: bool = True,
    ):
        spec = model.spec
        self.max_len, self.catch_up, self._max_mirrors = spec.max_len, catch_up, max_num_seqs
        pages = Pages.of(
            spec.num_hidden_layers, spec.num_key_value_heads, spec.head_dim, num_pages, page_size,
            model.embed.dtype, model.embed.device,
        )  # fmt: skip
        windows = spec.sliding_windows
        window = None if None in windows else max(w for w in windows if w is not None)
        self._runner = Runner(model, pages, spec.max_len, native=native)
        self._cache = KVCache(num_pages, page_size, window)
        self._batcher = Batcher(max_num_seqs, -(-spec.max_len // page_size), page_size)
        self._sampler = BatchSampler(vocab_size, eos_ids)
        self._mirrors: OrderedDict[int, _Mirror] = OrderedDict()  # by sequence id, the longest idle first
        self._failures = 0

    def propose(self, wanted: Many[tuple[Sequence, int]]) -> list[Proposal]:
        """At most `limit` tokens for each (sequence, limit); none where the draft model is behind or out of room."""
        try:
            self._draft(wanted)
        except RuntimeError as error:  # of the device: no memory, say. The target goes on without drafts
            self._give_up(error)
        return [Proposal(self._drafts(sequence)) for sequence, _ in wanted]

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        mirror = self._mirrors.pop(sequence.id, None)
        if mirror is not None:
            self._batcher.forget([mirror.copy])
            self._cache.release(mirror.copy)

    def _draft(self, wanted: Many[tuple[Sequence, int]]) -> None:
        limits: dict[int, int] = {}
        for sequence, limit in wanted:
            self._sync(sequence)
            limits[sequence.id] = min(limit, self.max_len - len(sequence.token_ids) + 1)
        turn = [(self._mirrors[key], limit) for key, limit in limits.items() if limit > 0]
        left = self.catch_up
        slices = []
        for mirror, limit in sorted(turn, key=lambda pair: pair[0].missing):
            count = min(mirror.missing, left)
            start, is_last = mirror.copy.num_computed_tokens, count == mirror.missing
            if count and self._reserve(mirror, start + count + (limit - 1 if is_last else 0), limits):
                slices.append(Slice(mirror.copy, start, count, 0, is_last))
                left -= count
        while slices:
            self._compute(slices)
            slices = [
                Slice(part.sequence, part.sequence.num_computed_tokens, 1, 0, True)
                for part in slices
                if part.draws and len(self._drafted(part.sequence)) < limits[part.sequence.id]
            ]

    def _compute(self, slices: list[Slice]) -> None:
        """Run the slices; a draft for each that draws. A row that fails ends its proposal: it draws no more."""
        logits_RV = self._runner.run(self._batcher.of(slices))
        drawing = [part for part in slices if part.draws]
        rows = [Row(self._mirrors[p.sequence.id].state, tuple(self._drafted(p.sequence))) for p in drawing]
        draws = self._sampler.draw(logits_RV, rows) if rows else None
        for part in slices:
            part.sequence.num_computed_tokens += part.count
        for row, part in enumerate(drawing):
            assert draws is not None
            part.draws = row not in draws.failed
            if part.draws:
                part.sequence.token_ids.append(draws.token_ids[row])

    def _drafted(self, copy: Sequence) -> list[int]:
        return copy.token_ids[self._mirrors[copy.id].known :]

    def _drafts(self, sequence: Sequence) -> list[int]:
        mirror = self._mirrors.get(sequence.id)
        return [] if mirror is None else mirror.copy.token_ids[mirror.known :]

    def _sync(self, sequence: Sequence) -> None:
        """The mirror's tokens become the sequence's; what is computed of those stays."""
        mirror = self._mirrors.get(sequence.id) or self._new(sequence)
        self._mirrors.move_to_end(sequence.id)
        copy, ids, same = mirror.copy, sequence.token_ids, mirror.known
        mirror.state.accept(ids[max(mirror.known, sequence.num_prompt_tokens) :])
        while same < min(len(copy.token_ids), len(ids)) and copy.token_ids[same] == ids[same]:
            same += 1
        copy.token_ids[same:] = ids[same:]
        copy.num_computed_tokens = min(copy.num_computed_tokens, same, len(ids) - 1)
        mirror.known = len(ids)
        full = copy.num_computed_tokens // self._cache.page_size
        if full > mirror.shared:
            self._cache.commit(copy)
            self._batcher.forget([copy])  # a page may have been exchanged for an equal one
            mirror.shared = full

    def _new(self, sequence: Sequence) -> _Mirror:
        while len(self._mirrors) >= self._max_mirrors:
            self.forget(next(iter(self._mirrors.values())).copy)
        request = sequence.request
        params = dataclasses.replace(request.params, logprobs=None)
        state = SamplingState(
            params, request.prompt_ids, sequence.index, self._sampler.vocab_size, self._sampler.eos_ids
        )
        copy = Sequence(sequence.id, request, sequence.index, list(sequence.token_ids), sequence.num_prompt_tokens)
        mirror = self._mirrors[sequence.id] = _Mirror(copy, state)
        mirror.shared = self._cache.match(copy) // self._cache.page_size
        return mirror

    def _reserve(self, mirror: _Mirror, num_tokens: int, busy: dict[int, int]) -> bool:
        """Pages for positions < num_tokens, if need be those of mirrors that nobody asked for in this step."""
        while not self._cache.reserve(mirror.copy, num_tokens):
            idle = next((key for key in self._mirrors if key not in busy and self._mirrors[key].copy.pages), None)
            if idle is None:
                return False
            self.forget(self._mirrors[idle].copy)
        return True

    def _give_up(self, error: RuntimeError) -> None:
        """Start anew with the next step; said when it begins and at every power of two."""
        self._failures += 1
        if self._failures & (self._failures - 1) == 0:
            say(f"the draft model failed ({self._failures} times so far), nothing is proposed: {error}")
        for mirror in list(self._mirrors.values()):
            self.forget(mirror.copy)


def check_vocabulary(
    draft: Transformer, target: Transformer, draft_tokenizer: Tokenizer | None, target_tokenizer: Tokenizer | None
) -> None:
    """Refuse a draft model whose token ids mean something else.

    With two tokenizers they must be equal (padded embeddings may differ); without, the number of rows must be.
    """
    theirs, ours = draft.spec.vocab_size, target.spec.vocab_size
    if draft_tokenizer and target_tokenizer:
        if draft_tokenizer.vocab_hash == target_tokenizer.vocab_hash:
            return
        theirs, ours = draft_tokenizer.vocab_size, target_tokenizer.vocab_size
        what = "have different tokenizers"
    elif theirs == ours:
        return
    else:
        what = "have vocabularies of different size"
    raise PunaError(
        f"the draft model and the model {what}: {theirs} and {ours} tokens",
        "take a smaller model of the same family as draft, or --speculate ngram or suffix",
    )
