"""The native attention of one query over a cache of codes: exactly that over the numbers the codes are."""

from __future__ import annotations

import pytest
import torch

from puna.ops import attention
from puna.ops.attention import CachedCausal, PackedCausal, RoundedKV
from puna.ops.formats.kv import KV_FLOAT8_HEAD, KV_INT8, KVScales
from puna.ops.native import library, token

if not library.available():
    pytest.skip("no native kernels", allow_module_level=True)


@pytest.fixture(params=range(library.load().level + 1), ids=lambda level: library.LEVELS[level])
def level(request, monkeypatch) -> None:
    monkeypatch.setattr(token, "_LEVEL", request.param)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 16), (3, 1, 80), (12, 4, 64), (2, 2, 6)])
def test_every_code_is_the_number_it_is(level, dtype: torch.dtype, heads: int, groups: int, width: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]  # 0 and what lies below the smallest normal number included
    k, v = (codes[torch.arange(groups * 300 * width) * step % len(codes)].view(groups, 300, width) for step in (7, 11))
    q = torch.randn(1, heads, width) / 100
    assert token.serves_query(q, k, v)
    expected = token.query(q, k.float(), v.float())
    assert (token.query(q, k, v) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("scheme", [KV_INT8, KV_FLOAT8_HEAD], ids=lambda s: f"{s.kind}-{s.granularity}")
def test_the_cache_uses_it_with_its_scales(scheme, monkeypatch) -> None:
    """And torch, where there are no kernels, gives the same; both what the twin gives."""
    heads = 2 if scheme.granularity == "head" else 1
    unit = (4 / scheme.half_range) * (1 + torch.arange(heads))
    scales = KVScales(scheme, (unit,), (unit * 1.5,))
    q, k, v = torch.randn(30, 4, 8), torch.randn(30, 2, 8), torch.randn(30, 2, 8)

    def decode() -> torch.Tensor:
        cache = torch.zeros(2, 1, 2, 32, 8).to(torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn)
        rows = [slice(i, i + 1) for i in range(30)]
        return torch.cat([CachedCausal(*cache, i, 32, scales)(0, q[r], k[r], v[r], 9) for i, r in enumerate(rows)])

    calls = []
    query = token.query
    monkeypatch.setattr(attention.token, "query", lambda *x: calls.append(x[1].dtype) or query(*x))
    fast = decode()
    assert len(calls) == 30
    assert {dtype.itemsize for dtype in calls} == {1}
    monkeypatch.setattr(attention.token, "serves_query", lambda *_: False)
    slow = decode()
    assert len(calls) == 30
    twin = RoundedKV(PackedCausal.of([30]), scales)(0, q, k, v, 9)
    assert (fast - twin).abs().max() < 1e-5
    assert (slow - twin).abs().max() < 1e-5


def test_a_query_in_another_dtype_gets_torch() -> None:
    codes = torch.zeros(2, 5, 8, dtype=torch.int8)
    assert not token.serves_query(torch.randn(1, 2, 8).bfloat16(), codes, codes)
    assert not token.serves_query(torch.randn(1, 2, 8), codes, codes.float())
