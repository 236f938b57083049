"""ops/packed_tiles.py, ops/native/tiles.*: products with rows rounded to int8 are those of the twin that rounds alike."""

from __future__ import annotations

import copy
import os
import pickle
import shutil

import pytest
import torch

from puna.base.console import PunaError
from puna.model.linear import QuantizedLinear, use_activations
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.scheme import INT8_TOKEN, Scheme
from puna.ops.native import tiles as native
from puna.ops.packed_linear import Product, choose, product_group
from puna.ops.packed_tiles import rounded
from puna.quant.config import parse_format

ROWS = (1, 2, 3, 4, 5, 8, 9, 17, 70)
FORMATS = [f"int{bits}{group}{asym}" for bits in (4, 8) for group in ("", "_g32", "_g96") for asym in ("", "_asym")]


@pytest.fixture(autouse=True)
def has_native():
    """The kernels must be there wherever they could have been built."""
    if not native.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here")
        pytest.fail("a C++ compiler is here, but the native kernels are not: pip install -e .")


@pytest.fixture(params=range(4), ids=native.LEVELS)
def level(request, monkeypatch):
    """Each instruction set that this processor has."""
    if request.param > native.best_level():
        pytest.skip(f"this processor has no {native.LEVELS[request.param]}")
    monkeypatch.setattr(native, "_level", request.param)


def quantized(scheme: str | Scheme, outputs: int = 37, inputs: int = 192, scales=torch.float16) -> QuantizedWeight:
    scheme = parse_format(scheme) if isinstance(scheme, str) else scheme
    return QuantizedWeight(round_to_nearest(torch.randn(outputs, inputs), scheme, scales))


def scattered(outputs: int = 37, inputs: int = 192) -> QuantizedWeight:
    """As GPTQ's act-order leaves it: every column has its group, and neighbours have others."""
    packed, order = quantized("int4_g32", outputs, inputs).packed, torch.randperm(inputs)
    codes = packed.codes()[:, order].contiguous()
    group_of_D = (torch.arange(inputs) // 32)[order].int()
    return QuantizedWeight(pack(codes, packed.scheme, packed.scales, None, group_of_D))


def in_tiles(weight: QuantizedWeight, bias=None, dtype=torch.float32) -> Product:
    product = choose(weight, dtype, "cpu", bias, "int8")
    assert product.name == "int8 activations"
    return product


def twin(weight: QuantizedWeight, x: torch.Tensor, bias=None) -> torch.Tensor:
    """In fp64, with x rounded as the kernel does."""
    y = rounded(x) @ weight.packed.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def assert_close(y: torch.Tensor, expected: torch.Tensor, limit: float = 2e-6) -> None:
    assert y.shape == expected.shape
    error = (y.double() - expected).abs().max().item()
    assert error <= limit * expected.abs().max().item(), error / expected.abs().max().item()


def rows(count: int, inputs: int = 192) -> torch.Tensor:
    """With outliers, and every row of another size."""
    x = torch.randn(count, inputs) * torch.linspace(0.1, 3, count)[:, None]
    x[:, 1::50] *= 10
    return x


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """The same numbers, stored the same way."""

    def parts(weight):
        packed = weight.packed
        return packed.data.view(torch.uint8), packed.scales, packed.zeros, packed.group_of_D

    equal = all((p is None and q is None) or torch.equal(p, q) for p, q in zip(parts(a), parts(b), strict=True))
    return equal and a.packed.scheme == b.packed.scheme and a.packed.scales.dtype is b.packed.scales.dtype


@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
@pytest.mark.parametrize("text", FORMATS)
def test_every_level_equals_the_twin(level, text, scales):
    weight, bias = quantized(text, scales=scales), torch.randn(37)
    product = in_tiles(weight, bias)
    for count in ROWS:
        x = rows(count)
        assert_close(product(x), twin(weight, x, bias))
    assert same(product.weight, weight)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (5, 31), (16, 32), (17, 131), (33, 513), (64, 4096)])
@pytest.mark.parametrize("text", ["int4", "int4_asym", "int8"])
def test_odd_shapes(level, text, outputs, inputs):
    weight = quantized(text, outputs, inputs)
    product = in_tiles(weight)
    for count in (1, 5):
        x = rows(count, inputs)
        assert_close(product(x), twin(weight, x))
    assert same(product.weight, weight)


