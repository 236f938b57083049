"""Token windows in an order that is a pure function of (seed, sample index), so that resuming needs one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from puna.base.console import PunaError
from puna.data.corpus import Document, total_bytes
from puna.data.pack import Batch, pack
from puna.text.tokenizer import Tokenizer


class TokenCorpus:
    """Documents as one token array: `[bos] text [eos]` each, with the offset where each one starts."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, text_bytes: int):
        self.tokens, self.starts, self.text_bytes = tokens, starts, text_bytes

    @staticmethod
    def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenCorpus:
        """Tokenize in parallel; special strings in the text stay text."""
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        end = tokenizer.eos_ids[:1]
        rows = [begin + ids + end for ids in tokenizer.encode_batch([d.text for d in documents])]
        lengths = np.array([len(row) for row in rows])
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        tokens = np.concatenate([np.array(row, dtype=dtype) for row in rows])
        return TokenCorpus(tokens, np.concatenate(([0], lengths[:-1].cumsum())), total_bytes(documents))

    def fingerprint(self) -> str:
        """sha256 of tokens and document starts: what a resumed run must find unchanged."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.starts.astype(np.int64).tobytes())
        return digest.hexdigest()


class Stream:
    """Fixed windows of `seq_len` tokens. Sample i is window perm_e[i mod n] of epoch e = i div n."""

    def __init__(self, corpus: TokenCorpus, seq_len: int, seed: int):
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.windows = (len(corpus.tokens) - 1) // seq_len
        if self.windows < 1:
            raise PunaError(
                f"the corpus has {len(corpus.tokens)} tokens, one sequence needs {seq_len + 1}",
                "give more text or a smaller seq_len",
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def window(self, index: int) -> int:
        """Offset of the first token of global sample `index`."""
        epoch, place = divmod(index, self.windows)
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._order = (epoch, generator.permutation(self.windows))
        return int(self._order[1][place]) * self.seq_len

    def batch(self, first: int, count: int) -> Batch:
        """Global samples first .. first + count - 1, packed."""
        return pack(
            self.corpus.tokens, self.corpus.starts, [self.window(first + i) for i in range(count)], self.seq_len
        )

    def sample_evenly(self, count: int, limit: int) -> Iterator[Batch]:
        """At most `limit` windows spread evenly over the corpus, `count` at a time, always the same: for validation.

        Evenly, because neighbours are alike: the first windows of a sorted folder may all be tables of numbers.
        """
        chosen = min(self.windows, limit)
        offsets = [i * self.windows // chosen * self.seq_len for i in range(chosen)]
        for first in range(0, chosen, count):
            yield pack(self.corpus.tokens, self.corpus.starts, offsets[first : first + count], self.seq_len)

    def bytes_per_token(self) -> float:
        """Bytes of text per scored token of the whole corpus: turns nats per token into bits per byte."""
        scored = len(self.corpus.tokens) - len(self.corpus.starts)
        return self.corpus.text_bytes / max(1, scored)
