from __future__ import annotations

import pytest
import torch

from puna.ops.basic import IGNORE, cross_entropy, cross_entropy_twin, rms_norm


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_equals_its_twin(z_loss: float, chunk: int) -> None:
    hidden = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 33, (50,))
    targets[::7] = IGNORE
    found, expected = [], []
    for function, kept, extra in ((cross_entropy, found, {"chunk": chunk}), (cross_entropy_twin, expected, {})):
        loss, nll = function(hidden, weight, targets, z_loss, **extra)
        kept += [loss, nll, *torch.autograd.grad(loss * 0.3, (hidden, weight))]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_cross_entropy_without_gradients_and_without_scored_tokens() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    with torch.no_grad():
        _, nll = cross_entropy(hidden, weight, torch.arange(6))
        assert torch.allclose(nll, cross_entropy_twin(hidden, weight, torch.arange(6))[1])
        assert cross_entropy(hidden, weight, torch.full((6,), IGNORE))[0] == 0


def test_gradients_twice_through_one_graph_agree() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    loss, _ = cross_entropy(hidden, weight, torch.arange(6))
    first = torch.autograd.grad(loss * 2, hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss * 2, hidden)[0], first)


def test_full_logits_are_never_held() -> None:
    """The largest tensor made on the way stays at the chunk's size."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Watch():
        cross_entropy(hidden, weight, torch.randint(0, 1000, (256,)), chunk=16)[0].backward()
    assert largest == 16 * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_against_fp64(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(64).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-5 if dtype == torch.float32 else 2e-2)
