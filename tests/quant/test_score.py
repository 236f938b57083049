"""Scores against direct slow computations, and error bars against the spread they promise."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from puna.quant import score as score_module
from puna.quant.score import IGNORED, Estimate, Score, kl_difference, nll_difference, repaired

TOKENS, VOCAB, CHUNKS = 120, 37, 6


def _logits(noise: float = 0.3, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    reference_TV = torch.randn(TOKENS, VOCAB, generator=draw) * 3
    variant_TV = reference_TV + noise * torch.randn(TOKENS, VOCAB, generator=draw)
    targets_T = torch.randint(VOCAB, (TOKENS,), generator=draw)
    targets_T[::11] = IGNORED
    chunk_T = torch.arange(TOKENS) * CHUNKS // TOKENS
    bytes_T = torch.randint(1, 6, (TOKENS,), generator=draw)
    return reference_TV, variant_TV, targets_T, chunk_T, bytes_T


def _whole(*arguments) -> Score:
    score = Score()
    score.compare(*arguments)
    return score


def _direct(reference_TV, variant_TV, targets_T, bytes_T) -> dict[str, list[float]]:
    """One token after the other, in Python's floats."""
    rows = {"reference": [], "variant": [], "kl": [], "agree": [], "bytes": []}
    for t, target in enumerate(targets_T.tolist()):
        if target == IGNORED:
            continue
        logs = []
        for logits in (reference_TV[t].tolist(), variant_TV[t].tolist()):
            total = math.log(math.fsum(math.exp(v) for v in logits))
            logs.append([v - total for v in logits])
        rows["reference"].append(-logs[0][target])
        rows["variant"].append(-logs[1][target])
        rows["kl"].append(math.fsum(math.exp(a) * (a - b) for a, b in zip(*logs, strict=True)))
        rows["agree"].append(float(np.argmax(logs[0]) == np.argmax(logs[1])))
        rows["bytes"].append(float(bytes_T[t]))
    return rows


@pytest.mark.parametrize("together", [1 << 22, 5 * VOCAB])
def test_equals_the_direct_computation(monkeypatch, together) -> None:
    monkeypatch.setattr(score_module, "_ELEMENTS_AT_ONCE", together)
    data = _logits()
    score, rows = _whole(*data), _direct(data[0], data[1], data[2], data[4])
    count = len(rows["kl"])
    assert score.tokens == count < TOKENS
    assert score.chunks == CHUNKS
    assert score.kl().value == pytest.approx(sum(rows["kl"]) / count, rel=1e-12)
    assert score.top1().value == pytest.approx(sum(rows["agree"]) / count, rel=1e-12)
    assert 0.5 < score.top1().value < 1
    for reference, name in ((True, "reference"), (False, "variant")):
        nll = sum(rows[name])
        assert score.perplexity(reference).value == pytest.approx(math.exp(nll / count), rel=1e-12)
        bits = score.bits_per_byte(reference)
        assert bits is not None
        assert bits.value == pytest.approx(nll / math.log(2) / sum(rows["bytes"]), rel=1e-12)
    ratio = math.exp((sum(rows["variant"]) - sum(rows["reference"])) / count)
    assert score.increase().value == pytest.approx(ratio - 1, rel=1e-9)


def test_pieces_in_any_cut_are_the_whole() -> None:
    data = _logits()
    whole, pieces = _whole(*data), Score()
    for first, last in ((0, 1), (1, 50), (50, 50), (50, TOKENS)):
        pieces.compare(*(part[first:last] for part in data))
    assert pieces.chunks == whole.chunks
    for name in ("nll", "kl", "top1"):
        assert getattr(pieces, name)().value == pytest.approx(getattr(whole, name)().value, rel=1e-12)
        assert getattr(pieces, name)().error == pytest.approx(getattr(whole, name)().error, rel=1e-9)
    one = Score()
    for chunk in range(CHUNKS):
        kept = data[3] == chunk
        one.compare(data[0][kept], data[1][kept], data[2][kept], chunk, data[4][kept])
    assert one.kl_per_chunk() == pytest.approx(whole.kl_per_chunk(), rel=1e-12)


def test_merge_puts_the_chunks_of_ranks_side_by_side() -> None:
    reference_TV, variant_TV, targets_T, chunk_T, bytes_T = data = _logits()
    first, second = (chunk_T < 2), (chunk_T >= 2)
    ranks = [
        _whole(reference_TV[mine], variant_TV[mine], targets_T[mine], chunk_T[mine] - start, bytes_T[mine])
        for mine, start in ((first, 0), (second, 2))
    ]
    ranks[0].merge(ranks[1])
    whole = _whole(*data)
    assert ranks[0].chunks == CHUNKS
    assert ranks[0].kl().error == pytest.approx(whole.kl().error, rel=1e-12)
    assert ranks[0].bits_per_byte().value == pytest.approx(whole.bits_per_byte().value, rel=1e-12)


