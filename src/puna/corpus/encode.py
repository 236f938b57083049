"""Documents to token ids: `[bos] [domain] text [eos]` each, laid end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from puna.corpus.documents import Document
from puna.data.shards import Shard, token_dtype
from puna.text.tokenizer import Tokenizer

# One call of the library takes about 40 times its text in memory: longer texts go in pieces.
LONGEST_TEXT = 1 << 22
# Characters per call: what a call makes then stays near the processor (4 Mi at a time took 15% longer).
_CALL = 1 << 19
# What stands between a domain and its document. One token in most vocabularies.
AFTER_TAG = "\n"


@dataclass(frozen=True)
class Encoded:
    """Documents as one token array, in their order, with the UTF-8 bytes of text of each."""

    shard: Shard
    text_bytes: np.ndarray


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer, tag: bool = False) -> Encoded:
    """Tokenize; special strings in the text stay text. `tag` puts each document's domain before its text.

    A text above LONGEST_TEXT characters is tokenized in pieces that end at a line: at such a seam one token may differ.
    """
    begin, end = frame(tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)
    tags = _encode_tags({d.domain for d in documents if tag and d.domain}, tokenizer)
    heads = [tags.get(d.domain, []) for d in documents]
    bodies = _encode_texts([d.text for d in documents], tokenizer)
    arrays = [np.array([*begin, *head, *ids, *end], dtype=dtype) for head, ids in zip(heads, bodies, strict=True)]
    starts = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
    tag_lengths = np.array([len(head) for head in heads], dtype=np.uint16) if tag else None
    return Encoded(
        Shard(tokens, starts, tag_lengths), np.array([utf8_bytes(d.text) for d in documents], dtype=np.int64)
    )


def frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after every document: [bos] and [eos], as far as the vocabulary has them."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id], tokenizer.eos_ids[:1]


def utf8_bytes(text: str) -> int:
    """The length of a text in UTF-8, at once for ASCII."""
    return len(text) if text.isascii() else len(text.encode())


def _encode_tags(domains: set[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    names = sorted(domains)
    return dict(zip(names, tokenizer.encode_batch([name + AFTER_TAG for name in names]), strict=True))


def _encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each text, in calls of about _CALL characters."""
    first = total = 0
    for last, text in enumerate(texts):
        if last > first and total + len(text) > min(_CALL, LONGEST_TEXT):
            yield from tokenizer.encode_batch(texts[first:last])
            first, total = last, 0
        if len(text) > LONGEST_TEXT:
            yield [token for piece in _pieces(text) for token in tokenizer.encode(piece)]
            first = last + 1
        else:
            total += len(text)
    yield from tokenizer.encode_batch(texts[first:])


def _pieces(text: str) -> list[str]:
    """The text in parts of at most LONGEST_TEXT characters, cut after a line break where there is one."""
    parts, start = [], 0
    while len(text) - start > LONGEST_TEXT:
        cut = text.rfind("\n", start, start + LONGEST_TEXT) + 1
        cut = cut if cut > start else start + LONGEST_TEXT
        parts.append(text[start:cut])
        start = cut
    return [*parts, text[start:]]
