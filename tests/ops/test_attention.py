from __future__ import annotations

import pytest
import torch

from puna.ops.attention import PackedCausal, RoundedKV, attention_twin, causal_mask
from puna.ops.formats.kv import KV_FLOAT8, KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.ops.formats.scheme import Scheme


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


def test_mask_counts_the_window_as_transformers_does() -> None:
    assert causal_mask(4, 4, 2, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]  # fmt: skip
    assert causal_mask(1, 3, None, torch.device("cpu")).tolist() == [[True, True, True]]


EIGHT_BITS = [KV_INT8, KV_INT8_HEAD, KV_FLOAT8, KV_FLOAT8_HEAD]


def uneven_scales(scheme: Scheme, layers: int, heads: int) -> KVScales:
    """Each layer, head and side with a scale of its own: a mix-up of any two would show."""
    count = heads if scheme.granularity == "head" else 1
    unit = 3 / scheme.half_range
    keys = tuple(unit * (1 + 0.3 * layer + torch.arange(count) / 2) for layer in range(layers))
    return KVScales(scheme, keys, tuple(1.7 * key for key in keys))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda s: f"{s.kind}-{s.granularity}")
def test_rounding_is_attention_over_rounded_keys_and_values(window: int | None, scheme: Scheme) -> None:
    q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    scales = uneven_scales(scheme, 2, 2)
    for layer in range(2):
        found = RoundedKV(PackedCausal.of([12]), scales)(layer, q, k, v, window)
        expected = attention_twin(q, *scales.round(layer, k, v), torch.zeros(12), window)
        assert (found - expected).abs().max() < 1e-5
        assert (found - attention_twin(q, k, v, torch.zeros(12), window)).abs().max() > 1e-3  # something was rounded


def test_rounding_hands_on_the_longest_length() -> None:
    assert RoundedKV(PackedCausal.of([3, 7]), uneven_scales(KV_INT8, 1, 1)).max_len == 7
