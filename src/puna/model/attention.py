"""Grouped-query attention with rotary positions; who looks at whom is handed in as `attend`.

Shapes: T tokens, D model width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from puna.model.linear import Linear, apply_all
from puna.model.spec import Spec
from puna.ops.basic import rms_norm
from puna.ops.rope import rotate


class Attend(Protocol):
    """The seam: given one layer's queries, keys and values, return the attention output (T, H, K).

    `max_len` is the longest sequence in sight (only 'dynamic' rope looks at it); `window` limits how far back a token
    sees. Training hands in packed causal attention, generation a view of the cache.
    """

    @property
    def max_len(self) -> int: ...

    def __call__(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, window: int | None) -> Tensor: ...


class RMSNorm(nn.Module):
    """`ops.basic.rms_norm` with its weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)


class Attention(nn.Module):
    """Project, turn, attend, project back. Bias, q/k norm and window are the Spec's."""

    def __init__(self, spec: Spec, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, spec.head_dim
        self.window = spec.sliding_windows[layer]
        q_width, kv_width = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, q_width, spec.qkv_bias)
        self.k_proj = Linear(spec.hidden_size, kv_width, spec.qkv_bias)
        self.v_proj = Linear(spec.hidden_size, kv_width, spec.qkv_bias)
        self.o_proj = Linear(q_width, spec.hidden_size, spec.output_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else None

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        projected = apply_all((self.q_proj, self.k_proj, self.v_proj), x_TD)
        # Counted on what came out: under tensor parallelism a rank holds some of the heads, and x some of the tokens.
        q_THK, k_TGK, v_TGK = (y.view(y.shape[0], -1, self.head_dim) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        out_THK = attend(self.layer, rotate(q_THK, cos, sin), rotate(k_TGK, cos, sin), v_TGK, self.window)
        return self.o_proj(out_THK.flatten(1))
