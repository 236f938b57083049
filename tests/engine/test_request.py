from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.engine.request import SamplingParams, StopText


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"n": 0}, {"max_tokens": 0}, {"top_k": -2},
     {"repetition_penalty": 0}, {"presence_penalty": 3}, {"stop": [""]}, {"logprobs": -1}, {"typical_p": 0},
     {"logit_bias": {1: 101}}, {"logit_bias": {1: float("nan")}}, {"logit_bias": [3]}, {"min_tokens": 200},
     {"best_of": 1, "n": 2}, {"logprobs_mode": "cooked"}, {"prompt_logprobs": 1001}, {"temperature": float("nan")},
     {"temperature": "hot"}, {"temperature": None}, {"top_k": 2.5}, {"seed": 1.5}, {"stop": "a", "detokenize": False}],
)  # fmt: skip
def test_out_of_range_values_say_the_range(wrong: dict) -> None:
    with pytest.raises(PunaError) as caught:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in caught.value.message or "stop" in caught.value.message
    assert caught.value.hint


def test_other_spellings_mean_the_same() -> None:
    spelled = SamplingParams(top_k=-1, stop="end", stop_token_ids=[3], logit_bias={"7": 1})
    plain = SamplingParams(top_k=0, stop=("end",), stop_token_ids=(3,), logit_bias={7: 1.0})
    assert spelled == plain
    assert len({spelled, plain, SamplingParams()}) == 2
    assert SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3)).top_k == 3


def test_a_seed_is_drawn_once() -> None:
    params = SamplingParams(n=2, best_of=5)
    seeded = params.seeded()
    assert seeded.seeded() is seeded
    assert seeded.seed != params.seeded().seed
    assert (seeded.num_answers, seeded.is_ranked) == (5, True)
    assert not SamplingParams(n=5).is_ranked


def test_no_torch_is_needed_to_ask() -> None:
    code = "import sys, puna.engine.request as r; r.SamplingParams(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_part_of_a_stop_string_leaks_at_any_chunking(pieces: list[str], stops: list[str]) -> None:
    stop, shown = StopText(stops), ""
    text = ""
    for piece in pieces:
        text += piece
        shown += stop.push(piece)
        whole = min((p for s in stops if (p := text.find(s)) >= 0), default=None)
        if stop.found:
            assert stop.found in stops
            assert whole is not None
            break
        assert whole is None
        assert not any(
            shown.endswith(s[:k]) and text[len(shown) :].startswith(s[k:]) for s in stops for k in range(1, len(s))
        )
    shown += stop.flush()
    places = [p for s in stops if (p := text.find(s)) >= 0]
    assert shown == (text[: min(places)] if places else text)


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_that_is_included_ends_the_text(pieces: list[str], stops: list[str]) -> None:
    stop, text = StopText(stops, include=True), "".join(pieces)
    shown = "".join([stop.push(piece) for piece in pieces]) + stop.flush()
    if stop.found is None:
        assert shown == text
        assert not any(s in text for s in stops)
    else:
        assert text.startswith(shown)
        assert shown.endswith(stop.found)
        assert not any(s in shown[: -len(stop.found)] for s in stops)
