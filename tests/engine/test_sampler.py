"""Distributions against transformers' processors and definitions in fp64, draws against the distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from puna.base.console import PunaError
from puna.engine.request import SamplingParams
from puna.engine.sampling.randomness import clocks, draw_seeds, first_clocks, mix, stream_key
from puna.engine.sampling.row_blocks import block_maxima, descending, first_largest, largest, race, race_among
from puna.engine.sampling.sampler import BatchSampler, Draws, logprobs_of
from puna.engine.sampling.state import Row, short_width
from puna.engine.sampling.truncation import choices


class Mask:
    """Allows some ids, always."""

    def __repr__(self) -> str:  # the name of a test, alike in every process
        return "Mask"

    def __init__(self, *ids: int):
        self.ids = ids

    def allowed(self, generated_ids):
        mask = torch.zeros(2000, dtype=torch.bool)
        mask[list(self.ids)] = True
        return mask


class NoRepeat:
    """Forbids what was said already: depends on the answer so far."""

    def __repr__(self) -> str:  # the name of a test, alike in every process
        return "NoRepeat"

    def allowed(self, generated_ids):
        mask = torch.ones(2000, dtype=torch.bool)
        mask[list(generated_ids)] = False
        return mask


def rows_of(
    sampler: BatchSampler, params: list[SamplingParams], said: Sequence[int] = (), prompt: Sequence[int] = ()
) -> list[Row]:
    rows = [Row(sampler.state(p, prompt, index)) for index, p in enumerate(params)]
    for row in rows:
        row.state.accept(said)
    return rows


def weigh(scores_RV: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Weights (R, V) as the sampler makes them, rows of one width together."""
    weights, vocab = torch.full(scores_RV.shape, -1.0), scores_RV.shape[1]
    for width in {short_width(p, vocab) for p in params}:
        rows = [row for row, p in enumerate(params) if short_width(p, vocab) == width]
        for places, choice in choices(scores_RV[rows], [params[row] for row in rows], width):
            ids = torch.arange(vocab).expand(len(places), -1) if choice.ids_RC is None else choice.ids_RC
            for place, row_ids, row_weights in zip(places, ids, choice.weights_RC, strict=True):
                assert weights[rows[place], 0] == -1  # every row once
                weights[rows[place]] = torch.zeros(vocab).scatter(0, row_ids, row_weights)
    return weights


def draws_of(logits_V: torch.Tensor, params: SamplingParams, times: int, **more) -> torch.Tensor:
    """Counts (V,) of many answers' draws from the same logits, in one call."""
    sampler = BatchSampler(len(logits_V))
    draws = sampler.draw(logits_V.expand(times, -1), rows_of(sampler, [params] * times, **more))
    assert not draws.failed
    return torch.bincount(torch.tensor(draws.token_ids), minlength=len(logits_V))


# --- truncation against transformers -----------------------------------------------------------------------------------

CHAINS = [
    ({}, []),
    ({"top_k": 7}, [TopKLogitsWarper(7)]),
    ({"top_k": 1}, [TopKLogitsWarper(1)]),
    ({"top_k": 150}, [TopKLogitsWarper(150)]),
    ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    ({"top_k": 20, "top_p": 0.5}, [TopKLogitsWarper(20), TopPLogitsWarper(0.5)]),
    ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    ({"top_p": 0.9, "min_p": 0.1}, [TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)]),
    ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    ({"typical_p": 0.05}, [TypicalLogitsWarper(0.05)]),
    (
        {"top_k": 100, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
        [TopKLogitsWarper(100), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02), TypicalLogitsWarper(0.8)],
    ),
]


