"""Rotary position embedding, applied: angles to tables, tables to turned queries and keys.

Shapes: T tokens, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cos_sin(positions_T: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tables for `rotate`: cos and signed sin, both (T, 1, K); angles are taken in fp32."""
    angles = positions_T.to(torch.float32)[:, None, None] * inv_freq
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Turn channel pairs (i, i + K/2) by their angle: Hugging Face's layout, halves and not neighbours.

    (a, b) -> (a cos - b sin, b cos + a sin); the sign of the first half is already in `sin_T1K`.
    """
    swapped = x_THK.roll(x_THK.shape[-1] // 2, -1)
    return torch.addcmul(x_THK * cos_T1K, swapped, sin_T1K)
