"""What is done to one block's linear layers, in order: rescale, round, compensate; and how far their outputs moved.

Names are those within a block (`attn.q_proj`); tensors are fp32, named `attn.q_proj.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.formats.activations import activation_absmax
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.rounding import check_finite, choose_scales, quantize, symmetric_scale
from puna.ops.formats.scheme import Scheme
from puna.quant.blocks import INPUTS, RoundedLinear
from puna.quant.clip import search_clip
from puna.quant.config import QuantConfig, format_text
from puna.quant.error import error_of
from puna.quant.gptq import gptq
from puna.quant.hqq import hqq
from puna.quant.low_rank import low_rank_error
from puna.quant.moments import Moments
from puna.quant.report import Layer
from puna.quant.rescale import FOLDS, apply_scale, awq, shared_heads, smooth

Formats = Mapping[str, Scheme | None]


@dataclass
class Done:
    """A block after quantization: its tensors (rescaled), its quantized layers, what is worth telling of each."""

    tensors: dict[str, Tensor]
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)  # what inputs were divided by, under `first_of`'s name
    notes: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """What is written with how many bits: codes are chosen for the scales as a file will hold them.

    groups: scales of groups. rows: scales of which there is one per row or fewer, where fp32 costs nothing; but GPTQ
    and AWQ files hold fp16 alone. norms: their scales are chosen so that the stored norm is exact.
    """

    groups: torch.dtype = torch.float16
    rows: torch.dtype = torch.float32
    norms: torch.dtype = torch.float32

    def scale(self, scheme: Scheme) -> torch.dtype:
        """Of the scales of a weight in this scheme."""
        return self.groups if scheme.granularity == "group" else self.rows


def first_of(name: str) -> str:
    """The layer under whose name the inputs of `name` are known."""
    return next((first for first, names in INPUTS.items() if name in names), name)


def plain_rounding(
    prefix: str,
    tensors: Mapping[str, Tensor],
    formats: Formats,
    config: QuantConfig,
    moments: Mapping[str, Moments],
    stored: Stored,
) -> dict[str, QuantizedWeight]:
    """Every layer rounded to nearest: what a method is compared with.

    Errors: `PunaError` for weights with NaN and for those that are all zero, with the name.
    """
    found = {}
    for name, scheme in formats.items():
        if scheme is not None:
            weight = tensors[f"{name}.weight"]
            check_finite(weight, f"{prefix}{name}.weight")
            if not bool(weight.any()):
                raise PunaError(
                    f"all {weight.numel():,} numbers of {prefix}{name}.weight are 0",
                    f'the checkpoint is damaged; if it is meant, leave the layer: --override "{prefix}{name}=none"',
                )
            packed = round_to_nearest(weight, scheme, stored.scale(scheme))
            found[name] = _with_inputs(QuantizedWeight(packed), config, moments.get(first_of(name)))
    return found


def _with_inputs(weight: QuantizedWeight, config: QuantConfig, moments: Moments | None) -> QuantizedWeight:
    """Add how inputs are rounded; a static scale is that of the largest input calibration has seen."""
    scheme = config.activation_scheme
    if scheme is None:
        return weight
    if scheme.granularity != "tensor":
        return replace(weight, activations=scheme)
    assert moments is not None
    scale = symmetric_scale(activation_absmax(moments.absmax_D, scheme), scheme)
    return replace(weight, activations=scheme, input_scale=scale)


def quantize_linears(
    prefix: str,
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    formats: Formats,
    config: QuantConfig,
    plain: Mapping[str, QuantizedWeight],
    spec: Spec,
    stored: Stored,
) -> Done:
    """Everything the config asks for. `moments` are then those of the rescaled block. `plain`: `plain_rounding`'s."""
    done = Done(dict(tensors))
    if config.is_plain:
        done.quantized = dict(plain)
        return done
    if config.rescale != "none":
        _rescale(done, moments, formats, config, spec, stored.norms)
    for name, scheme in formats.items():
        if scheme is not None:
            try:
                done.quantized[name] = _round(done, name, scheme, moments.get(first_of(name)), config, stored)
            except PunaError as error:
                raise PunaError(f"{prefix}{name}: {error}", error.hint) from error
    return done


