"""The cache in eight bits behind the whole model: the same answers as its twin, in less memory, reused and forked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import puna
from puna.base.console import PunaError
from puna.engine.kv_cache import SequenceCache
from puna.model.spec import Spec
from puna.ops.attention import PackedCausal
from puna.ops.formats.kv import KV_FLOAT8, KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.quant.kv import KVRange

EIGHT_BITS = [KV_INT8, KV_INT8_HEAD, KV_FLOAT8, KV_FLOAT8_HEAD]
CPU = torch.device("cpu")
PROMPT = list(range(5, 65))


def names(scheme) -> str:
    return f"{scheme.kind}-{scheme.granularity}"


@pytest.fixture
def model(model_folder):
    return puna.load_model(model_folder)


def calibrated(model, scheme) -> KVScales:
    seen = KVRange(2, 2)
    with torch.no_grad():
        model(torch.arange(300), torch.arange(300), seen.watch(PackedCausal.of([300])))
    return seen.scales(scheme)


def greedy(llm: puna.LLM, prompt: list[int] | str, tokens: int = 24, n: int = 1) -> list[puna.Output]:
    return llm.generate(prompt, puna.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens, logprobs=0, n=n))


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=names)
def test_decoding_reports_what_the_trainers_forward_gives(model, scheme) -> None:
    plain = puna.LLM.of(model, None).logprobs(PROMPT)
    model.kv_scales = calibrated(model, scheme)
    llm = puna.LLM.of(model, None)
    output = greedy(llm, PROMPT)[0]
    assert output.logprobs is not None
    expected = llm.logprobs(PROMPT + output.token_ids)
    # Sums in another order may move a number across the edge between two codes: not 1e-5 as for the attention alone.
    assert output.logprobs == pytest.approx(expected[60:], abs=2e-2)
    assert sum(abs(a - b) for a, b in zip(output.logprobs, expected[60:], strict=True)) / 24 < 2e-3
    lost = max(abs(a - b) for a, b in zip(llm.logprobs(PROMPT)[1:], plain[1:], strict=True))
    assert lost > 0.02  # the twin rounds, too


def test_the_folder_decides_unless_told_otherwise(model) -> None:
    expected = greedy(puna.LLM.of(model, None), PROMPT)[0]
    model.kv_scales = calibrated(model, KV_INT8)
    assert puna.LLM.of(model, None)._cache.scales is not None
    plain = greedy(puna.LLM.of(model, None, kv="none"), PROMPT)[0]
    assert plain.logprobs == expected.logprobs
    assert greedy(puna.LLM.of(model, None), PROMPT)[0].logprobs != expected.logprobs
    with pytest.raises(PunaError, match="kv is 'int8'"):
        puna.LLM("preset:debug", kv="int8")


def test_a_common_beginning_is_reused_and_forks_go_apart(model) -> None:
    model.kv_scales = calibrated(model, KV_INT8_HEAD)
    shared = puna.LLM.of(model, None)
    for prompt in (PROMPT, [*PROMPT[:40], 7, 8, 9], PROMPT, [1, 2]):
        alone = greedy(puna.LLM.of(model, None), prompt)[0]
        for output in greedy(shared, prompt, n=3):  # each on a fork of the cache
            assert output.token_ids == alone.token_ids
            assert output.logprobs == pytest.approx(alone.logprobs, abs=2e-2)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_codes_take_a_quarter_or_half(dtype, share) -> None:
    spec = Spec.preset("debug")
    scales = KVScales(KV_FLOAT8, (torch.ones(1),) * 2, (torch.ones(1),) * 2)
    plain, eight = SequenceCache(spec, dtype, CPU), SequenceCache(spec, dtype, CPU, scales)
    assert eight.bytes_per_token == spec.kv_bytes_per_token(1) == plain.bytes_per_token // share
    attends = [cache.room_for(300) for cache in (plain, eight)]
    assert attends[1].keys.dtype is torch.float8_e4m3fn
    assert attends[0].keys.nbytes == share * attends[1].keys.nbytes >= share * 300 * spec.kv_bytes_per_token(1) // 2


def test_growing_keeps_what_was_written() -> None:
    spec = Spec.preset("debug")
    scales = KVScales(KV_INT8, (torch.full((1,), 0.05),) * 2, (torch.full((1,), 0.05),) * 2)
    cache = SequenceCache(spec, torch.float32, CPU, scales)
    q, k = torch.randn(700, spec.num_attention_heads, 16), torch.randn(700, 2, 16)
    expected = SequenceCache(spec, torch.float32, CPU, scales).room_for(700)(1, q, k, k, None)
    for start, end in ((0, 200), (200, 300), (300, 700)):
        out = cache.room_for(end - start)(1, q[start:end], k[start:end], k[start:end], None)
        cache.commit(list(range(start, end)))
        assert torch.allclose(out, expected[start:end], atol=1e-5)


def test_scales_of_another_model_are_refused(model) -> None:
    scales = calibrated(model, KV_INT8_HEAD)
    model.kv_scales = replace(scales, keys=scales.keys[:1], values=scales.values[:1])
    with pytest.raises(PunaError, match="scales for 1 layers of 2 heads, the model has 2 of 2"):
        puna.LLM.of(model, None)
    model.kv_scales = KVScales(KV_INT8_HEAD, (torch.ones(3),) * 2, (torch.ones(3),) * 2)
    with pytest.raises(PunaError, match="scales for 2 layers of 3 heads"):
        puna.LLM.of(model, None)