@pytest.mark.parametrize("vocab", [50, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_distribution_equals_transformers(temperature: float, vocab: int) -> None:
    """All chains in one batch, peaked and flat rows: the same tokens stay, with the same probabilities."""
    logits = [torch.randn(vocab) * scale for scale in (0.5, 2, 6) for _ in range(4)]
    params = [SamplingParams(temperature=temperature, **knobs) for knobs, _ in CHAINS]
    weights = weigh(torch.stack([x for x in logits for _ in CHAINS]), params * len(logits))
    found = (weights / weights.sum(-1, keepdim=True)).view(len(logits), len(CHAINS), vocab)
    for x_V, rows in zip(logits, found, strict=True):
        for (knobs, processors), ours in zip(CHAINS, rows, strict=True):
            processors = [p for p in processors if not (isinstance(p, TopKLogitsWarper) and p.top_k >= vocab)]
            chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), *processors])
            theirs = chain(torch.zeros(1, 1, dtype=torch.int64), x_V[None]).softmax(-1)[0]
            assert torch.equal(ours > 0, theirs > 0) or temperature < 1, knobs  # far tokens underflow at other places
            assert torch.allclose(ours, theirs, atol=2e-6), knobs


def test_top_k_and_top_p_keep_equals_of_the_last() -> None:
    logits = torch.tensor([[3.0, 1, 2, 2, 2, 0]])
    assert (weigh(logits, [SamplingParams(top_k=2)]) > 0).tolist() == [[True, False, True, True, True, False]]
    assert (weigh(logits, [SamplingParams(top_p=0.6)]) > 0).tolist() == [[True, False, True, True, True, False]]
    logits = torch.zeros(1, 3000)
    logits[0, 7], logits[0, 100:400] = 9.0, 5.0  # more equals than the first look takes in
    assert int((weigh(logits, [SamplingParams(top_k=50)]) > 0).sum()) == 301
    assert int((weigh(logits, [SamplingParams(top_p=0.3)]) > 0).sum()) == 301


# --- draws against definitions in fp64 ----------------------------------------------------------------------------------


def kept(p: np.ndarray, order: np.ndarray, mass: float) -> np.ndarray:
    """The first of `order` whose probability reaches `mass`, renormalised."""
    count = int(np.searchsorted(np.cumsum(p[order]), mass)) + 1
    out = np.zeros_like(p)
    out[order[:count]] = p[order[:count]]
    return out / out.sum()


def definition(logits: np.ndarray, p: SamplingParams, said: list[int], prompt: list[int]) -> np.ndarray:
    """The distribution as papers and API documents define it, in fp64 and plain numpy."""
    x = logits.astype(np.float64)
    for token in {*said, *prompt}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token in set(said):
        x[token] -= p.presence_penalty + p.frequency_penalty * said.count(token)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    if p.token_mask is not None:
        x[~p.token_mask.allowed(said)[: len(x)].numpy()] = -np.inf
    if len(said) < p.min_tokens:
        x[list(p.stop_token_ids)] = -np.inf
    q = np.exp((x - x.max()) / p.temperature)
    q /= q.sum()
    if p.top_k:
        q[np.argsort(-q)[p.top_k :]] = 0
        q /= q.sum()
    if p.top_p < 1:
        q = kept(q, np.argsort(-q), p.top_p)
    if p.min_p:
        q[q < p.min_p * q.max()] = 0
        q /= q.sum()
    if p.typical_p < 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(q)
            q = kept(q, np.argsort(np.abs(surprise - np.nansum(q * surprise))), p.typical_p)
    return q


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 9},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 0.9},
        {"frequency_penalty": 0.4},
        {"logit_bias": {3: 2.0, 7: -100, 99: 1.5}},
        {"min_tokens": 9, "stop_token_ids": [0, 1, 2]},
        {"token_mask": Mask(1, 5, 6, 50, 99)},
        {"token_mask": NoRepeat()},
        {
            "temperature": 1.4, "top_k": 60, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3,
            "presence_penalty": -0.5, "frequency_penalty": 0.3, "logit_bias": {40: 3.0},
        },
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_definition(knobs: dict) -> None:
    """Chi-square of 6,000 draws of one call; exactly the possible tokens come."""
    logits_V = torch.randn(100) * 1.5
    said, prompt = [4, 8, 8, 8, 16, 23], [15, 4, 42]
    params = SamplingParams(seed=11, **knobs)
    expected = torch.from_numpy(definition(logits_V.numpy(), params, said, prompt)) * 6000
    counts = draws_of(logits_V, params, 6000, said=said, prompt=prompt)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5  # too few for the chi-square: together
    observed = torch.cat((counts[~rare], counts[rare].sum()[None])).double()
    expected = torch.cat((expected[~rare], expected[rare].sum()[None])).clamp_min(1e-9)
    chi_square = ((observed - expected) ** 2 / expected)[expected >= 5].sum()
    freedom = torch.tensor(float((expected >= 5).sum() - 1))
    assert torch.special.gammaincc(freedom / 2, chi_square.float() / 2) > 1e-4


