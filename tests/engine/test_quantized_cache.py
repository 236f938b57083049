"""The cache in eight bits behind the whole model: the same answers as its twin, in less memory, shared and in pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import puna
from puna.base.console import PunaError
from puna.engine.request import Output
from puna.ops.attention import PackedCausal
from puna.ops.formats.kv import KV_FLOAT8, KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.quant.kv import KVRange

EIGHT_BITS = [KV_INT8, KV_INT8_HEAD, KV_FLOAT8, KV_FLOAT8_HEAD]
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


def greedy(llm: puna.LLM, prompt: list[int], tokens: int = 24, n: int = 1) -> list[Output]:
    return llm.generate(prompt, puna.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens, logprobs=0, n=n))


@pytest.mark.parametrize(
    "limits", [{}, {"native": False}, {"max_num_batched_tokens": 7, "max_num_seqs": 4, "page_size": 4}]
)
@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=names)
def test_decoding_reports_what_the_trainers_forward_gives(model, scheme, limits) -> None:
    plain = puna.LLM.of(model, None).logprobs(PROMPT)
    model.kv_scales = calibrated(model, scheme)
    llm = puna.LLM.of(model, None, **limits)
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
    assert puna.LLM.of(model, None).engine.pages.scales is not None
    assert puna.LLM.of(model, None).engine.pages.keys.dtype is torch.int8
    plain = greedy(puna.LLM.of(model, None, kv="none"), PROMPT)[0]
    assert plain.logprobs == expected.logprobs
    assert greedy(puna.LLM.of(model, None), PROMPT)[0].logprobs != expected.logprobs


def test_a_common_beginning_is_reused_and_answers_go_apart(model) -> None:
    model.kv_scales = calibrated(model, KV_INT8_HEAD)
    shared = puna.LLM.of(model, None)
    for prompt in (PROMPT, [*PROMPT[:40], 7, 8, 9], PROMPT, [1, 2]):
        alone = greedy(puna.LLM.of(model, None), prompt)[0]
        for output in greedy(shared, prompt, n=3):
            assert output.token_ids == alone.token_ids
            assert output.logprobs == pytest.approx(alone.logprobs, abs=2e-2)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 4), ("bfloat16", 2)])
def test_codes_take_a_quarter_or_half(dtype, share) -> None:
    model = puna.load_model("preset:debug", dtype)
    plain = puna.LLM.of(model, None).engine.pages
    model.kv_scales = KVScales(KV_FLOAT8, (torch.ones(1),) * 2, (torch.ones(1),) * 2)
    eight = puna.LLM.of(model, None).engine.pages
    assert eight.bytes_per_token == model.spec.kv_bytes_per_token(1) == plain.bytes_per_token // share
    assert eight.keys.dtype is torch.float8_e4m3fn


@pytest.mark.parametrize("kv", ["float16", "bfloat16"])
def test_a_cache_in_half_precision_is_near(model, kv) -> None:
    expected = greedy(puna.LLM.of(model, None), PROMPT, 6)[0]
    found = greedy(puna.LLM.of(model, None, kv=kv), PROMPT, 6)[0]
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=0.3 if kv == "bfloat16" else 0.04)
    assert found.logprobs != expected.logprobs


def test_scales_of_another_model_are_refused(model) -> None:
    scales = calibrated(model, KV_INT8_HEAD)
    model.kv_scales = replace(scales, keys=scales.keys[:1], values=scales.values[:1])
    with pytest.raises(PunaError, match="scales for 1 layers of 2 heads, the model has 2 of 2"):
        puna.LLM.of(model, None)
    model.kv_scales = KVScales(KV_INT8_HEAD, (torch.ones(3),) * 2, (torch.ones(3),) * 2)
    with pytest.raises(PunaError, match="scales for 2 layers of 3 heads"):
        puna.LLM.of(model, None)
