"""Requests that come, go, fail and are aborted: contained, told, and no page lost."""

from __future__ import annotations

import random

import pytest
import torch

import puna
from puna.base.console import PunaError
from puna.engine.engine import Engine
from puna.engine.options import EngineOptions
from puna.engine.request import Output, SamplingParams
from puna.engine.speculate.pace import Pace
from puna.engine.speculate.speculative import Proposal, Speculation
from puna.model.spec import Spec
from puna.weights.folder import empty_model

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def model(model_folder):
    return puna.load_model(model_folder)


def engine_of(model, **limits) -> Engine:
    return Engine(model, None, EngineOptions(**limits))


def run(engine: Engine, steps: int = 10_000) -> dict[tuple[int, int], Output]:
    found = {}
    while engine.has_work and steps:
        steps -= 1
        for news in engine.step():
            if news.is_last:
                assert (news.request_id, news.index) not in found
                found[news.request_id, news.index] = news.output
        engine.cache.check_integrity(engine.scheduler.sequences)
    assert not engine.has_work
    return found


def test_prompt_and_answer_beyond_the_limit_are_refused_with_both_numbers(model) -> None:
    engine = engine_of(model, max_model_len=64)
    with pytest.raises(PunaError, match="prompt has 60 tokens and max_tokens is 5: 65 together, the limit is 64"):
        engine.add([1] * 60, SamplingParams(max_tokens=5))
    with pytest.raises(PunaError, match="prompt has 64 tokens, the model's context is 64"):
        engine.add([1] * 64, SamplingParams(max_tokens=1))
    assert not engine.has_work
    engine.add([1] * 60, SamplingParams(**GREEDY, max_tokens=None))
    assert [len(output.token_ids) for output in run(engine).values()] == [4]


@pytest.mark.parametrize(("ids", "match"), [([], "empty"), ([320], "token id 320 is outside"), ([-1], "token id -1")])
def test_unusable_ids(model, ids, match) -> None:
    with pytest.raises(PunaError, match=match):
        engine_of(model).add(ids, SamplingParams())


def test_a_request_whose_logits_are_no_numbers_fails_alone() -> None:
    spec = Spec.preset("debug").replace(tie_word_embeddings=False)
    model = empty_model(spec, torch.float32, torch.device("cpu")).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    plain = run_all(engine_of(model), [[5, 6, 7], [8, 9], [10]])
    with torch.no_grad():
        model.embed[300] = float("nan")  # whoever says 300 sees no numbers from there on
    engine = engine_of(model)
    outputs = run_all(engine, [[5, 6, 7], [8, 300], [10]])
    assert outputs[1].finish_reason == "error"
    assert "nan" in (outputs[1].error or "")
    assert outputs[1].token_ids == []
    for place in (0, 2):
        assert outputs[place].token_ids == plain[place].token_ids
        assert outputs[place].finish_reason == "length"


def run_all(engine: Engine, prompts: list[list[int]]) -> list[Output]:
    for prompt in prompts:
        engine.add(prompt, SamplingParams(**GREEDY, max_tokens=6, logit_bias={300: -100}))
    found = run(engine)
    return [found[key] for key in sorted(found)]


def test_aborts_at_any_moment_leave_nothing_behind(model) -> None:
    draw = random.Random(0)
    for turn in range(8):
        engine = engine_of(model, max_num_seqs=3, max_num_batched_tokens=7, page_size=4)
        ids = [
            engine.add([draw.randrange(300) for _ in range(draw.randrange(1, 20))], SamplingParams(max_tokens=9, n=2))
            for _ in range(5)
        ]
        ended: list[Output] = []
        for step in range(turn * 2):
            ended += [news.output for news in engine.step() if news.is_last]
            if step % 2:
                engine.abort(draw.choice(ids))
        for request_id in ids:
            engine.abort(request_id)
        engine.abort(12345)
        ended += run(engine).values()
        assert len(ended) == 10
        assert {output.finish_reason for output in ended} <= {"length", "stop", "abort"}
        assert engine.cache.usage == 0
        assert not engine._answers
        assert not engine._requests
        assert not engine._batcher._known


