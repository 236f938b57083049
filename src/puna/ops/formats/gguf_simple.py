"""llama.cpp's plain blocks: 32 weights under one fp16 scale. Byte for byte what the `gguf` package and ggml write.

    Q8_0  34 B   d | 32 x int8                             w = d q
    Q4_0  18 B   d | 16 B nibbles                          w = d (q - 8)
    Q4_1  20 B   d m | 16 B nibbles                        w = d q + m
    Q5_0  22 B   d | 4 B fifth bits | 16 B nibbles         w = d (q - 16)
    Q5_1  24 B   d m | 4 B fifth bits | 16 B nibbles       w = d q + m

Nibble byte j holds weight j below and weight j + 16 above; bit j of the fifth bits belongs to weight j. The signed
formats give the weight of largest magnitude the code 0 (d = that weight / -8), because there is one negative code
more.

Shapes: x (blocks, 32) fp32, bytes (blocks, size) uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops.formats.words import pack_words, unpack_words


def quantize_q8_0(x: Tensor) -> Tensor:
    """34 bytes per block; halves are rounded away from zero."""
    d = _divide(torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).abs_(), 127)
    q = x * inverse(d)
    whole = q.trunc()
    whole += q.sub_(whole).mul_(2).trunc_()  # exact: adding 0.5 first would round 0.49999997 up
    return torch.cat([half_bytes(d), whole.to(torch.int8).view(torch.uint8)], 1)


def quantize_q4_0(x: Tensor) -> Tensor:
    """18 bytes per block."""
    d, q = _signed_codes(x, 4)
    return torch.cat([half_bytes(d), _nibbles(q)], 1)


def quantize_q5_0(x: Tensor) -> Tensor:
    """22 bytes per block."""
    d, q = _signed_codes(x, 5)
    return torch.cat([half_bytes(d), _fifth_bits(q), _nibbles(q & 15)], 1)


def quantize_q4_1(x: Tensor) -> Tensor:
    """20 bytes per block."""
    d, low, q = _offset_codes(x, 4)
    return torch.cat([half_bytes(d), half_bytes(low), _nibbles(q)], 1)


def quantize_q5_1(x: Tensor) -> Tensor:
    """24 bytes per block."""
    d, low, q = _offset_codes(x, 5)
    return torch.cat([half_bytes(d), half_bytes(low), _fifth_bits(q), _nibbles(q & 15)], 1)


def dequantize_q8_0(data: Tensor) -> Tensor:
    """fp32 (blocks, 32)."""
    return data[:, 2:].contiguous().view(torch.int8).float().mul_(halves(data[:, :2]))


def dequantize_q4_0(data: Tensor) -> Tensor:
    """fp32 (blocks, 32)."""
    return _from_nibbles(data[:, 2:]).float().sub_(8).mul_(halves(data[:, :2]))


def dequantize_q5_0(data: Tensor) -> Tensor:
    """fp32 (blocks, 32)."""
    q = _from_nibbles(data[:, 6:]) | _from_fifth_bits(data[:, 2:6])
    return q.float().sub_(16).mul_(halves(data[:, :2]))


def dequantize_q4_1(data: Tensor) -> Tensor:
    """fp32 (blocks, 32)."""
    return _from_nibbles(data[:, 4:]).float().mul_(halves(data[:, :2])).add_(halves(data[:, 2:4]))


def dequantize_q5_1(data: Tensor) -> Tensor:
    """fp32 (blocks, 32)."""
    q = _from_nibbles(data[:, 8:]) | _from_fifth_bits(data[:, 4:8])
    return q.float().mul_(halves(data[:, :2])).add_(halves(data[:, 2:4]))


def half_bytes(values: Tensor) -> Tensor:
    """(blocks, n) fp32 -> (blocks, 2 n) bytes of fp16."""
    return values.half().contiguous().view(torch.uint8)


def halves(data: Tensor) -> Tensor:
    """(blocks, 2 n) bytes of fp16 -> (blocks, n) fp32."""
    return data.contiguous().view(torch.float16).float()


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is infinite: all zeros, or numbers so small that fp16 keeps no scale for them."""
    result = d.reciprocal()
    return result.masked_fill_(result.isinf(), 0)


def _divide(x: Tensor, by: float) -> Tensor:
    """x / by, truly divided: on a GPU torch multiplies by the reciprocal of a plain number, which rounds otherwise."""
    return x / x.new_full((), by)


def _signed_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(d, codes) with d = the weight of largest magnitude / -(2^(bits-1)); of two such weights the first one counts."""
    middle = 2 ** (bits - 1)
    d = _peak(x) / -middle
    q = (x * inverse(d)).add_(middle + 0.5).to(torch.uint8)
    return d, q.clamp_(max=2 * middle - 1)


def _peak(x: Tensor) -> Tensor:
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    peak = torch.where(high > -low, high, low)
    ties = (high == -low).squeeze(1).nonzero().squeeze(1)  # argmax is slow: only where the sign is open
    tied = x[ties]
    peak[ties] = tied.gather(1, tied.abs().argmax(1, keepdim=True))
    return peak


def _offset_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(d, lowest weight, codes) with d = range / (2^bits - 1)."""
    highest = 2**bits - 1
    low = x.amin(1, keepdim=True)
    d = _divide(x.amax(1, keepdim=True) - low, highest)
    q = (x - low).mul_(inverse(d)).add_(0.5).to(torch.uint8)
    return d, low, q.clamp_(max=highest)


def _nibbles(q: Tensor) -> Tensor:
    return q[:, :16] | q[:, 16:] << 4


def _from_nibbles(data: Tensor) -> Tensor:
    return torch.cat([data & 15, data >> 4], 1)


def _fifth_bits(q: Tensor) -> Tensor:
    return pack_words(q >> 4, 1).view(torch.uint8)


def _from_fifth_bits(data: Tensor) -> Tensor:
    words = data.clone(memory_format=torch.contiguous_format).view(torch.int32)  # a slice begins at an odd address
    return unpack_words(words, 1, 32) << 4
