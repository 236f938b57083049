"""compressed-tensors, the layout that vLLM and transformers load: one linear layer's tensors from and to `Packed`.

    pack-quantized    weight_packed int32 (N, ceil(D * bits / 32)), lowest code in the lowest bits, code + 2^(bits-1)
                      weight_shape int64 (2,); weight_zero_point int32 (ceil(N * bits / 32), groups), packed along dim 0
    int-quantized     weight int8 (N, D); weight_zero_point int8 like the scales
    float-quantized   weight float8_e4m3fn (N, D)
    all               weight_scale (N, D / g) per group, (N, 1) per channel, (1,) per tensor, (N / b, D / b) per block

Zero points are written for asymmetric schemes only. Checked against compressed-tensors 0.20 (which packs 3 bits
densely).
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.packed import Packed, pack
from puna.ops.formats.scheme import Scheme
from puna.ops.formats.words import pack_words, signed_to_unsigned, unpack_words, unsigned_to_signed, words_per_row

PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"


def layout_of(scheme: Scheme) -> str:
    """The `format` that a scheme is written in unless told otherwise."""
    if scheme.kind == "float":
        return FLOAT
    return INT if scheme.bits == 8 else PACK


def to_compressed(packed: Packed, layout: str | None = None) -> dict[str, Tensor]:
    """The layer's tensors by their names in the file. Errors: `PunaError` for act-order weights."""
    layout = layout or layout_of(packed.scheme)
    _check_layout(layout, packed.scheme)
    if packed.group_of_D is not None:
        raise PunaError(
            "a weight with act-order groups has no compressed-tensors layout here", "write it as GPTQ instead"
        )
    tensors = {"weight_scale": _to_shape(packed.scales, packed.scheme)}
    if layout == PACK:
        tensors["weight_packed"] = _words_of(packed)
        tensors["weight_shape"] = torch.tensor(packed.shape)
    else:
        tensors["weight"] = packed.data
    if packed.zeros is not None:
        zeros = (
            _pack_down(packed.zeros, packed.scheme.bits) if _zeros_are_packed(layout, packed.scheme) else packed.zeros
        )
        tensors["weight_zero_point"] = zeros if layout == PACK else _to_shape(zeros, packed.scheme)
    return tensors


def from_compressed(tensors: dict[str, Tensor], scheme: Scheme, layout: str | None = None) -> Packed:
    """The inverse of `to_compressed`. Errors: `PunaError` for a tensor missing, left over or of another shape."""
    layout = layout or layout_of(scheme)
    _check_layout(layout, scheme)
    _check_names(tensors, scheme, layout)
    if layout == PACK:
        rows, columns = (int(n) for n in tensors["weight_shape"])
        _check_shape("weight_packed", tensors["weight_packed"], (rows, words_per_row(columns, scheme.bits)))
        codes = unsigned_to_signed(unpack_words(tensors["weight_packed"], scheme.bits, columns), scheme.bits)
    else:
        codes = tensors["weight"]
        rows, columns = codes.shape
    grid = scheme.grid((rows, columns))
    scales = tensors["weight_scale"]
    _check_shape("weight_scale", scales, (1,) if scheme.granularity == "tensor" and scales.dim() == 1 else grid)
    zeros = None if scheme.symmetric else _unpack_zeros(tensors["weight_zero_point"], scheme, layout, grid)
    return pack(codes, scheme, scales.reshape(grid), zeros)


def _unpack_zeros(zeros: Tensor, scheme: Scheme, layout: str, grid: tuple[int, int]) -> Tensor:
    if not _zeros_are_packed(layout, scheme):
        return zeros.reshape(grid).to(torch.int8)
    _check_shape("weight_zero_point", zeros, (words_per_row(grid[0], scheme.bits), grid[1]))
    return unsigned_to_signed(unpack_words(zeros.t(), scheme.bits, grid[0]), scheme.bits).t().contiguous()


def _words_of(packed: Packed) -> Tensor:
    if packed.scheme.bits < 8:
        return packed.data
    return pack_words(signed_to_unsigned(packed.data, 8), 8)


def _pack_down(zeros: Tensor, bits: int) -> Tensor:
    return pack_words(signed_to_unsigned(zeros.t().contiguous(), bits), bits).t().contiguous()


def _zeros_are_packed(layout: str, scheme: Scheme) -> bool:
    return layout == PACK and scheme.granularity in ("channel", "group")


def _to_shape(values: Tensor, scheme: Scheme) -> Tensor:
    return values.reshape(1) if scheme.granularity == "tensor" else values


def _check_layout(layout: str, scheme: Scheme) -> None:
    fits = {PACK: scheme.kind == "int", INT: scheme.kind == "int" and scheme.bits == 8, FLOAT: scheme.kind == "float"}
    if not fits.get(layout, False):
        raise PunaError(
            f"compressed-tensors' {layout} cannot hold {scheme.kind} of {scheme.bits} bits", f"use {layout_of(scheme)}"
        )


def _check_names(tensors: dict[str, Tensor], scheme: Scheme, layout: str) -> None:
    expected = {"weight_scale"} | ({"weight_packed", "weight_shape"} if layout == PACK else {"weight"})
    if not scheme.symmetric:
        expected.add("weight_zero_point")
    if expected != set(tensors):
        missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise PunaError(
            f"a {layout} layer needs {sorted(expected)}: missing {missing or 'none'}, left over {extra or 'none'}",
            "the file or its quantization_config is not what it says; export the model again",
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise PunaError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}", "group size or bits do not match")
