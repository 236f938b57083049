"""The one model definition: trained, generated from, and served as it stands here.

It works on flat tokens, on one device, and knows neither a cache nor a process group.
Shapes: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.attention import Attend, Attention, RMSNorm
from puna.model.linear import Linear, QuantizedLinear, apply_all
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.spec import Spec
from puna.ops import linear as ops
from puna.ops.basic import swiglu
from puna.ops.rope import cos_sin


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, spec.mlp_bias)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, spec.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = apply_all((self.gate_proj, self.up_proj), x_TD)
        return self.down_proj(swiglu(gate_TF, up_TF))


class Block(nn.Module):
    """Pre-norm attention and pre-norm MLP, each added to the residual stream."""

    def __init__(self, spec: Spec, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.attn = Attention(spec, layer)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), cos, sin, attend)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Transformer(nn.Module):
    """Tokens to hidden states; `logits` turns hidden states into scores over the vocabulary.

    Build it on any device: `with torch.device("meta"): Transformer(spec)` costs nothing. Weights are uninitialised
    until `init_weights` or a loader fills them. Rope frequencies are made on first use, on the device of the
    positions, so `to_empty` has no buffer to spoil.

    `look_up` (rows of the embedding) and `score` (logits from the head) are seams: tensor parallelism, which cuts both
    by words, sets its own on the instance.
    """

    look_up: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.embedding)
    score: Callable[[Tensor, Tensor], Tensor] = staticmethod(ops.linear)

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec
        self.embed = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size))
        self.layers = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_hidden_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = None if spec.tie_word_embeddings else Linear(spec.hidden_size, spec.vocab_size)
        self._rope_scale = attention_scale(spec.rope)
        self._frequencies: tuple[tuple[torch.device, int], Tensor] | None = None

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the last norm (T, D). Positions restart at 0 in every document."""
        x_TD = self.look_up(tokens_T, self.embed)
        inv_freq = self._inverse_frequencies(positions_T.device, attend.max_len)
        cos, sin = cos_sin(positions_T, inv_freq, self._rope_scale, x_TD.dtype)
        for block in self.layers:
            x_TD = block(x_TD, cos, sin, attend)
        return self.norm(x_TD)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores over the vocabulary (T, V)."""
        head: nn.Module | None = self.lm_head
        if isinstance(head, QuantizedLinear):
            return head.product(hidden_TD)
        return self.score(hidden_TD, self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """The output head (V, D): its own, or the embedding when tied. A quantized one becomes numbers every time."""
        head: nn.Module | None = self.lm_head
        if isinstance(head, QuantizedLinear):
            return head.dequantize(self.embed.dtype)
        return self.embed if self.lm_head is None else self.lm_head.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal with `initializer_range`, those into the residual stream divided by sqrt(2 L); norms 1, biases 0.

        Source of the residual scaling: Radford et al. 2019 (GPT-2), section 2.3.
        """
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator | None = None) -> None:
        """One parameter of `init_weights`; called in the order of `named_parameters` it gives the same numbers."""
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * self.spec.num_hidden_layers) ** -0.5 if residual else 1.0
            nn.init.normal_(parameter, std=self.spec.initializer_range * scale, generator=generator)

    def _inverse_frequencies(self, device: torch.device, max_len: int) -> Tensor:
        key = (device, max_len if self.spec.rope.rope_type == "dynamic" else 0)
        if self._frequencies is None or self._frequencies[0] != key:
            inv_freq = inverse_frequencies(self.spec.rope, self.spec.head_dim, max_len)
            self._frequencies = (key, inv_freq.to(device))
        return self._frequencies[1]
