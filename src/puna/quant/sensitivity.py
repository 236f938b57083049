"""How much each layer's rounding costs the whole model, measured: what `--target-bits` decides by.

One layer at a time is rounded to the fewest bits on offer, and the model's next-token distributions are compared with
the original's. The cost of more bits follows from the layer's own rounding error: for small errors the divergence
grows with their square. Needs the whole model in memory, and a forward pass over half its blocks per layer.

Shapes: S sequences of T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.model.linear import Linear
from puna.model.rope import attention_scale, inverse_frequencies
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.formats.packed import round_to_nearest
from puna.ops.rope import cos_sin
from puna.quant.blocks import LINEARS
from puna.quant.config import QuantConfig, parse_format

BITS = (3, 4, 5, 6, 8)
PROBE_TOKENS = 2048


def candidates(config: QuantConfig) -> list[str]:
    """The formats to choose among: the config's own with other numbers of bits."""
    scheme = config.scheme_of("layers.0.mlp.down_proj")
    if scheme is None or scheme.kind != "int":
        raise PunaError(f"target_bits cannot choose among bits of {config.weights!r}", "use weights int4_g128")
    rest = config.weights[config.weights.index("int") + 4 :]
    return [f"int{bits}{rest}" for bits in BITS]


class Probe:
    """A model and held-out tokens, ready to say what a changed layer costs."""

    def __init__(self, model: Transformer, tokens_ST: Tensor):
        self.model = model
        sequences, length = tokens_ST.shape
        device = model.embed.device
        inv_freq = inverse_frequencies(model.spec.rope, model.spec.head_dim, length).to(device)
        positions_T = torch.arange(length, device=device).repeat(sequences)
        self._tables = cos_sin(positions_T, inv_freq, attention_scale(model.spec.rope), torch.float32)
        self._attend = PackedCausal.of([length] * sequences)
        with torch.inference_mode():
            states = [model.embed[tokens_ST.flatten().to(device)]]
            for block in model.layers:
                states.append(block(states[-1], *self._tables, self._attend))
        self._states = states
        self._truth_TV = self._log_probs(states[-1])

    @torch.inference_mode()
    def divergence(self, layer: int) -> float:
        """Mean KL(original || now) per token, with whatever was changed in this layer or later."""
        hidden_TD = self._states[layer]
        for block in list(self.model.layers)[layer:]:
            hidden_TD = block(hidden_TD, *self._tables, self._attend)
        now_TV = self._log_probs(hidden_TD)
        return float((self._truth_TV.exp() * (self._truth_TV - now_TV)).sum(-1).mean())

    def _log_probs(self, hidden_TD: Tensor) -> Tensor:
        return self.model.logits(self.model.norm(hidden_TD)).float().log_softmax(-1)


def measure_damage(
    model: Transformer,
    tokens_ST: Tensor,
    formats: Sequence[str],
    advance: Callable[[int, str], None] = lambda more, note: None,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """(damage, bits per weight) of every linear layer in every format; damage is mean KL per token.

    `formats` begins with the coarsest, which is the one that is really tried. The model comes back as it was.
    """
    probe = Probe(model, tokens_ST)
    damage: dict[str, dict[str, float]] = {}
    bits: dict[str, dict[str, float]] = {}
    for index, block in enumerate(model.layers):
        for name in LINEARS:
            linear = block.get_submodule(name)
            assert isinstance(linear, Linear)
            layer = f"layers.{index}.{name}"
            damage[layer], bits[layer] = _try_formats(probe, index, linear, formats)
            advance(linear.weight.nbytes, f"sensitivity of {layer}")
    return damage, bits


@torch.no_grad()
def _try_formats(
    probe: Probe, index: int, linear: Linear, formats: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    original = linear.weight.detach().clone()
    errors, bits = {}, {}
    measured = 0.0
    for number, text in enumerate(formats):
        scheme = parse_format(text)
        assert scheme is not None
        packed = round_to_nearest(original.float(), scheme, torch.float16)
        rounded = packed.dequantize(original.dtype)
        errors[text], bits[text] = float((rounded - original).square().sum()), packed.bits_per_weight
        if number == 0:
            linear.weight.copy_(rounded)
            measured = max(0.0, probe.divergence(index))
            linear.weight.copy_(original)
    coarsest = max(errors[formats[0]], 1e-30)
    return {text: measured * error / coarsest for text, error in errors.items()}, bits
