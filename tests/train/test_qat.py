"""Training with rounded numbers: what is trained is what rounding the saved weights gives, alone and on a mesh."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import puna
from parallel import ranks
from puna.base.config import build
from puna.base.console import PunaError
from puna.model.linear import Linear
from puna.model.spec import Spec
from puna.model.transformer import Transformer
from puna.ops.attention import PackedCausal
from puna.ops.basic import cross_entropy
from puna.ops.formats.layer import QuantizedWeight
from puna.ops.formats.packed import round_to_nearest
from puna.parallel.recompute import checkpoint_activations, compile_blocks
from puna.quant.config import QuantConfig
from puna.train.fake_quant import FakeQuantLinear, check_layers, fake_quantize_linears, switch, training_config
from puna.train.loop import Trainer
from puna.train.recipe import QuantSection, Recipe
from puna.weights.checkpoint import verify

SPEC = Spec.preset("debug").replace(vocab_size=256)
CONFIGS = [
    QuantConfig(weights="int4_g32"),
    QuantConfig(weights="int3_g16_asym"),
    QuantConfig(weights="int8", activations="int8"),
    QuantConfig(weights="fp8", activations="fp8"),
    QuantConfig(weights="fp8_tensor"),
    QuantConfig(weights="fp8_b32"),
    QuantConfig(weights="int4_g64", overrides=("*.down_proj=int8", "layers.0.attn.*=none")),
]


def random_model() -> Transformer:
    model = Transformer(SPEC)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # so that rounding is no detail
    return model


def serve_rounded(model: Transformer, config: QuantConfig) -> None:
    """What plain rounding makes of it: every quantized layer computes with a packed weight."""
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and (scheme := config.scheme_of(name)) is not None:
            stored = torch.float16 if scheme.granularity == "group" else torch.float32
            packed = round_to_nearest(layer.weight.detach(), scheme, stored)
            weight = QuantizedWeight(packed, config.activation_scheme)
            layer.forward = lambda x, weight=weight: weight.product(x)  # type: ignore[method-assign]
            layer.forward_all = lambda layers, x: [layer.forward(x) for layer in layers]  # type: ignore


def logits(model: Transformer, length: int = 24) -> torch.Tensor:
    tokens, positions = torch.arange(length) * 7 % 256, torch.arange(length)
    return model.logits(model(tokens, positions, PackedCausal.of([length])))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.weights}-{c.activations}-{len(c.overrides)}")
@torch.no_grad()
def test_what_is_trained_is_what_is_served(config: QuantConfig) -> None:
    trained, served = random_model(), random_model()
    plain = logits(trained)
    fake_quantize_linears(trained, config)
    serve_rounded(served, config)
    found = logits(trained)
    assert (found - plain).abs().max() > 1e-2
    assert (found - logits(served)).abs().max() < 1e-6 * plain.abs().max()
    switch(trained, False)
    assert torch.equal(logits(trained), plain)


def test_the_gradient_passes_as_if_nothing_had_been_rounded() -> None:
    layer = Linear(64, 48)
    torch.nn.init.normal_(layer.weight)
    model = torch.nn.ModuleDict({"layer": layer})
    fake_quantize_linears(model, QuantConfig(weights="int4_g32", activations="int8"))
    assert type(layer) is FakeQuantLinear
    x, direction = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48)
    layer(x).backward(direction)
    weight, rounded_x = layer.weight.detach(), x.detach()
    for_weight = round_to_nearest(weight, QuantConfig(weights="int4_g32").scheme_of("layer"), torch.float16)  # type: ignore
    for_x = round_to_nearest(rounded_x, QuantConfig(activations="int8").activation_scheme)  # type: ignore
    torch.testing.assert_close(layer.weight.grad, direction.T @ for_x.dequantize())
    torch.testing.assert_close(x.grad, direction @ for_weight.dequantize())


@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("way", ["full", "selective", "compiled", "bfloat16"])
def test_passes_around_it_change_nothing(way: str, activations: str) -> None:
    """Gradients under activation checkpointing, torch.compile (without code generation) and autocast.

    Where torch's kernels stand in for ours, sums end in other last bits, and a rounded input may get another code.
    """
    tolerance = 0.2 if way == "bfloat16" else 1e-2 if activations == "int8" and way != "full" else 1e-4

    def gradients(around: str) -> list[torch.Tensor]:
        model = random_model()
        fake_quantize_linears(model, QuantConfig(weights="int4_g32", activations=activations))
        blocks = list(model.layers)
        if around in ("full", "selective"):
            checkpoint_activations(blocks, around)
        if around == "compiled":
            compile_blocks(blocks, lambda forward: torch.compile(forward, backend="aot_eager", fullgraph=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "bfloat16"):
            logits(model).float().square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, found = gradients("eager"), gradients(way)
    assert len(plain) == len(found) == len(list(random_model().parameters()))
    for a, b in zip(plain, found, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()


# --- a run ------------------------------------------------------------------------------------------------------------


def rows(folder: str | Path, key: str = "loss") -> list[float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_a_run_starts_plain_validates_rounded_and_leaves_its_config(recipe, tmp_path, capsys) -> None:
    recipe["validation"]["every"] = 5
    plain = {**recipe, "out": str(tmp_path / "plain")}
    puna.train(plain)
    recipe["quant"] = {"preset": "int4_gptq", "weights": "int3_g32", "start_step": 9}
    capsys.readouterr()
    puna.train(recipe)
    assert "weights int3_g32, rounded to nearest in every forward pass from step 9; not used in training: rounding gptq" in (
        " ".join(capsys.readouterr().err.split())
    )  # fmt: skip
    losses, expected = rows(recipe["out"]), rows(plain["out"])
    assert losses[:9] == expected[:9]
    assert losses[9] != expected[9]
    assert rows(recipe["out"], "val_loss")[0] != rows(plain["out"], "val_loss")[0]  # of the same weights, rounded
    assert losses[-1] < losses[0] - 0.5
    latest = Path(recipe["out"], "latest")
    said = json.loads((latest / "puna_quant.json").read_text())
    assert said["qat"]
    config = QuantConfig.of(said["config"])
    assert config == QuantConfig(weights="int3_g32")  # rounding to nearest: what was trained
    assert verify(latest) == []
    assert "puna_quant.json" in (latest / "manifest.json").read_text()
    assert not Path(plain["out"], "latest", "puna_quant.json").exists()
    # The last validation is that of the saved weights, rounded: as `validate` of a plain trainer gives with such weights.
    judge = Trainer(
        build(Recipe, {**recipe, "quant": {}, "out": str(tmp_path / "judge"), "model": {"path": str(latest)}})
    )
    unrounded = judge.validate()["val_loss"]
    serve_rounded(judge.model, config)
    assert judge.validate()["val_loss"] == pytest.approx(rows(recipe["out"], "val_loss")[-1], rel=1e-6)
    assert abs(unrounded - rows(recipe["out"], "val_loss")[-1]) > 1e-4


def test_a_run_goes_on_bit_for_bit(recipe, tmp_path) -> None:
    """Stopped before rounding begins and again after: the step decides, not what the process has seen."""
    recipe["quant"] = {"preset": "int8_wo", "activations": "fp8", "start_step": 8}
    whole = {**recipe, "out": str(tmp_path / "whole")}
    puna.train(whole)
    for stop in (6, 15):
        trainer = Trainer(build(Recipe, recipe))
        step = trainer._one_step

        def step_and_signal(trainer=trainer, step=step, stop=stop) -> None:
            step()
            if trainer.step_done == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer._one_step = step_and_signal  # type: ignore[method-assign]
        assert trainer.run()["interrupted"]
    assert puna.train(recipe)["step"] == 24
    assert rows(recipe["out"]) == rows(whole["out"])
    weights = [Path(run["out"], "latest", "model.safetensors").read_bytes() for run in (recipe, whole)]
    assert weights[0] == weights[1]


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"preset": "int4"}, "no quantization preset is called 'int4'"),
        ({"weights": "int9"}, "'int9' is not a number format"),
        ({"preset": "fp8_static"}, "'fp8_static' need a scale from calibration"),
        ({"preset": "int8_wo", "start_step": 24}, "start_step is 24, the run has 24 steps"),
        ({"preset": "int8_wo", "start_step": -1}, "start_step is -1"),
        ({"preset": "int4_wo"}, r"layers.0.attn.q_proj: a weight of 64 x 64 does not divide into groups of 128"),
        ({"weights": "none"}, "rounds no layer"),
    ],
)
def test_refused_before_anything_is_made(recipe, quant: dict[str, Any], message: str) -> None:
    with pytest.raises(PunaError, match=message):
        puna.train({**recipe, "quant": quant})
    assert not os.path.exists(recipe["out"])


@pytest.mark.parametrize(
    ("config", "tp", "message"),
    [
        ({"weights": "int4_g16"}, 2, ""),
        ({"weights": "int4_g16", "overrides": ("*_proj=none", "*.q_proj=int8")}, 2, ""),
        ({"weights": "int8"}, 2, r"o_proj is cut into parts of 32 columns by tp 2, and 64 share a scale"),
        ({"weights": "int4_g64"}, 2, r"o_proj is cut into parts of 32 columns by tp 2, and 64 share"),
        ({"weights": "fp8_tensor"}, 2, r"q_proj is cut into parts of 32 rows by tp 2, and 64 share"),
        ({"weights": "fp8_b32", "overrides": ("*.q_proj=none",)}, 4, r"k_proj is cut into parts of 16 rows by tp 4"),
        ({"weights": "int4_g16", "activations": "int8"}, 2, "inputs are rounded per token to int8, and tp 2"),
        ({"weights": "int4_g16", "overrides": ("lm_head=int8",)}, 1, "the output head is not trained with rounding"),
    ],
)
def test_what_fits_a_mesh(config: dict[str, Any], tp: int, message: str) -> None:
    spec = SPEC.replace(tie_word_embeddings=False)
    if not message:
        check_layers(QuantConfig(**config), spec, tp)
        return
    with pytest.raises(PunaError, match=message):
        check_layers(QuantConfig(**config), spec, tp)


def test_codes_of_halved_weights_are_refused() -> None:
    with pytest.raises(PunaError, match="in bfloat16 on tp 1, pp 2"):
        check_layers(QuantConfig(weights="int8"), SPEC, 1, 2, "bfloat16")
    check_layers(QuantConfig(weights="int8"), SPEC, 1, 1, "bfloat16")


def test_off_unless_asked_for() -> None:
    assert training_config(QuantSection()) is None
    assert training_config(QuantSection(overrides=("*.down_proj=int4",))) == QuantConfig(
        overrides=("*.down_proj=int4",)
    )
    preset = training_config(QuantSection(preset="w8a8_sq"))
    assert preset == QuantConfig(weights="int8", activations="int8")


# --- on a mesh --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    found = ranks.run(Path(__file__).with_name("qat_checks.py"), timeout=200)
    assert set(found) == set(ON_RANKS)
    return found


ON_RANKS = ["reference@1", "one_bfloat16@1", "ddp@2", "fsdp@2", "fsdp_bfloat16@2", "tp_overlap@2", "pp@2",
            "fsdp_tp_without_sequence@4"]  # fmt: skip


@pytest.mark.parametrize("name", ON_RANKS)
def test_on_ranks(report: dict[str, Any], name: str) -> None:
    """The first step as in one process; later a sum in another order may move a weight across the edge of two codes."""
    assert report[name]["ok"], report[name]["error"]
    found = report[name]["result"]
    expected = report["one_bfloat16@1" if "bfloat16" in name else "reference@1"]["result"]
    assert found["loss"][0] == pytest.approx(expected["loss"][0], rel=1e-5)
    assert found["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_few_bits_trained_beat_few_bits_rounded() -> None:
    """A model that has learnt, then 60 more steps, plain or rounded: how much of rounding's damage is left.

    Three bits: four do next to no damage to a model as small and as little trained as this one.
    """
    with open(argparse.__file__, "rb") as file:
        text_T = torch.tensor(list(file.read()))
    learnt, held_out = text_T[: len(text_T) * 4 // 5], text_T[len(text_T) * 4 // 5 :]
    base = random_model()
    for parameter in base.parameters():
        parameter.data.div_(4 if parameter.ndim > 1 else 1)
    fit(base, learnt, 150, 4e-3)
    trained: dict[str, Transformer] = {}
    config = QuantConfig(weights="int3")
    for way in ("plain", "rounded"):
        trained[way] = random_model()
        trained[way].load_state_dict(base.state_dict())
        if way == "rounded":
            fake_quantize_linears(trained[way], config)
        fit(trained[way], learnt, 60, 1e-3)
    plain = score(trained["plain"], held_out)
    fake_quantize_linears(trained["plain"], config)
    damage, left = score(trained["plain"], held_out) - plain, score(trained["rounded"], held_out) - plain
    assert damage > 0.015
    assert left < 0.6 * damage


def nll(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    length = windows.shape[1] - 1
    attend = PackedCausal.of([length] * len(windows))
    hidden = model(windows[:, :-1].flatten(), torch.arange(length).repeat(len(windows)), attend)
    return cross_entropy(hidden, model.head_weight, windows[:, 1:].flatten(), 0.0)[0] / (length * len(windows))


def fit(model: Transformer, text_T: torch.Tensor, steps: int, rate: float) -> None:
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        starts = torch.randint(len(text_T) - 128, (12, 1), generator=draw)
        nll(model, text_T[starts + torch.arange(129)]).backward()
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def score(model: Transformer, text_T: torch.Tensor) -> float:
    starts = torch.arange(0, len(text_T) - 129, 128)[:, None]
    return nll(model, text_T[starts + torch.arange(129)]).item()
