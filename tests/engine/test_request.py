from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.engine.request import SamplingParams, StopText


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}, {"n": 0}, {"max_tokens": 0}, {"top_k": -1},
     {"repetition_penalty": 0}, {"presence_penalty": 3}, {"stop": [""]}, {"logprobs": -1}],
)  # fmt: skip
def test_out_of_range_values_say_the_range(wrong: dict) -> None:
    with pytest.raises(PunaError) as caught:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in caught.value.message or "stop" in caught.value.message
    assert caught.value.hint


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
            assert whole is not None
            break
        assert whole is None
        assert not any(
            shown.endswith(s[:k]) and text[len(shown) :].startswith(s[k:]) for s in stops for k in range(1, len(s))
        )
    shown += stop.flush()
    places = [p for s in stops if (p := text.find(s)) >= 0]
    assert shown == (text[: min(places)] if places else text)