def seeds_of(rows: int, seed: int = 0) -> torch.Tensor:
    return draw_seeds([stream_key(seed, index) for index in range(rows)], [5] * rows)


def all_clocks(seeds_R: torch.Tensor, vocab: int) -> torch.Tensor:
    ids_RV = torch.arange(vocab).expand(len(seeds_R), -1)
    return clocks(seeds_R[:, None], ids_RV, *first_clocks(seeds_R, ids_RV // 64))


def splitmix(key: int, number: int) -> float:
    """Number of a stream as an exponential, in plain Python."""
    return -math.log(((mix(key + (number + 1) * 0x9E3779B97F4A7C15) >> 12) + 0.5) * 2.0**-52)


@pytest.mark.parametrize("shape", ["flat", "peaked", "one", "sparse"])
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 20_000])
def test_a_race_is_won_by_the_first_of_all_tokens(vocab: int, shape: str) -> None:
    """What is left out could not have won: as if every token's clock had been made. Without weight nothing wins."""
    weights = {
        "flat": torch.ones(60, vocab),
        "peaked": torch.rand(60, vocab).mul(-14).exp(),
        "one": torch.full((60, vocab), 1e-7).index_fill_(1, torch.tensor([vocab // 2]), 1.0),
        "sparse": torch.rand(60, vocab) * (torch.rand(60, vocab) < 0.02),
    }[shape]
    weights[:, vocab // 3] += 0.1
    seeds = seeds_of(60)
    expected = (all_clocks(seeds, vocab) / weights).argmin(-1)
    assert race(weights, seeds).tolist() == expected.tolist()
    ids = torch.randperm(vocab)[: max(1, vocab // 2)].sort().values.expand(60, -1)
    some = weights.gather(1, ids) + 1e-3
    fewer = race(torch.zeros(60, vocab).scatter(1, ids, some), seeds)
    assert race_among(some, ids, seeds).tolist() == fewer.tolist()


def test_a_large_vocabulary_is_drawn_evenly() -> None:
    """128k equal tokens: each of 16 slices gets its share, which a running fp32 sum would not give."""
    sampler = BatchSampler(128_000)
    states = [sampler.state(SamplingParams(seed=3), [], index) for index in range(60)]
    ids = []
    for _ in range(20):
        draws = sampler.draw(torch.zeros(1, 128_000).expand(60, -1), [Row(state) for state in states])
        for state, token in zip(states, draws.token_ids, strict=True):
            state.accept([token])
        ids += draws.token_ids
    counts = torch.bincount(torch.tensor(ids) // 8000, minlength=16)
    chi_square = ((counts - 75) ** 2 / 75).sum()
    assert torch.special.gammaincc(torch.tensor(7.5), chi_square / 2) > 1e-4


# --- rows do not know each other -----------------------------------------------------------------------------------------

MIXED = [
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0, repetition_penalty=1.4, logprobs=3, logprobs_mode="processed"),
    SamplingParams(seed=1, logprobs=0),
    SamplingParams(seed=2, top_p=0.9, logprobs=4, logprobs_mode="processed"),
    SamplingParams(seed=2, top_k=200, temperature=0.7),
    SamplingParams(seed=3, top_k=3, min_p=0.3),
    SamplingParams(seed=4, typical_p=0.5, frequency_penalty=0.2),
    SamplingParams(seed=5, token_mask=NoRepeat(), logit_bias={5: 1.0}, logprobs=1, logprobs_mode="processed"),
    SamplingParams(seed=6, min_tokens=3, stop_token_ids=[9], temperature=2.5),
]


@pytest.mark.parametrize("vocab", [700, 1984])
def test_a_row_gets_the_same_bits_alone_and_in_any_batch(vocab: int) -> None:
    sampler, threads = BatchSampler(vocab), torch.get_num_threads()
    rows = rows_of(sampler, MIXED * 4, said=[3, 3, 17], prompt=[1, 2, 3])
    logits = torch.randn(len(rows), vocab) * 3
    before = logits.clone()
    together = sampler.draw(logits, rows)
    order = torch.randperm(len(rows)).tolist()
    try:
        torch.set_num_threads(2)
        shuffled = sampler.draw(logits[order], [rows[i] for i in order])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits, before)
    for place, i in enumerate(order):
        alone = sampler.draw(logits[i : i + 1], [rows[i]])
        for batch, k in ((together, i), (shuffled, place)):
            assert batch.token_ids[k] == alone.token_ids[0]
            if rows[i].state.wants_logprobs:
                assert batch.logprobs[k] == alone.logprobs[0]
                assert batch.top_logprobs[k] == alone.top_logprobs[0]


def test_presumed_tokens_are_as_good_as_said_ones() -> None:
    """Speculation: a row with drafts draws what the answer would draw had it said them."""
    logits = torch.randn(len(MIXED), 500) * 2
    extra = (7, 3, 400, 7)
    sampler = BatchSampler(500)
    said, presumed = rows_of(sampler, MIXED, [3, 9], [1, 2]), rows_of(sampler, MIXED, [3, 9], [1, 2])
    for row in said:
        row.state.accept(extra)
    ahead = sampler.draw(logits, [Row(row.state, extra) for row in presumed])
    assert ahead == sampler.draw(logits, said)
    assert ahead != sampler.draw(logits, presumed)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("params", MIXED, ids=str)
def test_broken_logits_fail_their_row_only(params: SamplingParams, poison: float) -> None:
    logits = torch.randn(5, 300)
    sampler = BatchSampler(300)
    expected = sampler.draw(logits, rows_of(sampler, [params] * 5))
    logits[1, 250], logits[3] = (poison if poison > 0 or poison != poison else logits[1, 250]), poison
    before = logits.clone()
    found = sampler.draw(logits, rows_of(sampler, [params] * 5))
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    broken = [3] if poison < 0 else [1, 3]
    assert sorted(found.failed) == broken
    assert all("not finite" in found.failed[row] for row in broken)
    for row in range(5):
        assert found.token_ids[row] == (-1 if row in broken else expected.token_ids[row])
        if expected.logprobs is not None:
            assert found.logprobs[row] == (None if row in broken else expected.logprobs[row])


# --- seeds -----------------------------------------------------------------------------------------------------------------


def test_same_seed_same_draws() -> None:
    sampler, logits = BatchSampler(100), torch.randn(1, 100)

    def draws(seed: int | None, index: int) -> list[int]:
        state = sampler.state(SamplingParams(seed=seed), [], index)
        found = []
        for _ in range(20):
            found += sampler.draw(logits, [Row(state)]).token_ids
            state.accept(found[-1:])
        return found

    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(s, i)) for s in (0, 1, 2, -1, 2**64, None, None) for i in (0, 1)}) == 14
    assert draws(2**127, 0) == draws(2**127, 0)


def test_clocks_are_a_function_of_seed_answer_position_and_token() -> None:
    """The numbers by their definition, in integers without an end; all differ."""
    places = [(seed, index, position) for seed in (0, -1, 2**64) for index in range(3) for position in (0, 1, 10**6)]
    found = all_clocks(draw_seeds([stream_key(s, i) for s, i, _ in places], [p for _, _, p in places]), 200)
    for place, clocks_V in zip(places, found.tolist(), strict=True):
        seed = mix(stream_key(*place[:2]) + (place[2] + 1) * 0x9E3779B97F4A7C15)
        winners = [64 * b + mix(seed + (b + 1) * 0x9E3779B97F4A7C15) % 64 for b in range(4)]
        for token, clock in enumerate(clocks_V):
            later = 0 if token in winners else splitmix(mix(seed), token)
            assert clock == pytest.approx(splitmix(seed, token // 64) / 64 + later, rel=1e-12)
    assert len(set(found.flatten().tolist())) == found.numel()


@pytest.mark.parametrize("along", ["positions", "answers", "seeds", "tokens"])
def test_clocks_are_exponential_and_not_correlated(along: str) -> None:
    """Chi-square of 100 equally likely slices; neighbours, tokens of a block and the same token in other draws."""
    n = 20_000
    keys, positions = {
        "positions": ([stream_key(1, 0)] * n, range(n)),
        "answers": ([stream_key(1, i) for i in range(n)], [0] * n),
        "seeds": ([stream_key(i, 0) for i in range(n)], [0] * n),
        "tokens": ([stream_key(1, 0)], [0]),
    }[along]
    seeds = draw_seeds(keys, positions)
    u = (-all_clocks(seeds, 2 if len(keys) > 1 else n)).exp()
    first, second = u.T if len(keys) > 1 else (u[0, :-1], u[0, 1:])
    n = len(first)
    chi_square = ((torch.histc(first, 100, 0, 1) - n / 100) ** 2 / (n / 100)).sum()
    assert torch.special.gammaincc(torch.tensor(49.5), chi_square / 2) > 1e-4
    for a, b in ((first[1:], first[:-1]), (first, second)):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 4 / n**0.5
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1


def test_the_first_of_a_block_is_any_of_its_tokens() -> None:
    """Independent clocks: each of 64 tokens first equally often, and the least of 64 exponential of mean 1/64."""
    first, winners = first_clocks(seeds_of(6400), torch.tensor([7]))
    counts = torch.bincount(winners[:, 0] - 7 * 64, minlength=64)
    assert torch.special.gammaincc(torch.tensor(31.5), ((counts - 100) ** 2 / 100).sum() / 2) > 1e-4
    slices = torch.histc((-64 * first).exp(), 64, 0, 1)
    assert torch.special.gammaincc(torch.tensor(31.5), ((slices - 100) ** 2 / 100).sum().float() / 2) > 1e-4
    assert abs(torch.corrcoef(torch.stack((first[:, 0], winners[:, 0].double())))[0, 1]) < 4 / 80


def test_near_distributions_draw_the_same_token() -> None:
    """Speculation's luck: the theory of a race by common clocks, sum of 1 / sum of max(p_j / p_i, q_j / q_i).

    Also where one of the two is cut off, and the token drawn does not change with the rows around it.
    """
    logits = torch.randn(300) * 2
    other = logits + torch.randn(300) * 0.7
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    theory = float((1 / torch.maximum(p / p[:, None], q / q[:, None]).sum(-1)).sum())
    distance = float((p - q).abs().sum() / 2)
    assert (1 - distance) / (1 + distance) < theory < 1 - distance
    sampler, n = BatchSampler(300), 4000

    def drawn(logits_V: torch.Tensor, **knobs) -> torch.Tensor:
        rows = rows_of(sampler, [SamplingParams(seed=5, **knobs)] * n)
        return torch.tensor(sampler.draw(logits_V.expand(n, -1), rows).token_ids)

    ours, theirs = drawn(logits), drawn(other)
    assert abs(float((ours == theirs).double().mean()) - theory) < 4 * (0.25 / n) ** 0.5
    cut = drawn(logits, top_k=20)
    stays = p >= p.topk(20).values[-1]
    assert torch.equal(ours[stays[ours]], cut[stays[ours]])  # who wins among all wins among fewer
    assert int((~stays[ours]).sum()) > 100
    alone = [
        sampler.draw(other[None], [Row(sampler.state(SamplingParams(seed=5), [], i))]).token_ids[0] for i in (0, 9)
    ]
    assert alone == theirs[[0, 9]].tolist()


# --- greedy, penalties, masks ---------------------------------------------------------------------------------------------


def test_of_equal_tokens_the_lowest_id_is_taken() -> None:
    logits = torch.randint(0, 4, (64, 777)).float()
    first = [int((row == row.max()).nonzero()[0, 0]) for row in logits]
    sampler = BatchSampler(777)
    assert sampler.draw(logits, rows_of(sampler, [SamplingParams(temperature=0)] * 64)).token_ids == first
    edited = SamplingParams(temperature=0, logit_bias={776: -1.0})
    assert sampler.draw(logits, rows_of(sampler, [edited] * 64)).token_ids == first


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.randn(30, 400) * 5
    sampler = BatchSampler(400)
    cold = sampler.draw(logits, rows_of(sampler, [SamplingParams(temperature=1e-60, seed=1)] * 30))
    assert cold.token_ids == logits.argmax(-1).tolist()


def test_repetition_penalty_equals_transformers_step_by_step() -> None:
    logits, prompt = torch.randn(1, 30), [3, 5, 5, 9, 11]
    assert logits[0, prompt].min() < 0 < logits[0, prompt].max()
    sampler = BatchSampler(30)
    params = SamplingParams(temperature=0, repetition_penalty=1.5, logprobs=30, logprobs_mode="processed")
    state, said = sampler.state(params, prompt), []
    for _ in range(12):
        draws = sampler.draw(logits, [Row(state)])
        expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + said]), logits.clone()).log_softmax(-1)[
            0
        ]
        assert draws.token_ids == [int(expected.argmax())]
        assert [draws.top_logprobs[0][token] for token in range(30)] == pytest.approx(expected.tolist(), abs=1e-6)
        said += draws.token_ids
        state.accept(draws.token_ids)


def test_presence_and_frequency_penalties_by_hand() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = 3.0
    sampler = BatchSampler(5)
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=1.0, logprobs=5, logprobs_mode="processed"
    )
    state, said = sampler.state(params, [2, 2, 2]), []
    for _ in range(4):
        said += sampler.draw(logits, [Row(state)]).token_ids
        state.accept(said[-1:])
    assert said == [2, 2, 2, 0]  # 3.0, then 1.5, then 0.5, then -0.5: the prompt does not count
    top = sampler.draw(logits, [Row(state)]).top_logprobs[0]
    assert top[2] - top[4] == pytest.approx(3.0 - 0.5 - 3.0)
    assert top[0] - top[4] == pytest.approx(-0.5 - 1.0)


