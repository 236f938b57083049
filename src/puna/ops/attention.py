"""Who looks at whom in training: packed causal attention. (`paged`: in the engine.)

Shapes: T tokens, H query heads, G key/value heads (H is a multiple of G), K head width.
Both are frozen dataclasses with one method, handed into the model as `attend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.ops.formats.kv import KVScales
from puna.ops.native import attention as native


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

    In evaluation and in calibration's second pass; `PagedCausal` over pages with the same scales gives the same.
    """

    attend: _Attend
    scales: KVScales

    @property
    def max_len(self) -> int:
        return self.attend.max_len

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Attention output (T, H, K)."""
        return self.attend(layer, q_THK, *self.scales.round(layer, k_TGK, v_TGK), window)


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
