"""ops/linear.py: the native kernel, oneDNN and F.linear give the same product; gradients and tracers are left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from puna.ops import linear as ops
from puna.ops.native import library


def gemv(x, weight, bias=None):
    """The native product of one weight."""
    return ops._gemv(x, [(weight, bias)])[0]


DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def native():
    """The native kernel must be there wherever it could have been built."""
    if not library.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here: " + library.load().reason)
        pytest.fail(f"a C++ compiler is here, but the native kernels are {library.load().reason}: pip install -e .")


@pytest.fixture
def level(request, monkeypatch):
    if request.param > library.load().level:
        pytest.skip(f"this processor has no {library.LEVELS[request.param]}")
    monkeypatch.setattr(ops, "_native", library.load()._replace(level=request.param))


def every_level(test):
    return pytest.mark.usefixtures("native")(pytest.mark.parametrize("level", [0, 1, 2], indirect=True)(test))


def draw(rows, columns, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((rows, width), (columns, width), (columns,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def assert_rounded(y, x, weight, bias=None):
    """Within the rounding of fp32 summation (error grows with sum |x w|), plus half a step of the output's dtype."""
    x, weight = x.double(), weight.double()
    exact, magnitude = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    summation = magnitude * 2**-24 * (8 + x.shape[-1] / 16)
    step = exact.abs() * (2**-8 if y.dtype == torch.bfloat16 else 2**-23)
    assert ((y.double() - exact).abs() <= summation * 1.01 + step).all()


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 31, 32, 64, 100, 768, 2049])
@pytest.mark.parametrize("columns", [1, 3, 17, 1000])
def test_gemv_equals_the_exact_product(level, dtype, width, columns):
    x, weight, bias = draw(8, columns, width, dtype)
    for rows in range(1, 9):
        assert_rounded(gemv(x[:rows], weight, None), x[:rows], weight)
        assert_rounded(gemv(x[:rows], weight, bias), x[:rows], weight, bias)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "width"), [(17, 100), (1001, 768)])
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(level, dtype, columns, width):
    x, weight, bias = draw(8, columns, width, dtype)
    together = gemv(x, weight, bias)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in range(1, 9):
                assert torch.equal(gemv(x[8 - rows :], weight, bias), together[8 - rows :])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("native")
def test_output_rounds_like_torch():
    """Ties go to even, and infinities and nan stay what they are: one column of weight one copies x through fp32."""
    values = [1.0, 1 + 2**-7, 3.3895e38, float("inf"), -float("inf"), float("nan"), 1e-40, -0.0]
    bias = torch.tensor(values).bfloat16()
    small = torch.tensor([2**-8, -(2**-8), 2**125, 0, 0, 0, 0, 0]).bfloat16()  # added in fp32, so ties do occur
    y = gemv(torch.ones(1, 1, dtype=torch.bfloat16), small[:, None].contiguous(), bias)
    expected = (bias.float() + small.float()).bfloat16()[None]
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_outside_the_arrays(dtype):
    """Nan all around the arrays would show in the sums."""
    for width in (1, 33, 100):
        x, weight, _ = draw(3, 5, width, dtype)
        padded = [F.pad(t.flatten(), (64, 64), value=float("nan"))[64:-64].view(t.shape) for t in (x, weight)]
        assert torch.equal(gemv(*padded, None), gemv(x, weight, None))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape_and_stride_of_x(dtype):
    x, weight, bias = draw(8, 5, 64, dtype)
    plain = ops.linear(x, weight, bias)
    assert torch.equal(ops.linear(x.view(2, 4, 64), weight, bias), plain.view(2, 4, 5))
    assert torch.equal(ops.linear(x[0], weight, bias), plain[0])
    assert torch.equal(ops.linear(torch.cat([x, x], 1)[:, 64:], weight, bias), plain)
    assert torch.equal(ops.linear(x.t().contiguous().t(), weight, bias), plain)
    assert torch.equal(ops.linear(x[:1].expand(4, 64), weight, bias), plain[:1].expand(4, 5))
    assert ops.linear(x[:0], weight, bias).shape == (0, 5)
    with pytest.raises(RuntimeError):
        ops.linear(x[:, :63], weight)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_a_group_is_each_of_its_products(dtype, rows):
    x, first, bias = draw(rows, 700, 96, dtype)
    weights, biases = [first, draw(1, 5, 96, dtype)[1], draw(1, 1000, 96, dtype)[1]], [bias, None, None]
    together = ops.linear_group(x, weights, biases)
    for y, weight, b in zip(together, weights, biases, strict=True):
        assert torch.equal(y, ops.linear(x, weight, b))


def test_a_group_that_learns_has_gradients():
    x, weight, bias = draw(2, 7, 16, torch.float32)
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    sum(y.sum() for y in ops.linear_group(x, weights, [None, bias])).backward()
    assert all(torch.allclose(w.grad, x.sum(0).expand(7, 16)) for w in weights)


