"""Documents become the ids that the tokenizer gives for them, with bos, tag and eos around."""

from __future__ import annotations

import numpy as np

from puna.corpus import encode
from puna.corpus.documents import Document
from puna.corpus.encode import encode_documents


def test_ids_offsets_and_bytes(tokenizer) -> None:
    documents = [Document("a", "def alpha():"), Document("b", "é and <|endoftext|> stay text", "x.org")]
    encoded = encode_documents(documents, tokenizer)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows = [begin + tokenizer.encode(d.text) + tokenizer.eos_ids[:1] for d in documents]
    assert encoded.shard.tokens.tolist() == rows[0] + rows[1]
    assert encoded.shard.tokens.dtype == np.uint16
    assert encoded.shard.starts.tolist() == [0, len(rows[0]), len(rows[0]) + len(rows[1])]
    assert encoded.shard.tags is None
    assert encoded.text_bytes.tolist() == [len(d.text.encode()) for d in documents]


def test_tags_stand_after_bos(tokenizer) -> None:
    documents = [Document("a", "alpha", "a.org"), Document("b", "beta"), Document("c", "gamma", "a.org")]
    shard = encode_documents(documents, tokenizer, tag=True).shard
    tag, begin = tokenizer.encode("a.org\n"), 0 if tokenizer.bos_id is None else 1
    assert shard.tags.tolist() == [len(tag), 0, len(tag)]
    for start in (shard.starts[0], shard.starts[2]):
        assert shard.tokens[start + begin : start + begin + len(tag)].tolist() == tag


def test_calls_in_turns_change_nothing(tokenizer, monkeypatch) -> None:
    documents = [Document(str(i), "alpha beta\n" * n) for i, n in enumerate((0, 1, 30, 0, 2, 50, 1))]
    whole = encode_documents(documents, tokenizer)
    monkeypatch.setattr(encode, "_CALL", 100)
    turns = encode_documents(documents, tokenizer)
    assert (whole.shard.tokens == turns.shard.tokens).all()
    assert (whole.shard.starts == turns.shard.starts).all()


def test_long_texts_go_in_pieces_that_end_at_lines(tokenizer, monkeypatch) -> None:
    text = "def alpha(beta):\n" * 40
    whole = encode_documents([Document("", ""), Document("a", text)], tokenizer).shard
    monkeypatch.setattr(encode, "LONGEST_TEXT", 100)
    pieces = encode_documents([Document("", ""), Document("a", text)], tokenizer).shard
    assert tokenizer.decode(pieces.tokens.tolist()) == tokenizer.decode(whole.tokens.tolist())
    assert (pieces.tokens == whole.tokens).all()


def test_no_documents(tokenizer) -> None:
    encoded = encode_documents([], tokenizer, tag=True)
    assert encoded.shard.starts.tolist() == [0]
    assert len(encoded.shard.tokens) == len(encoded.shard.tags) == len(encoded.text_bytes) == 0