def test_tokens_that_cannot_be_drawn_may_be_in_prompts_and_drafts() -> None:
    sampler, logits = BatchSampler(20), torch.randn(1, 32)
    params = SamplingParams(
        temperature=0, repetition_penalty=1.5, frequency_penalty=0.5, logprobs=20, logprobs_mode="processed"
    )
    with_them = sampler.draw(logits, [Row(sampler.state(params, [3, 25, 31]), (31, 4, 25))])
    assert with_them == sampler.draw(logits, [Row(sampler.state(params, [3]), (31, 4, 25))])
    assert with_them.top_logprobs == sampler.draw(logits, [Row(sampler.state(params, [3]), (4,))]).top_logprobs


def test_bias_comes_after_penalties() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0]])
    sampler = BatchSampler(3)
    params = SamplingParams(
        temperature=0, repetition_penalty=2.0, logit_bias={1: -1.0, 0: 0.25}, logprobs=3, logprobs_mode="processed"
    )
    top = sampler.draw(logits, rows_of(sampler, [params], said=[1])).top_logprobs[0]
    assert top[0] - top[1] == pytest.approx(1.25 - (3.0 / 2 - 1.0))


def test_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(PunaError, match="token 30, the vocabulary has 30"):
        BatchSampler(30).state(SamplingParams(logit_bias={30: 1.0}), [])


