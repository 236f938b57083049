"""ops/formats/fake.py: forward is the packed weight, backward is straight through inside the range and zero outside."""

from __future__ import annotations

import pytest
import torch

from puna.ops.formats.fake import fake_quantize
from puna.ops.formats.packed import round_to_nearest
from puna.ops.formats.scheme import FLOAT8, INT4, INT8, INT8_TOKEN, Scheme


@pytest.mark.parametrize("scheme", [INT8, INT4, FLOAT8, Scheme(4, "int", False, "group", 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_what_converting_gives(scheme, dtype):
    w = torch.randn(16, 128).to(dtype).requires_grad_()
    y = fake_quantize(w, scheme)
    assert y.dtype is dtype
    assert torch.equal(y, round_to_nearest(w.detach(), scheme).dequantize(dtype))


@pytest.mark.parametrize("scheme", [INT8, INT4, FLOAT8, Scheme(4, "int", False, "group", 32)], ids=str)
def test_every_number_in_its_own_range_keeps_its_gradient(scheme):
    w = torch.randn(64, 128, requires_grad=True)
    g = torch.randn(64, 128)
    fake_quantize(w, scheme).backward(g)
    assert torch.equal(w.grad, g)


def test_clipped_numbers_get_no_gradient():
    x = torch.tensor([[-8.6, -8.4, 0.3, 7.4, 7.6, 100.0]], requires_grad=True)
    y = fake_quantize(x, Scheme(4), torch.ones(1, 1))
    y.sum().backward()
    assert y.tolist() == [[-8, -8, 0, 7, 7, 7]]
    assert x.grad.tolist() == [[0, 1, 1, 1, 0, 0]]
    x = torch.tensor([[-0.6, -0.4, 15.4, 15.6]], requires_grad=True)
    fake_quantize(
        x, Scheme(4, symmetric=False), torch.ones(1, 1), torch.full((1, 1), -8, dtype=torch.int8)
    ).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]
    x = torch.tensor([[447.0, 465.0, -470.0]], requires_grad=True)
    fake_quantize(x, FLOAT8, torch.ones(1, 1)).sum().backward()
    assert x.grad.tolist() == [[1, 0, 0]]


def test_any_leading_shape_and_per_token():
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = fake_quantize(x, INT8_TOKEN)
    assert torch.equal(y.view(6, 64), fake_quantize(x.view(6, 64), INT8_TOKEN))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_compiles():
    w = torch.randn(8, 64, requires_grad=True)
    compiled = torch.compile(lambda v: fake_quantize(v, INT8) * 2, backend="aot_eager")
    assert torch.equal(compiled(w), fake_quantize(w, INT8) * 2)
    compiled(w).sum().backward()
    assert torch.equal(w.grad, torch.full_like(w, 2))


def test_training_through_rounding_lowers_the_loss():
    """Two bits per channel: plain rounding of the best weight is worse than what training through rounding finds."""
    torch.manual_seed(0)
    x = torch.randn(256, 32) @ torch.randn(32, 32)
    target = x @ torch.randn(32, 8)
    w = torch.linalg.lstsq(x, target).solution.t().contiguous().requires_grad_()
    scheme = Scheme(2)
    error = lambda: (x @ fake_quantize(w, scheme).t() - target).square().mean()  # noqa: E731
    before = error().item()
    optimizer = torch.optim.Adam([w], lr=0.01)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = error()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.85 * before
