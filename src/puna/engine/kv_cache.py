"""Keys and values of one sequence, kept so that a token is computed once.

Contiguous and of one sequence: the shortest road from a prompt to an answer. With calibrated scales it holds codes, one
byte a number: half of bf16, a quarter of fp32.
"""

from __future__ import annotations

import torch

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.attention import CachedCausal
from puna.ops.formats.kv import KVScales
from puna.ops.formats.rounding import code_dtype

_GROWTH = 256  # tokens; a cache grows by doubling from here, so that a short answer never pays for a long context


class SequenceCache:
    """A growing cache and the token ids whose keys and values it holds.

    `kv_scales`: of a cache in eight bits; None keeps `dtype`. Errors: `PunaError` for scales of another model.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype, device: torch.device, kv_scales: KVScales | None = None):
        self.spec, self.token_ids = spec, list[int]()
        self.scales = None
        if kv_scales is not None:
            _check_scales(kv_scales, spec)
            self.scales, dtype = kv_scales.to(device), code_dtype(kv_scales.scheme)
        shape = (2, spec.num_hidden_layers, spec.num_key_value_heads, 0, spec.head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self._max_len = spec.max_len

    @property
    def bytes_per_token(self) -> int:
        """What each token leaves in the cache."""
        return self.spec.kv_bytes_per_token(self._data.element_size())

    def reuse(self, token_ids: list[int], max_len: int) -> int:
        """Keep the longest common beginning with `token_ids` (but not all of them); returns its length.

        'dynamic' rope turns keys by a table that depends on the sequence's length, so there nothing is kept.
        """
        same = 0
        if self.spec.rope.rope_type != "dynamic":
            for ours, theirs in zip(self.token_ids, token_ids[:-1], strict=False):
                if ours != theirs:
                    break
                same += 1
        self.token_ids = self.token_ids[:same]
        self._max_len = max_len
        return same

    def room_for(self, tokens: int) -> CachedCausal:
        """Make room for new tokens and return the `attend` that writes and reads them; `commit` them afterwards."""
        start = len(self.token_ids)
        self._reserve(start + tokens)
        return CachedCausal(self._data[0], self._data[1], start, self._max_len, self.scales)

    def commit(self, token_ids: list[int]) -> None:
        """The keys and values of these ids are written now (an interrupt before this leaves the cache as it was)."""
        self.token_ids.extend(token_ids)

    def fork(self) -> SequenceCache:
        """A copy to continue differently (for n > 1)."""
        other = object.__new__(SequenceCache)
        other.__dict__.update(self.__dict__)
        other.token_ids, other._data = list(self.token_ids), self._data.clone()
        return other

    def _reserve(self, tokens: int) -> None:
        have = self._data.shape[3]
        if tokens <= have:
            return
        grown = list(self._data.shape)
        grown[3] = max(tokens, 2 * have, _GROWTH)
        data = self._data.new_empty(grown)
        data[:, :, :, :have] = self._data
        self._data = data


def _check_scales(scales: KVScales, spec: Spec) -> None:
    layers, heads = len(scales.keys), scales.heads
    if layers != spec.num_hidden_layers or heads not in (None, spec.num_key_value_heads):
        raise PunaError(
            f"the KV cache has scales for {layers} layers{f' of {heads} heads' if heads else ''}, "
            f"the model has {spec.num_hidden_layers} of {spec.num_key_value_heads}",
            "the folder mixes files of two models; quantize it again with --kv",
        )
