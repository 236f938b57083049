"""Tokens to text and ends: the same whatever number of tokens a step brings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.engine.answer import AnswerText, choose_best
from puna.engine.request import Output, SamplingParams

TEXT = "def alpha_beta(alpha, beta=12):\n    return alpha + beta\n\u20ac \U0001f999 caf\u00e9\n"


def answer_of(
    tokenizer, ids: list[int], sizes: list[int] | None = None, eos: tuple[int, ...] = (), room: int = 10**6, **knobs
):
    """(AnswerText, pieces, tokens kept) after pushing `ids` in steps of these sizes (default: one by one)."""
    answer = AnswerText(SamplingParams(**{"max_tokens": 10**6, **knobs}), tokenizer, eos, 3, room)
    pieces, start, kept = [], 0, 0
    for size in sizes or [1] * len(ids):
        if answer.is_finished or start >= len(ids):
            break
        step = ids[start : start + size]
        piece, taken = answer.push(step)
        assert taken == len(step) or answer.is_finished
        pieces, start, kept = [*pieces, piece], start + size, kept + taken
    return answer, pieces, kept


def test_text_is_the_decoding_of_the_ids(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    answer, pieces, kept = answer_of(tokenizer, ids)
    assert not answer.is_finished
    pieces.append(answer.finish("abort"))
    assert "".join(pieces) == answer.output.text == TEXT
    assert (answer.output.token_ids, answer.output.finish_reason, kept) == (ids, "abort", len(ids))
    assert answer.finish("error", "too late") == ""
    assert (answer.output.finish_reason, answer.output.error) == ("abort", None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_split_into_steps_gives_the_same_answer(tokenizer, data) -> None:
    """Speculation brings several tokens at once: those behind the end are dropped, nothing else changes."""
    ids = tokenizer.encode(TEXT)
    knobs = data.draw(
        st.fixed_dictionaries(
            {
                "stop": st.lists(
                    st.sampled_from(["alpha", "beta)", "): ", "\u20ac", "\U0001f999 c", "ret", "never"]), max_size=2
                ),
                "include_stop_in_output": st.booleans(),
                "stop_token_ids": st.lists(st.sampled_from(ids), max_size=1),
                "max_tokens": st.integers(1, len(ids) + 3),
            }
        )
    )
    knobs["min_tokens"] = data.draw(st.integers(0, min(20, knobs["max_tokens"])))
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=len(ids), max_size=len(ids)))
    one, pieces, kept = answer_of(tokenizer, ids, eos=(ids[-2],), **knobs)
    other, others, also = answer_of(tokenizer, ids, sizes, eos=(ids[-2],), **knobs)
    assert one.output == other.output
    assert kept == also == len(one.output.token_ids)
    assert "".join(pieces) == "".join(others) == one.output.text
    if one.output.finish_reason != "stop" and not knobs["min_tokens"]:
        assert not any(stop in one.output.text for stop in knobs["stop"])


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(tokenizer, include: bool) -> None:
    answer, pieces, kept = answer_of(
        tokenizer, tokenizer.encode(TEXT), stop=["): x", "return"], include_stop_in_output=include
    )
    assert answer.output.text == TEXT[: TEXT.find("return") + 6 * include] == "".join(pieces)
    assert (answer.output.finish_reason, answer.output.stop_reason) == ("stop", "return")
    assert len(answer.output.token_ids) == kept < len(tokenizer.encode(TEXT))
    assert answer.push([1, 2]) == ("", 0)


def test_stops_before_min_tokens_are_text(tokenizer) -> None:
    ids = tokenizer.encode("alpha beta alpha beta")
    first = len(tokenizer.encode("alpha"))
    answer, _, _ = answer_of(tokenizer, ids, stop=["alpha"], min_tokens=first)
    assert answer.output.text == "alpha beta "
    answer, _, _ = answer_of(tokenizer, ids, stop=["alpha"], min_tokens=first - 1)
    assert answer.output.text in ("", "alpha beta ")  # searched from its last token on: "alpha" is not whole in that


def test_ends_by_ids(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    end = ids[6]
    cut = ids[: ids.index(end) + 1]
    for knobs, eos, reason in (({}, (end,), None), ({"stop_token_ids": [end]}, (), end)):
        answer, _, _ = answer_of(tokenizer, ids, eos=eos, **knobs)
        assert (answer.output.token_ids, answer.output.text) == (cut, tokenizer.decode(cut[:-1]))
        assert (answer.output.finish_reason, answer.output.stop_reason) == ("stop", reason)
        shown, _, _ = answer_of(tokenizer, ids, eos=eos, include_stop_in_output=True, **knobs)
        assert shown.output.text == tokenizer.decode(cut)
    ignored, _, kept = answer_of(tokenizer, ids, eos=(end,), ignore_eos=True)
    assert kept == len(ids)
    assert not ignored.is_finished


@pytest.mark.parametrize(
    ("knobs", "room", "length"), [({"max_tokens": 5}, 100, 5), ({}, 7, 7), ({"max_tokens": None}, 7, 7)]
)
def test_lengths(tokenizer, knobs: dict, room: int, length: int) -> None:
    answer, _, kept = answer_of(tokenizer, tokenizer.encode(TEXT), [4] * 99, room=room, **knobs)
    assert (kept, answer.output.finish_reason) == (length, "length")
    assert answer.output.text == tokenizer.decode(answer.output.token_ids)


def test_specials_are_shown_only_when_asked(tokenizer) -> None:
    bos = tokenizer.bos_id
    ids = [*tokenizer.encode("al"), bos, *tokenizer.encode("pha")]
    assert answer_of(tokenizer, ids)[0].output.text == "alpha"
    shown = answer_of(tokenizer, ids, skip_special_tokens=False)[0].output.text
    assert shown == tokenizer.decode(ids)
    assert len(shown) > len("alpha")


def test_half_a_character_at_the_end_is_marked(tokenizer) -> None:
    ids = tokenizer.encode("\U0001f999")
    assert len(ids) > 1
    answer, pieces, _ = answer_of(tokenizer, ids, max_tokens=len(ids) - 1)
    assert answer.output.text == tokenizer.decode(ids[:-1]) == pieces[-1]
    assert pieces[:-1] == [""] * (len(ids) - 2)


def test_without_text(tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    for maker, knobs in ((None, {}), (tokenizer, {"detokenize": False})):
        answer, _, kept = answer_of(maker, ids, eos=(ids[9],), **knobs)
        assert (answer.output.text, kept) == ("", ids.index(ids[9]) + 1)
    with pytest.raises(PunaError, match="no tokenizer"):
        AnswerText(SamplingParams(stop="x"), None, (), 1, 9)


def test_logprobs_are_kept_as_far_as_the_answer_goes() -> None:
    answer = AnswerText(SamplingParams(logprobs=1, max_tokens=3), None, (), 1, 99)
    answer.push([5], [-1.0], [{5: -1.0}])
    answer.push([6, 7, 8], [-2.0, -3.0, -4.0], [{6: -2.0}, {1: -0.5}, {8: -4.0}])
    assert answer.output.logprobs == [-1.0, -2.0, -3.0]
    assert answer.output.top_logprobs == [{5: -1.0}, {6: -2.0}, {1: -0.5}]
    assert answer.output.cumulative_logprob == -6.0
    assert AnswerText(SamplingParams(), None, (), 1, 9).output.logprobs is None


def test_best_of_takes_the_highest_mean() -> None:
    params = SamplingParams(n=2, best_of=4)
    answers = [AnswerText(params, None, (), 1, 99, index) for index in range(4)]
    for answer, logprobs in zip(answers, [[-1.0], [-2.0, -1.0], [-0.9, -0.9, -0.9], [-0.1]], strict=True):
        answer.push(list(range(len(logprobs))), logprobs)
        answer.finish("length")
    answers[3].output.finish_reason = "error"
    best = choose_best([answer.output for answer in answers], params)
    assert [output.token_ids for output in best] == [[0, 1, 2], [0]]
    assert [output.index for output in best] == [0, 1]
    assert best[0].logprobs is None  # not asked for
    outputs = [Output(index=0), Output(index=1)]
    assert choose_best(outputs, SamplingParams(n=2)) == outputs
