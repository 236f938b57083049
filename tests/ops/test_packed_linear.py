"""ops/packed_linear.py: whoever computes it, the product with a quantized weight is its twin's."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from puna.base.console import PunaError
from puna.ops import packed_kernels, packed_linear
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import pack, round_to_nearest
from puna.ops.formats.scheme import FLOAT8_TENSOR, FLOAT8_TOKEN, INT8, INT8_TOKEN, Scheme
from puna.ops.native import library
from puna.ops.native import packed as native
from puna.ops.packed_linear import choose, product_group
from puna.quant.config import parse_format

ROWS = (1, 3, 8, 9, 64)
INTEGERS = [
    f"int{bits}{group}{asym}" for bits in (8, 4) for group in ("", "_g16", "_g32", "_g128") for asym in ("", "_asym")
]
OTHERS = ["int4_g48", "int2_g32", "int3_g128", "int3_asym", "int5_g32_asym", "int7", "fp8", "fp8_tensor", "fp8_b32"]
INT8_STATIC = Scheme(granularity="tensor")


@pytest.fixture
def has_native():
    """The kernels must be there wherever they could have been built."""
    if not native.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here: " + native.reason())
        pytest.fail(f"a C++ compiler is here, but the native kernels are {native.reason()}: pip install -e .")


@pytest.fixture
def level(request, monkeypatch, has_native):
    if request.param > library.load().level:
        pytest.skip(f"this processor has no {library.LEVELS[request.param]}")
    monkeypatch.setattr(native, "_native", library.load()._replace(level=request.param))


every_level = pytest.mark.parametrize("level", [0, 1, 2], indirect=True)


@pytest.fixture(autouse=True)
def _measure_anew(monkeypatch):
    monkeypatch.setattr(packed_linear, "_CHOSEN", {})


def quantized(text: str, outputs: int = 32, inputs: int = 384, scales=torch.float16, **more) -> QuantizedWeight:
    packed = round_to_nearest(torch.randn(outputs, inputs), parse_format(text), scales)
    return QuantizedWeight(packed, **more)


def scattered(text: str, outputs: int = 32, inputs: int = 384, **more) -> QuantizedWeight:
    """As GPTQ's act-order leaves it: every column has its group, and neighbours have others."""
    packed = quantized(text, outputs, inputs).packed
    order = torch.randperm(inputs)
    group_of_D = (torch.arange(inputs) // packed.scheme.group_size)[order].int()
    codes = packed.codes()[:, order].contiguous()
    return QuantizedWeight(pack(codes, packed.scheme, packed.scales, packed.zeros, group_of_D), **more)


def rows(count: int, inputs: int = 384, dtype=torch.float32) -> torch.Tensor:
    """With outliers, and every row of another size."""
    x = torch.randn(count, inputs) * torch.linspace(0.1, 3, count)[:, None]
    x[:, 1::50] *= 10
    return x.to(dtype)


def assert_twin(weight: QuantizedWeight, dtype=torch.float32, bias=None, **limits) -> packed_linear.Product:
    product = choose(weight, dtype, "cpu", bias)
    for count in ROWS:
        x = rows(count, weight.shape[1], dtype)
        y, expected = product(x), weight.product(x, bias)
        assert y.dtype is dtype
        assert y.shape == expected.shape
        most = expected.abs().max().item()
        error = (y.double() - expected.double()).abs().max().item()
        # fp32: rounding of a sum in another order. bf16: weights or scales may be rounded to 8 bits of mantissa.
        assert error <= most * (2e-6 if dtype is torch.float32 else 1.5e-2), (count, product.name, error / most)
    return product


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """The same numbers, stored the same way."""

    def parts(weight):
        packed = weight.packed
        return [packed.data.view(torch.uint8), packed.scales, packed.zeros, packed.group_of_D, weight.input_scale,
                weight.up_NR, weight.down_RD]  # fmt: skip

    equal = all((p is None and q is None) or torch.equal(p, q) for p, q in zip(parts(a), parts(b), strict=True))
    return equal and a.packed.scheme == b.packed.scheme and a.shape == b.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", INTEGERS + OTHERS)
def test_every_format_equals_its_twin(text, dtype):
    weight = quantized(text)
    product = assert_twin(weight, dtype, torch.randn(32))
    assert same(product.weight, weight)


@every_level
@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", [*INTEGERS, "fp8", "fp8_tensor", "fp8_b32"])
def test_every_native_level_equals_the_twin(level, text, scales, monkeypatch):
    monkeypatch.setenv("PUNA_PACKED", "native")
    weight = quantized(text, 32, 256, scales)
    product = choose(weight, torch.float32, "cpu")
    assert product.kernels[0].name == "native"
    for count in (1, 2, 3, 7, 8):
        x = rows(count, 256)
        torch.testing.assert_close(product(x), weight.product(x), rtol=1e-5, atol=2e-4)
    numbers = native.dequantize(product.kernels[0].plain, 3, 32, torch.float32)
    assert torch.equal(numbers, weight.packed.dequantize()[3:])
    halves = native.dequantize(product.kernels[0].plain, 3, 32, torch.bfloat16)
    assert torch.equal(halves, weight.packed.dequantize(torch.bfloat16)[3:])


@every_level
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (5, 31), (2, 33), (7, 100), (17, 131), (33, 513)])
def test_odd_shapes(level, outputs, inputs):
    for text in ("int4", "int4_asym", "int8", "int8_asym", "fp8", "int3"):
        assert assert_twin(quantized(text, outputs, inputs), bias=torch.randn(outputs)).kernels[0].name == "native"


