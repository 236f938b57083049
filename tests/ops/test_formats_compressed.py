"""ops/formats/compressed.py: compressed-tensors' own compressor writes the same tensors and reads ours."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from puna.base.console import PunaError
from puna.ops.formats.compressed import FLOAT, INT, PACK, from_compressed, layout_of, to_compressed
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.scheme import FLOAT8, FLOAT8_TENSOR, INT4, INT8, Scheme

CASES = [
    (INT4, PACK), (Scheme(4, "int", False, "group", 32), PACK), (Scheme(4), PACK), (Scheme(3, "int", False), PACK),
    (Scheme(3, "int", True, "group", 64), PACK), (Scheme(2, "int", False), PACK),
    (Scheme(8, "int", True, "group", 128), PACK), (Scheme(8, "int", False, "group", 128), PACK),
    (INT8, INT), (Scheme(8, "int", False), INT), (Scheme(granularity="tensor"), INT), (FLOAT8, FLOAT), (FLOAT8_TENSOR, FLOAT),
    (Scheme(kind="float", granularity="block", group_size=32), FLOAT),
]  # fmt: skip


def settings_of(scheme):
    args = QuantizationArgs(
        num_bits=scheme.bits, type=scheme.kind, symmetric=scheme.symmetric, strategy=scheme.granularity,
        group_size=scheme.group_size if scheme.granularity == "group" else None,
        block_structure=[scheme.group_size] * 2 if scheme.granularity == "block" else None,
    )  # fmt: skip
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(32, 256), (96, 128)])
def test_its_compressor_writes_and_reads_the_same(scheme, layout, shape):
    w = torch.randn(shape)
    packed = round_to_nearest(w, scheme)
    ours = to_compressed(packed, layout)
    theirs = BaseCompressor.get_value_from_registry(layout)
    state = {"weight": w, "weight_scale": ours["weight_scale"]}
    if packed.zeros is not None:
        state["weight_zero_point"] = packed.zeros.reshape(1) if scheme.granularity == "tensor" else packed.zeros
    expected = theirs.compress(state, settings_of(scheme))
    assert set(ours) == set(expected)
    for name, tensor in ours.items():
        assert tensor.dtype is expected[name].dtype, name
        assert torch.equal(tensor.flatten().view(torch.uint8), expected[name].flatten().view(torch.uint8)), name
    read = theirs.decompress(dict(ours), settings_of(scheme))["weight"]
    assert torch.equal(read.float(), packed.dequantize())


@pytest.mark.parametrize(("scheme", "layout"), CASES, ids=str)
def test_round_trip(scheme, layout):
    packed = round_to_nearest(torch.randn(64, 128), scheme, torch.bfloat16)
    again = from_compressed(to_compressed(packed, layout), scheme, layout)
    assert again.shape == packed.shape
    assert again.scales.dtype is torch.bfloat16
    assert torch.equal(again.data.view(torch.uint8), packed.data.view(torch.uint8))
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_widths_that_fill_no_word():
    """13 columns of 4 bits take two words, 13 rows of zero points two words down."""
    scheme = Scheme(4, "int", False)
    packed = round_to_nearest(torch.randn(13, 13), scheme)
    tensors = to_compressed(packed)
    assert tensors["weight_packed"].shape == (13, 2)
    assert tensors["weight_zero_point"].shape == (2, 1)
    assert tensors["weight_shape"].tolist() == [13, 13]
    assert torch.equal(from_compressed(tensors, scheme).dequantize(), packed.dequantize())


def test_layouts():
    assert [layout_of(s) for s in (INT4, INT8, FLOAT8)] == [PACK, INT, FLOAT]
    with pytest.raises(PunaError, match="int-quantized cannot hold int of 4 bits"):
        to_compressed(round_to_nearest(torch.randn(8, 128), INT4), INT)


@pytest.mark.parametrize("change", ["missing", "extra", "words", "scales", "zeros"])
def test_tensors_that_do_not_fit_are_refused(change):
    scheme = Scheme(4, "int", False, "group", 32)
    tensors = to_compressed(round_to_nearest(torch.randn(16, 128), scheme))
    if change == "missing":
        del tensors["weight_scale"]
    elif change == "extra":
        tensors["weight_g_idx"] = torch.zeros(128)
    else:
        name = {"words": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point"}[change]
        tensors[name] = tensors[name][:, :-1]
    with pytest.raises(PunaError):
        from_compressed(tensors, scheme)


def test_act_order_is_refused():
    order = torch.arange(128, dtype=torch.int32) % 2
    packed = pack(
        torch.zeros(8, 128, dtype=torch.int8), Scheme(4, "int", True, "group", 64), torch.ones(8, 2), None, order
    )
    with pytest.raises(PunaError, match="act-order"):
        to_compressed(packed)