def test_inside_and_outside_of_inference_mode() -> None:
    data = _logits()
    with torch.inference_mode():
        score = _whole(*data)
    score.compare(*data)
    assert score.tokens == 2 * _whole(*data).tokens


def test_a_tiny_difference_is_not_lost_in_rounding() -> None:
    reference_TV, _, targets_T, chunk_T, _ = _logits()
    variant_TV = reference_TV + 1e-4 * torch.randn(TOKENS, VOCAB)
    logs = [part.double().log_softmax(-1) for part in (reference_TV, variant_TV)]
    kept = targets_T != IGNORED
    exact = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[kept].mean()
    score = _whole(reference_TV, variant_TV, targets_T, chunk_T)
    assert 0 < score.kl().value < 1e-7
    assert score.kl().value == pytest.approx(float(exact), rel=1e-9)
    assert score.bits_per_byte() is None  # nobody said how many bytes
    score = _whole(*_logits())
    assert score.bits_per_byte() is not None
    score.compare(reference_TV, variant_TV, targets_T, chunk_T)
    assert score.bits_per_byte() is None  # nor of all


def test_impossible_tokens_and_broken_models() -> None:
    reference_TV, variant_TV, targets_T, chunk_T, _ = _logits()
    targets_T = targets_T.clamp(max=VOCAB - 2)
    reference_TV[:, -1] = variant_TV[:, -1] = -torch.inf
    masked = _whole(reference_TV, variant_TV, targets_T, chunk_T)
    cut = _whole(reference_TV[:, :-1], variant_TV[:, :-1], targets_T, chunk_T)
    assert masked.kl().value == pytest.approx(cut.kl().value, rel=1e-12)
    broken = _whole(reference_TV, torch.full_like(variant_TV, torch.nan), targets_T, chunk_T)
    assert math.isnan(broken.perplexity().value)
    assert math.isnan(broken.increase().value)
    assert math.isnan(Score().kl().value)


def test_state_survives_json_to_the_bit() -> None:
    score = _whole(*_logits())
    again = Score.of(json.loads(json.dumps(score.state())))
    assert torch.equal(again._sums, score._sums)
    assert again.bits_per_byte() == score.bits_per_byte()
    assert again.kl() == score.kl()
    again.compare(*_logits(seed=1))  # and goes on
    assert again.tokens == 2 * score.tokens


def test_only_scores_of_the_same_text_are_paired() -> None:
    one, other = _whole(*_logits()), _whole(*_logits(seed=1))
    for pair in (kl_difference, nll_difference, repaired):
        with pytest.raises(AssertionError, match="different text"):
            pair(one, other)
    assert kl_difference(one, one) == Estimate(0.0, 0.0)


def _synthetic(draw: np.random.Generator, chunks: int = 40, tokens: int = 64, damage: float = 1.0, kept: float = 0.4):
    """Scores of rounding and after: tokens of a chunk share most of their luck, and both variants share the chunk's."""
    before = draw.normal(3.0, 0.8, chunks) * tokens
    rounding = damage * (0.10 + 0.04 * draw.normal(size=chunks) + 0.1 * draw.normal(size=chunks) / math.sqrt(tokens))
    after = damage * kept * 0.10 + kept * (rounding - damage * 0.10) + 0.01 * draw.normal(size=chunks)
    return [_of_sums(tokens, before, before + tokens * extra, tokens * extra) for extra in (rounding, after)]


def _of_sums(tokens: int, before: np.ndarray, variant: np.ndarray, kl: np.ndarray) -> Score:
    count = [float(tokens)] * len(before)
    rows = {"tokens": count, "reference": before, "variant": variant, "kl": kl, "agree": count, "bytes": count}
    return Score.of({"counts_bytes": True, **{name: list(row) for name, row in rows.items()}})


def _covered(found: Estimate | None, truth: float, width: float = 2.0) -> bool:
    assert found is not None
    assert found.error is not None
    return abs(found.value - truth) <= width * found.error


