from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import puna
from puna.base.console import PunaError
from puna.engine.beam import BeamParams
from puna.model.spec import Spec
from puna.ops.attention import PackedCausal
from puna.weights.folder import empty_model

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(model_folder) -> puna.LLM:
    return puna.LLM(model_folder)


def test_greedy_equals_transformers_generate(llm, model_folder) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(model_folder)
    prompt = llm.tokenizer.encode("def alpha(", bos=True)
    ids = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
    )
    ours = llm.generate(prompt, puna.SamplingParams(**GREEDY, max_tokens=40))[0]
    assert ours.token_ids == ids[0, len(prompt) :].tolist()
    assert ours.finish_reason == "length"
    assert ours.text == llm.tokenizer.decode(ours.token_ids, skip_specials=True)


def test_logprobs_agree_between_trainer_and_engine(llm) -> None:
    """Parity: what decoding reports is what the training forward gives for the same ids."""
    prompt = llm.encode("def beta(gamma):")
    output = llm.generate(prompt, puna.SamplingParams(**GREEDY, max_tokens=30, logprobs=2))[0]
    assert output.logprobs is not None
    assert output.top_logprobs is not None
    expected = llm.logprobs(prompt + output.token_ids)
    assert expected[0] is None
    assert output.logprobs == pytest.approx(expected[len(prompt) :], abs=1e-5)
    for token, chosen, top in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        assert len(top) == 2
        assert max(top.values()) == top[token] == chosen  # greedy: the chosen one is the likeliest


def test_logprobs_of_a_long_prompt_in_pieces(llm) -> None:
    ids = [i % 300 for i in range(400)]
    with torch.no_grad():
        hidden = llm.model(torch.tensor(ids), torch.arange(400), PackedCausal.of([400]))
        expected = llm.model.logits(hidden).log_softmax(-1)[torch.arange(399), torch.tensor(ids[1:])]
    assert llm.logprobs(ids)[1:] == pytest.approx(expected.tolist(), abs=1e-5)


def test_reusing_a_common_beginning_changes_nothing(model_folder) -> None:
    params = puna.SamplingParams(**GREEDY, max_tokens=12, logprobs=0)
    prompts = ["def alpha(beta", "def alpha(beta", "def alpha(gamma, delta", "class", "def alpha(gamma"]
    shared = puna.LLM(model_folder)
    for prompt in prompts:
        a, b = shared.generate(prompt, params)[0], puna.LLM(model_folder).generate(prompt, params)[0]
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("seed", [7, 0, -1, 2**64])
def test_same_seed_same_text(llm, seed) -> None:
    params = puna.SamplingParams(temperature=1.0, seed=seed, max_tokens=20, n=3)
    first, second = llm.generate("def ", params), llm.generate("def ", params)
    assert [o.token_ids for o in first] == [o.token_ids for o in second]
    assert len({tuple(o.token_ids) for o in first}) == 3
    streamed = [list(llm.stream("def ", params, index))[-1][1].token_ids for index in range(3)]
    assert streamed == [o.token_ids for o in first]


def test_stop_strings_and_ids(llm) -> None:
    free = llm.generate("def ", puna.SamplingParams(**GREEDY, max_tokens=30))[0]
    stop = free.text[5:8]
    cut = llm.generate("def ", puna.SamplingParams(**GREEDY, max_tokens=30, stop=[stop]))[0]
    assert cut.text == free.text[: free.text.find(stop)]
    assert cut.finish_reason == "stop"
    token = free.token_ids[4]
    ended = llm.generate("def ", puna.SamplingParams(**GREEDY, max_tokens=30, stop_token_ids=[token]))[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert ended.finish_reason == "stop"


def test_streamed_pieces_join_to_the_text(llm) -> None:
    for seed in range(5):
        params = puna.SamplingParams(temperature=3.0, seed=seed, max_tokens=60, ignore_eos=True)
        pieces = list(llm.stream("def ", params))
        assert "".join(piece for piece, _ in pieces) == pieces[-1][1].text
        assert pieces[-1][1].text == llm.tokenizer.decode(pieces[-1][1].token_ids, skip_specials=True)


def test_eos_ends_an_answer_unless_ignored(llm) -> None:
    free = llm.generate("def ", puna.SamplingParams(**GREEDY, max_tokens=12))[0]
    eos = free.token_ids[3]  # let a token that will come be the end
    ending = puna.LLM.of(llm.model, llm.tokenizer)
    ending.engine.eos_ids = {eos}
    answer = ending.generate("def ", puna.SamplingParams(temperature=0, max_tokens=12))[0]
    assert answer.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert answer.finish_reason == "stop"
    assert not answer.text.endswith(llm.tokenizer.decode([eos]))
    assert ending.generate("def ", puna.SamplingParams(**GREEDY, max_tokens=12))[0].token_ids == free.token_ids


def test_rows_that_pad_the_embedding_are_never_drawn(tokenizer) -> None:
    model = puna.load_model("preset:debug")  # 512 rows, the tokenizer has 320
    padded = puna.LLM.of(model, tokenizer)
    output = padded.generate("def ", puna.SamplingParams(seed=1, temperature=5.0, max_tokens=200, ignore_eos=True))[0]
    assert max(output.token_ids) < 320


def test_the_context_is_a_limit(llm) -> None:
    with pytest.raises(PunaError, match="the prompt has 513 tokens, the model's context is 512"):
        llm.generate([5] * 513)
    with pytest.raises(PunaError, match="510 tokens and max_tokens is 50: 560 together, the limit is 512"):
        llm.generate([5] * 510, puna.SamplingParams(**GREEDY, max_tokens=50))
    full = llm.generate([5] * 510, puna.SamplingParams(**GREEDY, max_tokens=None))[0]
    assert full.finish_reason == "length"
    assert len(full.token_ids) == 2


def test_unusable_prompts(llm) -> None:
    with pytest.raises(PunaError, match="empty"):
        llm.generate([[]])
    with pytest.raises(PunaError, match="token id 320 is outside the vocabulary of 320"):
        llm.generate([320])
    with pytest.raises(PunaError, match="this model has no tokenizer"):
        puna.LLM("preset:debug").generate("text")


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path) -> None:
    puna.save_model(puna.load_model("preset:debug"), tmp_path / "bare")
    output = puna.LLM(tmp_path / "bare").generate([1, 2, 3], puna.SamplingParams(**GREEDY, max_tokens=4))[0]
    assert len(output.token_ids) == 4
    assert output.text == ""


