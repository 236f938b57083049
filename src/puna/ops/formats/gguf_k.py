"""llama.cpp's K blocks: 256 weights in groups whose scales are themselves quantized, in units of one fp16 per block.

    Q4_K  144 B   d dmin | 12 B scales and offsets | 128 B nibbles                     w = d sc q - dmin m, 8 groups
    of 32 Q5_K  176 B   d dmin | 12 B scales and offsets | 32 B fifth bits | 128 B nibbles   the same with q in 0..31
    Q6_K  210 B   128 B low nibbles | 64 B high pairs | 16 x int8 scales | d           w = d sc (q - 32), 16 groups of
    16

The 12 bytes hold 8 scales (s) and 8 offsets (m) of 6 bits:       bit 7 6   5 4 3 2 1 0
                                              byte k      (k < 4)    s[k+4]  s[k]              upper two, all six
                                              byte k + 4             m[k+4]  m[k]
                                              byte k + 8             m[k+4] lower four, s[k+4] lower four

Nibbles: of 64 weights the first 32 below, the others above (Q6_K: 128 and 64). Fifth bits: bit g of byte i belongs to
weight i of group g. High pairs: of 128 weights, bits 2k and 2k+1 of byte i belong to weight 32 k + i.

Shapes: x and importance (blocks, 256) fp32, bytes (blocks, size) uint8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.ops.formats.gguf_search import search_line, search_scale, total
from puna.ops.formats.gguf_simple import half_bytes, halves, inverse

# What the range of a group is divided by: the number of codes and, in tenths, around it; finer steps were not better
# (gaussian and Student's t weights).
TRIALS_4 = tuple(15 + (0.1 * n - 1.0) for n in range(21))
TRIALS_5 = tuple(31 + (0.1 * n - 0.9) for n in range(19))
TRIALS_6 = tuple(-32 - 0.1 * n for n in range(-9, 10))
_HALF_MAX = 65504.0


def quantize_q4_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """144 bytes per block."""
    head, q = _line_codes(x, importance, 15, TRIALS_4)
    return torch.cat([head, _nibbles(q.view(-1, 4, 2, 32))], 1)


def quantize_q5_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """176 bytes per block."""
    head, q = _line_codes(x, importance, 31, TRIALS_5)
    return torch.cat([head, _fifth_bits(q), _nibbles(q.view(-1, 4, 2, 32) & 15)], 1)


def quantize_q6_k(x: Tensor, importance: Tensor | None = None) -> Tensor:
    """210 bytes per block. Without importance an error counts by the square of the weight it is made on."""
    groups = x.view(-1, 16)
    weight = groups.square() if importance is None else importance.reshape(-1, 16)
    scale = search_scale(groups.t().contiguous(), weight.t().contiguous(), -32, TRIALS_6).view(-1, 16)
    peak = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (peak / -128).clamp_(-_HALF_MAX, _HALF_MAX).add_(0.0).half().float()  # no -0
    sc = (scale * inverse(d)).round_().clamp_(-128, 127)
    steps = inverse(d * sc).repeat_interleave(16, 1)
    q = (x * steps).round_().clamp_(-32, 31).add_(32).to(torch.uint8)
    pairs = q.view(-1, 2, 4, 32) >> 4
    high = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
    scales = sc.to(torch.int8).view(torch.uint8)
    return torch.cat([_nibbles(q.view(-1, 2, 2, 64) & 15), high.flatten(1), scales, half_bytes(d)], 1)


def dequantize_q4_k(data: Tensor) -> Tensor:
    """fp32 (blocks, 256)."""
    return _line(data, _from_nibbles(data[:, 16:], 32))


def dequantize_q5_k(data: Tensor) -> Tensor:
    """fp32 (blocks, 256)."""
    bits = torch.stack([data[:, 16:48] >> group & 1 for group in range(8)], 1)
    return _line(data, _from_nibbles(data[:, 48:], 32) | bits.flatten(1) << 4)


def dequantize_q6_k(data: Tensor) -> Tensor:
    """fp32 (blocks, 256)."""
    high = data[:, 128:192].unflatten(1, (2, 32))
    pairs = torch.stack([high >> 2 * k & 3 for k in range(4)], 2).flatten(1)
    q = (_from_nibbles(data[:, :128], 64) | pairs << 4).float().sub_(32)
    scales = data[:, 192:208].contiguous().view(torch.int8).float() * halves(data[:, 208:])
    return (q.view(-1, 16, 16) * scales[..., None]).flatten(1)


def _line_codes(x: Tensor, importance: Tensor | None, highest: int, trials: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(16 bytes of scales, codes) of Q4_K and Q5_K."""
    weight = _weights(x, importance)
    columns, counts = x.view(-1, 32).t().contiguous(), weight.view(-1, 32).t().contiguous()
    scale, offset = search_line(columns, counts, highest, trials)
    d, sc = _six_bits(scale.view(-1, 8))
    dmin, m = _six_bits(offset.view(-1, 8))
    groups, counts = x.view(-1, 8, 32), weight.view(-1, 8, 32)
    d, dmin = _refit(groups, counts, _round(groups, d * sc, dmin * m, highest), sc, m, d, dmin)
    q = _round(groups, d * sc, dmin * m, highest).to(torch.uint8)
    return torch.cat([half_bytes(d), half_bytes(dmin), _join_scales(sc, m)], 1), q.view(x.shape)


