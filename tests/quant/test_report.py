"""The report card: its figures, its words, its verdict, and its way to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from puna.base.console import PunaError
from puna.quant.config import PRESETS, QuantConfig, parse_format
from puna.quant.figures import Layer, Quality, Reload, Speed, better_format, parse_increase, suggestion
from puna.quant.report import Report, describe
from puna.quant.score import Estimate, Repaired, Score
from quant.sample_report import CALIBRATION, sample_report


def test_json_there_and_back() -> None:
    report = sample_report()
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.of(plain) == report
    assert plain["derived"]["share_of_bandwidth"] == {"before": 0.82, "after": pytest.approx(0.6336)}
    assert plain["derived"]["reload_passed"] is True
    assert plain["derived"]["worst"][0]["override"] == '--override "layers.2.mlp.down_proj=int8"'
    assert plain["after"]["increase"] == {"value": 0.0629, "error": 0.0032}
    empty = Report("m", "o", {}, "gguf")
    assert Report.of(json.loads(json.dumps(empty.to_json()))) == empty


def test_numbers_that_are_none_are_null_in_json() -> None:
    broken = Quality(Estimate(math.nan, math.nan), None, Estimate(math.inf, None))
    plain = json.loads(json.dumps(sample_report(after=broken).to_json(), allow_nan=False))
    assert plain["after"]["perplexity"] == {"value": None, "error": None}
    again = Report.of(plain)
    assert again.after is not None
    assert math.isnan(again.after.perplexity.value)
    assert not again.verdict().passed


def test_bits_are_weighted_by_layers_sizes() -> None:
    layers = [Layer("a", "int4_g128", 300, 4.0), Layer("b", "int8", 100, 8.0)]
    report = sample_report(layers=layers)
    assert report.bits_per_weight == 5.0
    assert report.bits_per_parameter == pytest.approx(8 * 6.4 / 10)
    assert Report("m", "o", {}, "gguf").bits_per_weight is None
    assert Report("m", "o", {}, "gguf").bits_per_parameter is None


def test_the_worst_layers_come_first() -> None:
    worst = sample_report().worst()
    assert len(worst) == 5
    errors = [s.layer.error for s in worst]
    assert errors == sorted(errors, reverse=True)
    assert worst[0].layer.name == "layers.2.mlp.down_proj"
    assert worst[0].more_bytes == (8 - 4.125) * (1 << 20) / 8
    layers = [Layer("a", "int8", 1, 8, 0.5, 0.5), Layer("b", "int8", 1, 8), Layer("c", "int8", 1, 8, 0.1, math.nan)]
    assert [s.layer.name for s in sample_report(layers=layers).worst()] == ["c", "a"]


@pytest.mark.parametrize(
    ("format", "better"),
    [
        ("int4_g128", "int8"), ("int3_g128", "int4_g128"), ("int2_g32_asym", "int3_g32_asym"), ("int4", "int8"),
        ("int6_g64", "int8"), ("int8", "none"), ("int8_g128", "none"), ("fp8_tensor", "fp8"), ("fp8", "none"),
        ("fp8_b128", "none"), ("none", ""), ("Q4_K", ""),
    ],
)  # fmt: skip
def test_the_next_better_format(format, better) -> None:
    assert better_format(format) == better
    if better:
        parse_format(better)


def test_a_suggestion_is_an_override_the_config_takes() -> None:
    best = sample_report().worst()[0]
    word = best.override.removeprefix('--override "').removesuffix('"')
    config = QuantConfig.preset("int4_gptq", overrides=(word,))
    assert config.format_of("layers.2.mlp.down_proj") == "int8"
    assert config.format_of("layers.1.mlp.down_proj") == "int4_g128"
    nothing = suggestion(Layer("a", "none", 10, 16.0))
    assert nothing.override == ""
    assert nothing.more_bytes == 0
    awq = sample_report(format="awq").worst()[0]  # holds one number format for all layers
    assert awq.format == "none"
    assert awq.more_bytes == (16 - 4.125) * (1 << 20) / 8


def test_verdict() -> None:
    report = sample_report()
    assert report.verdict() == report.verdict(None)
    assert report.verdict().passed
    assert report.verdict().message == "perplexity 27.65 -> 29.39, +6.29 ± 0.32%"
    bad = report.verdict(0.05)
    assert not bad.passed
    assert bad.message == "perplexity 27.65 -> 29.39, +6.29 ± 0.32%; at most +5% was allowed"
    good = report.verdict(0.10)
    assert good.passed
    assert good.message.endswith("; within the +10% that was allowed")
    close = report.verdict(0.065)
    assert close.passed
    assert close.message.endswith("within the +6.5% that was allowed, by less than twice the error")
    assert not report.verdict(0.0628).passed
    assert report.verdict(0.0629).passed


def test_what_cannot_be_judged_does_not_pass() -> None:
    unmeasured = sample_report(before=None, after=None)
    assert unmeasured.verdict().passed
    assert not unmeasured.verdict(0.5).passed
    assert "not measured" in unmeasured.verdict(0.5).message
    nan = Quality(Estimate(math.nan, math.nan), None, Estimate(math.nan, math.nan))
    for limit in (None, 10.0):
        assert not sample_report(after=nan).verdict(limit).passed
    for difference in (2e-4, math.nan):
        verdict = sample_report(reload=Reload(difference, 1e-4)).verdict()
        assert not verdict.passed
        assert "the files do not give back what was computed: FAILED" in verdict.message


@pytest.mark.parametrize(
    ("text", "value"),
    [("1%", 0.01), ("0.5 %", 0.005), ("0.01", 0.01), ("+2%", 0.02), ("150%", 1.5), ("0", 0.0), (".5%", 0.005)],
)
def test_increase_from_text(text, value) -> None:
    assert parse_increase(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "one", "-1%", "nan", "inf", "1e-2", "1%%", "1,5%"])
def test_an_increase_that_is_none(text) -> None:
    with pytest.raises(PunaError, match="is not an increase of perplexity"):
        parse_increase(text)


def test_an_increase_that_may_be_percent() -> None:
    with pytest.raises(PunaError, match="an increase of 1 would be 100%") as told:
        parse_increase("1")
    assert told.value.hint == 'write "1%" if that is meant'


def test_text_says_everything() -> None:
    text = sample_report().text()
    for words in (
        "models/opt -> out/opt int4",
        "int4_g128, gptq, kv int8, override layers.1.attn.o_proj=int8; 8 layers int4_g128, 1 int8; compressed-tensors",
        "plain rounding",
        "27.65 ± 0.30",
        "30.49 ± 0.35",
        "29.39 ± 0.33",
        "+10.27 ± 0.41%",
        "+6.29 ± 0.32%",
        "1.049 ± 0.011",
        "0.0512 ± 0.0020",
        "87.65 ± 0.29%",
        "38.7 ± 2.1%",
        "44.4 ± 1.3%",
        "4.56",  # bits of the quantized layers
        "16.00",
        "5.12",
        "19.07 MiB",
        "6.10 MiB",
        "41 (82% of bandwidth)",
        "99 (63% of bandwidth)",
        '--override "layers.2.mlp.down_proj=int8"',
        "+496.00 KiB",
        "128 x 512 tokens of 412 documents, plain text, seed 7; ids sha256 abababababab",
        "64 x 512 tokens, bos first, 32,651 scored (130,321 bytes); ids sha256 cdcdcdcdcdcd",
        "no document in both; 68 evaluation tokens lie in runs of 15 that calibration has too; they are not scored",
        "9m34s (calibration 1m01s, gptq 8m32s)",
        "peak memory: 3.00 GiB",
        "reload check: passed, max |dlogit| 3.1e-06 <= 1e-04",
        "kernels: int4 (torch) (8 layers), int8 (native) (1 layers)",
        "note: layers.0.mlp.down_proj: damping raised to 0.1",
        "machine: 2 cores, an EPYC",
        "command: puna quantize models/opt --preset int4_gptq",
        "made by: puna 0.1.0 2026-11-21",
        "warning: the cache's scales were clipped",
        "wrote out/opt int4/quant_report.json",
    ):
        assert words in text, words
    assert text.endswith("next: puna chat 'out/opt int4'")
    assert max(map(len, text.splitlines())) < 160


def test_text_after_a_failed_verdict_has_no_next_command() -> None:
    report = sample_report()
    assert "next:" not in report.text(report.verdict(0.01))
    assert "at most +1% was allowed" in report.text(report.verdict(0.01))
    assert report.text(report.verdict(0.1)).endswith("next: puna chat 'out/opt int4'")


def test_what_was_not_measured_is_left_out() -> None:
    text = Report("m", "o", {"weights": "int8"}, "gguf", [Layer("layers.0.attn.q_proj", "int8", 10, 8.0)]).text()
    for words in ("perplexity", "nan", "None", "0 B", "worst", "reload", "time", "calibration", "tokens/s"):
        assert words not in text, words
    assert "8.00" in text
    plain = sample_report(rounding=None, repaired=None).text()
    assert "plain rounding" not in plain
    assert "repaired" not in plain


def test_no_damage_is_no_share() -> None:
    text = sample_report(repaired=Repaired(None, Estimate(0.4))).text()
    assert "no damage to tell from chance" in text
    assert "40%" in text


def test_evaluation_without_calibration() -> None:
    text = sample_report(calibration={**CALIBRATION, "samples": 0, "scored_bytes": None}).text()
    assert "32,651 scored; ids" in text
    assert "calibration: " not in text
    assert "disjoint: " not in text


def test_long_lists_are_cut() -> None:
    layers = [Layer(f"layers.{n}.attn.q_proj", "int4", 10, 4.0, note="damping raised") for n in range(9)]
    assert "notes: 4 more" in sample_report(layers=layers).text()
    config = {"weights": "int4", "overrides": [f"layers.{n}.*=int8" for n in range(4)]}
    assert describe(config) == "int4, 4 overrides"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_told_apart(name) -> None:
    words = {preset: describe(QuantConfig.preset(preset).to_dict()) for preset in PRESETS}
    assert len(set(words.values())) == len(PRESETS)
    assert words[name].startswith(QuantConfig.preset(name).weights)


def test_quality_of_a_score() -> None:
    score = Score()
    reference, targets = torch.randn(40, 11), torch.randint(11, (40,))
    score.compare(reference, reference + 0.2 * torch.randn(40, 11), targets, torch.arange(40) // 10)
    before, after = Quality.of_original(score), Quality.of(score)
    assert before.perplexity == score.perplexity(reference=True)
    assert after.perplexity == score.perplexity()
    assert before.kl is None
    assert after.kl == score.kl()
    assert after.increase == score.increase()
    assert after.bits_per_byte is None
    assert len(after.kl_per_chunk) == 4


def test_speed_without_a_measured_bandwidth_has_no_share() -> None:
    assert Speed(10.0).share is None
    assert str(Speed(10.0, 5e9)) == "10"
    assert str(Speed(10.0, 5e9, 100e9)) == "10 (50% of bandwidth)"


def test_a_report_is_not_changed_by_telling_it() -> None:
    report = sample_report()
    copy = dataclasses.replace(report)
    report.text(), report.to_json(), report.worst()
    assert report == copy
