"""ops/formats/kv.py: a model's calibrated scales, checked. (The rounding itself: test_formats_activations.py.)"""

from __future__ import annotations

import pytest
import torch

from puna.base.console import PunaError
from puna.ops.formats.kv import KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.ops.formats.scheme import INT4


def scales(*numbers: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([float(number)]) for number in numbers)


def test_scales_know_their_heads_and_move():
    assert KVScales(KV_INT8, scales(1, 2), scales(3, 4)).heads is None
    per_head = KVScales(KV_FLOAT8_HEAD, (torch.ones(3),), (torch.ones(3),))
    assert per_head.heads == 3
    assert per_head.to("cpu").scheme == KV_FLOAT8_HEAD


def test_every_layer_has_its_own_scale():
    held = KVScales(KV_INT8, scales(1, 10), scales(100, 1000))
    k, v = torch.full((2, 1, 4), 24.0), torch.full((2, 1, 4), 2400.0, dtype=torch.bfloat16)
    for layer, (key, value) in enumerate(((24, 2400), (20, 2000))):
        rounded_k, rounded_v = held.round(layer, k, v)
        assert rounded_k.unique().tolist() == [key]
        assert rounded_v.unique().tolist() == [torch.tensor(value).bfloat16().item()]
        assert (rounded_k.dtype, rounded_v.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((), (), "0 scales of keys"),
        (scales(1, 2), scales(1), "2 scales of keys and 1 of values"),
        (scales(1, 0), scales(1, 1), r"layer 1's keys is \[0.0\]"),
        (scales(1, 1), scales(-1, 1), r"layer 0's values is \[-1.0\]"),
        (scales(1), scales(float("nan")), r"layer 0's values is \[nan\]"),
        (scales(float("inf")), scales(1), r"layer 0's keys is \[inf\]"),
        ((torch.ones(2),), scales(1), r"shape \(2,\), not float32 of shape \(1,\)"),
        ((torch.tensor(1.0),), scales(1), r"shape \(\), not"),
        ((torch.ones(1).bfloat16(),), scales(1), "bfloat16"),
    ],
)
def test_scales_that_no_calibration_gives(keys, values, message):
    with pytest.raises(PunaError, match=message):
        KVScales(KV_INT8, keys, values)


def test_heads_agree_and_the_format_is_a_caches():
    with pytest.raises(PunaError, match=r"layer 0's values .*shape \(2,\), not float32 of shape \(3,\)"):
        KVScales(KV_INT8_HEAD, (torch.ones(3),), (torch.ones(2),))
    with pytest.raises(PunaError, match="no KV cache is kept as"):
        KVScales(INT4, scales(1), scales(1))
