from __future__ import annotations

import dataclasses

import pytest
import torch

from puna.base.console import PunaError
from puna.model.presets import NAMES
from puna.model.rope import inverse_frequencies
from puna.model.spec import Rope, Spec
from puna.model.transformer import Transformer

# Parameter counts as published, tied heads once.
PUBLISHED = {
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_405b": 405_853_388_800,
    "llama3.2_1b": 1_235_814_400, "llama3.2_3b": 3_212_749_824, "qwen3_0.6b": 596_049_920, "qwen3_8b": 8_190_735_360,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name: str) -> None:
    spec = Spec.preset(name)
    assert spec.num_params() == PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(spec).parameters()) == PUBLISHED[name]


def test_llama3_presets_exactly() -> None:
    eight = Spec.preset("llama3_8b")
    assert (eight.hidden_size, eight.num_hidden_layers, eight.num_attention_heads) == (4096, 32, 32)
    assert (eight.num_key_value_heads, eight.vocab_size, eight.intermediate_size) == (8, 128256, 14336)
    assert (eight.rms_norm_eps, eight.rope.rope_theta) == (1e-5, 500000.0)
    assert Spec.preset("llama3_70b").intermediate_size == 28672
    big = Spec.preset("llama3_405b")
    assert (big.hidden_size, big.num_hidden_layers, big.num_attention_heads) == (16384, 126, 128)
    assert big.intermediate_size == 53248


@pytest.mark.parametrize("name", NAMES)
def test_config_round_trip(name: str) -> None:
    spec = Spec.preset(name)
    assert Spec.from_config(spec.to_config()) == spec


@pytest.mark.parametrize(
    "rope",
    [
        Rope("linear", factor=4.0),
        Rope("dynamic", factor=2.0),
        Rope("yarn", factor=4.0, original_max_position_embeddings=512, mscale=1.0, mscale_all_dim=0.7),
        Rope("yarn", factor=4.0, original_max_position_embeddings=512, beta_fast=16.0, truncate=False),
        Rope("llama3", factor=8.0, original_max_position_embeddings=512),
    ],
    ids=lambda r: r.rope_type,
)
def test_rope_round_trip(rope: Rope) -> None:
    spec = Spec(rope=rope)
    assert Spec.from_config(spec.to_config()).rope == rope


def test_both_spellings_of_rope_scaling() -> None:
    base = Spec.preset("debug").to_config()
    scaling = {"factor": 2.0, "rope_type": "linear"}
    old = {**base, "rope_scaling": {"factor": 2.0, "type": "linear"}, "rope_theta": 5e5}
    new = {**base, "rope_parameters": {**scaling, "rope_theta": 5e5}, "rope_scaling": None, "rope_theta": None}
    assert Spec.from_config(old).rope == Spec.from_config(new).rope
    assert Spec.from_config(new).rope.rope_theta == 5e5


def test_flops_and_kv_by_hand() -> None:
    spec = Spec.preset("llama3_8b")
    without_table = PUBLISHED["llama3_8b"] - 128256 * 4096
    assert spec.flops_per_token(8192) == 6 * without_table + 12 * 32 * 32 * 128 * 8192
    assert spec.kv_bytes_per_token() == 131072


def test_yarn_and_plain_agree_without_stretching() -> None:
    plain = inverse_frequencies(Rope(), 32)
    assert torch.equal(inverse_frequencies(Rope("linear", factor=1.0), 32), plain)
    assert torch.allclose(inverse_frequencies(Rope("dynamic", factor=4.0), 32, max_len=100), plain)
    assert not torch.allclose(inverse_frequencies(Rope("dynamic", factor=4.0), 32, max_len=4096), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 is not divisible by num_key_value_heads 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"sliding_windows": (None,)}, "1 window entries for 2 layers"),
    ],
)
def test_impossible_shapes(change: dict, message: str) -> None:
    with pytest.raises(PunaError, match=message) as caught:
        dataclasses.replace(Spec(), **change)
    assert caught.value.hint


def test_unsupported_configs_are_refused() -> None:
    config = Spec.preset("debug").to_config()
    for change in ({"model_type": "gpt2"}, {"hidden_act": "gelu"}, {"quantization_config": {"bits": 4}},
                   {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}):  # fmt: skip
        with pytest.raises(PunaError):
            Spec.from_config({**config, **change})
    with pytest.raises(PunaError, match="did you mean 'llama3_8b'"):
        Spec.load("preset:lama3_8b")
