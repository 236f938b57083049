"""Embeddings: one vector per text out of the hidden states of its tokens.

Shapes: T tokens of all texts side by side, D model width, B texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.base.console import PunaError

HOW = ("last", "mean")


def pool(
    hidden_TD: Tensor, starts: Sequence[int], lengths: Sequence[int], how: str = "last", normalize: bool = True
) -> Tensor:
    """(B, D) fp32: of each text the hidden state of its last token, or the mean over its tokens.

    starts and lengths: where each text's rows lie. `normalize`: to length 1, so that a dot product is the cosine; a
    vector of zeros stays one. Every text is summed by itself in fp32: the others do not change its bits.
    Errors: `PunaError` for an unknown `how` and for a text without tokens.
    """
    if how not in HOW:
        raise PunaError(f"pooling {how!r} is not known", f"use {' or '.join(HOW)}")
    if empty := [text for text, length in enumerate(lengths) if length < 1]:
        raise PunaError(f"text {empty[0]} of {len(lengths)} has no tokens", "leave out empty texts, or add a bos token")
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    assert all(start >= 0 and end <= hidden_TD.shape[0] for start, end in zip(starts, ends, strict=True))
    if how == "last":
        pooled_BD = hidden_TD[torch.tensor(ends, dtype=torch.long, device=hidden_TD.device) - 1].float()
    else:
        spans = zip(starts, ends, strict=True)
        pooled_BD = hidden_TD.new_empty(len(ends), hidden_TD.shape[1], dtype=torch.float32)
        for text, (start, end) in enumerate(spans):
            pooled_BD[text] = hidden_TD[start:end].float().mean(0)
    return F.normalize(pooled_BD, dim=1) if normalize else pooled_BD
