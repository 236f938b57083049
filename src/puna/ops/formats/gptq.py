"""GPTQ checkpoints (AutoGPTQ, GPTQModel): one linear layer's tensors from and to `Packed`; 2, 3, 4 and 8 bits.

    qweight int32 (D * bits / 32, N)     packed down the inputs: the words of `Packed.data`, transposed
    qzeros  int32 (groups, N * bits / 32)  packed along the outputs
    scales  fp16 (groups, N)       g_idx int32 (D,): the group of every input (act-order), else 0 0 .. 1 1 ..

Codes and zero points are unsigned, w = (q - z) s. Version 1 (`checkpoint_format: "gptq"`) stores z - 1 in bits that
wrap around, version 2 (`"gptq_v2"`) z itself. 3 bits are dense: 32 codes in 3 words. A z of 0 in version 1 wraps to
all ones, which some readers carry over into the neighbour: prefer version 2 for asymmetric weights. Source: Frantar
et al. 2022, arXiv:2210.17323, and the layout its first CUDA kernel gave the files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.packed import Packed, pack
from puna.ops.formats.scheme import Scheme
from puna.ops.formats.words import pack_words, signed_to_unsigned, unpack_words, unsigned_to_signed

BITS = (2, 3, 4, 8)
NAMES = ("qweight", "qzeros", "scales", "g_idx")


def to_gptq(packed: Packed, version: int = 1) -> dict[str, Tensor]:
    """The layer's tensors. Scales become fp16: choose them in fp16 to lose nothing.

    Errors: `PunaError` for other bits or granularities, widths that do not fill whole words, scales fp16 cannot hold.
    """
    assert version in (1, 2)
    scheme, (rows, columns) = packed.scheme, packed.shape
    if scheme.kind != "int" or scheme.bits not in BITS or scheme.granularity not in ("channel", "group"):
        raise PunaError(
            f"GPTQ cannot hold {scheme.kind} of {scheme.bits} bits per {scheme.granularity}",
            f"use integers of {', '.join(map(str, BITS))} bits per channel or group, or compressed-tensors",
        )
    _check_words(rows, columns, scheme.bits)
    middle = 2 ** (scheme.bits - 1)
    zeros_NG = torch.zeros_like(packed.scales, dtype=torch.int8) if packed.zeros is None else packed.zeros
    unsigned_GN = zeros_NG.t().to(torch.int16) + middle - (2 - version)
    unsigned_GN &= 2 * middle - 1
    return {
        "qweight": _words_of(packed).t().contiguous(),
        "qzeros": pack_words(unsigned_GN.to(torch.uint8).contiguous(), scheme.bits),
        "scales": to_half(packed.scales).t().contiguous(),
        "g_idx": _group_of(packed),
    }


def from_gptq(tensors: dict[str, Tensor], bits: int, group_size: int, version: int = 1) -> Packed:
    """The inverse of `to_gptq`; group_size -1 is one group per output. Symmetric if every zero point is the middle
    code.

    Errors: `PunaError` for missing or extra tensors and shapes that contradict each other.
    """
    check_names("GPTQ", tensors, NAMES)
    scales_NG = tensors["scales"].t().contiguous()
    rows, groups = scales_NG.shape
    columns = tensors["qweight"].shape[0] * 32 // bits
    group_of_D = tensors["g_idx"]
    _check_shapes(tensors, rows, columns, groups, bits)
    stored_GN = unpack_words(tensors["qzeros"], bits, rows).to(torch.int16) + (2 - version)
    zeros_NG = (stored_GN & (2**bits - 1)).sub_(2 ** (bits - 1)).to(torch.int8).t().contiguous()
    symmetric = not bool(zeros_NG.any())
    per_channel = group_size == -1 or groups == 1
    scheme = Scheme(bits, "int", symmetric, "channel" if per_channel else "group", 0 if per_channel else group_size)
    order = None if _are_neighbours(group_of_D, columns, groups) else group_of_D
    words_NW = tensors["qweight"].t().contiguous()
    if bits < 8:  # the words are the canonical ones, transposed
        return Packed(words_NW, scales_NG, None if symmetric else zeros_NG, scheme, (rows, columns), order)
    codes_ND = unsigned_to_signed(unpack_words(words_NW, bits, columns), bits)
    return pack(codes_ND, scheme, scales_NG, None if symmetric else zeros_NG, order)


def to_half(scales: Tensor) -> Tensor:
    """fp16 scales. Errors: `PunaError` where one would become 0 or infinite."""
    half = scales.half()
    lost = int((~half.isfinite() | (half == 0)).sum())
    if lost:
        raise PunaError(
            f"{lost} of {scales.numel()} scales do not fit fp16 (smallest {float(scales.min()):.3g}, largest "
            f"{float(scales.max()):.3g})",
            "choose the scales in fp16, or write compressed-tensors, which keeps fp32",
        )
    return half


def check_names(what: str, tensors: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Errors: `PunaError` unless the layer has exactly these tensors."""
    if set(tensors) != set(names):
        missing, extra = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
        raise PunaError(
            f"a {what} layer needs {', '.join(names)}: missing {missing or 'nothing'}, left over {extra or 'nothing'}",
            "the file is not whole, or of another format",
        )


def _words_of(packed: Packed) -> Tensor:
    if packed.scheme.bits < 8:
        return packed.data
    return pack_words(signed_to_unsigned(packed.data, 8), 8)


def _group_of(packed: Packed) -> Tensor:
    if packed.group_of_D is not None:
        return packed.group_of_D.to(torch.int32)
    columns, groups = packed.shape[1], packed.scales.shape[1]
    return torch.arange(columns, dtype=torch.int32, device=packed.data.device) // (columns // groups)


def _are_neighbours(group_of_D: Tensor, columns: int, groups: int) -> bool:
    if columns % groups:
        return False
    plain = torch.arange(columns, dtype=group_of_D.dtype, device=group_of_D.device) // (columns // groups)
    return torch.equal(group_of_D, plain)


def _check_words(rows: int, columns: int, bits: int) -> None:
    if rows * bits % 32 or columns * bits % 32:
        raise PunaError(
            f"GPTQ packs {bits}-bit codes into whole words of 32 bits, which {rows} x {columns} does not fill",
            "use compressed-tensors for this layer, or leave it unquantized",
        )


def _check_shapes(tensors: dict[str, Tensor], rows: int, columns: int, groups: int, bits: int) -> None:
    expected = {
        "qweight": (columns * bits // 32, rows),
        "qzeros": (groups, rows * bits // 32),
        "scales": (groups, rows),
        "g_idx": (columns,),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise PunaError(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}", "do the bits match?")
    if columns and not 0 <= int(tensors["g_idx"].min()) <= int(tensors["g_idx"].max()) < groups:
        raise PunaError(f"g_idx names groups outside 0..{groups - 1}", "the file is damaged")
