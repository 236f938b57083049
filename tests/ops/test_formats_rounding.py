"""ops/formats/rounding.py and scheme.py: error bounds in exact arithmetic, compressed-tensors' numbers, hard cases."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as reference_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.base.console import PunaError
from puna.ops.formats import rounding
from puna.ops.formats.scheme import FLOAT8, INT4, INT8, Scheme

INTEGERS = [
    Scheme(bits, "int", symmetric, granularity, size)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for granularity, size in (("tensor", 0), ("channel", 0), ("group", 16), ("block", 16))
]
ids = lambda s: f"{s.kind}{s.bits}-{'sym' if s.symmetric else 'asym'}-{s.granularity}{s.group_size or ''}"  # noqa: E731


def draw(seed, shape=(32, 64), dtype=torch.float64):
    """Numbers of very different sizes, rows of one sign, a row of zeros, the same number twice with both signs."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    w *= 10 ** torch.empty(shape[0], 1, dtype=torch.float64).uniform_(-6, 6, generator=generator)
    w[1], w[2], w[3] = w[1].abs(), -w[2].abs(), 0
    w[4, :2] = torch.tensor([1.0, -1.0]) * w[4].abs().max() * 2
    return w.to(dtype)


def spread(values, shape):
    return values.repeat_interleave(shape[0] // values.shape[0], 0).repeat_interleave(shape[1] // values.shape[1], 1)


@pytest.mark.parametrize("scheme", INTEGERS, ids=ids)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_no_error_above_half_a_step(scheme, seed):
    w = draw(seed)
    scales, zeros = rounding.choose_scales(w, scheme)
    codes = rounding.quantize(w, scheme, scales, zeros)
    back = rounding.dequantize(codes, scales, zeros)
    assert back.dtype is torch.float64
    assert ((w - back).abs() <= spread(scales, w.shape) * (0.5 + 1e-9)).all()
    assert codes.min() >= scheme.lowest
    assert codes.max() <= scheme.highest


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_float8_keeps_four_bits_of_every_number(seed):
    """Half a unit in the last of 4 significant bits, or half a step of the subnormals near zero (2^-9)."""
    w = draw(seed)
    for scheme in (FLOAT8, Scheme(kind="float", granularity="block", group_size=16)):
        scales, _ = rounding.choose_scales(w, scheme)
        codes = rounding.quantize(w, scheme, scales)
        back = rounding.dequantize(codes, scales)
        step = spread(scales, w.shape)
        assert ((w - back).abs() <= torch.maximum(w.abs() * 2**-4, step * 2**-10) * (1 + 1e-6)).all()
        assert codes.float().isfinite().all()


@pytest.mark.parametrize("scheme", [*INTEGERS, FLOAT8, Scheme(kind="float", granularity="tensor")], ids=ids)
def test_numbers_are_those_of_compressed_tensors(scheme):
    w = draw(1, dtype=torch.float32)
    args = QuantizationArgs(
        num_bits=scheme.bits, type=scheme.kind, symmetric=scheme.symmetric, strategy=scheme.granularity,
        group_size=scheme.group_size if scheme.granularity == "group" else None,
        block_structure=[16, 16] if scheme.granularity == "block" else None,
    )  # fmt: skip
    height, width = scheme.tile(w.shape)
    tiles = w.view(32 // height, height, 64 // width, width)
    theirs, their_zeros = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args)
    scales, zeros = rounding.choose_scales(w, scheme)
    torch.testing.assert_close(scales, theirs, rtol=0, atol=0)
    if zeros is not None:
        live = (tiles != 0).any(3).any(1)  # for tiles of zeros theirs divides 0 by 0
        assert torch.equal(zeros[live], their_zeros.to(torch.int8)[live])
    shape = (1,) if scheme.granularity == "tensor" else scales.shape
    codes = reference_quantize(
        w,
        theirs.reshape(shape),
        None if zeros is None else zeros.reshape(shape),
        args,
        dtype=rounding.code_dtype(scheme),
    )
    ours = rounding.quantize(w, scheme, scales, zeros)
    assert torch.equal(ours.view(torch.uint8), codes.view(torch.uint8))


def test_rounding_by_hand():
    w = torch.tensor([[7.5, -7.5, 0.5, 1.5, -0.5, 2.6, 0.0, -3.4]])
    scales, zeros = rounding.choose_scales(w, Scheme(4))
    assert scales.tolist() == [[1.0]]
    assert zeros is None
    assert rounding.quantize(w, Scheme(4), scales).tolist() == [[7, -8, 0, 2, 0, 3, 0, -3]]
    scales, zeros = rounding.choose_scales(torch.tensor([[0.0, 15.0, 3.2]]), Scheme(4, symmetric=False))
    assert (scales.item(), zeros.item()) == (1.0, -8)
    assert rounding.quantize(torch.tensor([[0.0, 15.0, 3.2]]), Scheme(4, symmetric=False), scales, zeros).tolist() == [
        [-8, 7, -5]
    ]


@pytest.mark.parametrize("scheme", [INT8, Scheme(4, symmetric=False), FLOAT8], ids=ids)
@pytest.mark.parametrize("value", [0.0, 1e-44, -1e-42, 1e-38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiny_and_zero_rows_divide_by_nothing(scheme, value, dtype):
    w = torch.full((2, 64), value)
    w[0, 0] = 1.0
    scales, zeros = rounding.choose_scales(w, scheme, dtype=dtype)
    assert scales.dtype is dtype
    assert (scales > 0).all()
    back = rounding.dequantize(rounding.quantize(w, scheme, scales, zeros), scales, zeros)
    assert back.isfinite().all()
    assert (back[1] - w[1]).abs().max() <= max(scales[1].float(), abs(value) / 16)


def test_scales_never_overflow_their_dtype():
    w = torch.full((1, 64), 3e38)
    scales, _ = rounding.choose_scales(w, INT8, dtype=torch.float16)
    assert scales.item() == 65504
    assert rounding.dequantize(rounding.quantize(w, INT8, scales), scales).isfinite().all()


def test_codes_are_chosen_for_the_scale_that_is_stored():
    w = draw(5, dtype=torch.float32)[5:]
    scales, _ = rounding.choose_scales(w, Scheme(8), dtype=torch.bfloat16)
    codes = rounding.quantize(w, INT8, scales)
    expected = (w / scales.float()).round().clamp(-128, 127).to(torch.int8)
    assert torch.equal(codes, expected)
    assert not torch.equal(scales.float(), rounding.choose_scales(w, INT8)[0])


def test_clip_ratio_per_group():
    w = draw(6, dtype=torch.float32)
    scheme = Scheme(4, group_size=16, granularity="group")
    full, _ = rounding.choose_scales(w, scheme)
    ratio = torch.linspace(0.5, 1.0, full.numel()).view(full.shape)
    clipped, _ = rounding.choose_scales(w, scheme, clip=ratio)
    live = w.view(32, 4, 16).abs().amax(2) > 0
    torch.testing.assert_close(clipped[live], (full * ratio)[live])
    scales, _ = rounding.choose_scales(w, Scheme(4, "int", False), clip=0.5)
    wide, _ = rounding.choose_scales(w, Scheme(4, "int", False))
    torch.testing.assert_close(scales[5:], wide[5:] * 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_rounded_in_fp32(dtype):
    w = torch.randn(8, 64).to(dtype)
    for scheme in (INT8, Scheme(4, "int", False)):
        ours, same = (rounding.choose_scales(v, scheme) for v in (w, w.float()))
        assert torch.equal(ours[0], same[0])
        assert torch.equal(rounding.quantize(w, scheme, *ours), rounding.quantize(w.float(), scheme, *same))


@pytest.mark.parametrize(
    "scheme", [INT8, INT4, Scheme(4, "int", False, "block", 128), Scheme(3, "int", True, "tensor")], ids=ids
)
def test_a_large_matrix_in_pieces_equals_its_rows(scheme):
    """512 x 1024 is worked on in 18 pieces by two threads; a block of 128 rows lies across pieces."""
    w = torch.randn(512, 1024).t().contiguous().t()  # not contiguous
    scales, zeros = rounding.choose_scales(w, scheme)
    codes = rounding.quantize(w, scheme, scales, zeros)
    step, zero = spread(scales, w.shape), 0 if zeros is None else spread(zeros, w.shape)
    assert torch.equal(codes, (w / step + zero).round().clamp(scheme.lowest, scheme.highest).to(torch.int8))
    assert torch.equal(rounding.dequantize(codes, scales, zeros), (codes - zero) * step)


def test_check_finite():
    rounding.check_finite(torch.full((10,), 3e38), "w")  # the sum is infinite, no number is
    with pytest.raises(PunaError, match="w holds 2 NaN and 1 infinite of 6 numbers"):
        rounding.check_finite(torch.tensor([1.0, float("nan"), float("inf"), 0, 0, float("nan")]), "w")
    with pytest.raises(PunaError, match="0 NaN and 2 infinite"):
        rounding.check_finite(torch.tensor([float("inf"), -float("inf")]), "w")


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1}, {"bits": 9}, {"bits": 4, "kind": "float"}, {"kind": "float", "symmetric": False},
        {"granularity": "group"}, {"granularity": "channel", "group_size": 32}, {"granularity": "row"}, {"kind": "nf4"},
    ],
)  # fmt: skip
def test_formats_that_cannot_be(arguments):
    with pytest.raises(PunaError) as error:
        Scheme(**arguments)
    assert error.value.hint


def test_group_size_must_divide():
    with pytest.raises(PunaError, match="8 x 100 does not divide into groups of 128"):
        rounding.choose_scales(torch.ones(8, 100), INT4)
    with pytest.raises(PunaError, match="10 x 64 does not divide into blocks of 16"):
        rounding.choose_scales(torch.ones(10, 64), Scheme(granularity="block", group_size=16))
