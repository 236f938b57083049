"""Frequencies of a rotary embedding: one per pair of head channels, scaled for long contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puna.model.spec import Rope


def inverse_frequencies(rope: Rope, head_dim: int, max_len: int = 0) -> Tensor:
    """Radians per position of each channel pair, fp32 (head_dim / 2,).

    `max_len` is the longest sequence in sight; only 'dynamic' looks at it, so the others serve any length.
    Sources: Su et al. 2021, arXiv:2104.09864; linear: Chen et al. 2023, arXiv:2306.15595; yarn: Peng et al. 2023,
    arXiv:2309.00071; llama3: Meta's llama-models, `apply_scaling`; dynamic: as in transformers.
    """
    theta = rope.rope_theta
    if rope.rope_type == "dynamic":
        ratio = max(max_len, rope.max_position_embeddings) / rope.max_position_embeddings
        theta *= (rope.factor * ratio - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, plain)
    if rope.rope_type == "llama3":
        return _llama3(rope, plain)
    return plain


def attention_scale(rope: Rope) -> float:
    """Factor on cos and sin (yarn's temperature, arXiv:2309.00071 section 3.4); 1.0 for every other type."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    factor = _yarn_factor(rope)
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(factor, rope.mscale) / _mscale(factor, rope.mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_factor(rope: Rope) -> float:
    return rope.factor or rope.max_position_embeddings / rope.original_max_position_embeddings


def _yarn(rope: Rope, head_dim: int, plain: Tensor) -> Tensor:
    """Fast channels keep their frequency, slow ones are interpolated, a linear ramp lies between them."""

    def channel(rotations: float) -> float:
        # The channel that turns `rotations` times over the original context.
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001  # both ends on one channel: a step, without dividing by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / _yarn_factor(rope) * ramp + plain * (1 - ramp)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Wavelengths beyond the original context are stretched by `factor`, short ones kept, a smooth step between."""
    original = rope.original_max_position_embeddings
    turns = original * plain / (2 * math.pi)  # full turns within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return plain * smooth + plain / rope.factor * (1 - smooth)
