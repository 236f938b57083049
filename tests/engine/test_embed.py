"""engine/embed.py: one vector per text."""

from __future__ import annotations

import pytest
import torch

from puna.base.console import PunaError
from puna.engine.embed import pool
from puna.ops.attention import PackedCausal
from puna.weights.folder import load_model

HIDDEN = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
STARTS, LENGTHS = [0, 3, 9], [3, 5, 1]  # rows 8 belongs to no text


def test_last_and_mean():
    assert torch.equal(pool(HIDDEN, STARTS, LENGTHS, normalize=False), HIDDEN[[2, 7, 9]])
    means = torch.stack([HIDDEN[:3].mean(0), HIDDEN[3:8].mean(0), HIDDEN[9]])
    torch.testing.assert_close(pool(HIDDEN, STARTS, LENGTHS, "mean", normalize=False), means)


@pytest.mark.parametrize("how", ["last", "mean"])
def test_length_one_and_fp32(how):
    plain = pool(HIDDEN.bfloat16(), STARTS, LENGTHS, how, normalize=False)
    unit = pool(HIDDEN.bfloat16(), STARTS, LENGTHS, how)
    assert unit.dtype is plain.dtype is torch.float32
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))
    assert torch.equal(pool(torch.zeros(2, 6), [0], [2], how), torch.zeros(1, 6))
    assert pool(HIDDEN, [], [], how).shape == (0, 6)


def test_a_mean_of_many_bf16_tokens_is_taken_in_fp32():
    many = torch.tensor([1.0, 1.0078125]).repeat(1500)[:, None].bfloat16()  # neighbours in bf16: none lies between
    torch.testing.assert_close(pool(many, [0], [3000], "mean", normalize=False), torch.tensor([[1.00390625]]))


@pytest.mark.parametrize("how", ["last", "mean"])
def test_others_change_nothing(how):
    broken = HIDDEN.clone()
    broken[4] = float("nan")
    together, alone = pool(broken, STARTS, LENGTHS, how), pool(HIDDEN[:3], [0], [3], how)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[2], pool(HIDDEN, STARTS, LENGTHS, how)[2])
    assert together[1].isnan().any() == (how == "mean")


@torch.no_grad()
def test_a_text_among_others_is_the_text_alone(model_folder):
    model, texts = load_model(model_folder), [torch.arange(4, 11), torch.arange(40, 43), torch.tensor([7])]
    lengths = [len(text) for text in texts]
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = model(torch.cat(texts), positions, PackedCausal.of(lengths))
    for how in ("last", "mean"):
        together = pool(hidden, [0, 7, 10], lengths, how)
        for text, mine in zip(texts, together, strict=True):
            places = torch.arange(len(text))
            alone = pool(model(text, places, PackedCausal.of([len(text)])), [0], [len(text)], how)
            torch.testing.assert_close(mine[None], alone, rtol=1e-5, atol=1e-5)


def test_bad_input():
    with pytest.raises(PunaError, match="pooling 'max' is not known"):
        pool(HIDDEN, [0], [3], "max")
    with pytest.raises(PunaError, match="text 1 of 2 has no tokens"):
        pool(HIDDEN, [0, 3], [3, 0])
    with pytest.raises(AssertionError):
        pool(HIDDEN, [8], [3])
