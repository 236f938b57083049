"""ops/formats/gguf*.py: bytes and numbers of the `gguf` package; the K quantizers' error against plain blocks and ggml."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.ops.formats.gguf import TYPES, block_type, dequantize_gguf, quantize_gguf
from puna.ops.formats.gguf_search import search_line, search_scale

PLAIN = [name for name in TYPES if "K" not in name]
K = ["Q4_K", "Q5_K", "Q6_K"]


def reference_type(name):
    return getattr(gguf.GGMLQuantizationType, name)


def reference_bytes(w, name):
    data = gguf.quants.quantize(w.numpy(), reference_type(name))
    return torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).reshape(w.shape[0], -1))


def reference_numbers(data, name):
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), reference_type(name)).astype(np.float32))


def draw(kind, shape=(16, 512), seed=0):
    torch.manual_seed(seed)
    if kind == "gauss":
        return torch.randn(shape) * 0.02
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02


def rmse(w, name, importance=None, weight=1.0):
    back = dequantize_gguf(quantize_gguf(w, name, importance), name)
    return ((back - w).square() * weight).mean().sqrt().item()


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), coarse=st.booleans())
def test_bytes_are_identical(name, seed, coarse):
    """Coarse numbers give ties: halves to round, two largest weights of opposite sign."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(8, 96, generator=generator) * 10 ** torch.empty(8, 1).uniform_(-5, 4, generator=generator)
    if coarse:
        w = torch.randint(-8, 9, (8, 96), generator=generator) / 4.0
    assert torch.equal(quantize_gguf(w, name), reference_bytes(w, name))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "row", [[0.0], [-0.0], [1.0], [-1.0], [1.0, -1.0], [-1.0, 1.0], [0.0, 2.5], [127.0, 0.5, 1.5, -2.5, 0.49999997]]
)
def test_special_blocks_are_identical(name, row):
    w = torch.tensor(row).repeat(32)[:32].reshape(1, 32)
    w = torch.cat([w, w.flip(1), w * 1e-7])
    assert torch.equal(quantize_gguf(w, name), reference_bytes(w, name))


@pytest.mark.parametrize("name", TYPES)
def test_numbers_are_identical(name):
    """Any bytes, not only those a quantizer writes; the fp16 fields are kept finite."""
    w = draw("gauss")
    data = quantize_gguf(w, name)
    blocks = torch.randint(0, 256, data.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    kind = TYPES[name]
    blocks = blocks.view(-1, kind.bytes)
    fields = {"Q6_K": [(208, 210)], "F32": [(0, 4)], "F16": [(0, 2)], "BF16": [(0, 2)]}.get(name, [(0, 4)])
    for start, end in fields:
        blocks[:, start:end] = data.view(-1, kind.bytes)[:, start:end]
    for sample in (data, blocks.view(data.shape)):
        numbers = dequantize_gguf(sample, name)
        assert torch.equal(numbers.view(torch.int32), reference_numbers(sample, name).view(torch.int32))


@pytest.mark.parametrize("name", TYPES)
def test_table(name):
    kind = block_type(name)
    assert kind.number == reference_type(name).value
    assert (kind.weights, kind.bytes) == gguf.constants.GGML_QUANT_SIZES[reference_type(name)]
    assert TYPES["Q4_K"].bits_per_weight == 4.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shapes_and_dtypes(dtype):
    w = torch.randn(2, 3, 256).to(dtype)
    for name, kind in TYPES.items():
        data = quantize_gguf(w, name)
        assert data.shape == (2, 3, 256 // kind.weights * kind.bytes)
        assert torch.equal(data, quantize_gguf(w.float(), name))
        assert dequantize_gguf(data, name).shape == w.shape
    assert torch.equal(dequantize_gguf(quantize_gguf(w, "BF16"), "BF16").to(dtype), w.bfloat16().to(dtype))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K"])
def test_a_large_matrix_in_pieces_equals_its_rows(name):
    """200 rows of 768 are several pieces, and a piece ends within a row: importance must follow the columns."""
    w, importance = draw("student", (200, 768)), torch.rand(768)
    whole = quantize_gguf(w, name, importance)
    for row in range(0, 200, 7):
        assert torch.equal(whole[row], quantize_gguf(w[row], name, importance))


# --- K blocks: how good the search is -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gauss", "student"])
def test_k_blocks_beat_plain_blocks_of_like_size(kind):
    """Bits per weight: Q4_0 and Q4_K 4.5, Q4_1 5; Q5_0 and Q5_K 5.5, Q5_1 6. Measured: 0.84, 0.76 / 0.85, 0.76."""
    w = draw(kind, (64, 1024))
    assert rmse(w, "Q4_K") < 0.87 * rmse(w, "Q4_0")
    assert rmse(w, "Q4_K") < rmse(w, "Q4_1")
    assert rmse(w, "Q5_K") < 0.87 * rmse(w, "Q5_0")
    assert rmse(w, "Q5_K") < rmse(w, "Q5_1")
    assert rmse(w, "Q6_K") < 0.55 * rmse(w, "Q5_K")


@pytest.mark.parametrize("name", K)
def test_importance_moves_the_error_to_where_it_does_not_matter(name):
    w = draw("student", (64, 1024))
    importance = torch.where(torch.arange(1024) % 8 == 0, 100.0, 1.0)
    assert rmse(w, name, importance, importance) < 0.93 * rmse(w, name, None, importance)
    assert torch.equal(quantize_gguf(w, name, importance), quantize_gguf(w, name, importance * 4))  # only ratios count


@pytest.mark.parametrize("name", K)
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-9, -1e-30, 6e4])
def test_constant_blocks(name, value):
    w = torch.full((2, 256), value)
    back = dequantize_gguf(quantize_gguf(w, name), name)
    assert back.isfinite().all()
    assert (back - w).abs().max() <= abs(value) * 0.02 + 1e-7