@pytest.mark.parametrize(
    "scheme",
    [
        parse_format("int3_g32"),
        parse_format("int2_g64_asym"),
        parse_format("int5_asym"),
        Scheme(granularity="tensor"),
        Scheme(bits=4, granularity="block", group_size=32),
        Scheme(bits=8, symmetric=False, granularity="block", group_size=32),
    ],
)
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_other_formats_and_scales(scheme, scales):
    weight = quantized(scheme, 64, 192, scales)
    product, x = in_tiles(weight), rows(5)
    assert_close(product(x), twin(weight, x))
    assert same(product.weight, weight)


def test_all_codes_of_eight_bits_and_the_largest_numbers_fit():
    """No sum saturates: codes -128 and 127 with every number at the largest code."""
    for code in (-128, 127):
        packed = pack(torch.full((16, 4096), code, dtype=torch.int8), Scheme(), torch.ones(16, 1))
        for sign in (-1, 1):
            x = torch.full((3, 4096), sign * 127.0)
            for level in range(native.best_level() + 1):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(native, "_level", level)
                    y = in_tiles(QuantizedWeight(packed))(x)
                assert torch.equal(y, torch.full((3, 16), sign * 127.0 * code * 4096))


def test_codes_are_rounded_from_rounded_products(level):
    """Where x / d lies next to a half, one rounding (a fused multiply-add) gives another code than two."""
    x = torch.randn(200_000, 32)
    steps = torch.full((200_000, 1), 127.0) / x.abs().amax(1, keepdim=True)
    x = x[((x * steps).round() != (x.double() * steps.double()).round()).any(1)]
    assert len(x) > 0
    product = in_tiles(QuantizedWeight(pack(torch.ones(16, 32, dtype=torch.int8), Scheme(), torch.ones(16, 1))))
    assert_close(product(x), rounded(x).sum(1, keepdim=True).expand(-1, 16))


def test_columns_in_another_order():
    weight = scattered()
    product, x = in_tiles(weight), rows(5)
    order = weight.packed.group_of_D.long().argsort(stable=True)
    plain = weight.packed.dequantize(torch.float64)[:, order]
    assert_close(product(x), rounded(x[:, order]) @ plain.T)
    assert same(product.weight, weight)


@pytest.mark.parametrize("text", ["int4_g32_asym", "int4", "int8_g32"])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(level, text):
    weight = quantized(text, 1100, 192)
    product, x = in_tiles(weight), rows(70)
    together, before = product(x), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (*range(1, 9), 33):
                assert torch.equal(product(x[70 - count :]), together[70 - count :])
    finally:
        torch.set_num_threads(before)


def test_many_rows_and_wide_inputs_take_several_passes():
    """More panels than a cache holds, and enough numbers that several threads round them."""
    weight = quantized("int4_g32", 48, 8192)
    product, x = in_tiles(weight), torch.randn(50, 8192)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = product(x)
    finally:
        torch.set_num_threads(before)
    assert_close(together, twin(weight, x))
    assert torch.equal(torch.cat([product(row[None]) for row in x]), together)


