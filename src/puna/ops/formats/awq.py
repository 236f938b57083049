"""AutoAWQ's `gemm` layout: one linear layer's tensors from and to `Packed`; four bits, per group or per channel.

    qweight int32 (D, N / 8)    qzeros int32 (groups, N / 8)    scales fp16 (groups, N)    w = (q - z) s, unsigned

Eight outputs share a word in an order that suits the GPU kernel's unpacking; bits 4k .. 4k+3 hold output ORDER[k]:

    bit      31..28 27..24 23..20 19..16 15..12 11..8  7..4  3..0
    output      7      5      3      1      6     4     2     0

Source: Lin et al. 2023, arXiv:2306.00978; the layout is that of the AutoAWQ package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.gptq import check_names, to_half
from puna.ops.formats.packed import Packed, pack
from puna.ops.formats.scheme import Scheme
from puna.ops.formats.words import pack_words, signed_to_unsigned, unpack_words, unsigned_to_signed

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = tuple(ORDER.index(output) for output in range(8))
NAMES = ("qweight", "qzeros", "scales")


def to_awq(packed: Packed) -> dict[str, Tensor]:
    """The layer's tensors; zero points are written for symmetric weights too (the middle code, 8).

    Errors: `PunaError` for anything but int4 per group or channel in order, outputs not a multiple of 8, scales that
    fp16 cannot hold.
    """
    scheme, (rows, columns) = packed.scheme, packed.shape
    if scheme.kind != "int" or scheme.bits != 4 or scheme.granularity not in ("channel", "group"):
        raise PunaError(
            f"AWQ cannot hold {scheme.kind} of {scheme.bits} bits per {scheme.granularity}",
            "use int4 per group or channel, or compressed-tensors",
        )
    if rows % 8 or packed.group_of_D is not None:
        act_order = "" if packed.group_of_D is None else " in act-order"
        raise PunaError(
            f"AWQ packs 8 outputs into a word and keeps groups in order; this weight is {rows} x {columns}{act_order}",
            "use GPTQ for act-order, compressed-tensors for other widths",
        )
    zeros_NG = torch.zeros_like(packed.scales, dtype=torch.int8) if packed.zeros is None else packed.zeros
    return {
        "qweight": _pack(packed.codes().t().contiguous()),
        "qzeros": _pack(zeros_NG.t().contiguous()),
        "scales": to_half(packed.scales).t().contiguous(),
    }


def from_awq(tensors: dict[str, Tensor]) -> Packed:
    """The inverse of `to_awq`; symmetric if every zero point is 8. Errors: `PunaError` for tensors that do not fit."""
    check_names("AWQ", tensors, NAMES)
    scales_NG = tensors["scales"].t().contiguous()
    (rows, groups), columns = scales_NG.shape, tensors["qweight"].shape[0]
    shapes = tuple(tensors["qweight"].shape), tuple(tensors["qzeros"].shape)
    if rows % 8 or columns % groups or shapes != ((columns, rows // 8), (groups, rows // 8)):
        raise PunaError(
            f"AWQ qweight and qzeros of shapes {shapes} do not go with {groups} groups of {rows} scales",
            "the file is damaged or not AutoAWQ's gemm layout",
        )
    codes_ND = _unpack(tensors["qweight"], rows).t().contiguous()
    zeros_NG = _unpack(tensors["qzeros"], rows).t().contiguous()
    symmetric = not bool(zeros_NG.any())
    size = columns // groups
    scheme = Scheme(4, "int", symmetric, "channel" if groups == 1 else "group", 0 if groups == 1 else size)
    return pack(codes_ND, scheme, scales_NG, None if symmetric else zeros_NG)


def _pack(codes_DN: Tensor) -> Tensor:
    unsigned = signed_to_unsigned(codes_DN, 4)
    return pack_words(unsigned.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1), 4)


def _unpack(words: Tensor, outputs: int) -> Tensor:
    codes = unsigned_to_signed(unpack_words(words, 4, outputs), 4)
    return codes.unflatten(1, (-1, 8))[..., list(_PLACE)].flatten(1)