@pytest.mark.parametrize("name", K)
def test_one_block_of_zeros_and_columns_of_no_importance(name):
    w = draw("gauss", (2, 512))
    w[0, :256], w[1, 32:64] = 0, 0
    for importance in (None, torch.zeros(512), torch.arange(512) % 2.0):
        back = dequantize_gguf(quantize_gguf(w, name, importance), name)
        assert back.isfinite().all()
        assert (back[0, :256] == 0).all()
        assert (back - w).abs().max() < 0.02


@pytest.mark.parametrize("name", K)
def test_numbers_that_lie_on_a_grid_are_kept(name):
    """A block whose groups are exact lines of the format itself comes back but for fp16's rounding of its scales."""
    w = dequantize_gguf(quantize_gguf(draw("gauss", (4, 256)), name), name)
    back = dequantize_gguf(quantize_gguf(w, name), name)
    assert (back - w).square().mean().sqrt() < 0.35 * rmse(draw("gauss", (4, 256)), name)


def test_search_finds_a_line_that_was_hidden():
    q = torch.randint(0, 16, (32, 50), generator=torch.Generator().manual_seed(0)).float()
    q[0], q[1] = 0, 15
    scale, offset = torch.rand(50) + 0.1, torch.rand(50)
    found, shift = search_line(q * scale - offset, torch.ones(32, 50), 15, (15.0,))
    torch.testing.assert_close(found, scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(shift, offset, rtol=1e-4, atol=1e-5)
    codes = torch.randint(-31, 32, (16, 50)).float()
    codes[0] = -32
    torch.testing.assert_close(search_scale(codes * scale, torch.ones(16, 50), -32, (-32.0,)), scale)


def test_an_offset_is_never_negative():
    """The format subtracts it, unsigned: of weights that are all positive the line must start at 0."""
    x = torch.rand(32, 200, generator=torch.Generator().manual_seed(0)) + 0.5
    scale, offset = search_line(x, torch.ones_like(x), 15, (14.0, 15.0, 16.0))
    assert (offset >= 0).all()
    assert ((x / scale[None]).round().clamp(0, 15) * scale - x).abs().max() < 0.1


def test_more_trials_never_hurt():
    x, w = torch.randn(32, 500), torch.ones(32, 500)

    def error(trials):
        scale, offset = search_line(x, w, 15, trials)
        q = ((x + offset) / scale).round().clamp(0, 15)
        return (q * scale - offset - x).square().sum()

    assert error([0.1 * n + 14.0 for n in range(21)]) < 0.95 * error([15.0])


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp's own quantizer comes with the xllamacpp wheel")
@pytest.mark.parametrize("kind", ["gauss", "student"])
@pytest.mark.parametrize("name", K)
def test_error_is_that_of_llama_cpp(name, kind):
    folder = find_spec("xllamacpp").submodule_search_locations[0]
    quantize = ctypes.CDLL(str(next(Path(folder).glob("*.so")))).ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    w, importance = draw(kind, (64, 1024)), torch.rand(1024).pow(3)
    for column_weights in (None, importance):
        theirs = torch.empty(64, 1024 // 256 * TYPES[name].bytes, dtype=torch.uint8)
        pointer = None if column_weights is None else column_weights.data_ptr()
        quantize(TYPES[name].number, w.data_ptr(), theirs.data_ptr(), 0, 64, 1024, pointer)
        counts = 1.0 if column_weights is None else column_weights
        error = ((dequantize_gguf(theirs, name) - w).square() * counts).mean().sqrt().item()
        assert rmse(w, name, column_weights, counts) < 1.04 * error


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(PunaError, match="Q4_K needs rows of a multiple of 256 weights, not 288") as error:
        quantize_gguf(torch.ones(2, 288), "Q4_K")
    assert "Q8_0" in error.value.hint
    with pytest.raises(PunaError, match="32 weights, not 40"):
        quantize_gguf(torch.ones(2, 40), "Q8_0")
    with pytest.raises(PunaError, match="'Q3_K' is not"):
        quantize_gguf(torch.ones(2, 256), "Q3_K")
    with pytest.raises(PunaError, match="35 bytes"):
        dequantize_gguf(torch.zeros(1, 35, dtype=torch.uint8), "Q8_0")
    for bad in (torch.ones(255), -torch.ones(256), torch.full((256,), float("nan"))):
        with pytest.raises(PunaError, match="importance"):
            quantize_gguf(torch.ones(2, 256), "Q4_K", bad)
