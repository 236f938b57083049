"""The matrix: the same tokens, and log-probabilities within 1e-5 of the trainer's forward, however they were computed.

The reference knows no cache, no pages and no batch: for every token the whole text goes through the trainer's forward.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import puna
from puna.engine.engine import Engine
from puna.engine.request import SamplingParams
from puna.engine.speculate.pace import Pace
from puna.engine.speculate.speculative import Proposal, Speculation
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.weights.folder import empty_model

PROMPTS = [[(7 * i + 3 * j) % 250 for i in range(length)] for j, length in enumerate((3, 17, 40, 1, 17, 25))]
PROMPTS[4] = [*PROMPTS[1][:16], 5]  # shares its beginning with another
TOKENS = 14

SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "windows": {"sliding_windows": (8, 8)},
    "one window, one not": {"sliding_windows": (6, None)},
    "norms, biases, untied": {"qk_norm": True, "qkv_bias": True, "output_bias": True, "tie_word_embeddings": False},
}


def make_model(shape: str) -> Transformer:
    spec = Spec.preset("debug").replace(vocab_size=256, **SHAPES[shape])
    model = empty_model(spec, torch.float32, torch.device("cpu"))
    model.init_weights(torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)  # spread the logits, so that greedy choices are no ties
        elif name.endswith("bias"):
            parameter.data.normal_()
    return model.eval()


@torch.no_grad()
def trainers_logprobs(model: Transformer, ids: list[int]) -> torch.Tensor:
    hidden = model(torch.tensor(ids), torch.arange(len(ids)), PackedCausal.of([len(ids)]))
    return model.logits(hidden).log_softmax(-1)


def greedy_by_hand(model: Transformer, prompt: list[int]) -> tuple[list[int], list[float]]:
    ids, told = list(prompt), []
    for _ in range(TOKENS):
        last = trainers_logprobs(model, ids)[-1]
        ids.append(int(last.argmax()))
        told.append(float(last[ids[-1]]))
    return ids[len(prompt) :], told


class Wild:
    """Proposes anything: half the time what is right, half the time noise."""

    name, num_grades = "wild", 1

    def __init__(self, right: dict[tuple[int, ...], list[int]]):
        self._right, self._draw = right, random.Random(0)

    def propose(self, wanted):
        return [Proposal(self._tokens(sequence, limit)) for sequence, limit in wanted]

    def forget(self, sequence) -> None:
        pass

    def _tokens(self, sequence, limit: int) -> list[int]:
        answer = self._right[tuple(sequence.request.prompt_ids)]
        right = answer[sequence.num_generated : sequence.num_generated + limit]
        return [token if self._draw.random() < 0.7 else self._draw.randrange(256) for token in right]


class Always(Pace):
    """A pace that never gives up, so that every step has drafts."""

    def length(self, sequence, num_sequences, grade) -> int:
        return self.max_drafts


def pages(count: int, page_size: int, spec: Spec) -> float:
    """kv_memory in GiB for so many pages."""
    return (count + 0.5) * page_size * spec.kv_bytes_per_token(4) / 2**30


WAYS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "one at a time": {"max_num_seqs": 1, "max_num_batched_tokens": 64},
    "in pieces of five": {"max_num_seqs": 2, "max_num_batched_tokens": 5},
    "pages of one token": {"page_size": 1},
    "pages of 64": {"page_size": 64, "max_num_batched_tokens": 7, "max_num_seqs": 7},
    "memory for two": {"pages": 8, "page_size": 8, "max_model_len": 60},
    "without shared prefixes": {"prefix_caching": False},
    "n-grams": {"speculate": "ngram"},
    "suffixes": {"speculate": "suffix"},
    "wild drafts": {"drafts": True, "page_size": 4},
    "wild drafts, little memory": {"drafts": True, "pages": 16, "page_size": 4, "max_model_len": 60},
    "layer by layer": {"native": False},
}


def make_engine(model: Transformer, way: dict[str, Any], right: dict[tuple[int, ...], list[int]]) -> puna.LLM:
    limits = dict(way)
    drafts = limits.pop("drafts", False)
    if count := limits.pop("pages", 0):
        limits["kv_memory"] = pages(count + 1, limits["page_size"], model.spec)
    llm = puna.LLM.of(model, None, **limits)
    if drafts:
        llm.engine.speculation = Speculation(Wild(right), llm.engine.max_model_len, Always(5))
    return llm


@pytest.fixture(scope="module", params=SHAPES)
def case(request) -> tuple[Transformer, list[tuple[list[int], list[float]]]]:
    model = make_model(request.param)
    return model, [greedy_by_hand(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("way", WAYS)
def test_greedy_answers_are_the_trainers(case, way) -> None:
    model, expected = case
    right = {tuple(prompt): tokens for prompt, (tokens, _) in zip(PROMPTS, expected, strict=True)}
    llm = make_engine(model, WAYS[way], right)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    for turn in range(2):  # the second time, beginnings are found in the cache
        outputs = llm.generate(PROMPTS, params)
        for output, (tokens, logprobs) in zip(outputs, expected, strict=True):
            assert output.token_ids == tokens
            assert output.logprobs == pytest.approx(logprobs, abs=1e-5)
        llm.engine.cache.check_integrity(llm.engine.scheduler.sequences)
        assert not llm.engine.has_work
        hits = sum(output.num_cached_tokens for output in outputs)
        keeps = WAYS[way].get("prefix_caching", True) and WAYS[way].get("page_size", 16) < 40
        if turn and keeps and "little" not in way and "two" not in way:
            assert hits > 0
    stats = llm.engine.stats()
    if "memory" in way and None in model.spec.sliding_windows:  # windows make little memory enough
        assert stats["preemptions"] > 0
    if "wild" in way:
        assert 0 < stats["speculation"]["accepted"] < stats["speculation"]["proposed"]


@pytest.mark.parametrize("way", [way for way in WAYS if "one" not in way])
def test_seeded_draws_are_the_same_in_any_company(way) -> None:
    model = make_model("grouped heads")
    params = SamplingParams(
        temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=11, n=2, max_tokens=TOKENS, ignore_eos=True
    )
    alone = [output.token_ids for prompt in PROMPTS for output in puna.LLM.of(model, None).generate([prompt], params)]
    right = {tuple(prompt): alone[2 * i] for i, prompt in enumerate(PROMPTS)}
    outputs = make_engine(model, WAYS[way], right).generate(PROMPTS, params)
    assert [output.token_ids for output in outputs] == alone
    assert len({tuple(tokens) for tokens in alone}) > len(PROMPTS)


def test_prompt_logprobs_are_the_trainers_in_pieces_and_beside_others(case) -> None:
    model, _ = case
    llm = puna.LLM.of(model, None, max_num_seqs=4, max_num_batched_tokens=9, page_size=4)
    llm.generate(PROMPTS, SamplingParams(max_tokens=2))  # fills the prefix cache, which must not swallow the scores
    scored = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=2, n=2)
    plain = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    outputs = llm.generate(PROMPTS, [scored if i % 2 else plain for i in range(len(PROMPTS))])
    seen = 0
    for prompt, output in zip([PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2]], outputs, strict=False):
        if output.prompt_logprobs is None:
            assert prompt in PROMPTS[::2]
            continue
        expected = trainers_logprobs(model, prompt)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        assert output.prompt_logprobs[0] is None
        assert output.prompt_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-5)
        assert output.prompt_top_logprobs is not None
        assert [len(top or {}) for top in output.prompt_top_logprobs] == [0, *[2] * (len(prompt) - 1)]
        seen += 1
    assert seen == 2


def test_a_long_context_frees_the_pages_behind_its_window() -> None:
    model = make_model("windows")
    llm = puna.LLM.of(model, None, page_size=4, kv_memory=pages(9, 4, model.spec), max_num_seqs=1, max_model_len=32)
    engine: Engine = llm.engine
    output = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=29, ignore_eos=True))[0]
    assert output.token_ids == greedy_tokens(model, [1, 2, 3], 29)
    engine.cache.check_integrity([])


def greedy_tokens(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(trainers_logprobs(model, ids)[-1].argmax()))
    return ids[len(prompt) :]
