"""Who looks at whom: packed causal attention for training, cached causal attention for generation.

Shapes: T tokens, H query heads, G key/value heads (H is a multiple of G), K head width, S cached positions.
Both are frozen dataclasses with one method, handed into the model as `attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.kv import KVScales, quantize_kv
from puna.ops.formats.rounding import decode
from puna.ops.native import attention as native
from puna.ops.native import token


@dataclass(frozen=True)
class PackedCausal:
    """Causal attention within each of several documents that lie one after another on the token axis.

    `runs`: (first token, documents, tokens per document) - neighbours of equal length share one kernel call.
    `max_len`: tokens of the longest document (what 'dynamic' rope looks at).
    """

    runs: tuple[tuple[int, int, int], ...]
    max_len: int

    @staticmethod
    def of(lengths: Sequence[int] | np.ndarray) -> PackedCausal:
        """From the token count of each document, in order."""
        count = np.asarray(lengths, dtype=np.int64)
        if not count.size:
            return PackedCausal((), 0)
        first = np.concatenate(([0], np.flatnonzero(np.diff(count)) + 1))  # of each run of equal lengths
        repeats = np.diff(np.append(first, count.size))
        starts = (count.cumsum() - count)[first]
        runs = zip(starts.tolist(), repeats.tolist(), count[first].tolist(), strict=True)
        return PackedCausal(tuple(runs), int(count.max()))

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Attention output (T, H, K). `layer` is not looked at: nothing is remembered.

        On a CPU in fp32 the native kernel takes all documents in one call, about twice as fast as torch forward and
        backward (`benchmarks/attention.py`); everything else goes to torch's attention, one call per run.
        """
        if not torch.compiler.is_compiling() and native.serves(q_THK, k_TGK, v_TGK):
            documents = _documents(self.runs)
            if documents.end == len(q_THK):
                return native.attention(q_THK, k_TGK, v_TGK, documents, window)
        outputs = [self._run(q_THK, k_TGK, v_TGK, window, *run) for run in self.runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, start: int, documents: int, length: int
    ) -> Tensor:
        rows = slice(start, start + documents * length)

        def heads(x: Tensor) -> Tensor:  # (documents, heads, length, K)
            return x[rows].unflatten(0, (documents, length)).transpose(1, 2)

        mask = None if window is None or window >= length else causal_mask(length, length, window, q.device)
        out = F.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).reshape(documents * length, *q.shape[1:])


@lru_cache(maxsize=8)  # every layer of a step asks for the same
def _documents(runs: tuple[tuple[int, int, int], ...]) -> native.Documents:
    return native.Documents([(start + i * length, length) for start, n, length in runs for i in range(n)])


class _Attend(Protocol):
    """What the model calls; `model.attention.Attend` says it in full."""

    @property
    def max_len(self) -> int: ...

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor: ...


