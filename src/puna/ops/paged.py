"""Attention over a paged KV cache, for any mixture of prompts in pieces, single new tokens and drafts.

Shapes: T new tokens, B sequences, H query heads, G key/value heads (H = G * R), K head width, L layers, P pages of S
positions, M pages of the longest table, N positions. Position p of a sequence lies in page table[p // S], row p % S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.attention import causal_mask
from puna.ops.formats.kv import KVScales, quantize_kv
from puna.ops.formats.rounding import code_dtype, decode
from puna.ops.native import paged as native

NULL_PAGE = 0  # never given to a sequence: what padded tables and pages dropped by a sliding window point to
_GATHERED = 2**27  # numbers of keys that the twin gathers at once for single new tokens: 512 MiB in fp32


@dataclass(frozen=True)
class Pages:
    """The storage: `keys` and `values` (L, P, G, S, K) of one allocation; with `scales` they hold codes.

    Codes are int8 or float8_e4m3fn. Memory is not touched before it is used, except page 0, which is zero.
    """

    keys: Tensor
    values: Tensor
    scales: KVScales | None = None

    @staticmethod
    def of(
        layers: int,
        heads: int,
        width: int,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scales: KVScales | None = None,
    ) -> Pages:
        """Empty pages for `heads` kv heads; num_pages counts page 0. With `scales`: of the codes' dtype.

        Errors: `PunaError` for scales of another model.
        """
        if scales is not None:
            _check_scales(scales, layers, heads)
            scales, dtype = scales.to(device), code_dtype(scales.scheme)
        data = torch.empty((2, layers, num_pages, heads, page_size, width), dtype=dtype, device=device)
        data[:, :, NULL_PAGE].zero_()
        return Pages(data[0], data[1], scales)

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return self.keys.shape[3]

    @property
    def num_pages(self) -> int:
        """Page 0 included."""
        return self.keys.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """What a position takes: keys and values of all layers."""
        layers, _, heads, _, width = self.keys.shape
        return 2 * layers * heads * width * self.keys.element_size()

    def copy(self, src_page: int, dst_page: int) -> None:
        """One page's keys and values of all layers, to another page."""
        for part in (self.keys, self.values):
            part[:, dst_page] = part[:, src_page]

    def layer_scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Of a layer's keys and values, (1,) or (G,) each; None where the pages hold numbers."""
        return None if self.scales is None else (self.scales.keys[layer], self.scales.values[layer])

    def write(self, layer: int, slots_T: Tensor, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Rows of new keys and values to their slots (page * S + row), rounded to what the pages hold."""
        page_T, row_T = slots_T // self.page_size, slots_T % self.page_size
        scales = self.layer_scales(layer) or (None, None)
        for part, new_TGK, scale in ((self.keys, k_TGK, scales[0]), (self.values, v_TGK, scales[1])):
            if self.scales is not None and scale is not None:
                new_TGK = quantize_kv(new_TGK, self.scales.scheme, scale)
            _movable(part[layer])[page_T, :, row_T] = _movable(new_TGK.to(part.dtype))

    def read(self, layer: int, table_BM: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, M * S, K) of whole pages in `dtype`: also of rows that nobody wrote."""
        scales = self.layer_scales(layer) or (None, None)
        k, v = (
            _gather(part[layer], table_BM, scale, dtype)
            for part, scale in zip((self.keys, self.values), scales, strict=True)
        )
        return k, v


@dataclass(frozen=True)
class PagedCausal:
    """The engine's `attend`: writes every sequence's new rows, then each row sees all positions up to its own.

    slots_T: int64, page * S + row of each new token. starts_B1: int32, first row of each sequence on the token axis,
    then T. lengths_B: int32, positions of each sequence, the new ones included. tables_BM: int32, pages in order,
    padded with NULL_PAGE. All in the host's memory but slots_T, which is where the pages are. max_len: what 'dynamic'
    rope looks at.

    On the native path a row's output is the same bit for bit whatever else is in the batch, wherever its pages lie,
    whatever the number of threads, and however a prompt is cut into pieces of two tokens or more. A token that is its
    sequence's only new one is computed in another way where at most three query heads share a kv head: then its output
    differs from the same token's in a piece by rounding, about 1e-6. With torch all is the same up to rounding.
    """

    pages: Pages
    slots_T: Tensor
    starts_B1: Tensor
    lengths_B: Tensor
    tables_BM: Tensor
    max_len: int

    @staticmethod
    def of(pages: Pages, slices: Sequence[tuple[Sequence[int], int, int]], max_len: int) -> PagedCausal:
        """From (page ids, first new position, number of new tokens) of each sequence."""
        size = pages.page_size
        tables = np.zeros((len(slices), max((len(ids) for ids, _, _ in slices), default=0)), np.int32)
        slots = [np.zeros(0, np.int64)]
        for row, (ids, start, count) in zip(tables, slices, strict=True):
            row[: len(ids)] = ids
            position = np.arange(start, start + count)
            slots.append(row[position // size].astype(np.int64) * size + position % size)
        starts = np.cumsum([0, *(count for _, _, count in slices)])
        lengths = np.array([start + count for _, start, count in slices])
        return PagedCausal(
            pages,
            torch.from_numpy(np.concatenate(slots)).to(pages.keys.device),
            torch.from_numpy(starts.astype(np.int32)),
            torch.from_numpy(lengths.astype(np.int32)),
            torch.from_numpy(tables),
            max_len,
        )

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Write keys and values of `layer`, then attend; returns (T, H, K) in q's dtype."""
        pages = self.pages
        if not torch.compiler.is_compiling() and native.serves(q_THK, k_TGK, v_TGK, pages.keys):
            index = (self.slots_T, self.starts_B1, self.lengths_B, self.tables_BM)
            scales = pages.layer_scales(layer)
            return native.attention(layer, q_THK, k_TGK, v_TGK, (pages.keys, pages.values), scales, index, window)
        pages.write(layer, self.slots_T, k_TGK, v_TGK)
        return paged_twin(pages, layer, q_THK, self._spans, self._tables, window)

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        starts = self.starts_B1.tolist()
        return list(zip(starts, starts[1:], self.lengths_B.tolist(), strict=False))

    @cached_property
    def _tables(self) -> Tensor:
        return self.tables_BM.to(self.pages.keys.device)


def paged_twin(
    pages: Pages, layer: int, q_THK: Tensor, spans: list[tuple[int, int, int]], tables_BM: Tensor, window: int | None
) -> Tensor:
    """`PagedCausal` without its writing in plain torch, in q's dtype, on any device.

    spans: (first row, row behind the last, positions) of each sequence. Single new tokens go together, padded to the
    longest; a sequence with several rows goes alone. Returns (T, H, K).
    """
    out_THK = torch.empty_like(q_THK)
    single = [b for b, (first, end, _) in enumerate(spans) if end - first == 1]
    for batch in _batches(single, spans, pages):
        rows = [spans[b][0] for b in batch]
        lengths = torch.tensor([spans[b][2] for b in batch], device=q_THK.device)
        out_THK[rows] = _single_rows(pages, layer, q_THK[rows], lengths, tables_BM[batch], window)
    for b, (first, end, length) in enumerate(spans):
        if end - first > 1:
            out_THK[first:end] = _chunk(pages, layer, q_THK[first:end], length, tables_BM[b : b + 1], window)
    return out_THK


def _batches(single: list[int], spans: list[tuple[int, int, int]], pages: Pages) -> list[list[int]]:
    """Neighbours in length, so that little is padding; none larger than `_GATHERED`."""
    batches: list[list[int]] = []
    per_position = pages.keys.shape[2] * pages.keys.shape[4]
    for b in sorted(single, key=lambda b: -spans[b][2]):
        if not batches or (len(batches[-1]) + 1) * spans[batches[-1][0]][2] * per_position > _GATHERED:
            batches.append([])
        batches[-1].append(b)
    return batches


def _single_rows(
    pages: Pages, layer: int, q_BHK: Tensor, lengths_B: Tensor, table_BM: Tensor, window: int | None
) -> Tensor:
    """One new token each: the queries that share a kv head go in as rows of one product."""
    used = -(-int(lengths_B.max()) // pages.page_size)
    k_BGNK, v_BGNK = pages.read(layer, table_BM[:, :used], q_BHK.dtype)
    position_N = torch.arange(k_BGNK.shape[2], device=q_BHK.device)
    seen_BN = position_N < lengths_B[:, None]
    if window is not None:
        seen_BN &= position_N >= lengths_B[:, None] - window
    # What nobody wrote may be nan, and 0 * nan is not 0.
    k_BGNK, v_BGNK = (x.masked_fill(~seen_BN[:, None, :, None], 0) for x in (k_BGNK, v_BGNK))
    q_BGRK = q_BHK.unflatten(1, (k_BGNK.shape[1], -1))
    return F.scaled_dot_product_attention(q_BGRK, k_BGNK, v_BGNK, seen_BN[:, None, None]).flatten(1, 2)


def _chunk(pages: Pages, layer: int, q_CHK: Tensor, length: int, table_1M: Tensor, window: int | None) -> Tensor:
    """The last C positions of one sequence."""
    count = len(q_CHK)
    first = 0 if window is None else max(0, length - count - window + 1)
    skipped = first // pages.page_size
    table_1M = table_1M[:, skipped : -(-length // pages.page_size)]
    seen = slice(first - skipped * pages.page_size, length - skipped * pages.page_size)
    k_1GNK, v_1GNK = (x[:, :, seen] for x in pages.read(layer, table_1M, q_CHK.dtype))
    mask = None if first == 0 and count == length and window is None else _mask(count, length - first, window, q_CHK)
    out = F.scaled_dot_product_attention(
        q_CHK.transpose(0, 1)[None], k_1GNK, v_1GNK, mask, is_causal=mask is None,
        enable_gqa=q_CHK.shape[1] != k_1GNK.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _mask(queries: int, keys: int, window: int | None, q: Tensor) -> Tensor:
    return causal_mask(queries, keys, window, q.device)


def _gather(part_PGSK: Tensor, table_BM: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    taken = _movable(part_PGSK)[table_BM].view(part_PGSK.dtype).transpose(1, 2).flatten(2, 3)  # (B, G, M * S, K)
    return (taken if scale is None else decode(taken, scale[:, None, None])).to(dtype)


def _movable(x: Tensor) -> Tensor:
    """The same bytes in a dtype that torch can index on every device: float8 it cannot."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def _check_scales(scales: KVScales, layers: int, heads: int) -> None:
    if len(scales.keys) != layers or scales.heads not in (None, heads):
        raise PunaError(
            f"the KV cache has scales for {len(scales.keys)} layers"
            f"{f' of {scales.heads} heads' if scales.heads else ''}, the model has {layers} of {heads}",
            "the folder mixes files of two models; quantize it again with --kv",
        )
