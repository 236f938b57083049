"""llama.cpp's number formats by name: a matrix to the bytes that a GGUF file holds, and back.

Every row is a sequence of blocks, each with its own scales: `gguf_simple` draws the blocks of 32 weights, `gguf_k`
those of 256, `gguf_search` finds the scales of the latter. F32, F16 and BF16 are numbers as they are.

Shapes: weight_ND (N, D) or (D,), D a multiple of the block; data (N, bytes per row) uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats import gguf_k as k
from puna.ops.formats import gguf_simple as simple
from puna.ops.formats.pieces import PIECE, for_each_piece
from puna.ops.native import kblocks

_SEARCH_PIECE = 20 << 10  # numbers; the search adds three sums at once, whose first step has 1.5 numbers for each
_NATIVE_PIECE = 4 << 20  # numbers that the native search takes at once, as fp32


@dataclass(frozen=True)
class BlockType:
    """A row of ggml's table: its number in files, weights and bytes per block, and the functions on (blocks, size).

    trials: for types whose scales are searched, what the range of a group is divided by, one after another.
    """

    number: int
    weights: int
    bytes: int
    quantize: Callable[..., Tensor]
    dequantize: Callable[[Tensor], Tensor]
    trials: tuple[float, ...] = ()

    @property
    def takes_importance(self) -> bool:
        """Whether there is something to choose, so that it matters which columns count."""
        return bool(self.trials)

    @property
    def bits_per_weight(self) -> float:
        """Scales included: 4.5 for Q4_K."""
        return 8 * self.bytes / self.weights


def _plain(number: int, dtype: torch.dtype) -> BlockType:
    return BlockType(
        number, 1, dtype.itemsize, lambda x: x.to(dtype).view(torch.uint8), lambda data: data.view(dtype).float()
    )


TYPES = {
    "F32": _plain(0, torch.float32),
    "F16": _plain(1, torch.float16),
    "BF16": _plain(30, torch.bfloat16),
    "Q4_0": BlockType(2, 32, 18, simple.quantize_q4_0, simple.dequantize_q4_0),
    "Q4_1": BlockType(3, 32, 20, simple.quantize_q4_1, simple.dequantize_q4_1),
    "Q5_0": BlockType(6, 32, 22, simple.quantize_q5_0, simple.dequantize_q5_0),
    "Q5_1": BlockType(7, 32, 24, simple.quantize_q5_1, simple.dequantize_q5_1),
    "Q8_0": BlockType(8, 32, 34, simple.quantize_q8_0, simple.dequantize_q8_0),
    "Q4_K": BlockType(12, 256, 144, k.quantize_q4_k, k.dequantize_q4_k, k.TRIALS_4),
    "Q5_K": BlockType(13, 256, 176, k.quantize_q5_k, k.dequantize_q5_k, k.TRIALS_5),
    "Q6_K": BlockType(14, 256, 210, k.quantize_q6_k, k.dequantize_q6_k, k.TRIALS_6),
}


def block_type(name: str) -> BlockType:
    """The type of that name. Errors: `PunaError` that lists the names."""
    if name not in TYPES:
        raise PunaError(f"'{name}' is not a GGUF type that puna knows", f"use one of {', '.join(TYPES)}")
    return TYPES[name]


def quantize_gguf(weight_ND: Tensor, name: str, importance_D: Tensor | None = None) -> Tensor:
    """Bytes (..., bytes per row) of a finite weight of any float dtype.

    importance_D: how much errors in each column count (an importance matrix: mean squares of the layer's input), for
    the K types; the others have nothing to choose and ignore it. Memory beyond the result is bounded. Errors:
    `PunaError` for a width that the block does not divide, for an importance of another width or below 0.
    """
    kind = block_type(name)
    width = weight_ND.shape[-1]
    if width % kind.weights:
        fallback = "Q8_0, Q5_0 or Q4_0" if width % 32 == 0 else "F16"
        raise PunaError(
            f"{name} needs rows of a multiple of {kind.weights} weights, not {width}", f"use {fallback} for this tensor"
        )
    importance_D = _check_importance(importance_D, width) if kind.takes_importance else None
    blocks = weight_ND.contiguous().view(-1, kind.weights)
    data = blocks.new_empty(blocks.shape[0], kind.bytes, dtype=torch.uint8)
    rows = (*weight_ND.shape[:-1], width // kind.weights * kind.bytes)
    if kind.trials and kblocks.serves(blocks):
        _search_natively(blocks, data, kind, importance_D)
        return data.view(rows)

    def work(part: slice) -> None:
        x = blocks[part].float()
        if importance_D is None:
            data[part] = kind.quantize(x)
        else:
            data[part] = kind.quantize(x, _importance_of(part, importance_D, kind.weights))

    for_each_piece(blocks, work, _SEARCH_PIECE if kind.takes_importance else PIECE)
    return data.view(rows)


def _search_natively(blocks: Tensor, data: Tensor, kind: BlockType, importance_D: Tensor | None) -> None:
    step = _NATIVE_PIECE // kind.weights
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        kblocks.quantize(blocks[part].detach().float(), data[part], kind.trials, importance_D, start)


def dequantize_gguf(data: Tensor, name: str) -> Tensor:
    """fp32 weights (..., D) of bytes (..., bytes per row). Errors: `PunaError` for rows that end within a block."""
    kind = block_type(name)
    size = data.shape[-1]
    if size % kind.bytes:
        raise PunaError(f"a row of {size} bytes is no whole number of {name} blocks of {kind.bytes}", "check the type")
    blocks = data.contiguous().view(-1, kind.bytes)
    weight = torch.empty(blocks.shape[0], kind.weights, device=data.device)

    def work(part: slice) -> None:
        weight[part] = kind.dequantize(blocks[part])

    for_each_piece(weight, work)
    return weight.view(*data.shape[:-1], size // kind.bytes * kind.weights)


def _check_importance(importance_D: Tensor | None, width: int) -> Tensor | None:
    if importance_D is None:
        return None
    if importance_D.shape != (width,) or not bool((importance_D >= 0).all() & importance_D.isfinite().all()):
        raise PunaError(
            f"an importance of shape {tuple(importance_D.shape)} was given for {width} columns, or is not finite",
            "collect the importance matrix again on this model",
        )
    return importance_D.float()


def _importance_of(part: slice, importance_D: Tensor, weights: int) -> Tensor:
    """The importance of each block's columns; blocks run along the rows, so it repeats with every row."""
    table = importance_D.view(-1, weights)
    blocks = torch.arange(part.start, part.stop, device=importance_D.device)
    return table[blocks % table.shape[0]]
