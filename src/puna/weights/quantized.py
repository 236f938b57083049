"""Quantized linear layers in a folder: which tensors each has, and these tensors to and from a `QuantizedWeight`.

Shapes: N outputs, D inputs, G groups, R the rank of a kept error. Layouts: `ops/formats/compressed`, `gptq`, `awq`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.ops.formats.awq import from_awq, to_awq
from puna.ops.formats.compressed import from_compressed, to_compressed
from puna.ops.formats.gptq import from_gptq, to_gptq
from puna.ops.formats.kv import KVScales
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import Packed
from puna.ops.formats.rounding import check_finite
from puna.ops.formats.words import words_per_row
from puna.weights.names import names_on_disk
from puna.weights.quantization import AWQ, GPTQ, GPTQ_V2, INT, PACK, LayerFormat, Quantization, layer_format
from puna.weights.source import Source

Shape = tuple[int, ...]
_SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTS = (torch.int32, torch.int64, torch.int16)
_DTYPES = {"weight_packed": (torch.int32,), "weight_shape": _INTS, "weight_g_idx": _INTS, "g_idx": _INTS,
           "weight_zero_point": (torch.int8, torch.int32), "qweight": (torch.int32,),
           "qzeros": (torch.int32,)}  # fmt: skip
_ANY_SHAPE = ("weight_scale", "weight_zero_point", "input_scale", "k_scale", "v_scale", "output_scale")
_KV_NAMES = (
    ("k_scale", "v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
)


def linear_layers(shapes: Iterable[str]) -> list[str]:
    """Our names of the linear layers among parameter names, in their order."""
    names = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    return [name for name in names if name == "lm_head" or name.endswith("_proj")]


def stored_shapes(form: LayerFormat, shape: tuple[int, int]) -> dict[str, Shape]:
    """{end of its name: shape} of the tensors of a layer (N, D). Errors: `PunaError` for groups that do not divide."""
    (rows, columns), bits = shape, form.scheme.bits
    if form.layout in (GPTQ, GPTQ_V2):
        groups = -(-columns // (form.scheme.group_size or columns))
        return {
            "qweight": (words_per_row(columns, bits), rows), "qzeros": (groups, words_per_row(rows, bits)),
            "scales": (groups, rows), "g_idx": (columns,),
        }  # fmt: skip
    grid = form.scheme.grid(shape)
    if form.layout == AWQ:
        return {"qweight": (columns, rows // 8), "qzeros": (grid[1], rows // 8), "scales": (grid[1], rows)}
    found: dict[str, Shape] = {"weight": shape}
    if form.layout == PACK:
        found = {"weight_packed": (rows, words_per_row(columns, bits)), "weight_shape": (2,)}
    found["weight_scale"] = (1,) if form.scheme.granularity == "tensor" else grid
    if not form.scheme.symmetric:
        packed = form.layout == PACK and form.scheme.granularity in ("channel", "group")
        found["weight_zero_point"] = (words_per_row(rows, bits), grid[1]) if packed else found["weight_scale"]
    return found | _more_shapes(form, shape)


def _more_shapes(form: LayerFormat, shape: tuple[int, int]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    if form.act_order:
        found["weight_g_idx"] = (shape[1],)
    if form.activations is not None and form.activations.granularity == "tensor":
        found["input_scale"] = (1,)
    if form.low_rank:
        found |= {"low_rank_up": (shape[0], form.low_rank), "low_rank_down": (form.low_rank, shape[1])}
    return found


def to_stored(weight: QuantizedWeight, form: LayerFormat) -> dict[str, Tensor]:
    """The layer's tensors by the ends of their names. Errors: `PunaError` for what the layout cannot hold."""
    if form.layout in (GPTQ, GPTQ_V2):
        return to_gptq(weight.packed, 2 if form.layout == GPTQ_V2 else 1)
    if form.layout == AWQ:
        return to_awq(weight.packed)
    tensors = to_compressed(replace(weight.packed, group_of_D=None), form.layout)
    if form.act_order:
        assert weight.packed.group_of_D is not None
        tensors["weight_g_idx"] = weight.packed.group_of_D
    if weight.input_scale is not None:
        tensors["input_scale"] = weight.input_scale.reshape(1)
    if weight.up_NR is not None and weight.down_RD is not None:
        tensors |= {"low_rank_up": weight.up_NR, "low_rank_down": weight.down_RD}
    return tensors


