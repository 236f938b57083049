"""Quantization-aware training: linear layers compute with the numbers that will be served, weights stay fp32.

    forward   y = round(x) round(W)^T + b        backward   as if nothing had been rounded (straight-through)

Scales are chosen from W itself in every forward pass, exactly as `puna quantize` chooses them, so rounding the saved
weights to nearest gives the model that was trained. They cover all of W: no number lies outside the range of codes,
where the straight-through gradient would have to be 0. The same holds for inputs, which have a scale per token.

What calibration decides (GPTQ, AWQ, clipping, low rank, outliers) has no place here: training does its work.
Sources: Bengio et al. 2013, arXiv:1308.3432 (straight-through); Jacob et al. 2018, arXiv:1712.05877, section 3.
Shapes: T tokens, N outputs, D inputs.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from puna.base.console import PunaError
from puna.model.linear import Linear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops import linear as ops
from puna.ops.formats import rounding
from puna.ops.formats.scheme import Scheme
from puna.parallel.layers import ColumnLinear, RowLinear
from puna.parallel.plan import cut_dim
from puna.quant.config import PRESETS, QuantConfig
from puna.quant.steps import Stored
from puna.train.recipe import QuantSection, Recipe

_PLAIN: dict[str, Any] = {"rounding": "nearest", "rescale": "none", "clip": False, "low_rank": 0,
                          "outlier_threshold": 0.0, "target_bits": 0.0, "kv": "none"}  # fmt: skip


def round_trip(x: Tensor, scheme: Scheme) -> Tensor:
    """x (..., D) as its codes give it back, in x's dtype, with the straight-through gradient."""
    parts = asdict(scheme).values()
    rounded: Tensor = _round_trip(x.reshape(-1, x.shape[-1]).contiguous(), *parts)
    return rounded.view(x.shape)


# An operation of its own: torch.compile calls it as it is, instead of unrolling its loop over pieces of the weight.
@torch.library.custom_op(
    "puna::round_trip",
    mutates_args=(),
    schema="(Tensor x, int bits, str kind, bool symmetric, str granularity, int group_size) -> Tensor",
)
def _round_trip(x_ND: Tensor, *parts: Any) -> Tensor:
    scheme = Scheme(*parts)
    scales, zeros = rounding.choose_scales(x_ND, scheme, dtype=Stored().scale(scheme))
    codes_ND = rounding.quantize(x_ND, scheme, scales, zeros)
    return rounding.dequantize(codes_ND, scales, zeros).to(x_ND.dtype)


@_round_trip.register_fake
def _(x_ND: Tensor, *_parts: Any) -> Tensor:
    return torch.empty_like(x_ND)