def _round(groups: Tensor, scale: Tensor, offset: Tensor, highest: int) -> Tensor:
    """Codes of (blocks, 8, 32) for the scales and offsets (blocks, 8) that the block really stores."""
    return (groups + offset[..., None]).mul_(inverse(scale)[..., None]).round_().clamp_(0, highest)


def _refit(x: Tensor, w: Tensor, q: Tensor, sc: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """The two units that fit best once all else is whole numbers: least squares for x = d (sc q) - dmin (m).

    It makes good what rounding the factors to six bits has cost. Kept as before where there is no such line.
    """
    wq = w * q
    per_block = [sc * sc * total(wq * q, 2), sc * m * total(wq, 2), m * m * total(w, 2)]
    per_block += [sc * total(wq * x, 2), m * total(w * x, 2)]
    a, b, c, f, g = total(torch.stack(per_block), 2)[..., None]
    det = a * c - b * b
    both = [((c * f - b * g) / det).half().float(), ((b * f - a * g) / det).half().float()]
    fits = (det > 1e-4 * a * c) & (both[0] > 0) & (both[1] >= 0) & both[0].isfinite() & both[1].isfinite()
    return torch.where(fits, both[0], d), torch.where(fits, both[1], dmin)


def _weights(x: Tensor, importance: Tensor | None) -> Tensor:
    """How much an error on each weight counts: large weights count more, unimportant columns less."""
    squares = x.square()
    if importance is None:
        return _root(total(squares.view(-1, 8, 32), 2) / 32).repeat_interleave(32, 1) + x.abs()
    return _root(squares.add_(total(squares, 1)[:, None] / 128)).mul_(importance)


def _root(x: Tensor) -> Tensor:
    """The square root, correctly rounded: torch's own in fp32 is so on some machines only."""
    return x.double().sqrt_().float()


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values >= 0 (blocks, 8) as unit * (0..63): the unit as fp16 keeps it, and the factors."""
    unit = (values.amax(1, keepdim=True) / 63).clamp_(max=_HALF_MAX).add_(0.0).half().float()  # no -0
    return unit, (values * inverse(unit)).round_().clamp_(0, 63)


def _join_scales(sc: Tensor, m: Tensor) -> Tensor:
    sc, m = sc.to(torch.uint8), m.to(torch.uint8)
    upper = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (sc, m)]
    return torch.cat([*upper, sc[:, 4:] & 15 | m[:, 4:] << 4], 1)


def _split_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, lower = data[:, :4], data[:, 4:8], data[:, 8:]
    sc = torch.cat([first & 63, lower & 15 | first >> 6 << 4], 1)
    return sc, torch.cat([second & 63, lower >> 4 | second >> 6 << 4], 1)


def _line(data: Tensor, q: Tensor) -> Tensor:
    d, dmin = halves(data[:, :4]).split(1, 1)
    sc, m = _split_scales(data[:, 4:16])
    scaled = q.view(-1, 8, 32).float().mul_((d * sc.float())[..., None])
    return scaled.sub_((dmin * m.float())[..., None]).flatten(1)


def _fifth_bits(q: Tensor) -> Tensor:
    high = q.view(-1, 8, 32) >> 4
    joined = high[:, 0].clone()
    for group in range(1, 8):
        joined |= high[:, group] << group
    return joined


def _nibbles(q: Tensor) -> Tensor:
    """(blocks, pairs, 2, width) of 0..15 -> (blocks, pairs * width) bytes."""
    return (q[:, :, 0] | q[:, :, 1] << 4).flatten(1)


def _from_nibbles(data: Tensor, width: int) -> Tensor:
    pairs = data.unflatten(1, (-1, width))
    return torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)