@every_level
@pytest.mark.parametrize("text", ["int4_g32_asym", "int8", "fp8"])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(level, text):
    weight = quantized(text, 333, 384)
    product, x = choose(weight, torch.float32, "cpu"), rows(8)
    together = product(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in range(1, 9):
                assert torch.equal(product(x[8 - count :]), together[8 - count :])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["int8", "int4_g32", "fp8"])
@pytest.mark.parametrize("activations", ["int8", "fp8", "int8_static", "fp8_static", "outliers"])
def test_rounded_inputs_equal_the_twins(text, activations, dtype):
    scheme = {"int8": INT8_TOKEN, "fp8": FLOAT8_TOKEN, "int8_static": INT8_STATIC, "fp8_static": FLOAT8_TENSOR}
    scale = torch.tensor([0.02]) if activations.endswith("static") else None
    threshold = 6.0 if activations == "outliers" else 0.0
    weight = quantized(text, activations=scheme.get(activations, INT8_TOKEN), input_scale=scale, threshold=threshold)
    assert_twin(weight, dtype)


@pytest.mark.parametrize("forced", ["", "twin", "torch", "native"])
@pytest.mark.parametrize("activations", [None, INT8_TOKEN])
def test_low_rank_comes_on_top_of_rounded_inputs(forced, activations, monkeypatch, has_native):
    monkeypatch.setenv("PUNA_PACKED", forced)
    low = {"up_NR": torch.randn(32, 5), "down_RD": torch.randn(5, 384)}
    weight = quantized("int8", activations=activations, **low)
    assert same(assert_twin(weight, bias=torch.randn(32)).weight, weight)
    assert_twin(weight, torch.bfloat16)


@pytest.mark.parametrize("forced", ["", "twin", "torch", "native"])
@pytest.mark.parametrize("text", ["int3_g32", "int4_g32", "int4_g32_asym", "int8_g32", "int4_g48"])
def test_scattered_groups(text, forced, monkeypatch, has_native):
    monkeypatch.setenv("PUNA_PACKED", forced)
    weight = scattered(text, activations=INT8_TOKEN)
    assert same(assert_twin(weight).weight, weight)
    uneven = dataclasses.replace(weight.packed, group_of_D=weight.packed.group_of_D.clamp(max=3))
    assert_twin(dataclasses.replace(weight, packed=uneven))


