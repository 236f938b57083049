"""Copies and near copies are found as often as the theory says, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest

from puna.corpus.dedup import BANDS, ROWS, SHINGLE, KeySet, band_keys, exact_keys, keep_new, minhash


def lay_out(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges = np.cumsum([0, *map(len, documents)])
    return np.concatenate(documents), edges[:-1], edges[1:]


def keys_of(documents: list[np.ndarray]) -> np.ndarray:
    return band_keys(minhash(*lay_out(documents)))


def zipf_text(draw: np.random.Generator, tokens: int, vocabulary: int = 20_000) -> np.ndarray:
    """Token ids as frequent as words are, so that documents share many of them."""
    return np.minimum(draw.zipf(1.2, tokens), vocabulary).astype(np.uint16)


def test_exact_keys_tell_documents_apart_and_know_copies() -> None:
    tokens = np.array([1, 2, 3, 1, 2, 3, 1, 2, 4, 3], dtype=np.uint16)
    keys = exact_keys(tokens, np.array([0, 3, 6, 9]), np.array([3, 6, 9, 9]))
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 3
    assert keys.dtype == np.uint64


@pytest.mark.parametrize("jaccard", [0.5, 0.75, 0.9])
def test_found_as_often_as_the_curve_says(jaccard) -> None:
    """Pairs of documents made of a common and an own part: shingles at the seam aside, J is known."""
    draw, pairs, length = np.random.default_rng(0), 400, 600
    common = round(2 * length * jaccard / (1 + jaccard))
    first = [draw.integers(0, 50_000, length).astype(np.uint16) for _ in range(pairs)]
    second = [np.concatenate([a[:common], draw.integers(0, 50_000, length - common).astype(np.uint16)]) for a in first]
    shingles = length - SHINGLE + 1
    shared = common - SHINGLE + 1
    true = shared / (2 * shingles - shared)
    expected = 1 - (1 - true**ROWS) ** BANDS
    found = (keys_of(first) == keys_of(second)).any(axis=1).mean()
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / pairs) + 0.01
    agree = (minhash(*lay_out(first)) == minhash(*lay_out(second))).mean()
    assert agree == pytest.approx(true, abs=0.02)


def test_edited_documents_are_found_and_others_of_the_topic_kept() -> None:
    """4% of a document changed in three places; and 500 documents of one topic that share their usual phrases."""
    draw = np.random.default_rng(1)
    phrases = [zipf_text(draw, 12) for _ in range(40)]

    def document() -> np.ndarray:
        parts = [phrases[draw.integers(40)] if draw.random() < 0.3 else zipf_text(draw, 30) for _ in range(30)]
        return np.concatenate(parts)

    originals = [document() for _ in range(500)]
    edited = []
    for original in originals:
        copy = original.copy()
        for place in draw.integers(0, len(copy) - 20, 3):
            run = round(len(copy) * 0.04 / 3)
            copy[place : place + run] = draw.integers(20_000, 40_000, run)
        edited.append(copy)
    seen = KeySet()
    assert keep_new(seen, keys_of(originals)).mean() > 0.99
    assert keep_new(seen, keys_of(edited)).mean() < 0.1


def test_words_changed_here_and_there_lower_j_as_the_curve_says() -> None:
    """One token in 50 spoils 7 shingles in 50: J is about 0.76, and three in four are found."""
    draw = np.random.default_rng(2)
    originals = [zipf_text(draw, 800) for _ in range(300)]
    edited = [np.where(draw.random(800) < 0.02, 50_000, text).astype(np.uint16) for text in originals]
    seen = KeySet()
    keep_new(seen, keys_of(originals))
    assert 0.6 < 1 - keep_new(seen, keys_of(edited)).mean() < 0.95


def test_signatures_do_not_depend_on_neighbours_or_pieces() -> None:
    draw = np.random.default_rng(3)
    documents = [draw.integers(0, 300, n).astype(np.uint32) for n in (5, 7, 100_000, 40, 0, 33_000, 200)]
    together = minhash(*lay_out(documents))
    alone = np.concatenate([minhash(*lay_out([document])) for document in documents])
    assert (together == alone).all()
    assert (minhash(*lay_out([d.astype(np.uint16) for d in documents])) == together).all()
    assert band_keys(together).any(axis=1).tolist() == [False, True, True, True, False, True, True]


def test_keep_new_is_the_plain_loop() -> None:
    """Against sets and a loop, with copies inside a batch, of dropped rows, and rows that have no keys."""
    draw = np.random.default_rng(4)
    seen, plain = KeySet(), set()
    for _ in range(30):
        rows = draw.integers(1, 400, (50, 3)).astype(np.uint64)
        rows[draw.random(50) < 0.1] = 0
        expected = []
        for row in rows.tolist():
            mine = set(row) - {0}
            expected.append(not mine & plain)
            plain |= mine if expected[-1] else set()
        assert keep_new(seen, rows).tolist() == expected
    assert len(seen) == len(plain)


def test_key_set_in_sorted_runs() -> None:
    draw = np.random.default_rng(5)
    keys, one_by_one = draw.integers(0, 2**63, 20_000).astype(np.uint64), KeySet()
    for first in range(0, len(keys), 500):
        one_by_one.add(keys[first : first + 700])  # some of them twice
    assert len(one_by_one) == len(np.unique(keys))
    assert one_by_one.contains(keys).all()
    assert not one_by_one.contains(keys + np.uint64(2**63)).any()
    assert len(one_by_one._runs) < 8
    assert KeySet(keys).contains(keys).all()
    assert not KeySet().contains(keys).any()
