from __future__ import annotations

import pytest
import torch

from puna.ops.attention import CachedCausal, PackedCausal, attention_twin, causal_mask


@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_packed_attention_and_gradients_equal_the_twin(window: int | None, heads: tuple[int, int]) -> None:
    lengths = [6, 6, 1, 11, 4]
    document = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    q = torch.randn(28, heads[0], 8, requires_grad=True)
    k, v = (torch.randn(28, heads[1], 8, requires_grad=True) for _ in range(2))
    ours = PackedCausal.of(lengths)(0, q, k, v, window)
    twin = attention_twin(q, k, v, document, window)
    assert torch.allclose(ours, twin, atol=1e-6)
    direction = torch.randn_like(twin)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), direction) for x in (ours, twin)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_equal_neighbours_share_a_run() -> None:
    attend = PackedCausal.of([4, 4, 4, 2, 4])
    assert attend.runs == ((0, 3, 4), (12, 1, 2), (14, 1, 4))
    assert attend.max_len == 4


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [3, 9]])
def test_cached_attention_equals_the_twin(window: int | None, pieces: list[int]) -> None:
    q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    cache = torch.full((2, 1, 2, 16, 8), torch.nan)  # reading what was never written would show
    outputs, start = [], 0
    for n in pieces:
        rows = slice(start, start + n)
        outputs.append(CachedCausal(cache[0], cache[1], start, 16)(0, q[rows], k[rows], v[rows], window))
        start += n
    twin = attention_twin(q, k, v, torch.zeros(12), window)
    assert torch.allclose(torch.cat(outputs), twin, atol=1e-6)


def test_mask_counts_the_window_as_transformers_does() -> None:
    assert causal_mask(4, 4, 2, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]  # fmt: skip
    assert causal_mask(1, 3, None, torch.device("cpu")).tolist() == [[True, True, True]]
