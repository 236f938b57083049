"""Distributions against transformers' processors, draws against the distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from puna.engine.request import SamplingParams
from puna.engine.sampler import Sampler, distribution

CPU = torch.device("cpu")


def full(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    probabilities, ids = distribution(logits_V, params)
    return probabilities if ids is None else torch.zeros_like(logits_V).scatter(0, ids, probabilities)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("knobs", "processor"),
    [
        ({}, []),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_k": 20, "top_p": 0.5}, [TopKLogitsWarper(20), TopPLogitsWarper(0.5)]),
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_p": 0.9, "min_p": 0.1}, [TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)]),
    ],
)
def test_distribution_equals_transformers(temperature: float, knobs: dict, processor: list) -> None:
    for _ in range(20):
        logits_V = torch.randn(50) * 2
        chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), *processor])
        expected = chain(torch.zeros(1, 1, dtype=torch.int64), logits_V[None]).softmax(-1)[0]
        assert torch.allclose(full(logits_V, SamplingParams(temperature=temperature, **knobs)), expected, atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 4,000 draws over 12 tokens: below the 99.9% point of 11 degrees of freedom."""
    logits_V, params = torch.randn(12), SamplingParams(temperature=1.3, seed=5)
    sampler, counts = Sampler(params, [], 0, CPU), torch.zeros(12)
    for _ in range(4000):
        counts[sampler.draw(logits_V)] += 1
    expected = full(logits_V, params) * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 31.3


def test_same_seed_same_draws() -> None:
    logits_V = torch.randn(100)

    def draws(seed: int | None, index: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), [], index, CPU)
        return [sampler.draw(logits_V) for _ in range(20)]

    assert draws(1, 0) == draws(1, 0)
    assert draws(1, 0) != draws(1, 1)
    assert draws(1, 0) != draws(2, 0)
    assert draws(None, 0) != draws(None, 0)


def test_repetition_penalty_equals_transformers() -> None:
    logits_V, prompt = torch.randn(30), [3, 5, 5]
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.5), prompt, 0, CPU)
    said = [sampler.draw(logits_V) for _ in range(4)]
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + said]), logits_V[None].clone())[0]
    assert torch.allclose(sampler._penalize(logits_V), expected)


def test_presence_and_frequency_penalties_by_hand() -> None:
    logits_V = torch.zeros(5)
    logits_V[2] = 3.0
    sampler = Sampler(SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=1.0), [2, 2, 2], 0, CPU)
    assert [sampler.draw(logits_V) for _ in range(3)] == [2, 2, 2]  # 3.0, then 1.5, then 0.5: the prompt does not count
    assert sampler._penalize(logits_V)[2] == pytest.approx(3.0 - 0.5 - 3.0)
    assert logits_V[2] == 3.0
