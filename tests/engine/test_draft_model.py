from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from puna.base.console import PunaError
from puna.engine.request import SamplingParams
from puna.engine.sampling.sampler import BatchSampler
from puna.engine.sampling.state import Row
from puna.engine.sequence import Request, Sequence, Status
from puna.engine.speculate.draft_model import DraftModel, check_vocabulary
from puna.engine.speculate.pace import Pace
from puna.engine.speculate.speculative import Speculation
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal

SPEC = Spec.preset("debug").replace(vocab_size=64, eos_token_ids=())
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.5}


def model(seed: int, scale: float = 8.0) -> Transformer:
    """Random weights, large enough that the model has opinions."""
    made = Transformer(SPEC)
    made.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in made.parameters():
            layer.mul_(scale if layer.ndim > 1 else 1)
    return made.eval()


@pytest.fixture(scope="module")
def target() -> Transformer:
    return model(1)


@pytest.fixture(scope="module")
def cousin(target: Transformer) -> Transformer:
    """A draft that is often right."""
    made, noise = Transformer(SPEC), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for ours, theirs in zip(made.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs * (1 + 0.05 * torch.randn(theirs.shape, generator=noise)))
    return made.eval()


def drafter(draft: Transformer, num_pages: int = 200, **options) -> DraftModel:
    return DraftModel(draft, 64, num_pages, options.pop("max_num_seqs", 8), page_size=4, **options)


def sequence(prompt: list[int], key: int = 0, max_tokens: int = 30, **knobs) -> Sequence:
    request = Request(key, prompt, SamplingParams(max_tokens=max_tokens, seed=7, **knobs))
    return Sequence(key, request, 0, list(prompt), len(prompt), len(prompt), status=Status.RUNNING)


class Target:
    """Draws a sequence's next token, and those behind each of `drafts`, by the trainer's forward."""

    def __init__(self, of: Transformer):
        self.model, self.sampler = of, BatchSampler(64)

    @torch.inference_mode()
    def __call__(self, seq: Sequence, drafts: list[int]) -> list[int]:
        ids, first = seq.token_ids + drafts, len(seq.token_ids) - 1
        hidden_TD = self.model(torch.tensor(ids), torch.arange(len(ids)), PackedCausal.of([len(ids)]))
        state = self.sampler.state(seq.request.params, seq.request.prompt_ids)
        rows = [Row(state, tuple(ids[seq.num_prompt_tokens : end])) for end in range(first + 1, len(ids) + 1)]
        return self.sampler.draw(self.model.logits(hidden_TD[first:]).float(), rows).token_ids


def advance(seq: Sequence, tokens: list[int]) -> None:
    seq.token_ids += tokens
    seq.num_computed_tokens, seq.drafts = len(seq.token_ids) - 1, []


def plain(target: Transformer, seq: Sequence) -> list[int]:
    draw = Target(target)
    while seq.num_generated < seq.request.params.max_tokens:
        advance(seq, draw(seq, []))
    return seq.generated_ids


class Always(Pace):
    def length(self, sequence: Sequence, num_sequences: int, grade: int) -> int:
        return self.max_drafts


def speculated(target: Transformer, speculation: Speculation, seqs: list[Sequence]) -> list[list[int]]:
    """All sequences at once, each drafts of its own."""
    draw, running = Target(target), list(seqs)
    for seq in seqs:
        advance(seq, draw(seq, []))
    while running:
        speculation.propose(running)
        for seq in running:
            advance(seq, speculation.verify(seq, seq.drafts, draw(seq, seq.drafts)))
        for seq in [seq for seq in running if seq.num_generated >= seq.request.params.max_tokens]:
            running.remove(seq)
            speculation.forget(seq)
    return [seq.generated_ids for seq in seqs]


def prompts(count: int, length: int = 10) -> list[list[int]]:
    luck = random.Random(3)
    return [[luck.randrange(64) for _ in range(length + 3 * i)] for i in range(count)]


def check(proposer: DraftModel) -> None:
    proposer._cache.check_integrity([mirror.copy for mirror in proposer._mirrors.values()])


