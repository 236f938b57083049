"""Which tokens a rank holds under context parallelism, and which keys its queries need: plain integers, no processes.

Ulysses wants contiguous tokens. Ring and all-gather cut the sequence into 2 w chunks and give rank r the chunks r and
2 w - 1 - r: under a causal mask a late token costs more than an early one, and an early chunk with a late one costs
every rank the same (Llama 3, arXiv:2407.21783, section 3.3.2). For w = 2 and one document, chunks 0 1 2 3:

    rank 0:  0 . . .        1 + 4 = 5 blocks        rank 1:  0 1 . .        2 + 3 = 5 blocks
             0 1 2 3                                         0 1 2 .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.attention import PackedCausal

METHODS = ("ulysses", "allgather", "ring")


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` of the sequence, lying in a buffer from row `row` on."""

    start: int
    end: int
    row: int


@dataclass(frozen=True)
class Piece:
    """Rows of a rank's queries that see rows of a buffer of keys, both `documents` times as long as one document.

    `offset`: from the first key to the first query, in tokens; 0 for documents that see themselves causally.
    """

    queries: slice
    keys: slice
    documents: int
    offset: int


def check_context(method: str, tokens: int, heads: int, world: int) -> None:
    """Raise PunaError unless `world` ranks can share sequences of `tokens` and layers of `heads` query heads."""
    if method not in METHODS:
        raise PunaError(f"context parallel method '{method}' is unknown", f"use one of {', '.join(METHODS)}")
    if method == "ulysses" and heads % world:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise PunaError(
            f"{heads} attention heads are not divisible by cp {world}, as ulysses needs",
            f"use a cp of {_listed(fitting)}, or the method ring or allgather",
        )
    chunks = world if method == "ulysses" else 2 * world
    if tokens % chunks:
        below, above = tokens // chunks * chunks, -(-tokens // chunks) * chunks
        raise PunaError(
            f"{tokens} tokens are not divisible by {chunks}, the chunks of cp {world} by {method}",
            f"use a sequence of {f'{below} or {above}' if below else above} tokens, or another cp",
        )


def held_spans(tokens: int, rank: int, world: int, method: str) -> tuple[Span, ...]:
    """The spans of the sequence that `rank` of `world` holds, in the order in which it holds them."""
    check_context(method, tokens, world, world)
    if method == "ulysses":
        size = tokens // world
        return (Span(rank * size, (rank + 1) * size, 0),)
    size = tokens // (2 * world)
    chunks = (rank, 2 * world - 1 - rank)
    return tuple(Span(chunk * size, (chunk + 1) * size, row * size) for row, chunk in enumerate(chunks))


def shard(arrays: Sequence[Tensor], rank: int, world: int, method: str) -> tuple[Tensor, ...]:
    """A rank's share of arrays of shape (T, ...), such as tokens, positions and targets made for the whole sequence.

    Positions and targets must be made before: a rank's last token is followed by another rank's first.
    Raises PunaError if T does not divide.
    """
    return tuple(
        torch.cat([x[span.start : span.end] for span in held_spans(len(x), rank, world, method)]) for x in arrays
    )


def unshard(parts: Sequence[Tensor], method: str) -> Tensor:
    """The whole (T, ...) from every rank's share, in rank order: the inverse of `shard`."""
    tokens, world = sum(len(part) for part in parts), len(parts)
    pieces = []
    for rank, part in enumerate(parts):
        spans = held_spans(tokens, rank, world, method)
        pieces += [(span.start, part[span.row : span.row + span.end - span.start]) for span in spans]
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])])


def token_count(documents: PackedCausal) -> int:
    """Tokens of the whole sequence."""
    if not documents.runs:
        return 0
    start, count, length = documents.runs[-1]
    return start + count * length


@lru_cache(maxsize=512)  # every layer of a step asks for the same
def pieces(
    documents: PackedCausal, queries: tuple[Span, ...], keys: tuple[Span, ...], window: int | None
) -> tuple[Piece, ...]:
    """What is left to compute of `queries` x `keys` once causality, documents and window have ruled out the rest.

    Chunks are contiguous and so are documents, so little of a mask remains: keys of an earlier chunk are seen only by
    the document that reaches over the chunk's first token, and by all its queries alike. That is a full rectangle
    (with a window: a band of one). Within a chunk it is packed causal attention.
    """
    bounds = _bounds(documents)
    found: list[Piece] = []
    for query in queries:
        for key in keys:
            if key.start <= query.start and query.end <= key.end:
                found += _diagonal(bounds, query, key)
            found += _rectangle(bounds, query, key, window)
    return tuple(found)


@lru_cache(maxsize=8)
def _bounds(documents: PackedCausal) -> np.ndarray:
    """Where each document begins, and where the last one ends."""
    starts = [start + length * np.arange(count) for start, count, length in documents.runs]
    return np.concatenate([*starts, [token_count(documents)]])


def _diagonal(bounds: np.ndarray, query: Span, key: Span) -> list[Piece]:
    """Each document's queries over its own keys within the chunk; neighbours of equal length are one piece."""
    inner = bounds[(bounds > query.start) & (bounds < query.end)]
    lengths = np.diff(np.concatenate(([query.start], inner, [query.end])))
    found = []
    for start, count, length in PackedCausal.of(lengths).runs:
        row, column = query.row + start, key.row + query.start - key.start + start
        size = count * length
        found.append(Piece(slice(row, row + size), slice(column, column + size), count, 0))
    return found


def _rectangle(bounds: np.ndarray, query: Span, key: Span, window: int | None) -> list[Piece]:
    """The queries and keys of the one document that lies on both sides of the chunk's first token."""
    document = int(np.searchsorted(bounds, query.start, side="right")) - 1
    first, last = max(int(bounds[document]), key.start), min(key.end, query.start)
    end = min(int(bounds[document + 1]), query.end)
    if window is not None:
        first, end = max(first, query.start - window + 1), min(end, last - 1 + window)
    if first >= last or query.start >= end:
        return []
    rows = slice(query.row, query.row + end - query.start)
    columns = slice(key.row + first - key.start, key.row + last - key.start)
    return [Piece(rows, columns, 1, query.start - first)]


def _listed(numbers: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]))))
