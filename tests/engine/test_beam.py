"""Beam search against transformers' on the same model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import puna
from puna.base.console import PunaError
from puna.engine.beam import BeamParams, beam_search
from puna.ops.attention import PackedCausal

PROMPT = [1, 40, 100, 7]


@pytest.fixture(scope="module")
def expand(model_folder):
    """The likeliest next tokens by whole forwards, all hypotheses side by side."""
    model = puna.load_model(model_folder)

    @torch.no_grad()
    def expand(answers, top):
        lengths = [len(PROMPT) + len(ids) for ids in answers]
        tokens = torch.tensor([token for ids in answers for token in (*PROMPT, *ids)])
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = model(tokens, positions, PackedCausal.of(lengths))
        last = torch.tensor(lengths).cumsum(0) - 1
        found = model.logits(hidden[last]).float().div(8).log_softmax(-1).topk(top)
        return [
            list(zip(i, v, strict=True)) for i, v in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    return expand


@pytest.fixture(scope="module")
def theirs(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 3.0])
def test_equals_transformers(expand, theirs, early_stopping, length_penalty) -> None:
    """Flat logits and many end tokens, so that beams end at different lengths."""
    for width, eos, length in ((3, list(range(5, 320, 60)), 12), (4, [9, 250], 8), (2, [], 5)):
        n = width - 1
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([PROMPT]), num_beams=width, num_return_sequences=n, max_new_tokens=length, do_sample=False,
                length_penalty=length_penalty, early_stopping=early_stopping, eos_token_id=eos or None, pad_token_id=3,
                temperature=None, logits_processor=[lambda ids, scores: (scores / 8).log_softmax(-1)],
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        params = BeamParams(width, length, n, length_penalty, early_stopping)
        found = beam_search(expand, params, eos, None, len(PROMPT))
        for output, ids, score in zip(
            found, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
        ):
            assert output.token_ids == ids[len(PROMPT) :][: len(output.token_ids)]
            assert set(ids[len(PROMPT) + len(output.token_ids) :]) <= {3}  # padding
            assert output.cumulative_logprob / len(output.token_ids) ** length_penalty == pytest.approx(score, abs=1e-4)
            assert output.finish_reason == ("stop" if output.token_ids[-1] in eos else "length")
        assert [output.index for output in found] == list(range(n))


def test_text_and_ignored_ends(expand, tokenizer) -> None:
    eos = list(range(5, 320, 20))
    best = beam_search(expand, BeamParams(4, 10), eos, tokenizer, 4)[0]
    assert best.finish_reason == "stop"
    assert best.text == tokenizer.decode(best.token_ids[:-1], skip_specials=True)
    assert best.prompt_tokens == 4
    long = beam_search(expand, BeamParams(4, 10, ignore_eos=True), eos, tokenizer)[0]
    assert (len(long.token_ids), long.finish_reason) == (10, "length")


def test_a_likelier_answer_than_the_greedy_one() -> None:
    """By hand: the first step's second choice leads to more."""
    table = {(): [(1, -0.5), (2, -1.0)], (1,): [(1, -3.0), (2, -3.0)], (2,): [(1, -0.1), (2, -3.0)]}
    best = beam_search(lambda answers, top: [table[tuple(ids)] for ids in answers], BeamParams(2, 2, n=2))
    assert [output.token_ids for output in best] == [[2, 1], [1, 1]]
    assert best[0].cumulative_logprob == pytest.approx(-1.1)


def test_never_stops_while_a_longer_answer_could_win() -> None:
    """By hand: an end at once costs 0.5; ten tokens cost 1.0 together, 0.1 each."""

    def expand(answers, top):
        return [[(1, 0.0), (0, -5.0)] if ids else [(0, -0.5), (1, -1.0)] for ids in answers]

    def best(early_stopping):
        return beam_search(expand, BeamParams(1, 10, early_stopping=early_stopping), eos_ids=[0])[0]

    assert best(False).token_ids == best(True).token_ids == [0]
    assert best("never").token_ids == [1] * 10


def test_early_stopping_ends_when_enough_are_finished() -> None:
    """By hand: two are finished after two tokens, the best answer has three."""
    table = {
        (): [(0, -0.5), (1, -0.6), (2, -0.7)],
        (1,): [(4, -0.01), (0, -3.0)],
        (2,): [(0, -0.1), (4, -4.0)],
        (1, 4): [(0, -0.1), (5, -2.0)],
    }

    def best(early_stopping):
        params = BeamParams(2, 9, early_stopping=early_stopping)
        return beam_search(lambda answers, top: [table.get(tuple(ids), [(0, -9.0)]) for ids in answers], params, [0])[0]

    assert best(True).token_ids == [2, 0]
    assert best(False).token_ids == [1, 4, 0]


@pytest.mark.parametrize(
    "wrong", [{"beam_width": 0}, {"max_tokens": 0}, {"n": 5}, {"early_stopping": "soon"}, {"beam_width": 257}]
)
def test_out_of_range(wrong: dict) -> None:
    with pytest.raises(PunaError, match=next(iter(wrong))):
        BeamParams(**wrong)


def test_a_model_that_says_nothing() -> None:
    with pytest.raises(PunaError, match="no next token"):
        beam_search(lambda answers, top: [[] for _ in answers], BeamParams())
    with pytest.raises(PunaError, match="beam_width 256"):
        beam_search(lambda answers, top: [], BeamParams(256), range(9))