def _straight_through(_ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None, None


_round_trip.register_autograd(_straight_through)


class FakeQuantLinear(Linear):
    """`Linear` with rounded weight and inputs while it is `on`. Made of one by `fake_quantize_linears`."""

    scheme: Scheme
    activations: Scheme | None
    on: bool

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._product(self._round_inputs(x_TD))

    def forward_all(self, layers: tuple[Linear, ...], x_TD: Tensor) -> list[Tensor]:
        rounded = self._round_inputs(x_TD)  # once for all
        return [layer._product(rounded) if type(layer) is FakeQuantLinear else layer(x_TD) for layer in layers]

    def _product(self, rounded_TD: Tensor) -> Tensor:
        weight = round_trip(self.weight, self.scheme) if self.on else self.weight
        return ops.linear(rounded_TD, weight, self.bias)

    def _round_inputs(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.activations is None or not self.on else round_trip(x_TD, self.activations)


class _RoundedPart:
    """In a tensor-parallel layer: a rank rounds its part of the weight, which holds whole tiles."""

    scheme: Scheme
    on: bool

    def _part(self, weight: Tensor) -> Tensor:
        part: Tensor = super()._part(weight)  # type: ignore[misc]
        return round_trip(part, self.scheme) if self.on and part.dim() == 2 else part


class FakeQuantColumn(_RoundedPart, ColumnLinear):
    """This rank's output features, rounded."""


class FakeQuantRow(_RoundedPart, RowLinear):
    """This rank's input features, rounded."""


_KINDS: dict[type[Linear], Any] = {Linear: FakeQuantLinear, ColumnLinear: FakeQuantColumn, RowLinear: FakeQuantRow}


def fake_quantize_linears(model: nn.Module, config: QuantConfig) -> None:
    """Make every linear layer that `config` quantizes compute with rounded numbers, in place; parameters stay.

    A pass like those in `parallel.apply`: after tensor parallelism, before checkpointing, compilation and FSDP2.
    """
    for name, layer in list(model.named_modules()):
        scheme = config.scheme_of(name) if type(layer) in _KINDS else None
        if scheme is not None:
            layer.__class__ = _KINDS[type(layer)]
            vars(layer).update(scheme=scheme, activations=config.activation_scheme, on=True)


def switch(model: nn.Module, on: bool) -> None:
    """Round from now on, or compute as a plain `Linear` does."""
    for layer in model.modules():
        if isinstance(layer, tuple(_KINDS.values())):
            vars(layer)["on"] = on


def training_config(section: QuantSection) -> QuantConfig | None:
    """What a recipe's [quant] trains for: a preset without what calibration would do; None where it is off.

    Errors: `PunaError` for an unknown preset or format, and for inputs whose scale only calibration can give.
    """
    named = {"weights": section.weights, "activations": section.activations, "overrides": section.overrides}
    changes: dict[str, Any] = {key: value for key, value in named.items() if value}
    if not section.preset and not changes:
        return None
    config = QuantConfig.preset(section.preset, **_PLAIN) if section.preset else QuantConfig(**_PLAIN)
    config = replace(config, **changes)
    if config.activations.endswith("static"):
        raise PunaError(
            f"activations {config.activations!r} need a scale from calibration, which training has not got",
            f"use --quant.activations {config.activations.removesuffix('_static')} (a scale per token)",
        )
    return config


def describe(recipe: Recipe, config: QuantConfig) -> str:
    """A line for the start card: what is rounded, from when on, and what of the preset is not looked at."""
    preset = PRESETS.get(recipe.quant.preset, {})
    left_out = [f"{key} {value}" for key, value in preset.items() if key in _PLAIN and value != _PLAIN[key]]
    inputs = "" if config.activations == "none" else f", inputs {config.activations}"
    begin = f" from step {recipe.quant.start_step}" if recipe.quant.start_step else ""
    ignored = f"; not used in training: {', '.join(left_out)}" if left_out else ""
    return f"weights {config.weights}{inputs}, rounded to nearest in every forward pass{begin}{ignored}"


def check_layers(config: QuantConfig, spec: Spec, tp: int, pp: int = 1, dtype: str = "float32") -> None:
    """Refuse formats whose tiles do not fit a layer, or its parts on `tp` ranks, with the layer's name and numbers."""
    if dtype != "float32" and tp * pp > 1:
        raise PunaError(
            f"[quant] in {dtype} on tp {tp}, pp {pp}: ranks gather weights in {dtype}, and codes chosen from these are "
            "not those of the saved weights",
            "use --train.dtype float32, or cut along dp_shard only",
        )
    if tp > 1 and config.activations != "none":
        raise PunaError(
            f"inputs are rounded per token to {config.activations}, and tp {tp} cuts a token's inputs over ranks",
            "use --parallel.tp 1, or --quant.activations none",
        )
    with torch.device("meta"):
        layers = {name: layer for name, layer in Transformer(spec).named_modules() if isinstance(layer, Linear)}
    schemes = {name: config.scheme_of(name) for name in layers}
    if schemes.pop("lm_head", None) is not None:
        raise PunaError("the output head is not trained with rounding", 'add "lm_head=none" to --quant.overrides')
    if not any(schemes.values()):
        raise PunaError(
            "[quant] rounds no layer of this model", "see weights and overrides; leave [quant] out for none"
        )
    for name, scheme in schemes.items():
        if scheme is not None:
            _check_tiles(name, layers[name].weight.shape, scheme, spec, tp)


def _check_tiles(name: str, shape: torch.Size, scheme: Scheme, spec: Spec, tp: int) -> None:
    try:
        height, width = scheme.tile((shape[0], shape[1]))
    except PunaError as error:
        raise PunaError(f"{name}: {error.message}", error.hint) from error
    if tp == 1:
        return
    dim = cut_dim(f"{name}.weight", spec, tp)
    part = -(-shape[dim] // tp) if dim is not None else spec.head_dim  # a kv head of a weight that every rank holds
    if part % (width if dim == 1 else height):
        raise PunaError(
            f"{name} is cut into parts of {part} {'columns' if dim == 1 else 'rows'} by tp {tp}, "
            f"and {width if dim == 1 else height} share a scale",
            f"use --parallel.tp 1, or groups that divide {part}" if dim == 1 else "use --parallel.tp 1",
        )