def test_an_interrupt_in_the_middle_of_a_step_costs_only_that_step(model, monkeypatch) -> None:
    engine, expected = engine_of(model), run_all(engine_of(model), [[5, 6, 7], [8, 9]])
    for prompt in ([5, 6, 7], [8, 9]):
        engine.add(prompt, SamplingParams(**GREEDY, max_tokens=6, logit_bias={300: -100}))
    forward, calls = engine.runner.run, []

    def interrupted(batch):
        calls.append(None)
        logits = forward(batch)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(engine.runner, "run", interrupted)
    found: dict[int, Output] = {}
    for _ in range(20):
        try:
            found |= {news.request_id: news.output for news in engine.step()}
        except KeyboardInterrupt:
            engine.cache.check_integrity(engine.scheduler.sequences)
    assert [found[key].token_ids for key in sorted(found)] == [output.token_ids for output in expected]


def test_an_abort_is_told_of_even_if_the_next_step_fails(model, monkeypatch) -> None:
    engine = engine_of(model)
    gone, stays = (engine.add([1, 2, 3], SamplingParams(**GREEDY, max_tokens=3)) for _ in range(2))
    engine.step()
    engine.abort(gone)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert {key[0]: output.finish_reason for key, output in run(engine).items()} == {gone: "abort", stays: "length"}


def test_preemptions_are_told_but_do_not_flood(model, capsys) -> None:
    per_page = 8 * model.spec.kv_bytes_per_token(4)
    engine = engine_of(model, page_size=8, kv_memory=14.5 * per_page / 2**30, max_model_len=100)
    for start in range(6):
        engine.add([start, 1, 2], SamplingParams(**GREEDY, max_tokens=60))
    outputs = run(engine)
    stats = engine.stats()
    assert stats["preemptions"] > 0
    assert sum(output.num_preemptions for output in outputs.values()) == stats["preemptions"]
    told = [line for line in capsys.readouterr().err.splitlines() if "KV cache full" in line]
    assert len(told) == stats["preemptions"].bit_length()
    assert all(len(output.token_ids) == 60 for output in outputs.values())


def test_salts_share_nothing_and_the_same_salt_does(model) -> None:
    engine, prompt = engine_of(model, page_size=4), list(range(20))
    hits = []
    for salt in ("a", "a", "b", ""):
        engine.add(prompt, SamplingParams(**GREEDY, max_tokens=1), cache_salt=salt)
        hits += [output.num_cached_tokens for output in run(engine).values()]
    assert hits == [0, 16, 0, 0]


def test_n_answers_compute_their_prompt_once(model) -> None:
    engine, prompt = engine_of(model, page_size=4), list(range(40))
    engine.add(prompt, SamplingParams(max_tokens=1, n=8, seed=1))
    run(engine)
    assert engine.stats()["computed_tokens"] <= 40 + 7 * 4


def test_better_priorities_go_first(model) -> None:
    engine = engine_of(model, max_num_seqs=1)
    ids = [engine.add([1, 2, 3], SamplingParams(**GREEDY, max_tokens=2), priority=p) for p in (3, 2, 1)]
    order = [news.request_id for _ in range(6) for news in engine.step() if news.is_last]
    assert order == ids[::-1]


class _Drafts:
    """Proposes given tokens, whatever they are."""

    name, num_grades = "given", 1

    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def propose(self, wanted):
        return [Proposal(self.tokens[:limit]) for _, limit in wanted]

    def forget(self, sequence) -> None:
        pass


class _AlwaysAll(Pace):
    def length(self, sequence, num_sequences, grade) -> int:
        return self.max_drafts


@pytest.mark.parametrize("is_right", [False, True])
def test_a_failing_row_behind_a_wrong_draft_is_nobodys_failure(is_right) -> None:
    spec = Spec.preset("debug").replace(tie_word_embeddings=False)
    model = empty_model(spec, torch.float32, torch.device("cpu")).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    params = SamplingParams(**GREEDY, max_tokens=6)
    plain = engine_of(model)
    plain.add([5, 6, 7], params)
    expected = next(iter(run(plain).values())).token_ids
    poison = expected[1] if is_right else 300
    assert poison not in [*expected[:1], 5, 6, 7]
    with torch.no_grad():
        model.embed[poison] = float("nan")
    engine = engine_of(model)
    engine.speculation = Speculation(_Drafts([poison, 1, 2]), 512, _AlwaysAll(3))
    engine.add([5, 6, 7], params)
    output = next(iter(run(engine).values()))
    assert output.token_ids == (expected[:2] if is_right else expected)
    assert output.finish_reason == ("error" if is_right else "length")