def _rescale(
    done: Done,
    moments: Mapping[str, Moments],
    formats: Formats,
    config: QuantConfig,
    spec: Spec,
    norm_dtype: torch.dtype,
) -> None:
    """Fold by fold, in the order in which a token meets them; what feeds a fold is not yet rounded."""
    heads = shared_heads(
        spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, next(iter(done.tensors.values())).device
    )
    for fold in FOLDS:
        schemes = [formats[name] for name in fold.consumers]
        if all(scheme is None for scheme in schemes):
            continue
        first, shared_D = fold.consumers[0], heads if fold.producer == "attn.v_proj" else None
        weights = [done.tensors[f"{name}.weight"] for name in fold.consumers]
        search = awq if config.rescale == "awq" else smooth
        shares = {"shares": (config.alpha,)} if config.alpha else {}
        found = search(weights, moments[first], schemes, config.activation_scheme, shared_D=shared_D, **shares)
        scale_D = found.scale_D
        if found.share is None:
            continue
        if fold.producer.endswith("norm"):
            norm = done.tensors[f"{fold.producer}.weight"]
            scale_D = _exact_for(norm, scale_D, norm_dtype)
        apply_scale(done.tensors, fold, scale_D, shared_D)
        moments[first].divide(scale_D)
        done.scales[first] = scale_D
        for name in fold.consumers:
            done.notes.setdefault(name, []).append(f"{config.rescale} {found.share:.2f}")


def _exact_for(norm_D: Tensor, scale_D: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale next to scale_D for which norm / scale is a number that `dtype` can store; scale where norm is 0."""
    stored_D = (norm_D / scale_D).to(dtype).float()
    return torch.where(stored_D == 0, scale_D, norm_D / stored_D)


def _round(
    done: Done, name: str, scheme: Scheme, moments: Moments | None, config: QuantConfig, stored: Stored
) -> QuantizedWeight:
    weight_ND = done.tensors[f"{name}.weight"]
    notes = done.notes.setdefault(name, [])
    scales = stored.scale(scheme)
    clip: Tensor | float = 1.0
    if config.clip and scheme.granularity in ("channel", "group") and moments is not None:
        clip = search_clip(weight_ND, scheme, moments.sample_TD)
    if config.rounding == "gptq" and scheme.kind == "int":
        assert moments is not None
        assert moments.second_DD is not None
        found = gptq(
            weight_ND, moments.second_DD, scheme,
            act_order=config.act_order, damping=config.damping, clip=clip, scale_dtype=scales,
        )  # fmt: skip
        packed = found.packed
        if found.damping > config.damping:
            notes.append(f"damping raised to {found.damping:g}")
        if found.dead_columns:
            notes.append(f"{found.dead_columns} inputs are always 0")
        if found.rounded_rows:
            notes.append(f"{found.rounded_rows} rows kept plain rounding")
    elif config.rounding == "hqq" and scheme.kind == "int":
        packed = hqq(weight_ND, scheme, scale_dtype=scales)
    else:
        values, zeros = choose_scales(weight_ND, scheme, clip, scales)
        packed = pack(quantize(weight_ND, scheme, values, zeros), scheme, values, zeros)
    weight = _with_inputs(QuantizedWeight(packed, threshold=0.0), config, moments)
    if config.outlier_threshold:
        weight = replace(weight, threshold=config.outlier_threshold)
    if config.low_rank:
        second_DD = None if moments is None else moments.second_DD
        up_NR, down_RD = low_rank_error(weight_ND, packed, config.low_rank, second_DD=second_DD, dtype=stored.groups)
        weight = replace(weight, up_NR=up_NR, down_RD=down_RD)
    return weight


def measure(
    prefix: str,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, QuantizedWeight],
    done: Done | None,
    moments: Mapping[str, Moments],
) -> list[Layer]:
    """A row per quantized layer: how far outputs for the sampled inputs are from the original's."""
    rows = []
    for name, rounded in plain.items():
        weight_ND = tensors[f"{name}.weight"]
        inputs = moments.get(first_of(name))
        final = rounded if done is None else done.quantized[name]
        scale_D = None if done is None else done.scales.get(first_of(name))
        now_TD = None if inputs is None else inputs.sample_TD
        before_TD = now_TD if now_TD is None or scale_D is None else now_TD * scale_D
        error_rounded = output_error(weight_ND, rounded, before_TD, before_TD)
        error = error_rounded if final is rounded else output_error(weight_ND, final, before_TD, now_TD)
        note = "; ".join([] if done is None else done.notes.get(name, []))
        scheme = final.packed.scheme
        rows.append(
            Layer(
                prefix + name, format_text(scheme), weight_ND.numel(), final.bits_per_weight, error_rounded, error, note
            )
        )
    return rows


def output_error(weight_ND: Tensor, final: QuantizedWeight, x_TD: Tensor | None, now_TD: Tensor | None) -> float:
    """|y' - y| / |y| over sampled inputs: y of the weight for x_TD, y' of what replaced it, for the inputs it now gets.

    Without inputs the same of the weights alone.
    """
    if x_TD is None or now_TD is None:
        return error_of(weight_ND, final)
    y_TN = F.linear(x_TD, weight_ND)
    wrong_TN = RoundedLinear(final, None)(now_TD) - y_TN
    whole = float(y_TN.square().sum())
    return math.sqrt(float(wrong_TN.square().sum()) / whole) if whole else 0.0