def test_decoding_takes_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "_gemv", lambda x, pairs: calls.append(1) or [F.linear(x, *pair) for pair in pairs])
    x, weight, _ = draw(9, 5, 64, torch.float32)
    parameter = torch.nn.Parameter(weight)
    ops.linear(x[:8], weight)
    assert len(calls) == 1
    with torch.no_grad():
        ops.linear(x[:1], parameter)
    with torch.inference_mode():
        ops.linear(x[:1].bfloat16(), weight.bfloat16())
    assert len(calls) == 3
    ops.linear(x, weight)  # nine rows
    ops.linear(x[:1], parameter)  # autograd
    ops.linear(x[:1].half(), weight.half())  # another dtype
    ops.linear(x[:1], weight[:, ::2].contiguous().repeat(1, 2)[:, ::1].t().contiguous().t())  # weight not contiguous
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x[:1], weight).dtype == torch.bfloat16
    assert len(calls) == 3


def test_those_who_watch_see_a_plain_linear():
    x, weight, _ = draw(16, 5, 64, torch.float32)
    for rows in (1, 16):
        with FlopCounterMode(display=False) as flops:
            ops.linear(x[:rows], weight)
        assert flops.get_total_flops() == 2 * rows * 5 * 64
        assert torch.allclose(
            torch.func.vmap(ops.linear, (0, None))(x[:rows, None], weight)[:, 0], x[:rows] @ weight.t()
        )
        _, tangent = torch.func.jvp(lambda v: ops.linear(v, weight), (x[:rows],), (x[:rows],))
        assert torch.allclose(tangent, x[:rows] @ weight.t(), atol=1e-5)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x[:rows], x[:rows])
            assert forward_ad.unpack_dual(ops.linear(dual, weight)).tangent is not None
        assert ops.linear(x[:rows].to("meta"), weight.to("meta")).shape == (rows, 5)
        traced = torch.jit.trace(lambda v: ops.linear(v, weight), x[:rows], check_trace=False)
        assert torch.allclose(traced(2 * x[:rows]), 2 * x[:rows] @ weight.t(), atol=1e-5)
        compiled = torch.compile(ops.linear, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x[:rows], weight), x[:rows] @ weight.t(), atol=1e-5)
        torch.compiler.reset()
    with FakeTensorMode() as mode:
        assert ops.linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (16, 5)


@pytest.mark.parametrize("shape", [(1, 64), (16, 64), (2, 12, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("columns", [24, 17000])
def test_gradients_equal_those_of_f_linear(shape, with_bias, columns):
    results = []
    for product in (ops.linear, F.linear):
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (
            torch.randn(s, generator=generator).requires_grad_() for s in (shape, (columns, 64), (columns,))
        )
        y = product(x, weight, bias if with_bias else None)
        for _ in range(2):  # twice: gradients add up
            (y * y).mean().backward(retain_graph=True)
        y.sum().backward()  # a gradient with stride 0
        results.append([y.detach(), x.grad, weight.grad, *([bias.grad] if with_bias else [])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_second_derivatives_and_frozen_weights():
    x, weight, _ = draw(16, 8, 4, torch.float32)
    x.requires_grad_()
    (first,) = torch.autograd.grad(ops.linear(x, weight).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected,) = torch.autograd.grad(F.linear(x, weight).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0])
    assert weight.grad is None


@pytest.mark.skipif(not ops._is_amd(), reason="oneDNN is chosen on AMD processors only")
def test_onednn_is_taken_on_amd(monkeypatch):
    x, weight, _ = draw(16, 8, 64, torch.float32)
    assert type(ops.linear(x, weight.requires_grad_()).grad_fn).__name__ == "_OneDNNBackward"
    monkeypatch.setattr(ops, "_onednn", lambda: None)
    assert type(ops.linear(x, weight).grad_fn).__name__ != "_OneDNNBackward"


def test_puna_native_0_turns_the_kernels_off():
    code = (
        "import torch; from puna.ops import linear as ops; from puna.ops.native import library;"
        "assert not library.available() and not ops._GEMV and 'PUNA_NATIVE' in ops.describe();"
        "x = torch.ones(1, 3); assert ops.linear(x, torch.ones(2, 3)).tolist() == [[3.0, 3.0]]"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PUNA_NATIVE": "0"}, check=True)


def test_a_missing_or_broken_library_says_why(monkeypatch, tmp_path):
    fresh = library.load.__wrapped__
    monkeypatch.setenv("PUNA_NATIVE", "1")
    monkeypatch.setattr(library, "PATH", tmp_path / "_kernels.so")
    assert fresh().kernels is None
    assert "C++ compiler" in fresh().reason
    library.PATH.write_bytes(b"not a library")
    assert fresh().kernels is None
    assert "not loadable" in fresh().reason
