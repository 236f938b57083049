"""fim: nothing is lost, the cuts are uniform, the share is the rate, and the markers are those of the tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.data.fim import ADDED, SPELLINGS, FimTokens, chosen, find_fim_tokens, rearrange
from puna.data.permute import keyed

FIM = FimTokens(prefix=60001, middle=60002, suffix=60003)


def restore(tokens: np.ndarray, head: int, keep_last: bool) -> list[int]:
    """The document from its rearranged form. `<PRE> <SUF> ...` reads the same as SPM and as PSM without a prefix."""
    row = tokens.tolist()
    end = len(row) - int(keep_last)
    pre, suf, mid = (row.index(x) for x in (FIM.prefix, FIM.suffix, FIM.middle))
    assert pre == head
    assert pre < suf < mid < end
    return row[:pre] + row[pre + 1 : suf] + row[mid + 1 : end] + row[suf + 1 : mid] + row[end:]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 40), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 2**64 - 1))
def test_nothing_is_lost(length, head, keep_last, spm, key):
    if length < head + keep_last:
        return
    tokens = np.arange(length, dtype=np.uint16)
    moved = rearrange(tokens, key, spm, FIM, head, keep_last)
    assert moved.dtype == tokens.dtype
    assert len(moved) == length + ADDED
    assert restore(moved, head, keep_last) == tokens.tolist()
    if keep_last:
        assert moved[-1] == tokens[-1]


def test_both_forms_by_hand():
    tokens = np.arange(10, dtype=np.uint32)
    key = next(k for k in range(1000) if cuts(tokens, k) == (3, 7))
    P, M, S = FIM.prefix, FIM.middle, FIM.suffix
    assert rearrange(tokens, key, False, FIM, 1, True).tolist() == [0, P, 1, 2, S, 7, 8, M, 3, 4, 5, 6, 9]
    assert rearrange(tokens, key, True, FIM, 1, True).tolist() == [0, P, S, 7, 8, M, 1, 2, 3, 4, 5, 6, 9]


def cuts(tokens: np.ndarray, key: int) -> tuple[int, int]:
    """Where the middle begins and ends, read off the PSM form with one token in front and the last kept."""
    row = rearrange(tokens, key, False, FIM, 1, True).tolist()
    begin = row.index(FIM.suffix) - 1
    return begin, begin + len(row) - 2 - row.index(FIM.middle)


def test_a_piece_shorter_than_its_head_still_takes_the_markers():
    assert rearrange(np.array([5]), 0, False, FIM, head=3, keep_last=True).tolist() == [5, 60001, 60003, 60002]
    assert len(rearrange(np.array([], dtype=np.uint16), 0, True, FIM, head=2, keep_last=True)) == ADDED


def test_cuts_are_uniform():
    """Two independent cuts over 9 places: (a, b) with a < b twice as likely as (a, a)."""
    tokens, number = np.arange(10), 8100
    pairs = [cuts(tokens, keyed(0, document)) for document in range(number)]
    counts = np.array([[pairs.count((a, b)) for b in range(1, 10)] for a in range(1, 10)])
    expected = number / 81 * (np.triu(np.ones((9, 9)), 1) * 2 + np.eye(9))
    seen = expected > 0
    assert counts[~seen].sum() == 0
    chi = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    assert abs(chi - 44) < 5 * np.sqrt(2 * 44)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_is_the_rate(rate):
    number = 100_000
    picked = chosen(np.arange(number), rate, key=4)
    assert abs(picked.sum() - rate * number) <= 5 * np.sqrt(number * rate * (1 - rate))
    np.testing.assert_array_equal(chosen(np.array([70, 3, 70]), rate, 4), picked[[70, 3, 70]])


def test_choices_of_other_keys_and_neighbours_are_independent():
    number = 100_000
    one, other = (chosen(np.arange(number), 0.5, key) for key in (0, 1))
    bound = 5 * np.sqrt(number) / 2
    assert abs((one == other).sum() - number / 2) < bound
    assert abs((one[1:] == one[:-1]).sum() - number / 2) < bound
    assert (chosen(np.arange(number), 0.2, 0) <= one).all()  # a higher rate adds documents, it swaps none


def test_same_for_ever():
    assert np.flatnonzero(chosen(np.arange(20), 0.5, 9)).tolist() == [2, 3, 5, 6, 8, 9, 11, 13, 14, 17, 19]
    assert rearrange(np.arange(12), keyed(9, 1), False, FIM, 1, True).tolist() == [
        0,
        60001,
        1,
        2,
        60003,
        7,
        8,
        9,
        10,
        60002,
        3,
        4,
        5,
        6,
        11,
    ]


def test_a_rate_that_is_no_share_is_refused():
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(PunaError, match="rate"):
            chosen(np.arange(3), rate, 0)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_markers_are_found_by_their_spelling(spelling):
    prefix, suffix, middle = spelling
    specials = {"<s>": 1, middle: 7, prefix: 8, suffix: 9, "<|fim_pad|>": 10}
    assert find_fim_tokens(specials) == FimTokens(prefix=8, middle=7, suffix=9)


def test_deepseek_marks_the_suffix_with_the_hole():
    specials = {"<｜fim▁hole｜>": 100002, "<｜fim▁begin｜>": 100003, "<｜fim▁end｜>": 100004}
    assert find_fim_tokens(specials) == FimTokens(prefix=100003, middle=100004, suffix=100002)


def test_a_tokenizer_without_markers_is_refused():
    for specials in ({}, {"<|fim_prefix|>": 1, "<|fim_suffix|>": 2, "<fim_middle>": 3}):
        with pytest.raises(PunaError, match="fim_prefix") as caught:
            find_fim_tokens(specials)
        assert "puna tokenizer train --special" in caught.value.hint