@dataclass(frozen=True)
class RoundedKV:
    """Another attention over keys and values as a quantized cache would hold them: the twin of one.

    In evaluation and in calibration's second pass; `CachedCausal` with the same `scales` gives the same outputs.
    """

    attend: _Attend
    scales: KVScales

    @property
    def max_len(self) -> int:
        return self.attend.max_len

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Attention output (T, H, K)."""
        return self.attend(layer, q_THK, *self.scales.round(layer, k_TGK, v_TGK), window)


@dataclass(frozen=True)
class CachedCausal:
    """Causal attention of new tokens over everything cached before them, for one sequence.

    `keys`, `values`: (layers, G, S, K), filled up to `start`; a call writes the new tokens' rows behind that.
    `max_len` is fixed for a sequence's whole life, so that 'dynamic' rope turns every cached key by the same table.
    `scales`: keys and values are codes; what is read is one layer's, so no more than that is ever dequantized at once.
    """

    keys: Tensor
    values: Tensor
    start: int
    max_len: int
    scales: KVScales | None = None

    def moved(self, start: int) -> CachedCausal:
        """The same cache with `start` positions filled."""
        return replace(self, start=start)

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Write the new keys and values of `layer`, then attend; returns (T, H, K)."""
        tokens, heads, width = q_THK.shape
        end = self.start + tokens
        first = 0 if window is None else max(0, self.start - window + 1)
        self._write(layer, k_TGK, v_TGK)
        if tokens == 1 and self.scales is not None:
            codes = self.keys[layer][:, first:end], self.values[layer][:, first:end]
            if (out := _one_query_of_codes(q_THK, *codes, self.scales, layer)) is not None:
                return out
        k_GSK, v_GSK = self._read(layer, slice(first, end), q_THK.dtype)
        if tokens == 1:
            return _one_query(q_THK, k_GSK, v_GSK)
        mask = causal_mask(tokens, end - first, window, q_THK.device) if first or self.start or window else None
        out = F.scaled_dot_product_attention(
            q_THK.transpose(0, 1)[None],
            k_GSK[None],
            v_GSK[None],
            mask,
            is_causal=mask is None,
            enable_gqa=heads != k_GSK.shape[0],
        )
        return out[0].transpose(0, 1).reshape(tokens, heads, width)

    def _write(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        rows = slice(self.start, self.start + k_TGK.shape[0])
        if self.scales is not None:
            k_TGK = quantize_kv(k_TGK, self.scales.scheme, self.scales.keys[layer])
            v_TGK = quantize_kv(v_TGK, self.scales.scheme, self.scales.values[layer])
        self.keys[layer][:, rows] = k_TGK.transpose(0, 1)
        self.values[layer][:, rows] = v_TGK.transpose(0, 1)

    def _read(self, layer: int, positions: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k_GSK, v_GSK = self.keys[layer][:, positions], self.values[layer][:, positions]
        if self.scales is None:
            return k_GSK, v_GSK
        # A scale stands for a head, and heads come first here: (G, S, K) with (G, 1, 1).
        k_scale, v_scale = self.scales.keys[layer][:, None, None], self.scales.values[layer][:, None, None]
        return decode(k_GSK, k_scale).to(dtype), decode(v_GSK, v_scale).to(dtype)


def _one_query(q_1HK: Tensor, k_GSK: Tensor, v_GSK: Tensor) -> Tensor:
    """Attention of a single new token, no mask. In torch the queries that share a kv head go in as rows of one product:
    nothing is repeated, and in bf16 its kernel is several times faster with more than one row."""
    if not torch.compiler.is_compiling() and token.serves_query(q_1HK, k_GSK, v_GSK):
        return token.query(q_1HK, k_GSK, v_GSK)
    q_GRK = q_1HK.view(k_GSK.shape[0], -1, k_GSK.shape[2])
    return F.scaled_dot_product_attention(q_GRK[None], k_GSK[None], v_GSK[None]).view(q_1HK.shape)


def _one_query_of_codes(q_1HK: Tensor, k_GSK: Tensor, v_GSK: Tensor, scales: KVScales, layer: int) -> Tensor | None:
    """As `_one_query`, over a cache that is read as it is, one byte a number; None where no kernel does that."""
    q_scaled = q_1HK.float() * _of_queries(scales.keys[layer], q_1HK)
    if torch.compiler.is_compiling() or not token.serves_query(q_scaled, k_GSK, v_GSK):
        return None
    return (token.query(q_scaled, k_GSK, v_GSK) * _of_queries(scales.values[layer], q_1HK)).to(q_1HK.dtype)


def _of_queries(scale: Tensor, q_1HK: Tensor) -> Tensor:
    """(1,) or (G,) -> (H, 1): each query head's own."""
    return scale.repeat_interleave(q_1HK.shape[1] // len(scale))[:, None]


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean (queries, keys): may the i-th of the last `queries` positions see the j-th key?

    A window of w lets a token see itself and the w - 1 before it, as Mistral and transformers count.
    """
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


def attention_twin(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, document_T: Tensor, window: int | None = None
) -> Tensor:
    """`PackedCausal` in plain torch: one (T, T) mask from document numbers. What every fast path must equal."""
    repeat = q_THK.shape[1] // k_TGK.shape[1]
    k_HTK = k_TGK.repeat_interleave(repeat, 1).transpose(0, 1)
    v_HTK = v_TGK.repeat_interleave(repeat, 1).transpose(0, 1)
    tokens = q_THK.shape[0]
    mask = causal_mask(tokens, tokens, window, q_THK.device) & (document_T[:, None] == document_T)
    scores = q_THK.transpose(0, 1) @ k_HTK.transpose(1, 2) * q_THK.shape[-1] ** -0.5
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v_HTK).transpose(0, 1)