def test_min_tokens_keeps_ends_away_until_reached() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5], logits[0, 6] = 9.0, 8.0
    sampler = BatchSampler(8, eos_ids={5})

    def said(**knobs) -> list[int]:
        state, ids = sampler.state(SamplingParams(temperature=0, min_tokens=2, **knobs), []), []
        for _ in range(3):
            ids += sampler.draw(logits, [Row(state)]).token_ids
            state.accept(ids[-1:])
        return ids

    assert said() == [6, 6, 5]
    assert said(stop_token_ids=[6]) == [0, 0, 5]
    assert said(ignore_eos=True) == [5, 5, 5]


class Broken:
    def allowed(self, generated_ids):
        raise RuntimeError("no grammar")


def test_masks_that_allow_nothing_or_break_fail_their_request_only() -> None:
    sampler = BatchSampler(40)
    params = [
        SamplingParams(seed=1, token_mask=Mask()),
        SamplingParams(seed=1, token_mask=Mask(7)),
        SamplingParams(temperature=0, token_mask=Broken()),
        SamplingParams(temperature=0, token_mask=Mask(8)),
        SamplingParams(seed=1, token_mask=Mask(9), min_tokens=1, stop_token_ids=[9]),
    ]
    draws = sampler.draw(torch.randn(5, 40), rows_of(sampler, params))
    assert draws.token_ids == [-1, 7, -1, 8, -1]
    assert sorted(draws.failed) == [0, 2, 4]
    assert "no token is left" in draws.failed[0]
    assert "no grammar" in draws.failed[2]


