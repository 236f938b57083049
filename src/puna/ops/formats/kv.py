"""The KV cache in eight bits: int8 or float8, symmetric, one scale per tensor or one per KV head, found by calibration.

Keys and values have scales of their own. A scale that was never calibrated is an error for whoever loads the model,
never 1.0: that costs 5.7 % perplexity and says nothing (`shared/formats.md`).

Shapes: T tokens, G KV heads, K head width; k_TGK stands for keys and values alike; scale (1,) or (G,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.rounding import decode, encode, symmetric_scale
from puna.ops.formats.scheme import Scheme

KV_INT8 = Scheme(granularity="tensor")
KV_INT8_HEAD = Scheme(granularity="head")
KV_FLOAT8 = Scheme(kind="float", granularity="tensor")
KV_FLOAT8_HEAD = Scheme(kind="float", granularity="head")


@dataclass(frozen=True)
class KVScales:
    """Calibrated scales of a model's cache, layer by layer: fp32, (1,) per tensor or (G,) per head.

    Errors: `PunaError` for scales that no calibration gives: none, of another shape, zero, negative, NaN, infinite.
    """

    scheme: Scheme
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if self.scheme not in (KV_INT8, KV_INT8_HEAD, KV_FLOAT8, KV_FLOAT8_HEAD):
            raise PunaError(f"no KV cache is kept as {self.scheme}", "use int8 or fp8, per tensor or per head")
        if len(self.keys) != len(self.values) or not self.keys:
            raise PunaError(
                f"{len(self.keys)} scales of keys and {len(self.values)} of values", "every layer needs one of both"
            )
        for kind, scales in (("keys", self.keys), ("values", self.values)):
            for layer, scale in enumerate(scales):
                self._check(scale, f"the KV cache's scale of layer {layer}'s {kind}")

    @property
    def heads(self) -> int | None:
        """KV heads that have scales of their own; None: one scale for all."""
        return len(self.keys[0]) if self.scheme.granularity == "head" else None

    def to(self, device: torch.device | str) -> KVScales:
        """The same, on a device."""
        keys, values = (tuple(scale.to(device) for scale in part) for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def round(self, layer: int, k_TGK: Tensor, v_TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as the cache gives them back, in their own dtype."""
        pairs = ((k_TGK, self.keys[layer]), (v_TGK, self.values[layer]))
        k, v = (dequantize_kv(quantize_kv(x, self.scheme, scale), scale, x.dtype) for x, scale in pairs)
        return k, v

    def _check(self, scale: Tensor, name: str) -> None:
        expected = self.heads or 1
        if scale.shape != (expected,) or scale.dtype is not torch.float32:
            raise PunaError(
                f"{name} is {scale.dtype} of shape {tuple(scale.shape)}, not float32 of shape ({expected},)",
                "quantize the model again with --kv",
            )
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise PunaError(f"{name} is {scale.tolist()}", "scales are above 0; quantize the model again with --kv")


def kv_absmax(k_TGK: Tensor, scheme: Scheme) -> Tensor:
    """(1,) per tensor or (G,) per head: what calibration takes the maximum of over its batches."""
    heads = k_TGK.shape[1]
    per_head = k_TGK.abs().amax((0, 2)) if k_TGK.numel() else k_TGK.new_zeros(heads)
    return per_head if scheme.granularity == "head" else per_head.amax().reshape(1)


def kv_scale(absmax: Tensor, scheme: Scheme) -> Tensor:
    """fp32 scale of a calibrated absmax. Errors: `PunaError` where calibration saw only zeros, or no number."""
    if not bool((absmax.isfinite() & (absmax > 0)).all()):
        raise PunaError(
            f"a KV cache cannot be scaled to an absolute maximum of {absmax.tolist()}",
            "calibrate on text that the model answers with finite numbers, at least one batch",
        )
    return symmetric_scale(absmax.float(), scheme)


def quantize_kv(k_TGK: Tensor, scheme: Scheme, scale: Tensor) -> Tensor:
    """Codes like k_TGK; what lies outside the calibrated range is clamped to it."""
    return encode(k_TGK, scheme, _per_head(scale))


def dequantize_kv(codes_TGK: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The keys or values the codes stand for."""
    return decode(codes_TGK, _per_head(scale)).to(dtype)


def _per_head(scale: Tensor) -> Tensor:
    return scale[:, None]  # (G, 1) or (1, 1) against (T, G, K)
