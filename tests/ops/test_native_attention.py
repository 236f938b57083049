"""ops/native/attention: the kernel equals `attention_twin` in fp64, forward and backward, and steps aside when it must."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from puna.ops.attention import PackedCausal, attention_twin
from puna.ops.native import attention as native
from puna.ops.native import library

ODD_LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 200]


@pytest.fixture(autouse=True)
def kernel():
    """The kernel must be there wherever it could have been built."""
    if not library.available():
        if os.environ.get("PUNA_NATIVE") == "0" or not any(map(shutil.which, ("c++", "g++", "clang++"))):
            pytest.skip("no native kernels here: " + library.load().reason)
        pytest.fail(f"a C++ compiler is here, but the native kernels are {library.load().reason}: pip install -e .")


@pytest.fixture(params=[0, 1, 2])
def level(request, monkeypatch):
    if request.param > library.load().level:
        pytest.skip(f"this processor has no {library.LEVELS[request.param]}")
    monkeypatch.setattr(native, "_native", library.load()._replace(level=request.param))


class Subclass(torch.Tensor):
    """Stands for DTensor and its like."""


def draw(tokens, heads=4, groups=2, width=32, seed=0):
    """q, k, v and a direction for the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, width), (tokens, groups, width), (tokens, groups, width), (tokens, heads, width))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def ours(lengths, q, k, v, direction, window=None):
    """Output and the gradients of q, k, v; the kernel must have computed them."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = PackedCausal.of(lengths)(0, *leaves, window)
    assert type(out.grad_fn).__name__ == "_AttentionBackward"
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def exact(lengths, q, k, v, direction, window=None):
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    out = attention_twin(*leaves, document, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.double())]


def assert_near(lengths, q, k, v, direction, window=None, bound=3e-6):
    """Each of the four within `bound` of its largest value (or of 1, which the inputs are about), everywhere."""
    for result, expected in zip(
        ours(lengths, q, k, v, direction, window), exact(lengths, q, k, v, direction, window), strict=True
    ):
        assert result.shape == expected.shape
        assert (result.double() - expected).abs().max() <= bound * expected.abs().max().clamp(
            min=1
        )  # false for nan, too


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_odd_lengths(length):
    assert_near([length], *draw(length))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("width", [2, 8, 16, 30, 32, 64, 80, 128, 256])
def test_head_widths(width):
    assert_near([70, 3], *draw(73, width=width))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("window", [1, 2, 7, 16, 17, 63, 64, 65, 100, 199, 200, 1000])
def test_windows(window):
    assert_near([200, 5], *draw(205, width=16), window)


@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_query_heads_share_a_key_head(sharing, groups):
    assert_near([40, 100], *draw(140, groups * sharing, groups))


def test_many_documents_of_any_length():
    lengths = ODD_LENGTHS + [3] * 40 + ODD_LENGTHS[::-1]
    assert_near(lengths, *draw(sum(lengths), width=16))
    assert_near([4, 0, 5], *draw(9))


@pytest.mark.parametrize("window", [None, 70])
def test_a_document_of_several_chunks(window):
    """Forward cuts a document into tasks of 512 queries."""
    assert_near([1100, 513], *draw(1613, 2, 1, 16), window)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_large_scores_neither_overflow_nor_lose_the_maximum(factor):
    q, k, v, direction = draw(200)
    q, k = q.round() * factor, k.round()  # whole numbers: fp32 scores are exact up to the 1 / sqrt(K)
    q[:, :, 16:], k[:, :, 16:] = 0, 0
    assert_near([200], q, k, v, direction, bound=3e-6 * factor / 30)
    assert_near([200], -q.abs(), k.abs(), v, direction, bound=3e-6 * factor / 30)


def test_softmax_is_exact_where_it_is_one():
    """A first token sees itself alone: its output is its value, bit for bit; so is that of a hugely preferred key."""
    q, k, v, _ = draw(50, 2, 2)
    assert torch.equal(PackedCausal.of([1] * 50)(0, q, k, v, None), v)
    assert torch.equal(PackedCausal.of([50])(0, q, k, v, 1), v)
    k[0], q[:] = 1e3, 1e3
    k[1:] = -1e3
    assert torch.equal(PackedCausal.of([50])(0, q, k, v, None), v[:1].expand_as(v))


@pytest.mark.usefixtures("level")
def test_small_weights_keep_their_digits():
    """Documents of two tokens with scores (s, 0) and values (1, 0): the second output is e^s / (1 + e^s)."""
    s = torch.cat([torch.linspace(-1, 0, 500), torch.linspace(-85, -1, 500), torch.tensor([-90.0, -1e30, -torch.inf])])
    q, k, v = torch.ones(2 * len(s), 1, 1), torch.zeros(2 * len(s), 1, 1), torch.zeros(2 * len(s), 1, 1)
    k[::2, 0, 0], v[::2] = s, 1
    out = PackedCausal.of([2] * len(s))(0, q, k, v, None)[1::2].flatten().double()
    expected = s.double().sigmoid()
    assert ((out - expected).abs() <= expected * (4e-7 + 2e-7 * s.double().abs().clamp(max=100)))[:-3].all()
    assert (out[-3:] == 0).all()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_not_hidden(which):
    inputs = draw(70)
    inputs[which][3] = torch.nan
    results = ours([40, 30], *inputs)
    assert results[0][3].isnan().all()
    assert not any(x[40:].isnan().any() for x in results)  # the other document


def test_reads_and_writes_nothing_outside_the_arrays():
    """Inputs are slices of one wider tensor of nan, as q, k, v of a fused product are."""
    q, k, v, direction = draw(33, 4, 2, 24)
    wide = torch.full((35, 9, 32), torch.nan)
    slices = [wide[1:34, a : a + x.shape[1], 4:28] for a, x in ((0, q), (4, k), (6, v))]
    for there, x in zip(slices, (q, k, v), strict=True):
        there.copy_(x)
    for a, b in zip(ours([20, 13], *slices, direction), ours([20, 13], q, k, v, direction), strict=True):
        assert torch.equal(a, b)


def test_any_layout_of_inputs_and_gradient():
    q, k, v, direction = draw(33)
    plain = ours([20, 13], q, k, v, direction)
    turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v, direction)]
    for a, b in zip(ours([20, 13], *turned), plain, strict=True):
        assert torch.equal(a, b)
    one = torch.ones(())  # a gradient with stride 0
    for a, b in zip(ours([33], q, k, v, one.expand_as(q)), ours([33], q, k, v, torch.ones_like(q)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("window", [None, 50])
def test_runs_and_threads_give_the_same_bits(window):
    lengths = [700, 64, 1, 33, 33]
    inputs = draw(sum(lengths))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(ours(lengths, *inputs, window))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_a_document_does_not_see_its_neighbours():
    q, k, v, direction = draw(200)
    together = ours([70, 130], q, k, v, direction)
    for rows, length in ((slice(70), 70), (slice(70, 200), 130)):
        alone = ours([length], *(x[rows] for x in (q, k, v, direction)))
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


def test_without_gradients_the_same_output():
    q, k, v, direction = draw(100)
    attend = PackedCausal.of([100])
    expected = ours([100], q, k, v, direction)[0]
    assert torch.equal(attend(0, q, k, v, None), expected)
    with torch.inference_mode():
        assert torch.equal(attend(0, q, k, v, None), expected)
    with torch.no_grad():
        assert attend(0, q.requires_grad_(), k, v, None).grad_fn is None


def test_frozen_inputs_and_two_backwards():
    q, k, v, direction = draw(40)
    expected = ours([40], q, k, v, direction)
    v.requires_grad_()
    out = PackedCausal.of([40])(0, q, k, v, None)
    for _ in range(2):
        out.backward(direction, retain_graph=True)
    assert torch.equal(v.grad, 2 * expected[3])
    assert q.grad is None


def test_others_are_left_to_torch(monkeypatch):
    q, k, v, _ = draw(24)
    attend = PackedCausal.of([20, 4])
    expected = attend(0, q, k, v, None)
    calls = []
    monkeypatch.setattr(native, "attention", lambda *args: calls.append(1))
    attend(0, q, k, v, None)
    assert len(calls) == 1
    assert attend(0, *(x.double() for x in (q, k, v)), None).dtype is torch.float64
    assert attend(0, *(x.bfloat16() for x in (q, k, v)), None).dtype is torch.bfloat16
    assert attend(0, *(x.to("meta") for x in (q, k, v)), None).shape == q.shape
    with torch.autocast("cpu", torch.bfloat16):
        attend(0, q, k, v, None)
    with FlopCounterMode(display=False):
        attend(0, q, k, v, None)
    with FakeTensorMode() as mode:
        assert attend(0, *(mode.from_tensor(x) for x in (q, k, v)), None).shape == q.shape
    attend(0, q.as_subclass(Subclass), k, v, None)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(0, q, k, v, None), expected, atol=1e-5)
    torch.compiler.reset()
    monkeypatch.setattr(native, "_native", library.Library(None, 0, "off"))
    assert torch.allclose(attend(0, q, k, v, None), expected, atol=1e-5)
    assert len(calls) == 1


def test_no_memory_is_an_error(monkeypatch):
    class Full:
        def puna_attention_forward(self, problem):
            return 1

    monkeypatch.setattr(native, "_native", library.load()._replace(kernels=Full()))
    with pytest.raises(MemoryError, match="24 tokens"):
        PackedCausal.of([24])(0, *draw(24)[:3], None)


def test_puna_native_0_turns_it_off():
    code = (
        "import torch; from puna.ops.attention import PackedCausal; from puna.ops.native import attention as native;"
        "q = torch.ones(4, 2, 8, requires_grad=True); assert not native.serves(q, q, q);"
        "out = PackedCausal.of([4])(0, q, q, q, None); assert 'Attention' not in type(out.grad_fn).__name__;"
        "assert torch.allclose(out, q)"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PUNA_NATIVE": "0"}, check=True)