@pytest.mark.parametrize("text", ["int4_g32", "int8"])
def test_distance_from_the_exact_product(text):
    """What rounding of x costs on normal data: 0.5 to 1 percent of a product's usual size."""
    weight, x = quantized(text, 256, 2048), torch.randn(32, 2048)
    exact = x.double() @ weight.packed.dequantize(torch.float64).T
    error = (in_tiles(weight)(x) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.003 < error < 0.01


def test_numbers_that_are_not_finite_or_next_to_nothing():
    weight = quantized("int4_g32")
    product, x = in_tiles(weight), rows(6)
    x[0, 40] = float("nan")
    x[1, 3] = float("inf")
    x[2, 64:96] = 0
    x[3] = 1e-40
    x[4] *= 1e-20
    y = product(x)
    assert y[:2].isnan().all()
    assert_close(y[2:3], twin(weight, x[2:3]))
    assert torch.equal(y[3], torch.zeros(37))
    assert_close(y[4:], twin(weight, x[4:]))
    assert_close(y[4:5], twin(weight, x[4:5]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_mins", [False, True])
def test_codes_with_scales_and_mins(level, bits, with_mins):
    """As llama.cpp's K blocks have them: weight = scale * code - min, in groups of 32."""
    codes = torch.randint(0, 16, (37, 192), dtype=torch.uint8)
    if bits == 8:
        codes = torch.randint(-128, 128, (37, 192), dtype=torch.int8)
    scales, mins, bias = torch.rand(37, 6) + 0.1, torch.rand(37, 6) if with_mins else None, torch.randn(37)
    weight = codes.double() * scales.double().repeat_interleave(32, 1)
    if mins is not None:
        weight -= mins.double().repeat_interleave(32, 1)
    tiles = native.TilesWeight.from_codes(codes, scales, mins, bits, bias)
    for count in (1, 3, 9):
        x = rows(count)
        assert_close(native.product([tiles], x)[0], rounded(x) @ weight.T + bias.double())


def test_a_group_of_products_is_the_products():
    products = [in_tiles(quantized(text, outputs), torch.randn(outputs)) for text, outputs in
                (("int4_g32", 37), ("int8", 16), ("int4_asym", 5))]  # fmt: skip
    products.append(in_tiles(scattered()))
    for count in (1, 9):
        x = rows(count)
        for one, alone in zip(product_group(products, x), [product(x) for product in products], strict=True):
            assert torch.equal(one, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides(dtype):
    weight = quantized("int4_g32")
    product = in_tiles(weight, dtype=dtype)
    x = rows(5).to(dtype)
    y = product(x)
    assert y.dtype is dtype
    assert_close(y, twin(weight, x.float()), 1e-2 if dtype is torch.bfloat16 else 1e-3)
    assert torch.equal(product(x.T.contiguous().T), y)
    assert torch.equal(product(torch.cat([x, x], 1)[:, :192]), y)
    assert product(x[:0]).shape == (0, 37)


def test_low_rank_and_gradient_are_as_without_rounding():
    packed = quantized("int4_g32").packed
    weight = QuantizedWeight(packed, up_NR=torch.randn(37, 2), down_RD=torch.randn(2, 192))
    product, x = in_tiles(weight), rows(5).requires_grad_()
    y = product(x)
    expected = twin(weight, x.detach()) + x.detach().double() @ (weight.up_NR @ weight.down_RD).double().T
    assert_close(y.detach(), expected, 1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(5, 192), rtol=1e-4, atol=1e-3)


def test_codes_are_held_once():
    weight = quantized("int4_g32", 64, 512)
    exact, rounding = choose(weight, torch.float32, "cpu"), in_tiles(weight)
    assert rounding.nbytes == exact.nbytes == 64 * 512 // 2 + 64 * 16 * 2
    assert rounding.bits_per_weight == exact.bits_per_weight == 4.5


def test_what_has_no_kernel_is_exact_and_says_so(monkeypatch):
    x = rows(3)
    for weight in (quantized("fp8"), quantized("int4_g16"), QuantizedWeight(quantized("int8").packed, INT8_TOKEN)):
        product, exact = choose(weight, torch.float32, "cpu", None, "int8"), choose(weight, torch.float32, "cpu")
        assert product.name == f"{exact.name} (exact)"
        assert torch.equal(product(x), exact(x))
    monkeypatch.setenv("PUNA_PACKED", "twin")
    assert choose(quantized("int4_g32"), torch.float32, "cpu", None, "int8").name == "twin (exact)"
    with pytest.raises(PunaError, match="no activations 'fp4'"):
        choose(quantized("int4_g32"), torch.float32, "cpu", None, "fp4")


def test_a_model_is_switched_and_back():
    weight = quantized("int4_g32")
    layer = QuantizedLinear(weight, torch.randn(37))
    model, x = torch.nn.Sequential(layer), rows(3)
    exact = model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_activations(model, "int8")
    assert layer.kernel == "int8 activations"
    assert_close(model(x), twin(weight, x, layer.bias))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16()):
        assert other[0].kernel == "int8 activations"
        assert same(other[0].weight, weight)
    model.load_state_dict(state)
    assert layer.kernel == "int8 activations"
    use_activations(model, "exact")
    assert torch.equal(model(x), exact)
