"""quant/kv.py: calibration of the cache, and what eight bits cost a model that has learnt something."""

from __future__ import annotations

import argparse

import pytest
import torch

from puna.base.console import PunaError
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal, RoundedKV
from puna.ops.basic import cross_entropy
from puna.ops.formats.kv import KV_FLOAT8, KV_FLOAT8_HEAD, KV_INT8, KV_INT8_HEAD, KVScales
from puna.quant.kv import KVRange

EIGHT_BITS = [KV_INT8, KV_INT8_HEAD, KV_FLOAT8, KV_FLOAT8_HEAD]


LENGTH = 128


def batches(text_T: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, LENGTH + 1) windows."""
    starts = torch.randint(len(text_T) - LENGTH, (count,), generator=generator)
    return text_T[starts[:, None] + torch.arange(LENGTH + 1)]


def nll(model: Transformer, windows: torch.Tensor, scales: KVScales | None = None) -> torch.Tensor:
    """Mean negative log-likelihood in nats."""
    attend = PackedCausal.of([LENGTH] * len(windows))
    tokens, positions = windows[:, :-1].flatten(), torch.arange(LENGTH).repeat(len(windows))
    hidden = model(tokens, positions, attend if scales is None else RoundedKV(attend, scales))
    return cross_entropy(hidden, model.head_weight, windows[:, 1:].flatten(), 0.0)[0] / len(tokens)


def watch(model: Transformer, windows: torch.Tensor) -> KVRange:
    seen = KVRange(2, 2)
    attend = seen.watch(PackedCausal.of([LENGTH] * len(windows)))
    with torch.no_grad():
        model(windows[:, :-1].flatten(), torch.arange(LENGTH).repeat(len(windows)), attend)
    return seen


@pytest.fixture(scope="module")
def text_T() -> torch.Tensor:
    """A file of Python's own library, byte by byte: real text, a vocabulary of 256."""
    with open(argparse.__file__, "rb") as file:
        return torch.tensor(list(file.read()))


@pytest.fixture(scope="module")
def model(text_T) -> Transformer:
    """Two small layers after 150 steps on the first four fifths."""
    generator = torch.Generator().manual_seed(0)
    model = Transformer(Spec.preset("debug").replace(vocab_size=256))
    model.init_weights(generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)
    for step in range(STEPS := 150):
        loss = nll(model, batches(text_T[: len(text_T) * 4 // 5], 12, generator))
        loss.backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 10) * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def calibration(text_T) -> torch.Tensor:
    return batches(text_T[: len(text_T) * 4 // 5], 16, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", EIGHT_BITS, ids=lambda s: f"{s.kind}-{s.granularity}")
def test_eight_bits_cost_less_than_half_a_percent(model, text_T, calibration, scheme) -> None:
    held_out = batches(text_T[len(text_T) * 4 // 5 :], 32, torch.Generator().manual_seed(2))
    plain = nll(model, held_out)
    assert plain < 2.6  # it has learnt: chance is ln 256 = 5.5
    scales = watch(model, calibration).scales(scheme)
    rounded = nll(model, held_out, scales)
    assert rounded != plain
    assert abs(rounded - plain).exp() < 1.005
    if scheme == KV_INT8:  # what a scale of 1 that nobody calibrated would cost
        ones = tuple(torch.ones(1) for _ in range(2))
        lost = nll(model, held_out, KVScales(scheme, ones, ones)) - plain
        assert lost > 20 * abs(rounded - plain)


def test_what_is_recorded_is_what_the_cache_stores(model, calibration) -> None:
    """Keys after rotary positions, values as they come; the output unchanged."""
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    class Spy:
        max_len = LENGTH

        def __call__(self, layer, q, k, v, window):
            kept[layer] = k, v
            return PackedCausal.of([LENGTH])(layer, q, k, v, window)

    seen = KVRange(2, 2)
    tokens, positions = calibration[0, :-1], torch.arange(LENGTH)
    watched = model(tokens, positions, seen.watch(Spy()))
    assert torch.equal(watched, model(tokens, positions, PackedCausal.of([LENGTH])))
    for layer in range(2):
        k, v = kept[layer]
        assert torch.equal(seen.keys_LG[layer], k.abs().amax((0, 2)))
        assert torch.equal(seen.values_LG[layer], v.abs().amax((0, 2)))


def test_batches_and_ranks_add_up_to_all_of_the_text(model, calibration) -> None:
    whole = watch(model, calibration)
    ranks = [watch(model, part) for part in calibration.split([3, 13])]
    assert not torch.equal(ranks[0].keys_LG, whole.keys_LG)
    gathered = [torch.stack([rank.keys_LG for rank in ranks]), torch.stack([rank.values_LG for rank in ranks])]
    for rank in ranks:
        places = iter(gathered)
        rank.merge(lambda mine, places=places: next(places).amax(0))
    for scheme in (KV_INT8, KV_FLOAT8_HEAD):
        expected = whole.scales(scheme)
        for rank in ranks:
            found = rank.scales(scheme)
            for mine, theirs in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    assert [scale.shape for scale in whole.scales(KV_INT8).keys] == [(1,), (1,)]
    assert [scale.shape for scale in whole.scales(KV_INT8_HEAD).values] == [(2,), (2,)]


def test_a_layer_that_saw_nothing_or_nan_is_named() -> None:
    attend = PackedCausal.of([4])
    q, k = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    seen = KVRange(2, 2)
    seen.watch(attend)(0, q, k, k, None)
    with pytest.raises(PunaError, match=r"layer 1, keys: .*absolute maximum of \[0.0\]"):
        seen.scales(KV_INT8)
    v = k.clone()
    v[2, 1, 3] = torch.nan
    seen.watch(attend)(1, q, k, v, None)
    seen.watch(attend)(1, q, k, k, None)  # a later batch does not hide it
    with pytest.raises(PunaError, match=r"layer 1, values: .*nan"):
        seen.scales(KV_FLOAT8)