def test_two_standard_errors_hold_the_truth_nineteen_times_in_twenty() -> None:
    draw, runs = np.random.default_rng(0), 1000
    hits = {"nll": 0, "kl": 0, "difference": 0, "narrow": 0}
    for _ in range(runs):
        rounded, after = _synthetic(draw)
        hits["nll"] += _covered(rounded.nll(reference=True), 3.0)
        hits["kl"] += _covered(rounded.kl(), 0.10)
        hits["difference"] += _covered(kl_difference(after, rounded), -0.06)
        hits["narrow"] += _covered(rounded.kl(), 0.10, width=1.0)
    shares = {name: number / runs for name, number in hits.items()}
    assert 0.64 < shares.pop("narrow") < 0.72  # one standard error: 68%
    assert all(0.925 < share < 0.975 for share in shares.values()), shares


def test_the_repaired_share_is_as_sure_as_it_says(monkeypatch) -> None:
    monkeypatch.setattr(score_module, "RESAMPLES", 300)
    draw, runs = np.random.default_rng(1), 200
    found = [repaired(*_synthetic(draw)).nll for _ in range(runs)]
    assert 0.89 < sum(_covered(share, 0.6) for share in found) / runs < 0.99
    assert 0.55 < sum(_covered(share, 0.6, width=1.0) for share in found) / runs < 0.80


def test_error_is_that_of_a_bootstrap_over_chunks() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(20, 200, 50).astype(float)  # chunks of different lengths
    kl = tokens * draw.gamma(2.0, 0.05, 50)
    ones = tokens.tolist()
    rows = {"tokens": ones, "reference": ones, "variant": ones, "kl": kl.tolist(), "agree": ones, "bytes": ones}
    found = Score.of({"counts_bytes": True, **rows}).kl()
    picks = draw.integers(50, size=(4000, 50))
    shares = kl[picks].sum(1) / tokens[picks].sum(1)
    assert found.value == pytest.approx(kl.sum() / tokens.sum())
    assert found.error == pytest.approx(shares.std(), rel=0.06)


def test_pairing_sees_what_two_separate_errors_hide() -> None:
    rounded, after = _synthetic(np.random.default_rng(2), kept=0.9)
    apart = math.hypot(rounded.kl().error, after.kl().error)
    paired = kl_difference(after, rounded)
    assert paired.error < apart / 2
    assert paired.deviations < -3
    assert rounded.increase().error < rounded.perplexity().error / rounded.perplexity().value / 5


def test_repaired_is_the_share_of_damage_taken_back() -> None:
    before = np.array([100.0, 110.0, 90.0])
    rounded = _of_sums(50, before, before + np.array([10.0, 12.0, 8.0]), np.array([4.0, 5.0, 6.0]))
    after = _of_sums(50, before, before + np.array([5.0, 6.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    found = repaired(rounded, after)
    assert found.nll == Estimate(pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    assert found.kl is not None
    assert found.kl.value == pytest.approx(0.8)
    assert 0 < found.kl.error < 0.1
    assert repaired(rounded, after, seed=1).kl.value == found.kl.value
    assert repaired(rounded, after) == found
    worse = repaired(after, rounded)
    assert worse.nll.value == pytest.approx(-1.0)
    assert repaired(rounded, rounded).nll.value == 0


def test_no_share_of_a_damage_that_may_be_chance() -> None:
    draw = np.random.default_rng(3)
    rounded, after = _synthetic(draw, chunks=10, damage=0.0)
    before = rounded._of("reference")
    noise = torch.from_numpy(draw.normal(size=10))
    rounded._sums[2], rounded._sums[3] = before + noise - noise.mean() + 0.01, torch.ones(10)
    found = repaired(rounded, after)
    assert found.nll is None
    assert found.kl is not None


def test_one_chunk_has_no_error() -> None:
    reference_TV, variant_TV, targets_T, _, bytes_T = _logits()
    score = _whole(reference_TV, variant_TV, targets_T, 0, bytes_T)
    assert score.kl().error is None
    assert score.kl().deviations == 0
    assert repaired(score, score).kl == Estimate(0.0, None)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(5.7123, 0.0312), "5.712 ± 0.031"),
        (Estimate(5.7123), "5.712"),
        (Estimate(1234.56, 78.9), "1235 ± 79"),
        (Estimate(1.234e-5, 3e-7), "1.23e-05 ± 3.0e-07"),
        (Estimate(0.5, 0.0), "0.5"),
        (Estimate(math.nan, math.nan), "nan"),
    ],
)
def test_as_many_digits_as_the_error_allows(estimate, text) -> None:
    assert str(estimate) == text


def test_percent() -> None:
    assert Estimate(0.0252, 0.004).percent(signed=True) == "+2.52 ± 0.40%"
    assert Estimate(-0.0252, 0.004).percent(signed=True) == "-2.52 ± 0.40%"
