"""Calibration of a KV cache in eight bits: how large keys and values get, layer by layer, while text passes through.

Keys are looked at as the cache stores them, after rotary positions. Maxima merge, so any number of batches, and any
number of ranks with batches of their own, give the scales of all of them together.

Shapes: T tokens, G KV heads, K head width, L layers; absolute maxima (L, G) whatever the scheme: per tensor is their
maximum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.model.attention import Attend
from puna.ops.formats.kv import KV_INT8_HEAD, KVScales, kv_absmax, kv_scale
from puna.ops.formats.scheme import Scheme

Reduce = Callable[[Tensor], Tensor]  # a tensor of this rank -> its elementwise maximum over all ranks


class KVRange:
    """Absolute maxima of every layer's keys and values, collected by the `attend`s it hands out.

    seen = KVRange(layers, heads)
    model(tokens_T, positions_T, seen.watch(PackedCausal.of(lengths)))      as often as there is text
    scales = seen.scales(config.kv_scheme)
    """

    def __init__(self, layers: int, heads: int, device: torch.device | str = "cpu"):
        self.keys_LG = torch.zeros(layers, heads, device=device)
        self.values_LG = torch.zeros(layers, heads, device=device)

    def watch(self, attend: Attend) -> Watched:
        """`attend`, and what passes through it is recorded."""
        return Watched(attend, self)

    @torch.no_grad()
    def add(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Keys and values of some tokens of one layer. A NaN stays: it will be refused, not lost."""
        for held_LG, x_TGK in ((self.keys_LG, k_TGK), (self.values_LG, v_TGK)):
            seen_G = kv_absmax(x_TGK.detach(), KV_INT8_HEAD).to(held_LG)
            held_LG[layer] = torch.maximum(held_LG[layer], seen_G)

    def merge(self, largest: Reduce) -> None:
        """Over the ranks of a job, each of which saw other text: `largest` is an all-reduce of maxima."""
        self.keys_LG, self.values_LG = largest(self.keys_LG), largest(self.values_LG)

    def scales(self, scheme: Scheme) -> KVScales:
        """One scale per layer, or per layer and head. Errors: `PunaError` naming a layer that saw no usable numbers."""
        return KVScales(scheme, self._of(self.keys_LG, scheme, "keys"), self._of(self.values_LG, scheme, "values"))

    def _of(self, absmax_LG: Tensor, scheme: Scheme, kind: str) -> tuple[Tensor, ...]:
        per_head = scheme.granularity == "head"
        found = []
        for layer, absmax_G in enumerate(absmax_LG):
            try:
                found.append(kv_scale(absmax_G if per_head else absmax_G.amax().reshape(1), scheme))
            except PunaError as error:
                raise PunaError(f"layer {layer}, {kind}: {error.message}", error.hint) from error
        return tuple(found)


class Watched:
    """An `attend` that tells a `KVRange` what passes through it."""

    def __init__(self, attend: Attend, seen: KVRange):
        self.attend, self.seen = attend, seen

    @property
    def max_len(self) -> int:
        """As the wrapped one says."""
        return self.attend.max_len

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor:
        """Attention output (T, H, K), unchanged."""
        self.seen.add(layer, k_TGK, v_TGK)
        return self.attend(layer, q_THK, k_TGK, v_TGK, window)
