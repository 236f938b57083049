"""How many bytes of text tokens stand for, where nobody wrote it down: bits per byte are counted by it."""

from __future__ import annotations

import numpy as np

from puna.data.shards import Shard
from puna.text.tokenizer import Tokenizer

_CHUNK = 1 << 20  # tokens looked up together


class TextBytes:
    """UTF-8 bytes of the text that tokens stand for, which bits per byte are counted by; these files do not hold it.

    Exact where a token always stands for the same bytes (byte-level BPE, sentencepiece with byte fallback): a look in
    a table, about 130 million tokens a second. Otherwise each document is decoded: about 5 million.
    Special tokens count nothing. What a normalizer changed before the text was tokenized is not known.
    """

    def __init__(self, tokenizer: Tokenizer):
        lengths = tokenizer.byte_lengths
        self._tokenizer = tokenizer
        self._lengths = None if lengths is None else np.array(lengths, dtype=np.int32)
        self._dropped: dict[int, int] = {}  # by first token: spaces that decoding drops at the beginning of a text

    def __call__(self, shard: Shard) -> int:
        """Bytes of text of a shard."""
        tokens, starts = shard.tokens, shard.starts
        if self._lengths is None:
            pairs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
            texts = (self._tokenizer.decode(tokens[a:b].tolist(), skip_specials=True) for a, b in pairs)
            return sum(len(text.encode()) for text in texts)
        pieces = (tokens[i : i + _CHUNK] for i in range(0, len(tokens), _CHUNK))
        return sum(int(self._lengths[piece].sum()) for piece in pieces) - self._dropped_in(tokens, starts)

    def _dropped_in(self, tokens: np.ndarray, starts: np.ndarray) -> int:
        """sentencepiece begins every text with a space that was not there: "▁The" is 4 bytes, but 3 at the start."""
        assert self._lengths is not None
        first = starts[:-1].copy()
        for _ in range(2):  # over bos, and one more special token
            first += (self._lengths[tokens[first]] == 0) & (first + 1 < starts[1:])
        ids, counts = np.unique(tokens[first], return_counts=True)
        return sum(self._dropped_by(i) * n for i, n in zip(ids.tolist(), counts.tolist(), strict=True))

    def _dropped_by(self, token: int) -> int:
        if token not in self._dropped:
            assert self._lengths is not None
            alone = len(self._tokenizer.decode([token], skip_specials=True).encode())
            self._dropped[token] = max(0, int(self._lengths[token]) - alone)
        return self._dropped[token]