@pytest.mark.parametrize("name", ["native", "dequantize", "integer"])
def test_kernels_one_by_one(name, has_native):
    """The measurement may never choose one of them here: each is asked for by name."""
    weight = quantized("int8", activations=INT8_TOKEN, threshold=6.0)
    stored, bias = packed_kernels.store(weight.packed), torch.randn(32)
    kernels = packed_linear._candidates(stored, weight, bias, torch.float32, "")
    kernel = next(kernel for kernel in kernels if kernel.name == name)
    for count in ROWS:
        x = rows(count)
        torch.testing.assert_close(kernel(x, torch.float32), weight.product(x, bias), rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize(("text", "name"), [("int8", "torch_int8"), ("int8", "bfloat16"), ("int4_g32", "bfloat16")])
def test_kernels_for_bf16_one_by_one(text, name, has_native):
    weight = quantized(text)
    stored, bias = packed_kernels.store(weight.packed), torch.randn(32)
    kernels = packed_linear._candidates(stored, weight, bias, torch.bfloat16, "")
    kernel = next(kernel for kernel in kernels if kernel.name == name)
    x = rows(9, dtype=torch.bfloat16)
    y, expected = kernel(x, torch.bfloat16).float(), weight.product(x, bias).float()
    assert ((y - expected).abs().max() / expected.abs().max()) < 1.5e-2


@pytest.mark.parametrize("text", ["int4_g32", "int4_g32_asym", "int4_g128"])
def test_torchs_int4_packing_is_the_only_copy(text, monkeypatch):
    monkeypatch.setenv("PUNA_PACKED", "torch")
    weight = quantized(text, 48, 384)
    product = assert_twin(weight, torch.bfloat16)
    assert product.name == "torch_int4"
    assert same(product.weight, weight)
    assert product.nbytes < 1.4 * weight.nbytes
    x = rows(3).requires_grad_()
    product(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("forced", ["torch", "native"])
@pytest.mark.parametrize("text", ["int4_g32_asym", "int8", "fp8_tensor", "fp8_b32", "int3_g48"])
def test_a_weight_of_many_pieces(text, forced, monkeypatch, has_native):
    monkeypatch.setenv("PUNA_PACKED", forced)
    monkeypatch.setattr(packed_kernels, "PIECE", 20 * 384)
    weight = quantized(text, 96)
    product = assert_twin(weight, bias=torch.randn(96))
    kernel = next(k for k in product.kernels[::-1] if k.name == "dequantize")
    assert len(kernel.pieces(9)) in (3, 6)
    x, g = rows(9).requires_grad_(), torch.randn(9, 96)
    product(x).backward(g)
    torch.testing.assert_close(x.grad, g @ weight.dequantize(), rtol=1e-4, atol=1e-4)


def test_an_fp32_model_gets_exact_kernels_only():
    for text in ("int8", "int4_g32", "int4_g128_asym", "fp8"):
        for forced in ("", "torch"):
            os.environ["PUNA_PACKED"] = forced
            try:
                names = set(choose(quantized(text), torch.float32, "cpu").name.split(", "))
            finally:
                del os.environ["PUNA_PACKED"]
            assert names <= {"native", "dequantize", "integer"}


def test_what_is_held():
    for text, limit in (("int8", 1.01), ("int4_g32", 1.01), ("fp8", 1.01), ("int3_g128", 1.36)):
        weight = quantized(text, 64, 1024)
        product = choose(weight, torch.float32, "cpu")
        assert weight.nbytes <= product.nbytes < limit * weight.nbytes
        assert product.bits_per_weight == weight.bits_per_weight


def test_gradient_reaches_x_through_the_weight():
    low = {"up_NR": torch.randn(32, 5), "down_RD": torch.randn(5, 384)}
    for weight in (quantized("int4_g32_asym", **low), scattered("int3_g32"), quantized("int8", activations=INT8_TOKEN)):
        product = choose(weight, torch.float32, "cpu")
        for count in (2, 40):
            x, g = rows(count).requires_grad_(), torch.randn(count, 32)
            product(x).backward(g)
            torch.testing.assert_close(x.grad, g @ weight.dequantize(), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert product(x).grad_fn is None


def test_any_shape_and_stride_of_x():
    weight = quantized("int4_g32", 8, 64)
    product, x = choose(weight, torch.float32, "cpu", torch.randn(8)), rows(6, 64)
    plain = product(x)
    torch.testing.assert_close(product(x.view(2, 3, 64)), plain.view(2, 3, 8))
    torch.testing.assert_close(product(x[0]), plain[0])
    torch.testing.assert_close(product(torch.cat([x, x], 1)[:, 64:]), plain)
    torch.testing.assert_close(product(x.t().contiguous().t()), plain)
    assert product(x[:0]).shape == (0, 8)
    assert product(x[:0].view(0, 3, 64)).shape == (0, 3, 8)
    torch.testing.assert_close(product(x.double()).float(), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(x.half()).float(), plain, rtol=1e-2, atol=1e-1)
    with pytest.raises(AssertionError, match="63 inputs"):
        product(x[:, :63])


def test_bad_numbers_are_seen():
    product = choose(quantized("int8", activations=INT8_TOKEN), torch.float32, "cpu")
    x = rows(2)
    x[1, 5] = float("nan")
    y = product(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("count", [1, 8, 9])
def test_a_group_is_each_of_its_products(count, has_native):
    texts = ("int4_g32", "int4_g32", "int8_asym", "fp8")
    weights = [quantized(text, 20 + i, activations=INT8_TOKEN if i == 2 else None) for i, text in enumerate(texts)]
    products = [choose(weight, torch.float32, "cpu", torch.randn(weight.shape[0])) for weight in weights]
    products[1:1] = [choose(scattered("int4_g32", 9), torch.float32, "cpu")]
    x = rows(count)
    for some in (products[:4], products[1:5], products, products[:1]):
        for y, product in zip(product_group(some, x), some, strict=True):
            assert torch.equal(y, product(x))


def test_a_group_of_native_products_is_one_call(monkeypatch, has_native):
    products = [choose(quantized("int4_g32"), torch.float32, "cpu") for _ in range(3)]
    calls = []
    real = native.product
    monkeypatch.setattr(native, "product", lambda weights, x, out: calls.append(len(weights)) or real(weights, x, out))
    product_group(products, rows(1))
    assert calls == [3]
    product_group(products, rows(1).requires_grad_())
    assert calls == [3, 1, 1, 1]


def test_copies_and_pickles_stand_alone():
    for weight in (quantized("int4_g32_asym"), scattered("int3_g32")):
        product, x = choose(weight, torch.float32, "cpu", torch.randn(32)), rows(4)
        copies = [copy.deepcopy(product), pickle.loads(pickle.dumps(product))]
        expected = product(x)
        weight.packed.data.zero_()  # what came in may change or go
        product.weight.packed.data.zero_()
        for other in copies:
            assert torch.equal(other(x), expected)


def test_those_who_watch_get_the_twin():
    weight, x = quantized("int4_g32", 8, 64), rows(3, 64)
    product = choose(weight, torch.float32, "cpu")
    compiled = torch.compile(lambda rows: product(rows), backend="aot_eager")
    torch.testing.assert_close(compiled(x), weight.product(x), rtol=1e-5, atol=1e-4)
    torch.compiler.reset()
    torch.testing.assert_close(torch.func.vmap(product)(x[:, None])[:, 0], weight.product(x), rtol=1e-5, atol=1e-4)
    with torch.device("meta"):
        empty = QuantizedWeight(
            dataclasses.replace(weight.packed, data=torch.empty(8, 8, dtype=torch.int32), scales=torch.empty(8, 2))
        )
    on_meta = choose(empty, torch.float32, "meta")
    assert on_meta.name == "twin"
    assert on_meta(torch.empty(3, 64, device="meta")).shape == (3, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert product(mode.from_tensor(x)).shape == (3, 8)


def test_measured_once_for_weights_of_a_kind(monkeypatch, has_native):
    measured = []
    real = packed_linear._measure
    monkeypatch.setattr(packed_linear, "_measure", lambda *a: measured.append(a[1]) or real(*a))
    for _ in range(3):
        choose(quantized("int8"), torch.float32, "cpu")
    assert measured == [most for _, most in packed_linear.CLASSES]
    choose(quantized("int8"), torch.bfloat16, "cpu")
    assert len(measured) == 6


def test_the_fastest_is_taken(monkeypatch):
    class Fake:
        def __init__(self, name):
            self.name = name

    seconds = {"a": 1.0, "b": 0.95, "c": 0.8}
    monkeypatch.setattr(packed_linear, "_seconds", lambda kernel, x: seconds[kernel.name])
    names = "abc"
    assert packed_linear._measure([Fake(n) for n in names], 16, 4, torch.float32) == "c"
    assert packed_linear._measure([Fake(n) for n in names[:2]], 16, 4, torch.float32) == "a"  # no tenth faster


def test_forcing(monkeypatch, has_native):
    weight = quantized("int4_g32")
    for forced, name in (("twin", "twin"), ("torch", "dequantize"), ("native", "native, dequantize")):
        monkeypatch.setenv("PUNA_PACKED", forced)
        assert assert_twin(weight).name == name
    monkeypatch.setenv("PUNA_PACKED", "cuda")
    with pytest.raises(PunaError, match="'cuda'"):
        choose(weight, torch.float32, "cpu")
    monkeypatch.setenv("PUNA_PACKED", "native")
    monkeypatch.setattr(native, "_native", library.Library(None, 0, "gone"))
    with pytest.raises(PunaError, match="gone"):
        choose(weight, torch.float32, "cpu")


def test_without_native_kernels():
    code = (
        "import torch; from puna.ops.formats.packed import round_to_nearest; from puna.ops.formats.scheme import INT4\n"
        "from puna.ops.formats.layer import QuantizedWeight; from puna.ops.packed_linear import choose\n"
        "weight = QuantizedWeight(round_to_nearest(torch.randn(16, 256), INT4)); x = torch.randn(3, 256)\n"
        "product = choose(weight, torch.float32, 'cpu'); assert product.name == 'dequantize', product.name\n"
        "assert (product(x) - weight.product(x)).abs().max() < 1e-4\n"
        "assert choose(weight, torch.bfloat16, 'cpu').name == 'torch_int4'\n"
    )
    env = os.environ | {"PUNA_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)


def test_nothing_at_all():
    weight = QuantizedWeight(round_to_nearest(torch.randn(0, 8), INT8))
    assert choose(weight, torch.float32, "cpu")(torch.randn(2, 8)).shape == (2, 0)