@pytest.mark.parametrize("knobs", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_that_is_the_target_is_always_right(target, knobs) -> None:
    """Sampled too: it draws with the target's own random numbers, penalties and cuts included."""
    seqs = [sequence(prompt, key, **knobs) for key, prompt in enumerate(prompts(2))]
    speculation = Speculation(drafter(target), 500, Always(4))
    assert speculated(target, speculation, seqs) == [
        plain(target, sequence(seq.request.prompt_ids, **knobs)) for seq in seqs
    ]
    report = speculation.report()
    assert report["acceptance"] == 1
    assert report["proposed"] > 40


@pytest.mark.parametrize("knobs", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("num_pages", [200, 14, 3])
def test_tokens_are_those_without_a_draft_and_no_page_is_lost(target, cousin, knobs, num_pages) -> None:
    """With 13 pages of 4 tokens the mirrors push each other out; with 2 there is never room for one."""
    given = prompts(3)
    seqs = [sequence(prompt, key, **knobs) for key, prompt in enumerate(given)]
    proposer = drafter(cousin, num_pages)
    speculation = Speculation(proposer, 500, Always(3))
    assert speculated(target, speculation, seqs) == [plain(target, sequence(prompt, **knobs)) for prompt in given]
    accepted = speculation.report()["accepted"]
    assert accepted == 0 if num_pages == 3 else 0 < accepted < speculation.report()["proposed"]
    assert not proposer._mirrors
    check(proposer)
    assert proposer._cache.num_free_pages == num_pages - 1


def test_proposals_are_those_of_a_draft_model_that_just_came(target, cousin) -> None:
    """Whatever was computed, rejected, caught up or pushed out before, alone or among others."""
    luck, proposer, draw = random.Random(5), drafter(cousin, 30, max_num_seqs=3), Target(target)
    seqs = [sequence(prompt, key, 100, **SAMPLED) for key, prompt in enumerate(prompts(4))]
    compared = 0
    for _ in range(30):
        asked = [(seq, luck.randrange(1, 6)) for seq in luck.sample(seqs, luck.randrange(1, 4))]
        found = proposer.propose(asked)
        check(proposer)
        for (seq, limit), proposal in zip(asked, found, strict=True):
            if proposal.tokens:
                assert proposal.tokens == drafter(cousin).propose([(seq, limit)])[0].tokens
                compared += len(proposal.tokens)
            kept = proposal.tokens[: luck.randrange(0, limit + 1)]
            advance(seq, [*kept, draw(seq, kept)[-1]])
            if luck.random() < 0.5:  # a step in which it was not asked
                advance(seq, draw(seq, []))
    assert compared > 100


def test_equal_beginnings_share_pages_and_stay_right(target, cousin) -> None:
    proposer, draw, prompt = drafter(cousin, 60), Target(target), prompts(1, 21)[0]
    twins = [sequence(prompt, key, 100, **SAMPLED) for key in (0, 1)]
    for _ in range(2):
        proposer.propose([(seq, 4) for seq in twins])  # at first each computes the prompt for itself
        for seq in twins:
            advance(seq, draw(seq, []))
    pages = [proposer._mirrors[seq.id].copy.pages[:5] for seq in twins]
    assert pages[0] == pages[1]
    proposer.propose([(sequence(prompts(2, 40)[1], 2), 4)])  # writes into the pages that one of them gave back
    for seq, proposal in zip(twins, proposer.propose([(seq, 4) for seq in twins]), strict=True):
        assert proposal.tokens == drafter(cousin).propose([(seq, 4)])[0].tokens
    proposer.propose([(sequence(prompt, 3), 4)])
    assert proposer._mirrors[3].copy.pages[:5] == pages[0]
    check(proposer)


def test_a_long_prompt_is_caught_up_with_in_pieces(target) -> None:
    proposer = drafter(target, catch_up=16)
    long, short = sequence(prompts(1, 50)[0], 0), sequence(prompts(1, 5)[0], 1)
    found = [[len(proposal.tokens) for proposal in proposer.propose([(long, 2), (short, 2)])] for _ in range(4)]
    assert found == [[0, 2], [0, 2], [0, 2], [2, 2]]  # the short one takes 5, then 1 of each 16


def test_beyond_the_drafts_context_nothing_is_proposed(target) -> None:
    proposer = drafter(target)
    proposer.max_len = 20
    assert [len(proposer.propose([(sequence([1] * n, n), 4)])[0].tokens) for n in (16, 17, 18, 20, 21, 30)] == [
        4, 4, 3, 1, 0, 0,
    ]  # fmt: skip


def test_a_failing_device_means_no_proposals_and_a_new_beginning(target, monkeypatch, capsys) -> None:
    proposer, seq = drafter(target), sequence(prompts(1)[0])
    first = proposer.propose([(seq, 3)])[0].tokens
    with monkeypatch.context() as patch:
        patch.setattr(proposer._runner, "run", lambda batch: (_ for _ in ()).throw(RuntimeError("out of memory")))
        assert proposer.propose([(seq, 3)])[0].tokens == []
    check(proposer)
    assert "out of memory" in capsys.readouterr().err
    assert not proposer._mirrors
    assert proposer.propose([(seq, 3)])[0].tokens == first


def test_logits_that_are_no_numbers_end_a_proposal() -> None:
    broken = model(1)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    assert drafter(broken).propose([(sequence([1, 2, 3]), 4)])[0].tokens == []


def test_other_vocabularies_are_refused(target) -> None:
    class Words:
        def __init__(self, name: str, size: int):
            self.vocab_hash, self.vocab_size = name, size

    other = dataclasses.replace(SPEC, vocab_size=96)
    with torch.device("meta"):
        padded = Transformer(other)
    with pytest.raises(PunaError, match="different size: 96 and 64 tokens"):
        check_vocabulary(padded, target, None, None)
    check_vocabulary(target, target, None, None)
    check_vocabulary(padded, target, Words("a", 60), Words("a", 60))
    with pytest.raises(PunaError, match="different tokenizers: 50 and 60 tokens"):
        check_vocabulary(target, target, Words("b", 50), Words("a", 60))