def test_several_prompts_and_forms(llm) -> None:
    params = puna.SamplingParams(**GREEDY, max_tokens=5)
    one, two = llm.generate(["def ", [1, 2, 3]], params)
    assert one.token_ids == llm.generate("def ", params)[0].token_ids
    assert two.token_ids == llm.generate([1, 2, 3], params)[0].token_ids
    assert (one.prompt_tokens, two.prompt_tokens) == (len(llm.encode("def ")), 3)


@pytest.mark.parametrize("window", [None, 9])
def test_bfloat16_and_windows_run(window) -> None:
    spec = Spec.preset("debug").replace(sliding_windows=(window, None))
    model = empty_model(spec, torch.bfloat16, torch.device("cpu"))
    model.init_weights()
    output = puna.LLM.of(model, None).generate([1, 2, 3], puna.SamplingParams(**GREEDY, max_tokens=30))[0]
    assert len(output.token_ids) == 30


def test_streams_are_read_in_turns_and_closing_one_aborts_it(model_folder) -> None:
    llm, params = puna.LLM(model_folder), puna.SamplingParams(**GREEDY, max_tokens=9)
    expected = [llm.generate(prompt, params)[0].text for prompt in ("def ", "class", "return")]
    first, second, third = (llm.stream(prompt, params) for prompt in ("def ", "class", "return"))
    texts = ["", ""]
    next(third)
    third.close()
    for _ in range(9):
        for place, stream in enumerate((first, second)):
            texts[place] += next(stream)[0]
    assert texts == expected[:2]
    assert list(first) == list(second) == []
    assert not llm.engine.scheduler.has_work
    assert llm.engine.cache.usage == 0


def test_best_of_brings_the_likeliest(llm) -> None:
    params = puna.SamplingParams(temperature=1.0, seed=5, max_tokens=8, n=6, logprobs=0, ignore_eos=True)
    every = llm.generate("def ", params)
    ranked = sorted(every, key=lambda output: -sum(output.logprobs) / len(output.logprobs))
    best = llm.generate("def ", dataclasses.replace(params, n=2, best_of=6))
    assert [output.token_ids for output in best] == [output.token_ids for output in ranked[:2]]
    with pytest.raises(PunaError, match="best_of"):
        next(llm.stream("def ", dataclasses.replace(params, n=1, best_of=2)))


def test_beam_search_equals_transformers(llm, model_folder) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(model_folder)
    prompt = llm.tokenizer.encode("def alpha(", bos=True)
    ids = theirs.generate(
        torch.tensor([prompt]),
        max_new_tokens=8,
        num_beams=4,
        do_sample=False,
        num_return_sequences=3,
        length_penalty=1.0,
    )
    ours = llm.beam_search(prompt, BeamParams(4, 8, 3))
    assert [output.token_ids for output in ours] == [row[len(prompt) :].tolist() for row in ids]
    assert llm.engine.cache.usage == 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_trainers_hidden_states(llm, pooling) -> None:
    prompts = ["def ", [1, 2, 3], "class alpha"]
    vectors = llm.embed(prompts, pooling)
    for prompt, vector in zip(prompts, vectors, strict=True):
        ids = llm.encode(prompt)
        with torch.no_grad():
            hidden = llm.model(torch.tensor(ids), torch.arange(len(ids)), PackedCausal.of([len(ids)]))
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        assert vector == pytest.approx((expected / expected.norm()).tolist(), abs=1e-5)


def test_each_prompt_may_have_its_own_parameters(llm) -> None:
    each = [puna.SamplingParams(**GREEDY, max_tokens=n) for n in (2, 5)]
    assert [len(output.token_ids) for output in llm.generate(["def ", "class"], each)] == [2, 5]
    with pytest.raises(PunaError, match="2 prompts with 1 parameters"):
        llm.generate(["def ", "class"], each[:1])


def test_nothing_runs_when_one_prompt_cannot(llm) -> None:
    steps = llm.engine.stats()["steps"]
    with pytest.raises(PunaError, match="outside the vocabulary"):
        llm.generate(["def ", [99999]])
    assert llm.engine.stats()["steps"] == steps
    assert not llm.engine.has_work
