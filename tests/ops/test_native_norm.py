"""The native norm against fp64, at every instruction set this machine has."""

from __future__ import annotations

import shutil

import pytest
import torch

from puna.ops.native import library
from puna.ops.native import norm as native

if not library.available() and shutil.which("c++") is None:
    pytest.skip("no native kernels and no compiler to build them", allow_module_level=True)

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}  # of the largest value: sums of 900 terms; 8 bits


@pytest.fixture(params=range(library.load().level + 1), ids=lambda level: library.LEVELS[level])
def level(request, monkeypatch) -> None:
    monkeypatch.setattr(native, "_LEVEL", request.param)


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((found.double() - exact).abs().max() <= TOLERANCE[found.dtype] * exact.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 768), (3, 33), (2, 5, 16), (1, 4100)])
def test_norm(level, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert native.serves_norm(x, weight)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert close(native.norm(x, weight, 1e-5), exact)


def test_those_who_learn_get_torch() -> None:
    x = torch.randn(1, 16)
    assert not native.serves_norm(x, torch.ones(16, requires_grad=True))
    assert not native.serves_norm(x.requires_grad_(), torch.ones(16))
    assert not native.serves_norm(torch.randn(16, 4).T, torch.ones(16))