# --- log-probabilities ----------------------------------------------------------------------------------------------------


def test_raw_logprobs_are_the_models_own() -> None:
    """Before any knob, over the whole embedding, of which only a part can be drawn."""
    logits = torch.randn(len(MIXED), 512) * 3
    logits[:, 500:] = 20.0
    raw = [p for p in MIXED if p.logprobs is not None and p.logprobs_mode == "raw"]
    sampler = BatchSampler(500)
    draws: Draws = sampler.draw(logits[: len(raw)], rows_of(sampler, raw))
    expected = logits.double().log_softmax(-1)
    for row, p in enumerate(raw):
        assert draws.token_ids[row] < 500
        assert draws.logprobs[row] == pytest.approx(float(expected[row, draws.token_ids[row]]), abs=2e-6)
        top = expected[row, :500].topk(p.logprobs)
        assert list(draws.top_logprobs[row]) == top.indices.tolist()
        assert list(draws.top_logprobs[row].values()) == pytest.approx(top.values.tolist(), abs=2e-6)


def test_processed_logprobs_are_those_of_the_draw() -> None:
    logits = torch.randn(2, 50) * 2
    sampler = BatchSampler(50)
    params = SamplingParams(seed=1, temperature=0.7, top_k=4, logprobs=9, logprobs_mode="processed")
    draws = sampler.draw(logits, rows_of(sampler, [params, SamplingParams(temperature=0)]))
    expected = torch.tensor(definition(logits[0].numpy(), params, [], [])).log()
    assert len(draws.top_logprobs[0]) == 4  # the others cannot be drawn
    for token, value in draws.top_logprobs[0].items():
        assert value == pytest.approx(float(expected[token]), abs=1e-5)
    assert draws.logprobs == [draws.top_logprobs[0][draws.token_ids[0]], None]


