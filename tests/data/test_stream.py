from __future__ import annotations

import numpy as np
import pytest
import torch

from puna.base.console import PunaError
from puna.data.corpus import Document
from puna.data.pack import pack
from puna.data.stream import Stream, TokenCorpus
from puna.ops.basic import IGNORE


def corpus(lengths: list[int]) -> TokenCorpus:
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return TokenCorpus(np.arange(sum(lengths), dtype=np.uint16), starts, 4 * sum(lengths))


def test_documents_are_apart_in_a_batch() -> None:
    batch = pack(np.arange(20, dtype=np.uint16), np.array([0, 6, 7, 15]), [4, 12], 6)
    assert batch.tokens_T.tolist() == [4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17]
    assert batch.positions_T.tolist() == [0, 1, 0, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    x = IGNORE
    assert batch.targets_T.tolist() == [5, x, x, 8, 9, 10, 13, 14, x, 16, 17, 18]
    assert batch.attend.runs == ((0, 1, 2), (2, 1, 1), (3, 3, 3))
    assert batch.valid == 9


def test_an_epoch_shows_every_window_once() -> None:
    stream = Stream(corpus([100]), 8, seed=1)
    first = [stream.window(i) for i in range(stream.windows)]
    second = [stream.window(stream.windows + i) for i in range(stream.windows)]
    assert sorted(first) == sorted(second) == list(range(0, 96, 8))
    assert first != second


def test_order_is_a_function_of_seed_and_index() -> None:
    """However the samples are asked for - in order, from the middle, in other batch sizes - they are the same."""
    one, two = (Stream(corpus([300, 41, 7]), 8, seed=3) for _ in range(2))
    whole = one.batch(0, 60)
    parts = [two.batch(i, 5) for i in (55, 50, 0, 5, 10, 15, 20, 25, 30, 35, 40, 45)]
    parts = [*parts[2:], parts[1], parts[0]]
    assert torch.equal(whole.tokens_T, torch.cat([p.tokens_T for p in parts]))
    assert torch.equal(whole.targets_T, torch.cat([p.targets_T for p in parts]))
    assert not torch.equal(whole.tokens_T, Stream(corpus([300, 41, 7]), 8, seed=4).batch(0, 60).tokens_T)


def test_validation_windows_are_spread_and_never_repeat() -> None:
    stream = Stream(corpus([100]), 8, seed=1)
    few = [batch.tokens_T.view(-1, 8)[:, 0].tolist() for batch in stream.sample_evenly(2, limit=4)]
    assert few == [[0, 24], [48, 72]]
    every = torch.cat([batch.tokens_T for batch in stream.sample_evenly(5, limit=999)])
    assert every.tolist() == list(range(96))


def test_too_little_text() -> None:
    with pytest.raises(PunaError, match="8 tokens, one sequence needs 9"):
        Stream(corpus([8]), 8, 0)


def test_encoding_marks_documents(tokenizer) -> None:
    made = TokenCorpus.encode([Document("a", "def alpha"), Document("b", "x<|eos|>")], tokenizer)
    ids = made.tokens.tolist()
    assert [i for i, t in enumerate(ids) if t == tokenizer.bos_id] == made.starts.tolist()
    assert ids.count(tokenizer.eos_ids[0]) == 2  # the special string inside the text stayed text
    assert made.text_bytes == len("def alpha") + len("x<|eos|>")
    assert made.fingerprint() != TokenCorpus.encode([Document("a", "def alphb")], tokenizer).fingerprint()
