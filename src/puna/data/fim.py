"""Fill-in-the-middle: some documents are cut in three and the middle is told last, so that a model learns to fill gaps.

    PSM   <PRE> prefix <SUF> suffix <MID> middle
    SPM   <PRE> <SUF> suffix <MID> prefix middle

SPM is the paper's variant for training on both at once: it holds the same markers in a like order, so the two teach
each other. The cuts fall between tokens, not between characters as the paper recommends: shards hold ids, and a cut
inside a token would need the text and the tokenizer again. A prompt that ends in half a word is served less well.

Source: Bavarian et al. 2022, "Efficient training of language models to fill in the middle", arXiv:2207.14255, section 3
and appendix D (the encodings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from puna.base.console import PunaError
from puna.data.permute import keyed, mix64

# Markers of (prefix, suffix, middle) as tokenizers spell them. A pair of them is never mixed with another.
SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, OpenAI's cl100k
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, StableCode
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<PRE>", "<SUF>", "<MID>"),
    # DeepSeek-Coder, with U+FF5C bars. The hole stands where the middle was taken out, so the suffix follows it.
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4.5, CodeGeeX4
    ("<|prefix|>", "<|suffix|>", "<|middle|>"),  # Falcon-H1
)
ADDED = 3  # positions a rearranged document needs beside its tokens

# Salts, so that one key may serve both questions.
_CHOICE, _CUTS = 0x66696D31, 0x66696D32


@dataclass(frozen=True)
class FimTokens:
    """Ids of the markers that stand before the prefix, the middle and the suffix."""

    prefix: int
    middle: int
    suffix: int


def find_fim_tokens(specials: Mapping[str, int]) -> FimTokens:
    """The markers of a tokenizer, from its added tokens by their text. Raises PunaError if it has none.

    All added tokens, not only those flagged special: Qwen2.5-Coder, CodeGemma and DeepSeek-Coder do not flag theirs.
    """
    for prefix, suffix, middle in SPELLINGS:
        if prefix in specials and suffix in specials and middle in specials:
            return FimTokens(specials[prefix], specials[middle], specials[suffix])
    spellings = ", ".join(" ".join(spelling) for spelling in SPELLINGS)
    raise PunaError(
        f"the tokenizer has no fill-in-the-middle markers among {len(specials)} tokens (looked for {spellings})",
        f"add them with `puna tokenizer train --special {' '.join(SPELLINGS[0])}`, or use another tokenizer",
    )


def chosen(documents: np.ndarray, rate: float, key: int) -> np.ndarray:
    """Which documents are rearranged: each with probability `rate`, by a hash of (key, document) and nothing else.

    Shapes: documents (m,) int64 indices; returns (m,) bool. With another key it also draws which of those are SPM.
    Raises PunaError for a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise PunaError(f"a fill-in-the-middle rate of {rate} is no share", "use a rate from 0 to 1")
    words = mix64(mix64(np.asarray(documents, dtype=np.int64).astype(np.uint64)) ^ np.uint64(keyed(key, _CHOICE)))
    return (words >> np.uint64(11)) * 2.0**-53 < rate


def rearrange(
    tokens_L: np.ndarray, key: int, spm: bool, fim: FimTokens, head: int = 0, keep_last: bool = False
) -> np.ndarray:
    """A document (or a piece of one) with its middle moved to the end.

    Shapes: tokens_L (L,) ids; returns (L + 3,) of the same dtype. The first `head` tokens (bos, a tag) stay in front
    and, with `keep_last`, the last one (eos) stays last; between them two cuts, each uniform over all places, make the
    three parts, of which any may be empty. `key` is the document's own, for instance keyed(seed, epoch, document).
    """
    head = min(head, len(tokens_L))
    end = max(head, len(tokens_L) - int(keep_last))
    places = end - head + 1
    first, second = sorted(head + (keyed(key, _CUTS, cut) * places >> 64) for cut in range(2))
    prefix, middle, suffix = tokens_L[head:first], tokens_L[first:second], tokens_L[second:end]
    pre, mid, suf = (np.array([marker], dtype=tokens_L.dtype) for marker in (fim.prefix, fim.middle, fim.suffix))
    order = (pre, suf, suffix, mid, prefix, middle) if spm else (pre, prefix, suf, suffix, mid, middle)
    return np.concatenate((tokens_L[:head], *order, tokens_L[end:]))