@pytest.mark.parametrize("vocab", [100, 6000])
def test_logprobs_of_prompt_rows(vocab: int) -> None:
    logits = torch.randn(200, vocab)
    targets = torch.randint(0, vocab, (200,)).tolist()
    expected = logits.double().log_softmax(-1)
    found, tops = logprobs_of(logits, targets, 3)
    assert found == pytest.approx(expected[range(200), targets].tolist(), abs=2e-6)
    assert [list(top) for top in tops] == expected.topk(3).indices.tolist()
    assert logprobs_of(logits, targets, 0) == (found, [{}] * 200)
    assert max(token for top in logprobs_of(logits, targets, 3, vocab // 2)[1] for token in top) < vocab // 2


# --- long rows in blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 64, 100, 3000, 20_000])
def test_blocks_find_what_a_full_search_finds(vocab: int) -> None:
    x = torch.randn(6, vocab).mul_(3).round_()  # many ties
    maxima = block_maxima(x)
    values, ids = first_largest(x, maxima)
    assert values.tolist() == x.amax(-1).tolist()
    assert ids.tolist() == [int((row == row.max()).nonzero()[0, 0]) for row in x]
    for k in {1, min(5, vocab), min(70, vocab)}:
        values, ids = largest(x, maxima, k)
        assert torch.equal(values, x.topk(k).values)
        assert torch.equal(x.gather(1, ids), values)
        assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(descending(x), x.sort(-1, descending=True).values)
