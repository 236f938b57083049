"""The KV cache in eight bits: int8 or float8, symmetric, one scale per tensor or one per KV head, found by calibration.

Keys and values have scales of their own. A scale that was never calibrated is an error for whoever loads the model,
never 1.0: that costs 5.7 % perplexity and says nothing (`shared/formats.md`).

Shapes: T tokens, G KV heads, K head width; k_TGK stands for keys and values alike; scale (1,) or (G,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.rounding import decode, encode, symmetric_scale
from puna.ops.formats.scheme import Scheme

KV_INT8 = Scheme(granularity="tensor")
KV_INT8_HEAD = Scheme(granularity="head")
KV_FLOAT8 = Scheme(kind="float", granularity="tensor")
KV_FLOAT8_HEAD = Scheme(kind="float", granularity="head")


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