def from_stored(tensors: Mapping[str, Tensor], form: LayerFormat, shape: tuple[int, int], name: str) -> QuantizedWeight:
    """The inverse of `to_stored`, for tensors of the shapes of `stored_shapes`. `name` is for messages.

    Errors: `PunaError` for dtypes that are not the layout's, scales that are no numbers, a `weight_shape` that differs.
    """
    tensors = dict(tensors)
    for end, tensor in tensors.items():
        _check_dtype(f"{name}.{end}", tensor, _allowed(end, form))
    for end in ("scales", "weight_scale", "input_scale"):
        if end in tensors:
            check_finite(tensors[end], f"{name}.{end}")
    if form.layout in (GPTQ, GPTQ_V2):
        size, version = form.scheme.group_size or -1, 2 if form.layout == GPTQ_V2 else 1
        return QuantizedWeight(from_gptq(tensors, form.scheme.bits, size, version))
    if form.layout == AWQ:
        return QuantizedWeight(from_awq(tensors))
    order = tensors.pop("weight_g_idx", None)
    scale = tensors.pop("input_scale", None)
    up_NR, down_RD = tensors.pop("low_rank_up", None), tensors.pop("low_rank_down", None)
    packed = _from_compressed(tensors, form, shape, name)
    packed = packed if order is None else replace(packed, group_of_D=_checked_order(order, packed, name))
    scale = None if scale is None else scale.reshape(1).float()
    return QuantizedWeight(packed, form.activations, scale, form.threshold, up_NR, down_RD)


def _from_compressed(tensors: dict[str, Tensor], form: LayerFormat, shape: tuple[int, int], name: str) -> Packed:
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        raise PunaError(
            f"{name}.weight_shape says {tensors['weight_shape'].tolist()}, the config {list(shape)}",
            "config.json and the weight files must come from the same model; fetch both again",
        )
    expected = stored_shapes(form, shape)
    tensors = {end: tensor.reshape(expected[end]) if end in _ANY_SHAPE else tensor for end, tensor in tensors.items()}
    scheme = form.scheme
    if form.layout == PACK and scheme.symmetric and scheme.bits < 8 and shape[1] * scheme.bits % 32 == 0:
        # The words are the canonical ones: unpacking them would cost eight times their memory for nothing.
        return Packed(
            tensors["weight_packed"], tensors["weight_scale"].reshape(scheme.grid(shape)), None, scheme, shape
        )
    return from_compressed(tensors, scheme, form.layout)


def _checked_order(order: Tensor, packed: Packed, name: str) -> Tensor:
    groups = packed.scales.shape[1]
    if not 0 <= int(order.min()) <= int(order.max()) < groups:
        raise PunaError(f"{name}.weight_g_idx names groups outside 0..{groups - 1}", "the file is damaged")
    return order.to(torch.int32)


def _allowed(end: str, form: LayerFormat) -> tuple[torch.dtype, ...]:
    if end == "weight":
        return (torch.int8,) if form.layout == INT else (torch.float8_e4m3fn,)
    return _DTYPES.get(end, _SCALES)


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise PunaError(
            f"{name} holds {tensor.dtype}, expected {' or '.join(map(str, allowed))}",
            "the file is not what its quantization_config says; fetch both again",
        )


