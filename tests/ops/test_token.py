"""The native small steps of decoding against fp64, at every instruction set this machine has."""

from __future__ import annotations

import shutil

import pytest
import torch

from puna.ops.attention import CachedCausal, attention_twin
from puna.ops.native import library, token

if not library.available() and shutil.which("c++") is None:
    pytest.skip("no native kernels and no compiler to build them", allow_module_level=True)

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}  # of the largest value: sums of 900 terms; 8 bits


@pytest.fixture(params=range(library.load().level + 1), ids=lambda level: library.LEVELS[level])
def level(request, monkeypatch) -> None:
    monkeypatch.setattr(token, "_LEVEL", request.param)


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return bool((found.double() - exact).abs().max() <= TOLERANCE[found.dtype] * exact.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 768), (3, 33), (2, 5, 16), (1, 4100)])
def test_norm(level, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert token.serves_norm(x, weight)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert close(token.norm(x, weight, 1e-5), exact)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 16), (3, 1, 80), (12, 4, 64), (2, 2, 6)])
@pytest.mark.parametrize("length", [1, 2, 17, 900])
def test_query(level, dtype: torch.dtype, heads: int, groups: int, width: int, length: int) -> None:
    q = (torch.randn(1, heads, width) * 3).to(dtype)
    cache = torch.full((2, groups, length + 5, width), torch.nan).to(dtype)  # what lies behind is not read
    cache[:, :, 2 : length + 2] = torch.randn(2, groups, length, width).to(dtype)
    keys, values = cache[0, :, 2 : length + 2], cache[1, :, 2 : length + 2]
    assert token.serves_query(q, keys, values)
    k, v = (x.double().repeat_interleave(heads // groups, 0) for x in (keys, values))
    exact = ((q[0].double()[:, None] @ k.transpose(1, 2) * width**-0.5).softmax(-1) @ v)[:, 0]
    found = token.query(q, keys, values)
    assert found.shape == q.shape
    assert close(found[0], exact)


def test_threads_change_nothing() -> None:
    q, keys, values = torch.randn(1, 12, 64), torch.randn(4, 700, 64), torch.randn(4, 700, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(token.query(q, keys, values))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_large_scores_do_not_overflow() -> None:
    q, keys = torch.full((1, 2, 16), 1e4), torch.full((2, 9, 16), 1e4)
    assert torch.isfinite(token.query(q, keys, torch.ones(2, 9, 16))).all()


def test_those_who_learn_get_torch() -> None:
    x = torch.randn(1, 16)
    assert not token.serves_norm(x, torch.ones(16, requires_grad=True))
    assert not token.serves_norm(x.requires_grad_(), torch.ones(16))
    assert not token.serves_norm(torch.randn(16, 4).T, torch.ones(16))
    q = torch.randn(1, 2, 8)
    assert not token.serves_query(q, torch.randn(2, 5, 8).requires_grad_(), torch.randn(2, 5, 8))
    assert not token.serves_query(q, torch.randn(2, 5, 16)[..., ::2], torch.randn(2, 5, 16)[..., ::2])
    assert not token.serves_query(q, torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8))


def test_the_cache_uses_it() -> None:
    q, k, v = torch.randn(30, 4, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)
    cache, out = torch.empty(2, 1, 2, 32, 8), []
    for i in range(30):
        out.append(CachedCausal(cache[0], cache[1], i, 32)(0, q[i : i + 1], k[i : i + 1], v[i : i + 1], None))
    assert torch.allclose(torch.cat(out), attention_twin(q, k, v, torch.zeros(30)), atol=1e-6)
