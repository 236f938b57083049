"""The native step's side of Python: a model's weights as the structs of step.cpp, and the call.

Shapes: T rows, R of them wanted, D model width, H query heads, G key/value heads, K head width, F feed-forward width,
V words, L layers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from puna.ops.native import library
from puna.ops.native.ggufblocks import NativeBlocks
from puna.ops.native.packed import NativeWeight
from puna.ops.native.tiles import TilesWeight

_native = library.load()
_PLAIN, _ROOM = struct.Struct("PPPPqqqqii"), 160  # `PlainProduct` in products.h, `Linear` in linears.h
_LAYER = struct.Struct("8Pq")  # what comes before the linears of `Layer` in step.cpp
_MODEL, _STEP = struct.Struct("3P11qf3i"), struct.Struct("11P5q")
_CACHES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}  # `Kind`
_UNLIMITED = 2**30
CACHE_DTYPES = tuple(_CACHES)


def available() -> bool:
    """True if the native step is loaded."""
    return hasattr(_native.kernels, "puna_step")


def reason() -> str:
    """The instruction set of the kernels, or why there are none."""
    return _native.reason


class Weight(NamedTuple):
    """A linear layer: how its weight is kept (`Keeping` in linears.h), the fields of its own struct, who owns them."""

    keeping: int
    fields: bytes
    owner: object


PLAIN, PACKED, TILES, BLOCKS = range(4)


def plain(weight_ND: Tensor, bias_N: Tensor | None) -> Weight:
    """A weight (N, D) with its bias (N,), both fp32 or both bf16, contiguous."""
    outputs, inputs = weight_ND.shape
    bias = 0 if bias_N is None else bias_N.data_ptr()
    fields = _PLAIN.pack(0, weight_ND.data_ptr(), bias, 0, 0, outputs, inputs, 0, 1, 0)
    return Weight(PLAIN, fields, (weight_ND, bias_N))


def packed(weight: NativeWeight) -> Weight:
    """A packed weight, with x as it is."""
    return Weight(PACKED, weight.problem(0, 0, 0, 0, 0, 0), weight)


def tiles(weight: TilesWeight) -> Weight:
    """A weight in tiles, with x rounded to int8."""
    return Weight(TILES, weight.struct, weight)


def blocks(weight: NativeBlocks) -> Weight:
    """A weight in llama.cpp's blocks, with x as it is."""
    return Weight(BLOCKS, weight.problem(0, 0, 0, 0, weight.shape[0]), weight)


class LayerWeights(NamedTuple):
    """One layer: norms in fp32 (attention's, the MLP's, and of q and k or none), its window, and q, k, v, o, gate, up,
    down."""

    norms: tuple[Tensor | None, ...]
    window: int | None
    linears: tuple[Weight, ...]


@dataclass(frozen=True)
class StepModel:
    """All of a model: embed_VD in fp32 or, where activations are bf16, in bf16; the last norm in fp32."""

    embed_VD: Tensor
    layers: Sequence[LayerWeights]
    norm_D: Tensor
    head: Weight
    num_heads: int
    inner: int
    eps: float


@dataclass(frozen=True)
class StepPages:
    """keys, values (L, P, G, S, K) alike, S and K contiguous; scales of codes: layer by layer fp32 (1,) or (G,)."""

    keys: Tensor
    values: Tensor
    key_scales: Sequence[Tensor] = ()
    value_scales: Sequence[Tensor] = ()


class Step:
    """`run` computes a step; the structs are built here, once. It keeps all that they point to."""

    def __init__(self, model: StepModel, pages: StepPages) -> None:
        _, _, groups, size, width = pages.keys.shape
        assert pages.keys.stride() == pages.values.stride()
        assert pages.keys.stride()[3:] == (width, 1)
        self._layers = b"".join(_layer(layer, pages, i) for i, layer in enumerate(model.layers))
        buffer = torch.frombuffer(bytearray(self._layers), dtype=torch.uint8)
        words, hidden = model.embed_VD.shape
        scale_step = int(len(pages.key_scales) > 0 and len(pages.key_scales[0]) > 1)
        fields = _MODEL.pack(
            buffer.data_ptr(), model.embed_VD.data_ptr(), model.norm_D.data_ptr(),
            len(model.layers), words, hidden, model.num_heads, groups, width, model.inner,
            *pages.keys.stride()[1:3], size, scale_step,
            model.eps, model.embed_VD.dtype is torch.bfloat16, _CACHES[pages.keys.dtype], _native.level,
        )  # fmt: skip
        self._model = torch.frombuffer(bytearray(fields + _linear(model.head)), dtype=torch.uint8)
        self._kept = (buffer, model, pages)
        self.num_words = words

    def run(
        self, tokens_T: Tensor, positions_T: Tensor, cos_PC: Tensor, sin_PC: Tensor,
        slots_T: Tensor, starts_B1: Tensor, lengths_B: Tensor, tables_BM: Tensor, rows_R: Tensor,
    ) -> Tensor:  # fmt: skip
        """Logits (R, V) in fp32; keys and values of all rows are in the pages afterwards.

        cos, sin (P positions, K / 2) fp32. int64: tokens, positions, slots, rows; int32: starts, lengths, tables.
        Errors: IndexError for a token beyond the vocabulary or a row beyond T.
        """
        logits_RV = torch.empty(len(rows_R), self.num_words)
        fields = _STEP.pack(
            self._model.data_ptr(), tokens_T.data_ptr(), positions_T.data_ptr(), slots_T.data_ptr(),
            cos_PC.data_ptr(), sin_PC.data_ptr(), starts_B1.data_ptr(), lengths_B.data_ptr(), tables_BM.data_ptr(),
            rows_R.data_ptr(), logits_RV.data_ptr(),
            len(tokens_T), len(lengths_B), tables_BM.stride(0), len(rows_R), torch.get_num_threads(),
        )  # fmt: skip
        assert _native.kernels is not None
        failed = _native.kernels.puna_step(fields)
        if failed == 2:
            raise IndexError(f"a token outside the vocabulary of {self.num_words}, or a row outside the step")
        if failed:
            raise MemoryError(f"no memory for a step of {len(tokens_T)} rows")
        return logits_RV


def _layer(layer: LayerWeights, pages: StepPages, number: int) -> bytes:
    keys, values = pages.keys[number], pages.values[number]
    scales = (None, None) if not pages.key_scales else (pages.key_scales[number], pages.value_scales[number])
    tensors = (*layer.norms, keys, values, *scales)
    window = _UNLIMITED if layer.window is None else min(layer.window, _UNLIMITED)
    fields = _LAYER.pack(*(0 if x is None else x.data_ptr() for x in tensors), window)
    return fields + b"".join(_linear(weight) for weight in layer.linears)


def _linear(weight: Weight) -> bytes:
    assert len(weight.fields) <= _ROOM
    return struct.pack("q", weight.keeping) + weight.fields.ljust(_ROOM, b"\0")
