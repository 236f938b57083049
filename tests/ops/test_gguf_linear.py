"""ops/gguf_linear.py and formats/gguf_layer.py: whoever multiplies with llama.cpp's blocks, the numbers are the file's."""

from __future__ import annotations

import copy
import os
import pickle
import shutil

import pytest
import torch

from puna.base.console import PunaError
from puna.model.linear import QuantizedLinear, apply_all
from puna.ops.formats.gguf import TYPES, dequantize_gguf, quantize_gguf
from puna.ops.formats.gguf_layer import GgufWeight, from_blocks
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.gguf_linear import MOST_ROWS, choose, product_group
from puna.ops.native import ggufblocks as native
from puna.ops.native import library

BLOCKS = ("Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
PACKED = ("Q8_0", "Q4_0")
ROWS = (1, 2, 3, 7, MOST_ROWS, MOST_ROWS + 1, 150)


@pytest.fixture
def has_native():
    """The kernels must be there wherever they could have been built."""
    if not native.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here: " + library.load().reason)
        pytest.fail(f"a C++ compiler is here, but the native kernels are {library.load().reason}: pip install -e .")


@pytest.fixture
def level(request, monkeypatch, has_native):
    if request.param > library.load().level:
        pytest.skip(f"this processor has no {library.LEVELS[request.param]}")
    monkeypatch.setattr(native, "_native", library.load()._replace(level=request.param))


every_level = pytest.mark.parametrize("level", [0, 1, 2], indirect=True)


def blocks(type: str, outputs: int = 37, inputs: int = 512) -> GgufWeight:
    """Random bytes (every code, any scale), but with units that are ordinary numbers of both signs."""
    kind = TYPES[type]
    data = torch.randint(0, 256, (outputs, inputs // kind.weights, kind.bytes), dtype=torch.uint8)
    at = (
        slice(kind.bytes - 2, kind.bytes) if type == "Q6_K" else slice(0, 4 if type in BLOCKS and type != "Q5_0" else 2)
    )
    halves = torch.randn(outputs, inputs // kind.weights, (at.stop - at.start) // 2).half()
    data[..., at] = halves.contiguous().view(torch.uint8)
    return GgufWeight(data.view(outputs, -1), type, (outputs, inputs))


def exact(weight: GgufWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.dequantize().double().t()
    return y if bias is None else y + bias.double()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).abs().max() / expected.abs().max())


def widths(type: str) -> tuple[int, ...]:
    return (256, 512, 4352) if TYPES[type].weights == 256 else (32, 96, 544, 4128)


# --- the kernel -----------------------------------------------------------------------------------------------------


@every_level
@pytest.mark.parametrize("type", BLOCKS)
def test_the_kernel_reads_blocks_bit_for_bit(type, level) -> None:
    for width in widths(type):
        weight = blocks(type, 5, width)
        kernel = native.NativeBlocks(weight, None)
        assert torch.equal(native.dequantize(kernel, 0, 5), weight.dequantize())
        assert torch.equal(native.dequantize(kernel, 2, 4), weight.dequantize()[2:4])


@every_level
@pytest.mark.parametrize("type", BLOCKS)
def test_the_kernel_multiplies(type, level) -> None:
    """Within the order of an fp32 sum, and the same bits for any number of rows and threads."""
    for width in widths(type):
        weight, bias = blocks(type, 37, width), torch.randn(37)
        kernel, x = native.NativeBlocks(weight, bias), torch.randn(11, width)
        y = native.product([kernel], x)[0]
        assert error(y, exact(weight, x, bias)) < 1e-6
        for rows in (1, 2, 4, 7):
            assert torch.equal(native.product([kernel], x[:rows])[0], y[:rows])
        apart = torch.randn(11, 2 * width)
        apart[:, :width] = x
        assert torch.equal(native.product([kernel], apart[:, :width])[0], y)
        assert torch.equal(native.product([kernel], x.t().contiguous().t())[0], y)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # 37 rows of 4128 numbers and more are several shares
        assert torch.equal(native.product([kernel], x)[0], y)
        assert torch.equal(native.dequantize(kernel, 0, 37), weight.dequantize())
    finally:
        torch.set_num_threads(threads)


def test_several_products_at_once(has_native) -> None:
    weights = [blocks(type, n, 512) for type, n in (("Q4_K", 300), ("Q6_K", 7), ("Q5_1", 1), ("Q4_1", 64))]
    x = torch.randn(3, 512)
    kernels = [native.NativeBlocks(weight, None) for weight in weights]
    for y, kernel in zip(native.product(kernels, x), kernels, strict=True):
        assert torch.equal(y, native.product([kernel], x)[0])


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", PACKED)
def test_groups_under_one_scale_are_packed_without_loss(type, monkeypatch) -> None:
    monkeypatch.setattr("puna.ops.formats.gguf_layer._PIECE", 3 * 128)
    raw = blocks(type, 10, 128)
    weight = from_blocks(raw.data, type, raw.shape)
    assert isinstance(weight, QuantizedWeight)
    assert torch.equal(weight.dequantize(), dequantize_gguf(raw.data, type))
    assert weight.nbytes == raw.nbytes
    assert weight.packed.scales.dtype is torch.float16


@pytest.mark.parametrize("type", BLOCKS)
def test_others_stay_blocks(type) -> None:
    data = quantize_gguf(torch.randn(6, 256), type)
    weight = from_blocks(data, type, (6, 256))
    assert isinstance(weight, GgufWeight)
    assert weight.data is data
    assert (weight.nbytes, weight.bits_per_weight) == (data.numel(), 8 * data.numel() / (6 * 256))
    assert weight.dequantize(torch.bfloat16).dtype is torch.bfloat16


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", ["", "twin", "torch"])
@pytest.mark.parametrize("type", BLOCKS)
def test_every_kernel_computes_the_same(type, forced, monkeypatch) -> None:
    monkeypatch.setenv("PUNA_PACKED", forced)
    monkeypatch.setattr("puna.ops.gguf_linear.PIECE", 5 * 512)
    weight, bias = blocks(type), torch.randn(37)
    product = choose(weight, torch.float32, "cpu", bias)
    usual = "native, dequantize" if native.available() else "dequantize"
    assert product.name == {"": usual, "twin": "twin", "torch": "dequantize"}[forced]
    assert product.nbytes == weight.nbytes + bias.nbytes
    for rows in ROWS:
        x = torch.randn(rows, 512)
        assert error(product(x), exact(weight, x, bias)) < 3e-6
    for dtype, most in ((torch.float64, 1e-14), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
        for rows in (1, 40):
            x = (torch.randn(rows, 512) * 0.01).to(dtype)
            y = product(x)
            assert y.dtype is dtype
            assert error(y, exact(weight, x, bias)) < most
    assert product(torch.randn(2, 3, 512)).shape == (2, 3, 37)
    assert product(torch.randn(0, 512)).shape == (0, 37)


def test_forced_kinds_that_do_not_exist(monkeypatch) -> None:
    monkeypatch.setenv("PUNA_PACKED", "fast")
    with pytest.raises(PunaError, match="PUNA_PACKED is 'fast'"):
        choose(blocks("Q4_K"), torch.float32, "cpu")


@pytest.mark.parametrize("rows", [2, 60])
def test_gradients_reach_the_input(rows, monkeypatch) -> None:
    monkeypatch.setattr("puna.ops.gguf_linear.PIECE", 5 * 512)
    weight = blocks("Q5_K")
    x = torch.randn(rows, 512, requires_grad=True)
    g = torch.randn(rows, 37)
    choose(weight, torch.float32, "cpu")(x).backward(g)
    assert x.grad is not None
    assert error(x.grad, g.double() @ weight.dequantize().double()) < 1e-6


def test_groups_of_products() -> None:
    """All blocks, all packed, and a mix of both; few rows and many."""
    raw = {type: from_blocks(blocks(type).data, type, (37, 512)) for type in ("Q4_K", "Q6_K", "Q8_0", "Q4_0")}
    for types in (("Q4_K", "Q6_K"), ("Q8_0", "Q4_0"), ("Q4_K", "Q8_0")):
        products = [choose(raw[type], torch.float32, "cpu") for type in types]
        for x in (torch.randn(3, 512), torch.randn(3, 512).bfloat16(), torch.randn(40, 512)):
            for y, product in zip(product_group(products, x), products, strict=True):
                assert y.dtype is x.dtype
                assert torch.equal(y, product(x))


def test_copies_and_pickles() -> None:
    product = choose(blocks("Q6_K"), torch.float32, "cpu", torch.randn(37))
    x = torch.randn(2, 512)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert other.weight.data.data_ptr() != product.weight.data.data_ptr()
        assert torch.equal(other(x), product(x))


# --- the layer ------------------------------------------------------------------------------------------------------


def test_a_layer_of_blocks() -> None:
    weight, bias = blocks("Q4_K"), torch.randn(37)
    layer, x = QuantizedLinear(weight, bias), torch.randn(3, 512)
    assert layer.weight.data is weight.data
    assert "4.50 bits" in repr(layer)
    assert list(layer.state_dict()) == ["data", "bias"]
    other = QuantizedLinear(blocks("Q4_K"))
    for y, single in zip(apply_all((layer, other), x), (layer, other), strict=True):
        assert torch.equal(y, single(x))
    other = QuantizedLinear(blocks("Q4_K"), torch.zeros(37))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    layer.rechoose("int8")
    assert torch.equal(layer(x), other(x))  # blocks have exact kernels only
    assert layer.to(torch.bfloat16).product.dtype is torch.bfloat16
    assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_without_native_kernels(monkeypatch) -> None:
    monkeypatch.setattr(native, "_PRODUCT", None)
    weight = blocks("Q4_K")
    product, x = choose(weight, torch.float32, "cpu"), torch.randn(3, 512)
    assert product.name == "dequantize"
    assert error(product(x), exact(weight, x)) < 1e-6
