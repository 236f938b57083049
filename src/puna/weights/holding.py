"""Which format on disk can hold which quantized layer: asked before the long work, answered with what else to use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.formats.gptq import BITS
from puna.ops.formats.scheme import Scheme
from puna.weights.names import HUGGINGFACE, names_on_disk
from puna.weights.quantization import AWQ, COMPRESSED, FORMATS, OWN, PACK, LayerFormat
from puna.weights.quantized import linear_layers, stored_shapes

SUPPORTED = (
    "compressed-tensors: int 2-8 bits per channel, group or tensor, fp8, int8/fp8 inputs, 8-bit KV cache; "
    "gptq, gptq_v2: int 2, 3, 4, 8 bits per channel or group, act-order; awq: int4 per channel or group, one for all "
    "layers; puna: everything, for puna alone"
)
_FUSED = (("attn.q_proj", "attn.k_proj", "attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def linear_shapes(spec: Spec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer by our names."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(spec).named_parameters()}
    return {layer: (shapes[f"{layer}.weight"][0], shapes[f"{layer}.weight"][1]) for layer in linear_layers(shapes)}


def check_format(
    format: str, layers: Mapping[str, LayerFormat | None], spec: Spec, kv: Scheme | None = None
) -> list[str]:
    """Refuse layers (our names) that `format` cannot hold; otherwise what other tools will make of it, as sentences.

    Errors: `PunaError` with the reason per layer and the pairs that go together.
    """
    if format not in FORMATS:
        raise PunaError(f"no format is called {format!r}", f"formats: {', '.join(FORMATS)}")
    shapes = linear_shapes(spec)
    unknown = sorted(set(layers) - set(shapes))
    if unknown:
        tied = " (it is tied to the embedding)" if unknown == ["lm_head"] else ""
        raise PunaError(f"the model has no linear layer {', '.join(unknown[:5])}{tied}", "leave it as it is")
    reasons: dict[str, list[str]] = {}
    for layer, form in layers.items():
        reason = None if form is None else why_not(format, form, shapes[layer])
        if reason:
            reasons.setdefault(reason, []).append(layer)
    if kv is not None and format not in (COMPRESSED, OWN):
        reasons.setdefault("it has no place for scales of a quantized KV cache", []).append("the cache")
    if format == AWQ and len({replace(form.scheme, symmetric=True) for form in layers.values() if form}) > 1:
        reasons.setdefault("one number format must do for all layers", []).append("mixed precision")
    if reasons:
        lines = [
            f"{why}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}" for why, names in reasons.items()
        ]
        raise PunaError(f"{format} cannot hold this model\n  " + "\n  ".join(lines), f"supported: {SUPPORTED}")
    return _notes(format, layers)


def why_not(format: str, form: LayerFormat, shape: tuple[int, int]) -> str | None:
    """The reason why `format` cannot hold a layer (N, D) of this form; None if it can."""
    scheme, (rows, columns) = form.scheme, shape
    name = f"{scheme.kind} of {scheme.bits} bits per {scheme.granularity}"
    if format == OWN:
        return None
    if form.low_rank or form.threshold:
        return "it has no place for low-rank errors or outlier thresholds"
    if format == COMPRESSED:
        return "it has no place for act-order groups" if form.act_order else None
    if form.activations is not None:
        return "its inputs are never rounded"
    if scheme.kind != "int" or scheme.granularity not in ("channel", "group"):
        return f"it does not know {name}"
    if format == AWQ:
        return _why_not_awq(form, rows, name)
    if scheme.bits not in BITS:
        return f"it does not know {name}"
    if rows * scheme.bits % 32 or columns * scheme.bits % 32:
        return f"its {scheme.bits}-bit codes must fill whole words of 32 bits, which {rows} x {columns} does not"
    return None


def _why_not_awq(form: LayerFormat, rows: int, name: str) -> str | None:
    if form.scheme.bits != 4:
        return f"it does not know {name}"
    if form.act_order:
        return "it has no place for act-order groups"
    return f"outputs come by eights, which {rows} do not" if rows % 8 else None


def _notes(format: str, layers: Mapping[str, LayerFormat | None]) -> list[str]:
    notes = []
    forms = {form for form in layers.values() if form is not None}
    if format == OWN:
        notes.append("only puna reads this folder: other formats cannot hold what it has")
    if format == COMPRESSED and any(not form.scheme.symmetric for form in forms):
        notes.append("vLLM reads these zero points, the transformers library does not")
    if format == COMPRESSED and any(form.layout == PACK and form.scheme.bits not in (4, 8) for form in forms):
        notes.append("vLLM reads packed integers of 4 and 8 bits only")
    if format != OWN and _cut_through(layers):
        notes.append("vLLM fuses q, k, v and gate, up and wants one number format in each; here they differ")
    return notes


def _cut_through(layers: Mapping[str, LayerFormat | None]) -> bool:
    """Whether layers that other tools multiply together are stored differently."""
    blocks = {layer.rsplit(".", 2)[0] for layer in layers if layer.startswith("layers.")}
    groups = ([layers.get(f"{block}.{name}") for name in names] for block in blocks for names in _FUSED)
    return any(len(set(group)) > 1 for group in groups)


def stored_bytes(layers: Mapping[str, LayerFormat | None], spec: Spec, width: int, scale_width: int = 2) -> int:
    """Bytes of the weights of a folder about to be written: `width` per plain number, `scale_width` per scale."""
    shapes = linear_shapes(spec)
    plain = spec.num_params() - sum(rows * columns for rows, columns in shapes.values())
    total = plain * width
    for layer, (rows, columns) in shapes.items():
        form = layers.get(layer)
        total += rows * columns * width if form is None else _layer_bytes(form, (rows, columns), scale_width)
    return total


def _layer_bytes(form: LayerFormat, shape: tuple[int, int], scale_width: int) -> int:
    small = ("weight",) if form.layout == PACK else ("weight", "weight_zero_point")
    total = 0
    for end, size in stored_shapes(form, shape).items():
        scales = end.endswith(("scale", "scales")) or end.startswith("low_rank")
        width = scale_width if scales else 1 if end in small else 8 if end == "weight_shape" else 4
        total += prod(size) * width
    return total


def disk_names(layers: Mapping[str, LayerFormat | None]) -> dict[str, LayerFormat | None]:
    """The same by Hugging Face's names."""
    names = names_on_disk([f"{layer}.weight" for layer in layers], HUGGINGFACE)
    return {names[f"{layer}.weight"].removesuffix(".weight"): form for layer, form in layers.items()}
