"""ops/formats/activations.py and kv.py: per token, per tensor, per head; dynamic and calibrated."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reference
from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

from puna.base.console import PunaError
from puna.ops.formats import kv
from puna.ops.formats.activations import activation_absmax, dequantize_activation, quantize_activation
from puna.ops.formats.rounding import symmetric_scale
from puna.ops.formats.scheme import FLOAT8_TENSOR, FLOAT8_TOKEN, INT8_TOKEN, Scheme

INT8_TENSOR = Scheme(granularity="tensor")


@pytest.mark.parametrize("scheme", [INT8_TOKEN, FLOAT8_TOKEN, INT8_TENSOR, FLOAT8_TENSOR], ids=str)
def test_dynamic_equals_compressed_tensors(scheme):
    x = torch.randn(2, 5, 64) * torch.rand(2, 5, 1) * 10
    x[0, 0] = 0
    args = QuantizationArgs(num_bits=8, type=scheme.kind, strategy=scheme.granularity, dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    codes, ours = quantize_activation(x, scheme)
    assert codes.shape == x.shape
    assert codes.dtype is (torch.float8_e4m3fn if scheme.kind == "float" else torch.int8)
    assert torch.equal(dequantize_activation(codes, ours), reference(x, scale, zero, args))


@pytest.mark.parametrize("scheme", [INT8_TENSOR, FLOAT8_TENSOR], ids=str)
def test_static_scale_clamps(scheme):
    calibration = torch.tensor([[1.0, -2.0], [0.5, 1.5]])
    scale = symmetric_scale(activation_absmax(calibration, scheme), scheme)
    codes, same = quantize_activation(torch.tensor([[1.0, 50.0, -50.0]]), scheme, scale)
    assert same is scale
    back = dequantize_activation(codes, scale)
    assert back[0, 1] == scheme.highest * scale
    assert back[0, 2] == scheme.lowest * scale
    assert abs(back[0, 0] - 1) < 0.07


@pytest.mark.parametrize("scheme", [INT8_TOKEN, INT8_TENSOR], ids=str)
def test_no_tokens(scheme):
    codes, _ = quantize_activation(torch.zeros(0, 64), scheme)
    assert codes.shape == (0, 64)


@pytest.mark.parametrize("scheme", [kv.KV_INT8, kv.KV_INT8_HEAD, kv.KV_FLOAT8, kv.KV_FLOAT8_HEAD], ids=str)
def test_kv_round_trip(scheme):
    k = torch.randn(7, 3, 16, dtype=torch.bfloat16) * torch.tensor([0.1, 1.0, 10.0]).bfloat16()[:, None]
    absmax = kv.kv_absmax(k, scheme)
    assert absmax.shape == ((3,) if scheme.granularity == "head" else (1,))
    assert absmax.max() == k.abs().max()
    scale = kv.kv_scale(absmax, scheme)
    codes = kv.quantize_kv(k, scheme, scale)
    back = kv.dequantize_kv(codes, scale)
    for head in range(3):
        step = scale[head if scheme.granularity == "head" else 0]
        bound = step / 2 if scheme.kind == "int" else torch.maximum(k[:, head].float().abs() / 16, step / 1024)
        assert ((back[:, head] - k[:, head].float()).abs() <= bound * (1 + 1e-5)).all()
    assert kv.dequantize_kv(codes, scale, torch.bfloat16).dtype is torch.bfloat16


def test_a_small_head_gains_from_its_own_scale():
    k = torch.randn(50, 2, 16) * torch.tensor([0.01, 10.0])[:, None]
    error = {}
    for scheme in (kv.KV_INT8, kv.KV_INT8_HEAD):
        scale = kv.kv_scale(kv.kv_absmax(k, scheme), scheme)
        back = kv.dequantize_kv(kv.quantize_kv(k, scheme, scale), scale)
        error[scheme] = (back - k)[:, 0].square().mean()
    assert error[kv.KV_INT8_HEAD] < error[kv.KV_INT8] / 1000


def test_kv_numbers_outside_the_range_are_clamped():
    scale = torch.tensor([1.0])
    assert kv.quantize_kv(torch.tensor([[[200.0, -200.0]]]), kv.KV_INT8, scale).tolist() == [[[127, -128]]]
    assert kv.quantize_kv(torch.tensor([[[2000.0, -2000.0]]]), kv.KV_FLOAT8, scale).float().tolist() == [[[448, -448]]]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_uncalibrated_scale_is_refused(bad):
    with pytest.raises(PunaError, match="cannot be scaled"):
        kv.kv_scale(torch.tensor([1.0, bad]), kv.KV_INT8_HEAD)
