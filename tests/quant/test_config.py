"""QuantConfig: presets, format texts, overrides, and what is refused."""

from __future__ import annotations

import pytest

from puna.base.console import PunaError
from puna.ops.formats.scheme import FLOAT8, INT4, INT8, Scheme
from puna.quant.config import PRESETS, QuantConfig, format_text, hf_name, parse_format

TEXTS = {
    "int8": INT8, "int4_g128": INT4, "int3": Scheme(3), "int4_g32_asym": Scheme(4, "int", False, "group", 32),
    "int2_asym": Scheme(2, "int", False), "fp8": FLOAT8, "fp8_tensor": Scheme(kind="float", granularity="tensor"),
    "fp8_b128": Scheme(kind="float", granularity="block", group_size=128), "none": None,
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_format_texts_both_ways(text) -> None:
    assert parse_format(text) == TEXTS[text]
    assert format_text(TEXTS[text]) == text


@pytest.mark.parametrize(
    "text", ["int9", "int1", "int4g128", "int4_g", "fp4", "fp8_asym", "", "INT8", "int4_g0", "fp8_b0"]
)
def test_no_format(text) -> None:
    with pytest.raises(PunaError, match=r"is not a number format|integers of"):
        parse_format(text)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name) -> None:
    config = QuantConfig.preset(name, overrides=("*.down_proj=int8", "layers.0.*=none"))
    assert QuantConfig.of(config.to_dict()) == config
    assert config.scheme_of("layers.3.mlp.down_proj") == INT8
    assert config.scheme_of("layers.0.mlp.down_proj") is None
    assert config.scheme_of("lm_head") is None


def test_overrides_know_both_spellings() -> None:
    config = QuantConfig(overrides=("model.layers.*.self_attn.o_proj=int4_g64", "*.1.attn.q_proj=none", "lm_head=int8"))
    assert config.format_of("layers.7.attn.o_proj") == "int4_g64"
    assert config.format_of("layers.1.attn.q_proj") == "none"
    assert config.format_of("layers.11.attn.q_proj") == "int8"
    assert config.format_of("lm_head") == "int8"
    assert QuantConfig(overrides={"*.down_proj": "int8"}) == QuantConfig(overrides=("*.down_proj=int8",))
    assert hf_name("layers.7.attn.o_proj") == "model.layers.7.self_attn.o_proj"


def test_what_needs_text() -> None:
    assert [name for name in PRESETS if not QuantConfig.preset(name).needs_calibration] == [
        "int8_wo", "int4_wo", "int4_hqq", "llm_int8", "fp8",
    ]  # fmt: skip
    assert QuantConfig.preset("int8_wo", kv="int8").needs_calibration
    assert [name for name in PRESETS if QuantConfig.preset(name).is_plain] == [
        "int8_wo",
        "int4_wo",
        "fp8",
        "fp8_static",
    ]


BAD = [
    ({"rounding": "gtpq"}, "did you mean 'gptq'"),
    ({"rounding": "gptq", "weights": "fp8"}, "use rounding nearest"),
    ({"outlier_threshold": 6.0}, "llm_int8"),
    ({"damping": 0.0}, "above 0"),
    ({"target_bits": 9.0}, "between 2 and 8.5"),
    ({"target_bits": 4.0, "weights": "fp8"}, "int4_g128"),
    ({"overrides": ("int8",)}, "down_proj=int8"),
    ({"overrides": ("*.down_proj=int9",)}, "formats"),
    ({"kv": "int4"}, "did you mean 'int8'"),
]


@pytest.mark.parametrize(("fields", "hint"), BAD)
def test_what_cannot_be(fields, hint) -> None:
    with pytest.raises(PunaError) as caught:
        QuantConfig(**fields)
    assert hint in caught.value.hint