class QuantizedLayers:
    """The quantized layers of a folder, read one by one.

    shapes: the plain model's parameters, by our names. `formats` has our names of the layers that are quantized.
    """

    def __init__(self, source: Source, quantization: Quantization, shapes: Mapping[str, Shape], spec: Spec):
        self._source, self._shapes, self._spec, self._kv = source, shapes, spec, quantization.kv
        self._disk = names_on_disk(shapes, source.table)
        self.method = quantization.method
        self.formats: dict[str, LayerFormat] = {}
        for layer in linear_layers(shapes):
            prefix = self._prefix(layer)
            found = quantization.format_of(prefix)
            if found is not None and (not quantization.by_presence or self._is_there(prefix)):
                self.formats[layer] = found
        self._kv_names = self._find_kv() if quantization.kv is not None else {}

    def expected(self) -> dict[str, Shape]:
        """{name on disk: shape} of everything the folder must hold, plain parameters included."""
        found: dict[str, Shape] = {}
        for name, shape in self._shapes.items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in self.formats:
                stored = stored_shapes(self.formats[layer], (shape[0], shape[1]))
                found |= {f"{self._prefix(layer)}.{end}": wanted for end, wanted in stored.items()}
            else:
                found[self._disk[name]] = shape
        found |= {f"{prefix}.bias": self._source.shapes[f"{prefix}.bias"] for prefix in self._empty_biases(found)}
        found |= {name: (1,) if heads is None else (heads,) for name, heads in self._kv_names.items()}
        return {name: self._accept(name, shape) for name, shape in found.items()}

    def check(self) -> None:
        """Refuse numbers that would be dropped: biases of layers whose family has none must be zero.

        AutoGPTQ wrote such biases for every layer it quantized.
        """
        for prefix in self._empty_biases({}):
            if bool(self._whole(f"{prefix}.bias").count_nonzero()):
                raise PunaError(
                    f"{prefix}.bias is not zero, but a {self._spec.model_type} model has no bias there",
                    "config.json and the weight files must come from the same model; fetch both again",
                )

    def weight(self, layer: str) -> QuantizedWeight:
        """A quantized layer by our name, on the CPU, in memory of its own. Errors: `PunaError` as `from_stored`."""
        form, shape, prefix = self.formats[layer], self._shapes[f"{layer}.weight"], self._prefix(layer)
        whole = (shape[0], shape[1])
        tensors = {end: self._whole(f"{prefix}.{end}") for end in stored_shapes(form, whole)}
        return _detached(from_stored(tensors, form, whole, prefix), tensors)

    def kv_scales(self) -> KVScales | None:
        """Scales of the KV cache, if it is quantized. Errors: `PunaError` for scales that are no positive numbers."""
        if self._kv is None:
            return None
        scales = [self._whole(name).reshape(-1).float().clone() for name in self._kv_names]
        return KVScales(self._kv, tuple(scales[0::2]), tuple(scales[1::2]))

    def _prefix(self, layer: str) -> str:
        return self._disk[f"{layer}.weight"].removesuffix(".weight")

    def _is_there(self, prefix: str) -> bool:
        return any(f"{prefix}.{end}" in self._source.shapes for end in ("qweight", "qzeros", "scales"))

    def _find_kv(self) -> dict[str, int | None]:
        """{name on disk: heads, or None for one scale}: keys and values by turns, layer by layer."""
        assert self._kv is not None
        heads = self._spec.num_key_value_heads if self._kv.granularity == "head" else None
        found: dict[str, int | None] = {}
        for layer in range(self._spec.num_hidden_layers):
            attention = self._prefix(f"layers.{layer}.attn.k_proj").removesuffix("k_proj")
            there = (pair for pair in _KV_NAMES if f"{attention}{pair[0]}" in self._source.shapes)
            found |= {f"{attention}{name}": heads for name in next(there, _KV_NAMES[0])}
        return found

    def _empty_biases(self, expected: Mapping[str, Shape]) -> list[str]:
        prefixes = (self._prefix(layer) for layer in self.formats if f"{layer}.bias" not in self._shapes)
        return [p for p in prefixes if f"{p}.bias" in self._source.shapes and f"{p}.bias" not in expected]

    def _accept(self, name: str, shape: Shape) -> Shape:
        """Tools differ in how they shape a few scales, (1,) or (), (N, 1) or (N,): only their number counts."""
        found = self._source.shapes.get(name, shape)
        return found if name.endswith(_ANY_SHAPE) and prod(found) == prod(shape) else shape

    def _whole(self, name: str) -> Tensor:
        """A view of the file."""
        return self._source.read_box(name, tuple(slice(0, length) for length in self._source.shapes[name]))


def _detached(weight: QuantizedWeight, stored: Mapping[str, Tensor]) -> QuantizedWeight:
    """In memory of its own: what is mapped from a file would keep the file's pages."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}

    def own(tensor: Tensor | None) -> Tensor | None:
        return tensor.clone() if tensor is not None and tensor.untyped_storage().data_ptr() in mapped else tensor

    packed: dict[str, Any] = {
        name: own(getattr(weight.packed, name)) for name in ("data", "scales", "zeros", "group_of_D")
    }
    more: dict[str, Any] = {name: own(getattr(weight, name)) for name in ("input_scale", "up_NR", "down_RD")}
    return replace(weight, packed=replace(weight.packed, **packed), **more)


def format_for(weight: QuantizedWeight, format: str) -> LayerFormat:
    """How a layer is stored in one of `quantization.FORMATS`."""
    rank = 0 if weight.up_NR is None else weight.up_NR.shape[1]
    ordered = weight.packed.group_of_D is not None
    return layer_format(format, weight.packed.scheme, weight.activations, ordered, weight.threshold, rank)
