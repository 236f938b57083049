"""quant/gptq.py: the same codes as the paper's explicit inverse updates in fp64; never worse than rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planted_inputs import correlated_inputs, heavy_weight
from puna.base.console import PunaError
from puna.ops.formats import rounding
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import FLOAT8, INT4, INT8, Scheme
from puna.quant import gptq as module
from puna.quant.error import error_of
from puna.quant.gptq import gptq

SCHEMES = [
    Scheme(bits, "int", symmetric, granularity, size)
    for bits, symmetric, granularity, size in [
        (2, True, "group", 16), (3, False, "group", 16), (4, True, "group", 16), (4, False, "channel", 0),
        (5, True, "channel", 0), (8, False, "group", 40), (8, True, "channel", 0), (4, True, "tensor", 0),
        (4, False, "block", 8),
    ]
]  # fmt: skip
ids = lambda s: f"int{s.bits}-{'sym' if s.symmetric else 'asym'}-{s.granularity}{s.group_size or ''}"  # noqa: E731


def twin(weight_ND, second_DD, scheme, act_order, damping, scales, zeros):
    """Optimal brain quantization as the paper states it: after each column the inverse Hessian loses it (fp64)."""
    weight, h = weight_ND.double().clone(), second_DD.double().clone()
    rows, columns = weight.shape
    height, width = scheme.tile((rows, columns))
    scale_ND = scales.double().repeat_interleave(height, 0).repeat_interleave(width, 1)
    zero_ND = None if zeros is None else zeros.double().repeat_interleave(height, 0).repeat_interleave(width, 1)
    alive = h.diagonal() > 0
    h += torch.eye(columns) * damping * h.diagonal()[alive].mean()
    inverse = torch.linalg.inv(h)
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    for j in order.tolist():
        scale, zero = scale_ND[:, j], None if zero_ND is None else zero_ND[:, j]
        # In fp32 like the code: -absmax lies in the middle of two codes, to the bit.
        codes[:, j] = rounding.encode(weight[:, j].float(), scheme, scale.float(), zero)
        error = (weight[:, j] - rounding.decode(codes[:, j], scale, zero)) / inverse[j, j]
        weight -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1  # done: never read again
    return codes


def problem(rows=24, columns=80, seed=0, tokens=400):
    x = correlated_inputs(tokens, columns, seed, outliers=2, size=5)
    return heavy_weight(rows, columns, seed), x.t() @ x


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_codes_are_those_of_the_explicit_inverse(scheme, act_order):
    weight, second = problem()
    result = gptq(weight, second, scheme, act_order=act_order)
    codes = twin(weight, second, scheme, act_order, 0.01, result.packed.scales, result.packed.zeros)
    plain = round_to_nearest(weight, scheme)
    kept = (result.packed.codes() == plain.codes()).all(1)
    assert int(kept.sum()) == result.rounded_rows <= 3
    same = (result.packed.codes() == codes)[~kept]
    assert same.double().mean() > 0.998  # a number near the middle of two codes may go either way in fp32
    assert same.all(1).double().mean() > 0.9
    assert torch.equal(result.packed.scales, plain.scales)


def test_dead_columns_do_not_weaken_the_damping():
    """Added is a share of the mean over inputs that are not always 0, as in the twin; here large enough to matter."""
    weight, second = problem()
    second[:60] = second[:, :60] = 0
    result = gptq(weight, second, SCHEMES[4], damping=1.0)
    codes = twin(weight, second, SCHEMES[4], True, 1.0, result.packed.scales, None)
    assert result.dead_columns == 60
    assert result.rounded_rows <= 3
    assert (result.packed.codes() == codes).all(1).double().mean() > 0.8


@pytest.mark.parametrize("leaf", [1, 7, 32, 100])
def test_how_columns_are_cut_does_not_matter(leaf, monkeypatch):
    weight, second = problem()
    whole = gptq(weight, second, SCHEMES[2]).packed.codes()
    monkeypatch.setattr(module, "_LEAF", leaf)
    monkeypatch.setattr(module, "_NUMBERS", 80 * 5)
    monkeypatch.setattr(module, "_PANEL", 16)
    again = gptq(weight, second, SCHEMES[2])
    assert (again.packed.codes() == whole).double().mean() > 0.99
    assert again.packed.codes().shape == (24, 80)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.5), (3, 0.45), (8, 0.5)])
def test_it_repairs_most_of_the_damage_to_outputs_on_other_inputs(bits, share):
    scheme = Scheme(bits, "int", True, "group", 64)
    weight, x = heavy_weight(96, 128), correlated_inputs(3000, 128)
    known, unknown = x[:1500], x[1500:]
    result = gptq(weight, known.t() @ known, scheme)
    plain = error_of(weight, round_to_nearest(weight, scheme), sample_TD=unknown) ** 2
    assert 1 - error_of(weight, result.packed, sample_TD=unknown) ** 2 / plain > share
    assert result.repaired > share


def test_losses_are_the_measured_ones():
    weight, second = problem(tokens=4000)
    scheme = SCHEMES[2]
    result = gptq(weight, second, scheme)
    for packed, loss in ((result.packed, result.loss), (round_to_nearest(weight, scheme), result.rounding_loss)):
        delta = (packed.dequantize() - weight).double()
        assert loss == pytest.approx(float(((delta @ second.double()) * delta).sum()), rel=1e-3)


def test_act_order_helps_where_inputs_differ_in_size():
    x = correlated_inputs(2000, 128)
    x *= torch.logspace(-1.5, 1.5, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    weight, second = heavy_weight(64, 128), x.t() @ x
    scheme = Scheme(3, "int", True, "group", 32)
    assert gptq(weight, second, scheme).loss < 0.9 * gptq(weight, second, scheme, act_order=False).loss


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scheme=st.sampled_from(SCHEMES),
    act_order=st.booleans(),
    tokens=st.sampled_from([1, 3, 20, 200]),
    dead=st.sampled_from([0, 1, 40]),
    clip=st.sampled_from([1.0, 0.6]),
)
def test_never_worse_than_rounding(seed, scheme, act_order, tokens, dead, clip):
    """Fewer inputs than columns (H has no inverse), dead columns, clipped weights: every row at least as good."""
    x = correlated_inputs(tokens, 80, seed, outliers=2)
    x[:, torch.randperm(80, generator=torch.Generator().manual_seed(seed))[:dead]] = 0
    weight, second = heavy_weight(16, 80, seed), x.t() @ x
    result = gptq(weight, second, scheme, act_order=act_order, clip=clip)
    scales, zeros = rounding.choose_scales(weight, scheme, clip)
    plain = rounding.dequantize(rounding.quantize(weight, scheme, scales, zeros), scales, zeros)
    before, after = ((w - weight).double() for w in (plain, result.packed.dequantize()))
    loss = lambda delta: (delta @ x.double().t()).square().sum(1)  # noqa: E731
    # A row's two losses are told apart to about 1e-6 of what damping adds to them.
    slack = 1e-5 * (before.square().sum(1) + after.square().sum(1)) * float(second.diagonal().mean())
    assert (loss(after) <= loss(before) * 1.001 + slack).all()
    assert result.loss <= result.rounding_loss
    assert result.dead_columns == int((second.diagonal() == 0).sum()) >= dead


def test_rows_where_it_is_worse_keep_plain_rounding():
    """Two bits, nearly all clipped: columns cannot make good what others lost, and the greedy order does harm."""
    weight, second = problem(rows=400)
    result = gptq(weight, second, Scheme(2, "int", True, "channel"), clip=0.1, act_order=False)
    plain = rounding.quantize(weight, result.packed.scheme, result.packed.scales)
    assert 0 < result.rounded_rows < 400
    assert int((result.packed.codes() == plain).all(1).sum()) == result.rounded_rows


def test_damping_raises_itself_and_says_so():
    x = correlated_inputs(3, 80)
    second = x.t() @ x
    assert gptq(heavy_weight(8, 80), second, INT8, damping=0.01).damping == pytest.approx(0.01)
    found = gptq(heavy_weight(8, 80), second, INT8, damping=1e-12)
    assert 1e-12 < found.damping <= 1e-3
    broken = -torch.eye(80) * 0.5 + second / second.diagonal().mean()
    assert gptq(heavy_weight(8, 80), broken, INT8).damping > 0.4


def test_dead_columns_are_rounded_plainly():
    weight, second = problem()
    for dead in (5, 41):
        second[dead] = second[:, dead] = 0
    result = gptq(weight, second, SCHEMES[2])
    plain = round_to_nearest(weight, SCHEMES[2]).codes()
    assert result.dead_columns == 2
    assert torch.equal(result.packed.codes()[:, [5, 41]], plain[:, [5, 41]])
    assert result.repaired > 0.3
    nothing = gptq(weight, torch.zeros(80, 80), SCHEMES[2])
    assert torch.equal(nothing.packed.codes(), plain)
    assert nothing.dead_columns == 80
    assert nothing.loss < 1e-6 * float((weight**2).sum())


def test_zeros_and_bad_numbers():
    _, second = problem()
    result = gptq(torch.zeros(4, 80), second, SCHEMES[2])
    assert not result.packed.dequantize().any()
    assert result.repaired == 0
    assert gptq(torch.zeros(0, 80), second, SCHEMES[2]).packed.shape == (0, 80)
    bad = torch.zeros(4, 80)
    bad[1, 2] = float("nan")
    with pytest.raises(PunaError, match="1 NaN"):
        gptq(bad, second, SCHEMES[2])
    second[3, 3] = float("inf")
    with pytest.raises(PunaError, match="1 infinite"):
        gptq(heavy_weight(4, 80), second, SCHEMES[2])


def test_scales_in_16_bits_are_used_as_stored():
    weight, second = problem(columns=128)
    result = gptq(weight, second, INT4, scale_dtype=torch.bfloat16)
    assert result.packed.scales.dtype is torch.bfloat16
    assert result.repaired > 0.3
    delta = (result.packed.dequantize() - weight).double()
    assert result.loss == pytest.approx(float(((delta @ second.double()) * delta).sum()), rel=1e-3)


def test_arguments_are_left_alone_and_floats_work_too():
    weight, second = problem()
    copies = weight.clone(), second.clone()
    result = gptq(weight, second, FLOAT8)
    assert result.packed.data.dtype is torch.float8_e4m3fn
    assert result.repaired > 0.3
    assert torch.equal(weight, copies[0])
    assert torch.equal(second, copies[1])
    assert gptq(weight.bfloat16(), second, INT8).packed.scales.dtype is torch.float32
